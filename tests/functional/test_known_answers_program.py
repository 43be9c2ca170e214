"""The program that measures how far a recorded answer can be trusted, on tiny models and few prompts."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from benchmarks import damaged_models, known_answers
from tests.node import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny("a", sharpness=8, layers=3))
    return path


@pytest.fixture
def answers(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "answers.json"
    assert known_answers.main(["record", "--model", str(model), "--prompts", "4", str(path)]) == 0
    return path


def table(printed: str) -> dict[str, list[str]]:
    """Return the rows of a printed table by their first column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_prompts_are_random_and_the_same_each_time() -> None:
    made = list(known_answers.prompts(200))
    assert made == list(known_answers.prompts(200))
    assert list(known_answers.prompts(50)) == made[:50]
    assert len(set(made)) == 200


def test_no_machine_is_called_wrong_that_computes_rightly(model: Path, answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(recorded) == 4
    asked = ["--model", str(model), "--answers", str(answers), "--threads", "1,2", "--batches", "node,32"]
    assert known_answers.main(["agree", *asked]) == 0
    rows = table(capsys.readouterr().out)
    assert len(rows) == 4
    assert {row[7] for row in rows.values()} == {"0"}
    assert {row[0] for row in rows.values()} == {"4"}
    assert rows["1 thread, as a node, own library"][8] == "0.00"


def test_damage_is_noticed_and_its_absence_is_not(model: Path, answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for only in ("none", "another model"):
        known_answers.main(["damage", "--model", str(model), "--answers", str(answers), "--only", only])
    assert [line.rpartition("|")[0].rpartition("|")[2].strip() for line in capsys.readouterr().out.splitlines()] == [
        *("noticed on, of 4 prompts", "---:", "0"),
        *("noticed on, of 4 prompts", "---:", "4"),
    ]


def test_a_wrong_machine_makes_the_program_fail(model: Path, answers: Path) -> None:
    model.write_bytes(tiny("b", sharpness=8, layers=3))
    assert known_answers.main(["agree", "--model", str(model), "--answers", str(answers)]) == 1


def test_each_damaged_model_is_a_whole_file_and_no_two_are_the_same(model: Path, tmp_path: Path) -> None:
    source, made = damaged_models.Source(model), list[bytes]()
    for damage in damaged_models.damages(source):
        damaged_models.write(source, tmp_path / "damaged.gguf", damage)
        made.append((tmp_path / "damaged.gguf").read_bytes())
        assert len(gguf.GGUFReader(tmp_path / "damaged.gguf").tensors) == len(source.tensors)
    assert made[0] == model.read_bytes()
    assert len(made) > 20
    assert len(set(made)) >= len(made) - 2  # here float16 is as it was before, and one row of 32 is 1/64 of them, rounded up
