"""Capability tests of an S3 endpoint, performed on one object."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sdpipeline.storage.contract import Capability, StoredObject
from sdpipeline.storage.s3_errors import ALREADY_THERE, error_code
from sdpipeline.storage.s3_features import CHECKSUMS, CONDITION, TAGS, Refused

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PROBE_LOCK_S = 5.0
"""Seconds for which a probe of Object Lock is locked before it is removed."""

_HEADER_IS_UNKNOWN = {"NotImplemented", "XNotImplemented", "501"}


class Trial:
    """Tests of an endpoint with the object under ``key``, which a put like a worker's has made; ``close`` removes it.

    ``locked`` is a second object that was put like a seal.
    """

    def __init__(self, client: S3Client, bucket: str, key: str, refused: Refused) -> None:
        self._client = client
        self._target: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._refused = refused
        self.locked: StoredObject | None = None

    def conditional_put(self) -> Capability:
        """Test if a put can require that the key is free."""
        if lost := self._lost(CONDITION):
            return lost
        refusal = self._refusal(self._client.put_object, **self._target, Body=b"second", IfNoneMatch="*")
        ok = refusal in ALREADY_THERE
        missing = f"the endpoint says {refusal}" if refusal else "the endpoint overwrites"
        without = f"{missing}: two simultaneous writers of one key are not detected"
        return Capability(name="conditional put", ok=ok, detail="an object is never overwritten" if ok else without)

    def checksums(self) -> Capability:
        """Test if a put whose bytes do not match their checksum is refused."""
        if lost := self._lost(CHECKSUMS):
            return lost
        wrong = checksums(b"other bytes")
        refusal = self._refusal(self._client.put_object, **self._target, **wrong, Body=b"bytes")
        ok = refusal is not None and refusal not in _HEADER_IS_UNKNOWN
        without = "a wrong checksum is accepted: only reading back detects damage in transit"
        return Capability(name="checksums", ok=ok, detail="damage in transit is refused" if ok else without)

    def versions(self) -> Capability:
        """Test if replaced and deleted objects are kept."""
        bucket = {"Bucket": self._target["Bucket"]}
        refusal = self._refusal(self._client.get_bucket_versioning, **bucket)
        ok = refusal is None and self._client.get_bucket_versioning(**bucket).get("Status") == "Enabled"
        without = f"{refusal or 'not enabled'}: a replaced seal is detected only by its digest"
        return Capability(name="versions", ok=ok, detail="a replaced object keeps its old version" if ok else without)

    def object_lock(self) -> Capability:
        """Test if objects can be locked."""
        bucket = {"Bucket": self._target["Bucket"]}
        refusal = self._refusal(self._client.get_object_lock_configuration, **bucket)
        found = {} if refusal else self._client.get_object_lock_configuration(**bucket)["ObjectLockConfiguration"]
        ok = found.get("ObjectLockEnabled") == "Enabled"
        without = f"{refusal or 'not enabled'}: users with write access can delete seals: export the audit log"
        if ok and self.locked is not None and self.locked.retained_until is None:
            ok = False
            without = "a put with a lock was accepted, but none is seen: ignored, or s3:GetObjectRetention is denied"
        return Capability(name="object lock", ok=ok, detail="seals can be locked against deletion" if ok else without)

    def encryption(self, parameters: dict[str, Any]) -> Capability:
        """Test if objects are encrypted with the requested key."""
        refusal = self._refusal(self._client.put_object, **self._target, **parameters, Body=b"secret")
        used = None if refusal else self._client.head_object(**self._target).get("SSEKMSKeyId")
        detail = f"the endpoint says it uses {used}" if used else f"{refusal or 'ignored'}: objects are not encrypted"
        return Capability(name="encryption", ok=used is not None, detail=detail)

    def tags(self, wanted: Mapping[str, str]) -> Capability:
        """Test if the tags of a put are kept."""
        if lost := self._lost(TAGS):
            return lost
        refusal = self._refusal(self._client.get_object_tagging, **self._target)
        if refusal is not None:
            return Capability(name=TAGS, ok=True, detail=f"accepted, but they cannot be read back: {refusal}")
        kept = {tag["Key"]: tag["Value"] for tag in self._client.get_object_tagging(**self._target)["TagSet"]}
        ok = all(kept.get(name) == value for name, value in wanted.items())
        without = "accepted, but not kept: lifecycle, cost and access rules based on tags do not apply to objects"
        return Capability(name=TAGS, ok=ok, detail="each object has them" if ok else without)

    def close(self) -> Capability | None:
        """Remove the objects in all their versions; report a refusal."""
        if self.locked is not None and self.locked.retained_until is not None:
            time.sleep(max(0.0, min(PROBE_LOCK_S, (self.locked.retained_until - datetime.now(UTC)).total_seconds())))
        refusals = [self._refusal(self._client.delete_object, **target) for target in self._written()]
        if not (refused := [refusal for refusal in refusals if refusal]):
            return None
        left = f"{refused[0]}: s3://{self._target['Bucket']}/{self._target['Key']} stays: delete it by hand"
        return Capability(name="delete", ok=False, detail=left)

    def _lost(self, feature: str) -> Capability | None:
        detail = self._refused.losses().get(feature)
        return Capability(name=feature, ok=False, detail=detail) if detail else None

    def _written(self) -> Sequence[dict[str, Any]]:
        listing: dict[str, Any] = {"Bucket": self._target["Bucket"], "Prefix": self._target["Key"]}
        keys = [self._target["Key"], *([f"{self._target['Key']}.seal"] if self.locked else [])]
        plain = [self._target | {"Key": key} for key in keys]
        if self._refusal(self._client.list_object_versions, **listing):
            return plain
        entries = self._client.list_object_versions(**listing).get("Versions", [])
        return [self._target | {"Key": each["Key"], "VersionId": each["VersionId"]} for each in entries] or plain

    @staticmethod
    def _refusal(call: Callable[..., object], **parameters: Any) -> str | None:
        from botocore.exceptions import ClientError

        try:
            call(**parameters)
        except ClientError as error:
            return error_code(error)
        return None


def checksums(data: bytes) -> dict[str, Any]:
    """Return checksum parameters: a SHA-256, and an MD5 for endpoints that support nothing newer."""
    digests = hashlib.sha256(data), hashlib.md5(data, usedforsecurity=False)
    sha256, md5 = (base64.b64encode(digest.digest()).decode() for digest in digests)
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": sha256, "ContentMD5": md5}
