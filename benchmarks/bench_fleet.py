"""Ten thousand statuses: read, verified and summed up, with the keys from their folder. Run with `make bench`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from reconciler.fleet import assess, collect
from reconciler.fleet.register import Register
from tests.fleet import MODEL, NOW, Member, enroll

NODES = 10_000
MODELS = tuple(msgspec.structs.replace(MODEL, id=f"model-{index}:v1") for index in range(20))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Path]:
    """A folder with the statuses of ten thousand nodes, 20 models each, one in a hundred failed."""
    folder = Path(mkdtemp(prefix="fleet-"))
    (folder / "statuses").mkdir(parents=True)
    for index in range(NODES):
        member = Member(f"node-{index:05d}")
        failed = msgspec.structs.replace(MODEL, id=MODELS[0].id, state="failed", detail="smoke-failed: it gave no token")
        models = (failed, *MODELS[1:]) if index % 100 == 0 else MODELS
        (folder / "statuses" / f"{member.name}.json").write_bytes(member.status(*models))
        enroll(folder / "keys", member)
    yield folder
    shutil.rmtree(folder)


def test_a_report_of_ten_thousand_nodes(benchmark: BenchmarkFixture, fleet: Path) -> None:
    rule = assess.Rule(max_failed=0.01, min_nodes=50, after_seconds=timedelta(hours=2).total_seconds())

    def report() -> assess.FleetReport:
        began = time.process_time()
        register = Register(fleet / "keys")
        found = collect.collect(collect.in_folder(fleet / "statuses"), register, now=NOW, stale_seconds=10_800.0)
        register.remember(found.seen)
        made = assess.assess(found, now=NOW, rule=rule)
        benchmark.extra_info["processor_seconds"] = round(time.process_time() - began, 2)
        return made

    made: assess.FleetReport = benchmark.pedantic(report, rounds=1)  # type: ignore[no-untyped-call]
    assert (made.nodes, made.verdict and made.verdict.word) == (NODES, "safe")
