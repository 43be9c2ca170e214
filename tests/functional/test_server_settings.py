"""The settings of a server as an engine: what they may hold, the version that its command says, and what ``doctor`` says of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reconciler import settings_file
from reconciler.commands import doctor
from reconciler.core.errors import SettingsError
from reconciler.runtime import engines, server_version
from reconciler.sandbox import confine
from reconciler.sandbox.process import Mode
from tests.demand import working
from tests.functional.test_server_engines import PYTHON, SERVE, state, table
from tests.node import Node, tiny

# -- versions ------------------------------------------------------------------------------------------


def versioned(folder: Path, script: str) -> str:
    program = folder / "version"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f'[runtime.vllm]\nargv = ["/bin/true", "{{port}}"]\nversion_argv = ["{program}"]\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("version: 4567 (abcdef12)\nbuilt with cc for x86_64", "4567"), ("vllm 0.33.0+cpu", "0.33.0+cpu"), ("5.0.1\n", "5.0.1"),
        ("transformers version: 5.1.0.dev0", "5.1.0.dev0"), ("nothing here", None), ("v2 b3", None),
    ],
)  # fmt: skip
def test_a_version_is_found_in_what_programs_print(text: str, found: str | None) -> None:
    assert server_version.version_in(text) == found


def test_the_version_that_a_command_says_decides_what_this_node_can_run(node: Node) -> None:
    working("bubblewrap")
    said = versioned(node.folder, "echo version 1.5")
    node.configure(said.replace('["/bin/true", "{port}"]', json.dumps([PYTHON, SERVE, "--model={model}", "--port={port}"])))
    runtime = {"engine": "vllm", "version": ">=1.5"}
    node.publish(node.item("a:v1", tiny("a"), runtime=runtime), node.item("b:v1", tiny("b"), runtime=runtime | {"version": ">=2"}))
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active", "b:v1": "absent"}
    assert state(node, "a:v1")["test"]["engine_version"] == "1.5"


def test_a_version_is_asked_for_once_and_again_when_the_program_changes(tmp_path: Path) -> None:
    chosen = settings_file.decode(versioned(tmp_path, f"echo x >> {tmp_path}/asked; echo 1.5").encode(), tmp_path).engines
    cache = tmp_path / "cache"
    engines.remember_versions(chosen, cache)
    assert engines.installed(chosen, cache)["vllm"] == "1.5"
    server_version._asked.cache_clear()
    assert engines.installed(chosen, cache)["vllm"] == "1.5"
    assert (tmp_path / "asked").read_text() == "x\n"
    versioned(tmp_path, "echo 1.6 of another size")
    assert engines.installed(chosen, cache)["vllm"] == "1.6"


def test_a_reader_that_asks_for_a_version_writes_nothing(tmp_path: Path) -> None:
    chosen = settings_file.decode(versioned(tmp_path, "echo 1.5").encode(), tmp_path).engines
    assert engines.installed(chosen, tmp_path / "cache")["vllm"] == "1.5"
    assert not (tmp_path / "cache").exists()


def test_an_engine_whose_command_says_no_version_is_missing_and_no_model_is_to_blame(node: Node) -> None:
    working("bubblewrap")
    node.configure(versioned(node.folder, "exit 3") + "[runtime.llama-cpp]\n")
    node.publish(node.item("a:v1", tiny("a"), runtime={"engine": "vllm"}), node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "absent", "b:v1": "active"}


# -- settings and doctor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[runtime.vllm]\n", "[runtime.vllm] argv: it is missing", "command"),
        ('[runtime.vllm]\nargv = ["/x"]\nreddy_timeout = "1s"\n', "'runtime.vllm.reddy_timeout'", "ready_timeout"),
        ('[runtime.vllm]\nargv = ["/x"]\nshm = "much"\n', "[runtime.vllm] shm", ""),
        ('[runtime.vllm]\nargv = ["/x"]\nprocesses = 0\n', "runtime.vllm.processes", ""),
        ('[runtime.vllm]\nargv = ["/x", "--port={prot}"]\n', "{prot} stands for nothing; did you mean {port}?", ""),
        ('[runtime.vllm]\nargv = ["/x"]\nbind = ["/"]\n', "[runtime.vllm] bind: '/' is not given", ""),
        ('[runtime.vllm]\nargv = ["/x"]\nbind = ["/var/run/docker.sock"]\n', "[runtime.vllm] bind", ""),
        ('[runtime.vllm]\nargv = ["/x"]\nenv = {"a b" = "c"}\n', "[runtime.vllm] env", ""),
        ('[runtime.vllm]\nargv = ["/x"]\nversion = "1"\nversion_argv = ["/y"]\n', "given twice", ""),
        ('[runtime.vllm]\nargv = ["vllm"]\n', "not an absolute path", ""),
        ('[runtime."Upper Case"]\nargv = ["/x"]\n', "regex", ""),
        ("[runtime]\nvllm = 3\n", "'runtime.vllm'", ""),
        ("[runtime.lama-cpp]\ngpu_layers = 3\n", "'runtime.lama-cpp'", "runtime.llama-cpp"),
    ],
)
def test_a_table_that_means_nothing_is_refused(text: str, said: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_file.decode(text.encode(), Path())
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_bound_folders_are_relative_to_the_settings(tmp_path: Path) -> None:
    chosen = settings_file.decode(b'[runtime.vllm]\nargv = ["/x"]\nbind = ["venv", "/opt/cuda"]\n', tmp_path)
    assert chosen.engines.server("vllm").bind == (str(tmp_path / "venv"), "/opt/cuda")


def test_doctor_says_of_each_server_what_it_found(node: Node) -> None:
    program = node.folder / "serve"
    program.write_text("#!/bin/sh\necho 2.5\n")
    program.chmod(0o755)
    node.configure(
        f'[runtime.good]\nargv = ["{program}", "{{port}}"]\nversion_argv = ["{program}"]\n'
        f'[runtime.silent]\nargv = ["{program}"]\nversion_argv = ["/bin/true"]\n'
        '[runtime.gone]\nargv = ["/nothing/here"]\nbind = ["/nothing/there"]\n'
    )
    node.publish(node.item("a:v1", tiny("a")))
    found = {(one.name, one.level): one.text for one in doctor.examine(node.context, offline=True) if one.name.startswith("server ")}
    assert found[("server good", "ok")] == f"{program} is there and trusted; version 2.5, as its command says it"
    assert found[("server silent", "error")] == "/bin/true printed no version"
    assert found[("server gone", "error")] in {"/nothing/here is not there", "/nothing/there is not there"}


@pytest.mark.parametrize("mode", ["bubblewrap", "landlock"])
def test_doctor_says_in_which_sandbox_servers_are_tested(node: Node, mode: Mode) -> None:
    working(mode)
    node.configure(table("vllm") + f'[smoke]\nsandbox = "{mode}"\n')
    node.publish(node.item("a:v1", tiny("a")))
    found = {one.name: (one.level, one.text) for one in doctor.examine(node.context, offline=True)}
    assert found["sandbox for servers"] == ("ok", f"servers are tested in {mode}")


def test_doctor_says_why_no_server_can_be_tested(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    working("landlock")
    monkeypatch.setattr(confine, "no_tcp_rules", lambda: "this kernel cannot restrict a server's TCP connections: it is old")
    node.configure(table("vllm") + '[smoke]\nsandbox = "landlock"\n')
    node.publish(node.item("a:v1", tiny("a")))
    found = {one.name: (one.level, one.text) for one in doctor.examine(node.context, offline=True)}
    assert found["sandbox for servers"][0] == "error"
    assert "it is old" in found["sandbox for servers"][1]


def test_doctor_names_a_server_that_others_can_change(node: Node) -> None:
    program = node.folder / "serve"
    program.write_text("#!/bin/sh\necho 2.5\n")
    program.chmod(0o777)
    node.configure(f'[runtime.loose]\nargv = ["{program}", "{{port}}"]\n')
    node.publish(node.item("a:v1", tiny("a")))
    found = [one for one in doctor.examine(node.context, offline=True) if one.name == "server loose"]
    assert [one.level for one in found] == ["warning"]
    assert "may be changed by other users" in found[0].text
