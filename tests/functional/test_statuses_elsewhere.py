"""``fleet report`` reads statuses where an operator collects them: a real registry (CNCF distribution), and moto's S3."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reconciler.commands import read_statuses
from reconciler.fetch import bucket
from reconciler.fleet import statement
from reconciler.fleet.statement import ReportedModel
from tests import registry
from tests.fleet import MODEL, Member, enroll
from tests.functional.test_add_from_a_registry import push
from tests.node import Ran, run
from tests.registry import PAIR

moto_server = pytest.importorskip("moto.server", reason="moto's server is not installed")
pytest.importorskip("botocore", reason="the extra s3 is not installed")
pytest.importorskip("oras", reason="oras is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

FAILED = ReportedModel(id="a:v1", state="failed", reason="failed-before", detail="smoke-failed: it gave no token")
#: A collector: puts files by name, returns the address to report on.
Put = Callable[[dict[str, bytes]], str]


def fresh(member: Member, *models: ReportedModel) -> bytes:
    return member.status(*models, at=datetime.now(UTC) - timedelta(minutes=1))


@pytest.fixture
def statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Statuses of three nodes whose keys are enrolled, of a stranger, and what is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    members = [Member(f"node-{index}") for index in range(3)]
    enroll(tmp_path / "node-keys", *members)
    good = {f"{member.name}.json": fresh(member, FAILED if index == 2 else MODEL) for index, member in enumerate(members)}
    forged = members[0].status(signer=Member("thief").key, at=datetime.now(UTC))
    large = b"{" + b" " * statement.MAX_BYTES + b"}"
    return good | {"forged.json": forged, "stranger.json": fresh(Member("x")), "large.json": large, "notes.txt": b"no status"}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    served = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    bucket._client.cache_clear()
    client = bucket.client()
    client.create_bucket(Bucket="fleet")

    def put(files: dict[str, bytes]) -> str:
        for name, data in files.items():
            client.put_object(Bucket="fleet", Key=f"statuses/{name}", Body=data)
        client.put_object(Bucket="fleet", Key="statuses-of-others/node-9.json", Body=b"{}")
        return "s3://fleet/statuses"

    yield put
    served.stop()
    bucket._client.cache_clear()


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[Put]:
    """One artifact with all statuses, under a tag."""
    with registry.running(tmp_path / "registry") as served:

        def put(files: dict[str, bytes]) -> str:
            push(served, "fleet/statuses:today", files, tmp_path / "pushed")
            return f"oci://{served.address}/fleet/statuses:today"

        yield put


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Put]:
    """One artifact a status, each under a tag of its own."""
    with registry.running(tmp_path / "registry") as served:

        def put(files: dict[str, bytes]) -> str:
            for name, data in files.items():
                push(served, f"fleet/statuses:{name.rpartition('.')[0]}", {name: data}, tmp_path / "pushed")
            return f"oci://{served.address}/fleet/statuses"

        yield put


def report(place: str, *more: str) -> Ran:
    return run("fleet", "report", place, "--json", *more)


@pytest.mark.parametrize("where", ["s3", "artifact", "repository"])
def test_a_fleet_is_reported_from_elsewhere_as_from_a_folder(
    statuses: dict[str, bytes], where: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "statuses"
    folder.mkdir()
    for name, data in statuses.items():
        (folder / name).write_bytes(data)
    place = request.getfixturevalue(where)(statuses)
    ran = report(place)
    assert ran.code == 0, ran
    assert ran.json["nodes"] == 3
    assert ran.json["refused"] == {"forged": 1, "too-large": 1, "unknown-node": 1}
    assert MODEL.id == ran.json["models"][0]["id"]
    assert (ran.json["models"][0]["serving"], ran.json["models"][0]["failed"]) == (2, 1)
    assert {**ran.json, "at": ""} == {**report(str(folder)).json, "at": ""}
    assert report(place, "--max-failed", "1%").code == 2


@pytest.mark.parametrize("where", ["s3", "artifact"])
def test_nodes_are_enrolled_from_elsewhere(statuses: dict[str, bytes], where: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(where)(statuses)
    ran = run("fleet", "enroll", place, "--all")
    assert (ran.code, "1 node enrolled" in ran.out) == (0, True), ran
    assert report(place).json["nodes"] == 4


def test_a_login_is_used_and_its_lack_is_said(statuses: dict[str, bytes], tmp_path: Path) -> None:
    with registry.running(tmp_path / "registry", "htpasswd") as served:
        push(served, "fleet/statuses:today", statuses, tmp_path / "pushed", PAIR)
        for place in (f"oci://{served.address}/fleet/statuses:today", f"oci://{served.address}/fleet/statuses"):
            (tmp_path / "docker/config.json").unlink(missing_ok=True)
            refused = report(place)
            assert (refused.code, "401" in refused.err) == (1, True), refused
            entry = {"auths": {served.address: {"auth": base64.b64encode(":".join(PAIR).encode()).decode()}}}
            (tmp_path / "docker/config.json").write_text(json.dumps(entry))
            assert report(place).json["nodes"] == 3


@pytest.mark.usefixtures("s3")
def test_a_collector_that_is_gone_is_an_error_and_no_silent_fleet(statuses: dict[str, bytes], tmp_path: Path) -> None:
    with registry.running(tmp_path / "registry") as served:
        push(served, "fleet/statuses:today", statuses, tmp_path / "pushed")
    for place in (f"oci://{served.address}/fleet/statuses:today", f"oci://{served.address}/fleet/statuses", "s3://missing/x", "oci://x"):
        ran = report(place)
        assert (ran.code, set(ran.json)) == (1, {"error"}), place


def test_an_object_that_is_deleted_meanwhile_is_unreadable(statuses: dict[str, bytes], s3: Put) -> None:
    place = s3(statuses)
    listed = list(read_statuses._in_bucket(place))
    bucket.client().delete_object(Bucket="fleet", Key="statuses/node-0.json")
    ((_, read),) = [one for task in listed for one in task() if one[0] == "node-0.json"]
    with pytest.raises(OSError, match="deleted meanwhile"):
        read()


def test_a_repository_of_more_tags_than_a_page_is_read_to_its_end(
    statuses: dict[str, bytes], repository: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = repository({name: data for name, data in statuses.items() if name.startswith("node-")})
    monkeypatch.setattr(read_statuses, "_TAGS_A_PAGE", 2)
    assert sorted(name for name, _ in read_statuses.statuses(place)) == [f"node-{index}/node-{index}.json" for index in range(3)]
