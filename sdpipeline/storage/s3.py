"""Objects in an S3 bucket, on AWS or on whatever speaks its protocol."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

from sdpipeline import __version__
from sdpipeline.errors import Mistake, ObjectConflictError, ObjectMissingError, SettingsError, StorageUnavailableError
from sdpipeline.storage.contract import Capability, ObjectVersion, Retention, StoredObject, check_key, check_prefix
from sdpipeline.storage.s3_errors import ALREADY_THERE, UnsupportedError, error_code, translated
from sdpipeline.storage.s3_trial import Trial, checksums

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef, HeadObjectOutputTypeDef


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """How to reach an S3 endpoint and what every object gets; credentials come from boto3's own chain."""

    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    sse_kms_key_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    object_lock_mode: Literal["GOVERNANCE", "COMPLIANCE"] | None = None
    object_lock_days: int = 365
    total_max_attempts: int = 5
    connect_timeout_s: float = 5
    read_timeout_s: float = 30
    max_connections: int = 16
    part_size_bytes: int = 64 * 2**20


class S3Store:
    """Objects in a bucket under a prefix, on AWS or on any endpoint that speaks its protocol.

    The conditional put is what decides between writers. Weak endpoints ignore or refuse the condition:
    looking before writing and reading back afterwards still hold there, save for two writers in the
    same moment.
    """

    def __init__(self, bucket: str, *, prefix: str = "", options: S3Options | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._options = options or S3Options()
        self._clients: dict[int, S3Client] = {}
        self._condition: dict[str, Any] = {"IfNoneMatch": "*"}

    def put(self, key: str, data: bytes, *, content_type: str, retained: bool = False) -> StoredObject:
        """See ObjectStore; encryption, tags and retention are part of the put itself."""
        if (present := self._read_back(key, data)) is not None:
            return present
        with translated(self.url(key)):
            created = self._create(self._target(key, data, content_type, retained=retained), data)
        try:
            stored = self._read_back(key, data)
        except ObjectConflictError as error:
            if not created:
                raise
            raise StorageUnavailableError(f"{self.url(key)} reads back other bytes than were written") from error
        if stored is None:
            raise StorageUnavailableError(f"{self.url(key)} was written and is not there")
        return stored

    @property
    def retention(self) -> Retention | None:
        """See ObjectStore."""
        mode = self._options.object_lock_mode
        return Retention(mode=mode, days=self._options.object_lock_days) if mode else None

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        """See ObjectStore; where no versions are kept, none can be asked for."""
        try:
            return self._read(key, version_id)[0]
        except UnsupportedError as error:
            raise ObjectMissingError(f"{self.url(key)} has no version {version_id}") from error

    def head(self, key: str) -> StoredObject | None:
        """See ObjectStore; an object without our metadata is read and hashed."""
        try:
            with translated(self.url(key)):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
            # Some endpoints change the case of metadata names.
            declared = {name.lower(): value for name, value in answer["Metadata"].items()}
            sha256 = declared.get("sha256") or hashlib.sha256(self.get(key)).hexdigest()
        except ObjectMissingError:
            return None
        return replace(_stored(key, sha256, answer), stored_at=answer["LastModified"])

    def move(self, key: str, to: str) -> None:
        """See ObjectStore; through this machine, for a copy inside the bucket heeds no condition everywhere."""
        data, answer = self._read(key, None)
        self.put(to, data, content_type=answer["ContentType"])
        with translated(self.url(key)):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def url(self, key: str) -> str:
        """The object's ``s3://`` address."""
        return f"s3://{self._bucket}/{self._name(key)}"

    def link(self, key: str, *, expires_s: int = 3600) -> str:
        """A presigned address; it works no longer than the credentials that signed it."""
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        with translated(self.url(key)):
            return self._client.generate_presigned_url("get_object", Params=target, ExpiresIn=expires_s)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ObjectStore."""
        name = self._prefix + check_prefix(prefix)
        with translated(f"s3://{self._bucket}/{name}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=name)
            for page in pages:
                for entry in page.get("Contents", []):
                    yield entry["Key"].removeprefix(self._prefix)

    def versions(self, key: str) -> Sequence[ObjectVersion]:
        """See ObjectStore; an endpoint that keeps no versions answers for what is there now."""
        name = self._name(key)
        try:
            with translated(self.url(key)):
                pages = self._client.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=name)
                entries = [
                    entry
                    for page in pages
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
        """See ObjectStore; a bucket with versions would only hide what is deleted without naming one."""
        for version in self.versions(key):
            target: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
            target |= {"VersionId": version.version_id} if version.version_id else {}
            with contextlib.suppress(ObjectMissingError), translated(self.url(key)):
                self._client.delete_object(**target)

    def check(self) -> None:
        """See ObjectStore; asks for one key, which needs no more rights than our own work does."""
        # Two attempts of 3 + 4 seconds stay within 15.
        client = connect(replace(self._options, connect_timeout_s=3, read_timeout_s=4, total_max_attempts=2))
        try:
            with translated(f"s3://{self._bucket}"):
                client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except (StorageUnavailableError, ObjectMissingError) as error:
            fix = "check the endpoint, the bucket's name and the credentials (see boto3's own chain)"
            raise SettingsError(Mistake(key="SDP_STORAGE_URL", message=str(error), fix=fix)) from error

    def probe(self) -> Sequence[Capability]:
        """See ObjectStore."""
        trial = Trial(self._client, self._bucket, self._name(f"probe/{secrets.token_hex(16)}"))
        with translated(f"s3://{self._bucket}"), contextlib.closing(trial):
            found = [trial.conditional_put(), trial.checksums(), trial.versions(), trial.object_lock()]
            if self._options.sse_kms_key_id:
                found.append(trial.encryption(self._encryption()))
        return found

    @property
    def _client(self) -> S3Client:
        # A client's connections must not be shared across fork(), and making one takes a tenth of a second.
        if (client := self._clients.get(os.getpid())) is None:
            client = self._clients[os.getpid()] = connect(self._options)
        return client

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _target(self, key: str, data: bytes, content_type: str, *, retained: bool) -> dict[str, Any]:
        metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        target: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        target |= {"ContentType": content_type, "Metadata": metadata}
        if self._options.tags:
            target["Tagging"] = urlencode(self._options.tags)
        if retained and self._options.object_lock_mode:
            until = datetime.now(UTC) + timedelta(days=self._options.object_lock_days)
            target |= {"ObjectLockMode": self._options.object_lock_mode, "ObjectLockRetainUntilDate": until}
        return target | self._encryption()

    def _encryption(self) -> dict[str, Any]:
        if not self._options.sse_kms_key_id:
            return {}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._options.sse_kms_key_id}

    def _create(self, target: dict[str, Any], data: bytes) -> bool:
        """Whether we wrote the object; False means that something is there, maybe our own first try."""
        from botocore.exceptions import ClientError

        write = self._write_whole if len(data) <= self._options.part_size_bytes else self._write_parts
        for attempt in range(self._options.total_max_attempts):
            try:
                write(target, data)
            except ClientError as error:
                code = error_code(error)
                if code in ALREADY_THERE:
                    return False
                if code == "NotImplemented" and self._condition:
                    self._condition = {}
                elif code != "ConditionalRequestConflict":
                    raise
                pause(attempt)
            else:
                return True
        raise StorageUnavailableError(f"s3://{self._bucket}/{target['Key']}: other writers are in the way")

    def _write_whole(self, target: dict[str, Any], data: bytes) -> None:
        self._client.put_object(**target, **self._condition, **checksums(data), Body=data)

    def _write_parts(self, target: dict[str, Any], data: bytes) -> None:
        address, size_bytes = {name: target[name] for name in ("Bucket", "Key")}, self._options.part_size_bytes
        upload_id = self._client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256")["UploadId"]
        try:
            parts: list[CompletedPartTypeDef] = []
            for number, start in enumerate(range(0, len(data), size_bytes), start=1):
                part = data[start : start + size_bytes]
                sent = self._client.upload_part(
                    **address, **checksums(part), UploadId=upload_id, PartNumber=number, Body=part
                )
                parts.append(
                    {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksums(part)["ChecksumSHA256"]}
                )
            self._client.complete_multipart_upload(
                **address, **self._condition, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            self._abandon(address, upload_id)
            raise

    def _abandon(self, address: dict[str, Any], upload_id: str) -> None:
        # The parts of an upload that is left open are paid for, unseen, until a lifecycle rule ends it.
        from botocore.exceptions import BotoCoreError, ClientError

        with contextlib.suppress(BotoCoreError, ClientError):
            self._client.abort_multipart_upload(**address, UploadId=upload_id)

    def _read_back(self, key: str, data: bytes) -> StoredObject | None:
        try:
            found, answer = self._read(key, None)
        except ObjectMissingError:
            return None
        if found != data:
            raise ObjectConflictError(f"{self.url(key)} already holds other bytes")
        return _stored(key, hashlib.sha256(data).hexdigest(), answer)

    def _read(self, key: str, version_id: str | None) -> tuple[bytes, GetObjectOutputTypeDef]:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        target: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        target |= {"VersionId": version_id} if version_id else {}
        with translated(self.url(key)):
            for attempt in range(self._options.total_max_attempts):
                answer = self._client.get_object(**target)
                try:
                    # botocore tries a request again, but not a body that was cut.
                    with contextlib.closing(answer["Body"]) as body:
                        return body.read(), answer
                except (HTTPClientError, IncompleteReadError):
                    pause(attempt)
        raise StorageUnavailableError(f"{self.url(key)}: the connection was cut in every attempt to read it")


def connect(options: S3Options) -> S3Client:
    """A client of one's own: making one takes a tenth of a second."""
    import boto3
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        tcp_keepalive=True,
        max_pool_connections=options.max_connections,
        # `max_attempts` would count the retries after the first attempt.
        retries={"mode": "standard", "total_max_attempts": options.total_max_attempts},
        s3={"addressing_style": options.addressing_style},
        # What boto3 adds by default is more than weak endpoints understand; we send a SHA-256 and read back.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra=f"sdpipeline/{__version__}",
    )
    session = boto3.session.Session()  # the default session is not safe to share between threads
    return session.client("s3", endpoint_url=options.endpoint_url, region_name=options.region, config=config)


def _stored(key: str, sha256: str, answer: GetObjectOutputTypeDef | HeadObjectOutputTypeDef) -> StoredObject:
    return StoredObject(
        key=key,
        sha256=sha256,
        size_bytes=answer["ContentLength"],
        version_id=version_of(answer),
        retained_until=answer.get("ObjectLockRetainUntilDate"),
    )


def version_of(answer: Mapping[str, Any]) -> str | None:
    """The version that an answer is about."""
    # "null" is what a bucket without versions, or from before it had them, calls its one version.
    found = answer.get("VersionId")
    return None if found in (None, "null") else str(found)


def pause(attempt: int) -> None:
    """Wait before the next attempt, each time for longer."""
    time.sleep(random.uniform(0, min(0.1 * 2**attempt, 5)))  # noqa: S311 - spreads writers, keeps no secret
