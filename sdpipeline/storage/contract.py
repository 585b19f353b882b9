"""What every store promises, and the values it answers with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from sdpipeline.errors import BadInputError

# AWS refuses longer keys, most file systems longer names.
_MAX_KEY_BYTES = 1024
_MAX_SEGMENT_BYTES = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What storage holds under a key; ``version_id`` is None where the store keeps no versions.

    ``stored_at`` is when it came there by the store's clock, where that was asked with ``head``.
    """

    key: str
    sha256: str
    size_bytes: int
    version_id: str | None = None
    retained_until: datetime | None = None
    stored_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectVersion:
    """One entry in a key's history; a delete marker hides what is older."""

    version_id: str | None
    is_delete_marker: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """For how many days an object may be neither deleted nor overwritten, and by which of S3's modes."""

    mode: str
    days: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One thing a store may be able to do, tried and not assumed; ``detail`` says what we do without it."""

    name: str
    ok: bool
    detail: str


class ObjectStore(Protocol):
    """Objects under slash-separated keys. Safe to use from several threads.

    Where a store does not answer, every method raises StorageUnavailableError after its own retries.
    """

    def put(self, key: str, data: bytes, *, content_type: str, retained: bool = False) -> StoredObject:
        """Creates the object unless it exists, reads it back and compares.

        The same bytes already there are success, so a retry after a lost reply is too; other bytes
        raise ObjectConflictError. ``retained`` asks for the retention that the store is set up with.
        """

    @property
    def retention(self) -> Retention | None:
        """What ``retained`` asks for; None where nothing is locked."""

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        """The whole object; raises ObjectMissingError."""

    def head(self, key: str) -> StoredObject | None:
        """What is there without its bytes, as its writer declared it; a verification uses ``get``."""

    def move(self, key: str, to: str) -> None:
        """Puts the object under another key, as ``put`` does, and only then takes it away from the first.

        Raises ObjectMissingError, and ObjectConflictError where other bytes are under the new key; in a bucket with
        versions the old key keeps its history.
        """

    def url(self, key: str) -> str:
        """The object's address, ``file://`` or ``s3://``."""

    def link(self, key: str, *, expires_s: int = 3600) -> str:
        """An address that a browser opens without credentials for ``expires_s`` seconds."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Every key that begins with ``prefix``, in no promised order."""

    def versions(self, key: str) -> Sequence[ObjectVersion]:
        """The key's history in no promised order; one entry without an id where no versions are kept."""

    def delete(self, key: str) -> None:
        """Removes the object with its whole history, so that nothing of it can be read again; what is not there is
        success."""

    def check(self) -> None:
        """Raises SettingsError within 15 seconds, saying what to check, unless the store lets us in."""

    def losses(self) -> Mapping[str, str]:
        """Features that the store was found to refuse and that puts do without, each with the consequence."""

    def probe(self) -> Sequence[Capability]:
        """What this store can do, found out by doing it to an object of its own that is removed again."""


def check_key(key: str) -> str:
    """The key itself if every store can hold it and it stays inside its store; else BadInputError.

    A segment may not begin with a dot: that keeps ``..`` out and such names free for the store's own use.
    """
    segments = key.split("/")
    too_long = len(key.encode()) > _MAX_KEY_BYTES or any(len(part.encode()) > _MAX_SEGMENT_BYTES for part in segments)
    if too_long or "\\" in key or not key.isprintable() or any(not part or part.startswith(".") for part in segments):
        raise BadInputError(f"{key!r} is not a storage key")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself if the keys under it are inside the store; else BadInputError."""
    folder = prefix.rpartition("/")[0]
    if folder:
        check_key(folder)
    return prefix


def delete_all(store: ObjectStore, prefix: str, *, but: Collection[str] = ()) -> int:
    """Delete what lies under a prefix, save under the stems ``but``; returns how many objects that were."""
    gone = [key for key in store.list(prefix) if not key.startswith(tuple(but))]
    # The sidecars last: they name the rest.
    for key in sorted(gone, key=lambda each: each.endswith(".json")):
        store.delete(key)
    return len(gone)
