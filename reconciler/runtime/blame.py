"""
Whose fault it is that a server gave no answer to judge a model by: this node's, or the model's.

Rules that hold here:

1. A server that never answered is this node's fault, until the same command line with the same version has served another model here: a
   wrong option, a missing library or a port that is taken look the same from outside as a file that cannot be loaded.
2. A server's word that the file is bad counts at once. Which words those are is a closed list, of sentences that the servers have for
   nothing else. Where an engine is too old for a model they say so too: which versions will do is what the network signed.
3. A lack of memory, a failing device, and a server that was killed from outside or for what the settings allow it, are never the model's.
"""

from __future__ import annotations

import re
from typing import Literal

from reconciler.sandbox.supervision import OUTPUT_BYTES, printable

#: ``not-started``: it never answered. ``refused``: it started, and answered the test job with an error of its own. ``hindered``: it was
#: killed, or another program had its port.
ServerFailure = Literal["not-started", "refused", "hindered"]
FAILURES: tuple[ServerFailure, ...] = ("not-started", "refused", "hindered")

#: What servers say of a file that is bad, in lower case: llama.cpp, safetensors, transformers and vLLM.
BAD_FILE = (
    "unknown model architecture", "invalid magic characters", "is not within the file bounds", "check_tensor_dims: tensor",
    "missing tensor '", "wrong number of tensors", "error loading model vocabulary", "error loading model hyperparameters",
    "invalid split file", "gguf_init_from_reader", "gguf_init_from_file_impl", "invalid gguf",
    "safetensorerror", "error while deserializing header", "incomplete metadata, file not fully covered",
    "is not a valid json file", "should have a `model_type` key", "does not recognize this architecture",
    "error(s) in loading state_dict", "were not initialized from checkpoint", "there is no module or parameter named",
)  # fmt: skip

_ERROR = re.compile(r"error|exception|no such|invalid|unrecogni[sz]ed|unknown|not found|failed|cannot|refused|denied", re.IGNORECASE)
#: A line that says it in the form that programs have for it, before any other that has such a word in it, as a page of help may.
_SAYS = re.compile(r"(\S+: )*(fatal |critical )?(error|exception)[:\s]|[\w.]+(Error|Exception|Interrupt|Exit)\b(:|$)", re.IGNORECASE)
#: What loggers write before a message: who, how grave, when and where, as vLLM and uvicorn do.
_PREFIX = re.compile(r"(\(\w+ pid=\d+\)\s*)?((ERROR|CRITICAL|WARNING|INFO|DEBUG)[ :]+)?(\d\d-\d\d )?(\d\d:\d\d:\d\d )?(\[[\w.]+:\d+\] )?")
_GRAVE = re.compile(r"(\(\w+ pid=\d+\)\s*)?(ERROR|CRITICAL)\b")
_FRAME = re.compile(r"[\u2500-\u257f]+")
_PHASE = re.compile(r"phase: [a-z ]+")


def bad_file(errors: str) -> str:
    """Return the last line of *errors* in which the server says that the file is bad, or an empty text."""
    lines = [line for line in errors.splitlines() if any(words in line.lower() for words in BAD_FILE)]
    return printable(lines[-1].strip())[:300] if lines else ""


def last_words(errors: str) -> str:
    """
    Return the last line in which a server told of an error, else its last line, or an empty text.

    Frames that are drawn around a message are not part of it, and a line that only points to another is passed over.
    """
    logged = [_FRAME.sub(" ", line).strip() for line in errors.splitlines()]
    grave = {_PREFIX.sub("", line, count=1).strip() for line in logged if _GRAVE.match(line)}
    lines = [_PREFIX.sub("", line, count=1).strip() for line in logged]
    lines = [line for line in lines if re.search(r"\w", line) and not _PHASE.fullmatch(line)]
    telling = [line for line in lines if _ERROR.search(line) and len(line.split()) > 1 and "root cause" not in line.lower()]
    saying = [line for line in telling if _SAYS.match(line)]
    logged_so = [line for line in lines if line in grave and len(line.split()) > 1]
    return printable((saying or logged_so or telling or lines or [""])[-1])[:300]


def kept(errors: str) -> str:
    """Return the end of *errors*, at most 64 KiB of it, without what could control a terminal."""
    text = "\n".join(printable(line.expandtabs()) for line in errors.splitlines())
    return text.encode()[-OUTPUT_BYTES:].decode(errors="ignore")


def verdict(failure: ServerFailure, reason: str, errors: str, *, proven: bool) -> tuple[Literal["bad", "unable"], str]:
    """
    Return whose fault it is, and why; *reason* is what the child saw, *proven* that the command line has served another model here.

    ``bad``: the model's; ``unable``: this node's.
    """
    words = last_words(errors)
    if failure == "not-started":
        told = f"server did not start: {words} ({reason})" if words else f"server did not start: {reason}"
    else:
        told = f"{reason} ({words})" if words else reason
    if failure == "hindered":
        return "unable", told
    if said := bad_file(f"{errors}\n{reason}"):
        return "bad", f"the server says that the file is bad: {said}"
    if proven:
        return "bad", f"{told}; the same command line has served another model here"
    return "unable", told
