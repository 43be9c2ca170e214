"""Who signs sees each value that is signed, and each one that changed; for any snapshot."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core import snapshot
from reconciler.publish import contents, differences
from tests.network import Document, Network, compact

NETWORK = Network()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS.map(lambda text: f"x_{text}"), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def models(draw: st.DrawFn, name: str) -> Document:
    made = NETWORK.model(name, path=draw(st.sampled_from(["m.gguf", "a b/ü.gguf", 'q"[x].gguf', "x.gguf"])))
    made |= draw(st.dictionaries(TEXTS.map(lambda text: f"x_{text}"), ANY, max_size=2))
    made["artifacts"][0] |= draw(st.dictionaries(st.sampled_from(["x_note", "x_from"]), ANY, max_size=2))
    made["artifacts"] += draw(st.lists(FURTHER, max_size=2, unique_by=lambda one: one["path"]))
    made["smoke"] = {"task": "completion", "prompt": draw(TEXTS), "expect": {"min_tokens": draw(st.integers(0, 9)), "text": None}}
    made["smoke"] |= draw(st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**32 - 1), "timeout": st.sampled_from(["5s", "2h"])}))
    made["smoke"]["expect"] |= draw(EXPECTED)
    return made | draw(OF_A_MODEL)


COUNTS = st.integers(0, 2**40)
HOSTS = st.sampled_from(["a.example", "*.b.example", "c.example"])
#: Each known field of an artifact, a test job's answer, a model and a snapshot that may be there or not.
FURTHER = st.builds(
    lambda fixed, content, more: fixed | {"digest": f"sha256:{content[0] * 64}", "size": content[1]} | more,
    st.fixed_dictionaries(
        {
            "path": st.sampled_from(["extra/a.bin", "extra/b.bin", "LICENSE"]),
            "urls": st.lists(st.sampled_from(["https://a.example/1", "s3://bucket/2"]), min_size=1, max_size=2, unique=True),
        }
    ),
    st.sampled_from([("1", 0), ("2", 7), ("3", 2**40)]),  # one content has one size wherever it is listed
    st.fixed_dictionaries({}, optional={"unpack": st.none(), "role": st.sampled_from(["licence", "config", "other"])}),
)
EXPECTED = st.fixed_dictionaries(
    {},
    optional={
        "regex": TEXTS.filter(str.isalnum),
        "tokens": st.none() | st.lists(COUNTS, min_size=1, max_size=3),
        "min_rate": COUNTS,
        "dimension": st.integers(1, 99),
        "answer": st.none() | st.fixed_dictionaries({"tokens": st.lists(COUNTS, min_size=3, max_size=4), "sure": st.just([0, 2])}),
    },
)
OF_A_MODEL = st.fixed_dictionaries(
    {},
    optional={
        "state": st.sampled_from(["enabled", "disabled", "archived", "retired"]),
        "requires": st.lists(st.sampled_from(["replaces", "later"]), max_size=2, unique=True),
        "tasks": st.sampled_from([["completion"], ["chat", "completion"], ["completion", "embedding"]]),
        "runtime": st.fixed_dictionaries({"engine": st.sampled_from(["llama-cpp", "vllm"])}, optional={"version": st.just(">=1,<2")}),
        "gpu_memory": COUNTS,
        "memory": COUNTS,
        "publisher": ANY,
    },
)
OF_A_SNAPSHOT = st.fixed_dictionaries(
    {},
    optional={
        "sources": st.fixed_dictionaries(
            {},
            optional={
                "fallback": st.lists(st.just("https://f.example/{algorithm}/{hex}"), max_size=1),
                "allow_node_fallback": st.booleans(),
                "redirects": st.dictionaries(st.sampled_from(["a.example", "d.example"]), st.lists(HOSTS, max_size=2, unique=True)),
            },
        ),
        "names": st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["v1", "v2"]), max_size=2),
        "rollouts": st.dictionaries(
            st.sampled_from(["one", "two"]),
            st.fixed_dictionaries(
                {},
                optional={
                    "models": st.lists(st.sampled_from(["a:v1", "b:v2"]), max_size=2, unique=True),
                    "per_10000": st.integers(0, 10_000),
                    "cohorts": st.lists(st.sampled_from(["canary", "eu"]), max_size=2, unique=True),
                },
            ),
            max_size=2,
        ),
        "retest_after": st.sampled_from(["7d", "12h"]),
    },
)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    names = draw(st.lists(st.sampled_from(["a:v1", "b:v1", "b:v2", "c.d-e:v1.0"]), max_size=3, unique=True))
    made = NETWORK.snapshot_document(*[draw(models(name)) for name in names], version=1)
    return made | draw(OF_A_SNAPSHOT) | draw(st.dictionaries(TEXTS.map(lambda text: f"x_{text}"), ANY, max_size=2))


def leaves(value: Any) -> list[Any]:
    """Return every value that is neither an object nor a list, and every empty one."""
    if isinstance(value, dict | list) and value:
        return [leaf for child in (value.values() if isinstance(value, dict) else value) for leaf in leaves(child)]
    return [value]


def seen(document: Document) -> tuple[contents.Value, ...]:
    payload = compact(document)
    return contents.values(payload, snapshot.decode(payload))


@settings(deadline=None)
@given(documents())
def test_each_signed_value_is_shown_once_and_nothing_else(document: Document) -> None:
    shown = seen(document)
    assert len({one.place for one in shown}) == len(shown)
    found = sorted(json.dumps(leaf) for one in shown for leaf in leaves(one.value))
    assert found == sorted(json.dumps(leaf) for leaf in leaves(document))


@settings(deadline=None)
@given(documents())
def test_what_is_shown_is_one_line_a_value_and_reads_back_as_it_was_signed(document: Document) -> None:
    shown = seen(document)
    lines = [line for line in contents.lines(shown) if line]
    assert len(lines) == len(shown)
    assert all(line.isprintable() for line in lines)
    for one in shown:
        assert json.loads(contents.shown(one.value)) == one.value


def place_of(change: differences.Changed) -> str:
    if not change.id:
        return change.field
    return f"models[{change.id}]{'' if change.field.startswith('[') else '.'}{change.field}"


def places(document: Document) -> dict[str, str]:
    return {one.place: json.dumps(one.value) for one in seen(document) if one.place != "models"}


@settings(deadline=None)
@given(documents(), documents(), st.randoms(use_true_random=False))
def test_a_difference_names_each_value_that_changed_and_no_other(before: Document, after: Document, random: Any) -> None:
    after = copy.deepcopy(after)
    random.shuffle(after["models"])
    found = differences.diff(NETWORK.sign_snapshot(before), NETWORK.sign_snapshot(after))
    was, now_is = places(before), places(after)
    named = {place_of(one): one for one in (*found.changed, *found.listed)}
    assert len(named) == len(found.changed) + len(found.listed)
    header = {"version", "issued_at", "expires_at"}
    assert named.keys() == {place for place in was.keys() | now_is.keys() if was.get(place) != now_is.get(place)} - header
    for place, one in named.items():
        assert (place in was, place in now_is) == {"add": (False, True), "remove": (True, False), "change": (True, True)}[one.op]


@settings(deadline=None)
@given(documents(), st.randoms(use_true_random=False))
def test_another_order_is_no_difference(document: Document, random: Any) -> None:
    mixed = copy.deepcopy(document)
    random.shuffle(mixed["models"])
    found = differences.diff(NETWORK.sign_snapshot(document), NETWORK.sign_snapshot(mixed))
    assert (found.changed, found.listed, found.summary) == ((), (), ())


def test_a_value_that_equals_another_in_python_alone_is_a_difference() -> None:
    one, other = (NETWORK.sign_snapshot(NETWORK.snapshot_document(version=1, x_flag=value)) for value in (1, True))
    (change,) = differences.diff(one, other).changed
    assert (change.field, change.before, change.after) == ("x_flag", 1, True)


def test_what_nodes_ignore_is_marked() -> None:
    document = NETWORK.snapshot_document(NETWORK.model("a:v1") | {"colour": {"deep": "red"}}, version=1)
    (one,) = [one for one in seen(document) if not one.known]
    assert (one.place, one.model, one.value) == ("models[a:v1].colour.deep", "a:v1", "red")
    assert any(line.endswith('"red"    (nodes of this version ignore it)') for line in contents.lines((one,)))


def test_the_document_in_a_report_is_the_payload() -> None:
    from reconciler.publish import snapshots

    payload = compact(NETWORK.snapshot_document(NETWORK.model("a:v1"), version=1, x_more=[1]))
    report = msgspec.json.encode(snapshots.inspect(NETWORK.sign_snapshot(payload)))
    assert payload in report
