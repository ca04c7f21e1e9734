"""The command `lmaas doctor`."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lmaas.cli.context import Context, pass_context
from lmaas.cli.streams import is_terminal
from lmaas.config import Settings
from lmaas.errors import SettingsError

if TYPE_CHECKING:
    from lmaas.cli.doctor.findings import Finding

_STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


@click.command()
@click.pass_context
@pass_context
def doctor(context: Context, click_context: click.Context) -> None:
    """Check this setup, and say what to do about what is wrong.

    It checks the settings, Python and its packages, and the service with its key and clock; on a machine that runs a stack, or could, also
    the engine, memory, disks, port, limits and the servers that the settings name. With LMAAS_URL, this machine is a client only. Nothing
    is changed. The exit code is 1 if something is wrong.
    """
    from lmaas.cli.doctor.findings import Level

    found = []
    for finding in _checks(context):
        found.append(finding)
        if not context.as_json:
            _show(finding)
    if context.as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        click.echo(f"\n{_summary(found)}")
    if any(finding.level is Level.WRONG for finding in found):
        click_context.exit(1)


def _checks(context: Context) -> "Iterator[Finding]":
    """Run the checks, each of which reports as soon as it is done."""
    from lmaas.cli.doctor import machine, service
    from lmaas.cli.doctor.findings import ok, wrong

    try:
        settings = context.settings
        yield ok("settings", "Every variable LMAAS_… is known and has a valid value.")
    except SettingsError as error:
        yield wrong("settings", error.message, "Correct or unset the variable. What follows is checked with the default settings.")
        yield from machine.check_python()
        yield from _machine(Settings(), is_running=False)
        return
    yield from machine.check_python()
    is_running = machine.is_running(settings.home)
    if not settings.url:
        yield from _machine(settings, is_running=is_running)
        yield from service.check_database(settings)
        yield from (finding for finding in (service.check_queue(settings), service.check_objects(settings)) if finding is not None)
        yield machine.check_manifests(settings)
    yield from service.check_credentials(settings, is_running=is_running)
    yield from service.check_service(context, is_running=is_running)


def _machine(settings: Settings, *, is_running: bool) -> "Iterator[Finding]":
    from lmaas.cli.doctor import machine

    yield from machine.check_engine(settings)
    yield machine.check_processor()
    yield machine.check_memory(settings, is_running=is_running)
    yield machine.check_shared_memory()
    yield from machine.check_home(settings)
    yield machine.check_port(settings, is_running=is_running)
    yield machine.check_files(settings)


def _show(finding: "Finding") -> None:
    from rich.console import Console
    from rich.text import Text

    from lmaas.cli.tables import labelled, plain

    width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    label = f"{finding.level:<8} {finding.check:<13}"
    texts = labelled({label: plain(finding.says)}, width)
    if finding.do:
        texts += labelled({" " * len(label): plain(f"→ {finding.do}")}, width)
    text = Text("\n".join(texts))
    text.stylize(_STYLES[finding.level], 0, len(finding.level))
    Console(soft_wrap=True).print(text)


def _summary(found: "Sequence[Finding]") -> str:
    wrong, warnings = (sum(finding.level == level for finding in found) for level in ("wrong", "warning"))
    if not wrong and not warnings:
        return "All is well."
    parts = [f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong"] if wrong else ["Nothing is wrong"]
    parts += [f"{warnings} warning{'' if warnings == 1 else 's'}"] if warnings else []
    return ", ".join(parts) + "."
