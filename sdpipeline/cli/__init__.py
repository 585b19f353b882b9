"""The command line: every command, and how errors become exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from sdpipeline import __version__
from sdpipeline.cli import (
    auditing,
    bench,
    campaigns,
    checkpoints,
    demo,
    deploying,
    exporting,
    forgetting,
    operations,
    pictures,
    reconciling,
    start,
    verifying,
)
from sdpipeline.cli.output import print_mistakes, stdout
from sdpipeline.errors import (
    AuditBrokenError,
    BadInputError,
    DatabaseUnavailableError,
    Mistake,
    OrchestratorUnavailableError,
    SdpError,
    StorageUnavailableError,
)
from sdpipeline.storage.private import private_files

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="sdpipeline",
    help="Batch image generation with a queue that loses nothing and pictures that prove what made them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"sdpipeline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


demo.add_to(app)
start.add_to(app)
campaigns.add_to(app)
pictures.add_to(app)
verifying.add_to(app)
exporting.add_to(app)
forgetting.add_to(app)
checkpoints.add_to(app)
deploying.add_to(app)
operations.add_to(app)
auditing.add_to(app)
reconciling.add_to(app)
bench.add_to(app)

_UNUSABLE = {
    AuditBrokenError: ("SDP_DATABASE_URL", "sdpipeline reconcile --adopt"),
    DatabaseUnavailableError: (
        "SDP_DATABASE_URL",
        "check that the server runs, and host, port and password",
    ),
    StorageUnavailableError: ("SDP_STORAGE_URL", "check the endpoint, the bucket and its credentials"),
    OrchestratorUnavailableError: ("PREFECT_API_URL", "check that the Prefect server runs there"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0, 1, 2, 3, 130 or 143."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(words))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command; an error that is not ours keeps its traceback and ends as 1."""
    with private_files():
        return _run(arguments, as_json="--json" in arguments)


def _run(arguments: Sequence[str], *, as_json: bool) -> int:
    try:
        return int(app(list(arguments), standalone_mode=False) or DONE)
    except typer.Exit as ended:
        return ended.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except TyperException as error:
        print_mistakes([Mistake(message=error.format_message(), fix="see --help")], as_json=as_json)
        return BAD_INPUT
    except BadInputError as error:
        print_mistakes(error.mistakes, as_json=as_json)
        return BAD_INPUT
    except tuple(_UNUSABLE) as error:
        key, fix = next(advice for kind, advice in _UNUSABLE.items() if kind in type(error).mro())
        print_mistakes([Mistake(key=key, message=str(error), fix=fix)], as_json=as_json)
        return BAD_INPUT
    except SdpError as error:
        print_mistakes([Mistake(message=str(error))], as_json=as_json)
        return FAILED
