"""A campaign connects only to addresses that its settings name: connects of all processes are traced, as is DNS."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.commands import environment
from tests.integration.single_files import pack
from tests.integration.tiny_checkpoints import tiny_checkpoints

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

CONNECT = re.compile(r'connect\(\d+, \{sa_family=AF_INET6?,.*?port=htons\((\d+)\).*?"([0-9a-f.:]+)"')
SEND = re.compile(r'send(?:msg|mmsg)\(.*sa_family=AF_INET6?,.*?port=htons\((\d+)\).*?"([0-9a-f.:]+)"')
CAMPAIGN = """\
name: quiet
checkpoint: shapes
seeds: {start: 0, count: 2}
defaults: {width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}
stages:
  - {id: draft, task: text-to-image, prompt: a red circle on a white background}
"""


@dataclass(frozen=True, slots=True)
class Watched:
    """A command's output, and the addresses and ports that it or its children contacted."""

    output: str
    spoken_with: frozenset[tuple[str, int]]


def watched(command: Sequence[object], folder: Path, variables: Mapping[str, str]) -> Watched:
    """Run a command under strace, which also sees the system calls of C libraries."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (Debian: strace)")
    log = folder / "connects"
    watch = [strace, "--follow-forks", "--seccomp-bpf", "--quiet=all", "--signal=none", f"--output={log}"]
    calls = "--trace=connect,sendmsg,sendmmsg"  # event loops wake themselves with a bare sendto
    words = [*watch, calls, "--", *map(str, command)]
    done = subprocess.run(words, env=dict(variables), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    text = log.read_text(errors="replace")
    found = [*CONNECT.findall(text), *SEND.findall(text)]
    return Watched(done.stdout + done.stderr, frozenset((address, int(port)) for port, address in found))


def test_a_campaign_asks_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    run = [sys.executable, "-m", "sdpipeline", "run", tmp_path / "campaign.yaml", "--home", tmp_path / "home"]
    # As a user runs it: the test does not switch analytics off; only the program does.
    asking = {name: value for name, value in environment().items() if name not in OFF}
    found = watched(run, tmp_path, asking)
    (port,) = re.findall(r"Prefect UI: http://127\.0\.0\.1:(\d+)", found.output)
    assert found.spoken_with == {("127.0.0.1", int(port))}


def test_the_conversion_of_a_single_file_asks_nobody(tmp_path: Path) -> None:
    base = tiny_checkpoints().directory("sdxl")
    file = pack(base, tmp_path / "in" / "sdxl.safetensors")
    add = [sys.executable, "-m", "sdpipeline", "checkpoints", "add", "mine", file, "--tokenizer", base]
    asking = {name: value for name, value in environment().items() if name not in OFF}
    assert watched([*add, "--home", tmp_path / "home"], tmp_path, asking).spoken_with == set()


def test_the_watch_sees_a_name_that_is_looked_up(tmp_path: Path) -> None:
    look_up = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.getaddrinfo('example.invalid', 80)"
    found = watched([sys.executable, "-c", look_up], tmp_path, environment())
    assert 53 in {port for _, port in found.spoken_with}


OFF = {"DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"}
