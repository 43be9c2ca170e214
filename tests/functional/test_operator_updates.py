"""The network's operator replaces versions: what the commands do by default, what they say, and what they refuse."""

from __future__ import annotations

from tests.functional.test_operator import Terminal, ready, terminal

__all__ = ["ready", "terminal"]  # fixtures
URL = "--url https://models.example.org/tiny.gguf"


def states(at: Terminal) -> dict[str, tuple[str, list[str]]]:
    return {model["id"]: (model["state"], model["replaces"]) for model in at.json("snapshot inspect snapshot.json")["models"]}


def test_a_new_version_replaces_the_enabled_one_by_default(ready: Terminal) -> None:
    said = ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL}")

    assert states(ready) == {"tiny:v1": ("retired", []), "tiny:v2": ("enabled", ["tiny:v1"])}
    assert "tiny:v2 replaces tiny:v1, which is retired: each node serves it until tiny:v2 is active there" in said


def test_the_next_version_replaces_the_newest_alone(ready: Terminal) -> None:
    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL}")
    ready(f"snapshot add snapshot.json tiny:v3 tiny.gguf {URL}")

    assert states(ready) == {"tiny:v1": ("retired", []), "tiny:v2": ("retired", ["tiny:v1"]), "tiny:v3": ("enabled", ["tiny:v2"])}


def test_beside_keeps_both(ready: Terminal) -> None:
    said = ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL} --beside")

    assert states(ready) == {"tiny:v1": ("enabled", []), "tiny:v2": ("enabled", [])}
    assert "replaces" not in said


def test_with_several_enabled_versions_the_operator_names_one(ready: Terminal) -> None:
    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL} --beside")
    before = ready.bytes("snapshot.json")

    ready(f"snapshot add snapshot.json tiny:v3 tiny.gguf {URL}", code=1)

    assert "2 versions of tiny are enabled: tiny:v1, tiny:v2" in ready.err
    assert "--replaces" in ready.err
    assert ready.bytes("snapshot.json") == before
    ready(f"snapshot add snapshot.json tiny:v3 tiny.gguf {URL} --replaces tiny:v1")
    assert states(ready) == {"tiny:v1": ("retired", []), "tiny:v2": ("enabled", []), "tiny:v3": ("enabled", ["tiny:v1"])}


def test_a_model_of_another_name_may_be_the_replacement(ready: Terminal) -> None:
    ready(f"snapshot add snapshot.json small:v1 tiny.gguf {URL} --replaces tiny:v1")

    assert states(ready) == {"small:v1": ("enabled", ["tiny:v1"]), "tiny:v1": ("retired", [])}


def test_a_disabled_version_replaces_nothing(ready: Terminal) -> None:
    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL} --state disabled")

    assert states(ready) == {"tiny:v1": ("enabled", []), "tiny:v2": ("disabled", [])}


def test_removing_says_what_stops_serving(ready: Terminal) -> None:
    ready("snapshot remove snapshot.json tiny:v1")

    assert "tiny:v1 stops serving at once on every node" in ready.err


def test_disabling_says_what_stops_serving(ready: Terminal) -> None:
    ready("snapshot set-state snapshot.json tiny:v1 disabled")

    assert "tiny:v1 stops serving at once on every node" in ready.err


def test_removing_what_was_replaced_and_never_enabled_again_says_so_too(ready: Terminal) -> None:
    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL}")

    ready("snapshot remove snapshot.json tiny:v1")

    assert "tiny:v1 stops serving at once on every node" in ready.err  # a node that has not got v2 yet still serves it


def test_a_difference_says_what_stops_serving(ready: Terminal) -> None:
    (ready.folder / "before.json").write_bytes(ready.bytes("snapshot.json"))
    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL}")
    assert "stops serving" not in ready("snapshot diff before.json snapshot.json")
    assert ready.json("snapshot diff before.json snapshot.json")["stopped"] == []

    ready("snapshot remove snapshot.json tiny:v1")

    assert "! tiny:v1 stops serving at once on every node" in ready("snapshot diff before.json snapshot.json")
    assert ready.json("snapshot diff before.json snapshot.json")["stopped"] == ["tiny:v1"]


def test_archiving_a_version_that_is_replaced_is_no_outage(ready: Terminal) -> None:
    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL}")

    ready("snapshot set-state snapshot.json tiny:v1 archived")

    assert "stops serving" not in ready.err


def test_a_retired_model_that_nothing_replaces_is_not_signed(ready: Terminal) -> None:
    ready("snapshot set-state snapshot.json tiny:v1 retired")

    ready("snapshot sign snapshot.json --key carol.key", code=1)

    assert "tiny:v1 is retired, and no listed model replaces it" in ready.err
    assert "hint: enable it, remove it, or add its replacement" in ready.err


def test_an_update_is_signed_and_accepted(ready: Terminal) -> None:
    from tests.functional.test_operator import accepted

    ready(f"snapshot add snapshot.json tiny:v2 tiny.gguf {URL}")
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")

    assert {model.id: model.state for model in accepted(ready).snapshot.models} == {"tiny:v1": "retired", "tiny:v2": "enabled"}
