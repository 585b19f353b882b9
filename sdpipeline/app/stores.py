"""Storage of an installation: the store and the S3 options that the settings name."""

from __future__ import annotations

from sdpipeline.settings import Settings
from sdpipeline.storage import ObjectStore, S3Options, open_store


def open_storage(settings: Settings) -> ObjectStore:
    """Open the store that the settings name."""
    return open_store(settings.storage, s3_options(settings))


def s3_options(settings: Settings) -> S3Options:
    """Return the S3 options of the settings, for our own storage and for objects in other buckets."""
    return S3Options(**settings.s3.model_dump())
