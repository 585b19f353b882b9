"""Pictures from outside: found under an allowed root, checked, and known by their SHA-256 from then on."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpipeline.errors import InputImageError
from sdpipeline.provenance import decode

LARGEST_INPUT_BYTES = 256 * 1024 * 1024
LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A checked input picture; ``width`` and ``height`` are its decoded size in pixels."""

    path: Path
    sha256: str
    size_bytes: int
    width: int
    height: int

    @property
    def key(self) -> str:
        """Where it lies in storage."""
        return input_key(self.sha256)


def input_key(sha256: str) -> str:
    """The storage key of an input."""
    return f"inputs/{sha256}"


class InputFolder:
    """Reads each picture once and remembers what it was; nothing outside the allowed roots is opened."""

    def __init__(self, folder: Path, *, allowed: Sequence[Path] = (), max_pixels: int) -> None:
        self.folder = folder.resolve()
        self.allowed = [root.resolve() for root in allowed] or [self.folder]
        self.max_pixels = max_pixels
        self.found: dict[str, InputFile] = {}

    def open(self, name: str) -> InputFile:
        """The picture of that name, relative to the campaign's folder; raises InputImageError."""
        if name not in self.found:
            self.found[name] = self._check(name)
        return self.found[name]

    def locate(self, name: str) -> Path:
        """The regular file of that name, links followed; raises InputImageError."""
        shown = repr(name if len(name) <= LONGEST_SHOWN else name[:LONGEST_SHOWN] + "...")
        try:
            path = (self.folder / name).resolve()
            if not any(path.is_relative_to(root) for root in self.allowed):
                raise InputImageError(f"{shown} lies outside the allowed folders: see SDP_INPUTS__ALLOWED")
            # A pipe would wait for ever, and a device never ends.
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputImageError(f"{shown} is no regular file")
        except OSError as error:
            raise InputImageError(f"{shown} cannot be read: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:  # an embedded NUL; a link that leads to itself
            raise InputImageError(f"{shown} is no file name") from error
        return path

    def _check(self, name: str) -> InputFile:
        path = self.locate(name)
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST_INPUT_BYTES + 1)
        except OSError as error:
            raise InputImageError(f"{name!r} cannot be read: {error.strerror}") from error
        if len(data) > LARGEST_INPUT_BYTES:
            raise InputImageError(f"{name!r} is larger than {LARGEST_INPUT_BYTES >> 20} MiB")
        try:
            pixels = decode(data, max_pixels=self.max_pixels)
        except InputImageError as error:
            raise InputImageError(f"{name!r}: {error}") from error
        digest = hashlib.sha256(data).hexdigest()
        height, width, _ = pixels.shape
        return InputFile(path=path, sha256=digest, size_bytes=len(data), width=width, height=height)
