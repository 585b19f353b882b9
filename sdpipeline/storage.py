"""Where pictures, inputs and seals are kept: objects that are written once, checked, and never overwritten."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from sdpipeline.errors import (
    BadInputError,
    ObjectConflictError,
    ObjectMissingError,
    SettingsError,
    StorageUnavailableError,
)

# AWS refuses longer keys, most file systems longer names.
_MAX_KEY_BYTES = 1024
_MAX_SEGMENT_BYTES = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What storage holds under a key; ``version_id`` is None where the store keeps no versions."""

    key: str
    sha256: str
    size_bytes: int
    version_id: str | None = None


class ObjectStore(Protocol):
    """Objects under slash-separated keys. Safe to use from several threads.

    Where a store does not answer, every method raises StorageUnavailableError after its own retries.
    """

    def put(self, key: str, data: bytes, *, content_type: str, retained: bool = False) -> StoredObject:
        """Creates the object unless it exists, reads it back and compares.

        The same bytes already there are success, so a retry after a lost reply is too; other bytes
        raise ObjectConflictError. ``retained`` asks for the retention that the store is set up with.
        """

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        """The whole object; raises ObjectMissingError."""

    def head(self, key: str) -> StoredObject | None:
        """What is there without its bytes, as its writer declared it; a verification uses ``get``."""

    def url(self, key: str) -> str:
        """The object's address, ``file://`` or ``s3://``."""

    def link(self, key: str, *, expires_s: int = 3600) -> str:
        """An address that a browser opens without credentials for ``expires_s`` seconds."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Every key that begins with ``prefix``, in no promised order."""


def open_store(url: str) -> ObjectStore:
    """The store that ``file:///directory`` or ``s3://bucket/prefix`` names."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalStore(Path(unquote(parts.path)))
    raise SettingsError(f"storage {url!r} is neither file:///directory nor s3://bucket/prefix")


class LocalStore:
    """Objects as files under one directory, durable once ``put`` returns.

    A file is written beside the others under a name of its own, flushed, and then linked to its key:
    link() refuses a name that exists, so a reader sees all of an object or nothing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._incoming = self._root / ".incoming"

    def put(self, key: str, data: bytes, *, content_type: str, retained: bool = False) -> StoredObject:  # noqa: ARG002
        """See ObjectStore; files have neither a content type nor retention."""
        path = self._path(key)
        try:
            created = self._create(path, data)
            found = path.read_bytes()
        except OSError as error:
            raise _unavailable(error, path) from error
        if found != data and created:
            raise StorageUnavailableError(f"{path} reads back other bytes than were written: check the disk")
        if found != data:
            raise ObjectConflictError(f"{path} already holds other bytes")
        return StoredObject(key=key, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        """See ObjectStore; a directory keeps no versions, so none can be asked for."""
        path = self._path(key)
        if version_id is not None:
            raise ObjectMissingError(f"{path} has no version {version_id}")
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectMissingError(f"{path} does not exist") from error
        except OSError as error:
            raise _unavailable(error, path) from error

    def head(self, key: str) -> StoredObject | None:
        """See ObjectStore; the file is hashed, for there is nobody else to ask."""
        try:
            data = self.get(key)
        except ObjectMissingError:
            return None
        return StoredObject(key=key, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def url(self, key: str) -> str:
        """The file's ``file://`` address."""
        return self._path(key).as_uri()

    def link(self, key: str, *, expires_s: int = 3600) -> str:  # noqa: ARG002
        """The same as ``url``: who can read the directory needs no credentials."""
        return self.url(key)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ObjectStore."""
        folder = prefix.rpartition("/")[0]
        top = self._path(folder) if folder else self._root
        for path in _files(top):
            if (key := path.relative_to(self._root).as_posix()).startswith(prefix):
                yield key

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _create(self, path: Path, data: bytes) -> bool:
        _make_directory(self._incoming)
        _make_directory(path.parent)
        incoming = self._incoming / secrets.token_hex(16)
        try:
            _write(incoming, data)
            os.link(incoming, path)
        except FileExistsError:
            return False
        finally:
            incoming.unlink(missing_ok=True)
        _flush_directory(path.parent)
        return True


def check_key(key: str) -> str:
    """The key itself if every store can hold it and it stays inside its store; else BadInputError.

    A segment may not begin with a dot: that keeps ``..`` out and such names free for the store's own use.
    """
    segments = key.split("/")
    too_long = len(key.encode()) > _MAX_KEY_BYTES or any(len(part.encode()) > _MAX_SEGMENT_BYTES for part in segments)
    if too_long or "\\" in key or not key.isprintable() or any(not part or part.startswith(".") for part in segments):
        raise BadInputError(f"{key!r} is not a storage key")
    return key


def _files(top: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(top), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unavailable(error, top) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _flush_directory(path.parent)


def _flush_directory(path: Path) -> None:
    # A new name survives a power cut only once its directory has been written too.
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _unavailable(error: OSError, path: Path) -> StorageUnavailableError:
    return StorageUnavailableError(f"{path}: {error.strerror or error}")
