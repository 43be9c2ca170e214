"""
Trust and lock on a network of a thousand models.

Budget: verifying and compiling take 100 ms in the process. The envelope is made once and has what real ones have: two signatures of
three keys, a test job and two sources a model, fallbacks for all.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from reconciler.core import dsse, lock, snapshot, trust
from reconciler.core.errors import BadSignature
from tests.network import Network

MODELS = 1000
FLOOR = trust.TrustState()


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(root_keys=3, root_threshold=2, snapshot_keys=3, snapshot_threshold=2)


@pytest.fixture(scope="module")
def envelope(network: Network) -> bytes:
    smoke = {"prompt": "The capital of France is", "max_tokens": 8, "expect": {"regex": "Paris", "min_tokens": 1}}
    models = [
        network.model(
            f"model-{index}:v1",
            urls=[f"https://{host}.example.org/models/model-{index}.Q4_K_M.gguf" for host in ("models", "mirror")],
            runtime={"engine": "llama-cpp", "version": ">=0.3,<0.5"},
            gpu_memory=6 << 30,
            smoke=smoke,
        )
        for index in range(MODELS)
    ]
    return network.snapshot(*models, sources={"fallback": ["https://fallback.example.org/{algorithm}/{hex}"]})


def test_verify_and_compile(benchmark: BenchmarkFixture, network: Network, envelope: bytes) -> None:
    pinned = network.root()

    def run() -> lock.Lock:
        return lock.compile(trust.verify(envelope, trust.pin(pinned), now=network.now, trust_state=FLOOR))

    found = benchmark(run)
    assert len(found.model) == MODELS


def test_verify(benchmark: BenchmarkFixture, network: Network, envelope: bytes) -> None:
    root = network.trusted()
    assert benchmark(trust.verify, envelope, root, now=network.now, trust_state=FLOOR).snapshot.version


def test_the_signature_alone(benchmark: BenchmarkFixture, network: Network, envelope: bytes) -> None:
    root = network.trusted()
    assert benchmark(trust.signed_payload, envelope, trust.SNAPSHOT_TYPE, root, root.roles.snapshot)


def test_decode_the_payload(benchmark: BenchmarkFixture, envelope: bytes) -> None:
    payload = dsse.decode(envelope)
    assert benchmark(snapshot.decode, dsse.payload_of(payload)).models


def test_encode_the_lock(benchmark: BenchmarkFixture, network: Network, envelope: bytes) -> None:
    compiled = lock.compile(trust.verify(envelope, network.trusted(), now=network.now, trust_state=FLOOR))
    assert benchmark(lock.encode, compiled)


def test_refuse_an_unsigned_snapshot_of_any_size(benchmark: BenchmarkFixture, network: Network, envelope: bytes) -> None:
    """What a stranger can make a node do: decode the envelope and check signatures, nothing of the payload."""
    root = Network("other").trusted()

    def run() -> bool:
        try:
            trust.verify(envelope, root, now=network.now, trust_state=FLOOR)
        except BadSignature:
            return True
        return False

    assert benchmark(run)
