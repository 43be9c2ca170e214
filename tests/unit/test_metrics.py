"""Metrics, read back with prometheus-client's own parser."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from reconciler.report import metrics
from reconciler.report.metrics import ModelMetrics, NetworkMetrics, NodeMetrics, RunMetrics, StoreMetrics

NOW = datetime(2026, 11, 20, tzinfo=UTC)
FULL = NodeMetrics(
    models=(
        ModelMetrics(
            id="a:v1", state="active", bytes=4096, since=NOW, tested_at=NOW, load_seconds=1.5, run_seconds=0.25, tokens_per_second=31.5
        ),
        ModelMetrics(id="b:v2", state="failed", attempts=3),
    ),
    network=NetworkMetrics(
        network="testnet", lock="sha256:" + "0" * 64, snapshot_version=7, snapshot_expires_at=NOW + timedelta(hours=1), root_version=2,
        root_expires_at=NOW + timedelta(days=365), floor_version=7, refused="expired",
    ),
    store=StoreMetrics(
        generation=12, activated_generation=12, blobs=2,
        blob_bytes=8192, archived_bytes=1, damaged_blobs=0, drift=1, disk_free_bytes=10**12, disk_free_inodes=10**6,
        disk_reserve_bytes=1 << 30, oldest_verified_at=NOW - timedelta(days=3),
    ),
    run=RunMetrics(at=NOW, seconds=2.5, failures=1, totals={"done": 9, "error": 1}, succeeded_at=NOW, next_at=NOW),
    heard_at=NOW - timedelta(hours=2),
    servers={"main": 11},
    incidents={"hash-mismatch": 2, "source-failed": 40},
)  # fmt: skip


def families(figures: NodeMetrics, now: datetime = NOW) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.render(figures, now).decode())}


def samples(figures: NodeMetrics, now: datetime = NOW) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = [sample for family in families(figures, now).values() for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}


def value(name: str, **labels: str) -> float:
    return samples(FULL)[name, frozenset(labels.items())]


def test_the_parser_reads_what_is_rendered() -> None:
    assert value("reconcile_model_state", model="a:v1", state="active") == 1
    assert value("reconcile_model_state", model="a:v1", state="failed") == 0
    assert value("reconcile_models", state="failed") == 1
    assert value("reconcile_model_bytes", model="a:v1") == 4096
    assert value("reconcile_model_attempts", model="b:v2") == 3
    assert value("reconcile_model_test_tokens_per_second", model="a:v1") == 31.5
    assert value("reconcile_snapshot_version") == 7
    assert value("reconcile_snapshot_expiry_seconds") == 3600
    assert value("reconcile_snapshot_expires_timestamp_seconds") == (NOW + timedelta(hours=1)).timestamp()
    assert value("reconcile_floor_version") == 7
    assert value("reconcile_refused", reason="expired") == 1
    assert value("reconcile_network_last_heard_timestamp_seconds") == (NOW - timedelta(hours=2)).timestamp()
    assert value("reconcile_incidents_total", kind="source-failed") == 40
    assert value("reconcile_runs_total", outcome="error") == 1
    assert value("reconcile_last_success_timestamp_seconds") == NOW.timestamp()
    assert value("reconcile_store_oldest_verification_timestamp_seconds") == (NOW - timedelta(days=3)).timestamp()


def test_names_follow_the_conventions() -> None:
    for name, family in families(FULL).items():
        assert re.fullmatch(r"reconcile(_[a-z]+)+", name), name
        assert family.type in {"gauge", "counter"}
        assert family.documentation.endswith(".")
        assert family.samples, name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert not re.search(r"_(ms|millis|kb|mib|gib|minutes|hours|percent)", sample.name)
            assert sample.value >= 0


def test_each_model_is_in_one_state() -> None:
    for model in ("a:v1", "b:v2"):
        assert sum(value("reconcile_model_state", model=model, state=state) for state in metrics.STATES) == 1


def test_what_is_not_known_has_no_sample() -> None:
    names = {name for name, _ in samples(NodeMetrics())}

    assert names == {"reconcile_build_info"}
    assert ("reconcile_model_test_tokens_per_second", frozenset({("model", "b:v2")})) not in samples(FULL)
    assert "reconcile_models" not in names, "no model is something else than nobody knows"


def test_an_expired_snapshot_counts_below_zero() -> None:
    assert samples(FULL, NOW + timedelta(hours=3))["reconcile_snapshot_expiry_seconds", frozenset()] == -7200


@given(text=st.text(max_size=60))
def test_no_label_forges_a_line(text: str) -> None:
    forged = NodeMetrics(models=(ModelMetrics(id=text, state="active", bytes=5),), incidents={text: 1})
    said = metrics.render(forged, NOW).decode()
    found = [sample for family in text_string_to_metric_families(said) for sample in family.samples]

    assert len(found) == 1 + 6 + 6 + 1 + 1 + 1 + 1 + 1
    assert [sample.labels["model"] for sample in found if sample.name == "reconcile_model_bytes"] == [text]


def test_a_scrape_gives_the_newest_figures_and_a_model_that_is_gone_is_gone() -> None:
    now = [FULL]
    port, end = metrics.serve(("127.0.0.1", 0), lambda: now[0], lambda: NOW)
    try:
        first = scrape(port)
        now[0] = NodeMetrics(models=())
        second = scrape(port)
    finally:
        end()

    assert 'reconcile_model_bytes{model="a:v1"} 4096.0' in first
    assert 'model="a:v1"' not in second
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_metrics_are_served_on_loopback_alone() -> None:
    port, end = metrics.serve(("127.0.0.1", 0), lambda: FULL, lambda: NOW)
    try:
        with socket.socket() as other:
            other.bind(("127.0.0.2", port))  # free: nothing listens on every address
        with socket.socket() as same, pytest.raises(OSError, match="in use"):
            same.bind(("127.0.0.1", port))
    finally:
        end()


def test_two_registries_share_nothing() -> None:
    port, end = metrics.serve(("127.0.0.1", 0), lambda: FULL, lambda: NOW)
    another, end_other = metrics.serve(("127.0.0.1", 0), NodeMetrics, lambda: NOW)
    try:
        assert "reconcile_snapshot_version" in scrape(port)
        assert "reconcile_snapshot_version" not in scrape(another)
    finally:
        end()
        end_other()


def test_healthy_is_answered_beside_the_metrics() -> None:
    wrong = [""]
    port, end = metrics.serve(("127.0.0.1", 0), lambda: FULL, lambda: NOW, lambda: wrong[0])
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthy", timeout=10) as answer:
            assert (answer.status, answer.read()) == (200, b"healthy\n")
        wrong[0] = "the agent makes no progress"
        with pytest.raises(urllib.error.HTTPError, match="503") as found:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthy", timeout=10)
        found.value.close()
    finally:
        end()
