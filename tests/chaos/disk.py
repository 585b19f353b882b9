"""A file system small enough to be filled to its last byte."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder on a file system of its own."""

    folder: Path

    def fill(self) -> None:
        """Fill the file system completely."""
        with (self.folder / ".ballast").open("ab", buffering=0) as ballast:
            try:
                while ballast.write(bytes(CHUNK)):
                    pass
            except OSError:
                return

    def free(self) -> None:
        """Free the space again."""
        (self.folder / ".ballast").unlink()


@contextmanager
def small_disk(folder: Path, *, size_mib: int) -> Iterator[Disk]:
    """A new in-memory file system mounted at ``folder``; skips the test if this user may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a disk that fills up has to be mounted, and only root may: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path, at: Path) -> Iterator[Path]:
    """A read-only mount of the folder's contents; skips the test if this user may not mount."""
    at.mkdir()
    mounted = subprocess.run(["mount", "--bind", folder, at], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a read-only disk has to be mounted, and only root may: {mounted.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", at], check=True)
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)
