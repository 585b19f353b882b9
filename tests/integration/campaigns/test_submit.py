"""Submitting versions of a campaign, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from sdpipeline.db import job_control, queue, registry, staging, tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.budgets import Charge
from sdpipeline.db.connection import Database
from sdpipeline.db.submit import submit
from sdpipeline.domain import CheckpointRef
from tests.factories import (
    chains,
    checkpoint_files,
    completed,
    events,
    failed,
    job_spec,
    leased,
    publication,
    published,
    statuses,
    stored_image,
    try_lease,
)
from tests.integration.databases import on_postgresql


def test_new_jobs_wait_for_their_parents_and_the_others_are_ready(audit: AuditLog, database: Database) -> None:
    result = published(audit, chains(2, "draft", "scene"))
    assert (result.version, result.added, result.unchanged, result.cancelled) == (1, 4, 0, 0)
    assert statuses(database, "row_key", "stage", "status", "parents_left") == [
        ("row-0", "draft", "ready", 0),
        ("row-0", "scene", "waiting", 1),
        ("row-1", "draft", "ready", 0),
        ("row-1", "scene", "waiting", 1),
    ]


def test_parents_are_linked_within_the_chain(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2, "draft", "scene"))
    with database.read() as connection:
        assert connection.execute(select(tables.job_parent).order_by(tables.job_parent.c.job_id)).all() == [
            (2, 1),
            (4, 3),
        ]


def test_a_join_counts_each_parent_once(audit: AuditLog, database: Database) -> None:
    left, right = job_spec("a", stage="left"), job_spec("a", stage="right")
    joined = job_spec("a", stage="joined", parents=(left, right))
    joined = replace(joined, parents=(*joined.parents, joined.parents[0]))
    published(audit, [left, right, joined])
    assert statuses(database, "parents_left") == [0, 0, 2]


def test_submitting_the_same_again_changes_nothing_and_says_so(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3), source="v1")
    before = statuses(database, "id", "version_id", "salt"), len(events(database))
    again = published(audit, chains(3), source="v1")
    assert (again.version, again.added, again.unchanged) == (1, 0, 3)
    assert (statuses(database, "id", "version_id", "salt"), len(events(database))) == before


def test_the_same_jobs_from_another_text_are_a_new_version(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3), source="v1")
    again = published(audit, chains(3), source="v1 # commented")
    assert (again.version, again.added, again.unchanged) == (2, 0, 3)
    assert set(statuses(database, "version_id")) == {2}


def test_a_changed_job_and_its_children_start_anew_and_their_siblings_do_not(
    audit: AuditLog, database: Database
) -> None:
    published(audit, chains(2, "draft", "scene"))
    completed(audit, leased(audit))
    draft = job_spec("row-0", prompt="a green square")
    result = published(
        audit, [draft, job_spec("row-0", stage="scene", parents=(draft,)), *list(chains(2, "draft", "scene"))[2:]]
    )
    assert (result.added, result.unchanged) == (2, 2)
    assert statuses(database) == ["ready", "waiting", "succeeded", "ready"]
    assert statuses(database, "attempt") == [0, 0, 1, 0]


def test_changing_a_file_back_finds_the_pictures_again(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1, "draft", "scene"))
    completed(audit, leased(audit))
    draft = job_spec("row-0", prompt="a green square")
    published(audit, [draft, job_spec("row-0", stage="scene", parents=(draft,))])
    assert statuses(database) == ["ready", "waiting"]
    published(audit, chains(1, "draft", "scene"))
    assert statuses(database, "status", "attempt") == [("succeeded", 1), ("ready", 0)]


def test_a_corrected_cell_updates_the_variables_of_its_job(audit: AuditLog, database: Database) -> None:
    published(audit, [job_spec("a")])
    spec = job_spec("a", prompt="corrected")
    published(audit, [replace(spec, variables=(("colour", "green"),))])
    assert statuses(database, "variables") == [{"colour": "green"}]


def test_prune_cancels_what_is_no_longer_asked_for_and_asking_again_revives_it(
    audit: AuditLog, database: Database
) -> None:
    published(audit, chains(3))
    completed(audit, leased(audit, limit=1))
    pruned = published(audit, list(chains(3))[2:], prune=True)
    assert (pruned.added, pruned.unchanged, pruned.cancelled) == (0, 1, 2)
    assert statuses(database) == ["cancelled", "cancelled", "ready"]
    revived = published(audit, chains(3))
    assert (revived.added, revived.unchanged) == (2, 1)
    assert statuses(database) == ["succeeded", "ready", "ready"]


def test_prune_leaves_other_editions_alone(audit: AuditLog, database: Database) -> None:
    published(audit, [replace(spec, edition="monday") for spec in chains(2)])
    result = published(audit, [replace(spec, edition="tuesday") for spec in chains(1)], prune=True)
    assert result.cancelled == 0
    assert statuses(database) == ["ready"] * 3


def test_without_prune_what_is_no_longer_asked_for_goes_on(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    assert published(audit, chains(1)).cancelled == 0
    assert statuses(database) == ["ready"] * 3


def test_a_stage_added_later_takes_up_where_its_parents_are(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    lease = leased(audit)
    failed(audit, lease, lease.jobs[1])
    with audit.transaction() as tx:
        charge = Charge(worker_id="worker-1")
        queue.complete(tx, lease_id=lease.id, leased=lease.jobs[0], stored=stored_image(lease.jobs[0]), charge=charge)
    published(audit, chains(3, "draft", "scene", "final"))
    assert statuses(database, "stage", "status", "parents_left")[3:] == [
        ("scene", "ready", 0),
        ("final", "waiting", 1),
        ("scene", "skipped", 1),
        ("final", "skipped", 1),
        ("scene", "waiting", 1),
        ("final", "waiting", 1),
    ]


def test_an_exception_in_the_middle_leaves_nothing(audit: AuditLog, database: Database) -> None:
    def submitted_and_cut() -> None:
        with staging.prepared(chains(2)) as ready, audit.transaction() as tx:
            submit(tx, ready, publication(source=""))
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        submitted_and_cut()
    with database.read() as connection:
        for table in tables.metadata.sorted_tables:
            assert connection.execute(select(func.count()).select_from(table)).scalar() == 0, table.name
    assert published(audit, chains(2)).added == 2


def test_workers_see_nothing_of_a_version_until_it_is_published(audit: AuditLog, database: Database) -> None:
    other = AuditLog(database, actor="worker:other")
    with staging.prepared(chains(2)) as ready, audit.transaction() as tx:
        submit(tx, ready, publication(source=""))
        if not database.is_sqlite:  # on SQLite nothing else can write meanwhile
            assert try_lease(other) is None
        assert statuses(database) == []
    assert len(leased(other).jobs) == 2


def test_campaigns_of_two_teams_may_share_a_name(audit: AuditLog, database: Database) -> None:
    first = published(audit, chains(1))
    second = published(audit, chains(1), team="other")
    assert first.campaign_id != second.campaign_id
    assert second.added == 1


def test_a_job_is_told_to_stop_when_its_file_changes_while_it_is_made(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    lease = leased(audit)
    published(audit, [job_spec("row-0", prompt="changed")])
    assert completed(audit, lease) == [False]
    assert statuses(database, "status", "attempt") == [("ready", 0)]
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(tables.image)).scalar() == 0
        assert connection.execute(select(tables.attempt.c.outcome)).scalars().all() == ["abandoned"]


@on_postgresql
def test_a_child_published_while_its_parent_finishes_is_not_forgotten(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1))
    lease = leased(audit)
    other = AuditLog(database, actor="worker:other")
    finishing = threading.Thread(target=completed, args=(other, lease))
    with staging.prepared(chains(1, "draft", "scene")) as ready, audit.transaction() as tx:
        submit(tx, ready, publication(source="v2"))
        finishing.start()
        finishing.join(0.5)
    finishing.join()
    assert statuses(database) == ["succeeded", "ready"]


def test_pruned_jobs_stay_linked_to_what_was_made(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2, "draft", "scene"))
    published(audit, list(chains(2, "draft", "scene"))[:2], prune=True)
    with audit.transaction() as tx:
        assert job_control.retry(tx, campaign_id=1, statuses=["cancelled"]) == 2
    assert statuses(database) == ["ready", "waiting", "ready", "waiting"]


def test_jobs_whose_weights_were_revoked_before_they_are_published_are_blocked(
    audit: AuditLog, database: Database
) -> None:
    with audit.transaction() as tx:
        registry.remember(tx, [checkpoint_files("shapes")])
        registry.revoke(tx, checkpoint_files("shapes").digest, because="licence")
    spec = next(chains(1, checkpoint=CheckpointRef(alias="shapes", digest=checkpoint_files("shapes").digest)))
    published(audit, [spec, job_spec("b", stage="scene", parents=(spec,)), job_spec("c")])
    assert statuses(database) == ["blocked", "skipped", "ready"]
