"""
What each file of a model is for: by its signed role, by its GGUF header, or by its name. And whether a split model is whole.

Rules that hold here:

1. Pure: headers are arguments, as ``gguf.check`` returns them; None stands for a file that is no GGUF file.
2. A header is stronger than a name. A signed role that contradicts the header is an error, and never corrected in silence.
3. ``other`` claims nothing, so no header contradicts it.

Names of splits are llama.cpp's (``llama_split_path``); names of other files are those of Hugging Face's libraries.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from reconciler.core.gguf import GgufFacts

#: Roles of files that a test job loads.
LOADED = ("model", "split", "mmproj", "lora", "draft")
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.(?:gguf|safetensors)")
#: Roles by the file's name in lower case; the first that matches counts.
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("template", re.compile(r".*\.jinja2?|chat_template\.json|template")),
    (
        "tokenizer",
        re.compile(
            r"tokenizer[^/]*\.(?:json|model)|tekken\.json|(?:vocab|merges|bpe|sentencepiece|spiece|source|target)\.(?:json|txt|bpe|spm|vocab|model)"
            r"|sentencepiece\.bpe\.model|(?:special_tokens_map|added_tokens)\.json|.*\.tiktoken"
        ),
    ),
    ("licence", re.compile(r"(?:.*[-_.])?(?:licen[cs]e|copying|notice|use_policy)(?:[-_.].*)?")),
    ("lora", re.compile(r"adapter_model\.(?:safetensors|bin)")),
    ("config", re.compile(r"(?:.*[-_])?config\.json|config_.*\.json|.*\.index\.json|modules\.json|params(?:\.json)?|.*\.ya?ml")),
    ("model", re.compile(r".*\.(?:gguf|safetensors|bin|pt|pth|onnx|onnx_data|h5|msgpack|npz|ckpt)")),
)


def of_header(facts: GgufFacts) -> str:
    """Return the role that a GGUF header gives its file; the first part of a split model is its ``model``."""
    if facts.kind == "adapter":
        return "lora"
    if facts.kind == "mmproj" or facts.architecture == "clip":
        return "mmproj"
    if facts.kind == "imatrix" or facts.architecture in {"imatrix", "controlvector"}:
        return "other"
    return "split" if facts.part > 1 else "model"


def infer(path: str, facts: GgufFacts | None) -> str:
    """Return the role of the file *path* for which none is signed."""
    name = path.rpartition("/")[2].lower()
    if facts is not None:
        role = of_header(facts)
        return "draft" if role == "model" and re.search(r"(?:^|[-_.])draft(?:[-_.]|$)", name) else role
    if split := _SPLIT.fullmatch(name):
        return "split" if int(split["number"]) > 1 else "model"
    return next((role for role, pattern in _NAMES if pattern.fullmatch(name)), "other")


def contradiction(role: str, facts: GgufFacts) -> str:
    """Return how a header contradicts the signed *role*, for a sentence that names the file; empty if it does not."""
    found = of_header(facts)
    permitted = {found, "other"}
    if found == "model":
        permitted |= {"draft"} | ({"split"} if facts.parts > 1 else set()) | (set() if facts.tensor_bytes else {"tokenizer"})
    if role in permitted:
        return ""
    return f"its role is {role!r}, and by its header it is {f'split {facts.part} of {facts.parts}' if found == 'split' else _KINDS[found]}"


_KINDS = {"model": "a model", "mmproj": "a projector (mmproj)", "lora": "an adapter (lora)", "other": "no model"}


# -- split models ----------------------------------------------------------------------------------


def split_fault(files: Mapping[str, GgufFacts | None], entrypoint: str) -> str:
    """
    Return the first reason why a split model among *files*, headers by path, is not whole; empty if all are.

    What a header says counts where there is one: a renamed split is named by its number.
    """
    sets: dict[tuple[str, int], set[int]] = defaultdict(set)
    for path in files:
        if found := _SPLIT.fullmatch(path):
            sets[found["prefix"], int(found["count"])].add(int(found["number"]))
    for path, facts in sorted(files.items()):
        if facts is not None and (fault := _misnamed(path, facts, sets, files)):
            return fault
    return next((fault for key in sorted(sets) if (fault := _incomplete(*key, sets[key], files, entrypoint))), "")


def split_set(path: str, files: Iterable[str]) -> tuple[str, ...]:
    """Return the files that an engine opens when it is given *path*: all parts of its split model, else *path* alone."""
    named = _SPLIT.fullmatch(path)
    if not named:
        return (path,)
    wanted = (named["prefix"], named["count"])
    return tuple(sorted(one for one in files if (found := _SPLIT.fullmatch(one)) and (found["prefix"], found["count"]) == wanted))


def _misnamed(path: str, facts: GgufFacts, sets: Mapping[tuple[str, int], set[int]], files: Mapping[str, GgufFacts | None]) -> str:
    """Return how the name of a file differs from the place in a split model that its header gives it."""
    named = _SPLIT.fullmatch(path)
    if facts.parts <= 1:
        return f"{path!r} is named as a split, and its header says that it is whole" if named and int(named["count"]) > 1 else ""
    if named and (int(named["number"]), int(named["count"])) == (facts.part, facts.parts):
        return ""
    folder = path.rpartition("/")[0]
    prefix = next((prefix for prefix, count in sorted(sets) if count == facts.parts and prefix.rpartition("/")[0] == folder), "NAME")
    wanted = _name(prefix, facts.part, facts.parts)
    if wanted in files:
        return f"{path!r} is one split too many: by its header it is split {facts.part} of {facts.parts}, and {wanted!r} is that one"
    return f"split {facts.part} of {facts.parts} is missing: {path!r} is that split by its header, and engines look for {wanted!r}"


def _incomplete(prefix: str, count: int, numbers: set[int], files: Mapping[str, GgufFacts | None], entrypoint: str) -> str:
    """Return which split is missing of a set, is one too many, or is the wrong one to begin with."""
    some = next(
        path for path in sorted(files) if (found := _SPLIT.fullmatch(path)) and (found["prefix"], int(found["count"])) == (prefix, count)
    )
    if missing := next((number for number in range(1, count + 1) if number not in numbers), 0):
        stray = f", and {some!r} belongs to no whole model" if missing == 1 else ""
        return f"split {missing} of {count} is missing: there is no {_name(prefix, missing, count, some)!r}{stray}"
    if extra := next((number for number in sorted(numbers) if not 1 <= number <= count), -1) + 1:
        return f"{_name(prefix, extra - 1, count, some)!r} is one split too many: there are {count}"
    first = _name(prefix, 1, count, some)
    if (found := _SPLIT.fullmatch(entrypoint)) and (found["prefix"], int(found["count"])) == (prefix, count) and entrypoint != first:
        return f"the entrypoint is {entrypoint!r}, and engines begin with the first split, {first!r}"
    return ""


def _name(prefix: str, number: int, count: int, like: str = ".gguf") -> str:
    return f"{prefix}-{number:05}-of-{count:05}.{like.rpartition('.')[2]}"
