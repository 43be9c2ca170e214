"""The command init: with options it asks nothing; on a terminal without any, it asks for each, and tests the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.core.errors import ReconcileError, UsageError

if TYPE_CHECKING:
    from reconciler.core.trust import TrustRoot


class Answers(msgspec.Struct, kw_only=True):
    """What is known of the network so far: from options, or from a person."""

    snapshot: str
    root: str
    fingerprint: str
    #: The root's bytes, where it was fetched.
    envelope: bytes | None = None


@click.command()
@click.option(
    "--root",
    default="",
    show_default=False,
    metavar="FILE-or-URL",
    help="The network's trust root, which init pins. A URL needs --fingerprint.",
)
@click.option(
    "--fingerprint", default="", show_default=False, help="The fingerprint that the root must have, received by another way than the file."
)
@click.option("--snapshot", default="", show_default=False, help="URL or path of the network's signed snapshot.")
@click.option(
    "--root-updates",
    default="",
    show_default=False,
    metavar="TEMPLATE",
    help="Where newer roots are. Default: {version}.root.json beside the snapshot.",
)
@click.option("--store", default="store", help="The store's folder.")
@click.option("--force", is_flag=True, help="Replace an existing reconcile.toml.")
@common_options()
def init(context: CommandContext, *, root: str, fingerprint: str, snapshot: str, root_updates: str, store: str, force: bool) -> None:
    """
    Write reconcile.toml and pin the network's trust root.

    On a terminal without --snapshot and --root, it asks for them and tests them. It also writes .gitattributes, so that git changes no
    byte of signed files, and .gitignore, so that the store is not committed.

    \b
      reconcile init
      reconcile init --root root.json --snapshot https://config.example.org/snapshot.json
    """
    from reconciler.commands import init as init_command

    here = Path.cwd()
    answers = Answers(snapshot=snapshot, root=root, fingerprint=fingerprint)
    if (here / "reconcile.toml").exists() and not force:
        raise UsageError(f"{here / 'reconcile.toml'} is there already", hint="edit it, or replace it with --force")
    if context.is_interactive and not snapshot and not root:
        _ask(answers)
    elif "://" in root:
        if not fingerprint:
            raise UsageError("a root that is fetched needs --fingerprint", hint="ask the network's operator for it, by another way")
        answers.envelope = _fetch_root(root)
    made = init_command.init(
        here,
        root_file=Path(answers.root) if answers.root and answers.envelope is None else None,
        root_envelope=answers.envelope,
        fingerprint=answers.fingerprint,
        snapshot=answers.snapshot,
        root_updates=root_updates,
        store=store,
        force=force,
    )
    context.show(made, lambda to: to.print(made.sentence, markup=False))


def _fetch_root(source: str) -> bytes:
    from reconciler.commands import documents
    from reconciler.core.node import Limits
    from reconciler.fetch.settings import FetchSettings

    return documents.fetch(source, FetchSettings(), cap=Limits().root_bytes).data or b""


def _ask(answers: Answers) -> None:
    """Ask for the snapshot and the root until both can be read and belong together, or the person leaves them out."""
    click.echo("This writes the settings of a node into this folder. Leave an answer empty to fill it in later.")
    answers.snapshot = _until_good("Address of the network's signed snapshot (a URL or a file)", "", _read_snapshot)
    trusted = _ask_for_root(answers)
    if trusted and answers.snapshot:
        _check_together(answers, trusted)


def _until_good(question: str, default: str, test: object) -> str:
    """Ask *question* until *test* accepts the answer; an empty answer is accepted, and the default is not shown where it is empty."""
    while True:
        given: str = click.prompt(question, default=default, show_default=bool(default)).strip()
        if not given:
            return ""
        try:
            test(given)  # type: ignore[operator]  # a function of one text
        except ReconcileError as error:
            click.echo(f"  {error.message}\n  {error.hint}")
            if click.confirm("  Use it all the same?", default=False):
                return given
        else:
            return given


def _read_snapshot(source: str) -> bytes:
    from reconciler.commands import documents
    from reconciler.core import dsse
    from reconciler.core.node import Limits
    from reconciler.fetch.settings import FetchSettings

    data = documents.fetch(source, FetchSettings(), cap=Limits().envelope_bytes).data or b""
    dsse.decode(data)
    return data


def _ask_for_root(answers: Answers) -> TrustRoot | None:
    from reconciler.commands import init as init_command

    default = "root.json" if Path("root.json").exists() else ""
    answers.root = _until_good("The network's trust root (a file or a URL)", default, _fetch_root)
    if not answers.root:
        return None
    envelope = _fetch_root(answers.root)
    root, found = init_command.inspect_root(envelope, answers.root)
    click.echo(f"  root {root.version} of {root.network}; its fingerprint is\n  {found}")
    if not click.confirm("Is it the fingerprint that the network's operator told you?", default=False):
        click.echo("  Ask for it by another way than the file: by telephone, or on paper. Nothing is pinned.")
        answers.root = ""
        return None
    answers.envelope, answers.fingerprint = envelope, found
    return root


def _check_together(answers: Answers, root: TrustRoot) -> None:
    from reconciler.core import trust, units

    try:
        found = trust.open_snapshot(_read_snapshot(answers.snapshot), root).snapshot
    except ReconcileError as error:
        click.echo(f"  This root does not verify that snapshot: {error.message}\n  {error.hint}")
        return
    click.echo(f"  snapshot {found.version} of {found.network}: {units.count(len(found.models), 'model')}, validly signed")
