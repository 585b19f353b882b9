"""The table of figures on a GPU, as markdown: ``python -m tests.bench.gpu_table``; ``--small`` on whatever there is.

Each line is a command of ours in a process of its own, so that a start is a start; the commands are printed with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SDPIPELINE = (sys.executable, "-m", "sdpipeline")


@dataclass(frozen=True, slots=True)
class Line:
    """A command, what of its document is told, and what is aimed at."""

    name: str
    words: tuple[str, ...]
    aim: str

    def figures(self, home: str) -> str:
        """What it found, in words."""
        found = _document((*self.words, "--home", home))
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
    Line("shapes, the whole line", ("pipeline", "--batch", "2", "--batches", "2", *_FEW), "that it runs"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the shipped checkpoint, in a minute on a CPU")
    parser.add_argument("--home", help="where checkpoints and the embedded database are; default a temporary folder")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sdp-gpu-table-") as temporary:
        home = asked.home or temporary
        print("| what | command | found | aimed at |\n|---|---|---|---|")
        for line in SMALL if asked.small else FULL:
            found = line.figures(home)
            print(f"| {line.name} | `bench {' '.join(line.words)}` | {found} | {line.aim} |", flush=True)


def _document(words: Sequence[str]) -> Any:
    done = subprocess.run([*SDPIPELINE, "bench", *words, "--json"], capture_output=True, text=True, check=False)
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
    return ", ".join([*told, *_gpu(found)])


def _pipeline(found: Any) -> str:
    told = [f"{found['share_of_engine']:.3f} of the engine alone", f"{found['against_plain']:.2f} times a plain loop"]
    return ", ".join([*told, *_gpu(found)])


def _gpu(found: Any) -> list[str]:
    idle = found["device_idle_share"]
    return [] if idle is None else [f"the GPU waits {idle:.2%} of the time"]


if __name__ == "__main__":
    main()
