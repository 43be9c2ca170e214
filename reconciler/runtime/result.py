"""
What the children of all engines share: checks of the model's answer, and the JSON document that reports the verdict.

All of it runs inside the sandbox, so a regular expression from the snapshot is tried where its time is time_limited.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reconciler.core import gguf

TEXT_CHARACTERS = 2000
#: For a regular expression or a template, which others wrote. Code that no signal interrupts ends with the job's own time limit.
_UNTRUSTED_SECONDS = 10.0


class BadModel(Exception):
    """The model is at fault."""


class CannotTest(Exception):
    """The node could not test it now."""


def run_job(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """
    Run the job on standard input with *run*, write its verdict to standard output, and end the process.

    The verdict goes to a duplicate of standard output; the original leads to standard error, since engines print to it.
    """
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    os.dup2(2, 1)
    failure: dict[str, Any] = {}
    try:
        found = run(job)
        note(**found)
        if found.get("verdict", "passed") == "passed":
            check_expectations(found, job["smoke"])
    except BadModel as error:
        failure = {"verdict": "bad", "reason": str(error)}
    except CannotTest as error:
        failure = {"verdict": "unable", "reason": str(error)}
    except MemoryError:
        failure = {"verdict": "unable", "reason": "not enough memory for the test job"}
    except Exception as error:  # noqa: BLE001  whatever error a hostile file causes is the file's fault
        failure = {"verdict": "bad", "reason": f"{type(error).__name__}: {error}"[:500]}
    _write(out, json.dumps({"verdict": "passed"} | _noted | failure | {"nonce": job["nonce"]}).encode())
    os._exit(0)  # the destructor of a half-loaded model does not run


#: What the job has found out so far: a failed one reports it too.
_noted: dict[str, Any] = {}


def note(**found: Any) -> None:
    """Remember fields of the verdict, which count also where the job fails later."""
    _noted.update(found)


def _write(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def report_phase(name: str) -> None:
    """Write what begins now to standard error, so that the report of a job that does not end says where it hung."""
    sys.stderr.write(f"{_PHASE}{name}\n")
    sys.stderr.flush()


def last_phase(errors: str) -> str:
    """Return the last phase that a child reported in *errors*, or an empty text."""
    found = re.findall(f"^{_PHASE}(.{{1,200}})$", errors, re.MULTILINE)
    return str(found[-1]) if found else ""


_PHASE = "phase: "
#: How the phases begin in which a file beside the model is loaded.
LOADING = "loading the "


@contextlib.contextmanager
def time_limited(what: str) -> Iterator[None]:
    """
    Limit the time of a block that runs what others wrote.

    Raises:
        BadModel: it did not end in time; the message names *what*.
    """

    def end(*_: object) -> None:
        raise BadModel(f"{what} did not end within {_UNTRUSTED_SECONDS:.0f} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, _UNTRUSTED_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_gguf(path: Path) -> gguf.GgufFacts:
    """
    Check the header of the file at *path*, before any engine reads it, and return its facts.

    Raises:
        BadModel: it is malformed, or not there.
        CannotTest: it cannot be read.
    """
    try:
        return gguf.check(path)
    except gguf.Malformed as error:
        raise BadModel(f"not a sound GGUF file: {error}") from None
    except FileNotFoundError:
        raise BadModel(f"the model has no file {path.name!r}") from None
    except OSError as error:
        raise CannotTest(f"the model's file cannot be read: {error.strerror}") from None


def check_embedding(vector: Any) -> int:
    """
    Return the dimension of an embedding.

    Raises:
        BadModel: it is not one: not numbers, not finite, or only zeros.
    """
    import math

    if not isinstance(vector, list) or not vector:
        raise BadModel("it gave no embedding")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in vector):
        raise BadModel("its embedding is not made of finite numbers")
    if not any(vector):
        raise BadModel("its embedding is all zeros")
    return len(vector)


def check_expectations(found: dict[str, Any], smoke: dict[str, Any]) -> None:
    """
    Compare the answer with every expectation of the snapshot.

    Raises:
        BadModel: one is not met; the message says what was expected and what was found.
    """
    expect, text, tokens = smoke["expect"], found.get("text", ""), found.get("tokens", 0)
    if tokens < expect["min_tokens"]:
        raise BadModel(f"it generated {tokens} tokens, expected at least {expect['min_tokens']}; it said {text[:200]!r}")
    if expect["text"] is not None and expect["text"] not in text:
        raise BadModel(f"its answer does not contain {expect['text'][:100]!r}; it said {text[:200]!r}")
    if expect["regex"] is not None and not _matches(expect["regex"], text):
        raise BadModel(f"its answer does not match {expect['regex'][:100]!r}; it said {text[:200]!r}")
    if expect["tokens"] is not None and found.get("token_ids") != expect["tokens"]:
        raise BadModel(f"it generated the tokens {found.get('token_ids')}, expected {expect['tokens']}"[:500])
    if found["tokens_per_second"] < expect["min_rate"]:
        raise BadModel(f"it generated {found['tokens_per_second']:.1f} tokens a second, expected at least {expect['min_rate']}")
    if expect["dimension"] is not None and found.get("dimension") != expect["dimension"]:
        raise BadModel(f"its embedding has {found.get('dimension')} components, expected {expect['dimension']}")


def _matches(pattern: str, text: str) -> bool:
    """Search the model's text for the snapshot's expression; either may be made so that the search takes for ever."""
    report_phase("matching the expected expression")
    with time_limited("the expected regular expression"):
        return re.search(pattern, text) is not None
