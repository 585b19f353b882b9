"""Objects that are not ours: read from anybody's bucket, at exactly the version that was found first, never written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpipeline.errors import (
    BadInputError,
    ObjectConflictError,
    ObjectMissingError,
    SettingsError,
    StorageUnavailableError,
)
from sdpipeline.storage.s3 import S3Options, connect, pause, version_of
from sdpipeline.storage.s3_errors import error_code, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)", re.DOTALL)
_MAX_KEY_BYTES = 1024
LARGEST_TABLE_BYTES = 16 * 2**30
"""A table is copied to this machine's temporary folder."""
# Whose bucket it is decides; waiting changes nothing. Who may not list a bucket hears this of what is not there, too.
_REFUSED = {"403", "AccessDenied", "AllAccessDisabled", "InvalidObjectState", "NoSuchBucket"}
# A version that was deleted, or that no version of this server can be.
_REFUSED |= {"400", "405", "InvalidArgument", "MethodNotAllowed"}
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
        for attempt in range(self.options.total_max_attempts):
            with self._answer(url, version) as answer:
                # Only the body tells whether it was cut, and botocore does not ask for it again.
                data = _whole(answer, most_bytes + 1)
                if data is not None:
                    return ForeignObject(data=data, version=_pin(answer))
            pause(attempt)
        raise StorageUnavailableError(f"{url}: the connection was cut in every attempt to read it")

    def fetch(self, url: str, to: Path) -> None:
        """The object into a file, in constant memory."""
        for attempt in range(self.options.total_max_attempts):
            with self._answer(url, None) as answer, to.open("wb") as file:
                if answer["ContentLength"] > LARGEST_TABLE_BYTES:
                    raise ObjectMissingError(f"{url} is larger than {LARGEST_TABLE_BYTES >> 30} GiB")
                if _copied(answer, file):
                    return
            pause(attempt)
        raise StorageUnavailableError(f"{url}: the connection was cut in every attempt to read it")

    @contextlib.contextmanager
    def _answer(self, url: str, version: str | None) -> Iterator[Any]:
        from botocore.exceptions import ClientError

        bucket, key = split_url(url)
        with translated(url):
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key, **_condition(version))
            except ClientError as error:
                code = error_code(error)
                if code in _CHANGED:
                    raise ObjectConflictError(f"{url} is not what it was") from error
                if code in _REFUSED:
                    raise ObjectMissingError(f"{url} may not be read, or is not there: {code}") from error
                raise
            with contextlib.closing(answer["Body"]):
                yield answer

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
    """The body's first bytes; None where the connection was cut."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    # A body that is asked for by the byte may end early without a word.
    wanted = min(most_bytes, answer["ContentLength"])
    try:
        data: bytes = answer["Body"].read(most_bytes)
    except (HTTPClientError, IncompleteReadError):
        return None
    return data if len(data) == wanted else None


def _copied(answer: Any, file: Any) -> bool:
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    try:
        shutil.copyfileobj(answer["Body"], file, 2**20)
    except (HTTPClientError, IncompleteReadError):
        return False
    return bool(file.tell() == answer["ContentLength"])
