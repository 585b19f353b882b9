"""Temporary storage prefix for a benchmark, emptied afterwards."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdpipeline.storage import open_store
from sdpipeline.storage.contract import ObjectStore
from sdpipeline.storage.s3_client import S3Options, connect
from sdpipeline.storage.s3_errors import translated


@dataclass(frozen=True, slots=True)
class Scratch:
    """Store at ``url``, and ``save``, which writes like a plain script: one write, without checks."""

    url: str
    store: ObjectStore
    save: Callable[[str, bytes], None]


@contextmanager
def scratch_storage(url: str, options: S3Options) -> Iterator[Scratch]:
    """Provide ``bench/{random}`` below the storage URL during the block. No command of ours reads there."""
    own = f"{url.rstrip('/')}/bench/{secrets.token_hex(8)}"
    store = open_store(own, options)
    try:
        yield Scratch(own, store, _saver(own, options))
    finally:
        for key in list(store.list()):
            store.delete(key)
        if own.startswith("file:"):
            shutil.rmtree(_folder(own), ignore_errors=True)


def _saver(url: str, options: S3Options) -> Callable[[str, bytes], None]:
    if url.startswith("file:"):
        folder = _folder(url)

        def write(key: str, data: bytes) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)

        return write
    client, (bucket, prefix) = connect(options), url.removeprefix("s3://").split("/", 1)

    def upload(key: str, data: bytes) -> None:
        with translated(url):
            client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data, ContentType="image/png")

    return upload


def _folder(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))
