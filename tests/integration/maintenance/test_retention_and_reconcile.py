"""Retention combined with reconciling, restoring, budgets and reuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.audit import load_key
from sdpipeline.db import budgets, queue
from sdpipeline.db.audit import AuditLog
from sdpipeline.engine import Batch, GeneratedImage, PreparedRequest
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.jobs import Lease
from sdpipeline.maintenance.reconcile import reconcile
from sdpipeline.storage import LocalStore
from sdpipeline.worker.finished_picture import Attempt, DeliveryRequest, finish
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.picture_storage import store_picture
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, expired, job_spec, leased, published, signing_key, statuses
from tests.integration.archives.test_archiver import MONDAY, TUESDAY, Editions, edition_of
from tests.integration.databases import on_sqlite
from tests.integration.maintenance.test_retention import ANNA, of

pytestmark = on_sqlite


@pytest.fixture
def place(audit: AuditLog, tmp_path: Path) -> Editions:
    key = load_key(tmp_path / "key.pem", create=True)
    return Editions(audit, LocalStore(tmp_path / "storage"), tmp_path, key)


def reconciled(place: Editions, **options: Any) -> Any:
    return reconcile(place.audit, place.store, lambda: place.key, grace_s=0.0, **options)


def left_behind(place: Editions, lease: Lease) -> None:
    """Store a picture of the lease's first job that is never recorded."""
    job = lease.jobs[0]
    (made,) = FakeEngine().generate(Batch(requests=[PreparedRequest(request=job.request)], bucket=8))
    assert isinstance(made, GeneratedImage)
    made = replace(made, ran=made.ran | {"slot": 5})
    attempt = Attempt(number=job.attempt, lease_id=lease.id, worker_id="worker-1", gpu_seconds=0.1)
    request = DeliveryRequest(leased=job, consumed=Consumed(), generated=made, attempt=attempt)
    store_picture(place.store, finish(request, signing_key()))


def worked(place: Editions) -> Any:
    limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
    return Worker("worker-1", place.audit, place.store, FakeEngine(), limits, signing_key()).run()


def test_what_a_policy_blocked_and_was_erased_stays_gone_when_the_policy_allows_it(place: Editions) -> None:
    spec = next(of(ANNA, job_spec(ANNA, prompt=f"portrait of {ANNA}")))
    published(place.audit, [replace(spec, blocked="policy.deny: 'portrait'")])
    assert statuses(place.audit.database) == ["blocked"]
    assert place.erase().jobs == 1
    published(place.audit, [spec])
    assert statuses(place.audit.database) == ["blocked"]
    assert ANNA not in place.stored_text()


def test_what_was_erased_is_not_blocked_and_so_not_brought_back(place: Editions) -> None:
    spec = next(of(ANNA, job_spec(ANNA, prompt=f"portrait of {ANNA}")))
    published(place.audit, [spec])
    place.erase()
    published(place.audit, [replace(spec, blocked="policy.deny: 'portrait'")])
    published(place.audit, [spec])
    assert statuses(place.audit.database) == ["cancelled"]
    assert ANNA not in place.stored_text()
    assert place.faults() == []


def test_reconcile_leaves_the_pictures_of_archived_editions_alone(place: Editions) -> None:
    a = [job_spec("a")]
    place.made(edition_of(MONDAY, a))
    place.age(1)
    published(place.audit, edition_of(TUESDAY, a))
    expired(place.audit, leased(place.audit))
    place.made(edition_of(TUESDAY, a))
    assert place.archive() == 1
    assert place.faults() == []
    done = reconciled(place, repair=True)
    assert place.faults() == []
    assert done.faults == []


def test_the_pictures_of_archived_editions_are_not_adopted(place: Editions) -> None:
    a = [job_spec("a")]
    place.made(edition_of(MONDAY, a))
    place.age(1)
    published(place.audit, edition_of(TUESDAY, a))
    expired(place.audit, leased(place.audit))
    place.made(edition_of(TUESDAY, a))
    assert place.archive() == 1
    done = reconciled(place, adopt=True)
    assert (done.adoption.adopted, done.adoption.waiting) == (0, 0)


def test_erasing_a_subject_leaves_others_archived_pictures(place: Editions) -> None:
    a = [job_spec("a", prompt="same")]
    place.made(edition_of(MONDAY, a))
    place.age(1)
    place.made(edition_of(TUESDAY, of(ANNA, *a)))
    assert place.archive() == 1
    assert place.faults() == []
    place.erase()
    assert place.faults() == []


def test_what_was_erased_is_not_adopted(place: Editions) -> None:
    published(place.audit, [job_spec("a", prompt="a secret")], max_attempts=1)
    lease = leased(place.audit)
    left_behind(place, lease)
    expired(place.audit, lease)
    expired(place.audit, leased(place.audit))
    assert statuses(place.audit.database) == ["failed"]
    place.age(1)
    assert place.forget(pictures_days=30, prompts_days=30)["prompts"] == 1
    done = reconciled(place, adopt=True)
    assert done.adoption.adopted == 0
    assert statuses(place.audit.database) == ["failed"]
    assert place.faults() == []


def test_an_erased_child_is_not_made_ready_by_an_adopted_parent(place: Editions) -> None:
    published(place.audit, list(chains(1, "draft", "scene")), max_attempts=1)
    lease = leased(place.audit)
    left_behind(place, lease)
    expired(place.audit, lease)
    expired(place.audit, leased(place.audit))
    assert statuses(place.audit.database) == ["failed", "skipped"]
    place.age(1, 2)
    assert place.forget(pictures_days=30, prompts_days=30)["prompts"] == 2
    reconciled(place, adopt=True)
    worked(place)
    assert statuses(place.audit.database) == ["failed", "skipped"]


def test_a_second_picture_of_a_job_is_an_orphan_and_does_not_wait_for_ever(place: Editions) -> None:
    published(place.audit, [job_spec("a")])
    lease = leased(place.audit)
    left_behind(place, lease)
    expired(place.audit, lease)
    place.made([job_spec("a")])
    done = reconciled(place, adopt=True)
    assert done.adoption.waiting == 0
    assert len(reconciled(place, repair=True).faults) == 2


def test_equal_jobs_of_different_subjects_share_a_batch(place: Editions) -> None:
    jobs = [replace(job_spec(f"r{n}", prompt="same"), subject=f"s{n}") for n in range(8)]
    published(place.audit, jobs)
    done = worked(place)
    assert done.batches == 1


def test_a_released_job_that_a_budget_holds_again_is_no_fault(place: Editions) -> None:
    published(place.audit, list(chains(4)), budget={"max_images": 10})
    with place.audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    lease = leased(place.audit)
    with place.audit.transaction() as tx:
        queue.release(tx, lease_id=lease.id)
    assert place.faults() == []
    published(place.audit, list(chains(5)), budget={"max_images": 20})
    assert place.faults() == []


def test_erasing_a_subject_takes_the_orphans_of_all_its_campaigns(place: Editions) -> None:
    a = list(of(ANNA, job_spec("a", prompt=f"portrait of {ANNA}")))
    for name in ("spring", "autumn"):
        published(place.audit, a, name=name)
        lease = leased(place.audit)
        left_behind(place, lease)
        expired(place.audit, lease)
        place.made(a, name=name)
    place.erase()
    assert list(place.store.list("default/")) == []
