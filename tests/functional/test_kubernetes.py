"""What lies in ``deploy/kubernetes``: built by the tool that applies it, valid against Kubernetes' schemas, and true of this program."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reconciler import settings_file
from reconciler.commands.context import from_settings
from tests.functional.test_deploy import parsed

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
FOLDERS = ("base", *(f"overlays/{path.name}" for path in sorted((KUBERNETES / "overlays").iterdir())))
#: The oldest release that its makers still support, and the newest that the schemas know: no name.
RELEASES = ("1.32", "")
Object = dict[str, Any]


@functools.cache
def built(folder: str) -> tuple[Object, ...]:
    """Return the objects that are applied."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl, which builds overlays, is not installed")
    made = subprocess.run(["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stderr == "", "what kustomize warns of"
    return tuple(yaml.safe_load_all(made.stdout))


def pods(folder: str) -> Iterator[Object]:
    """Yield the pod of each object that has one."""
    for found in built(folder):
        if "template" in found.get("spec", {}):
            yield found["spec"]["template"]["spec"]


def config(folder: str) -> Object:
    (found,) = (one["data"] for one in built(folder) if one["kind"] == "ConfigMap")
    return dict(found)


def validate(found: Object, release: str) -> None:
    """Raise an error where Kubernetes' *release* would refuse *found*, or the newest one that the schemas know."""
    import kubernetes_validate  # type: ignore[import-untyped]  # it has no types, and takes a second to import

    kubernetes_validate.validate(found, release or kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid(folder: str, release: str) -> None:
    for found in built(folder):
        validate(found, release)


def test_the_schemas_refuse_what_kubernetes_would() -> None:
    (pod,) = (one for one in built("base") if one["kind"] == "DaemonSet")
    with pytest.raises(Exception, match="replicas"):
        validate({**pod, "spec": {**pod["spec"], "replicas": 1}}, RELEASES[0])


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_path_port_and_setting_is_the_program_s(folder: str, tmp_path: Path) -> None:
    files = config(folder)
    found = from_settings(settings_file.decode(files["reconcile.toml"].encode(), Path("/etc/reconcile")))
    for pod in pods(folder):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            parsed(container["args"])
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= volumes
            assert {"name": "RECONCILE_CONFIG", "value": "/etc/reconcile/reconcile.toml"} in container["env"]
            assert mounts["/etc/reconcile"]["readOnly"]
            assert "/tmp" in mounts, "the root is read-only, and downloads and test jobs need a folder for temporary files"
            assert any(found.layout.root.is_relative_to(path) for path in mounts if path != "/etc/reconcile")
            assert {Path(found.root_path).name, "reconcile.toml"} <= files.keys()
            for probe in ("startupProbe", "livenessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"] == {"path": "/-/healthy", "port": "metrics"}
            for port in container.get("ports", ()):
                assert found.metrics_address == ("0.0.0.0", port["containerPort"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_runs_as_root_or_writes_its_image(folder: str) -> None:
    for pod in pods(folder):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0, "a number: Kubernetes does not look a name up"
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"]
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"]


def test_the_container_file_names_its_user_by_the_same_number() -> None:
    text = (KUBERNETES.parent / "Containerfile").read_text()
    (user,) = re.findall(r"^USER (\S+)$", text, re.MULTILINE)

    assert user == "65532:65532"
    assert {pod["securityContext"]["runAsUser"] for folder in FOLDERS for pod in pods(folder)} == {65532}


@pytest.mark.parametrize("folder", FOLDERS)
def test_servers_of_models_reach_nothing(folder: str) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in built(folder) if one["kind"] == "NetworkPolicy"}

    assert policies["model-servers"]["egress"] == []
    assert "Egress" in policies["model-servers"]["policyTypes"]
    blocks = [to["ipBlock"] for rule in policies["reconcile"]["egress"] for to in rule.get("to", ())]
    assert all({"169.254.0.0/16", "10.0.0.0/8"} <= set(block["except"]) for block in blocks)


def test_there_is_never_a_second_writer_on_a_shared_store() -> None:
    (found,) = (one for one in built("overlays/shared-store") if one["kind"] == "Deployment")

    assert found["spec"]["replicas"] == 1
    assert found["spec"]["strategy"] == {"type": "Recreate"}
