"""Settings from environment variables, and which of file, environment and default holds."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from reconciler import environment, settings_file
from reconciler.core.errors import SettingsError
from reconciler.settings import Settings
from tests.node import Node, run

BASE = Path("/etc/node")


def decode(text: str, **variables: str) -> Settings:
    return settings_file.decode(text.encode(), BASE, variables={f"RECONCILE_{name}": value for name, value in variables.items()})


def test_every_key_has_a_variable_of_its_own() -> None:
    paths = [path for path, _ in environment.keys(Settings)]
    names = [environment.variable(path) for path in paths]

    assert len(paths) > 30
    assert len({*names}) == len(names)
    assert "RECONCILE_STORE_PATH" in names
    assert "RECONCILE_RUNTIME_LLAMA_CPP_GPU_LAYERS" in names


@pytest.mark.parametrize("path", [path for path, of in environment.keys(Settings) if environment._is_plain(of)], ids=".".join)
def test_the_default_written_as_a_variable_is_the_default(path: tuple[str, ...]) -> None:
    value = msgspec.to_builtins(Settings())
    for name in path:
        value = value[name]
    text = value if isinstance(value, str) else json.dumps(value)
    given = settings_file.decode(b"", Path(), variables={environment.variable(path): text})

    assert given == settings_file.decode(b"", Path())


def test_a_variable_wins_over_the_file_and_the_file_over_the_default() -> None:
    assert decode("").store.generations == 10
    assert decode("[store]\ngenerations = 3\n").store.generations == 3
    found = decode("[store]\ngenerations = 3\ngrace = '1h'\n", STORE_GENERATIONS="5")
    assert (found.store.generations, found.store.grace) == (5, "1h")


def test_text_is_taken_as_it_is_and_the_rest_as_toml() -> None:
    found = decode(
        "", STORE_PATH='a "b"', DOWNLOAD_ALLOW_HTTP="true", HOOKS_HEALTHY='["sh", "-c", "true"]', RUNTIME_LLAMA_CPP_GPU_LAYERS="-1"
    )
    assert found.store_path == BASE / 'a "b"'
    assert found.download.allow_http is True
    assert found.hooks.healthy == ("sh", "-c", "true")
    assert found.runtime.llama_cpp.gpu_layers == -1


@pytest.mark.parametrize(
    ("name", "value", "said", "hint"),
    [
        ("STORE_PAHT", "x", "RECONCILE_STORE_PAHT names no key", "did you mean RECONCILE_STORE_PATH?"),
        ("DOWNLOAD_CONNECTIONS", "many", "RECONCILE_DOWNLOAD_CONNECTIONS is not a value", "such as 8"),
        ("DOWNLOAD_CONNECTIONS", "17", "RECONCILE_DOWNLOAD_CONNECTIONS", "a whole number from 1 to 16"),
        ("DOWNLOAD_ALLOW_HTTP", "maybe", "RECONCILE_DOWNLOAD_ALLOW_HTTP is not a value", "such as true"),
        ("HOOKS_HEALTHY", "sh -c true", "RECONCILE_HOOKS_HEALTHY is not a value", '["a", "b"]'),
        ("HOOKS_HEALTHY", "3", "hooks.healthy", "a list of texts"),
        ("SMOKE_SANDBOX", "none", "smoke.sandbox", "auto, bubblewrap or landlock"),
        ("STORE_GRACE", "24", "[store] grace: '24' has no unit", ""),
        ("HOOKS_HEALTHY", '["a"]\nactivated = ["b"]', "hooks.activated", ""),
    ],
)
def test_a_variable_that_means_nothing_is_an_error_that_says_what_may_be(name: str, value: str, said: str, hint: str) -> None:
    if "\n" in value:  # nothing can be smuggled in behind a value
        assert decode("", **{name: value}).hooks.activated == ()
        return
    with pytest.raises(SettingsError) as refused:
        decode("", **{name: value})

    assert said in refused.value.message
    assert hint in refused.value.hint


def test_variables_of_others_are_left_alone() -> None:
    assert decode("", CONFIG="x", PASSPHRASE_FILE="x", FUZZ="5", STORES="x") == decode("")


@pytest.mark.parametrize(
    "text", ["[store]\ngrace = '24'\n", "[store]\nreserve = '10'\n", "[agent]\ninterval = '300'\n", "[download]\nlimit = '1.5'\n"]
)
def test_a_bare_number_is_refused_where_a_unit_belongs(text: str) -> None:
    with pytest.raises(SettingsError, match="has no unit; write it like"):
        decode(text)


@pytest.mark.parametrize("text", ["[store]\ngrace = '0'\n", "[store]\nreserve = '0'\n", "[download]\nlimit = '0'\n"])
def test_nothing_needs_no_unit(text: str) -> None:
    decode(text)


# -- the commands


def test_config_show_names_the_origin_of_each_value(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILE_STORE_GENERATIONS", "4")
    found = {one["key"]: one for one in run("config", "show", "--json", "--config", str(node.folder / "reconcile.toml")).json["settings"]}

    assert (found["store.generations"]["value"], found["store.generations"]["origin"]) == (4, "environment")
    assert found["store.generations"]["where"] == "RECONCILE_STORE_GENERATIONS"
    assert (found["store.reserve"]["value"], found["store.reserve"]["origin"]) == ("1MiB", "file")
    assert (found["store.grace"]["value"], found["store.grace"]["origin"]) == ("24h", "default")


def test_what_config_show_prints_are_settings_that_say_the_same(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILE_STORE_GENERATIONS", "4")
    monkeypatch.setenv("RECONCILE_HOOKS_HEALTHY", '["sh", "-c", "echo \\"#\\""]')
    shown = run("config", "show", "--config", str(node.folder / "reconcile.toml")).out
    monkeypatch.undo()

    again = settings_file.decode(shown.encode(), node.folder)

    assert (again.store.generations, again.store.reserve) == (4, "1MiB")
    assert again.hooks.healthy == ("sh", "-c", 'echo "#"')


def test_config_show_prints_the_tables_of_servers(node: Node) -> None:
    table = {"kind": "llama-server", "name": "main", "path": "serve/models.ini", "options": {"c": 1, "tiny": {"ngl": 2}}, "drain": "9s"}
    node.configure("[[serve]]\n" + "".join(f"{key} = {value!r}\n" for key, value in table.items() if key != "options"))
    with (node.folder / "reconcile.toml").open("a") as file:
        file.write("options = { c = 1, tiny = { ngl = 2 } }\n[agent]\ninterval = '9m'\n")
    shown = run("config", "show", "--config", str(node.folder / "reconcile.toml")).out
    again = settings_file.decode(shown.encode(), node.folder)

    assert again == settings_file.decode((node.folder / "reconcile.toml").read_bytes(), node.folder)
    assert again.serve[0].options == table["options"]


def test_config_show_shows_no_secret(node: Node) -> None:
    node.configure('\n[download]\nproxy = "http://ann:hunter2@127.0.0.1:3128"\nfallback = ["https://h.example.org/{hex}?t=hunter2"]\n')
    for extra in ([], ["--json"]):
        ran = run("config", "show", "--config", str(node.folder / "reconcile.toml"), *extra)
        assert ran.code == 0
        assert "hunter2" not in ran.out + ran.err
        assert "127.0.0.1:3128" in ran.out


def test_config_check_names_what_is_missing(node: Node) -> None:
    (node.folder / "published.json").write_text("{}")
    config = str(node.folder / "reconcile.toml")
    assert run("config", "check", "--config", config).code == 0
    node.configure('\n[hooks]\nhealthy = ["./not-there.sh"]\n\n[download]\nca_file = "no.pem"\n')
    (node.folder / "root.json").unlink()

    ran = run("config", "check", "--config", config, "--json")

    assert ran.code == 1
    assert [one["key"] for one in ran.json["findings"]] == ["[network] root", "[download] ca_file", "[hooks] healthy"]
    assert all(one["hint"] for one in ran.json["findings"])


def test_a_path_of_the_environment_was_named_by_the_caller(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are found may name nothing that others can change; what the caller says, in a variable too, is the caller's affair."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    monkeypatch.chdir(node.folder)
    node.configure(f'path = "{shared}/store"\n')
    assert "untrusted-file" in run("incidents").err
    node.configure("")
    monkeypatch.setenv("RECONCILE_STORE_PATH", f"{shared}/store")

    assert run("incidents").code == 0


def test_servers_engines_and_credentials_are_shown_as_settings_too(node: Node) -> None:
    node.configure(
        '\n[[serve]]\nkind = "command"\nname = "main"\nreload = ["/bin/true"]\n'
        '\n[download.credentials."h.example.org"]\ntoken_env = "TOKEN"\n'
        '\n[runtime.vllm]\nargv = ["/bin/true", "{folder}", "{port}"]\nenv = { SECRET = "hush" }\n'
    )
    shown = run("config", "show", "--config", str(node.folder / "reconcile.toml")).out
    again = settings_file.decode(shown.encode(), node.folder)

    assert "hush" not in shown
    assert [server.name for server in again.serve] == ["main"]
    assert again.runtime.server("vllm").argv == ("/bin/true", "{folder}", "{port}")
    assert again.download.credentials["h.example.org"].token_env == "TOKEN"
