"""ObjectStore protocol and its value types."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from sdpipeline.errors import BadInputError

# AWS refuses longer keys, and most file systems refuse longer names.
_MAX_KEY_BYTES = 1024
_MAX_SEGMENT_BYTES = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """Object in storage; ``version_id`` is None if the store keeps no versions.

    ``stored_at`` is the time of its arrival by the store's clock; only ``head`` sets it.
    """

    key: str
    sha256: str
    size_bytes: int
    version_id: str | None = None
    retained_until: datetime | None = None
    stored_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectVersion:
    """Entry in a key's history; a delete marker hides older ones."""

    version_id: str | None
    is_delete_marker: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Retention of an object: the number of days without deletion or overwriting, and S3's mode for it."""

    mode: str
    days: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """Capability of a store, found by a test; ``detail`` names the consequence if it is missing."""

    name: str
    ok: bool
    detail: str


class ObjectStore(Protocol):
    """Objects under slash-separated keys. Safe to use from several threads.

    If the store does not answer, every method raises StorageUnavailableError after its own retries.
    """

    def put(self, key: str, data: bytes, *, content_type: str, retained: bool = False) -> StoredObject:
        """Create the object unless it exists, read it back and compare.

        If the same bytes already exist, the put succeeds, so a retry after a lost reply does too; other bytes raise
        ObjectConflictError. ``retained`` asks for the retention that the store is configured with.
        """

    @property
    def retention(self) -> Retention | None:
        """Retention that ``retained`` asks for; None if objects are not locked."""

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        """Return the whole object; raises ObjectMissingError."""

    def head(self, key: str) -> StoredObject | None:
        """Return the object's description without its bytes, as its writer declared it; verification uses ``get``."""

    def move(self, key: str, to: str) -> None:
        """Put the object under another key, as ``put`` does, and then remove it from the first.

        Raises ObjectMissingError, and ObjectConflictError if other bytes are under the new key.
        In a bucket with versions the old key keeps its history.
        """

    def url(self, key: str) -> str:
        """Return the object's ``file://`` or ``s3://`` URL."""

    def link(self, key: str, *, expires_s: int = 3600) -> str:
        """Return a URL that a browser can open without credentials for ``expires_s`` seconds."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield every key that begins with ``prefix``, in no guaranteed order."""

    def versions(self, key: str) -> Sequence[ObjectVersion]:
        """Return the key's history in no guaranteed order; one entry without an id if the store keeps no versions."""

    def delete(self, key: str) -> None:
        """Remove the object with its whole history, so that it cannot be read again; succeed if it does not exist."""

    def check(self) -> None:
        """Raise SettingsError within 15 seconds, with a hint what to check, if the store cannot be accessed."""

    def losses(self) -> Mapping[str, str]:
        """Features that the store refuses and that puts do without, each with the consequence."""

    def probe(self) -> Sequence[Capability]:
        """Test what this store can do, on an object of its own that is removed afterwards."""


def check_key(key: str) -> str:
    """Return the key if every store can hold it and it stays inside its store; else raise BadInputError.

    A segment may not begin with a dot: this excludes ``..`` and reserves such names for the store.
    """
    segments = key.split("/")
    too_long = len(key.encode()) > _MAX_KEY_BYTES or any(len(part.encode()) > _MAX_SEGMENT_BYTES for part in segments)
    if too_long or "\\" in key or not key.isprintable() or any(not part or part.startswith(".") for part in segments):
        raise BadInputError(f"{key!r} is not a storage key")
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix if the keys under it are inside the store; else raise BadInputError."""
    folder = prefix.rpartition("/")[0]
    if folder:
        check_key(folder)
    return prefix


def delete_all(store: ObjectStore, prefix: str, *, but: Collection[str] = ()) -> int:
    """Delete all objects under a prefix except those under the stems ``but``; return the number deleted."""
    extra = [key for key in store.list(prefix) if not key.startswith(tuple(but))]
    # Sidecars last, because they name the other objects.
    for key in sorted(extra, key=lambda each: each.endswith(".json")):
        store.delete(key)
    return len(extra)
