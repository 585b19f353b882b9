"""Worker faults: a job that kills its process, a cancelled batch, an unavailable database."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpipeline.db import job_control
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.storage import LocalStore
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, published, signing_key, statuses
from tests.integration.databases import on_postgresql


class Watched(FakeEngine):
    """The fake engine, which first calls ``before`` with each batch."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self._before = before

    def generate(self, batch: Batch) -> Sequence[GeneratedImage | GenerationFailure]:
        self._before([prepared.request.prompt for prepared in batch.requests])
        return super().generate(batch)


def _worker(audit: AuditLog, folder: Path, before: Any, *, max_batch: int = 4, lease_ttl_s: float = 60.0) -> Worker:
    limits = WorkerLimits(max_batch=max_batch, lease_ttl_s=lease_ttl_s, max_pixels=10**7)
    return Worker("worker-1", audit, LocalStore(folder / "storage"), Watched(before), limits, signing_key())


def test_a_job_that_ends_the_process_is_found_alone_and_its_neighbours_are_made(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(4, "only"))

    def crash_on_the_second(prompts: list[str]) -> None:
        if prompts[1:2] or "2" in prompts[0]:
            raise RuntimeError("an error that is not ours")

    for _ in range(8):
        try:
            _worker(audit, tmp_path, crash_on_the_second).run()
        except RuntimeError:
            continue
        break
    found = statuses(database, "status", "attempt")
    assert sorted(found) == [("failed", 3), ("succeeded", 1), ("succeeded", 1), ("succeeded", 1)]


def test_a_cancelled_batch_that_was_fetched_is_not_begun(audit: AuditLog, database: Database, tmp_path: Path) -> None:
    submitted = published(audit, chains(8, "only"))
    begun: list[int] = []

    def cancel_during_the_first(prompts: list[str]) -> None:
        begun.append(len(prompts))
        other = AuditLog(database, actor="user:test")
        with other.transaction() as tx:
            job_control.cancel(tx, campaign_id=submitted.campaign_id)

    done = _worker(audit, tmp_path, cancel_during_the_first, max_batch=4).run()
    assert (begun, done.succeeded) == ([4], 0)
    assert set(statuses(database)) == {"cancelled"}


@on_postgresql
def test_dropped_connections_are_waited_out(audit: AuditLog, database: Database, tmp_path: Path) -> None:
    published(audit, chains(6, "draft", "final"))
    killed: list[int] = []

    def drop_all_connections(prompts: list[str]) -> None:
        if len(killed) < 2:
            with database.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                statement = (
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                killed.append(connection.exec_driver_sql(statement).scalar_one())

    done = _worker(audit, tmp_path, drop_all_connections).run()
    assert done.idle
    assert set(statuses(database)) == {"succeeded"}


def test_a_run_that_is_stopped_gives_back_what_it_did_not_begin(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    published(audit, chains(12, "only"))
    stop = threading.Event()
    done = _worker(audit, tmp_path, lambda prompts: stop.set()).run(stop=stop)
    assert done.succeeded == 4
    rows = statuses(database, "status", "attempt")
    assert sorted(rows) == [("ready", 0)] * 8 + [("succeeded", 1)] * 4
