"""
Every error that this program reports on purpose, by who is at fault.

Rules that hold here:

1. Whatever leaves this program on purpose is a ``ReconcileError``. Anything else is a bug in it, and leaves as an ``InternalError`` with a
   report (``store.crash_report``).
2. An error has a *name* that programs match on, a message that says what was expected, what was found and where, a *hint* that says
   what to do next, and the exit code of its family.
3. Names are part of the contract and are spelled once, here. A class's docstring is the cause, its ``hint`` the general remedy; where
   it is raised, a better one may be given. ``reference`` lists them all, and the reference page of the documentation is made from it.
"""

from __future__ import annotations

from typing import NamedTuple


class ReconcileError(Exception):
    """A step of the program ended otherwise than it should; the message says how."""

    name = "error"
    exit_code = 1
    hint = "`reconcile doctor` checks this machine for problems"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or type(self).hint

    @property
    def message(self) -> str:
        """What went wrong, in one sentence."""
        return str(self.args[0])

    @property
    def with_own_hint(self) -> str:
        """The message, and the hint where one was given that fits this case: for places that show a single line."""
        return self.message if self.hint == type(self).hint else f"{self.message}; {self.hint}"


# -- the caller ------------------------------------------------------------------------------------


class UsageError(ReconcileError):
    """The command line names something that does not exist, or options that exclude each other."""

    name = "usage"
    exit_code = 64
    hint = "`reconcile COMMAND --help` shows what the command accepts"


class SettingsError(ReconcileError):
    """``reconcile.toml`` or a file that it names is missing, malformed, or contains an unknown key."""

    name = "bad-settings"
    hint = "correct the key or the file that the message names"


class UntrustedFile(SettingsError):
    """A file that was found, and not named by the caller, may be changed by another user of the machine."""

    name = "untrusted-file"
    hint = "use a file that belongs to you, in folders that nobody else can change"


class StalePlan(ReconcileError):
    """The saved plan was made for a lock, a store generation or a trust state that has changed since."""

    name = "stale-plan"
    hint = "make a new one with `reconcile plan --out FILE`"


class NothingToCheck(ReconcileError):
    """``lock --check`` has nothing to compare: there is no lock, or no envelope beside it."""

    name = "nothing-to-check"
    hint = "run `reconcile lock` to make the lock and its envelope"


# -- the network's data ----------------------------------------------------------------------------


class TrustError(ReconcileError):
    """A document does not carry the signatures that the trust root asks for, or may not be used now."""

    name = "trust"
    exit_code = 4
    hint = "what was accepted before stays in use; ask the network's operator for the current signed document"


class BadEnvelope(TrustError):
    """The bytes are no well-formed DSSE envelope, or its payload is no well-formed document of the expected kind."""

    name = "bad-envelope"
    hint = "check that the address or file is the signed document itself, and that it was transferred whole"


class BadSignature(TrustError):
    """Fewer keys of the role signed the document than its threshold asks for."""

    name = "bad-signature"
    hint = "ask the network's operator for a snapshot signed by enough of its keys; `reconcile trust show` lists them"


class WrongNetwork(TrustError):
    """The document is signed, but for another network than the pinned trust root."""

    name = "wrong-network"
    hint = "check the address of the snapshot and the pinned root: both must be of one network"


class Rollback(TrustError):
    """The snapshot is older than one that this store has already accepted."""

    name = "rollback"
    hint = "fetch the network's current snapshot; an older one is never accepted again"


class Equivocation(TrustError):
    """Two different snapshots were signed under one version number."""

    name = "equivocation"
    hint = "report it to the network's operator: two snapshots of one version were signed"


class Expired(TrustError):
    """The snapshot has expired, so nothing new is installed from it."""

    name = "expired"
    hint = "what is active stays active; run `reconcile lock` to fetch the network's current snapshot"


class NotYetValid(TrustError):
    """The snapshot was issued in the future by this machine's clock, or the clock stands before the last accepted time of issue."""

    name = "not-yet-valid"
    hint = "check this machine's clock (`timedatectl`)"


class RootExpired(TrustError):
    """The newest trust root that this node knows has expired."""

    name = "root-expired"
    hint = "get the network's newer root and run `reconcile trust update FILE`"


class BadRootChain(TrustError):
    """A trust root does not follow from the one before it, or its keys or thresholds are unsafe."""

    name = "bad-root-chain"
    hint = "get every root from the pinned one on from the network's operator, in order; `reconcile root inspect FILE` shows each"


class TooLarge(TrustError):
    """A document is larger than the limit that is checked before anything is parsed."""

    name = "too-large"
    hint = "check that the address is the signed document and not another file"


class LockMismatch(TrustError):
    """``models.lock`` is not what its signed snapshot compiles to."""

    name = "lock-mismatch"
    hint = "never edit the lock: run `reconcile lock` to compile it again"


class TrustStateLost(TrustError):
    """The record of the newest accepted snapshot is missing or damaged, on a store that was used before."""

    name = "floor-lost"
    hint = "check that nobody replays an old snapshot, then run `reconcile trust init` to start a new record"


# -- the network's operator ------------------------------------------------------------------------


class PublishError(ReconcileError):
    """What the operator asks for would lose a key, or make a document that nodes refuse."""

    name = "publish"
    hint = "change what the message names; nothing was written"


# -- transport and bytes ---------------------------------------------------------------------------


class FetchError(ReconcileError):
    """No source gave the bytes."""

    name = "source-failed"
    hint = "it is tried again on the next run; `reconcile incidents` shows what each source answered"
    #: For how many seconds the server asked to be left alone (Retry-After); 0: it did not.
    asked_seconds: float = 0.0


class NetworkSilent(FetchError):
    """No snapshot could be fetched for longer than ``[network] quiet_after``. All else that a sync does was done."""

    name = "network-silent"
    exit_code = 6
    hint = "what was accepted before stays in use until it expires; `reconcile doctor` tests the connection, and names what does not answer"


class HashMismatch(FetchError):
    """A source gave bytes whose digest is not the signed one."""

    name = "hash-mismatch"


class SizeMismatch(FetchError):
    """A source gave more or fewer bytes than the signed size."""

    name = "size-mismatch"


class BadBundle(ReconcileError):
    """A file or folder is no bundle, or is damaged."""

    name = "bad-bundle"
    hint = "copy it again from where it was exported, or export it anew: `reconcile bundle export`"


class UnpackRefused(ReconcileError):
    """An archive has a member that is not a plain file or folder under a safe name, or exceeds a limit."""

    name = "unpack-refused"
    hint = (
        "the model's publisher packs it again: plain files and folders alone, as with `tar --format=ustar --dereference --hard-dereference`"
    )


# -- the node --------------------------------------------------------------------------------------


class StoreError(ReconcileError):
    """The store cannot be read or written, or is not a store."""

    name = "store"
    hint = "`reconcile doctor` checks the store, its owner and its disk"


class StoreBusy(StoreError):
    """Another run holds the store."""

    name = "store-busy"
    exit_code = 5
    hint = "wait for it, or pass --lock-timeout 30s"


class DiskFull(StoreError):
    """There is not enough free space for what is planned, with the reserve kept."""

    name = "disk-full"
    hint = "free some space, or run `reconcile gc --dry-run` to see what can go"


class StoreNewer(StoreError):
    """A newer version of reconcile wrote the store; this one does not know what its files mean, and changes nothing."""

    name = "store-newer"
    hint = "use that version or a newer one; a store is not converted back (docs: Upgrade or uninstall)"


class BlobDamaged(StoreError):
    """The bytes of a stored file no longer match its digest."""

    name = "blob-damaged"
    hint = "`reconcile verify --repair` downloads what is damaged again"


class SmokeFailed(ReconcileError):
    """The model did not pass its test job."""

    name = "smoke-failed"
    hint = "`reconcile status MODEL` shows the test's report; `reconcile retry MODEL` tries again at once"


class SandboxUnavailable(ReconcileError):
    """No sandbox works on this machine, so that nothing may be tested here."""

    name = "sandbox-unavailable"
    hint = "`reconcile doctor` says what is missing; installing bubblewrap usually is enough"


class ServeFailed(ReconcileError):
    """A server of this node cannot be told of the active set, or does not take it."""

    name = "serve-failed"
    hint = "look at the server's own log; `reconcile serve reload` tries again at once, and so does every run"


class RuntimeMissing(ReconcileError):
    """The engine that models ask for is not installed."""

    name = "runtime-missing"
    hint = "`pip install llama-cpp-python` installs the engine llama-cpp; `reconcile doctor` names the engines that are missing"


# -- this program ----------------------------------------------------------------------------------


class InternalError(ReconcileError):
    """A bug in this program: an exception that nobody raised on purpose. No model, network or operator is at fault."""

    name = "internal-error"
    hint = "it is a bug in reconcile, and nothing else is blamed for it: send the report, which holds no secrets, to its maintainers"


# -- the list --------------------------------------------------------------------------------------


class ErrorReference(NamedTuple):
    """One error as the reference page shows it."""

    name: str
    exit_code: int
    cause: str
    hint: str


def hint_of(name: str) -> str:
    """Return the general hint of the error *name*."""
    return next((kind.hint for kind in reference() if kind.name == name), ReconcileError.hint)


def reference() -> tuple[ErrorReference, ...]:
    """Return every error of this module in the order in which it stands here."""
    kinds = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, ReconcileError)]
    return tuple(ErrorReference(kind.name, kind.exit_code, (kind.__doc__ or "").strip(), kind.hint) for kind in kinds)
