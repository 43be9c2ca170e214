"""Commands about the settings themselves: config show, config check; and completion for shells."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options

if TYPE_CHECKING:
    from rich.console import Console


@click.group()
def config() -> None:
    """
    Show and check the settings of this node.

    Each key has a default. reconcile.toml wins over it, an environment variable such as RECONCILE_STORE_PATH wins over the file, and the
    command line wins over all.
    """


@config.command("show")
@click.option("--changed", is_flag=True, help="Only keys that the file or the environment sets.")
@common_options()
def config_show(context: CommandContext, *, changed: bool) -> None:
    """
    Show every setting with where its value comes from.

    The output is a settings file. Secrets are left out.

    \b
      reconcile config show
      RECONCILE_STORE_PATH=/srv/store reconcile config show --changed
    """
    from reconciler.commands import configuration

    settings, file = context.settings(), context.config_file
    data = file.read_bytes() if file else b""
    found = configuration.show(settings, file, data, os.environ)
    shown = tuple(one for one in found if not changed or one.origin != "default")

    def show(to: Console) -> None:
        to.print(f"# {file or 'no settings file: the defaults, relative to this folder'}", markup=False)
        for line in configuration.to_toml(shown):
            to.print(line, markup=False)

    context.show({"schema": 1, "file": str(file) if file else None, "base": settings.base, "settings": shown}, show)


@config.command("check")
@common_options()
def config_check(context: CommandContext) -> int:
    """
    Check the settings, and that the files and programs that they name are there. Exit code 1 if something is wrong.

    \b
      reconcile config check
    """
    from reconciler.commands import configuration
    from reconciler.commands.context import from_settings

    settings, file = context.settings(), context.config_file
    from_settings(settings)
    found = configuration.check(settings)

    def show(to: Console) -> None:
        for one in found:
            to.print(f"{one.key}: {one.text}", style="red", markup=False)
            if one.hint:
                to.print(f"  hint: {one.hint}", style="dim", markup=False)
        count = len(found)
        verdict = "no errors" if not found else f"{count} thing{'' if count == 1 else 's'} to correct"
        to.print(f"{file or 'no settings file, the defaults'}: {verdict}", markup=False)

    context.show({"schema": 1, "ok": not found, "file": str(file) if file else None, "findings": found}, show)
    return 1 if found else 0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """
    Print the completion script for a shell: commands, options and model ids.

    \b
      reconcile completion bash > ~/.local/share/bash-completion/completions/reconcile
      reconcile completion zsh > ~/.zfunc/_reconcile
      reconcile completion fish > ~/.config/fish/completions/reconcile.fish
    """
    from click.shell_completion import get_completion_class

    from reconciler.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, "reconcile", "_RECONCILE_COMPLETE").source()
    click.echo(script)
