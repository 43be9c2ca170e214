"""
The protections of this program, each as the change that takes it out: what guards against one fault or attack.

``mutations`` yields them, ``TESTS`` has the tests that are about each file, and ``EQUIVALENT`` says of which no test can notice anything.
A new protection gets a row here; ``tests.crash.mutations`` tries them. Longer than 400 lines because it is one list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]


class Mutation(Struct, frozen=True, kw_only=True):
    """One change of one file: the *count*-th *old* in it becomes *new*."""

    what: str
    file: str
    old: str
    new: str
    count: int = 0


def every(what: str, file: str, old: str, new: str) -> Iterator[Mutation]:
    """Yield one mutation for each place in *file* where *old*, a regular expression, is."""
    text, seen = (ROOT / file).read_text(), dict[str, int]()
    for count, found in enumerate(re.finditer(old, text)):
        line = text[text.rfind("\n", 0, found.start()) + 1 :]
        function = re.findall(r"(?m)^ *def (?!refuse)(\w+)", text[: found.start()])[-1] if line.startswith(" ") else line.split()[0]
        place = f"{what} in {Path(file).stem}.{function}"
        seen[place] = seen.get(place, 0) + 1
        yield Mutation(what=f"{place}, {seen[place]}" if seen[place] > 1 else place, file=file, old=old, new=new, count=count)


def once(what: str, file: str, old: str, new: str) -> Mutation:
    """Return the mutation of the one place where the text *old* is."""
    assert (ROOT / file).read_text().count(old) == 1, (file, old)
    return Mutation(what=what, file=file, old=re.escape(old), new=new)


def never(what: str, file: str, condition: str) -> Mutation:
    """Return the mutation in which what *condition* guards does not happen."""
    return once(what, file, f"if {condition}:", "if False:")


def without(what: str, file: str, statement: str) -> Mutation:
    """Return the mutation that leaves out *statement*."""
    return once(what, file, statement, "pass")


DURABLE, BLOBS, TREES, MADE, LEDGER, DATABASE, OBSERVE, WRITER, GARBAGE, QUARANTINE, FLOOR, LAYOUT, BALLAST = (
    f"reconciler/store/{name}.py"
    for name in (
        "atomic", "blobs", "trees", "generations", "ledger", "ledger_database", "observe", "writer_lock",
        "garbage", "quarantine", "trust_state", "layout", "housekeeping",
    )
)  # fmt: skip
TRUST, DSSE, LOCK, PLAN, LIFECYCLE, GGUF, STRICT = (
    f"reconciler/core/{name}.py" for name in ("trust", "dsse", "lock", "plan", "lifecycle", "gguf", "strict_json")
)
STAGING, HASHER, TRANSFER, VERIFY, RESOLVE, ARIA2, DOCUMENT, SELECTION = (
    f"reconciler/fetch/{name}.py"
    for name in ("staging", "hash_worker", "transfer", "hashing", "resolver", "aria2_daemon", "http", "source_selection")
)
LOOPBACK = "reconciler/loopback.py"
RULES, CREDENTIALS, PUBLISH = "reconciler/fetch/sources.py", "reconciler/fetch/credentials.py", "reconciler/publish/snapshots.py"
SIGNATURE, SIGNER = "reconciler/publish/model_signature.py", "reconciler/publish/external_signer.py"
CONFIRM, NETWORK, RUN, SETUP, UPKEEP, SCRUB, CONTEXT, NODE_TRUST = (
    f"reconciler/commands/{name}.py" for name in ("load_lock", "lock", "apply", "init", "maintenance", "verify", "context", "node_trust")
)
CLOCK, FETCH_RECORD = "reconciler/store/clock.py", "reconciler/commands/fetch_record.py"
ROLLBACK, ACTIVATE, HOOKS = "reconciler/commands/rollback.py", "reconciler/apply/activate.py", "reconciler/hooks.py"
ROLES, DOWNLOADER = "reconciler/core/roles.py", "reconciler/fetch/downloader.py"
INVENTORY, BESIDE, WORKER, KNOWN = (
    f"reconciler/runtime/{name}.py" for name in ("inventory", "llama_cpp_files", "llama_cpp_worker", "known_answer")
)
INSTALL, RECORDS, STEPS = (f"reconciler/apply/{name}.py" for name in ("install", "records", "run"))
LINT = "reconciler/publish/lint.py"
FOLLOW, CONTENT, DRAIN, RELOAD, PRESETS = (
    f"reconciler/serve/{name}.py" for name in ("follow", "content", "drain", "reload", "llama_server")
)
FILES, UNPACK, ATTEND = ("reconciler/files.py", "reconciler/unpack/extract.py", "reconciler/sandbox/supervision.py")
CONFINE, BOX, ASKER, HUB = (
    "reconciler/sandbox/confine.py", "reconciler/sandbox/process.py", "reconciler/runtime/openai_worker.py",
    "reconciler/runtime/hub_folder.py",
)  # fmt: skip

_APPLY = ("unit/test_apply", "unit/test_apply_faults", "unit/test_apply_endings")
_STORE = (
    "contract/test_trees_contract",
    "contract/test_generations_contract",
    "unit/test_apply",
    "unit/test_apply_faults",
    "unit/test_apply_endings",
    "crash/test_damage",
)
_LEFT = ("adversary/test_fetch_leftovers", "adversary/test_store_attacks")
_FETCH = ("contract/test_fetcher_contract", "adversary/test_fetch_leftovers", "adversary/test_fetch_hostile")
_ENGINE = ("adversary/test_store_attacks", "functional/test_trust_on_a_node")
#: The tests that are about a file, those that go red soonest first.
SETTINGS, SETTINGS_FILE, SHELL = "reconciler/settings.py", "reconciler/settings_file.py", "reconciler/cli/command_context.py"
PEERS, PEERS_FOLDER, PEERS_DAEMON, PEERS_SEEDING, TORRENTS = (
    f"reconciler/{name}.py" for name in ("fetch/swarm", "fetch/swarm_folder", "fetch/swarm_daemon", "fetch/seeding", "core/swarm")
)
COLLECT, REGISTER, ASSESS, FLEET_PAGE, OUTBOX, PUBLIC = (
    f"reconciler/fleet/{name}.py" for name in ("collect", "register", "assess", "page", "outbox", "public_text")
)
REPORTING, FORMAT = "reconciler/commands/reporting.py", "reconciler/store/store_format.py"
CODING, HEALTH = "reconciler/fetch/content_coding.py", "reconciler/fetch/host_health.py"
RETRY_AFTER = "reconciler/commands/retry_after.py"
PAGE, MARKDOWN, ENVIRONMENT = "reconciler/report/page.py", "reconciler/report/markdown.py", "reconciler/environment.py"
CONFIGURATION, PLAN_NODES, INIT = "reconciler/commands/configuration.py", "reconciler/commands/plan_nodes.py", "reconciler/cli/init.py"
TESTS = {
    DURABLE: ("unit/test_atomic", "unit/test_reserve", "functional/test_linked_files"),
    FILES: (
        "unit/test_files",
        "unit/test_atomic",
        "unit/test_writer_lock",
        "adversary/test_archive_leftovers",
        "adversary/test_found_files",
    ),
    SETTINGS: ("adversary/test_found_files",),
    SETTINGS_FILE: ("functional/test_status_page",),
    PAGE: ("functional/test_status_page",),
    MARKDOWN: ("functional/test_plan_nodes",),
    ENVIRONMENT: ("unit/test_environment",),
    CONFIGURATION: ("unit/test_environment",),
    PLAN_NODES: ("functional/test_plan_nodes",),
    INIT: ("functional/test_init",),
    CONFINE: ("adversary/test_bare_server", "adversary/test_sandbox"),
    BOX: ("functional/test_server_engines", "adversary/test_bare_server"),
    "reconciler/runtime/gpu_use.py": ("unit/test_runtime_devices", "functional/test_smoke_test"),
    "reconciler/runtime/devices.py": ("unit/test_runtime_devices",),
    "reconciler/runtime/device_nodes.py": ("unit/test_device_nodes",),
    ASKER: ("adversary/test_bare_server", "functional/test_server_engines"),
    HUB: ("functional/test_server_engines",),
    "reconciler/runtime/server_process.py": ("adversary/test_bare_server", "functional/test_server_engines"),
    SHELL: ("adversary/test_found_files",),
    COLLECT: ("adversary/test_fleet_attacks",),
    REGISTER: ("adversary/test_fleet_attacks",),
    ASSESS: ("adversary/test_fleet_attacks",),
    FLEET_PAGE: ("adversary/test_fleet_attacks",),
    OUTBOX: ("unit/test_fleet_outbox",),
    PUBLIC: ("unit/test_fleet_outbox",),
    REPORTING: ("functional/test_fleet",),
    FORMAT: ("functional/test_versions",),
    CODING: ("functional/test_gentle_polling",),
    RETRY_AFTER: ("functional/test_gentle_polling",),
    HEALTH: ("unit/test_host_health",),
    BLOBS: ("unit/test_blobs", "contract/test_blobs_contract", *_STORE, "adversary/test_store_attacks"),
    TREES: ("unit/test_trees", "adversary/test_archive_leftovers", *_STORE, "adversary/test_store_attacks"),
    MADE: ("unit/test_generations", "unit/test_stable_names", *_STORE, "adversary/test_store_attacks", "functional/test_rollback"),
    LEDGER: ("crash/test_ledger_syncs", "unit/test_ledger", *_STORE),
    DATABASE: ("crash/test_ledger_syncs", "unit/test_ledger", "crash/test_damage", "functional/test_versions"),
    OBSERVE: (
        "unit/test_observe",
        *_STORE,
        "adversary/test_store_attacks",
        "laws/test_lifecycle_machine",
        "functional/test_life_of_a_model",
    ),
    WRITER: ("unit/test_writer_lock",),
    GARBAGE: ("unit/test_store_housekeeping",),
    FOLLOW: ("unit/test_serve_follow", "functional/test_serve"),
    CONTENT: ("unit/test_serve_content",),
    PEERS: ("unit/test_swarm_rules", "unit/test_swarm_fetcher"),
    PEERS_FOLDER: ("unit/test_swarm_rules",),
    PEERS_DAEMON: ("unit/test_swarm_rules",),
    PEERS_SEEDING: ("unit/test_swarm_rules",),
    TORRENTS: ("functional/test_snapshot_swarm",),
    DRAIN: ("unit/test_serve_follow", "unit/test_serve_kinds"),
    RELOAD: ("unit/test_serve_follow",),
    PRESETS: ("unit/test_serve_kinds",),
    "reconciler/apply/retire.py": ("unit/test_updates",),
    QUARANTINE: ("unit/test_store_housekeeping",),
    LAYOUT: ("unit/test_layout", "adversary/test_store_attacks"),
    FLOOR: ("unit/test_trust_state", "functional/test_trust_on_a_node", "crash/test_damage"),
    UNPACK: (
        "contract/test_unpacker_contract",
        "adversary/test_archive_leftovers",
        "adversary/test_archive_attacks",
        "functional/test_archives_as_made",
    ),
    TRUST: ("unit/test_trust", "unit/test_trust_state", "adversary/test_trust_attacks", "adversary/test_trust_documents"),
    DSSE: ("unit/test_trust", "adversary/test_trust_attacks", "adversary/test_trust_documents"),
    STRICT: ("unit/test_trust", "adversary/test_trust_attacks", "adversary/test_trust_documents"),
    LOCK: ("unit/test_lock",),
    PLAN: (
        "unit/test_updates",
        "unit/test_apply",
        "unit/test_apply_faults",
        "unit/test_apply_endings",
        "laws/test_plan_laws",
        "laws/test_lifecycle_machine",
        "adversary/test_store_attacks",
    ),
    LIFECYCLE: (
        "unit/test_roles",
        "unit/test_updates",
        "unit/test_apply",
        "unit/test_apply_faults",
        "unit/test_apply_endings",
        "unit/test_mixed_versions",
        "laws/test_plan_laws",
        "adversary/test_store_attacks",
    ),
    GGUF: ("unit/test_gguf_header",),
    ROLES: ("unit/test_roles",),
    INVENTORY: ("functional/test_model_roles",),
    BESIDE: ("functional/test_model_roles",),
    WORKER: ("functional/test_recorded_answers", "functional/test_smoke_test"),
    KNOWN: ("functional/test_recorded_answers",),
    INSTALL: (*_APPLY, "laws/test_lifecycle_machine"),
    RECORDS: ("laws/test_lifecycle_machine",),
    STEPS: ("laws/test_lifecycle_machine",),
    LINT: ("functional/test_operator_edit",),
    DOWNLOADER: ("functional/test_model_roles",),
    STAGING: _LEFT,
    HASHER: ("adversary/test_verify_faults",),
    VERIFY: ("adversary/test_verify_faults", "crash/test_damage"),
    TRANSFER: _FETCH,
    RESOLVE: ("adversary/test_redirects_and_credentials", *_FETCH),
    RULES: ("adversary/test_redirects_and_credentials", "unit/test_sources_rules"),
    CREDENTIALS: ("adversary/test_redirects_and_credentials", "adversary/test_sources_tls"),
    PUBLISH: ("functional/test_operator_review",),
    SIGNATURE: ("functional/test_model_signatures",),
    SIGNER: ("functional/test_operator_review",),
    ARIA2: ("adversary/test_aria2_faults", "adversary/test_store_attacks"),
    LOOPBACK: ("adversary/test_aria2_faults",),
    SELECTION: ("unit/test_source_selection", "adversary/test_fetch_ranges"),
    DOCUMENT: ("adversary/test_fetch_documents", "functional/test_trust_on_a_node", "functional/test_operator_models"),
    "reconciler/fetch/connection.py": ("adversary/test_fetch_documents", "adversary/test_sources_tls"),
    CONFIRM: _ENGINE,
    BALLAST: ("unit/test_reserve", "unit/test_store_housekeeping", "crash/test_full_disk"),
    NETWORK: _ENGINE,
    CONTEXT: (*_ENGINE, "crash/test_full_disk"),
    NODE_TRUST: _ENGINE,
    UPKEEP: ("functional/test_housekeeping",),
    ROLLBACK: ("functional/test_rollback", "functional/test_cold_storage"),
    ACTIVATE: (*_APPLY, "unit/test_updates", "laws/test_lifecycle_machine"),
    HOOKS: ("unit/test_hooks",),
    SCRUB: ("functional/test_cold_storage", "functional/test_verify_records"),
    RUN: (*_ENGINE, "functional/test_housekeeping"),
    CLOCK: ("laws/test_clock_machine",),
    FETCH_RECORD: ("functional/test_silent_network",),
    SETUP: _ENGINE,
    ATTEND: ("adversary/test_hostile_child",),
}
#: What no test can see, and why.
EQUIVALENT = {
    "follow_symlinks=False in atomic.link": "nobody: link(2) of Linux follows none either; POSIX lets a system choose, and others follow",
    "the alphabet of base64": "nobody: what was decoded must encode to the very text again",
    "size of a download": "nobody: the hash of all its bytes asks for the size too; here the source is named that sent another",
    "size of a download that was interrupted": "nobody: what is left is measured once more; here the source is named",
}


def mutations() -> Iterator[Mutation]:
    """Yield every protection, taken out."""
    yield from _syncs()
    yield from _links()
    yield from _fleet()
    yield from _peers()
    yield from _bytes()
    yield from _store()
    yield from _serving()
    yield from _following()
    yield from _roles()
    yield from _network()
    yield from _told()
    yield from _found_files()


def _syncs() -> Iterator[Mutation]:
    """What a power cut tests."""
    yield from every("fsync", DURABLE, r"os\.fsync\(fd\)", "pass")
    yield from every("fsync of the folder", DURABLE, r"(?<=    )sync_folder\(.*\)", "pass")
    yield from every("settling", DURABLE, r"(?<= )settle\(\w+, mode\)", "pass")
    yield from every("sync of the tree", TREES, r"atomic.sync_tree\(\w+\)", "pass")
    yield from every("fsync of the folder", QUARANTINE, r"atomic.sync_folder\(.*\)", "pass")
    yield from every("sync of the generation", MADE, r"atomic.sync_tree\(\w+\)", "pass")
    yield without("sync in atomic._write_new", DURABLE, "sync_file(fd, mode)")
    yield without("sync in atomic.copy", DURABLE, "sync_file(target, mode)")
    yield without("sync in atomic.delete", DURABLE, "sync_folders(above)")
    yield without("the end of a transaction that was refused", LEDGER, 'self._write("ROLLBACK", ())')
    yield without("sync in blobs._prepare_name", BLOBS, "atomic.sync_file(fd, 0o444)")
    yield from every("sync of the folders of a batch", BLOBS, r"atomic\.sync_folders\(.*\)", "pass")
    yield once("durable ledger", DATABASE, "PRAGMA synchronous = EXTRA", "PRAGMA synchronous = OFF")
    yield once("sync of the ledger's folder", DATABASE, "PRAGMA synchronous = EXTRA", "PRAGMA synchronous = FULL")
    yield once("rollback journal of the ledger", DATABASE, "PRAGMA journal_mode = DELETE", "PRAGMA journal_mode = WAL")
    yield once("journal of the ledger on the disk", DATABASE, "PRAGMA journal_mode = DELETE", "PRAGMA journal_mode = MEMORY")


def _links() -> Iterator[Mutation]:
    """What follows no link, waits for no pipe and replaces nothing."""
    for file in (DURABLE, FILES, BLOBS, WRITER, OBSERVE, UNPACK, GGUF, STAGING, HASHER, RESOLVE, ARIA2):
        yield from every("O_NOFOLLOW", file, r" \| os\.O_NOFOLLOW", "")
        yield from every("O_EXCL", file, r" \| os\.O_EXCL", "")
    for file in (FILES, OBSERVE, MADE, UNPACK):
        yield from every("no link followed", file, r"follow_symlinks=False", "follow_symlinks=True")
    yield once("follow_symlinks=False in atomic.link", DURABLE, ", follow_symlinks=False", "")
    for file in (FILES, OBSERVE, LEDGER, STAGING):
        yield from every("lstat", file, r"\blstat\(", "stat(")
    yield once("lstat in blobs.check", BLOBS, "before = path.lstat()", "before = path.stat()")
    yield once("lstat in trees.is_linked", TREES, "= path.lstat(), ", "= path.stat(), ")
    for file in (DURABLE, UNPACK, GGUF, HASHER):
        yield from every("plain files alone", file, r"if not stat\.S_ISREG\(.*\):", "if False:")
    yield never("a link where the index of a generation is one's own", MADE, "os.path.islink(folder)")
    yield never("links among a store's own folders", LAYOUT, "os.path.islink(path)")
    yield once("links among a store's fan-out folders", LAYOUT, "if fan_out:", "if False:")
    yield without("own folders before a run", CONTEXT, "layout.check(fan_out=True)")
    yield without("own folders before a plan", OBSERVE, "layout.check()")
    yield once("links on the way into a tree", TREES, "if _through_link(target, entry.path) or not", "if not")
    yield once("links where a tree is made", TREES, "target.is_dir() and not target.is_symlink()", "target.is_dir()")
    yield once("links where a file's folder is made", TREES, "if at.is_symlink() or (", "if (")


def _bytes() -> Iterator[Mutation]:
    """What compares digests and sizes, and sees that a file is the one that was hashed."""
    yield once("hash of a download", TRANSFER, "elif hashed.found != self.want.digest:", "elif False:")
    yield never("announced size of a download", TRANSFER, "status.total not in {0, self.want.size} or status.done > self.want.size")
    yield never("size of a download", TRANSFER, "length != self.want.size")
    yield never("size of a download that was interrupted", TRANSFER, "staging.length(self.attempt.data) > self.want.size")
    yield never("size of a small download: more", RESOLVE, "len(data) > request.size")
    yield never("size of a small download: less", RESOLVE, "len(data) < request.size")
    yield never("size of what was hashed", HASHER, "seen.st_size != size")
    yield never("end of a file that is mapped", HASHER, "os.fstat(fd).st_size < start + length")
    yield never("end of a file that is read", HASHER, "not count")
    yield once("hash in a scrub", VERIFY, "ok=done.found == name", "ok=True")
    yield once("bytes that a later run can use, for a plain request", SELECTION, "exhausted and may_restart and", "exhausted and")
    yield once("a source that gave wrong bytes", SELECTION, 'failure.kind == "size-mismatch" and source.mode', "source.mode")
    yield never("size of a document", DOCUMENT, "got > max_bytes")
    yield never("end of a document", DOCUMENT, "whole is not None and got != whole")
    yield never(
        "page in place of a document", DOCUMENT, 'page := error_pages.describe_non_envelope(answer.headers.get("Content-Type", ""), data)'
    )
    yield once("page in place of a blob", RESOLVE, 'Failure(text=f"it answered with {page}") if page else otherwise', "otherwise")
    yield once("redirect to this machine", RULES, "if source and is_loopback_name(host) and not", "if False and not")
    yield once("redirect to a host that no rule names", RULES, "urls.host_matches(host, self.redirects.get(source, ()))", "bool(source)")
    yield once(
        "redirects of the network where hosts are named", RULES, "{} if allowed else settings.signed_redirects", "settings.signed_redirects"
    )
    yield once("host of a credential", CREDENTIALS, "return found if found and sources.may_authorize(url) else None", "return found")
    yield never("file of a credential that others can read", CREDENTIALS, "path.stat().st_mode & 0o077")
    yield once("token along a redirect", RESOLVE, 'challenge)}" if challenge else ""', 'challenge)}" if challenge else authorization')
    yield never("file that its publisher signed", SIGNATURE, "path not in signed")
    yield never("content that its publisher signed", SIGNATURE, "signed[path] != found")
    yield never("name in a publisher's certificate", SIGNATURE, "identity not in names")
    yield never("signature of a key where a certificate is asked for", SIGNATURE, "by_certificate != bool(bundle.certificates)")
    yield never("signer that failed", SIGNER, "process.returncode and len(written) <= _MOST_BYTES")
    yield never("snapshot that was reviewed", PUBLISH, "reviewed and digest.of(document.payload) != reviewed")
    yield never("redirect of a document into a private network", DOCUMENT, "connection.is_private and not may_be_private")
    yield never("address of a document", "reconciler/fetch/connection.py", "self._addresses")
    yield without("deadline of a document's headers", DOCUMENT, "timer.start()")
    yield once("one name of what is left", STAGING, " or seen.st_nlink != 1", "")
    yield once("size of what is left", STAGING, " or seen.st_size > size", "")
    yield once("plain file of what is left", STAGING, "not stat.S_ISREG(seen.st_mode) or seen.st_nlink", "seen.st_nlink")
    yield once("folder of what is left", STAGING, "not stat.S_ISDIR(seen.st_mode) or ", "")
    yield once("identity in blobs.adopt: device and inode", BLOBS, "(seen.st_dev, seen.st_ino, ", "(fetched.device, fetched.inode, ")
    yield once("identity in blobs.adopt: size and time", BLOBS, "seen.st_size, seen.st_mtime_ns)\n", "fetched.size, fetched.mtime_ns)\n")
    yield once("identity in blobs.adopt: one name", BLOBS, "or seen.st_nlink != 1 ", "")
    yield once("identity in blobs.adopt: plain file", BLOBS, "not stat.S_ISREG(seen.st_mode) or ", "")
    yield never("hash of a carried copy", BLOBS, "self._hash_file(temporary, digests.parse(name)[0]) != name")
    yield once("hash in blobs.check", BLOBS, "self._hash(path, digests.parse(name)[0]) == name", "True")
    yield once("plain file in blobs.check", BLOBS, "stat.S_ISREG(before.st_mode) and ", "")
    yield once("hash of a member's blob that is here", BLOBS, ".exists() and self.check(name)", ".exists()")
    yield once("forgetting a bad blob", BLOBS, "self._ledger.forget_blobs([name])\n        return good", "pass\n        return good")
    yield once("identity of a blob: plain file", OBSERVE, "not stat.S_ISREG(seen.st_mode) or ", "")
    yield once("identity of a blob: size", OBSERVE, " or (known is not None and seen.st_size != known.size)", "")
    yield once("identity of a blob: inode", OBSERVE, "(seen.st_ino, seen", "(known.inode, seen")
    yield once("identity of a blob: time", OBSERVE, "seen.st_mtime_ns, stat.", "known.mtime_ns, stat.")
    yield once("identity of a blob: mode", OBSERVE, "stat.S_IMODE(seen.st_mode))", "0o444)")
    yield once("identity of a tree's file in a plan", OBSERVE, "(seen.st_dev, seen.st_ino) == (blob.st_dev, blob.st_ino)", "True")
    yield once("names in a tree", OBSERVE, "set(os.listdir(handle)) == paths ", "True ")
    yield once("names in a tree with folders", OBSERVE, "_paths(folder, handle) == paths | above", "True")
    yield once("hash before what is unverified serves", LIFECYCLE, "blob is None or blob.verified_at is None for", "False for")
    yield once("test of the very tree", LIFECYCLE, "passed is None or passed.tree != tree.digest", "passed is None")


def _store() -> Iterator[Mutation]:
    """What is believed neither of an extractor nor of the disk."""
    yield without("confirmation of what was unpacked", TREES, "extract.check_extracted(folder, members)")
    yield never("confirmation: the files that were named", UNPACK, "found != sorted(members)")
    yield once("confirmation: plain files", UNPACK, "elif stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1:", "elif seen.st_nlink == 1:")
    yield once("confirmation: one name", UNPACK, " and seen.st_nlink == 1:", ":")
    yield never("confirmation: depth", UNPACK, 'above.count("/") > _DEEPEST')
    yield never("an empty folder to unpack into", UNPACK, "not is_empty")
    yield without("paths of a tree", TREES, "snapshot.check_path(path)")
    yield never("one path twice in a tree", TREES, "entry.path.casefold() in folded")
    yield never("file and folder in a tree", TREES, "any(str(parent).casefold() in folded for parent in Path(path).parents)")
    yield never("entrypoint in a tree", TREES, "entrypoint not in {entry.path for entry in listing}")
    yield once("identity of a tree's file", TREES, "(found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)", "True")
    yield once("number in the index", MADE, "found.generation != number or ", "")
    yield once("path in the index", MADE, 'entry.path != path_of(entry.id) or ".." in entry.path', "False")
    yield once("link of a generation", MADE, "return os.readlink(path) == target", "return bool(os.readlink(path))")
    yield never("damage of a generation apart from a refusal", MADE, "error.errno not in {*_MISSING, errno.EINVAL}")
    yield once("where active leads", MADE, 'if target.parent != Path("generations") or', "if")
    yield once("check of the ledger", DATABASE, 'fetchone() == ("ok",)', "fetchone() is not None")
    yield without("the lock", FILES, "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)")
    yield once("the lock of the store", WRITER, "taken = files.lock(fd, timeout_seconds)", "taken = True")
    yield never("the lock of the downloads", STAGING, "not files.lock(fd, _LOCK_SECONDS)")
    yield once("a quarantine's bound", QUARANTINE, "if index and (total > max_bytes", "if index and (False")
    yield once("the word of a test job's child", ATTEND, ' and found.get("nonce") == nonce', "")


def _following() -> Iterator[Mutation]:
    """What keeps a server from a half-made file, from a cut request, and from trees that are gone."""
    yield once(
        "generations that servers have",
        GARBAGE,
        "{current, *(server.generation for server in serving.read(self._layout).servers)}",
        "{current}",
    )
    yield once("files of others in a server's folder", CONTENT, "if entry.shared or _is_there(entry, root):", "if True:")
    yield once("paths in the list of what was written", CONTENT, 'and ".." not in path.split("/")', "")
    yield once("absolute paths in the list of what was written", CONTENT, 'not path.startswith("/") and ', "")
    yield once("what was written is listed before", CONTENT, "(*paths, *(path for path in before if path not in paths))", "before")
    yield once("no answer is no idleness", DRAIN, 'isinstance(slot.get("is_processing"), bool)', "True")
    yield never("metrics that do not tell", DRAIN, "not found")
    yield once("a model that is loaded is waited for", DRAIN, '"busy" if "loading" in concerned.values() or any(', '"busy" if any(')
    yield once(
        "what a server read last",
        DRAIN,
        "for name, body in after.items() if before.get(name) == body} if is_known else ()",
        "for name, body in after.items() if before.get(name) == body}",
    )
    yield never("trees of archived models that a server reads", "reconciler/apply/retire.py", "run.is_lagging")
    yield never("what a server lists", RELOAD, "missing := sorted({*content.names} - found)")
    yield once("once for each set", FOLLOW, "if force or not has_it:", "if True:")
    yield once(
        "one incident for a failure",
        FOLLOW,
        "if not told.failures:\n            self._report(Incident",
        "if True:\n            self._report(Incident",
    )
    yield once("options that break out of the presets", PRESETS, r'or re.search(r"[;#\r\n]", str(value))', "")
    yield never("paths that presets cannot say", PRESETS, r'found := re.search(r"[;#]|^\s|\s$", value)')


def _roles() -> Iterator[Mutation]:
    """What a file of a model claims to be, and is not."""
    yield once("a role against its header", ROLES, "if role in permitted:", "if True:")
    yield once("a missing split", ROLES, "if number not in numbers), 0)", "if False), 0)")
    yield once("one split too many", ROLES, "if not 1 <= number <= count), -1)", "if False), -1)")
    yield never("a header's word on a split", ROLES, "facts is not None and (fault := _misnamed(path, facts, sets, files))")
    yield once("roles in a test's digest", LIFECYCLE, "(*job, roles) if roles else job", "job")
    yield never("a role against its header, on a node", INVENTORY, 'fault := roles.contradiction(one.role, one.facts) if one.facts else ""')
    yield never("a broken split model, on a node", INVENTORY, "fault := roles.split_fault(headers, entrypoint)")
    yield never("a projector that the engine refuses", BESIDE, "not self._context")
    yield never("weights that are no numbers", BESIDE, "not logits or not np.isfinite(np.ctypeslib.as_array(logits, shape=(size,))).all()")
    yield never("another vocabulary", BESIDE, "text(ours, token) != text(theirs, token)")
    yield never("a recorded answer", KNOWN, "contradicts(leads, len(sure))")
    yield once("a choice that hardly leads contradicts nothing", KNOWN, "len(leads) > max(1, sure // _ONE_IN)", "bool(leads)")
    yield once("two of them contradict", KNOWN, " or len(leads) > max(1, sure // _ONE_IN)", "")
    yield once("one that leads contradicts", KNOWN, "any(lead >= MARGIN for lead in leads) or ", "")
    yield never("a recorded embedding", KNOWN, 'not cosine >= answer["cosine"]')
    yield once("too little to record", KNOWN, "len(choices) < least or len(sure) < LEAST_SURE", "len(choices) < 8")
    yield once("a close choice that is not compared", KNOWN, "choice.lead >= MARGIN and", "True and")
    yield once("another tokenizer", KNOWN, "not recorded or list(recorded) == list(prompt)", "True")
    yield once("the device that ran a test, under another id", INSTALL, "device=passed.ran_on", "device=passed.device")
    yield never("an answer that compares too little, before signing", LINT, "tokens < LEAST_TOKENS or sure < LEAST_SURE")
    yield never("the digest of an empty file", DOWNLOADER, 'want.digest.partition(":")[2] != digits')


def _serving() -> Iterator[Mutation]:
    """What stops serving or goes although something stands in its way, and what never serves again."""
    yield once("an end to what failed and serves", LIFECYCLE, '(active is None or model.state != "disabled")', "True")
    yield never("an end to what is of an unknown state", LIFECYCLE, 'model.unknown_words and model.state not in {"archived", "retired"}')
    yield never("no work for what is not understood", LIFECYCLE, "words := model.unknown_words")
    yield never("an end to what is left out", PLAN, 'before != "active" or model.serves')
    yield once("an older copy that was forgotten", OBSERVE, "[_tree_from_disk(layout, tree, found) for tree in sorted(forgotten)]", "[]")
    yield once("the name of a tree that was forgotten", OBSERVE, "digest_of(tuple(listing)) != name", "False")
    yield once("the tree of an archived model", GARBAGE, "number == current or model not in archived", "True")
    yield once("a stable name that leads elsewhere", MADE, 'if not _links_to(f"{folder}/{path}", target)]', "if False]")
    yield once("a rollback that holds", ROLLBACK, "state.held | _taken_back(before, target, found.lock)", "state.held")
    yield never("a model that is held", PLAN, "op in WORK and is_held(model, given.state)")
    yield once("a retired model that is replaced", LIFECYCLE, "if replacing & given.serving or not (", "if not (")
    yield once("a retired model that is never installed anew", LIFECYCLE, " or not (serves or model.id in given.state.records)", "")
    yield never("a rollback to what is not listed", ROLLBACK, "listed is None")
    yield once("a rollback to bytes in doubt", ROLLBACK, "not seen.damaged and good.issuperset(seen.blobs)", "True")
    yield once("a rollback to a generation that was touched", ROLLBACK, "ports.generations.swap(target.entries) if touched else ", "")
    yield once(
        "a rollback that the node is not healthy with", ROLLBACK, "ports.hooks.healthy(made) if brings_models", '"" if brings_models'
    )
    yield once("a rollback that was cut short", ROLLBACK, "ledger.set_running(running=True)", "pass")
    yield once("a run that was cut short before a rollback", ROLLBACK, "running=state.unfinished", "running=False")
    yield once("a rollback to what never served", MADE, "if number in announced or number < min(announced, default=number + 1)", "")
    yield once("a rollback to other bytes from cold storage", ROLLBACK, "if tree.digest != entry.tree:", "if False:")
    yield never("a pause after a node that was not healthy", PLAN, "op in WORK and model.id in given.paused")
    yield once("one of those that came together", LIFECYCLE, "sorted(over)[1:]", "[]")
    yield once("what may not serve after a swap that went back", ACTIVATE, " or model in run.stopped", "")
    yield once(
        "a swap that went back to bytes in doubt",
        ACTIVATE,
        "not run.damaged & blobs and entry.tree not in run.observed.damaged_trees",
        "True",
    )
    yield once("a swap that nobody announced", OBSERVE, "number == active.number or not (logged or unfinished)", "True")
    yield once("a hook that failed", HOOKS, " and not before.error", "")
    yield never("a cold copy that is away for now", SCRUB, "not done.found")
    yield without("a cold copy that rotted", SCRUB, "blobs.set_aside(self._store.layout, done.digest)")
    yield once(
        "what was hashed before an interruption", SCRUB, "contextlib.closing(_Records(store))", "contextlib.nullcontext(_Records(store))"
    )
    yield never("letting go of the ballast", BALLAST, "_free(path) < RESERVE_BYTES")
    yield once("room beside the ballast", BALLAST, " and _free(path) >= 4 * RESERVE_BYTES", "")
    yield once("ballast that is all holes", BALLAST, "st_blocks * 512", "st_size")
    yield once("copies that serve on without work", PLAN, " or _is_left_serving(change)}", "}")
    yield without("what is damaged, on a disk without room", STEPS, "run = install.stop_bad_copies(run, ports)")
    yield once("hashes on a disk without room", INSTALL, "return not good", "return False")
    yield once("hashes without any work", INSTALL, "if not work and not run.plan.blobs:", "if not work:")
    yield once("a failure while an older content serves", RECORDS, 'if known.state == "failed" and', "if False and")
    yield once("small files of a run that was killed", BALLAST, ', "small-")', ")")
    yield once("ballast before a run", CONTEXT, "housekeeping.released_when_full(layout.space_reserve)", "contextlib.nullcontext()")


def _network() -> Iterator[Mutation]:
    """What makes bytes the network's word: signatures and their number, versions, times, and the trust_state."""
    yield without("signature", DSSE, "key.verify(decode_base64(signature), message)")
    yield once("keys of the role alone", TRUST, "for keyid in role.keyids}", "for keyid in root.verifiers}")
    yield once("each key counted once", DSSE, "return frozenset(\n        signature.keyid\n", "return tuple(\n        signature.keyid\n")
    yield once("signatures that are looked at", DSSE, "envelope.signatures[: limits.signatures]", "envelope.signatures")
    yield never("threshold", DSSE, "len(valid) < threshold")
    yield never("network of a snapshot", TRUST, "found.network != root.network")
    yield never("expiry of the root", TRUST, "now >= root.expires_at")
    yield never("expiry of the snapshot", TRUST, "now >= found.expires_at")
    yield never("a snapshot of the future", TRUST, "found.issued_at > now + timedelta(seconds=limits.clock_skew_seconds)")
    yield never(
        "a clock set back", TRUST, "trust_state.issued_at and now < trust_state.issued_at - timedelta(seconds=limits.clock_back_seconds)"
    )
    yield never("trust state: version", TRUST, "found.version < trust_state.version")
    yield never("trust state: two of one version", TRUST, "found.version == trust_state.version and verified.digest != trust_state.digest")
    yield never(
        "trust state: time after a change of keys", TRUST,
        "trust_state.issued_at and found.issued_at <= trust_state.issued_at and verified.digest != trust_state.digest",
    )  # fmt: skip
    yield once(
        "trust state: time of issue that rises", TRUST, "max(trust_state.issued_at, found.issued_at) if trust_state.issued_at else ", ""
    )
    yield once("trust state: order by the time of issue", TRUST, "self.issued_at.timestamp() if self.issued_at else 0.0", "0.0")
    yield once("trust state: order by the version", TRUST, "else 0.0, self.version, self.root_version)", "else 0.0, 0, self.root_version)")
    yield once("trust state: order by the root", TRUST, "self.version, self.root_version)", "self.version, 0)")
    yield never("fingerprint of the root", TRUST, "fingerprint and found != fingerprint.removeprefix('sha256:').lower()".replace("'", '"'))
    yield once("a root's own signature", TRUST, _SIGNED.format("root") + "\n    return root", "return root")
    yield once("the old root's signature", TRUST, "payload = " + _SIGNED.format("root") + "\n    following", _UNSIGNED + "\n    following")
    yield without("the new root's signature", TRUST, _SIGNED.format("following"))
    yield never("network of a root", TRUST, "following.network != root.network")
    yield never("versions of roots by one", TRUST, "following.version != root.version + 1")
    yield never("rotations without end", TRUST, "steps >= limits.root_rotations")
    yield without("rim of the calendar", TRUST, "snapshot.check_instant(root.expires_at)")
    yield never("a key twice in a role", TRUST, "len(set(role.keyids)) != len(role.keyids)")
    yield never("a threshold that cannot be met", TRUST, "role.threshold > len(role.keyids)")
    yield never("a key that is not there", TRUST, "unknown")
    yield without("keys that are loaded with their root", TRUST, "_ = root.verifiers")
    yield never("payload type", DSSE, "payload_type and envelope.payload_type != payload_type")
    yield never("size of an envelope", DSSE, "len(data) > max_bytes")
    yield once("the alphabet of base64", DSSE, ", validate=True)", ")")
    yield once("canonical base64", DSSE, "if (base64.urlsafe_b64encode(data) if", "if False and (base64.urlsafe_b64encode(data) if")
    yield never("kind of a key", DSSE, "not isinstance(key, Ed25519PublicKey)")
    yield once("keys of small order", DSSE, "if y >= _P or y in _SMALL_ORDER:", "if y >= _P:")
    yield once("keys that are not canonical", DSSE, "if y >= _P or y in _SMALL_ORDER:", "if y in _SMALL_ORDER:")
    yield never("key id", DSSE, "keyid_of(key) != keyid")
    yield without("one reading of a document", STRICT, "_refuse_ambiguity(data)")
    yield never("a member twice in a document", STRICT, "len(found) != len(pairs)")
    yield once("a lock that differs", LOCK, "if data == expected:", "if True:")
    yield without("a lock that is not its envelope's", CONFIRM, "locks.check(files.lock, lock)")
    for part in ("fingerprint", "pinned root", "roots", "lock", "envelope"):
        yield once(f"what is remembered as confirmed: {part}", CONFIRM, *_CONFIRMED[part])
    yield once("the envelope that a server calls unchanged", NETWORK, "if digest.of(envelope) == etag.envelope else None", "")
    fetched = "envelope, root, now=now, trust_state=accepted, limits=context.limits)"
    opened = "trust.open_snapshot(envelope, root, limits=context.limits)"
    yield once("time and trust state of what is fetched", NETWORK, f"trust.verify({fetched}", opened)
    fresh = "now=now, limits=context.limits)"
    recorded = "trust.check_fresh(verified, root, now=now, trust_state=before, limits=context.limits)"
    yield without("time and trust state before a run", NODE_TRUST, recorded)
    yield without("time and trust state before a plan", RUN, f"found.check_fresh(trust_state.read(layout, ledger), {fresh}")
    yield without("time and trust state before it begins anew", SETUP, f"found.check_fresh(known, {fresh}")
    yield never("time within a boot", CLOCK, "boot.boot and boot.boot == before.boot")
    yield once("time across boots", CLOCK, "return boot.seconds if boot.boot and before.boot else 0.0", "return 0.0")
    yield once("records that follow the clock", CLOCK, "[_moved(record, moved, now) for record in records]", "[]")
    yield once(
        "times in the future count as now",
        CLOCK,
        "min(at.timestamp() + seconds, now.timestamp())",
        "at.timestamp() + seconds",
    )
    yield once("one reading of the clock a run", CLOCK, "lambda: began + timedelta(seconds=timer() - at)", "clock")
    yield once("a silence that follows the clock", FETCH_RECORD, "_moved(before.fetches, moved, now)", "before.fetches")
    yield once("a record for each address", FETCH_RECORD, "if record and record.address == _address(context)", "if record")
    following = "clock.follow(context.layout, ledger, {}, clock.boot_time())"
    yield without("the clock before a run", RUN, following.format("now"))
    yield without("the clock before gc", UPKEEP, following.format("context.clock()"))
    yield once("the higher trust state", FLOOR, "max(found, key=lambda one: one.order)", "found[0]")
    yield never("a lost trust state", FLOOR, "used")
    yield once("an empty trust state", FLOOR, "return found if found.version else None", "return found")
    yield once("a bound on envelopes", FLOOR, "others[: 1 - ENVELOPES]", "others[:0]")
    yield once("the last envelope, whatever the clock says", FLOOR, " if kept != path)", ")")
    yield without("the trust state in its file", FLOOR, "atomic.write(_path(layout), msgspec.json.encode(trust_state))")
    yield without("the trust state in the ledger", FLOOR, 'ledger.set_fact("floor", trust_state)')


def _told() -> Iterator[Mutation]:
    """What keeps hostile text inert, secrets untold, and a change that nodes would refuse out of a repository."""
    yield once("text on the page", PAGE, "html.escape(printable(text, _MOST_TEXT), quote=True)", "text")
    yield once("the policy of the page", PAGE, "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'", "")
    yield once("a state on the page", PAGE, 'model.state if model.state in _MARKS else "absent"', "model.state")
    yield once("text in Markdown", MARKDOWN, "_SPECIAL.sub(", "re.sub('(?!)', ")
    yield without("a downloader that obeys anybody", ARIA2, "self._answers_anybody.set()")
    yield once("a port that another program took", LOOPBACK, "return inodes <= held if", "return True if")
    yield once("secrets of addresses in config show", CONFIGURATION, "documents.redacted(value) if", "value if")
    yield without("an older snapshot than the base", PLAN_NODES, "found.check_fresh(accepted, now=now, limits=context.limits)")
    yield never("an older root than the base", PLAN_NODES, "base and found.root.version < base.root.version")
    yield never("a fingerprint for a root that is fetched", INIT, "not fingerprint")
    yield once("a page in the store", SETTINGS_FILE, "page.is_relative_to(os.path.normpath(settings.store_path))", "False")
    yield once("a variable that names no key", ENVIRONMENT, "if name not in known and any(", "if False and any(")


def _found_files() -> Iterator[Mutation]:
    """What keeps another user of the machine from being obeyed."""
    yield never("found files: the owner", FILES, "found.st_uid not in self._owners")
    yield never(
        "found files: who may write",
        FILES,
        "found.st_mode & _OTHERS_WRITE and not is_link and not (is_folder and found.st_mode & stat.S_ISVTX)",
    )
    yield never("found files: what others can move into a sticky folder", FILES, "is_entry and self._is_shared and not is_folder")
    yield never("found files: what others can create", FILES, "self._is_shared")
    yield never("found files: a file system of another user", FILES, "not owners.issuperset(users)")
    yield never(
        "found files: unknown users of a user namespace",
        FILES,
        'uid == _UNKNOWN_USER and _USERS.read_text().split() != ["0", "0", "4294967295"]',
    )
    yield without("found files: what the settings name", SHELL, "found.check_trusted(uid, named=settings_file.keys_from(os.environ))")
    yield once("found files: the settings", SHELL, "lambda path: files.read_trusted(path, uid)", "Path.read_bytes")
    yield without("found files: a link that is written through", DURABLE, "files.check_trusted_path(path, os.geteuid())")
    yield never("found files: what a link leads to", DURABLE, "target.exists() and not target.is_file()")
    yield once("found files: the envelope", SETTINGS, 'yield "the envelope beside [network] lockfile", self.envelope_path', "pass")
    yield once("found files: scripts of commands", SETTINGS, "for word in argv[1:]:", "for word in argv[:0]:")
    yield once(
        "found files: what a server may read", SETTINGS, 'named += [(f"[runtime.{engine}] bind", text)', 'list[object]() + [("", text)'
    )
    yield from _servers()
    yield from _gpus()
    yield once("found files: programs beside the settings", SETTINGS, 'if argv and "/" in argv[0] else argv', "if False else argv")


def _peers() -> Iterator[Mutation]:
    """What keeps a swarm's process, and its peers, from anything but giving bytes."""
    yield once("peers: a link for a folder", PEERS_FOLDER, "os.O_DIRECTORY | os.O_NOFOLLOW", "os.O_DIRECTORY")
    yield once("peers: a link for a file", PEERS_FOLDER, "os.open(digits, os.O_RDONLY | os.O_NOFOLLOW", "os.open(digits, os.O_RDONLY")
    yield never("peers: plain files alone", PEERS_FOLDER, "not stat.S_ISREG(os.fstat(fd).st_mode)")
    yield once("peers: the signed digest", PEERS_FOLDER, 'if left or f"{algorithm}:{hasher.hexdigest()}" != want.digest:', "if left:")
    yield once("peers: a bounded answer", PEERS_DAEMON, "read(_MOST_ANSWER_BYTES + 1)", "read()")
    yield once("peers: calls from the address that the unit allows", PEERS_DAEMON, "source_address=(CALLER, 0)", "source_address=None")
    yield once("peers: a link for the contact", PEERS_DAEMON, "CONTACT, os.O_RDONLY | os.O_NOFOLLOW", "CONTACT, os.O_RDONLY")
    for option in ("enable-dht", "enable-peer-exchange", "bt-enable-lpd", "rpc-listen-all"):
        yield once(f"peers: no {option}", PEERS_DAEMON, f'"{option}": "false"', f'"{option}": "true"')
    yield once("peers: seeding ends by its ratio", PEERS_SEEDING, "(state.over or too_long or too_much)", "(state.over or too_long)")
    yield once("peers: seeding ends by its time", PEERS_SEEDING, "(state.over or too_long or too_much)", "(state.over or too_much)")
    yield once("peers: the form of an answer", PEERS_DAEMON, 'Annotated[str, Meta(pattern=r"^[0-9a-f]*(?!\\n)$")]', "str")
    yield once("peers: a port is one", PEERS_DAEMON, "Annotated[int, Meta(ge=1, le=65535)]", "int")
    yield without("peers: the time of a call", PEERS_DAEMON, "timer.start()")
    yield once("peers: how long a piece is", PEERS, "piece_length(self.want.size), self.want.size", "1, self.want.size")
    yield never("peers: the reserve of the disk", PEERS, "not self._has_room(one.want.size - one.progress.done + one.want.size)")
    yield never("peers: HTTP behind slow ones", PEERS, "one.progress.is_slow(time.monotonic(), self._least)")
    yield once("peers: a node alone is not one that others give to", PEERS, "len({peer.ip for peer in peers}) == 1", "len(peers) < 99")
    yield once("peers: a node alone goes on giving", PEERS, "self._shared[one.want.digest] = one", "self._forget(one)")
    yield once("peers: not asked again for what they lied about", PEERS, " and want.digest not in self._context.refused", "")
    yield once("peers: one shape of a torrent", TORRENTS, "return found is not None and data ==", "return found is not None or data ==")


def _fleet() -> Iterator[Mutation]:
    """What keeps an operator from believing what no node said, a node from saying too much, and versions and hosts from each other."""
    yield once("fleet: the node's own key", COLLECT, "elif not found.signed_by(key):", "elif False:")
    yield once("fleet: a time ahead", COLLECT, "elif found.report.at > latest:", "elif False:")
    yield never("fleet: another network", COLLECT, "report.network != network")
    yield never("fleet: a replay", COLLECT, "known is not None and report.sequence < known.sequence")
    yield once("fleet: one number seen twice", COLLECT, "twice = known is not None and", "twice = False and")
    yield once("fleet: both of one number", COLLECT, " if two_faced.get(node) != found.report.sequence}", "}")
    yield once("fleet: a stale status", COLLECT, "for report in reports if report.at >= fresh_from)", "for report in reports)")
    yield once(
        "fleet: the record of what was seen",
        REGISTER,
        "except FileNotFoundError:\n            return {}",
        "except Exception:\n            return {}",
    )
    yield never("fleet: the key of who enrols", REGISTER, "not found.signed_by(key)")
    yield never("fleet: an enrolled key stays", REGISTER, "self.key(node) is not None")
    yield never("a server that asked to be left alone", RETRY_AFTER, "0 < left <= LONGEST_SECONDS")
    yield once("how long a server is left alone", RETRY_AFTER, "min(error.asked_seconds, LONGEST_SECONDS)", "error.asked_seconds")
    yield once("a time of a clock that was wrong", RETRY_AFTER, "0 < left <= LONGEST_SECONDS", "0 < left")
    yield once("fleet: silence counts against", ASSESS, "against = model.failed + model.silent", "against = model.failed")
    yield once("fleet: served up to the newest status", ASSESS, "sum(settled <= heard for", "sum(settled <= now for")
    yield never(
        "fleet: nodes that were not heard since", ASSESS, "model.failed + model.silent + model.unheard > rule.max_failed * model.tried"
    )
    yield never("fleet: two contents under one id", ASSESS, "model.trees > 1")
    yield once("fleet: a rollback counts against", ASSESS, 'model.state == "failed" or model.reason == "held"', 'model.state == "failed"')
    yield from every("fleet: text on the page", FLEET_PAGE, r"escape\(model\.id\)", "model.id")
    yield once("fleet: no number twice", OUTBOX, "max(state.sequence + 1, int(now.timestamp() * 1000))", "int(now.timestamp() * 1000)")
    yield once("fleet: numbers outlive the store", OUTBOX, "max(state.sequence + 1, int(now.timestamp() * 1000))", "state.sequence + 1")
    yield never("fleet: names of the machine", PUBLIC, "any(name in word.lower() for name in private)")
    yield once("fleet: words that may be the node's own", PUBLIC, "return LEFT_OUT if hidden else word", "return word")
    yield never("fleet: the key's mode", REPORTING, "os.fstat(fd).st_mode & (stat.S_IRWXG | stat.S_IRWXO)")
    yield never("versions: a newer format", FORMAT, "found > known")
    yield once("versions: one step", DATABASE, 'connection.execute("BEGIN IMMEDIATE")', "pass")
    yield never("polling: the cap on what is decoded", CODING, "len(made) > max_bytes")
    yield never("polling: the cap on the size that zstd tells", CODING, "told > max_bytes")
    yield once("polling: the window of zstd", CODING, "max_window_size=_ZSTD_WINDOW", "max_window_size=1 << 27")
    yield never("polling: one whole body", CODING, "not decoder.eof or decoder.unused_data")
    yield never("hosts: the circuit", HEALTH, "host is not None and len(host.silent_for) >= CIRCUIT_BLOBS")
    yield once("hosts: a clock that was ahead", HEALTH, "if 0 < left <= LONGEST_SECONDS:", "if 0 < left:")


def _servers() -> Iterator[Mutation]:
    """Yield what confines servers, above all where they share the machine's network and processes."""
    yield once(
        "bare server: connections",
        CONFINE,
        'attributes = struct.pack("QQQ", 0, _CONNECT_TCP,',
        'attributes = struct.pack("QQQ", 0, _BIND_TCP,',
    )
    yield once("bare server: TCP alone", CONFINE, '(1, _STREAMS), (2, _TCP_PROTOCOLS)), "socketpair"', '(2, _TCP_PROTOCOLS)), "socketpair"')
    yield once(
        "bare server: no other protocol", CONFINE, '(1, _STREAMS), (2, _TCP_PROTOCOLS)), "socketpair"', '(1, _STREAMS)), "socketpair"'
    )
    yield once("bare server: fast open", CONFINE, "_jump(_ANY_BIT, _FASTOPEN, 0, 1)", "_jump(_ANY_BIT, 0, 0, 1)")
    yield once("bare server: sessions", CONFINE, '_jump(_EQUAL, numbers["setsid"], 1, 0)', '_jump(_EQUAL, numbers["setsid"], 2, 0)')
    yield once("bare server: its end with the program", CONFINE, "signal.SIGTERM if bare else signal.SIGKILL", "signal.SIGKILL")
    yield once("bare server: a stranger on its port", ASKER, "            self._refuse_stranger()\n".strip(), "pass")
    yield never(
        "bare server: its disk",
        "reconciler/runtime/server_process.py",
        "self._scratch and (written := sum(_sizes(self._scratch))) > scratch",
    )
    yield without(
        "server: what tells the machine", BOX, 'arguments += ["--dev-bind", "/dev/null", hidden] if Path(hidden).exists() else []'
    )
    yield never("server: pickles", HUB, "kind.name in _PICKLES")
    yield never("server: files cut short", HUB, "end != size - 8 - length")


_SIGNED = "signed_payload(envelope, ROOT_TYPE, {0}, {0}.roles.root, limits=limits)"
_CONFIRMED = {
    "fingerprint": ("(version, fingerprint, roots", "(version, roots"),
    "pinned root": ("fingerprint, roots.pinned, *", "fingerprint, *"),
    "roots": (" *roots.newer,", ""),
    "lock": (" files.lock, files.envelope):", " files.envelope):"),
    "envelope": ("files.lock, files.envelope):", "files.lock):"),
}
_UNSIGNED = "payload = _unverified_payload(envelope, limits)"


def _gpus() -> Iterator[Mutation]:
    """Yield what keeps a test job on the GPU that was chosen, and a model from leaving something behind there."""
    use, nodes, found = (f"reconciler/runtime/{name}.py" for name in ("gpu_use", "device_nodes", "devices"))
    yield once("gpu: a test beside it does not pass", use, "or on_gpu or not expected:", "or on_gpu or True:")
    yield once("gpu: no device for the CPU on purpose", use, "if not server and own.gpu_layers == 0:", "if False:")
    yield once("gpu: one of several", use, "used = found if server or own.split else devices.roomiest(found)", "used = found")
    yield once("gpu: the operator's choice", found, "words = chosen or choice(variables)", "words = None")
    yield once("gpu: the first word that names none ends the list", found, "if one is None or one in taken:", "if one is None:")
    yield once("gpu: a closed list of device files", nodes, "if _NVIDIA.fullmatch(name)", "if name.startswith('nvidia')")
    yield once("gpu: none without a GPU that can compute", nodes, "_nvidia(dev) if nvidia else []", "_nvidia(dev)")
