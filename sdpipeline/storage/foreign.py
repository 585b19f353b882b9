"""Objects that are not ours: read from anybody's bucket, at exactly the version that was found first, never written."""

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
# Whose bucket it is decides; waiting changes nothing. Who may not list a bucket hears this of what is not there, too.
# A bare status is not from S3, which names each refusal of a GET: the reply was cut, or a proxy's.
_REFUSED = {"AccessDenied", "AllAccessDisabled", "InvalidObjectState", "NoSuchBucket"}
# A version that was deleted, or that no version of this server can be. Without a version it is a proxy that answers so.
_NO_VERSION = {"InvalidArgument", "MethodNotAllowed"}
_CHANGED = {"412", "PreconditionFailed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignObject:
    """An object's bytes, and the pin that finds the same again: ``version:ID``, or ``etag:TAG`` without versions."""

    data: bytes
    version: str


def is_bucket_url(url: str) -> bool:
    """Whether this names an object in a bucket rather than a file."""
    return url.startswith("s3://")


def split_url(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``, the key as it is, nothing unquoted; else BadInputError."""
    found = _URL.fullmatch(url)
    if found is None:
        raise BadInputError(f"{url!r} is not s3://bucket/key")
    bucket, key = found.groups()
    # A server that keeps objects as files may take such a segment for a folder.
    wrong = any(part in (".", "..") for part in key.split("/")) or not key.isprintable()
    if wrong or len(key.encode()) > _MAX_KEY_BYTES:
        raise BadInputError(f"{url!r} is no object's address")
    return bucket, key


def lies_under(url: str, root: str) -> bool:
    """Whether an object's address is below ``s3://bucket`` or ``s3://bucket/prefix``, folder by folder."""
    return url.startswith(root.rstrip("/") + "/")


@dataclass(frozen=True, slots=True)
class ForeignObjects:
    """Reads objects by ``s3://bucket/key`` with the endpoint and the credentials that our own storage has.

    Raises ObjectMissingError for what is not there or not ours to read, and StorageUnavailableError where the
    endpoint does not answer. Safe to use from several threads.
    """

    options: S3Options = field(default_factory=S3Options)
    _clients: dict[int, S3Client] = field(default_factory=dict)

    def read(self, url: str, *, most_bytes: int, version: str | None = None) -> ForeignObject:
        """The object, of which no more than ``most_bytes`` and one are read.

        With ``version``, exactly what that pins: ObjectConflictError where something else is there now.
        """
        wanted = most_bytes + 1
        data, answer = self._attempted(url, version, lambda answer: _whole(answer, wanted))
        return ForeignObject(data=data, version=_pin(answer))

    def fetch(self, url: str, to: Path) -> None:
        """The object into a file, in constant memory."""

        def copy(answer: Any) -> bool | None:
            if answer["ContentLength"] > LARGEST_TABLE_BYTES:
                raise ObjectMissingError(f"{url} is larger than {LARGEST_TABLE_BYTES >> 30} GiB")
            with to.open("wb") as file:
                return _copied(answer, file)

        self._attempted(url, None, copy)

    def _attempted(self, url: str, version: str | None, take: Callable[[Any], _T | None]) -> tuple[_T, Any]:
        """What ``take`` makes of the reply; None says that the body was cut, which botocore does not ask for again."""
        for attempt in range(self.options.total_max_attempts):
            answer = self._answer(url, version)
            if answer is not None:
                with contextlib.closing(answer["Body"]):
                    if (taken := take(answer)) is not None:
                        return taken, answer
            pause(attempt)
        raise StorageUnavailableError(f"{url}: the connection was cut in every attempt to read it")

    def _answer(self, url: str, version: str | None) -> Any:
        """The reply with its body still to be read; None if it was cut before that."""
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
                    raise ObjectConflictError(f"{url} is not what it was") from error
                if code in _REFUSED or (version is not None and code in _NO_VERSION):
                    raise ObjectMissingError(f"{url} may not be read, or is not there: {code}") from error
                raise
        check_reply(answer, url)
        return answer

    @property
    def _client(self) -> S3Client:
        if find_spec("boto3") is None:
            raise SettingsError("objects in S3 need boto3: pip install 'sdpipeline[s3]'")
        # As in S3Store: not to be shared across fork().
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


def _whole(answer: Any, most_bytes: int) -> bytes | None:
    """The body's first bytes; None if the connection was cut."""
    try:
        data: bytes = answer["Body"].read(most_bytes)
    except cut_body_errors():
        return None
    # A body of which only a part is read may end early without an error; a chunked one does not name its length.
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
