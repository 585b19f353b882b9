"""Storage benchmark: objects of a picture's size, put, read and verified from several threads."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sdpipeline.bench.statistics import Clock, OnProgress
from sdpipeline.domain import Json
from sdpipeline.errors import StorageUnavailableError
from sdpipeline.storage import ObjectStore

VERBS = ("put", "get", "verify", "delete")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``objects`` of ``size_bytes`` random bytes, with ``threads`` in parallel."""

    objects: int
    size_bytes: int
    threads: int


def measure(store: ObjectStore, load: Load, on_progress: OnProgress) -> Json:
    """Time each operation on a scratch store; see :func:`sdpipeline.storage.scratch.scratch_storage`.

    ``put`` looks for the object, writes and reads back, as for every picture; ``verify`` reads and hashes.
    """
    contents = {f"{n:06d}": secrets.token_bytes(load.size_bytes) for n in range(load.objects)}
    digests = {key: hashlib.sha256(data).hexdigest() for key, data in contents.items()}

    def put(key: str) -> None:
        store.put(key, contents[key], content_type="application/octet-stream")

    def verify(key: str) -> None:
        if hashlib.sha256(store.get(key)).hexdigest() != digests[key]:
            raise StorageUnavailableError(f"{store.url(key)} returned different bytes than were written")

    acts: Sequence[Callable[[str], object]] = (put, store.get, verify, store.delete)
    rows = []
    for n, (name, act) in enumerate(zip(VERBS, acts, strict=True)):
        rows.append(_timed(name, act, list(contents), load))
        on_progress(n + 1, len(VERBS))
    return {"objects": load.objects, "size_bytes": load.size_bytes, "threads": load.threads, "verbs": rows}


def _timed(name: str, act: Callable[[str], object], keys: Sequence[str], load: Load) -> Json:
    clock = Clock()

    def once(key: str) -> None:
        with clock.timing(name):
            act(key)

    started = time.perf_counter()
    with ThreadPoolExecutor(load.threads, thread_name_prefix="sdp-bench") as pool:
        list(pool.map(once, keys))
    wall_s = time.perf_counter() - started
    figures = clock.figures(name, wall_s=wall_s)
    return figures | {"mb_per_s": round(load.size_bytes / 1e6 * figures["per_s"], 2) if name != "delete" else None}
