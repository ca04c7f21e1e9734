"""`lmaas completion`: the script with which a shell completes the commands."""

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and names in SHELL.

    \b
    bash: add to ~/.bashrc    eval "$(lmaas completion bash)"
    zsh:  add to ~/.zshrc     eval "$(lmaas completion zsh)"
    fish: lmaas completion fish > ~/.config/fish/completions/lmaas.fish
    """
    script = SHELLS[shell](context.find_root().command, {}, "lmaas", "_LMAAS_COMPLETE")
    # The method of the base class, because that of bash also runs bash, to check its version.
    click.echo(ShellComplete.source(script))
