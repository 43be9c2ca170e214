"""
Shows how far a recorded answer can be trusted: that no machine is called wrong that computes rightly, and which damage is noticed.

    python -m benchmarks.known_answers record --model gemma.gguf --prompts 200 answers.json
    python -m benchmarks.known_answers agree --model gemma.gguf --answers answers.json --threads 1,2 --batches node,1,32,512
    python -m benchmarks.known_answers agree --model gemma.gguf --answers answers.json --library ./without-avx/lib
    python -m benchmarks.known_answers damage --model gemma.gguf --answers answers.json --prompts 20
    python -m benchmarks.known_answers embeddings --model minilm.gguf --threads 1,2 --library ./without-avx/lib

``record`` records the answer of a model to random prompts, with the code of the test job. ``agree`` feeds the answers under other thread
counts, other batch sizes and with other libraries of llama.cpp, and prints how far a first choice led where it was another. A batch of
``node`` is what the test job does: the prompt in one batch, the answer token by token; a number is the size of the batches in which prompt
and answer are read together. ``damage`` changes the model (``benchmarks.damaged_models``) and prints on how many of the prompts that is
noticed: a node has one prompt for each model. ``embeddings`` does both with an embedding model, whose vectors are compared by their cosine.

A library without AVX is made by building llama-cpp-python of the same version with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=OFF
-DGGML_AVX2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF -DGGML_BMI2=OFF" in an environment of its own; ``--library`` is its llama_cpp/lib.
Each model is loaded in a child process, since a process loads one library only. It is no part of the tests: 200 prompts take an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks import damaged_models
from reconciler.core.snapshot import Answer
from reconciler.runtime import known_answer
from reconciler.runtime.result import CannotTest

TOP = Path(__file__).resolve().parents[1]
NODE = 0  # a batch of the test job's own sizes
_BATCH = 512
_CONTEXT = 1024

_WORDS = (
    "river", "stone", "window", "garden", "silver", "market", "winter", "letter", "engine", "bridge", "forest", "doctor", "island",
    "copper",
    "planet", "number", "window", "yellow", "castle", "summer", "thunder", "paper", "music", "kitchen", "captain", "history", "mountain",
    "voyage", "lantern", "pocket", "river", "quickly", "never", "often", "under", "because", "although", "green", "seven", "running",
    "carried", "found", "opened", "measured", "slowly", "bright",
)  # fmt: skip
_OPENINGS = (
    "The first thing that she saw was", "In the year 1905, a young clerk", "Dear Sir, I am writing to you about", "To make bread you need",
    "def largest(values):\n    ", "Question: Why is the sky blue?\nAnswer:", "The committee decided on Tuesday that", "1, 1, 2, 3, 5, 8,",
    "Once upon a time there lived", "Water boils at", "SELECT name, price FROM", "Der Zug nach München", "La capitale de la France est",
    "import json\n\nwith open(", "The results of the experiment show that", "My grandmother always said:",
)  # fmt: skip


class Way(Struct, frozen=True, kw_only=True):
    """How an answer is fed: on how many threads, in batches of how many tokens, and by which library of llama.cpp (empty: the own)."""

    threads: int = 1
    batch: int = NODE
    library: str = ""

    def __str__(self) -> str:
        batch = "as a node" if self.batch == NODE else f"batches of {self.batch}"
        return f"{self.threads} thread{'s'[: self.threads - 1]}, {batch}, {'other library' if self.library else 'own library'}"


class Seen(Struct, frozen=True, kw_only=True):
    """
    What the model chose at each position of one answer, by how many logits it led the second, and *over* what was recorded.

    A position that was not reached is left out.
    """

    chosen: tuple[int, ...]
    leads: tuple[float, ...]
    over: tuple[float, ...]


class Compared(Struct, frozen=True, kw_only=True):
    """What came of many answers in one way."""

    prompts: int = 0
    positions: int = 0
    sure: int = 0
    others: int = 0  #: Positions at which the first choice was another.
    recorded_lead: float = 0.0  #: The largest lead of the recorder's where the first choice was another.
    doubts: int = 0  #: Sure positions at which the first choice was another.
    most_over: float = 0.0  #: The most by which it led the recorded token there.
    false_alarms: int = 0  #: Prompts whose answer would be called another one.
    most_moved: float = 0.0  #: The most by which the lead of a first choice that stayed was another.


# -- prompts -----------------------------------------------------------------------------------------


def prompts(count: int, seed: str = "known answers") -> Iterator[str]:
    """Yield *count* random prompts, each once: an opening, most often after words drawn at random; a few are longer than a batch of 32."""
    drawn, seen = random.Random(seed), set[str]()
    for index in itertools.count():
        words = drawn.choices(_WORDS, k=drawn.randint(30, 50) if index % 4 == 3 else drawn.randint(0, 8))
        made = f"{' '.join(words)}{'. ' if words else ''}{drawn.choice(_OPENINGS)}"
        if len(seen) == count:
            return
        if made not in seen:
            seen.add(made)
            yield made


# -- in the child ------------------------------------------------------------------------------------


def child() -> None:
    """Read a job from standard input and write one line of JSON for each prompt."""
    job = json.loads(sys.stdin.read())
    import llama_cpp

    way = msgspec.convert(job["way"], Way)
    batch = way.batch or _BATCH
    model = llama_cpp.Llama(
        model_path=job["model"], n_ctx=job["context"], n_batch=batch, n_ubatch=batch, n_threads=way.threads, n_threads_batch=way.threads,
        verbose=False, embedding=job["embedding"],
    )  # fmt: skip
    act: Callable[..., Any] = _embed if job["embedding"] else _record if job["record"] else _follow
    for one in job["asked"]:
        print(json.dumps(act(llama_cpp, model, one, way, stop=job["stop"])), flush=True)
    os._exit(0)


def _record(llama_cpp: Any, model: Any, prompt: str, way: Way, *, stop: bool) -> Any:
    del way, stop
    try:
        ids = model.tokenize(prompt.encode(), add_bos=True)
        made = known_answer.record(llama_cpp, model, ids, lambda _: None)
    except CannotTest:
        return None
    chosen, leads = [choice.token for choice in made.choices], [round(choice.lead, 4) for choice in made.choices]
    return {"prompt": prompt, "answer": made.answer, "chosen": chosen, "leads": leads}


def _embed(llama_cpp: Any, model: Any, prompt: str, way: Way, *, stop: bool) -> Any:
    del llama_cpp, way, stop
    return model.create_embedding(prompt)["data"][0]["embedding"]


def _follow(llama_cpp: Any, model: Any, one: dict[str, Any], way: Way, *, stop: bool) -> Any:
    """Return what is chosen at each position; with *stop*, up to the first sure one where it is not what was recorded."""
    answer = one["answer"]
    tokens, sure, others = answer["tokens"], set(answer["sure"]), list[float]()
    chosen, leads, over = list[int](), list[float](), list[float]()
    feed = _choices(llama_cpp, model, answer["prompt"], tokens) if way.batch == NODE else _in_batches(llama_cpp, model, answer, way.batch)
    for position, (choice, lead) in enumerate(feed):
        chosen.append(choice.token)
        leads.append(round(choice.lead, 4))
        over.append(round(lead, 4))
        if position in sure and lead > 0:
            others.append(lead)
        if stop and known_answer.contradicts(others, len(sure)):
            break
    return {"chosen": chosen, "leads": leads, "over": over}


def _choices(llama_cpp: Any, model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[tuple[known_answer.Choice, float]]:
    reader = known_answer.Reader(llama_cpp, model, prompt)
    for token in tokens:
        yield reader.choice(), reader.lead_over(token)[1]
        reader.feed(token)


def _in_batches(llama_cpp: Any, model: Any, answer: dict[str, Any], size: int) -> Iterator[tuple[known_answer.Choice, float]]:
    """Read prompt and answer in batches of *size* tokens, as a server does, and yield each choice with its lead over what was recorded."""
    import numpy as np

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    tokens = [*answer["prompt"], *answer["tokens"][:-1]]
    first, batch = len(answer["prompt"]) - 1, llama_cpp.llama_batch_init(size, 0, 1)
    for start in range(0, len(tokens), size):
        part = range(start, min(start + size, len(tokens)))
        batch.n_tokens = len(part)
        for index, place in enumerate(part):
            batch.token[index], batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = tokens[place], place, 1, 0
            batch.logits[index] = place >= first
        if llama_cpp.llama_decode(model.ctx, batch):
            raise SystemExit("llama.cpp does not take the batch")
        for index, place in ((index, place) for index, place in enumerate(part) if place >= first):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, index), shape=(model.n_vocab(),))
            second, most = np.partition(logits, -2)[-2:]
            choice = known_answer.Choice(int(np.argmax(logits)), float(most - second), int(np.argmax(logits)))
            yield choice, float(most - logits[answer["tokens"][place - first]])
    llama_cpp.llama_batch_free(batch)


# -- in the parent -----------------------------------------------------------------------------------


def ask(model: Path, way: Way, asked: Sequence[Any], *, context: int = _CONTEXT, **also: bool) -> Iterator[Any]:
    """
    Let a child load *model* and answer to what is *asked*, in turn; *also*: ``record``, ``stop`` at the first difference, or ``embedding``.

    Raises:
        SystemExit: it ended before it had answered to all.
    """
    environ = {**os.environ} | ({"LLAMA_CPP_LIB_PATH": way.library} if way.library else {})
    job = {"model": str(model), "way": msgspec.to_builtins(way), "asked": list(asked), "context": context}
    job |= {"record": False, "stop": False, "embedding": False} | also
    argv = [sys.executable, "-m", "benchmarks.known_answers", "child"]
    with subprocess.Popen(
        argv, cwd=TOP, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        answered = 0
        for line in process.stdout:
            answered += 1
            yield json.loads(line)
    if answered != len(asked):
        raise SystemExit(f"the child ended with {process.returncode} after {answered} of {len(asked)} prompts")


def recorded(model: Path, count: int, *, skip: int = 0, context: int = _CONTEXT) -> Iterator[dict[str, Any]]:
    """
    Yield *count* random prompts, after the first *skip*, with what *model* answers and how far each choice leads.

    A prompt whose answer has too few wide leads is left out.

    Raises:
        SystemExit: too many were.
    """
    made = 0
    for found in ask(model, Way(), list(prompts(skip + 2 * count))[skip:], record=True, context=context):
        if found is None:
            continue
        yield found
        made += 1
        if made == count:
            return
    raise SystemExit(f"{made} of {2 * count} prompts gave an answer that can be recorded")


def agree(model: Path, way: Way, answers: Sequence[dict[str, Any]], *, context: int = _CONTEXT) -> Compared:
    """Return how the recorded *answers* compare with what *model* computes in this way."""
    found = Compared()
    for number, (one, line) in enumerate(zip(answers, ask(model, way, answers, context=context), strict=True)):
        seen = msgspec.convert(line, Seen)
        found = _with(found, one, seen)
        for position in one["answer"]["sure"]:
            if seen.over[position] > 0:
                lead, other = one["leads"][position], seen.over[position]
                print(f"answer {number}, position {position}: led by {lead:.2f}, another leads by {other:.2f}", file=sys.stderr, flush=True)
    return found


def _with(found: Compared, one: dict[str, Any], seen: Seen) -> Compared:
    chosen, leads, sure = one["chosen"], one["leads"], set(one["answer"]["sure"])
    others = {position for position, token in enumerate(chosen) if seen.chosen[position] != token}
    stayed = [position for position in range(len(chosen)) if position not in others]
    return Compared(
        prompts=found.prompts + 1,
        positions=found.positions + len(chosen),
        sure=found.sure + len(sure),
        others=found.others + len(others),
        false_alarms=found.false_alarms + _differs(one, seen),
        doubts=found.doubts + len(others & sure),
        most_over=max([found.most_over, *(seen.over[position] for position in sure)]),
        recorded_lead=max([found.recorded_lead, *(leads[position] for position in others)]),
        most_moved=max([found.most_moved, *(abs(seen.leads[position] - leads[position]) for position in stayed)]),
    )


def caught(model: Path, answers: Sequence[dict[str, Any]], way: Way, *, context: int = _CONTEXT) -> int:
    """Return on how many of *answers* what *model* computes is another answer than the recorded one."""
    seen = ask(model, way, answers, stop=True, context=context)
    return sum(_differs(one, msgspec.convert(line, Seen)) for one, line in zip(answers, seen, strict=True))


def _differs(one: dict[str, Any], seen: Seen) -> bool:
    sure = one["answer"]["sure"]
    leads = [seen.over[position] for position in sure if position < len(seen.over) and seen.over[position] > 0]
    return known_answer.contradicts(leads, len(sure))


# -- the command line --------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run one of the subcommands; return the exit code: 1 where a right machine was called wrong."""
    if arguments == ["child"]:
        child()
    given = _parser().parse_args(arguments)
    return int(given.run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="known_answers", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("record", _run_record), ("agree", _run_agree), ("damage", _run_damage), ("embeddings", _run_embeddings)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--prompts", type=int, default=200)
        command.add_argument("--skip", type=int, default=0, help="prompts to leave out at the beginning")
        if name == "record":
            command.add_argument("answers", type=Path)
            continue
        if name != "embeddings":
            command.add_argument("--answers", type=Path, required=True)
        command.add_argument("--threads", default="1")
        command.add_argument("--batches", default="node" if name == "agree" else "512")
        if name != "damage":
            command.add_argument("--library", default="", help="folder with another build of llama.cpp's libraries")
        if name != "agree":
            command.add_argument("--only", default="", help="only damages whose name has this in it")
    return parser


def _run_record(given: argparse.Namespace) -> int:
    with given.answers.open("w") as out:
        for found in recorded(given.model.resolve(), given.prompts, skip=given.skip):
            out.write(f"{json.dumps(found)}\n")
            out.flush()
    return 0


def _answers(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in given.answers.read_text().splitlines()][given.skip : given.skip + given.prompts]


def _batch(text: str) -> int:
    return NODE if text == "node" else int(text)


def _run_agree(given: argparse.Namespace) -> int:
    answers, alarms = _answers(given), 0
    print("| way | prompts | positions | sure | another choice | largest lead there | at sure ones | it led by | false alarms | moved |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for threads in map(int, given.threads.split(",")):
        for batch in given.batches.split(","):
            library = str(Path(given.library).resolve()) if given.library else ""
            way = Way(threads=threads, batch=_batch(batch), library=library)
            found = agree(given.model.resolve(), way, answers)
            alarms += found.false_alarms
            print(
                f"| {way} | {found.prompts} | {found.positions:,} | {found.sure:,} | {found.others} | {found.recorded_lead:.2f} "
                f"| {found.doubts} | {found.most_over:.2f} | {found.false_alarms} | {found.most_moved:.2f} |",
                flush=True,
            )
    return 1 if alarms else 0


def _run_damage(given: argparse.Namespace) -> int:
    answers, way = _answers(given), Way(threads=int(given.threads), batch=_batch(given.batches))
    print(f"| damage | noticed on, of {len(answers)} prompts |\n|---|---:|")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="known-answers-")))
        source = damaged_models.Source(given.model)
        for damage in damaged_models.damages(source):
            if given.only in damage.name:
                path = folder / "damaged.gguf"
                damaged_models.write(source, path, damage)
                print(f"| {damage.name} | {caught(path, answers, way)} |", flush=True)
    return 0


def _run_embeddings(given: argparse.Namespace) -> int:
    asked, model = list(prompts(given.prompts)), given.model.resolve()
    before = list(ask(model, Way(), asked, embedding=True))
    print("| what | least cosine | below 0.999 |\n|---|---:|---:|")
    alarms = 0
    for library in dict.fromkeys(("", str(Path(given.library).resolve()) if given.library else "")):
        for threads in map(int, given.threads.split(",")):
            way = Way(threads=threads, library=library)
            alarms += _print_cosines(str(way), before, list(ask(model, way, asked, embedding=True)))
    with tempfile.TemporaryDirectory(prefix="known-answers-") as folder:
        source, path = damaged_models.Source(model), Path(folder, "damaged.gguf")
        for damage in damaged_models.damages(source):
            if given.only in damage.name:
                damaged_models.write(source, path, damage)
                _print_cosines(damage.name, before, list(ask(path, Way(), asked, embedding=True)))
    return 1 if alarms else 0


def _print_cosines(name: str, before: list[list[float]], after: list[list[float]]) -> int:
    """Print how far *after* points elsewhere than *before*; return how many are below the bound of a snapshot that says none."""
    cosines = [
        sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other) or math.inf)
        for one, other in zip(before, after, strict=True)
    ]
    below = sum(not one >= Answer(embedding=(1.0,)).cosine for one in cosines)
    print(f"| {name} | {min(cosines):.6f} | {below} of {len(cosines)} |", flush=True)
    return below


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
