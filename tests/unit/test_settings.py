"""Settings: every key has a default, and nobody finds out at night that one was misspelt."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler import settings_file
from reconciler.core.errors import SettingsError
from reconciler.settings import Settings

BASE = Path("/etc/node")


def decode(text: str) -> Settings:
    return settings_file.decode(text.encode(), BASE)


def test_nothing_has_to_be_said() -> None:
    found = decode("")

    assert found.store_path == BASE / "store"
    assert found.archive_path == BASE / "store/archive"
    policy = found.policy
    assert (policy.reserve_bytes, policy.grace_seconds, policy.generations) == (1 << 30, 86400.0, 10)
    assert (policy.quarantine_bytes, policy.scrub_seconds, policy.fallback) == (10 << 30, 30 * 86400.0, ())


def test_paths_are_relative_to_the_file() -> None:
    found = decode('[store]\npath = "s"\narchive = "/mnt/cold"\n')

    assert (found.store_path, found.archive_path) == (BASE / "s", Path("/mnt/cold"))
    assert decode('[store]\npath = "~/s"\n').store_path == Path("~/s").expanduser()


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[stroe]\n", "'stroe'", "'store'"),
        ("[store]\ngrcae = '1h'\n", "'store.grcae'", "'store.grace'"),
        ("[runtime.llama_cpp]\n", "'runtime.llama_cpp'", "'runtime.llama-cpp'"),
        ("[runtime.llama-cpp]\nlayers = 1\n", "'runtime.llama-cpp.layers'", "gpu_layers"),
        ("[smoke]\nskip = true\n", "'smoke.skip'", "known here: sandbox, timeout"),
        ("base = '/'\n", "'base'", "known here"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(text: str, said: str, hint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        decode(text)

    assert said in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[store]\nreserve = '10 gigs'\n", "[store] reserve"), ("[store]\ngrace = 'soon'\n", "[store] grace"),
        ("[store]\ngenerations = 0\n", "store.generations"), ("[store]\ngenerations = '3'\n", "store.generations"),
        ("[download]\nconnections = 17\n", "download.connections"), ("[download]\nlimit = -1\n", "download.limit"),
        ("[download]\nproxy = 'nonsense'\n", "[download] proxy"), ("[download]\nproxy = 'socks5://h:1'\n", "[download] proxy"),
        ("[download]\nproxy = 'http://h:99999'\n", "[download] proxy"), ("[download]\nproxy = 'http://h'\n", "[download] proxy"),
        ("[download]\nproxy = 'http://h:1/x'\n", "[download] proxy"), ("[runtime.llama-cpp]\nthreads = 513\n", "llama-cpp.threads"),
        ("[agent]\ninterval = '5 min'\n", "[agent] interval"), ("[smoke]\nsandbox = 'none'\n", "smoke.sandbox"),
        ("[hooks]\nhealthy = 'curl x'\n", "hooks.healthy"), ("[download]\nfallback = ['https://m.example.org/fixed']\n", "template"),
        ("[download]\nfallback = ['ftp://m.example.org/{hex}']\n", "scheme"), ("store = 1\n", "store"), ("[store\n", "not TOML"),
        ("[store]\npath = ''\n", "[store] path"), ("[network]\nroot = ''\n", "[network] root"),
        ("[network]\nlockfile = ''\n", "[network] lockfile"), ("[network]\nlockfile = 'snapshot.json'\n", "the envelope beside"),
        ("[network]\nlockfile = 'x/../root.json'\n", "[network] lockfile: /etc/node/root.json is also [network] root"),
        ("[network]\nsnapshot = 'models.lock'\n", "[network] snapshot"), ("[network]\nroot = 'snapshot.json'\n", "the envelope beside"),
        ("[store]\npath = 'models.lock'\n", "[store] path"), ("[store]\narchive = 'store'\n", "[store] archive"),
        ("[store]\npath = '~nobody-of-this-name/s'\n", "[store] path"), ("[download]\ntimeout = '0s'\n", "[download] timeout"),
        ("[smoke]\ntimeout = '0'\n", "[smoke] timeout"), ("[hooks]\nhealthy_timeout = '0ms'\n", "[hooks] healthy_timeout"),
        ("[agent]\ninterval = '0s'\n", "[agent] interval"), ("[runtime.openai]\nready_timeout = '0s'\n", "[runtime.openai] ready_timeout"),
        ("[network]\nsnapshot = 'ftp://h.example.org/s'\n", "[network] snapshot"),
        ("[network]\nroot_updates = 'HTTPS://h.example.org/{version}'\n", "[network] root_updates"),
        ("[network]\nroot_updates = 'https://h.example.org/root.json'\n", "{version}"),
        ("[download]\nallowed_hosts = ['https://h.example.org']\n", "[download] allowed_hosts"),
        ("[report]\nto = 'ftp://h.example.org/s'\nkey = 'k'\n[node]\nid = 'n'\n", "[report] to"),
        ("[report]\nto = 'statuses'\nkey = 'k'\n", "[report] to: statuses name this node by [node] id"),
        ("[report]\nto = 'statuses'\nkey = 'k'\n[node]\nid = 'a/b'\n", "[report] to: statuses name this node by [node] id"),
        ("[report]\nto = 'statuses'\n[node]\nid = 'n'\n", "[report] key is empty"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_by_its_key(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        decode(text)

    assert said in refused.value.message


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(SettingsError):
        settings_file.decode(b"\xff\xfe", BASE)


def test_there_is_no_key_that_turns_a_check_off() -> None:
    words = {"insecure", "skip", "verify", "trust", "force", "unsafe", "none"}
    tables = [getattr(Settings(), name) for name in Settings.__struct_fields__]
    keys = {key for table in tables for key in getattr(table, "__struct_fields__", ())}

    assert len(keys) > 30
    assert not {key for key in keys if words & set(key.split("_"))}


def test_a_refused_proxy_does_not_show_its_password() -> None:
    with pytest.raises(SettingsError) as refused:
        decode("[download]\nproxy = 'https://ann:hunter2@h:1'\n")
    assert "hunter2" not in refused.value.message + refused.value.hint


@pytest.mark.parametrize("proxy", ["", "http://h.example.org:3128", "http://ann:pass@127.0.0.1:1/", "http://[::1]:8080"])
def test_a_proxy_is_taken(proxy: str) -> None:
    assert decode(f"[download]\nproxy = '{proxy}'\n").download.proxy == proxy


@pytest.mark.parametrize("text", ['[store]\npath = "\\u0000"', '[network]\nlockfile = "a\\u0000b"', '[hooks]\nhealthy = ["sh", "\\u0000"]'])
def test_a_nul_in_a_value_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="NUL character"):
        settings_file.decode(text.encode(), Path("/"))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("[network] root", '[network]\nroot = "~nobody-here/x"\n'),
        ("[network] snapshot", '[network]\nsnapshot = "~nobody-here/x"\n'),
        ("[network] root_updates", '[network]\nroot_updates = "~nobody-here/{version}.json"\n'),
        ("[download] ca_file", '[download]\nca_file = "~nobody-here/x"\n'),
        ("[download] netrc", '[download]\nnetrc = "~nobody-here/x"\n'),
        ("[store] path", '[store]\npath = "~nobody-here/x"\n'),
        ("[hooks] healthy", '[hooks]\nhealthy = ["~nobody-here/x"]\n'),
    ],
)
def test_a_home_that_is_not_known_is_refused_with_its_key(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings_file.decode(text.encode(), tmp_path)
    assert f"{key}: '~nobody-here/" in refused.value.message
