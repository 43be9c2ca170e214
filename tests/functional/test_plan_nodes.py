"""A change that a pull request brings, and what it does to nodes that profiles describe: without a store, an engine or a network."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from reconciler.commands import profiles
from reconciler.core import rollout
from reconciler.core.errors import SettingsError
from reconciler.report import markdown
from tests.checkout import GIB, GPU, Repository
from tests.network import Network
from tests.node import Node


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


# -- what fits


def test_each_node_is_planned_for_by_what_its_profile_says(repository: Repository) -> None:
    repository.write(repository.model("a:v1"), repository.model("big:v1", 40 * GIB, gpu_memory=20 * GIB))

    gpu, cpu = repository.plan("--json").json["nodes"]

    assert {one["id"]: one["op"] for one in gpu["plan"]["models"]} == {"a:v1": "install", "big:v1": "install"}
    assert gpu["download_bytes"] == 41 * GIB
    assert {one["id"]: one["op"] for one in cpu["plan"]["models"]} == {"a:v1": "install", "big:v1": "reject"}
    assert [one["id"] for one in cpu["rejected"]] == ["big:v1"]
    assert "20.0 GiB of GPU memory" in cpu["rejected"][0]["reason"]


def test_nothing_is_written_and_no_store_is_made(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"))
    before = sorted(repository.folder.rglob("[!.]*"))
    for words in (["--json"], [], ["--format", "markdown", "--against", "main"]):
        assert repository.plan(*words).code == 0
    assert sorted(repository.folder.rglob("[!.]*")) == before
    assert not (repository.folder / "store").exists()


def test_a_model_that_one_of_two_nodes_cannot_run_breaks_no_rule_unless_it_is_asked(repository: Repository) -> None:
    repository.write(repository.model("a:v1"), repository.model("big:v1", gpu_memory=20 * GIB))

    assert repository.rules() == []
    assert repository.rules("--fail-on", "reject-any") == [("reject-any", "cpu", "big:v1")]
    assert repository.rules(nodes=("cpu",)) == [("reject", "", "big:v1")]
    assert repository.rules("--fail-on", "", nodes=("cpu",)) == []


def test_a_model_that_no_node_can_run_breaks_a_rule(repository: Repository) -> None:
    repository.write(repository.model("huge:v1", gpu_memory=200 * GIB), repository.model("b:v1", runtime={"engine": "vllm"}))
    assert repository.rules() == [("reject", "", "b:v1"), ("reject", "", "huge:v1")]


def test_a_disk_that_is_too_small_breaks_a_rule(repository: Repository) -> None:
    repository.write(repository.model("a:v1", 120 * GIB))
    assert repository.rules() == [("disk", "cpu", "")]
    repository.write(repository.model("a:v1", 120 * GIB), repository.model("b:v1", 400 * GIB, gpu_memory=GIB))
    assert repository.rules() == [("disk", "gpu", ""), ("disk", "cpu", "")]


def test_an_update_needs_the_space_of_both_versions_for_a_while(repository: Repository) -> None:
    repository.commit(repository.model("a:v1", 60 * GIB))
    old = repository.model("a:v1", 60 * GIB, state="retired")
    repository.write(old, repository.model("a:v2", 60 * GIB, replaces=["a:v1"]))

    assert repository.rules("--against", "main") == [("disk", "cpu", "")]
    assert repository.rules(nodes=("cpu",)) == [], "installed anew, it fits"


def test_a_download_that_is_larger_than_the_rule_permits(repository: Repository) -> None:
    repository.commit(repository.model("a:v1", 50 * GIB))
    assert repository.rules("--fail-on", "larger-than=60GiB") == []
    assert repository.rules("--fail-on", "larger-than=40GiB") == [("larger-than", "gpu", ""), ("larger-than", "cpu", "")]
    assert repository.rules("--fail-on", "larger-than=40GiB", "--against", "main") == [], "they have it"


@pytest.mark.parametrize("words", ["rejct", "larger-than", "larger-than=much", "outage=1"])
def test_a_rule_that_is_none_is_wrong_usage(repository: Repository, words: str) -> None:
    repository.write(repository.model("a:v1"))
    ran = repository.plan("--fail-on", words)
    assert ran.code == 64
    assert "--fail-on" in ran.err


# -- compared with a base


def test_a_converged_node_has_nothing_to_do(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"), repository.model("old:v1", state="disabled"), repository.model("g:v1", gpu_memory=GIB))
    found = repository.plan("--json", "--against", "main").json
    assert [one["plan"]["changes"] for one in found["nodes"]] == [False, False]


def test_a_dropped_model_is_an_outage(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"), repository.model("b:v1"))
    repository.write(repository.model("a:v1"))
    assert repository.rules("--against", "main") == [("outage", "gpu", "b:v1"), ("outage", "cpu", "b:v1")]
    assert repository.rules() == [], "without a base nobody knows what serves"


@pytest.mark.parametrize("state", ["disabled", "archived"])
def test_a_model_that_is_taken_out_of_service_is_an_outage(repository: Repository, state: str) -> None:
    repository.commit(repository.model("a:v1"), repository.model("b:v1", gpu_memory=GIB))
    repository.write(repository.model("a:v1"), repository.model("b:v1", gpu_memory=GIB, state=state))
    assert repository.rules("--against", "main") == [("outage", "gpu", "b:v1")]


def test_a_replacement_is_no_outage_and_a_swap_without_one_is(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"))
    repository.write(repository.model("a:v1", state="retired"), repository.model("a:v2", replaces=["a:v1"]))
    assert repository.rules("--against", "main") == []
    repository.write(repository.model("a:v2"))
    assert [rule for rule, *_ in repository.rules("--against", "main")] == ["outage", "outage"]


def test_the_last_of_two_versions_of_a_name_is_an_outage_and_one_of_them_is_not(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"), repository.model("a:v2"))
    repository.write(repository.model("a:v2"))
    assert repository.rules("--against", "main") == []
    repository.write(repository.model("b:v1"))
    assert {model for _, _, model in repository.rules("--against", "main")} == {"a:v1", "a:v2"}


def rolled_out(repository: Repository, per_10000: int, size: int = GIB) -> dict[str, Any]:
    models = [repository.model("a:v1", state="retired"), repository.model("a:v2", replaces=["a:v1"], gpu_memory=size)]
    return {"models": models, "rollouts": {"step": {"models": ["a:v2"], "per_10000": per_10000}}}


def test_a_model_of_a_first_step_is_judged_before_any_node_gets_it(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"))
    repository.write(**rolled_out(repository, 1, 200 * GIB))
    assert repository.rules("--against", "main") == [("reject", "", "a:v2")]


def test_a_rollout_that_grows_is_no_outage_and_one_that_is_taken_back_is(repository: Repository) -> None:
    repository.commit(**rolled_out(repository, 100))
    repository.write(**rolled_out(repository, 10_000))
    assert repository.rules("--against", "main", nodes=("gpu",)) == []
    repository.commit(**rolled_out(repository, 10_000))
    repository.write(**rolled_out(repository, 0))
    assert repository.rules("--against", "main", nodes=("gpu",)) == [("outage", "gpu", "a:v2")]


def profile(repository: Repository, name: str, line: str) -> None:
    """Write a profile like that of the node with a GPU, with *line* in it."""
    (repository.folder / f"nodes/{name}.toml").write_text(f"{line}\n{GPU}")


def test_a_node_writes_its_cohorts_and_its_id_as_a_comment(node: Node, tmp_path: Path) -> None:
    node.configure('\n[node]\nid = "7f1b0c9e"\ncohorts = ["canary", "gpu"]\n')
    assert node.run("doctor", "--write-profile", str(tmp_path / "this.toml")).code in {0, 1}
    text = (tmp_path / "this.toml").read_text()
    assert 'cohorts = ["canary", "gpu"]' in text
    assert '# id = "7f1b0c9e"' in text
    found = profiles.read(tmp_path / "this.toml")
    assert (found.id, found.cohorts) == ("", ("canary", "gpu"))
    found = profiles.decode(text.replace("# id", "id").encode(), tmp_path / "this.toml")
    assert found.id == "7f1b0c9e"


def op_of(found: dict[str, Any], model: str) -> list[str]:
    """Return what each node does with *model*; empty where it is as if it were not listed."""
    return [next((one["op"] for one in node["plan"]["models"] if one["id"] == model), "") for node in found["nodes"]]


def test_a_profile_in_a_named_cohort_gets_the_rollouts_model_and_one_in_none_is_planned_in_full(repository: Repository) -> None:
    profile(repository, "canary", 'cohorts = ["canary"]')
    profile(repository, "other", 'cohorts = ["other"]')
    repository.commit(repository.model("a:v1"))
    repository.write(**(rolled_out(repository, 0) | {"rollouts": {"step": {"models": ["a:v2"], "per_10000": 0, "cohorts": ["canary"]}}}))

    found = repository.plan("--json", "--against", "main", nodes=("canary", "other", "gpu")).json

    assert op_of(found, "a:v2") == ["install", "", "install"]
    assert [node["plan"]["changes"] for node in found["nodes"]] == [True, False, True]


@pytest.mark.parametrize("node", ["one", "two", "three", "four"])
def test_a_profile_with_an_id_is_planned_as_that_node_does_it(repository: Repository, node: str) -> None:
    place = rollout.place("testnet", "step", node)
    profile(repository, "node", f'id = "{node}"')
    repository.commit(**rolled_out(repository, 0))
    for per_10000, op in ((place, ""), (place + 1, "install")):
        repository.write(**rolled_out(repository, per_10000))
        found = repository.plan("--json", "--against", "main", nodes=("node",)).json
        assert op_of(found, "a:v2") == [op]


def test_a_cohort_that_leaves_a_rollout_is_an_outage_of_its_model_only_where_nothing_takes_its_place(repository: Repository) -> None:
    profile(repository, "canary", 'cohorts = ["canary"]')
    models = [repository.model("a:v1"), repository.model("b:v1")]
    repository.commit(models=models, rollouts={"step": {"models": ["b:v1"], "per_10000": 0, "cohorts": ["canary"]}})
    repository.write(models=models, rollouts={"step": {"models": ["b:v1"], "per_10000": 0}})
    assert repository.rules("--against", "main", nodes=("canary",)) == [("outage", "canary", "b:v1")]


def test_a_model_of_a_rollout_that_one_cohort_cannot_run_is_not_passed_by_the_others_without_it(repository: Repository) -> None:
    profile(repository, "canary", 'cohorts = ["canary"]')
    repository.commit(repository.model("a:v1"))
    repository.write(
        **(rolled_out(repository, 0, 200 * GIB) | {"rollouts": {"s": {"models": ["a:v2"], "per_10000": 0, "cohorts": ["canary"]}}})
    )
    assert repository.rules("--against", "main", nodes=("canary", "cpu")) == [("reject", "", "a:v2")]


def test_new_content_under_an_id_is_no_outage(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"))
    other = repository.model("a:v1")
    other["artifacts"][0]["digest"] = "sha256:" + "0" * 64
    repository.write(other)
    assert repository.rules("--against", "main") == []


def test_an_older_snapshot_is_refused_as_a_node_refuses_it(repository: Repository) -> None:
    old = repository.commit(repository.model("a:v1"))
    repository.commit(repository.model("a:v1"), repository.model("b:v1"))
    repository.put(old)
    for words in (["plan", "--against", "main"], ["lock", "--check", "--against", "main"]):
        ran = repository.run(*words)
        assert ran.code == 4
        assert "error[rollback]" in ran.err
    assert repository.run("lock", "--check").code == 0, "the lock is what the snapshot compiles to; the base tells that it is old"


def test_another_snapshot_of_the_same_version_is_refused(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"), version=7)
    repository.write(repository.model("b:v1"), version=7)
    ran = repository.run("plan", "--against", "main")
    assert (ran.code, "error[equivocation]" in ran.err) == (4, True)


def test_an_expired_snapshot_is_refused(repository: Repository) -> None:
    repository.write(repository.model("a:v1"), expires_at="2020-01-01T00:00:00Z", issued_at="2019-01-01T00:00:00Z")
    assert "error[expired]" in repository.plan().err


def test_a_change_that_only_extends_the_expiry_says_so_and_changes_no_node(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"))
    later = repository.network.now + timedelta(days=90)
    repository.write(repository.model("a:v1"), expires_at=later.strftime("%Y-%m-%dT%H:%M:%SZ"))

    ran = repository.plan("--against", "main", "--json", "--detailed-exitcode")

    assert ran.code == 0
    found = ran.json["against"]
    assert (found["added"], found["removed"], found["changed"], found["warnings"]) == ([], [], [], [])
    assert found["base"]["expires_at"] < ran.json["snapshot"]["expires_at"]
    assert ran.json["snapshot"]["version"] == found["base"]["version"] + 1


def test_keys_and_thresholds_that_change_are_named(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"))
    (repository.folder / "root.json").write_bytes(repository.network.rotate(snapshot_keys=Network("other").snapshot_keys))
    repository.network.now += timedelta(seconds=30)  # other signers must have signed later
    repository.write(repository.model("a:v1"))

    found = repository.plan("--against", "main", "--json").json["against"]

    assert len(found["keys"]) == 2
    assert any("may no longer sign snapshots" in text for text in found["keys"])
    assert any("trust root goes from 1 to 2" in text for text in found["warnings"])


def test_an_older_root_is_refused(repository: Repository) -> None:
    first = (repository.folder / "root.json").read_bytes()
    (repository.folder / "root.json").write_bytes(repository.network.rotate())
    repository.commit(repository.model("a:v1"))
    (repository.folder / "root.json").write_bytes(first)
    ran = repository.plan("--against", "main")
    assert (ran.code, "error[bad-root-chain]" in ran.err) == (4, True)


def test_a_base_without_a_snapshot_makes_everything_new(repository: Repository) -> None:
    repository.git("commit", "--quiet", "--allow-empty", "--message=empty")
    repository.write(repository.model("a:v1"))
    found = repository.plan("--against", "main", "--json").json
    assert found["against"]["base"] is None
    assert found["against"]["added"] == ["a:v1"]


def test_the_base_may_be_a_folder_or_a_file(repository: Repository, tmp_path: Path) -> None:
    envelope = repository.commit(repository.model("a:v1"), repository.model("b:v1"))
    (tmp_path / "base.json").write_bytes(envelope)
    repository.git("worktree", "add", str(tmp_path / "base"), "--detach", "main")
    repository.write(repository.model("a:v1"))
    for place in (tmp_path / "base.json", tmp_path / "base"):
        assert {model for _, _, model in repository.rules("--against", str(place))} == {"b:v1"}


@pytest.mark.parametrize("name", ["no-such-branch", "--output=/tmp/x", "main:root.json", ""])
def test_a_base_that_is_none_is_wrong_usage(repository: Repository, name: str) -> None:
    repository.commit(repository.model("a:v1"))
    ran = repository.plan(f"--against={name}")
    assert ran.code == (64 if name else 0)
    assert not name or "git fetch" in ran.err


def test_without_a_profile_the_list_itself_is_judged(repository: Repository) -> None:
    repository.commit(repository.model("a:v1", gpu_memory=900 * GIB), repository.model("b:v1", runtime={"engine": "x", "version": ">=99"}))
    repository.write(repository.model("b:v1", runtime={"engine": "x", "version": ">=99"}))
    assert repository.rules("--against", "main", nodes=()) == [("outage", "any node", "a:v1")]


def test_options_of_this_nodes_plan_do_not_go_with_a_profile(repository: Repository, tmp_path: Path) -> None:
    repository.write(repository.model("a:v1"))
    assert repository.plan("--out", str(tmp_path / "plan.json")).code == 64
    assert repository.run("lock", "--against", "main").code == 64


# -- Markdown


def test_markdown_is_one_table_with_what_fails_above_it(repository: Repository) -> None:
    repository.commit(repository.model("a:v1"), repository.model("b:v1"))
    repository.write(repository.model("a:v1"), repository.model("big:v1", 40 * GIB, gpu_memory=20 * GIB))

    ran = repository.plan("--against", "main", "--format", "markdown")

    assert ran.code == 2
    lines = ran.out.splitlines()
    assert lines[0] == markdown.MARKER
    assert "### testnet: snapshot 1 → 2" in lines
    assert "**2 rules broken.**" in lines
    assert "| model | gpu | cpu |" in lines
    (row,) = [line for line in lines if line.startswith("| `big:v1` (new) |")]
    assert "install, 40.0 GiB" in row
    assert "cannot run" in row
    assert any(line.startswith("| `b:v1` (dropped) | ❌ **stops serving**") for line in lines)
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") == 4 for line in tables), "every row has the cells of its head"


HOSTILE = "</td><script>alert(1)</script> | [x](https://evil.example.org) @all ![i](http://h/x) `c` #12 www.evil.example.org\x1b[31m"


def test_hostile_text_in_markdown_is_text() -> None:
    shown = markdown.escape(HOSTILE)
    assert not {"<", ">", "@", "|", "\x1b"} & {*shown}
    assert not re.search(r"(?<!\\)[\[\]]", shown), "each bracket is escaped"
    assert "://" not in shown
    assert "www." not in shown
    assert " #" not in shown


def test_the_plan_of_this_node_is_shown_as_markdown_too(node: Node) -> None:
    node.publish(node.item("a:v1", b"x" * 100))
    out = node.run("plan", "--format", "markdown").out
    assert out.startswith(markdown.MARKER)
    assert "| `a:v1` | install |" in out
    assert node.run("plan", "--format", "json").json["schema"] == 1


# -- profiles


def test_the_profile_of_a_node_is_read_back_as_it_was_measured(node: Node, tmp_path: Path) -> None:
    ran = node.run("doctor", "--write-profile", str(tmp_path / "this.toml"))
    assert ran.code == 0
    found = profiles.read(tmp_path / "this.toml")
    measured = profiles.measure(node.context())
    assert found.name == "this"
    assert found.facts.engines == measured.engines
    assert found.facts.memory_bytes == measured.memory
    assert found.reserve_bytes == 1 << 20
    assert [gpu.total_bytes for gpu in found.facts.gpus] == [gpu.memory for gpu in measured.gpu]


def test_a_profile_names_no_host(node: Node, tmp_path: Path) -> None:
    import socket

    node.run("doctor", "--write-profile", str(tmp_path / "this.toml"))
    assert socket.gethostname() not in (tmp_path / "this.toml").read_text()


def test_what_the_store_holds_counts_as_room_for_models(used: Node) -> None:
    """Else a full node, measured, would have no room for the very models that it holds."""
    held = sum(path.stat().st_size for path in used.blobs())
    context = used.context()
    measured = profiles.measure(context)
    import os

    disk = os.statvfs(used.store)
    assert isinstance(measured.disk, int)
    assert measured.disk > disk.f_bavail * disk.f_frsize - (64 << 20)
    assert held <= profiles._bytes_on_disk(context) <= held + 4096 * len(used.blobs())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memry = 1\n", "memry"), ("memory = '64 gigs'\n", "64 gigs"), ("[[gpu]]\nname = 'A'\n", "memory"), ("schema = 2\n", "schema"),
        ("memory = -1\n", "memory"), ("[store\n", "not a node profile"), ("<<<<<<< HEAD\n", "merge conflict"),
    ],
)  # fmt: skip
def test_a_profile_that_means_nothing_is_refused_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(SettingsError) as refused:
        profiles.read(tmp_path / "node.toml")
    assert "node.toml is not a node profile" in refused.value.message
    assert said in refused.value.message


def test_a_profile_may_leave_out_the_disk_and_is_not_judged_by_it(repository: Repository) -> None:
    (repository.folder / "nodes/cpu.toml").write_text('memory = "1GiB"\n\n[engines]\nllama-cpp = "0.3.16"\n')
    repository.write(repository.model("a:v1", 9000 * GIB))
    assert repository.rules(nodes=("cpu",)) == []


def test_a_profile_does_not_overwrite_the_nodes_own_files(node: Node) -> None:
    before = (node.folder / "root.json").read_bytes()
    assert node.run("doctor", "--write-profile", str(node.folder / "root.json")).code == 64
    assert (node.folder / "root.json").read_bytes() == before
