"""Faults and load while workers die: failing requests, repeated outages, new campaigns and operators' actions."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from sqlalchemy import func, select

from sdpipeline.db import job_control
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.tables import campaign, job
from sdpipeline.domain import TERMINAL
from sdpipeline.errors import DatabaseUnavailableError
from tests.chaos.local_workers import MAX_ATTEMPTS
from tests.factories import chains, published
from tests.integration.conftest import CREDENTIALS, Bucket
from tests.integration.fault_proxy import Choose, Fault, FaultProxy

UNSUCCESSFUL = ("failed", "blocked", "skipped", "cancelled")
TRANSIENT = (
    Fault.SLOW_DOWN,
    Fault.INTERNAL_ERROR,
    Fault.CONFLICT,
    Fault.RESET,
    Fault.LOST_REPLY,
    Fault.CUT_BODY,
)
"""All faults except the endless stall, which would block a worker for half a minute."""


def random_faults(chance: random.Random, share: float) -> Choose:
    """Let this share of all requests fail with a random transient fault."""
    return lambda _method, _path: chance.choice(TRANSIENT) if chance.random() < share else None


def s3_settings(bucket: Bucket, proxy: FaultProxy) -> dict[str, str]:
    """Return the settings of a worker that uses a bucket through the proxy."""
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/dev/null")
    return {
        "SDP_STORAGE_URL": f"s3://{bucket.name}",
        "SDP_S3__ENDPOINT_URL": proxy.url,
        "SDP_S3__REGION": "us-east-1",
        "SDP_S3__ADDRESSING_STYLE": "path",
    } | (CREDENTIALS | nowhere)


@contextmanager
def repeatedly(act: Callable[[], None], chance: random.Random, pause_s: tuple[float, float]) -> Iterator[list[int]]:
    """Call ``act`` repeatedly in a thread until the block ends; yields the count, as a list of one."""
    over, count = threading.Event(), [0]

    def repeat() -> None:
        while not over.wait(chance.uniform(*pause_s)):
            act()
            count[0] += 1

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(repeat)
        try:
            yield count
        finally:
            over.set()
        running.result()


def submit_more(audit: AuditLog, *, chains_at_once: int) -> Callable[[], None]:
    """Submit another campaign if few jobs are left; every second one requests the pictures of the one before."""
    numbers = itertools.count()

    def submit() -> None:
        with suppress(DatabaseUnavailableError):
            if _unfinished(audit) > chains_at_once:
                return
            number = next(numbers)
            asked = chains(chains_at_once, "draft", "scene", guidance_scale=1.0 + number // 2)
            published(audit, asked, name=f"campaign-{number}", max_attempts=MAX_ATTEMPTS)

    return submit


def operator_actions(audit: AuditLog, chance: random.Random, *, chains_at_once: int) -> Callable[[], None]:
    """Cancel, retry, change, prune, pause or resume a campaign, while workers lease its jobs."""

    def resubmit(name: str, count: int, *, prune: bool) -> None:
        asked = chains(count, "draft", "scene", guidance_scale=1.0 + chance.randrange(4))
        published(audit, asked, name=name, prune=prune, max_attempts=MAX_ATTEMPTS)

    def act() -> None:
        with suppress(DatabaseUnavailableError):
            campaigns = _campaigns(audit)
            if not campaigns:
                return
            campaign_id, name = chance.choice(campaigns)
            what = chance.choice(("cancel", "retry", "change", "prune", "pause", "resume", "resume"))
            if what in {"change", "prune"}:
                count = chains_at_once // 2 if what == "prune" else chains_at_once
                resubmit(name, count, prune=what == "prune")
                return
            with audit.transaction() as tx:
                if what == "cancel":
                    job_control.cancel(tx, campaign_id=campaign_id)
                elif what == "retry":
                    job_control.retry(tx, campaign_id=campaign_id, statuses=UNSUCCESSFUL)
                else:
                    status = "paused" if what == "pause" else "active"
                    job_control.set_campaign_status(tx, campaign_id=campaign_id, status=status)

    return act


def reopen_all(audit: AuditLog) -> None:
    """Resume every campaign and retry all unsuccessful jobs: no job of these campaigns can fail by itself."""
    for campaign_id, _ in _campaigns(audit):
        with audit.transaction() as tx:
            job_control.set_campaign_status(tx, campaign_id=campaign_id, status="active")
            job_control.retry(tx, campaign_id=campaign_id, statuses=UNSUCCESSFUL)


def _campaigns(audit: AuditLog) -> list[tuple[int, str]]:
    with audit.database.read() as connection:
        return [(row.id, row.name) for row in connection.execute(select(campaign.c.id, campaign.c.name))]


def _unfinished(audit: AuditLog) -> int:
    with audit.database.read() as connection:
        return int(connection.execute(select(func.count()).where(job.c.status.not_in(TERMINAL))).scalar_one())
