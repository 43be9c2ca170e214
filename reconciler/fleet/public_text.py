"""
What an error on a node says to others: its sentence, without anything that is the node's own.

The text of an error comes from many places: the system, a server, an engine, a model's answer. So nothing is searched for; each word is
left out that *could* be a path, an address, a credential or a name of the machine, unless it is one that the signed snapshot names
(``public``). What is left out is shown as ``[…]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from reconciler.core import digest
from reconciler.core.text import printable

MAX_CHARACTERS = 300
LEFT_OUT = "[…]"
#: Words longer than this are keys or encoded data, and not words.
_MAX_WORD = 40
#: Around a word, what is no part of it.
_AROUND = "'\"`()[]{}<>,;:.!?…"
_OWN = re.compile(r"[/\\@~=$&|]|%[0-9A-Fa-f]{2}|\d+\.\d+\.\d+\.\d+|^[0-9a-fA-F:]*:[0-9a-fA-F:]*:[0-9a-fA-F:]*$")
_DOTTED = re.compile(r"^[\w-]+(\.[\w-]+)*\.[A-Za-z][\w-]*$")
#: A mix of letters and digits as long as this is an id or a key, and no word of a sentence.
_MIXED = re.compile(r"^(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9+_-]{16,}$")


def public_text(text: str, *, public: Iterable[str] = (), private: Iterable[str] = ()) -> str:
    """
    Return *text* as it may leave the node.

    *public*: words that the signed snapshot names: model ids, paths in models, hosts of sources. *private*: words that are left out
    wherever they stand, also as a part of others: the machine's name, the user's.
    """
    known, own = frozenset(public), tuple(word.lower() for word in private if len(word) > 1)
    words = [_word(word, known, own) for word in printable(text, 4 * MAX_CHARACTERS).split()]
    return printable(" ".join(words), MAX_CHARACTERS)


def _word(word: str, public: frozenset[str], private: tuple[str, ...]) -> str:
    bare = word.strip(_AROUND)
    if bare in public or digest.is_digest(bare):
        return word
    if any(name in word.lower() for name in private):
        return LEFT_OUT
    if "://" in word:
        return _address(bare, public)
    hidden = len(bare) > _MAX_WORD or _OWN.search(bare) or _DOTTED.match(bare) or _MIXED.match(bare)
    return LEFT_OUT if hidden else word


def _address(url: str, public: frozenset[str]) -> str:
    """Return scheme and host of *url* where the snapshot names the host: which source failed, and not with which query."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return LEFT_OUT
    return f"{parts.scheme}://{host}/{LEFT_OUT}" if host in public else LEFT_OUT
