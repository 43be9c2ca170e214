"""Each error has a name of its own, a cause and a hint: the reference page is made from them."""

from __future__ import annotations

from reconciler.core import errors


def test_every_error_has_a_name_of_its_own_a_cause_and_a_hint() -> None:
    listed = errors.reference()
    assert len({one.name for one in listed}) == len(listed) > 25
    for one in listed:
        assert one.cause.endswith("."), one
        assert one.hint, one
        assert one.exit_code in {1, 4, 5, 6, 64}, one


def test_the_reference_is_in_the_order_of_families() -> None:
    names = [one.name for one in errors.reference()]
    assert names[:5] == ["error", "usage", "bad-settings", "untrusted-file", "stale-plan"]
    assert names.index("trust") < names.index("bad-envelope") < names.index("publish") < names.index("source-failed") < names.index("store")


def test_a_hint_that_is_given_where_an_error_is_raised_replaces_the_general_one() -> None:
    assert errors.Rollback("old").hint == errors.Rollback.hint
    assert errors.Rollback("old", hint="do this").hint == "do this"
