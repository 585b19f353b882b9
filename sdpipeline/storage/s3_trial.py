"""What an S3 endpoint can do, found out by doing it to one object."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdpipeline.storage.contract import Capability
from sdpipeline.storage.s3_errors import ALREADY_THERE, error_code

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Trial:
    """Finds out what an endpoint does with one object of its own, removed by ``close``."""

    def __init__(self, client: S3Client, bucket: str, key: str) -> None:
        self._client = client
        self._target: dict[str, Any] = {"Bucket": bucket, "Key": key}

    def conditional_put(self) -> Capability:
        """Whether a put can demand that nothing is there."""
        self._client.put_object(**self._target, Body=b"first")
        refusal = self._refusal(self._client.put_object, **self._target, Body=b"second", IfNoneMatch="*")
        ok = refusal in ALREADY_THERE
        missing = f"the endpoint says {refusal}" if refusal else "the endpoint overwrites"
        without = f"{missing}: two writers of one key in the same moment are not told apart"
        return Capability(name="conditional put", ok=ok, detail="an object is never overwritten" if ok else without)

    def checksums(self) -> Capability:
        """Whether a put whose bytes do not match their checksum is refused."""
        wrong = checksums(b"other bytes")
        ok = self._refusal(self._client.put_object, **self._target, **wrong, Body=b"bytes") is not None
        without = "a wrong checksum is accepted: reading back alone finds damage on the way"
        return Capability(name="checksums", ok=ok, detail="damage on the way is refused" if ok else without)

    def versions(self) -> Capability:
        """Whether what was replaced or deleted is kept."""
        bucket = {"Bucket": self._target["Bucket"]}
        refusal = self._refusal(self._client.get_bucket_versioning, **bucket)
        ok = refusal is None and self._client.get_bucket_versioning(**bucket).get("Status") == "Enabled"
        without = f"{refusal or 'not enabled'}: a seal replaced by hand is found by its digest alone"
        return Capability(name="versions", ok=ok, detail="a replaced object leaves its trace" if ok else without)

    def object_lock(self) -> Capability:
        """Whether objects can be locked."""
        bucket = {"Bucket": self._target["Bucket"]}
        refusal = self._refusal(self._client.get_object_lock_configuration, **bucket)
        found = {} if refusal else self._client.get_object_lock_configuration(**bucket)["ObjectLockConfiguration"]
        ok = found.get("ObjectLockEnabled") == "Enabled"
        without = f"{refusal or 'not enabled'}: whoever may write here may delete seals, so export them elsewhere"
        return Capability(name="object lock", ok=ok, detail="seals can be locked against deletion" if ok else without)

    def encryption(self, parameters: dict[str, Any]) -> Capability:
        """Whether objects are encrypted with the key that was asked for."""
        refusal = self._refusal(self._client.put_object, **self._target, **parameters, Body=b"secret")
        used = None if refusal else self._client.head_object(**self._target).get("SSEKMSKeyId")
        detail = f"the endpoint says it uses {used}" if used else f"{refusal or 'ignored'}: objects are not encrypted"
        return Capability(name="encryption", ok=used is not None, detail=detail)

    def close(self) -> None:
        """Removes the object in all its versions."""
        for target in self._written():
            self._refusal(self._client.delete_object, **target)

    def _written(self) -> Sequence[dict[str, Any]]:
        listing: dict[str, Any] = {"Bucket": self._target["Bucket"], "Prefix": self._target["Key"]}
        if self._refusal(self._client.list_object_versions, **listing):
            return [self._target]
        entries = self._client.list_object_versions(**listing).get("Versions", [])
        return [self._target | {"VersionId": entry["VersionId"]} for entry in entries] or [self._target]

    @staticmethod
    def _refusal(call: Callable[..., object], **parameters: Any) -> str | None:
        from botocore.exceptions import ClientError

        try:
            call(**parameters)
        except ClientError as error:
            return error_code(error)
        return None


def checksums(data: bytes) -> dict[str, Any]:
    """What lets an endpoint refuse damaged bytes: a SHA-256, and an MD5 for those that know nothing newer."""
    digests = hashlib.sha256(data), hashlib.md5(data, usedforsecurity=False)
    sha256, md5 = (base64.b64encode(digest.digest()).decode() for digest in digests)
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": sha256, "ContentMD5": md5}
