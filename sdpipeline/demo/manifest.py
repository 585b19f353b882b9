"""SHA-256 manifest of the shipped checkpoints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = ("shapes", "shapes-canny", "shapes-upscale")

Manifest = Mapping[str, Mapping[str, str]]
"""Checkpoint name, then POSIX path of a file in it, to the file's sha256."""


def measure_manifest(directory: Path = CHECKPOINTS) -> Manifest:
    """Compute the manifest from the files."""
    return {
        name: {
            file.relative_to(directory / name).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((directory / name).rglob("*"))
            if file.is_file()
        }
        for name in NAMES
        if (directory / name).is_dir()
    }


def read_manifest(directory: Path = CHECKPOINTS) -> Manifest:
    """Read the manifest that was written with the weights."""
    manifest: Manifest = json.loads((directory / "MANIFEST.json").read_text())
    return manifest


def write_manifest(directory: Path) -> None:
    """Write the manifest of the current files."""
    text = json.dumps(measure_manifest(directory), indent=2) + "\n"
    (directory / "MANIFEST.json").write_text(text)


def size_bytes(directory: Path = CHECKPOINTS) -> int:
    """Return the total size of all checkpoint files."""
    return sum(file.stat().st_size for name in NAMES for file in (directory / name).rglob("*") if file.is_file())
