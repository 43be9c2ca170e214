"""
Everything that can be refused, by who is at fault.

Rules that hold here:

1. Whatever leaves this program on purpose is a ``ReconcileError``. Anything else is a bug of ours, and leaves as an ``InternalError``
   with a report (``store.crash_report``).
2. An error has a *name* that programs match on, a message that says what was expected, what was found and where,
   a *hint* that says what to do next, and the exit code of its family.
3. Names are part of the contract; they are spelled once, here.
"""

from __future__ import annotations


class ReconcileError(Exception):
    """The root of all refusals: a named reason, with what to do next."""

    name = "error"
    exit_code = 1
    hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or type(self).hint

    @property
    def message(self) -> str:
        """What went wrong, in one sentence."""
        return str(self.args[0])


# -- the caller ------------------------------------------------------------------------------------


class UsageError(ReconcileError):
    """The command line asks for something that does not exist."""

    name = "usage"
    exit_code = 64


class SettingsError(ReconcileError):
    """``reconcile.toml`` is missing, malformed, or says something unknown."""

    name = "bad-settings"


class StalePlan(ReconcileError):
    """The saved plan speaks of a lock, a generation or a trust floor that has moved since."""

    name = "stale-plan"
    hint = "make a new one with `reconcile plan --out FILE`"


# -- the network's data ----------------------------------------------------------------------------


class TrustError(ReconcileError):
    """What was presented as the network's word is not, or may not be used now."""

    name = "trust"
    exit_code = 4


class BadEnvelope(TrustError):
    """Not a well-formed envelope, or its payload is not a well-formed document of the expected kind."""

    name = "bad-envelope"


class BadSignature(TrustError):
    """Fewer valid signatures by distinct keys of the role than its threshold."""

    name = "bad-signature"
    hint = "ask the network's operator for a snapshot signed by enough of its keys; `reconcile trust show` lists them"


class WrongNetwork(TrustError):
    """Signed, but for another network."""

    name = "wrong-network"


class Rollback(TrustError):
    """Older than what this store has already accepted."""

    name = "rollback"
    hint = "fetch the network's current snapshot; an older one is never accepted again"


class Equivocation(TrustError):
    """Two different documents under one version number: somebody with the keys says two things."""

    name = "equivocation"
    hint = "report it to the network's operator: two snapshots of one version were signed"


class Expired(TrustError):
    """The snapshot's time is over: nothing new is installed on its word."""

    name = "expired"
    hint = "what is active stays active; run `reconcile lock` to fetch the network's current snapshot"


class NotYetValid(TrustError):
    """Issued in the future, or this node's clock stands before a time that it has already seen."""

    name = "not-yet-valid"
    hint = "check this machine's clock (`timedatectl`)"


class RootExpired(TrustError):
    """The last root of the chain is past its time."""

    name = "root-expired"
    hint = "get the network's newer root and run `reconcile trust update FILE`"


class BadRootChain(TrustError):
    """A root that does not follow from the one before it, or whose keys or thresholds are unsafe."""

    name = "bad-root-chain"


class TooLarge(TrustError):
    """Larger than the cap that is checked before anything is parsed."""

    name = "too-large"


class LockMismatch(TrustError):
    """``models.lock`` is not what its signed envelope compiles to."""

    name = "lock-mismatch"
    hint = "never edit the lock: run `reconcile lock` to compile it anew"


class TrustStateLost(TrustError):
    """The record of the newest snapshot ever accepted is gone or damaged, on a store that was used."""

    name = "floor-lost"
    hint = "check that nobody replays an old snapshot, then run `reconcile trust init` to start a new record"


# -- the network's operator ---------------------------------------------------------------------------


class PublishError(ReconcileError):
    """What the operator asks for would lose a key, or make a document that nodes refuse."""

    name = "publish"


# -- transport and bytes ---------------------------------------------------------------------------


class FetchError(ReconcileError):
    """No source gave the bytes."""

    name = "source-failed"
    hint = "it is tried again on the next run; `reconcile incidents` shows what each source answered"


class HashMismatch(FetchError):
    """Bytes whose digest is not the signed one."""

    name = "hash-mismatch"


class SizeMismatch(FetchError):
    """More or fewer bytes than the signed size."""

    name = "size-mismatch"


class UnpackRefused(ReconcileError):
    """An archive with a member that is not a plain file or folder under a safe name, or past a limit."""

    name = "unpack-refused"


# -- the node --------------------------------------------------------------------------------------


class StoreError(ReconcileError):
    """The store is not a store, or the disk refused."""

    name = "store"


class StoreBusy(StoreError):
    """Another run holds the store."""

    name = "store-busy"
    exit_code = 5
    hint = "wait for it, or pass --lock-timeout 30s"


class DiskFull(StoreError):
    """Not enough free space for what is planned, with the reserve kept."""

    name = "disk-full"
    hint = "free some space, or run `reconcile gc --dry-run` to see what can go"


class BlobDamaged(StoreError):
    """A blob's bytes no longer hash to its name."""

    name = "blob-damaged"


class SmokeFailed(ReconcileError):
    """The model did not pass its test job."""

    name = "smoke-failed"


class SandboxUnavailable(ReconcileError):
    """No sandbox works on this machine, so nothing may be tested here."""

    name = "sandbox-unavailable"
    hint = "`reconcile doctor` says what is missing; installing bubblewrap usually is enough"


class RuntimeMissing(ReconcileError):
    """The engine that models ask for is not installed."""

    name = "runtime-missing"
    hint = "pip install 'reconciler[llama-cpp]'"


# -- this program ----------------------------------------------------------------------------------


class InternalError(ReconcileError):
    """A bug in this program: an exception that nobody raised on purpose. No model, network or operator is at fault."""

    name = "internal-error"
    hint = "it is a bug in reconcile, and nothing else is blamed for it: send the report, which holds no secrets, to its maintainers"
