"""
Which node keys are real, and what was last seen of each node: a folder of the operator's.

Rules that hold here:

1. ``<node id>.pub`` is the public key of that node, in PEM. A status counts only if the key of the very node that it names signed it.
   Whoever writes to this folder decides who counts, so it lies apart from the folder that nodes write to.
2. A key comes in by a person alone: copied from the node, or by ``reconcile fleet enroll``, which takes the key that an unknown node's
   status carries (trust on first use). A key that is there is never replaced.
3. ``seen.json`` remembers the newest sequence number of each node and the digest of that status. An older status that comes back is a
   replay, also where the newer one was deleted in the meantime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from reconciler.core.errors import BadSignature, PublishError, SettingsError
from reconciler.fleet import statement
from reconciler.store import atomic

_MAX_KEY_BYTES = 4096


class Seen(Struct, frozen=True, kw_only=True):
    """The newest status of a node that counted."""

    sequence: int
    digest: str  #: SHA-256 of its payload.


class Register:
    """The folder of nodes' keys at *folder*."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: dict[str, Any] = {}

    def require(self) -> None:
        """
        Check that there is such a folder.

        Raises:
            SettingsError: there is none.
        """
        if not self._folder.is_dir():
            raise SettingsError(
                f"there is no folder {self._folder} with the nodes' public keys, so no status can be verified",
                hint="name it with --keys; `reconcile fleet enroll` makes it from statuses that you have reason to believe",
            )

    def key(self, node: str) -> Any | None:
        """
        Return the public key of *node*, or None where it is not known. *node* is a checked id.

        Raises:
            SettingsError: its file holds no key.
        """
        if node not in self._keys:
            self._keys[node] = self._read(self.path(node))
        return self._keys[node]

    def path(self, node: str) -> Path:
        """Return the file of *node*'s key."""
        return self._folder / f"{msgspec.convert(node, statement.NodeId)}.pub"

    def nodes(self) -> frozenset[str]:
        """Return the ids of all nodes that are known."""
        return frozenset(path.name.removesuffix(".pub") for path in self._folder.glob("*.pub"))

    def _read(self, path: Path) -> Any | None:
        try:
            with path.open("rb") as file:
                pem = file.read(_MAX_KEY_BYTES)
        except FileNotFoundError:
            return None
        try:
            return load_key(pem.decode("ascii"))
        except (ValueError, BadSignature):
            raise SettingsError(f"{path} holds no Ed25519 public key in PEM", hint="copy node.pub from the node again") from None

    def enroll(self, found: statement.Unverified) -> bool:
        """
        Take the key that the status *found* carries and is signed with; return whether its node was not known before.

        Raises:
            BadSignature: another key signed it.
            StoreError: the folder cannot be written.
        """
        node = found.report.node
        key = load_key(found.report.key)
        if not found.signed_by(key):
            raise BadSignature("it is not signed by the key that it carries")
        if self.key(node) is not None:
            return False
        atomic.make_folder(self._folder)
        atomic.create(self.path(node), found.report.key.encode())
        self._keys[node] = key
        return True

    # -- what was seen ---------------------------------------------------------------------------------

    def seen(self) -> dict[str, Seen]:
        """
        Return the newest status of each node that ever counted.

        Raises:
            SettingsError: the record is damaged: what it was made against would pass unseen.
        """
        try:
            return msgspec.json.decode((self._folder / "seen.json").read_bytes(), type=dict[str, Seen])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            raise SettingsError(
                f"{self._folder / 'seen.json'} cannot be read: {error}",
                hint="bring it back from a backup; without it, old statuses that are sent again are not noticed",
            ) from None

    def remember(self, seen: dict[str, Seen]) -> None:
        """Write the newest status of each node; raises StoreError."""
        atomic.write(self._folder / "seen.json", msgspec.json.encode(seen, order="sorted"))


def load_key(pem: str) -> Any:
    """
    Return the Ed25519 public key in *pem*.

    Raises:
        BadSignature: it is none, or one with which anybody could sign.
    """
    from reconciler.publish import keys

    try:
        return keys.load_public(pem.encode()).key
    except PublishError:
        raise BadSignature("the node's key is not an Ed25519 public key in PEM") from None
