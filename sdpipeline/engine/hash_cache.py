"""Cache of SHA-256 hashes by the identity of a file: device, inode, size, mtime_ns and ctime_ns."""

from __future__ import annotations

import json
import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path

SETTLED_S = 2.0
"""A file that changed more recently is not cached: its next change could have the same timestamp."""
MAX_ENTRIES = 20_000


@dataclass(frozen=True, slots=True)
class StatKey:
    """Identity of a file's content. ``ctime_ns`` changes with every write and rename, and cannot be set back."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, about: os.stat_result) -> StatKey:
        """Return the key of a file from its stat."""
        return cls(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)

    def __str__(self) -> str:
        return ":".join(map(str, astuple(self)))


class HashCache:
    """Hash cache in one file of the home. ``plan`` and ``checkpoints list`` use it; a worker hashes at every load."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        self._changed = False

    def get(self, key: StatKey) -> str | None:
        """Return the hash of an unchanged file; ``None`` if it has to be read."""
        return self._known.get(str(key))

    def put(self, key: StatKey, sha256: str) -> None:
        """Store the hash of a file, unless its last change is too recent to detect the next one by timestamp."""
        if time.time_ns() - key.ctime_ns > SETTLED_S * 1e9:
            self._known[str(key)] = sha256
            self._changed = True

    def save(self) -> None:
        """Write the cache, readable by its owner only, if the home is already in use."""
        home = self._path.parent
        if not self._changed or not home.is_dir() or not any(home.iterdir()):
            return
        newest = dict(list(self._known.items())[-MAX_ENTRIES:])
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(newest, file)
            part.replace(self._path)
        except OSError:  # without the cache, files are only hashed again
            return
        self._changed = False


def _read(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, str) and len(value) == 64}
