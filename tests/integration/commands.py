"""Run the real command line in a separate process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import psutil

from sdpipeline import cli
from sdpipeline.orchestration.local_server import ServerHandle
from tests.integration.processes import run_command

SDPIPELINE = [sys.executable, "-m", "sdpipeline"]
FAKE_ENGINE = "SDP_ENGINE__FAKE_SECONDS_PER_BATCH"


def environment(**settings: str) -> dict[str, str]:
    """The environment of this process without its SDP_ settings, plus the given ones."""
    # Some terminals and libraries set COLUMNS, which changes the shape of tables.
    own = ("SDP_", "PREFECT_API", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return kept | settings


COMPUTING = frozenset({"bench", "reproduce"})
"""Commands that compute with torch, whose threads do not survive a fork."""


def sdpipeline(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end without importing the libraries again.

    The command gets a forked process, or runs in this one, which has imported torch, if it computes.
    """
    words = [*map(str, arguments)]
    if words[:1] and words[0] in COMPUTING:
        return in_this_process(words, environment(**settings))
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        exit_code = run_command(words, environment(**settings), output, errors, timeout_s=600)
        return subprocess.CompletedProcess(words, exit_code, output.read_text(), errors.read_text())


def in_this_process(words: list[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one command in this process, with these environment variables."""
    before, output, errors = dict(os.environ), io.StringIO(), io.StringIO()
    os.environ.clear()
    os.environ.update(variables)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            exit_code = cli.run(words)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return subprocess.CompletedProcess(words, exit_code, output.getvalue(), errors.getvalue())


def installed(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end in a new interpreter, as a user does."""
    words = [*SDPIPELINE, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment(**settings), timeout=600, check=False)


def document(*arguments: object, exit_code: int = 0, given: Mapping[str, str] | None = None, **settings: str) -> Any:
    """The JSON document of a command that must exit with ``exit_code``; settings may also be given as a mapping."""
    done = sdpipeline(*arguments, "--json", **{**(given or {}), **settings})
    assert done.returncode == exit_code, done.stderr + done.stdout
    return json.loads(done.stdout)


def start(*arguments: object, **settings: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own; it is still running."""
    return subprocess.Popen(
        [*SDPIPELINE, *map(str, arguments)],
        env=environment(**settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def prefect(*words: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a Prefect command to its end; it prints the logs of its flows."""
    told = environment(PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="INFO", **settings)
    command = [sys.executable, "-m", "prefect", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=told, timeout=300, check=False)


def credentials(server: ServerHandle) -> httpx.BasicAuth:
    """Basic authentication for our own Prefect server."""
    user, _, password = str(server.password).partition(":")
    return httpx.BasicAuth(user, password)


def kill_tree(process: subprocess.Popen[str]) -> int:
    """SIGKILL a command and everything it started; returns how many processes died."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait(10)
    return len(family)


def pictures(home: Path, campaign: str) -> list[Any]:
    """The jobs of a campaign, each with its picture."""
    found: list[Any] = document("jobs", campaign, "--home", home)["jobs"]
    return found
