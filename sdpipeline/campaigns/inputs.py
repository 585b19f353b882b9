"""Input pictures: looked up under an allowed root, checked, and identified by their SHA-256."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdpipeline.errors import BadInputError, InputImageError, ObjectMissingError, StorageUnavailableError
from sdpipeline.storage import ForeignObject, ForeignObjects, is_bucket_url, is_under, split_url
from sdpipeline.storage.keys import input_key

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
        """Storage key of the picture."""
        return input_key(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputObject:
    """A checked picture that stays in its bucket, pinned by ``version``: see ``ImageSource``."""

    url: str
    version: str
    sha256: str
    width: int
    height: int


class InputFolder:
    """Reader that checks each picture once and caches the result; it opens nothing outside the allowed roots.

    ``allowed`` are folders, by default the campaign's own. ``buckets`` are ``s3://bucket/prefix``, by default none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        allowed: Sequence[Path] = (),
        buckets: Sequence[str] = (),
        foreign: ForeignObjects | None = None,
        max_pixels: int,
    ) -> None:
        self.folder = folder.resolve()
        self.allowed = [root.resolve() for root in allowed] or [self.folder]
        self.buckets = list(buckets)
        self.max_pixels = max_pixels
        self.found: dict[str, InputFile] = {}
        self._foreign = foreign or ForeignObjects()
        self._pinned: dict[str, InputObject] = {}
        self._unavailable: StorageUnavailableError | None = None

    def open(self, name: str) -> InputFile:
        """Return the picture of that name, relative to the campaign's folder; raises InputImageError."""
        if name not in self.found:
            self.found[name] = self._check(name)
        return self.found[name]

    def open_object(self, url: str) -> InputObject:
        """Return the picture at ``s3://bucket/key``; raises InputImageError."""
        if url not in self._pinned:
            self._pinned[url] = self._check_object(url)
        return self._pinned[url]

    def admit(self, url: str) -> None:
        """Check the address alone; raises InputImageError unless ``s3://bucket/key`` is under an allowed prefix."""
        try:
            split_url(url)
        except BadInputError as error:
            raise InputImageError(f"{_shown(url)} is not s3://bucket/key") from error
        if not any(is_under(url, root) for root in self.buckets):
            raise InputImageError(f"{_shown(url)} lies outside the allowed buckets: see SDP_INPUTS__ALLOWED")

    def table(self, name: str) -> Path:
        """Return the path of that table, fetched if it is in a bucket; raises InputImageError."""
        return self._fetched(name) if is_bucket_url(name) else self.locate(name)

    def matching(self, pattern: str) -> list[str]:
        """List the files below the campaign's folder that match a glob, sorted, without hidden ones.

        Raises InputImageError.
        """
        if pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
            raise InputImageError(f"{_shown(pattern)} is not a pattern inside the campaign's folder")
        try:
            paths = [path.relative_to(self.folder) for path in self.folder.glob(pattern) if not path.is_dir()]
        except (ValueError, OSError, NotImplementedError) as error:
            raise InputImageError(f"{_shown(pattern)} is not a pattern: {error}") from error
        names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
        if not names:
            raise InputImageError(f"{_shown(pattern)} matches no file")
        for name in names:
            self.locate(name)
        return names

    def locate(self, name: str) -> Path:
        """Return the path of that regular file, links followed; raises InputImageError."""
        shown = _shown(name)
        try:
            path = (self.folder / name).resolve()
            if not any(path.is_relative_to(root) for root in self.allowed):
                raise InputImageError(f"{shown} lies outside the allowed folders: see SDP_INPUTS__ALLOWED")
            # Reading a pipe would block for ever, and a device never ends.
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputImageError(f"{shown} is not a regular file")
        except OSError as error:
            raise InputImageError(f"{shown} cannot be read: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:  # an embedded NUL; a link that leads to itself
            raise InputImageError(f"{shown} is not a file name") from error
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
        width, height = self._size(name, data)
        digest = hashlib.sha256(data).hexdigest()
        return InputFile(path=path, sha256=digest, size_bytes=len(data), width=width, height=height)

    def _check_object(self, url: str) -> InputObject:
        self.admit(url)
        found = self._read(url)
        if len(found.data) > LARGEST_INPUT_BYTES:
            raise InputImageError(f"{_shown(url)} is larger than {LARGEST_INPUT_BYTES >> 20} MiB")
        width, height = self._size(url, found.data)
        digest = hashlib.sha256(found.data).hexdigest()
        return InputObject(url=url, version=found.version, sha256=digest, width=width, height=height)

    def _size(self, name: str, data: bytes) -> tuple[int, int]:
        from sdpipeline.provenance import inspect  # many campaigns have no pictures, and C2PA's library is large

        try:
            return inspect(data, max_pixels=self.max_pixels)
        except InputImageError as error:
            raise InputImageError(f"{name!r}: {error}") from error

    def _read(self, url: str) -> ForeignObject:
        with self._asking(url):
            return self._foreign.read(url, most_bytes=LARGEST_INPUT_BYTES)

    def _fetched(self, url: str) -> Path:
        self.admit(url)
        folder = Path(tempfile.mkdtemp(prefix="sdpipeline-table-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = folder / f"table{PurePosixPath(url).suffix}"
        with self._asking(url):
            self._foreign.fetch(url, path)
        return path

    @contextmanager
    def _asking(self, url: str) -> Iterator[None]:
        """Translate a bucket's errors into InputImageError. An unavailable bucket is not asked again."""
        if self._unavailable is not None:
            raise InputImageError(f"{_shown(url)} cannot be read: {self._unavailable}") from self._unavailable
        try:
            yield
        except ObjectMissingError as error:
            raise InputImageError(str(error)) from error
        except StorageUnavailableError as error:
            self._unavailable = error
            raise InputImageError(f"{_shown(url)} cannot be read: {error}") from error


def _shown(name: str) -> str:
    return repr(name if len(name) <= LONGEST_SHOWN else name[:LONGEST_SHOWN] + "...")
