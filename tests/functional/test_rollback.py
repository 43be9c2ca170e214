"""Rollback and history on a whole node: what may be returned to, and what may not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.store.ledger import Ledger
from tests.node import Node, flip, tiny


def test_rollback_returns_to_a_generation_and_resume_goes_forward(used: Node) -> None:
    first = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0

    assert used.run("rollback", "999").code == 64
    assert used.run("rollback").code == 0

    assert used.active() == ["a:v1"]
    assert used.index()["generation"] == first
    changes = used.run("history", "--json").json
    assert changes[-1]["actor"] == "rollback"
    assert changes[-1]["removed"] == ["b:v1"]
    assert [change["actor"] for change in changes[:2]] == ["apply", "apply"]
    assert changes[-1]["lock"] == used.run("status", "--json").json["lock"]
    assert used.run("resume", "--json").json["models"] == ["b:v1"]
    planned = used.run("plan", "--json").json
    assert planned["summary"]["download_bytes"] == 0
    assert used.run("apply").code == 0
    assert used.active() == ["a:v1", "b:v1"]


# -- a rollback holds ------------------------------------------------------------------------------


@pytest.fixture
def held(used: Node) -> Node:
    """Return a node whose operator rolled back from the run that installed ``b:v1``."""
    two_generations(used)
    assert used.run("rollback").code == 0
    return used


def test_no_later_run_brings_again_what_was_rolled_back(held: Node) -> None:
    for command in ("apply", "sync", "apply"):
        assert held.run(command).code == 0
        assert held.active() == ["a:v1"]

    assert held.run("plan", "--detailed-exitcode").code == 0
    status = held.run("status", "--json").json
    assert status["held"] is True
    assert {one["id"]: one["reason"].partition(":")[0] for one in status["models"]}["b:v1"] == "held"


def test_a_snapshot_that_changes_other_things_ends_no_hold(held: Node) -> None:
    held.publish(held.item("a:v1", tiny("a")), held.item("b:v1", tiny("b")), held.item("c:v1", tiny("c")))

    assert held.run("apply").code == 0

    assert held.active() == ["a:v1", "c:v1"]


def test_other_content_of_the_model_ends_its_hold(held: Node) -> None:
    held.publish(held.item("a:v1", tiny("a")), held.item("b:v1", tiny("corrected")))

    assert held.run("apply").code == 0

    assert held.active() == ["a:v1", "b:v1"]
    assert held.run("status", "--json").json["held"] is False


def test_what_is_not_listed_any_more_leaves_all_the_same(held: Node) -> None:
    held.publish(held.item("b:v1", tiny("b")))

    assert held.run("apply").code == 0

    assert held.active() == []


def test_a_version_that_was_replaced_serves_again_and_stays(used: Node) -> None:
    used.publish(used.item("a:v1", tiny("a"), state="retired"), used.item("a:v2", tiny("newer"), replaces=["a:v1"]))
    assert used.run("apply").code == 0
    assert used.active() == ["a:v2"]

    assert used.run("rollback").code == 0
    assert used.active() == ["a:v1"]
    for _ in range(2):
        assert used.run("apply").code == 0
        assert used.active() == ["a:v1"]

    assert "a:v2" in used.run("resume").out
    assert used.run("apply").code == 0
    assert used.active() == ["a:v2"]
    assert used.run("resume").out == "nothing was held\n"


def test_a_rollback_that_the_node_is_not_healthy_with_holds_nothing(used: Node) -> None:
    used.publish(used.item("a:v1", tiny("a"), state="retired"), used.item("a:v2", tiny("newer"), replaces=["a:v1"]))
    assert used.run("apply").code == 0
    settings = used.folder / "reconcile.toml"
    settings.write_text(settings.read_text() + '\n[hooks]\nhealthy = ["false"]\n')

    assert used.run("rollback").code == 1

    assert used.active() == ["a:v2"]
    assert used.run("status", "--json").json["held"] is False


@pytest.mark.parametrize("change", ["unlisted", "disabled", "other content"])
def test_rollback_to_what_the_network_took_away_is_refused(used: Node, change: str) -> None:
    first = used.index()["generation"]
    other = used.item("b:v1", tiny("b"))
    match change:
        case "unlisted":
            used.publish(other)
        case "disabled":
            used.publish(used.item("a:v1", tiny("a"), state="disabled"), other)
        case _:
            used.publish(used.item("a:v1", tiny("anew")), other)
    assert used.run("apply").code == 0
    before = used.index()

    ran = used.run("rollback", str(first))

    assert ran.code == 1
    assert "a:v1" in ran.err
    assert used.index() == before


def two_generations(used: Node) -> int:
    first: int = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    return first


def test_rollback_out_of_a_damaged_generation(used: Node) -> None:
    first = two_generations(used)
    index = used.store / "active/index.json"
    index.chmod(0o644)
    index.write_bytes(b"{}")

    assert used.run("rollback").code == 0

    assert used.index()["generation"] == first
    assert used.active() == ["a:v1"]


def test_rollback_serves_no_bytes_that_are_not_known_to_be_good(used: Node) -> None:
    two_generations(used)
    serving = used.index()
    flip(next(path for path in used.blobs() if path.read_bytes() == tiny("a")))

    ran = used.run("rollback")

    assert ran.code == 1, ran
    assert "not verified: a:v1" in ran.err
    assert used.index() == serving


def test_rollback_follows_no_link_that_was_planted_in_a_kept_generation(used: Node, tmp_path: Path) -> None:
    first = two_generations(used)
    link = used.store / f"generations/{first}/models/a/v1"
    true = link.readlink()
    link.unlink()
    link.symlink_to(tmp_path, target_is_directory=True)

    assert used.run("rollback").code == 0

    assert used.active() == ["a:v1"]
    assert (used.store / "active/models/a/v1").readlink() == true


def ask(node: Node, script: str) -> None:
    """Let the node's ``healthy`` hook be *script*."""
    node.configure(f"\n[hooks]\nhealthy = ['sh', '-c', '{script}']\n")


@pytest.mark.parametrize("damaged", [False, True])
def test_rollback_to_what_the_node_is_not_healthy_with_goes_back(used: Node, *, damaged: bool) -> None:
    first = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a"), state="disabled"), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"), state="disabled"))
    assert used.run("lock").code == 0
    serving = used.index()
    if damaged:
        (used.store / "active/index.json").unlink()
    ask(used, "echo too slow >&2; exit 1")

    ran = used.run("rollback", str(first))

    assert ran.code == 1, ran
    assert f"not healthy with generation {first}: exited with 1: too slow" in ran.err
    assert "what served before serves again; `reconcile rollback --list` shows the others" in ran.err
    assert used.index()["models"] == ([] if damaged else serving["models"])
    assert f"went back from {first}: not healthy" in used.run("history", "--json").json[-1]["what"]
    ask(used, "exit 0")
    assert used.run("rollback", str(first)).code == 0
    assert used.active() == ["a:v1"]


def test_rollback_without_a_number_passes_over_what_the_node_was_not_healthy_with(used: Node) -> None:
    first = used.index()["generation"]
    ask(used, "exit 1")
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 3
    assert used.index()["generation"] == first
    ask(used, "exit 0")
    used.publish(used.item("a:v1", tiny("a")), used.item("c:v1", tiny("c")))
    assert used.run("apply").code == 0
    assert used.index()["generation"] == first + 2

    assert used.run("rollback").code == 0

    assert used.index()["generation"] == first
    assert used.active() == ["a:v1"]


def test_a_rollback_that_was_killed_while_it_asked_is_asked_about_by_the_next_run(used: Node) -> None:
    first = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a"), state="disabled"), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("lock").code == 0
    ask(used, "kill -KILL $PPID")
    command = [sys.executable, "-m", "reconciler", "rollback", str(first), "--config", str(used.folder / "reconcile.toml")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert used.active() == ["a:v1"]
    ask(used, "exit 0")

    ran = used.run("apply")

    assert ran.code == 0, ran
    assert used.active() == ["a:v1"], "what was rolled back is held, whoever was killed"
    assert first in {change["generation"] for change in used.run("history", "--json").json[-2:]}
    assert not used.run("plan", "--json").json["changes"]


def test_a_killed_rollback_is_asked_about_where_the_history_was_lost_before_it(used: Node) -> None:
    first = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a"), state="disabled"), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("lock").code == 0
    with Ledger.writing(used.context().layout.ledger) as ledger:
        ledger._write("DELETE FROM history", ())
    ask(used, "kill -KILL $PPID")
    command = [sys.executable, "-m", "reconciler", "rollback", str(first), "--config", str(used.folder / "reconcile.toml")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    ask(used, f"touch {used.folder}/asked")

    assert used.run("apply").code == 0

    assert (used.folder / "asked").exists()


def test_rollback_takes_no_unfinished_run_for_finished(used: Node) -> None:
    """What a killed run left is still the next run's to clear."""
    two_generations(used)
    with Ledger.writing(used.context().layout.ledger) as ledger:
        ledger.set_running(running=True)

    assert used.run("rollback").code == 0

    assert used.run("apply").code == 0
    assert "crash-recovered" in used.kinds()


def test_a_run_is_one_step_however_many_models_it_installed(used: Node) -> None:
    first = used.index()["generation"]
    used.publish(*(used.item(f"{name}:v1", tiny(name)) for name in "abcd"))
    assert used.run("apply").code == 0
    assert used.active() == ["a:v1", "b:v1", "c:v1", "d:v1"]

    listed = used.run("rollback", "--list", "--json").json["runs"]
    assert [(len(one["models"]), one["active"], one["refusal"]) for one in listed] == [(4, True, ""), (1, False, "")]
    assert used.run("rollback").code == 0

    assert used.index()["generation"] == first
    assert used.active() == ["a:v1"]
    assert [len(change["added"]) for change in used.run("history", "--json").json] == [1, 3, 0]


def test_the_list_says_why_a_set_cannot_serve_again(used: Node) -> None:
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    used.publish(used.item("a:v1", tiny("other")))
    assert used.run("apply").code == 0

    shown = used.run("rollback", "--list").out.splitlines()

    assert shown[0].endswith(": active")
    assert "the snapshot lists other content of a:v1 now; the snapshot no longer lists b:v1" in shown[1]
    assert "the snapshot lists other content of a:v1 now" in shown[2]
    ran = used.run("rollback")
    assert ran.code == 1
    assert "generation" in ran.err
    assert "the snapshot no longer lists b:v1" in ran.err
    assert "rollback --list" in ran.err


def archived(used: Node) -> None:
    """Let the network archive a version of a model in favour of another, which is active then."""
    used.publish(used.item("a:v1", tiny("a"), state="archived"), used.item("a:v2", tiny("newer"), replaces=["a:v1"]))
    assert [used.run("apply").code for _ in range(2)] == [0, 0], "it serves until the other one does, and goes to cold storage then"
    assert used.states()["a:v1"] == "archived"
    assert used.active() == ["a:v2"]


def test_a_rollback_restores_what_the_network_archived(used: Node) -> None:
    archived(used)
    assert all(path.read_bytes() != tiny("a") for path in used.blobs())

    assert used.run("rollback").code == 0

    assert used.active() == ["a:v1"]
    assert (used.store / "active" / "models" / "a" / "v1").is_dir()
    for _ in range(2):
        assert used.run("apply").code == 0
        assert used.active() == ["a:v1"], "it serves while what replaces it is held"
    assert used.run("resume").code == 0
    assert [used.run("apply").code for _ in range(2)] == [0, 0]
    assert used.active() == ["a:v2"]
    assert used.states()["a:v1"] == "archived"


@pytest.mark.parametrize("harm", ["rotten", "gone"])
def test_a_rollback_to_what_cold_storage_lost_is_refused_and_named(used: Node, harm: str) -> None:
    archived(used)
    (cold,) = (path for path in (used.store / "archive").rglob("*") if path.is_file())
    if harm == "rotten":
        flip(cold)
    else:
        cold.unlink()
    before = used.index()

    ran = used.run("rollback")

    assert ran.code == 1
    assert "a:v1" in ran.err
    assert "`reconcile apply` fetches it again" in ran.err or harm == "gone"
    assert used.index() == before
    assert used.run("apply").code == 0
    assert used.active() == ["a:v2"]


def test_a_rollback_takes_no_other_content_from_cold_storage_for_what_served(used: Node) -> None:
    """The id is listed as archived with other bytes, which are here for another model: its tree is another one than that which served."""
    item = used.item("a:v1", tiny("other"), state="archived")
    item["artifacts"][0]["path"] = item["entrypoint"] = "other.gguf"
    used.publish(item, used.item("b:v1", tiny("other")))
    assert used.run("apply").code == 0
    assert used.active() == ["b:v1"]

    ran = used.run("rollback")

    assert ran.code == 1, ran
    assert "the snapshot lists other content of a:v1" in ran.err
    assert used.active() == ["b:v1"]


def test_a_rollback_holds_through_the_metrics_and_the_doctor(held: Node) -> None:
    assert "holds back 1 model: b:v1" in held.run("doctor", "--offline").out
    assert held.run("resume").code == 0
    assert "holds back" not in held.run("doctor", "--offline").out


def test_kept_generations_are_bounded(node: Node) -> None:
    node.configure("generations = 3\n")
    one, two = node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))
    for turn in range(6):
        node.publish(one, two | {"state": "enabled" if turn % 2 else "disabled"})
        assert node.run("apply").code == 0

    kept = sorted(int(path.name) for path in (node.store / "generations").iterdir())
    assert len(kept) == 3
    assert node.index()["generation"] == kept[-1]
