"""Processes forked from one that has imported the libraries already: a fresh interpreter takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
"""Context for real processes. Modules that read settings from the environment on import are not preloaded."""
processes.set_forkserver_preload(
    [
        "alembic.command",
        "boto3",
        "c2pa",
        "numpy",
        "PIL.Image",
        "psycopg",
        "rich.table",
        "sdpipeline.app.services",
        "sdpipeline.app.workers",
        "sdpipeline.engine.fake",
        "tests.factories",
        "tests.integration.processes",
        "typer",
    ]
)


def run_command(
    words: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path, timeout_s: float
) -> int:
    """Run one command of the command line in a process of its own; return its exit code.

    The process has the given environment and this process's folder. Its output goes into two files.
    """
    process = processes.Process(target=_command, args=(list(words), dict(environment), str(output), str(errors)))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"no end after {timeout_s} s: {' '.join(words)}")
    return process.exitcode


def _command(words: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, output), (2, errors)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    # Prefect reads its settings from the environment when it is imported.
    assert "prefect" not in sys.modules
    sys.argv = ["sdpipeline", *words]
    from sdpipeline import cli

    cli.main(words)
