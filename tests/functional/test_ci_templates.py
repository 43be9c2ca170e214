"""
The templates in ``deploy/ci``: valid by the schemas of those who read them, and run step by step as a runner runs them.

A runner's own parts cannot be had here: what checks out, sets up Python or calls a forge's program is not run. Everything of ours is.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.checkout import GIB, Repository

TOP = Path(__file__).parents[2]
CI = TOP / "deploy" / "ci"
FILES = sorted(CI.iterdir())
#: What a runner puts in the place of an expression.
EXPRESSIONS = {"github.base_ref": "main", "github.token": "secret", "github.event.number": "7"}


def read(name: str) -> Any:
    return yaml.safe_load((CI / name).read_text())


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repository")
    made.commit(made.model("a:v1"), made.model("b:v1"))
    made.git("update-ref", "refs/remotes/origin/main", "main")
    return made


class Runner:
    """Runs steps in *folder*, each in a shell of its own that ends at the first failure, as both forges do."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.summary = folder.parent / "summary.md"
        programs.mkdir()
        (programs / "reconcile").write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(TOP / "cli.py")])} "$@"\n')
        (programs / "reconcile").chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RECONCILE_")}
        self.environment = kept | {"PATH": f"{programs}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(self.summary), "NO_COLOR": "1"}

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(words, cwd=self.folder, env=self.environment | variables, capture_output=True, text=True, timeout=120)


@pytest.fixture
def runner(repository: Repository, tmp_path: Path) -> Runner:
    return Runner(repository.folder, tmp_path / "bin")


def filled(text: str) -> str:
    return re.sub(r"\$\{\{\s*([\w.]+)\s*\}\}", lambda found: EXPRESSIONS[found[1]], text)


def github_gate(runner: Runner) -> list[int]:
    """Run our steps of the gate, and return their exit codes; it ends at the first that fails."""
    job = read("github-actions.yml")["jobs"]["models"]
    variables = {name: filled(str(value)) for name, value in job["env"].items()}
    codes = []
    for step in job["steps"]:
        if "reconcile " in step.get("run", ""):
            ran = runner.run(filled(step["run"]), **variables)
            codes.append(ran.returncode)
            if ran.returncode:
                break
    return codes


def gitlab_gate(runner: Runner) -> int:
    job = read("gitlab-ci.yml")["models"]
    base = subprocess.run(["git", "rev-parse", "origin/main"], cwd=runner.folder, capture_output=True, text=True, check=True).stdout.strip()
    return runner.run("\n".join(job["script"]), CI_MERGE_REQUEST_DIFF_BASE_SHA=base).returncode


# -- valid


SCHEMAS = {
    "github-actions.yml": "vendor.github-workflows",
    "github-actions-update.yml": "vendor.github-workflows",
    "gitlab-ci.yml": "vendor.gitlab-ci",
}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_each_file_is_valid_by_the_schema_of_its_reader(name: str, tmp_path: Path) -> None:
    import check_jsonschema  # takes a second, and each worker reads this module

    def check(path: Path) -> int:
        return CliRunner().invoke(check_jsonschema.main, ["--builtin-schema", SCHEMAS[name], str(path)]).exit_code

    assert check(CI / name) == 0
    broken = tmp_path / name
    broken.write_text(
        (CI / name).read_text().replace("\n    steps:", "\n    stepps:").replace("\n  script:", "\n  script: {}\n  x-script:")
    )
    assert check(broken) == 1, "the schema does see a fault"


def test_the_hook_for_pre_commit_runs_what_it_says(repository: Repository, runner: Runner) -> None:
    (hook,) = read("pre-commit-config.yaml")["repos"][0]["hooks"]
    assert hook["language"] == "system"
    for name in ("models.lock", "snapshot.json", "root.json"):
        assert re.search(hook["files"], name)
    assert runner.run(hook["entry"]).returncode == 0
    (repository.folder / "models.lock").write_text((repository.folder / "models.lock").read_text() + "# edited\n")
    assert runner.run(hook["entry"]).returncode == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_template_installs_a_bare_name_or_runs_what_a_stranger_wrote(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"pip install [\"']?[a-z]", text)
    assert "pull_request_target" not in text
    for script in re.findall(r"run: (.*)", text):
        assert "${{" not in script, "an expression in a script is code that a title or a branch name may write"


def test_what_the_gate_may_do_is_as_little_as_it_needs() -> None:
    assert read("github-actions.yml")["permissions"] == {"contents": "read", "pull-requests": "write"}


# -- four pull requests


def test_a_pull_request_that_changes_nothing_passes(repository: Repository, runner: Runner) -> None:
    assert github_gate(runner) == [0, 0]
    assert gitlab_gate(runner) == 0
    assert "Nothing changes on any node." in runner.summary.read_text()


def test_a_model_too_large_for_one_of_two_profiles_passes_and_is_shown(repository: Repository, runner: Runner) -> None:
    repository.write(repository.model("a:v1"), repository.model("b:v1"), repository.model("big:v1", 40 * GIB, gpu_memory=20 * GIB))
    assert github_gate(runner) == [0, 0]
    assert gitlab_gate(runner) == 0
    said = runner.summary.read_text()
    assert "| `big:v1` (new) |" in said
    assert "cannot run: incompatible: needs 20.0 GiB of GPU memory" in said


def test_a_model_too_large_for_both_profiles_fails(repository: Repository, runner: Runner) -> None:
    repository.write(repository.model("a:v1"), repository.model("b:v1"), repository.model("huge:v1", gpu_memory=200 * GIB))
    assert github_gate(runner) == [0, 2]
    assert gitlab_gate(runner) == 2
    assert "huge:v1 runs on none of the nodes" in runner.summary.read_text()


def test_a_dropped_model_fails(repository: Repository, runner: Runner) -> None:
    repository.write(repository.model("a:v1"))
    assert github_gate(runner) == [0, 2]
    assert gitlab_gate(runner) == 2
    assert "❌ **stops serving**" in runner.summary.read_text()
    assert (repository.folder / "plan.md").read_text() == runner.summary.read_text()


def test_a_replayed_snapshot_fails_at_once(repository: Repository, runner: Runner) -> None:
    old = (repository.folder / "snapshot.json").read_bytes()
    repository.commit(repository.model("a:v1"), repository.model("b:v1"), repository.model("c:v1"))
    repository.git("update-ref", "refs/remotes/origin/main", "main")
    repository.put(old)
    assert github_gate(runner) == [4]
    assert gitlab_gate(runner) == 4


def test_an_extended_expiry_passes(repository: Repository, runner: Runner) -> None:
    later = (repository.network.now + timedelta(days=90)).strftime("%Y-%m-%dT%H:%M:%SZ")
    repository.write(repository.model("a:v1"), repository.model("b:v1"), expires_at=later)
    assert github_gate(runner) == [0, 0]
    assert gitlab_gate(runner) == 0
    said = runner.summary.read_text()
    assert f"| **{later}** |" in said
    assert "Nothing changes on any node." in said


def test_an_edited_lock_fails(repository: Repository, runner: Runner) -> None:
    path = repository.folder / "models.lock"
    path.write_text(path.read_text().replace("v1", "v2"))
    assert github_gate(runner) == [2]
    assert gitlab_gate(runner) == 2


def test_the_update_fetches_and_plans(repository: Repository, runner: Runner) -> None:
    published = repository.network.snapshot(repository.model("a:v1"), repository.model("c:v1"))
    (repository.folder / "published.json").write_bytes(published)
    (repository.folder / "reconcile.toml").write_text('[network]\nsnapshot = "published.json"\n')
    job = read("github-actions-update.yml")["jobs"]["update"]
    (script,) = [step["run"] for step in job["steps"] if "reconcile lock" in step.get("run", "")]
    ran = runner.run(script)
    assert ran.returncode == 0, ran.stderr
    assert "| `c:v1` (new) |" in (repository.folder / "plan.md").read_text()
    assert subprocess.run(["git", "diff", "--quiet", "--", "models.lock"], cwd=repository.folder).returncode == 1


# -- installing


@pytest.mark.slow
def test_the_step_that_installs_gives_our_program(tmp_path: Path) -> None:
    """In a fresh environment that finds the dependencies of this one, so that no index is asked."""
    venv.create(tmp_path / "fresh", symlinks=True)
    (site,) = (tmp_path / "fresh/lib").glob("python3*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "others.pth").write_text(here + "\n")
    pip = tmp_path / "fresh/bin/pip"  # of this environment: to install another one takes longer than the test
    pip.write_text(f'#!/bin/sh\nexec {tmp_path / "fresh/bin/python"} -m pip "$@"\n')
    pip.chmod(0o755)
    (step,) = [one for one in read("github-actions.yml")["jobs"]["models"]["steps"] if "pip install" in one.get("run", "")]
    environment = os.environ | {
        "PATH": f"{tmp_path / 'fresh/bin'}:{os.environ['PATH']}", "PACKAGE": f"git+file://{TOP}",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip inverts it
        "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    script = f"{step['run']}\ncommand -v reconcile\nreconcile --version"
    ran = subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / "fresh/bin/reconcile") in ran.stdout
    assert "reconcile, version " in ran.stdout
