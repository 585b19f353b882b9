"""Command-line application: registration of commands, and the run of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, TextIO

import typer
from typer.exceptions import TyperException

from sdpipeline import __version__
from sdpipeline.cli.exit_codes import DONE, INTERRUPTED, explained
from sdpipeline.cli.output import print_mistakes, stdout
from sdpipeline.cli.streams import READER_GONE, flushed, prepare_streams, reader_is_gone, silence
from sdpipeline.errors import SdpError
from sdpipeline.private_files import private_files

_COMMANDS = {
    "demo": ("demo",),
    "scaffold": ("init", "schema"),
    "campaigns": ("plan", "submit", "run", "status", "jobs", "show", "retry", "cancel", "pause", "resume"),
    "reproduce": ("reproduce",),
    "verify": ("verify",),
    "export": ("export",),
    "retention": ("retention", "erase"),
    "checkpoints": ("checkpoints",),
    "deploy": ("deploy", "schedule", "prefect-gateway"),
    "operations": ("worker", "doctor", "db"),
    "audit": ("audit",),
    "reconcile": ("reconcile",),
    "bench": ("bench",),
}
"""Commands of each module, in the order of ``--help``."""


def application(words: Sequence[str] = ()) -> typer.Typer:
    """Build the Typer application; with the words of one command, import only that command's module."""
    app = typer.Typer(
        name="sdpipeline",
        help="Batch image generation with a durable queue, an audit log and signed pictures.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    wanted = [module for module, commands in _COMMANDS.items() if words and words[0] in commands]
    for module in wanted or ([] if "--version" in words[:1] else _COMMANDS):
        import_module(f"{__name__}.{module}").add_to(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"sdpipeline {__version__}")
        raise typer.Exit


def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its exit code: 0, 1, 2, 3, 130, 141 or 143."""
    _close_stdin()
    prepare_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(flushed(run(words)))


def _close_stdin() -> None:
    """Replace stdin by an empty file: no command reads it, and a library that prompts there gets an end of file."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.dup2(descriptor, 0)
    if descriptor:
        os.close(descriptor)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error that is not ours keeps its traceback and exits with 1."""
    stdout_before = sys.stdout
    with private_files():
        return _run(arguments, as_json="--json" in arguments, stdout_before=stdout_before)


def _run(arguments: Sequence[str], *, as_json: bool, stdout_before: TextIO) -> int:
    try:
        return int(application(arguments)(list(arguments), standalone_mode=False) or DONE)
    except SystemExit as ended:
        return _after_broken_pipe(ended, stdout_before)
    except typer.Exit as ended:
        return ended.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except (TyperException, UnicodeEncodeError, SdpError, OSError) as error:
        found = explained(error)
        if found is None:
            raise
        mistakes, exit_code = found
        print_mistakes(mistakes, as_json=as_json)
        return exit_code


def _after_broken_pipe(ended: SystemExit, stdout_before: TextIO) -> int:
    """Return the exit code for a closed reader: Typer and rich turn any BrokenPipeError into SystemExit."""
    cause, replaced = ended.__context__, sys.stdout is not stdout_before
    sys.stdout = stdout_before
    if not isinstance(cause, BrokenPipeError):
        raise ended
    if replaced and not reader_is_gone():  # a socket that is not a standard stream
        raise cause from None
    silence()
    return READER_GONE
