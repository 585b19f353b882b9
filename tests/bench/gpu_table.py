"""Markdown table of GPU benchmark results: ``python -m tests.bench.gpu_table``; ``--small`` runs on any machine.

Each row is a command that runs in a new process, so that cold starts are cold; the commands are printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SDPIPELINE = (sys.executable, "-m", "sdpipeline")


@dataclass(frozen=True, slots=True)
class Line:
    """A benchmark command with its settings, the figures to report and their target."""

    name: str
    words: tuple[str, ...]
    aim: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line as a user types it."""
        given = [f"{name}={value}" for name, value in self.settings.items()]
        return " ".join([*given, "bench", *self.words])

    def figures(self, home: str) -> str:
        """The results of the run, as text."""
        found = _document((*self.words, "--home", home), self.settings)
        return _pipeline(found) if "share_of_engine" in found else _engine(found)


FULL = (
    Line(
        "SDXL 1024x1024, 20 steps, guided, bfloat16: cold start",
        ("engine", "--checkpoint", "sdxl", "--batch", "1", "--batch", "8", "--rounds", "5"),
        ">= 1.8 pictures/s on an H200, >= 64 % of the ceiling",
    ),
    Line(
        "the same once more: warm start",
        ("engine", "--checkpoint", "sdxl", "--batch", "1", "--batch", "8", "--rounds", "5"),
        "first picture sooner than cold",
    ),
    Line(
        "SDXL as above, profile fast: the same without fp8",
        ("engine", "--checkpoint", "sdxl", "--profile", "fast", "--batch", "1", "--batch", "8", "--rounds", "5"),
        "what fp8 is compared with",
        {"SDP_ENGINE__DTYPE": "bfloat16", "SDP_ENGINE__COMPILE": "true"},
    ),
    Line(
        "SDXL as above, profile fast in fp8",
        ("engine", "--checkpoint", "sdxl", "--profile", "fast", "--batch", "1", "--batch", "8", "--rounds", "5"),
        ">= 2.4 pictures/s on an H200, image difference stated",
        {"SDP_ENGINE__DTYPE": "bfloat16", "SDP_ENGINE__COMPILE": "true", "SDP_ENGINE__QUANTIZE": "fp8"},
    ),
    Line(
        "SD 1.5 512x512, 20 steps, guided",
        ("engine", "--checkpoint", "sd15", "--batch", "1", "--batch", "8", "--batch", "32", "--rounds", "5"),
        ">= 12 pictures/s",
    ),
    Line(
        "SDXL, the whole line",
        ("pipeline", "--checkpoint", "sdxl", "--batch", "8", "--batches", "8"),
        ">= 0.97 of the engine alone",
    ),
)
_FEW = ("--width", "64", "--height", "64", "--num-inference-steps", "1", "--rounds", "1")
SMALL = (
    Line("shapes 64x64: cold start", ("engine", "--batch", "1", "--batch", "2", *_FEW), "that it runs"),
    Line(
        "shapes 64x64, profile fast in int8",
        ("engine", "--profile", "fast", "--batch", "2", *_FEW),
        "that it runs",
        {"SDP_ENGINE__QUANTIZE": "int8"},
    ),
    Line("shapes, the whole line", ("pipeline", "--batch", "2", "--batches", "2", *_FEW), "that it runs"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, one line after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the shipped checkpoint, in a minute on a CPU")
    parser.add_argument("--home", help="where checkpoints and the embedded database are; default a temporary folder")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sdp-gpu-table-") as temporary:
        home = asked.home or temporary
        print("| what | command | found | aimed at |\n|---|---|---|---|")
        for line in SMALL if asked.small else FULL:
            found = line.figures(home)
            print(f"| {line.name} | `{line.command}` | {found} | {line.aim} |", flush=True)


def _document(words: Sequence[str], settings: Mapping[str, str]) -> Any:
    command, environment = [*SDPIPELINE, "bench", *words, "--json"], {**os.environ, **settings}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr + done.stdout)
    return json.loads(done.stdout)


def _engine(found: Any) -> str:
    best = max(found["rows"], key=lambda row: row["pictures_per_s"])
    start_s = found["build_s"] + found["first_batch_s"][0]["seconds"]
    told = [
        f"{best['pictures_per_s']:.3g} pictures/s in batches of {best['batch']}",
        f"{best['tflop_per_s']:.3g} TFLOP/s, {best['share_of_ceiling']:.1%} of the ceiling",
        f"{best['against_plain']:.2f} times a plain loop",
        f"first picture after {start_s:.1f} s",
    ]
    if apart := found["differs_from_exact"]:
        told.append(f"{apart['grey_levels']:.2f} grey levels and {apart['decibels']} dB from exact")
    return ", ".join([*told, *_gpu(found)])


def _pipeline(found: Any) -> str:
    told = [f"{found['share_of_engine']:.3f} of the engine alone", f"{found['against_plain']:.2f} times a plain loop"]
    return ", ".join([*told, *_gpu(found)])


def _gpu(found: Any) -> list[str]:
    idle = found["device_idle_share"]
    return [] if idle is None else [f"the GPU is idle for {idle:.2%} of the time"]


if __name__ == "__main__":
    main()
