"""
Engines that are servers, each bound to a name by [runtime.NAME]: started in the sandbox by the real command line, asked, and judged.

Longer than 400 lines because every test needs the same server and settings, which stand at the top.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from reconciler import settings_file
from reconciler.runtime import blame, engines
from reconciler.sandbox import machine_view
from tests import hub_folders, jobs
from tests.demand import working
from tests.network import Document
from tests.node import Node, Ran, tiny

TOP = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
SERVE = str(TOP / "tests/children/serve.py")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def table(engine: str, *more: str, model: str = "--model={model}", extra: str = 'ready_timeout = "20s"\n') -> str:
    """Return the settings of an engine whose server is the one in ``tests/children``, with *more* options."""
    argv = [PYTHON, SERVE, model, "--name={name}", "--port={port}", *more]
    return f"[runtime.{engine}]\nargv = {json.dumps(argv)}\n{extra}\n"


def hub_item(node: Node, name: str, folder: Path, *, engine: str = "vllm", entrypoint: str = "config.json", **changes: Any) -> Document:
    """Return a model that is the whole of *folder*, which the node's server has."""
    artifacts = []
    for path in sorted(folder.iterdir()):
        one = node.item(name, path.read_bytes(), path=path.name)
        artifacts += one["artifacts"]
    runtime = {"engine": engine}
    return node.network.model(name) | {"artifacts": artifacts, "entrypoint": entrypoint, "runtime": runtime, "smoke": SMOKE} | changes


SMOKE = {"prompt": "Hello", "max_tokens": 4, "timeout": "30s"}


def state(node: Node, model: str) -> Document:
    found: Document = node.run("status", model, "--json").json["models"][0]
    return found


def shown(node: Node, model: str) -> str:
    ran: Ran = node.run("status", model)
    return ran.out


@pytest.fixture
def wrapped(node: Node) -> Node:
    working("bubblewrap")
    return node


# -- several servers, by the names that the network signs ----------------------------------------------


def test_several_servers_serve_side_by_side_each_under_the_name_that_the_network_signs(wrapped: Node, tmp_path: Path) -> None:
    node = wrapped
    node.configure(table("vllm", "--folder={folder}", model="--context={context}") + table("llama-server"))
    folder = hub_folders.folder(tmp_path / "hub")
    node.publish(
        hub_item(node, "hub:v1", folder),
        hub_item(node, "weights:v1", folder, entrypoint="model.safetensors"),
        node.item("gguf:v1", tiny("g"), runtime={"engine": "llama-server"}),
        node.item("none:v1", tiny("n"), runtime={"engine": "sglang"}),
    )

    ran = node.run("apply")

    assert ran.code == 0, ran
    assert node.states() == {"hub:v1": "active", "weights:v1": "active", "gguf:v1": "active", "none:v1": "absent"}
    assert "engine sglang is not installed" in state(node, "none:v1")["reason"]
    report = state(node, "hub:v1")["test"]
    assert (report["engine"], report["engine_version"], report["sandbox"], report["device"]) == ("vllm", "0", "bubblewrap", "cpu")
    assert report["text"] == "hub says: Hello"
    assert report["exercised"] == ["config.json", "model.safetensors"]  # which the server opened, and read no tokenizer


def test_placeholders_are_filled_in_once_and_nowhere_else(tmp_path: Path) -> None:
    working("bubblewrap")
    tell = "' '.join(__import__('sys').argv[1:])"
    text = table("vllm", "--folder={folder}", "--context={context}", f"--tell={tell}")
    report = jobs.make_tester(tmp_path, text).test(jobs.job(tmp_path, tiny("a"), engine="vllm"))
    tree = (tmp_path / "tree").resolve()
    assert report.verdict == "passed", report
    assert re.sub("--port=[0-9]+", "--port=N", report.text).startswith(
        f"--model={tree}/model.gguf --name=m --port=N --folder={tree} --context=256 "
    )


def test_a_server_that_lists_no_model_is_asked_for_the_folder_that_its_command_names(tmp_path: Path) -> None:
    working("bubblewrap")
    tree = hub_folders.folder(tmp_path / "tree")
    argv = [PYTHON, SERVE, "--folder", "{folder}", "--port", "{port}", "--lazy"]
    tester = jobs.make_tester(tmp_path, f"[runtime.transformers]\nargv = {json.dumps(argv)}\n")
    report = tester.test(jobs.folder_job(tree, engine="transformers"))
    assert (report.verdict, report.text) == ("passed", f"{tree.resolve()} says: Hello")


# -- whose fault it is ---------------------------------------------------------------------------------


def test_a_typing_error_in_a_command_is_this_nodes_and_status_shows_the_servers_own_words(wrapped: Node) -> None:
    node = wrapped
    node.configure(table("vllm", "--prot=1"))
    node.publish(node.item("a:v1", tiny("a"), runtime={"engine": "vllm"}))

    assert node.run("apply").code == 0

    found = state(node, "a:v1")
    assert (found["state"], found["attempts"]) == ("pending", 0)
    said = "not-tested: server did not start: serve: error: unrecognized arguments: --prot=1 (it ended with 2)"
    assert found["reason"] == said
    assert "usage: serve" in found["test"]["stderr"]
    assert "serve: error: unrecognized arguments: --prot=1" in shown(node, "a:v1").split("the engine's last lines")[1]
    assert node.records() == []
    assert "smoke-failed" not in node.kinds()


def test_it_is_the_models_only_once_the_same_command_line_has_served_another_model(wrapped: Node) -> None:
    node = wrapped
    disliked = tiny("bad")
    mark = "no such mark"
    node.configure(table("vllm", f"--dislike={mark}"))
    bad = node.item("bad:v1", disliked + mark.encode(), runtime={"engine": "vllm"})
    node.publish(bad)
    assert node.run("apply").code == 0
    assert state(node, "bad:v1")["state"] == "pending"

    node.publish(bad, node.item("good:v1", tiny("good"), runtime={"engine": "vllm"}))
    node.run("apply")
    ran = node.run("apply")

    assert ran.code == 3, ran
    assert node.states() == {"bad:v1": "failed", "good:v1": "active"}
    error = state(node, "bad:v1")["last_error"]
    assert "server did not start: cannot load it: bad.gguf (it ended with 1)" in error
    assert "the same command line has served another model here" in error
    assert "cannot load it: bad.gguf" in state(node, "bad:v1")["test"]["stderr"]


def test_another_command_line_or_version_must_prove_itself_anew(wrapped: Node) -> None:
    node = wrapped
    mark = "no such mark"
    good = node.item("good:v1", tiny("good"), runtime={"engine": "vllm"})
    bad = node.item("bad:v1", tiny("bad") + mark.encode(), runtime={"engine": "vllm"})
    node.configure(table("vllm", f"--dislike={mark}"))
    node.publish(good)
    assert node.run("apply").code == 0
    node.configure(table("vllm", f"--dislike={mark}", "--delay=0"))
    node.publish(good, bad)

    node.run("apply", "--only", "bad:v1")

    assert state(node, "bad:v1")["state"] == "pending"


def test_a_model_proves_nothing_against_itself(wrapped: Node, tmp_path: Path) -> None:
    """A server that served this very content, and now does not start, is broken; the model is what it was."""
    node = wrapped
    present = tmp_path / "library/present"
    present.parent.mkdir()
    present.touch()
    node.configure(table("vllm", f"--begin=open({str(present)!r})", extra=f"bind = [{json.dumps(str(present.parent))}]\n"))
    item = node.item("a:v1", tiny("a"), runtime={"engine": "vllm"})
    node.publish(item | {"smoke": SMOKE})
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active"}, shown(node, "a:v1")
    present.unlink()
    node.publish(item | {"smoke": SMOKE | {"prompt": "Once more"}})

    assert node.run("apply").code == 0

    found = state(node, "a:v1")
    assert (found["state"], found["attempts"]) == ("active", 0)
    assert found["test"]["verdict"] == "unable"
    assert found["test"]["reason"].startswith("server did not start: FileNotFoundError: ")


def test_a_server_that_says_that_the_file_is_bad_is_believed_at_once(wrapped: Node) -> None:
    node = wrapped
    node.configure(table("vllm", "--dislike=no such mark", "--complaint=ValueError: unknown model architecture 'x'"))
    node.publish(node.item("bad:v1", tiny("bad") + b"no such mark", runtime={"engine": "vllm"}))

    assert node.run("apply").code == 3

    assert state(node, "bad:v1")["state"] == "failed"
    assert "the server says that the file is bad: ValueError: unknown model architecture 'x'" in state(node, "bad:v1")["last_error"]


def test_an_error_that_a_server_answers_is_judged_in_the_same_way(wrapped: Node) -> None:
    node = wrapped
    node.configure(table("vllm", "--refuse=500"))
    node.publish(node.item("a:v1", tiny("a"), runtime={"engine": "vllm"}))
    assert node.run("apply").code == 0
    found = state(node, "a:v1")
    assert found["state"] == "pending"
    assert 'the server answered /v1/completions with 500: {"error": {"message": "this is what I say"}}' in found["reason"]


def test_a_failed_test_says_what_really_happened(wrapped: Node) -> None:
    node = wrapped
    node.configure(table("vllm", "--begin=print('a line of mine', file=__import__('sys').stderr)"))
    item = node.item("a:v1", tiny("a"), runtime={"engine": "vllm"})
    node.publish(item | {"smoke": SMOKE | {"expect": {"text": "Paris"}}})

    assert node.run("apply").code == 3

    report = state(node, "a:v1")["test"]
    assert (report["verdict"], report["tokens"], report["text"], report["device"]) == ("bad", 4, "a says: Hello", "cpu")
    assert report["load_seconds"] > 0
    assert report["run_seconds"] > 0
    assert "a line of mine" in report["stderr"]
    assert node.records()[0]["report"]["stderr"] == report["stderr"]


def test_a_passed_test_keeps_no_output(wrapped: Node) -> None:
    node = wrapped
    node.configure(table("vllm", "--begin=print('a line of mine', file=__import__('sys').stderr)"))
    node.publish(node.item("a:v1", tiny("a"), runtime={"engine": "vllm"}))
    assert node.run("apply").code == 0
    assert "stderr" not in state(node, "a:v1")["test"]


def test_a_test_that_could_not_be_made_leaves_the_last_one_that_was(wrapped: Node) -> None:
    node = wrapped
    node.configure(table("vllm"))
    node.publish(node.item("a:v1", tiny("a"), runtime={"engine": "vllm"}))
    assert node.run("apply").code == 0
    before = state(node, "a:v1")["test"]
    node.configure(table("vllm", "--prot=1", extra='version = "2"\n'))
    assert node.run("apply").code == 0
    assert state(node, "a:v1")["test"]["verdict"] == "unable"
    assert node.states() == {"a:v1": "active"}
    node.configure(table("vllm"))
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active"}
    assert before["verdict"] == "passed"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ("usage: x\nx: error: unrecognized arguments: --prot\n", "x: error: unrecognized arguments: --prot"),
        ("phase: starting the server\nTraceback\nValueError: no\n  at exit\n", "ValueError: no"),
        ("╭─ Error ─────╮\n│ No such option: --prot │\n╰────────╯\n", "No such option: --prot"),
        ("(Worker pid=35) ERROR 11-30 06:50:46 [multiproc_executor.py:953] OSError: denied\n(W pid=3) INFO bye\n", "OSError: denied"),
        ("Model metadata: {'tokenizer.unknown_token_id': '0'}\nERROR:    [Errno -3] no name\nINFO:     bye\n", "[Errno -3] no name"),
        ("KeyError: 'x'\nRuntimeError: Engine core initialization failed. See root cause above.\n", "KeyError: 'x'"),
        (
            "Error: No such option '--prot'.\nOptions:\n  --strict  Refuse unknown fields\nDid you mean --port?\n",
            "Error: No such option '--prot'.",
        ),
        ("phase: starting the server\n", ""),
        ("loading\n", "loading"),
        ("\x1b[31mERROR\x1b[0m it is red\n", "\ufffd[31mERROR\ufffd[0m it is red"),
    ],
)
def test_the_last_words_are_the_last_that_tell_of_an_error(errors: str, expected: str) -> None:
    assert blame.last_words(errors) == expected


def test_a_server_that_was_hindered_is_never_the_models_fault() -> None:
    assert blame.verdict("hindered", "it was killed by signal 9", "unknown model architecture", proven=True)[0] == "unable"


def test_what_is_kept_of_a_servers_words_is_bounded_and_harmless() -> None:
    kept = blame.kept("\x1b]0;title\x07" + "é" * 100_000 + "\nlast")
    assert len(kept.encode()) <= 65_536
    assert kept.endswith("\nlast")
    assert "\x1b" not in kept


# -- folders in the layout of the hub ------------------------------------------------------------------

_PICKLE = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93."
_WHOLE = hub_folders.safetensors()

DAMAGED = {
    "a-pickle": ({"pytorch_model__bin": _PICKLE}, "pytorch_model.bin is a Python pickle"),
    "a-pickle-by-another-name": ({"vocab__txt": _PICKLE}, "vocab.txt is a Python pickle"),
    "a-file-cut-short": ({"model__safetensors": _WHOLE[:-3]}, "model.safetensors is cut short or damaged"),
    "a-file-cut-in-its-header": ({"model__safetensors": _WHOLE[:20]}, "model.safetensors is no safetensors file, or is cut short"),
    "no-safetensors-at-all": ({"model__safetensors": b"<html>not found</html>"}, "model.safetensors is no safetensors file"),
    "a-shape-that-does-not-fit": ({"model__safetensors": hub_folders.safetensors(shape=[9])}, "has no sound shape and offsets"),
    "a-shard-that-is-missing": (
        {"model__safetensors__index__json": b'{"weight_map": {"w": "model-00002-of-00002.safetensors"}}'},
        "the model has no file 'model-00002-of-00002.safetensors', which model.safetensors.index.json names",
    ),
    "a-configuration-that-is-none": ({"config__json": b"[]"}, "config.json does not hold a JSON object"),
}


@pytest.mark.parametrize(("files", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_folder_that_is_not_sound_fails_with_the_file_named_before_a_server_sees_it(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    working("bubblewrap")
    tree = hub_folders.folder(tmp_path / "tree", **files)
    tester = jobs.make_tester(tmp_path, '[runtime.vllm]\nargv = ["/bin/false"]\n')
    report = tester.test(jobs.folder_job(tree, engine="vllm"))
    assert report.verdict == "bad"
    assert said in report.reason


# -- what a server gets of this machine, and what it does not ------------------------------------------


def told(folder: Path, expression: str, *, mode: str = "bubblewrap", extra: str = "", begin: str = "") -> str:
    """Return what a server in the sandbox answers with, which is the value of *expression* there."""
    more = (f"--tell={expression}", *([f"--begin={begin}"] if begin else []))
    tester = jobs.make_tester(folder, table("vllm", *more, extra=extra) + f'[smoke]\nsandbox = "{mode}"\n')
    report = tester.test(jobs.job(folder, tiny("a"), engine="vllm"))
    assert report.verdict == "passed", (report.reason, report.stderr)
    return report.text


def test_a_server_gets_the_room_that_its_settings_give(tmp_path: Path) -> None:
    working("bubblewrap")
    extra = 'shm = "96MiB"\nfile_size = "80MiB"\n'
    sizes = "[__import__('os').statvfs(place).f_blocks * 4096 >> 20 for place in ('/dev/shm', '/scratch')]"
    assert told(tmp_path, sizes, extra=extra) == "[96, 80]"
    write = "open('/dev/shm/x', 'wb').write(bytes(90 << 20)) >> 20"
    assert told(tmp_path, write, extra=extra) == "90"
    assert "No space left" in told(tmp_path, "open('/scratch/x', 'wb').write(bytes(90 << 20))", extra=extra)


def test_the_default_room_is_what_servers_need(tmp_path: Path) -> None:
    working("bubblewrap")
    write = "open('/dev/shm/x', 'wb').write(bytes(200 << 20)) + open('/scratch/x', 'wb').write(bytes(200 << 20)) >> 20"
    assert told(tmp_path, write) == "400"


def test_a_server_that_takes_more_memory_than_it_may_is_ended_and_says_so(tmp_path: Path) -> None:
    working("bubblewrap")
    begin = "global kept; kept = b'x' * (600 << 20); __import__('time').sleep(30)"
    tester = jobs.make_tester(tmp_path, table("vllm", f"--begin={begin}", extra='memory = "300MiB"\n'))
    report = tester.test(jobs.job(tmp_path, tiny("a"), engine="vllm"))
    assert report.verdict == "unable"
    assert "emory" in report.reason


def test_a_server_that_starts_more_processes_than_it_may_is_ended_and_says_so(tmp_path: Path) -> None:
    working("bubblewrap")
    begin = "import subprocess, time; kept = [subprocess.Popen(['/bin/sleep', '60']) for _ in range(20)]; time.sleep(20)"
    tester = jobs.make_tester(tmp_path, table("vllm", f"--begin={begin}", extra="processes = 8\n"))
    report = tester.test(jobs.job(tmp_path, tiny("a"), engine="vllm"))
    assert report.verdict == "unable"
    assert "processes" in report.reason


def test_a_server_finds_names_for_itself_and_its_loopback_and_no_other(tmp_path: Path) -> None:
    working("bubblewrap")
    names = "[__import__('socket').gethostbyname(n) for n in ('localhost', __import__('socket').gethostname())]"
    assert told(tmp_path, names) == "['127.0.0.1', '127.0.0.1']"
    assert told(tmp_path, "__import__('pwd').getpwuid(__import__('os').getuid()).pw_name") == "sandbox"
    assert told(tmp_path, "__import__('socket').gethostbyname('example.org')").startswith("gaierror: ")


def test_a_server_learns_of_the_processors_and_nothing_that_tells_this_machine_from_another(tmp_path: Path) -> None:
    working("bubblewrap")
    count = "open('/sys/devices/system/cpu/online').read().strip() + ' ' + str('model name' in open('/proc/cpuinfo').read())"
    assert told(tmp_path, count) == f"{Path('/sys/devices/system/cpu/online').read_text().strip()} True"
    listed = "[sorted(__import__('os').listdir(p)) for p in ('/sys', '/sys/devices', '/sys/devices/system', '/etc')]"
    sys_, devices, system, etc = eval(told(tmp_path, listed))
    assert (sys_, devices, system) == (
        ["devices"],
        ["system"],
        sorted({"cpu", "node"} & {p.name for p in Path("/sys/devices/system").iterdir()}),
    )
    assert set(etc) <= {"alternatives", "group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd"}
    secrets = [name for name in machine_view.HIDDEN if readable(name)]
    assert {"/proc/cmdline", "/proc/sys/kernel/random/boot_id", "/proc/partitions"} <= set(secrets)
    assert eval(told(tmp_path, f"[open(name).read() for name in {secrets}]")) == [""] * len(secrets)
    lines = "[line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]]"
    assert told(tmp_path, lines) == "['lo']"
    assert told(tmp_path, "__import__('socket').if_nameindex()") == "[(1, 'lo')]"


def readable(name: str) -> bool:
    try:
        return bool(Path(name).read_bytes())
    except OSError:
        return False


def test_a_server_has_its_settings_environment_and_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working("bubblewrap")
    monkeypatch.setenv("SECRET", "secret")
    found = told(
        tmp_path, "__import__('os').environ.get('CHOSEN'), __import__('os').environ.get('SECRET')", extra='env = {CHOSEN = "yes"}\n'
    )
    assert found == "('yes', None)"


def test_a_server_reads_a_folder_that_is_bound_and_cannot_write_it(tmp_path: Path) -> None:
    working("bubblewrap")
    (tmp_path / "library").mkdir()
    (tmp_path / "library/data").write_text("here")
    bound = f"bind = [{json.dumps(str(tmp_path / 'library'))}]\n"
    assert told(tmp_path, f"open('{tmp_path}/library/data').read()", extra=bound) == "here"
    assert "Read-only" in told(tmp_path, f"open('{tmp_path}/library/data', 'w')", extra=bound)
    assert "FileNotFoundError" in told(tmp_path, f"open('{tmp_path}/library/data').read()")


def test_the_python_of_a_virtual_environment_comes_with_it(tmp_path: Path) -> None:
    base = tmp_path / "base/bin"
    base.mkdir(parents=True)
    (base / "python3").touch()
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/serve").touch()
    (tmp_path / "venv/pyvenv.cfg").write_text(f"home = {base}\nversion = 3.11.7\n")
    chosen = settings_file.decode(f'[runtime.vllm]\nargv = ["{tmp_path}/venv/bin/serve"]\n'.encode(), tmp_path)
    assert engines.OpenAI("vllm").folders(chosen.engines) == (tmp_path / "venv", tmp_path / "base")


# -- without namespaces --------------------------------------------------------------------------------


def test_a_server_is_tested_under_landlock_where_the_kernel_restricts_tcp(node: Node) -> None:
    working("landlock")
    node.configure(table("vllm") + '[smoke]\nsandbox = "landlock"\n')
    node.publish(node.item("a:v1", tiny("a"), runtime={"engine": "vllm"}))
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active"}, shown(node, "a:v1")
    assert state(node, "a:v1")["test"]["sandbox"] == "landlock"
