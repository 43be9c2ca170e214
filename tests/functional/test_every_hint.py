"""Every hint in the source has a row that makes its situation (``tests/hints.py``); none is left out, and no row is about a hint of old."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from reconciler.cli import cli
from tests.functional.test_hints_node import LOCKED, SERVING
from tests.functional.test_hints_operator import ROWS
from tests.hints import covers, inventory

TOP = Path(__file__).parents[2]

#: Hints whose situation another test makes, since it takes more than a row: that test asserts the words here.
ELSEWHERE = {
    "`reconcile apply` fetches it again": (
        "tests/functional/test_rollback.py",
        "test_a_rollback_to_what_cold_storage_lost_is_refused_and_named",
    ),
    "use that version or a newer one; a store is not converted back": (
        "tests/functional/test_versions.py",
        "test_what_a_newer_version_wrote_is_refused_with_what_to_do_and_not_changed",
    ),
    "export a bundle without --since and import that": (
        "tests/functional/test_bundle.py",
        "test_a_bundle_whose_earlier_one_was_not_imported_says_so",
    ),
    "another content is another version, as in name:v2": (
        "tests/unit/test_publish_snapshots.py",
        "test_a_duplicate_is_refused",
    ),
    "name one: hf://{}/{}": (
        "tests/functional/test_add_from_a_hub.py",
        "test_what_the_hub_says_is_checked_where_it_can_be",
    ),
    "`hf auth login` signs in, or HF_TOKEN": (
        "tests/functional/test_add_from_a_hub.py",
        "test_what_the_hub_says_is_checked_where_it_can_be",
    ),
    "accept its terms on the hub, and sign in": (
        "tests/functional/test_add_from_a_hub.py",
        "test_a_hub_that_shows_nothing_of_a_gated_model_is_told_from_one_that_has_none",
    ),
    "its server wants a login: `hf auth login` or HF_TOKEN for hf://": (
        "tests/functional/test_add_from_a_hub.py",
        "test_a_gated_model_needs_the_token_and_the_token_never_reaches_the_cdn",
    ),
    "the PIN is wrong; a token locks itself after a few of those": (
        "tests/functional/test_hardware_keys.py",
        "test_a_token_that_does_not_sign_for_the_key_changes_nothing",
    ),
    "`pkcs11-tool --keypairgen --key-type EC:edwards25519` makes one": (
        "tests/functional/test_hardware_keys.py",
        "test_a_key_that_is_not_ed25519_is_not_shown_as_one",
    ),
    "some tokens show public keys only to who knows the PIN: give --passphrase-file": (
        "tests/functional/test_hardware_keys.py",
        "test_a_key_that_is_not_ed25519_is_not_shown_as_one",
    ),
    "`pip install python-pkcs11` installs it": (
        "tests/functional/test_hardware_keys.py",
        "test_without_the_package_for_tokens_it_is_named",
    ),
    "`nvidia-smi -L` lists them; libnvidia-ml.so.1 must be found": (
        "tests/unit/test_device_nodes.py",
        "test_doctor_names_what_keeps_test_jobs_from_a_gpu_and_a_driver_that_names_none",
    ),
    "engines that are built for it use it in test jobs all the same": (
        "tests/unit/test_device_nodes.py",
        "test_doctor_says_of_an_amd_gpu_what_is_not_read_of_it",
    ),
    "give --publisher-key FILE, or --publisher-ca FILE and --identity NAME": (
        "tests/functional/test_model_signatures.py",
        "test_whose_signature_it_must_be_is_said",
    ),
    "--publisher-ca is for certificates, --publisher-key for bare keys": (
        "tests/functional/test_model_signatures.py",
        "test_a_signature_that_is_not_over_these_files_by_this_key_adds_nothing",
    ),
    "check it on a machine with a network: `model_signing verify sigstore`": (
        "tests/functional/test_model_signatures.py",
        "test_a_signature_that_is_not_over_these_files_by_this_key_adds_nothing",
    ),
    "`model_signing verify` checks it; add the model without --model-signature": (
        "tests/functional/test_model_signatures.py",
        "test_a_signature_that_is_not_over_these_files_by_this_key_adds_nothing",
    ),
    "`pip install model-signing` installs it": (
        "tests/functional/test_model_signatures.py",
        "test_without_the_library_it_is_named",
    ),
    "name a longer prefix, or objects": (
        "tests/functional/test_add_from_a_bucket.py",
        "test_a_bucket_with_more_objects_than_a_model_has_files_is_refused",
    ),
    "what served before serves again; `reconcile rollback --list` shows": (
        "tests/functional/test_rollback.py",
        "test_rollback_to_what_the_node_is_not_healthy_with_goes_back",
    ),
    "run `reconcile apply`: it puts a damaged ledger aside": (
        "tests/unit/test_ledger.py",
        "test_what_the_database_refuses_says_what_to_do",
    ),
    "; or name the file itself": (
        "tests/functional/test_linked_files.py",
        "test_a_link_in_a_folder_that_others_may_write_to_is_refused",
    ),
}
#: Hints of an error's kind that are never printed, since each place that raises it gives a better one: they stand in the reference.
GENERAL = (
    "`reconcile doctor` checks this machine for problems",
    "run `reconcile lock` to make the lock and its envelope",
    "what was accepted before stays in use; ask the network's operator for the current signed document",
    "it is tried again on the next run; `reconcile incidents` shows what each source answered",
    "free some space, or run `reconcile gc --dry-run` to see what can go",
    "`reconcile verify --repair` downloads what is damaged again",
    "`reconcile status MODEL` shows the test's report; `reconcile retry MODEL` tries again at once",
    "`reconcile doctor` says what is missing; installing bubblewrap usually is enough",
    "`pip install llama-cpp-python` installs the engine llama-cpp; `reconcile doctor` names the engines that are missing",
)
_ROWS = [row.hint for row in (*ROWS, *LOCKED, *SERVING)]


def test_every_hint_of_the_source_has_a_row() -> None:
    known = [*_ROWS, *ELSEWHERE, *GENERAL]
    found = inventory()
    assert len(found) > 200
    assert [f"{places[0]}: {text}" for text, places in found.items() if not any(covers(row, text) for row in known)] == []


def test_every_row_is_about_a_hint_of_the_source() -> None:
    found = inventory()
    assert [row for row in (*_ROWS, *ELSEWHERE, *GENERAL) if not any(covers(row, text) for text in found)] == []


@pytest.mark.parametrize(("hint", "place"), ELSEWHERE.items())
def test_a_hint_whose_situation_another_test_makes_is_asserted_there(hint: str, place: tuple[str, str]) -> None:
    file, name = place
    text = (TOP / file).read_text()
    (test,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    said = [node.value for node in ast.walk(test) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words = max((part.strip("`;: ") for part in re.split(r"\{\}|`", hint)), key=len)
    assert any(words in one for one in said), f"{place} says nothing of {words!r}"


@pytest.mark.parametrize("hint", GENERAL)
def test_a_hint_of_a_kind_of_error_stands_in_the_reference_and_names_commands_that_are_there(hint: str) -> None:
    assert hint in (TOP / "docs/reference/errors.md").read_text()
    for command in re.findall(r"`reconcile ([^`]+)`", hint):
        words = [word for word in shlex.split(command) if word != "MODEL"]
        found = cli.get_command(click.Context(cli), words[0])
        assert found is not None
        found.make_context(words[0], [*words[1:], *(["a:v1"] if "MODEL" in command else [])])


def test_the_inventory_sees_every_way_in_which_a_hint_is_written() -> None:
    found = inventory()
    for text in (
        "confirm with --yes",  # a keyword
        "rename the folder, or put it elsewhere",  # a variable
        "needs a kernel of 6.2 or newer with Landlock in its lsm= list",  # a table
        "a bucket's refusal?",  # the first part of a sum
        "convert it to GGUF, for example with llama.cpp's convert_hf_to_gguf.py",  # a constant behind a name
        "name the server's command as argv in [runtime.openai]",  # a function's table
        "every node refuses these bytes: correct the URL, or add the new content as another version",  # a positional argument
        "its models stay pending until [runtime.{}] in the settings is corrected",  # part of a tuple
        "wait for it, or pass --lock-timeout 30s",  # an error's own
    ):
        assert any(text in one for one in found), text
