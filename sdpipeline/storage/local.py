"""Object store in a local directory."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sdpipeline.errors import Mistake, ObjectConflictError, ObjectMissingError, SettingsError, StorageUnavailableError
from sdpipeline.storage.contract import Capability, ObjectVersion, StoredObject, check_key, check_prefix


class LocalStore:
    """Objects as files under one directory, durable once ``put`` returns.

    A file is written under a temporary name, flushed, and then linked to its key:
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
            raise StorageUnavailableError(f"{path} returned different bytes than were written: check the disk")
        if found != data:
            raise ObjectConflictError(f"{path} already holds different bytes")
        return StoredObject(key=key, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    @property
    def retention(self) -> None:
        """See ObjectStore; the owner of a file can always change it."""
        return

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
        """See ObjectStore; the file is hashed, because no other record of it exists."""
        try:
            data = self.get(key)
            stored_at = datetime.fromtimestamp(self._path(key).stat().st_mtime, UTC)
        except (ObjectMissingError, FileNotFoundError):
            return None
        return StoredObject(key=key, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), stored_at=stored_at)

    def move(self, key: str, to: str) -> None:
        """See ObjectStore; the file gets its second name before it loses the first, and is not rewritten."""
        data, path, target = self.get(key), self._path(key), self._path(to)
        try:
            _make_directory(target.parent)
            try:
                os.link(path, target)
            except FileExistsError:
                if target.read_bytes() != data:
                    raise ObjectConflictError(f"{target} already holds different bytes") from None
            _flush_directory(target.parent)
            path.unlink(missing_ok=True)
            _flush_directory(path.parent)
        except OSError as error:
            raise _unavailable(error, path) from error

    def url(self, key: str) -> str:
        """Return the file's ``file://`` URL."""
        return self._path(key).as_uri()

    def link(self, key: str, *, expires_s: int = 3600) -> str:  # noqa: ARG002
        """Return the same as ``url``: access to the directory needs no credentials."""
        return self.url(key)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ObjectStore."""
        folder = check_prefix(prefix).rpartition("/")[0]
        top = self._root / folder
        for path in _files(top):
            if (key := path.relative_to(self._root).as_posix()).startswith(prefix):
                yield key

    def versions(self, key: str) -> Sequence[ObjectVersion]:
        """See ObjectStore."""
        return [ObjectVersion(version_id=None, is_delete_marker=False)] if self._path(key).is_file() else []

    def delete(self, key: str) -> None:
        """See ObjectStore; folders that become empty are kept."""
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _flush_directory(path.parent)
        except NotADirectoryError:
            return
        except OSError as error:
            raise _unavailable(error, path) from error

    def check(self) -> None:
        """See ObjectStore."""
        try:
            _make_directory(self._incoming)
        except OSError as error:
            message = f"{self._root} cannot be written: {error.strerror or error}"
            fix = "name a writable directory with free space"
            raise SettingsError(Mistake(key="SDP_STORAGE_URL", message=message, fix=fix)) from error

    def losses(self) -> Mapping[str, str]:
        """See ObjectStore; a directory refuses no features."""
        return {}

    def probe(self) -> Sequence[Capability]:
        """See ObjectStore."""
        key = f"probe/{secrets.token_hex(16)}"
        self.put(key, b"probe", content_type="text/plain")
        self._path(key).unlink()
        return [
            Capability(name="conditional put", ok=True, detail="link() creates and never overwrites"),
            Capability(name="versions", ok=False, detail="a replaced seal is detected only by its digest"),
            Capability(
                name="object lock", ok=False, detail="users with write access can delete seals: export the audit log"
            ),
        ]

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
    # A new name survives a power failure only once its directory has been written too.
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _unavailable(error: OSError, path: Path) -> StorageUnavailableError:
    return StorageUnavailableError(f"{path}: {error.strerror or error}")
