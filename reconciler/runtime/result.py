"""
The verdict of a test job, as the children of all engines reach it: what an answer must be, and one JSON document out.

This runs inside the sandbox: a regular expression from the network is tried here, where its time is bounded.
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
#: For what strangers wrote and Python runs itself: an expression, a template. What cannot be interrupted ends with the job's time.
_STRANGER_SECONDS = 10.0


class BadModel(Exception):
    """The model is at fault."""


class CannotTest(Exception):
    """The node could not test it now."""


def reach(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """
    Run the job on standard input with *run* and write its verdict.

    It goes to a duplicate of standard output, since engines print to the original.
    """
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    os.dup2(2, 1)
    verdict: dict[str, Any] = {"nonce": job["nonce"], "verdict": "passed"}
    try:
        found = run(job)
        judge(found, job["smoke"])
        verdict |= found
    except BadModel as error:
        verdict |= {"verdict": "bad", "reason": str(error)}
    except CannotTest as error:
        verdict |= {"verdict": "unable", "reason": str(error)}
    except MemoryError:
        verdict |= {"verdict": "unable", "reason": "not enough memory for the test job"}
    except Exception as error:  # noqa: BLE001  whatever a hostile file provokes is the file's fault
        verdict |= {"verdict": "bad", "reason": f"{type(error).__name__}: {error}"[:500]}
    _write(out, json.dumps(verdict).encode())
    os._exit(0)  # no destructor of a half-loaded model gets a say


def _write(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def phase(name: str) -> None:
    """Tell what begins now, so that a job which does not end is reported with where it hung."""
    sys.stderr.write(f"{_PHASE}{name}\n")
    sys.stderr.flush()


def last_phase(errors: str) -> str:
    """Return the last phase that a child told of, or nothing."""
    told = re.findall(f"^{_PHASE}([a-z ]{{1,60}})$", errors, re.MULTILINE)
    return str(told[-1]) if told else ""


_PHASE = "phase: "


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """
    Run what a stranger wrote against a clock of its own.

    Raises:
        Bad: it did not end in time; the sentence names *what*.
    """

    def end(*_: object) -> None:
        raise BadModel(f"{what} did not end within {_STRANGER_SECONDS:.0f} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, _STRANGER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def checked(path: Path) -> gguf.GgufFacts:
    """
    Return what the header of the file at *path* tells, before any engine sees it.

    Raises:
        Bad: it is malformed, or not there.
        Unable: it cannot be read.
    """
    try:
        return gguf.check(path)
    except gguf.Malformed as error:
        raise BadModel(f"not a sound GGUF file: {error}") from None
    except FileNotFoundError:
        raise BadModel(f"the model has no file {path.name!r}") from None
    except OSError as error:
        raise CannotTest(f"the model's file cannot be read: {error.strerror}") from None


def refuse_vector(vector: Any) -> int:
    """
    Return the dimension of an embedding.

    Raises:
        Bad: it is none: not numbers, not finite, or nothing but zeros.
    """
    import math

    if not isinstance(vector, list) or not vector:
        raise BadModel("it gave no embedding")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in vector):
        raise BadModel("its embedding is not made of finite numbers")
    if not any(vector):
        raise BadModel("its embedding is all zeros")
    return len(vector)


def judge(found: dict[str, Any], smoke: dict[str, Any]) -> None:
    """
    Compare with what the snapshot expects; all of it must hold.

    Raises:
        Bad: something does not; the message says what was expected and what was found.
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
    """Search for the network's expression in the model's text: either can be made so that it takes for ever."""
    phase("matching the expected expression")
    with bounded("the expected regular expression"):
        return re.search(pattern, text) is not None
