"""Object storage for pictures, inputs and seals: each object is written once, verified, and never overwritten."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdpipeline.errors import SettingsError
from sdpipeline.storage.contract import Capability, ObjectStore, ObjectVersion, Retention, StoredObject, check_key
from sdpipeline.storage.foreign import ForeignObject, ForeignObjects, is_bucket_url, is_under, split_url
from sdpipeline.storage.local import LocalStore
from sdpipeline.storage.s3 import S3Store
from sdpipeline.storage.s3_client import S3Options

__all__ = [
    "Capability",
    "ForeignObject",
    "ForeignObjects",
    "LocalStore",
    "ObjectStore",
    "ObjectVersion",
    "Retention",
    "S3Options",
    "S3Store",
    "StoredObject",
    "check_key",
    "is_bucket_url",
    "is_under",
    "open_store",
    "split_url",
]


def open_store(url: str, options: S3Options | None = None) -> ObjectStore:
    """Open the store of a ``file:///directory`` or ``s3://bucket/prefix`` URL; raises SettingsError for any other."""
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        if find_spec("boto3") is None:
            raise SettingsError("storage in S3 needs boto3: pip install 'sdpipeline[s3]'")
        return S3Store(parts.netloc, prefix=url.split("/", 3)[3] if parts.path else "", options=options)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalStore(Path(unquote(parts.path)))
    raise SettingsError(f"storage {url!r} is neither file:///directory nor s3://bucket/prefix")
