"""
A node's figures as Prometheus text, through ``prometheus-client``.

Rules that hold here:

1. Names end in their unit (``_bytes``, ``_seconds``, ``_timestamp_seconds``), counters in ``_total``; instants are Unix times, so that
   the one who asks computes the age and a file that nobody writes any more is seen to be old.
2. A registry of its own, filled from values at each scrape: no global state, and a model that is gone leaves no series behind.
3. What is not known has no sample; zero is never said in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, get_args

from msgspec import Struct

from reconciler import __version__
from reconciler.core.state import ModelState

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

STATES: tuple[str, ...] = get_args(ModelState)


class ModelMetrics(Struct, frozen=True, kw_only=True):
    """What is told of one model; None where it is not known."""

    id: str
    state: ModelState
    bytes: int = 0
    attempts: int = 0
    #: No source gave its bytes on the last try.
    unfetched: bool = False
    #: A rollback holds it back.
    held: bool = False
    since: datetime | None = None
    tested_at: datetime | None = None
    load_seconds: float | None = None
    run_seconds: float | None = None
    tokens_per_second: float | None = None


class NetworkMetrics(Struct, frozen=True, kw_only=True):
    """The newest snapshot that this node has accepted."""

    network: str
    lock: str
    snapshot_version: int
    snapshot_expires_at: datetime
    root_version: int
    root_expires_at: datetime
    floor_version: int | None = None
    #: The name of the error for which nothing new is installed; empty where all is well.
    refused: str = ""


class StoreMetrics(Struct, frozen=True, kw_only=True):
    """What lies in the store, and on the disk under it."""

    generation: int
    #: The last generation for which the activated hook succeeded; None where there is no hook, or it never ran.
    activated_generation: int | None = None
    blobs: int
    blob_bytes: int
    archived_bytes: int
    damaged_blobs: int
    drift: int
    disk_free_bytes: int
    #: None where the file system does not count inodes.
    disk_free_inodes: int | None = None
    disk_reserve_bytes: int
    #: When the blob that was not hashed for longest was hashed.
    oldest_verified_at: datetime | None = None


class RunMetrics(Struct, frozen=True, kw_only=True):
    """How the agent's cycles went."""

    at: datetime
    seconds: float
    failures: int
    #: How many cycles ended how, by outcome.
    totals: dict[str, int] = {}
    succeeded_at: datetime | None = None
    next_at: datetime | None = None


class NodeMetrics(Struct, frozen=True, kw_only=True):
    """Everything that is told; None where it could not be found out."""

    models: tuple[ModelMetrics, ...] | None = None
    network: NetworkMetrics | None = None
    store: StoreMetrics | None = None
    run: RunMetrics | None = None
    #: When a snapshot was last fetched and accepted; None: never from the address in the settings.
    heard_at: datetime | None = None
    #: The generation that each configured server was last told of, by its name.
    servers: dict[str, int] = {}
    #: Incidents ever logged, by kind.
    incidents: dict[str, int] = {}


def registry(figures: Callable[[], NodeMetrics], now: Callable[[], datetime]) -> CollectorRegistry:
    """Return a registry that asks for *figures* at each scrape."""
    from prometheus_client import CollectorRegistry

    made = CollectorRegistry()
    made.register(_Collector(figures, now))
    return made


def render(figures: NodeMetrics, now: datetime) -> bytes:
    """Return *figures* in Prometheus' text format, as node exporter's textfile collector reads it."""
    from prometheus_client import generate_latest

    text: bytes = generate_latest(registry(lambda: figures, lambda: now))
    return text


def serve(
    address: tuple[str, int], figures: Callable[[], NodeMetrics], now: Callable[[], datetime], healthy: Callable[[], str] = lambda: ""
) -> tuple[int, Callable[[], None]]:
    """
    Serve the figures at *address*, and at ``/-/healthy`` whether the agent is healthy: 200, or 503 with what *healthy* says is wrong.

    Return the port, a free one for 0, and what ends the server.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    import threading
    from wsgiref.simple_server import make_server

    from prometheus_client import make_wsgi_app
    from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler

    figures_app = make_wsgi_app(registry(figures, now))

    def app(request: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        if request["PATH_INFO"] != "/-/healthy":
            body: Iterable[bytes] = figures_app(request, respond)
            return body
        wrong = healthy()
        respond("503 Service Unavailable" if wrong else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{wrong or 'healthy'}\n".encode()]

    server = make_server(*address, app, ThreadingWSGIServer, handler_class=_SilentHandler)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, end


class _Collector:
    """The collector of one registry."""

    def __init__(self, figures: Callable[[], NodeMetrics], now: Callable[[], datetime]) -> None:
        self._figures = figures
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Give the families of one scrape."""
        figures, now = self._figures(), self._now()
        yield _family("build_info", "Which reconcile this is.", [({"version": __version__}, 1.0)])
        if figures.models is not None:
            yield from _models(figures.models)
        if figures.network is not None:
            yield from _network(figures.network, now)
        text = "When a snapshot was last fetched and accepted, even if it was the same as before."
        yield from _one("network_last_heard_timestamp_seconds", text, figures.heard_at)
        if figures.store is not None:
            yield from _store(figures.store)
        if figures.servers:
            text = "Generation with which the server was last reloaded; compare it with reconcile_generation."
            yield _family("serve_generation", text, _by("server", figures.servers))
        if figures.run is not None:
            yield from _run(figures.run)
        yield _family("incidents_total", "Incidents ever logged, by kind.", _by("kind", figures.incidents), counter=True)


Samples = list[tuple[dict[str, str], float]]


def _family(name: str, text: str, samples: Samples, *, counter: bool = False) -> Metric:
    """Return one family; *samples* with their labels, all with the same ones."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = tuple(samples[0][0]) if samples else ()
    kind = CounterMetricFamily if counter else GaugeMetricFamily
    made = kind(f"reconcile_{name}", text, labels=labels)
    for labelled, value in samples:
        made.add_metric([labelled[label] for label in labels], value)
    return made


def _one(name: str, text: str, value: float | datetime | None) -> Iterator[Metric]:
    if value is not None:
        yield _family(name, text, [({}, _number(value))])


def _number(value: float | datetime) -> float:
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _by(label: str, values: dict[str, int]) -> Samples:
    return [({label: key}, float(values[key])) for key in sorted(values)]


_OF_MODELS = (
    ("model_bytes", "Bytes of the model's files.", "bytes"),
    ("model_attempts", "Failed attempts since it last worked.", "attempts"),
    ("model_state_since_timestamp_seconds", "When the model came into its state.", "since"),
    ("model_tested_timestamp_seconds", "When the last test job ended.", "tested_at"),
    ("model_test_load_seconds", "How long the last test job took to load the model.", "load_seconds"),
    ("model_test_run_seconds", "How long the last test job took to answer.", "run_seconds"),
    ("model_test_tokens_per_second", "Tokens a second of the last test job.", "tokens_per_second"),
)


def _models(models: tuple[ModelMetrics, ...]) -> Iterator[Metric]:
    counts = dict.fromkeys(STATES, 0)
    for model in models:
        counts[model.state] += 1
    yield _family("models", "Models by state.", _by("state", counts))
    states: Samples = [({"model": model.id, "state": state}, float(model.state == state)) for model in models for state in STATES]
    yield _family("model_state", "1 for the state in which the model is, 0 for the others.", states)
    unfetched: Samples = [({"model": model.id}, float(model.unfetched)) for model in models]
    yield _family("model_unfetched", "1 while no source gives the model's bytes, else 0.", unfetched)
    held: Samples = [({"model": model.id}, float(model.held)) for model in models]
    yield _family("model_held", "1 while a rollback holds the model back, else 0.", held)
    for name, text, field in _OF_MODELS:
        known = [(model.id, getattr(model, field)) for model in models]
        yield _family(name, text, [({"model": model}, _number(value)) for model, value in known if value is not None])


def _network(of: NetworkMetrics, now: datetime) -> Iterator[Metric]:
    left = (of.snapshot_expires_at - now).total_seconds()
    yield _family("snapshot_info", "Which lock this node acts on.", [({"network": of.network, "lock": of.lock}, 1.0)])
    yield from _one("snapshot_version", "Version of the snapshot.", of.snapshot_version)
    yield from _one("snapshot_expires_timestamp_seconds", "When the snapshot expires.", of.snapshot_expires_at)
    yield from _one(
        "snapshot_expiry_seconds", "Seconds until the snapshot expires, at the time of this sample; negative once it has expired.", left
    )
    yield from _one("root_version", "Version of the trust root.", of.root_version)
    yield from _one("root_expires_timestamp_seconds", "When the trust root expires.", of.root_expires_at)
    yield from _one("floor_version", "The newest snapshot version ever accepted.", of.floor_version)
    refused: Samples = [({"reason": of.refused}, 1.0)] if of.refused else []
    yield _family("refused", "1 while the snapshot or the lock is refused, with the error's name; nothing new is installed then.", refused)


def _store(of: StoreMetrics) -> Iterator[Metric]:
    yield from _one("generation", "Number of the active generation.", of.generation)
    text = "Number of the last generation for which the activated hook succeeded."
    yield from _one("activated_generation", text, of.activated_generation)
    yield from _one("store_blobs", "Blobs in the store.", of.blobs)
    yield from _one("store_blob_bytes", "Bytes of the blobs in the store.", of.blob_bytes)
    yield from _one("store_archived_bytes", "Bytes in cold storage.", of.archived_bytes)
    yield from _one("store_damaged_blobs", "Blobs whose bytes no longer match their digest.", of.damaged_blobs)
    yield from _one("store_drift", "Ways in which the store differs from what the last run left.", of.drift)
    text = "When the blob whose last check is the oldest was hashed; 0: one was never hashed."
    yield from _one("store_oldest_verification_timestamp_seconds", text, of.oldest_verified_at)
    yield from _one("disk_free_bytes", "Free bytes on the store's file system.", of.disk_free_bytes)
    yield from _one("disk_free_inodes", "Free inodes on the store's file system, one for each file and folder.", of.disk_free_inodes)
    yield from _one("disk_reserve_bytes", "Free bytes that are never used.", of.disk_reserve_bytes)


def _run(of: RunMetrics) -> Iterator[Metric]:
    yield from _one("last_run_timestamp_seconds", "When the last cycle ended.", of.at)
    yield from _one("last_run_duration_seconds", "How long the last cycle took.", of.seconds)
    yield from _one("last_success_timestamp_seconds", "When a cycle last ended without an error.", of.succeeded_at)
    yield from _one("next_run_timestamp_seconds", "When the next cycle begins.", of.next_at)
    yield from _one("run_failures", "Cycles in a row that ended with an error.", of.failures)
    yield _family("runs_total", "Cycles by outcome.", _by("outcome", of.totals), counter=True)
