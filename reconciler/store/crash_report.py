"""
Reports of bugs: what a person needs to mend one, in a file that may be shown to strangers.

Rules that hold here:

1. A report is about this program. It holds versions, what was being done, and the traceback: no values of variables, no settings.
   Of what exceptions say, whatever looks like a credential is removed.
2. One bug has one file, named by where it happened; the same bug again replaces it. There are at most ``REPORTS`` files, of at most
   ``MAX_CHARACTERS`` characters each.
3. A report that cannot be written hides nothing: ``internal_error`` returns the error all the same.
"""

from __future__ import annotations

import os
import platform
import re
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from reconciler import __version__, files
from reconciler.core import digest, units
from reconciler.core.errors import InternalError, StoreError
from reconciler.core.text import printable
from reconciler.store import atomic
from reconciler.store.layout import Layout

#: The most files that are kept; the oldest go first.
REPORTS = 20
MAX_CHARACTERS = 64 << 10
_LINE = 2_000

_NAMES = r"token|secret|passw|credential|api[_-]?key|authorization"
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
#: What looks like a credential, and what stands in its place.
_CREDENTIALS = (
    (re.compile(r"://[^\s/@'\"]*@"), "://…@"),
    (re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*"), r"\1?…"),
    (re.compile(r"\b(bearer|basic)\s+[^\s'\",;]+", re.IGNORECASE), r"\1 …"),
    (re.compile(rf"((?:{_NAMES})[\w-]*['\"]?\s*[:=]\s*)[^,;)}}\]]+", re.IGNORECASE), r"\1…"),
)


def internal_error(layout: Layout, error: BaseException, context: Mapping[str, str], at: datetime) -> InternalError:
    """
    Write a report of *error* and return the error that tells of it; raises nothing.

    *context* says what was being done, as ``{"command": "apply", "model": "a:v1"}``; it must hold no secrets.
    """
    if isinstance(error, InternalError):
        return error
    what = f"{type(error).__name__} in {_place(error)}"
    about = f" ({context['model']})" if context.get("model") else ""
    try:
        path = write(layout, error, context, at)
    except StoreError as refused:
        return InternalError(f"{what}{about}; no report could be written: {refused.message}")
    return InternalError(f"{what}{about}; the report is {path}")


def write(layout: Layout, error: BaseException, context: Mapping[str, str], at: datetime) -> Path:
    """
    Write a report of *error*, durably, and return its path.

    Raises:
        StoreError: the disk refused.
    """
    path = layout.reports / f"{_fingerprint(error)}.txt"
    with files.translate_errors(f"write {path}"):
        if layout.reports.is_symlink():
            raise StoreError(f"{layout.reports} is a link, and the store writes in its own folders alone")
        atomic.make_folder(layout.reports, 0o700)
        atomic.write(path, _report(error, context, at).encode(errors="backslashreplace"), 0o600)
        written = sorted(layout.reports.glob("*.txt"), key=lambda kept: kept.lstat().st_mtime_ns)
        for old in [kept for kept in written if kept != path][: max(0, len(written) - REPORTS)]:
            atomic.delete(old)
    return path


def _report(error: BaseException, context: Mapping[str, str], at: datetime) -> str:
    head = {
        "reconcile": __version__, "python": platform.python_version(), "system": platform.platform(), "at": units.rfc3339(at), **context,
    }  # fmt: skip
    lines = [f"{name}: {value}" for name, value in head.items()]
    trace = "".join(traceback.TracebackException.from_exception(error, capture_locals=False, compact=True).format())
    lines += ["", *trace.splitlines()]
    return "\n".join(printable(_without_credentials(line[: 2 * _LINE]), _LINE) for line in lines)[:MAX_CHARACTERS] + "\n"


def _without_credentials(line: str) -> str:
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            line = line.replace(value, "…")
    for pattern, instead in _CREDENTIALS:
        line = pattern.sub(instead, line)
    return line


def _frames(error: BaseException) -> list[str]:
    """Return where *error* was raised, the outermost first, each as ``module:function:line``; without paths of this machine."""
    return [
        f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_qualname}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]


def _place(error: BaseException) -> str:
    own = [frame for frame in _frames(error) if frame.startswith("reconciler")]
    return own[-1] if own else "code that is not ours"


def _fingerprint(error: BaseException) -> str:
    """Return a name for the bug: the type of the exception and the way to it, not what it says."""
    return f"{type(error).__name__}-{digest.of(chr(10).join(_frames(error)).encode())[7:19]}"
