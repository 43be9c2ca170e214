"""
What ``apply`` needs from the world, as protocols. Adapters implement them; ``commands.wiring`` joins the two.

Rules that hold here:

1. A port is named for the domain and has at most five methods; what an adapter MUST guarantee is written at the method.
2. Every port has a memory twin in the tests, and one contract suite runs against both.
3. Every failure leaves an adapter as a ``ReconcileError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from msgspec import UNSET, Struct, UnsetType

from reconciler.core.errors import InternalError, ReconcileError
from reconciler.core.events import Event
from reconciler.core.lock import LockedArtifact
from reconciler.core.snapshot import Answer, Runtime, Smoke
from reconciler.core.state import ActiveModel, Generation, Passed, Record, ServerState, TreeSeen

# -- fetching --------------------------------------------------------------------------------------


class Want(Struct, frozen=True, kw_only=True):
    """A blob to fetch: its digest, its signed size in bytes, and its sources in the order in which they are tried."""

    digest: str
    size: int
    sources: tuple[str, ...]


class Fetched(Struct, frozen=True, kw_only=True):
    """
    A file in staging whose every byte was hashed to *digest*.

    The numbers are those of the open file that was hashed: whoever gives it a name checks that the path still leads to it.
    """

    digest: str
    size: int
    path: Path
    device: int
    inode: int
    mtime_ns: int
    #: Where the bytes came from; several when mirrors were used together, empty when they were in staging already.
    sources: tuple[str, ...] = ()
    #: Another outcome follows at once, so that both may be kept together.
    more: bool = False


class FetchFailed(Struct, frozen=True, kw_only=True):
    """No source gave the bytes of *digest*; staging holds only what a later run may continue."""

    digest: str
    error: ReconcileError
    more: bool = False  #: As in ``Fetched``.


class Fetcher(Protocol):
    """Downloads blobs into staging and verifies their bytes."""

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """
        Yield one outcome for each of *wants*, in the order in which they end.

        MUST yield ``Fetched`` only after hashing every byte; MUST never raise for a single blob's failure; MUST report each
        source that lied or failed as an ``Incident``; MUST stop all transfers when the iterator is closed.
        """
        ...

    def close(self) -> None:
        """End whatever was started; idempotent."""
        ...


# -- unpacking -------------------------------------------------------------------------------------


class Unpacker(Protocol):
    """Extracts an archive to plain files in a folder of its own."""

    def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
        """
        Unpack *archive*, of the kind that the snapshot names, *into* an empty folder; return the members' relative paths, sorted.

        MUST write regular files and folders only, under names that passed ``archive_rules``, and a copy for a link to a file of the same
        archive; MUST refuse the whole archive at the first member that is anything else.

        Raises:
            UnpackRefused: the archive breaks a rule; what was written so far is the caller's to delete.
            StoreError: the disk refused.
        """
        ...


# -- test jobs -------------------------------------------------------------------------------------

Verdict = Literal["passed", "bad", "unable"]


class TestJob(Struct, frozen=True, kw_only=True):
    """A test inference job: which model, where its tree lies, and what must come out."""

    __test__ = False  # pytest collects what begins with Test

    model: str
    tree: Path
    #: The tree's digest.
    digest: str = ""
    entrypoint: str
    runtime: Runtime
    smoke: Smoke
    #: What the network says that files are for, by path in the tree; what it says nothing of is told by header and name.
    roles: Mapping[str, str] = {}
    #: Bytes on the GPU that the network says the model takes; 0: it may run on the CPU.
    gpu_memory: int = 0
    memory: int = 0
    #: Report what it computed, as an answer that a snapshot can expect of others.
    record: bool = False


class TestReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    How a test job ended.

    ``bad`` means that the model is at fault, ``unable`` that this node could not test it now: only the first may fail a model.
    """

    __test__ = False

    verdict: Verdict  #: How it ended.
    #: One sentence for people; empty when it passed.
    reason: str = ""
    load_seconds: float = 0.0  #: Time until the model was loaded.
    run_seconds: float = 0.0  #: Time until it had answered.
    tokens: int = 0  #: Tokens that were generated.
    tokens_per_second: float = 0.0  #: Tokens divided by `run_seconds`.
    #: The answer, cut to 2,000 characters.
    text: str = ""
    token_ids: tuple[int, ...] = ()  #: Their ids.
    dimension: int = 0  #: Components of an embedding.
    #: What really ran it: ``cpu``, or the GPU's name with the layers that it held.
    device: str = ""
    gpu_layers: int = 0  #: Layers on the GPU.
    gpu_memory_used: int = 0  #: Bytes on the GPU.
    engine: str = ""  #: The engine.
    engine_version: str = ""  #: Its version.
    sandbox: str = ""  #: The sandbox that confined it.
    #: Files of the tree that it loaded, and those that it could not, sorted.
    exercised: tuple[str, ...] = ()
    not_exercised: tuple[str, ...] = ()
    #: The end of what the engine or the server wrote to standard error, at most 64 KiB; empty where it passed.
    stderr: str = ""
    #: At how many positions its own first choice was compared with the recorded answer's, 1 for an embedding; 0: nothing was compared.
    compared: int = 0
    #: What it computed, of a job that was to record it.
    answer: Answer | UnsetType = UNSET
    #: Of a server: the digest of its command line and version. One that has served a model here is right.
    command: str = ""


class Tester(Protocol):
    """Runs test jobs, each in a child process that cannot reach the network or write the model."""

    def engines(self) -> dict[str, str]:
        """Return the installed engines by name, with their versions, without loading any of them."""
        ...

    def test(self, job: TestJob) -> TestReport:
        """
        Run *job* and return its report.

        MUST return within the job's timeout and some seconds; MUST survive whatever the child does; MUST answer ``unable`` with a
        reason that starts with ``sandbox-unavailable`` where no sandbox works, and never run the model without one.
        """
        ...

    def close(self) -> None:
        """End the job that runs, and each that would begin later, as ``unable``; from any thread, and idempotent."""
        ...


# -- the store -------------------------------------------------------------------------------------


class Blobs(Protocol):
    """Immutable bytes under their digest. What it holds was hashed to its name; nothing else ever has one."""

    def adopt(self, fetched: Sequence[Fetched]) -> dict[str, ReconcileError]:
        """
        Give verified files in staging their names, and return by digest why one did not get it.

        MUST refuse a file that is not the one that was hashed, and name the others all the same; MUST make names durable before it returns.
        """
        ...

    def check(self, name: str) -> bool:
        """Hash the blob in full; return whether it is good. A bad one MUST count as damaged from then on."""
        ...

    def discard(self, name: str) -> None:
        """Delete the blob; a reader that holds it open keeps it."""
        ...

    def archive(self, name: str) -> None:
        """Move the blob to cold storage; MUST verify the copy before the original goes."""
        ...

    def restore(self, name: str) -> None:
        """Move the blob back from cold storage; MUST hash it in full, and raise ``BlobDamaged`` where its digest differs."""
        ...


class Trees(Protocol):
    """Models' folders, named by the digest of their listing."""

    def assemble(self, recipe: str, artifacts: Sequence[LockedArtifact], entrypoint: str, *, standing: bool = False) -> TreeSeen:
        """
        Make, or mend, the tree of *artifacts*; it MUST be complete when its name appears.

        *standing*: it was made before, and every blob that it is made of is there and good; archives need not be unpacked for it.
        """
        ...

    def remove(self, name: str) -> None:
        """Delete the tree; its blobs stay."""
        ...


class Generations(Protocol):
    """Numbered sets of active models, of which one is active."""

    def current(self) -> Generation:
        """Return the active one."""
        ...

    def swap(self, entries: Mapping[str, ActiveModel]) -> Generation:
        """Make a generation and let ``active`` lead to it: the old set or the new one, at every instant."""
        ...

    def reactivate(self, number: int) -> Generation:
        """Let ``active`` lead to an earlier generation again."""
        ...


class Ledger(Protocol):
    """What is remembered of models between runs."""

    def put(self, record: Record) -> None:
        """Remember *record*."""
        ...

    def forget(self, model: str) -> None:
        """Forget a model."""
        ...

    def tested(self, model: str, report: TestReport, passed: Passed | None, at: datetime) -> None:
        """Remember a test job's report; *passed* is None where the model did not pass."""
        ...

    def set_running(self, *, running: bool) -> None:
        """Remember that a run began, or ended: the next run finishes an interrupted one."""
        ...


class Housekeeping(Protocol):
    """Tidies the store at both ends of a run."""

    def recover(self) -> None:
        """Delete what an interrupted run left in staging."""
        ...

    def quarantine(self, model: str, report: TestReport | None, detail: str, tree: str) -> None:
        """Keep what failed, with a record of what was expected and found, within the policy's bound."""
        ...

    def collect_garbage(self) -> None:
        """Delete what no listed model, kept generation or grace period needs."""
        ...

    def report_bug(self, error: Exception, model: str) -> InternalError:
        """Write a report of an exception that nobody raised on purpose, and return the error that tells of it; MUST raise nothing."""
        ...


class Hooks(Protocol):
    """The operator's commands after the last swap of a run."""

    def activated(self, generation: Generation) -> None:
        """Run the command that is told of what serves. MUST run it once for each generation in turn, and again until it succeeded."""
        ...

    def healthy(self, generation: Generation) -> str:
        """Run the command that checks the node; return why it is not healthy, or an empty text."""
        ...


class Servers(Protocol):
    """The servers of this node that follow the active set."""

    def follow(self, generation: Generation) -> tuple[ServerState, ...]:
        """
        Write what each server reads of *generation*, let it reload, and return what each has then; also where it has it already.

        MUST write nothing that has its bytes already, and MUST raise nothing for a server that refuses: its state says why.
        """
        ...


class Reporter(Protocol):
    """Receives events. It MUST be callable from any thread, return at once, and raise nothing."""

    def __call__(self, event: Event, /) -> None:
        """Take one event."""
        ...


# -- all of them -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Everything that a run may touch."""

    blobs: Blobs
    trees: Trees
    generations: Generations
    ledger: Ledger
    housekeeping: Housekeeping
    servers: Servers
    hooks: Hooks
    fetcher: Fetcher
    tester: Tester
    report: Reporter
    now: Callable[[], datetime]
    #: Where a tree lies.
    tree_path: Callable[[str], Path]
    #: Where a model's folder lies in a generation.
    active_path: Callable[[str], str]
