"""Read-only access to objects in any bucket, pinned to the version that was found first."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from sdpipeline.errors import (
    BadInputError,
    ObjectConflictError,
    ObjectMissingError,
    SettingsError,
    StorageUnavailableError,
)
from sdpipeline.storage.s3 import pause, version_of
from sdpipeline.storage.s3_client import S3Options, connect
from sdpipeline.storage.s3_errors import check_reply, cut_body_errors, error_code, not_retried_errors, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)", re.DOTALL)
_MAX_KEY_BYTES = 1024
_CHUNK_BYTES = 2**20
_T = TypeVar("_T")
LARGEST_TABLE_BYTES = 16 * 2**30
"""A table is copied to this machine's temporary folder."""
# Permanent refusals by the bucket's owner. Without permission to list, S3 also answers AccessDenied for missing keys.
# A bare status is not from S3, which names each refusal of a GET: the reply was cut, or it came from a proxy.
_REFUSED = {"AccessDenied", "AllAccessDisabled", "InvalidObjectState", "NoSuchBucket"}
# A deleted version, or an id that is invalid on this server. Without a version, such a reply comes from a proxy.
_NO_VERSION = {"InvalidArgument", "MethodNotAllowed"}
_CHANGED = {"412", "PreconditionFailed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignObject:
    """Bytes of an object, and the pin that finds the same again: ``version:ID``, or ``etag:TAG`` without versions."""

    data: bytes
    version: str


def is_bucket_url(url: str) -> bool:
    """Return True if this is the URL of an object in a bucket, not of a file."""
    return url.startswith("s3://")


def split_url(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/key`` into bucket and key, without unquoting; raises BadInputError."""
    found = _URL.fullmatch(url)
    if found is None:
        raise BadInputError(f"{url!r} is not s3://bucket/key")
    bucket, key = found.groups()
    # A server that keeps objects as files may interpret such a segment as a folder.
    wrong = any(part in (".", "..") for part in key.split("/")) or not key.isprintable()
    if wrong or len(key.encode()) > _MAX_KEY_BYTES:
        raise BadInputError(f"{url!r} is not an object's address")
    return bucket, key


def is_under(url: str, root: str) -> bool:
    """Return True if an object's URL is below ``s3://bucket`` or ``s3://bucket/prefix``, compared by whole folders."""
    return url.startswith(root.rstrip("/") + "/")


@dataclass(frozen=True, slots=True)
class ForeignObjects:
    """Reader of objects by ``s3://bucket/key``, with the endpoint and the credentials of our own storage.

    Raises ObjectMissingError for an object that is missing or not readable, and StorageUnavailableError if the
    endpoint does not answer. Safe to use from several threads.
    """

    options: S3Options = field(default_factory=S3Options)
    _clients: dict[int, S3Client] = field(default_factory=dict)

    def read(self, url: str, *, most_bytes: int, version: str | None = None) -> ForeignObject:
        """Return the object; at most ``most_bytes`` and one are read.

        With ``version``, return exactly the pinned object, and raise ObjectConflictError if another is there now.
        """
        wanted = most_bytes + 1
        data, answer = self._attempted(url, version, lambda answer: _read_body(answer, wanted))
        return ForeignObject(data=data, version=_pin(answer))

    def fetch(self, url: str, to: Path) -> None:
        """Download the object into a file, in constant memory."""

        def copy(answer: Any) -> bool | None:
            if answer["ContentLength"] > LARGEST_TABLE_BYTES:
                raise ObjectMissingError(f"{url} is larger than {LARGEST_TABLE_BYTES >> 30} GiB")
            with to.open("wb") as file:
                return _copied(answer, file)

        self._attempted(url, None, copy)

    def _attempted(self, url: str, version: str | None, take: Callable[[Any], _T | None]) -> tuple[_T, Any]:
        """Return the result of ``take`` and the reply; retry if ``take`` returns None because the body was cut.

        botocore does not retry a body.
        """
        for attempt in range(self.options.total_max_attempts):
            answer = self._answer(url, version)
            if answer is not None:
                with contextlib.closing(answer["Body"]):
                    if (taken := take(answer)) is not None:
                        return taken, answer
            pause(attempt)
        raise StorageUnavailableError(f"{url}: the connection was cut in every attempt to read it")

    def _answer(self, url: str, version: str | None) -> Any:
        """Return the reply with its body still unread; None if it was cut before that."""
        from botocore.exceptions import ClientError

        bucket, key = split_url(url)
        with translated(url):
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key, **_condition(version))
            except not_retried_errors():
                return None
            except ClientError as error:
                code = error_code(error)
                if code in _CHANGED:
                    raise ObjectConflictError(f"{url} has changed since it was submitted") from error
                if code in _REFUSED or (version is not None and code in _NO_VERSION):
                    raise ObjectMissingError(f"{url} does not exist, or access is denied: {code}") from error
                raise
        check_reply(answer, url)
        return answer

    @property
    def _client(self) -> S3Client:
        if find_spec("boto3") is None:
            raise SettingsError("objects in S3 need boto3: pip install 'sdpipeline[s3]'")
        # As in S3Store: a client must not be shared across fork().
        if (client := self._clients.get(os.getpid())) is None:
            client = self._clients[os.getpid()] = connect(self.options)
        return client


def _condition(version: str | None) -> dict[str, Any]:
    if version is None:
        return {}
    kind, _, value = version.partition(":")
    return {"VersionId": value} if kind == "version" else {"IfMatch": value}


def _pin(answer: Any) -> str:
    version = version_of(answer)
    return f"version:{version}" if version else f"etag:{answer['ETag']}"


def _read_body(answer: Any, most_bytes: int) -> bytes | None:
    """Return the body's first bytes; None if the connection was cut."""
    try:
        data: bytes = answer["Body"].read(most_bytes)
    except cut_body_errors():
        return None
    # A partly read body may end early without an error; a chunked one does not state its length.
    length = answer.get("ContentLength")
    return data if length is None or len(data) == min(most_bytes, length) else None


def _copied(answer: Any, file: IO[bytes]) -> bool | None:
    while True:
        try:
            chunk = answer["Body"].read(_CHUNK_BYTES)
        except cut_body_errors():
            return None
        if not chunk:
            break
        file.write(chunk)
    return True if answer.get("ContentLength") in (None, file.tell()) else None
