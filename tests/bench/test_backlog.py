"""A shuffled backlog of many kinds on a device that holds one checkpoint. Prints the speedup of planned leasing over
file order, and how long a checkpoint waits."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise, product
from pathlib import Path

import pytest

from sdpipeline.batching import batch_key, bucket_for
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database, open_database
from sdpipeline.db.leasing import AgingPolicy
from sdpipeline.db.migrate import upgrade
from sdpipeline.domain import CheckpointRef, JobSpec
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.storage import LocalStore
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import job_spec, published, signing_key

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

CHECKPOINTS = [CheckpointRef(alias=f"checkpoint-{n}", digest=f"{n:064x}") for n in range(1, 5)]
SIZES, STEPS = (32, 48, 64), (2, 4)
OF_A_KIND = 20
BATCH = 8
PICTURE_S = 0.025
LOAD_S = 0.4
"""Loading takes as long as two batches: the ratio of an SDXL checkpoint on a fast disk to a batch of eight."""
MAX_WAIT_S = 5.0
"""Twelve loads, the same ratio as 120 s to ten seconds."""


@dataclass
class LoadingEngine(FakeEngine):
    """Engine that holds one checkpoint, takes time for each load and for each picture of a batch, and logs its
    calls."""

    passes: list[tuple[float, str]] = field(default_factory=list)
    loads: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        digest = batch.requests[0].request.checkpoint.digest
        self.passes.append((time.perf_counter(), digest))
        if digest not in self.resident():
            self.loads += 1
            time.sleep(LOAD_S)
        time.sleep(PICTURE_S * batch.bucket)
        return super().generate(batch)


def backlog() -> list[JobSpec]:
    kinds = list(product(CHECKPOINTS, SIZES, STEPS)) * OF_A_KIND
    random.Random(0).shuffle(kinds)
    return [
        job_spec(
            f"row-{n}",
            stage=f"{checkpoint.alias}-{size}-{steps}",
            checkpoint=checkpoint,
            width=size,
            height=size,
            num_inference_steps=steps,
        )
        for n, (checkpoint, size, steps) in enumerate(kinds)
    ]


def first_in_first_out(jobs: Sequence[JobSpec]) -> tuple[float, int]:
    """Seconds and loads of a queue that hands out the eight oldest jobs. Jobs that can share a batch do, and only the
    engine takes time: the queue uses neither database nor storage."""
    engine, started = LoadingEngine(), time.perf_counter()
    for first in range(0, len(jobs), BATCH):
        for batch in _passes(jobs[first : first + BATCH]):
            engine.generate(batch)
    return time.perf_counter() - started, engine.loads


def _passes(jobs: Sequence[JobSpec]) -> Iterator[Batch]:
    alike = sorted((job.request for job in jobs), key=lambda asked: (asked.checkpoint.digest, batch_key(asked)))
    for _, requests in groupby(alike, key=batch_key):
        prepared = [PreparedRequest(request=replace(asked)) for asked in requests]
        yield Batch(requests=prepared, bucket=bucket_for(len(prepared)))


def by_plan(database: Database, folder: Path, jobs: Sequence[JobSpec]) -> tuple[float, LoadingEngine]:
    """Seconds of the real worker, with its database and storage, and its engine."""
    audit, engine = AuditLog(database, actor="bench"), LoadingEngine()
    published(audit, jobs)
    limits = WorkerLimits(max_batch=BATCH, lease_ttl_s=60.0, max_pixels=10_000_000)
    patience = AgingPolicy(MAX_WAIT_S)
    worker = Worker("bench", audit, LocalStore(folder), engine, limits, signing_key(), aging=patience)
    ended = [0.0]
    started = time.perf_counter()
    done = worker.run(on_progress=lambda _: ended.append(time.perf_counter()))
    assert done.succeeded == len(jobs)
    engine.passes.insert(0, (started, ""))
    return ended[-1] - started, engine


def longest_wait_s(passes: Sequence[tuple[float, str]], digest: str) -> float:
    """Longest time between two batches of a checkpoint, or from the start to its first one, while it has jobs."""
    turns = [passes[0][0], *(at for at, used in passes if used == digest)]
    return max(later - earlier for earlier, later in pairwise(turns))


def test_a_planned_backlog_is_done_in_less_than_half_of_the_time(postgres_url: str, tmp_path: Path) -> None:
    jobs = backlog()
    database = open_database(postgres_url)
    upgrade(database)
    fifo_s, fifo_loads = first_in_first_out(jobs)
    planned_s, engine = by_plan(database, tmp_path, jobs)
    database.close()
    waits = [longest_wait_s(engine.passes, checkpoint.digest) for checkpoint in CHECKPOINTS]
    print(f"{len(jobs)} jobs of {len(CHECKPOINTS) * len(SIZES) * len(STEPS)} kinds, shuffled; a load takes {LOAD_S} s")
    print(f"first in, first out: {fifo_s:6.1f} s, {fifo_loads} loads")
    print(
        f"by plan:             {planned_s:6.1f} s, {engine.loads} loads, {fifo_s / planned_s:.2f} times the throughput"
    )
    print(f"a checkpoint with ready jobs waited {max(waits):.1f} s at most, the bound is {MAX_WAIT_S} s")
    assert fifo_s >= 2 * planned_s
    assert max(waits) <= MAX_WAIT_S
