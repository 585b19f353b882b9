"""Object store in an S3 bucket, on AWS or any compatible endpoint."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from sdpipeline.aws import library_errors
from sdpipeline.backoff import Backoff
from sdpipeline.errors import (
    Mistake,
    ObjectConflictError,
    ObjectMissingError,
    SdpError,
    SettingsError,
    StorageUnavailableError,
)
from sdpipeline.storage.contract import Capability, ObjectVersion, Retention, StoredObject, check_key, check_prefix
from sdpipeline.storage.s3_client import S3Options, connect
from sdpipeline.storage.s3_errors import (
    UnsupportedError,
    check_listing,
    check_reply,
    cut_body_errors,
    error_code,
    is_web_page,
    not_retried_errors,
    translated,
)
from sdpipeline.storage.s3_features import Refused, used_in, without
from sdpipeline.storage.s3_probe import PROBE_LOCK_S, Trial, checksums

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, HeadObjectOutputTypeDef

_BACKOFF = Backoff(first_s=0.1, longest_s=5.0)
_CONDITION = {"IfNoneMatch": "*"}


class S3Store:
    """Objects in a bucket under a prefix, on AWS or any compatible endpoint.

    The conditional put decides between writers. Weak endpoints ignore or refuse the condition: reading before the write
    and reading back after it still protect there, except against two writers at the same moment.
    """

    def __init__(self, bucket: str, *, prefix: str = "", options: S3Options | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._options = options or S3Options()
        self._clients: dict[int, S3Client] = {}
        self._refused = Refused(f"s3://{bucket} at {self._options.endpoint_url or 'AWS'}")

    def put(self, key: str, data: bytes, *, content_type: str, retained: bool = False) -> StoredObject:
        """See ObjectStore; encryption, tags and retention are part of the put itself."""
        days = self._options.object_lock_days if retained else None
        return self._put(key, data, content_type, None if days is None else timedelta(days=days))

    def _put(self, key: str, data: bytes, content_type: str, retained: timedelta | None) -> StoredObject:
        if (present := self._read_back(key, data)) is not None:
            return present
        with translated(self.url(key)):
            created = self._create(self._target(key, data, content_type, retained), data)
        try:
            stored = self._read_back(key, data)
        except ObjectConflictError as error:
            if not created:
                raise
            raise StorageUnavailableError(f"{self.url(key)} returned different bytes than were written") from error
        if stored is None:
            raise StorageUnavailableError(f"{self.url(key)} was written, but does not exist")
        return stored

    @property
    def retention(self) -> Retention | None:
        """See ObjectStore."""
        mode = self._options.object_lock_mode
        return Retention(mode=mode, days=self._options.object_lock_days) if mode else None

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        """See ObjectStore; if the endpoint keeps no versions, none can be requested."""
        try:
            return self._read(key, version_id)[0]
        except UnsupportedError as error:
            raise ObjectMissingError(f"{self.url(key)} has no version {version_id}") from error

    def head(self, key: str) -> StoredObject | None:
        """See ObjectStore; an object without our metadata is read and hashed."""
        try:
            with translated(self.url(key)):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
            check_reply(answer, self.url(key))
            # Some endpoints change the case of metadata names.
            declared = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
            sha256, size_bytes = declared.get("sha256"), answer.get("ContentLength")
            if not sha256 or size_bytes is None:
                data = self.get(key)
                sha256, size_bytes = hashlib.sha256(data).hexdigest(), len(data)
        except ObjectMissingError as error:
            if is_web_page(error.__cause__) and self._exists(key):
                raise StorageUnavailableError(f"{self.url(key)}: HEAD says 404 and GET finds it") from error
            return None
        return replace(_stored(key, sha256, size_bytes, answer), stored_at=answer["LastModified"])

    def move(self, key: str, to: str) -> None:
        """See ObjectStore; through this machine, because not every endpoint honours conditions on a copy."""
        data, answer = self._read(key, None)
        self.put(to, data, content_type=answer.get("ContentType") or "application/octet-stream")
        with translated(self.url(key)):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def url(self, key: str) -> str:
        """Return the object's ``s3://`` URL."""
        return f"s3://{self._bucket}/{self._name(key)}"

    def link(self, key: str, *, expires_s: int = 3600) -> str:
        """Return a presigned URL; it expires at the latest with the credentials that signed it."""
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        with translated(self.url(key)):
            return self._client.generate_presigned_url("get_object", Params=target, ExpiresIn=expires_s)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ObjectStore."""
        name = self._prefix + check_prefix(prefix)
        with translated(f"s3://{self._bucket}/{name}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=name)
            for page in _listed(pages, f"s3://{self._bucket}/{name}"):
                for entry in page.get("Contents", []):
                    yield entry["Key"].removeprefix(self._prefix)

    def versions(self, key: str) -> Sequence[ObjectVersion]:
        """See ObjectStore; for an endpoint that keeps no versions, the current object is returned."""
        name = self._name(key)
        try:
            with translated(self.url(key)):
                pages = self._client.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=name)
                entries = [
                    entry
                    for page in _listed(pages, self.url(key))
                    for entry in (
                        *((entry["Key"], version_of(entry), False) for entry in page.get("Versions", [])),
                        *((entry["Key"], version_of(entry), True) for entry in page.get("DeleteMarkers", [])),
                    )
                ]
        except UnsupportedError:
            return [] if self.head(key) is None else [ObjectVersion(version_id=None, is_delete_marker=False)]
        return [
            ObjectVersion(version_id=version_id, is_delete_marker=is_delete_marker)
            for found, version_id, is_delete_marker in entries
            if found == name
        ]

    def delete(self, key: str) -> None:
        """See ObjectStore; every version is deleted by its id, because a plain delete would only hide the object."""
        for version in self.versions(key):
            target: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
            target |= {"VersionId": version.version_id} if version.version_id else {}
            with contextlib.suppress(ObjectMissingError), translated(self.url(key)):
                self._client.delete_object(**target)

    def check(self) -> None:
        """See ObjectStore; lists one key, which needs no more permissions than our normal operation."""
        # Two attempts of 3 + 4 seconds stay within 15.
        client = connect(replace(self._options, connect_timeout_s=3, read_timeout_s=4, total_max_attempts=2))
        try:
            with translated(f"s3://{self._bucket}"):
                page = client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
                check_listing(page, f"s3://{self._bucket}")
        except (StorageUnavailableError, ObjectMissingError) as error:
            fix = "check the endpoint, the bucket's name and the credentials (see boto3's own chain)"
            raise SettingsError(Mistake(key="SDP_STORAGE_URL", message=str(error), fix=fix)) from error

    def losses(self) -> Mapping[str, str]:
        """See ObjectStore."""
        return self._refused.losses()

    def probe(self) -> Sequence[Capability]:
        """See ObjectStore; the first put equals a worker's, and a put with a seal's lock is locked for seconds only."""
        key = f"probe/{secrets.token_hex(16)}"
        address = f"s3://{self._bucket}"
        trial = Trial(self._client, self._bucket, self._name(key), self._refused)
        try:
            self._put(key, b"probe", "image/png", None)
            if self._options.object_lock_mode:
                trial.locked = self._put(f"{key}.seal", b"probe", "application/json", timedelta(seconds=PROBE_LOCK_S))
            with translated(address):
                found = [trial.conditional_put(), trial.checksums(), trial.versions(), trial.object_lock()]
                if self._options.tags:
                    found.append(trial.tags(self._options.tags))
                if self._options.sse_kms_key_id:
                    found.append(trial.encryption(self._encryption()))
        except SdpError:
            with contextlib.suppress(StorageUnavailableError, ObjectMissingError), translated(address):
                trial.close()
            raise
        with translated(address):
            left = trial.close()
        return [*found, left] if left else found

    @property
    def _client(self) -> S3Client:
        # A client's connections must not be shared across fork(), and creating a client takes a tenth of a second.
        if (client := self._clients.get(os.getpid())) is None:
            client = self._clients[os.getpid()] = connect(self._options)
        return client

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _target(self, key: str, data: bytes, content_type: str, retained: timedelta | None) -> dict[str, Any]:
        metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        target: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        target |= {"ContentType": content_type, "Metadata": metadata}
        if self._options.tags:
            target["Tagging"] = urlencode(self._options.tags)
        if retained is not None and self._options.object_lock_mode:
            until = datetime.now(UTC) + retained
            target |= {"ObjectLockMode": self._options.object_lock_mode, "ObjectLockRetainUntilDate": until}
        return target | self._encryption()

    def _encryption(self) -> dict[str, Any]:
        if not self._options.sse_kms_key_id:
            return {}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._options.sse_kms_key_id}

    def _create(self, target: dict[str, Any], data: bytes) -> bool:
        """Return True if we wrote the object; False if the key is taken, possibly by our own first attempt."""
        from botocore.exceptions import ClientError

        write = self._write_whole if len(data) <= self._options.part_size_bytes else self._write_parts
        for attempt in range(self._options.total_max_attempts):
            try:
                return self._refused.put(lambda dropped: write(target, data, dropped), used_in(target))
            except ClientError as error:
                if error_code(error) != "ConditionalRequestConflict":
                    raise
            except not_retried_errors():
                if attempt + 1 == self._options.total_max_attempts:
                    raise
            pause(attempt)
        raise StorageUnavailableError(f"s3://{self._bucket}/{target['Key']}: too many concurrent writers")

    def _write_whole(self, target: dict[str, Any], data: bytes, dropped: frozenset[str]) -> None:
        parameters = target | _CONDITION | checksums(data)
        self._client.put_object(**without(parameters, dropped), Body=data)

    def _write_parts(self, target: dict[str, Any], data: bytes, dropped: frozenset[str]) -> None:
        address, size_bytes = {name: target[name] for name in ("Bucket", "Key")}, self._options.part_size_bytes
        begun = without(target | {"ChecksumAlgorithm": "SHA256"}, dropped)
        with self._upload(begun) as upload_id:
            parts: list[Any] = []
            for number, start in enumerate(range(0, len(data), size_bytes), start=1):
                part = data[start : start + size_bytes]
                sums = without(checksums(part), dropped)
                sent = self._client.upload_part(**address, **sums, UploadId=upload_id, PartNumber=number, Body=part)
                known = {name: value for name, value in sums.items() if name == "ChecksumSHA256"}
                parts.append({"PartNumber": number, "ETag": _field(sent, "ETag"), **known})
            self._client.complete_multipart_upload(
                **address, **without(_CONDITION, dropped), UploadId=upload_id, MultipartUpload={"Parts": parts}
            )

    @contextlib.contextmanager
    def _upload(self, begun: dict[str, Any]) -> Iterator[str]:
        upload_id = _field(self._client.create_multipart_upload(**begun), "UploadId")
        try:
            yield upload_id
        except BaseException:
            self._abandon({name: begun[name] for name in ("Bucket", "Key")}, upload_id)
            raise

    def _abandon(self, address: dict[str, Any], upload_id: str) -> None:
        # Parts of an unfinished upload are invisible but billed until a lifecycle rule removes them.
        with contextlib.suppress(*library_errors()):
            self._client.abort_multipart_upload(**address, UploadId=upload_id)

    def _exists(self, key: str) -> bool:
        try:
            self._read(key, None)
        except ObjectMissingError:
            return False
        return True

    def _read_back(self, key: str, data: bytes) -> StoredObject | None:
        try:
            found, answer = self._read(key, None)
        except ObjectMissingError:
            return None
        if found != data:
            raise ObjectConflictError(f"{self.url(key)} already holds different bytes")
        return _stored(key, hashlib.sha256(data).hexdigest(), len(data), answer)

    def _read(self, key: str, version_id: str | None) -> tuple[bytes, GetObjectOutputTypeDef]:
        target: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        target |= {"VersionId": version_id} if version_id else {}
        with translated(self.url(key)):
            for attempt in range(self._options.total_max_attempts):
                if (found := self._read_once(target, self.url(key))) is not None:
                    return found
                pause(attempt)
        raise StorageUnavailableError(f"{self.url(key)}: the connection was cut in every attempt to read it")

    def _read_once(self, target: dict[str, Any], address: str) -> tuple[bytes, GetObjectOutputTypeDef] | None:
        """Return None if the reply was cut: botocore retries a request, but not a body, nor the body of an error."""
        try:
            answer = self._client.get_object(**target)
        except not_retried_errors():
            return None
        with contextlib.closing(answer["Body"]) as body:
            check_reply(answer, address)
            try:
                return body.read(), answer
            except cut_body_errors():
                return None


def _stored(
    key: str, sha256: str, size_bytes: int, answer: GetObjectOutputTypeDef | HeadObjectOutputTypeDef
) -> StoredObject:
    return StoredObject(
        key=key,
        sha256=sha256,
        size_bytes=size_bytes,
        version_id=version_of(answer),
        retained_until=answer.get("ObjectLockRetainUntilDate"),
    )


def _field(answer: Any, name: str) -> str:
    """Return a field that every S3 server sends; a proxy's page with status 200 lacks it."""
    if not answer.get(name):
        raise StorageUnavailableError(f"the reply to an upload has no {name}: it is not from an S3 endpoint")
    return str(answer[name])


def _listed(pages: Iterable[Any], address: str) -> Iterator[Any]:
    for page in pages:
        check_listing(page, address)
        yield page


def version_of(answer: Mapping[str, Any]) -> str | None:
    """Return the version id in a reply, or None."""
    # "null" is the id of the only version in a bucket without versions, or of one from before it had them.
    found = answer.get("VersionId")
    return None if found in (None, "null") else str(found)


def pause(attempt: int) -> None:
    """Wait before the next attempt, with exponential backoff and jitter."""
    time.sleep(_BACKOFF.delay_s(attempt + 1))
