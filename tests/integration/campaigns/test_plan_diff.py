"""`plan` against a database: new, unchanged and removed jobs, reasons why they are new, estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.cost_history import usual
from sdpipeline.db.plan_diff import NEW_IDENTITY, compare
from tests.factories import chains, completed, job_spec, leased, published


def test_comparing_says_what_a_submit_would_do(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    asked = [*list(chains(3))[1:], job_spec("row-3"), job_spec("row-4")]
    asked[0] = job_spec("row-1", prompt="changed")
    with database.read() as connection:
        found = compare(connection, asked, team="default", name="spring")
        nothing = compare(connection, asked, team="default", name="autumn")
    assert (+found.new, +found.unchanged, +found.removed) == ({"draft": 3}, {"draft": 1}, {"draft": 1})
    assert (+nothing.new, +nothing.unchanged, +nothing.removed) == ({"draft": 4}, {}, {})


def test_what_is_removed_is_counted_for_its_stage(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3, "draft", "scene"))
    with database.read() as connection:
        found = compare(connection, chains(2), team="default", name="spring")
    assert +found.removed == {"draft": 1, "scene": 3}


def test_the_keys_that_made_jobs_new_are_named(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2, "draft", "scene"))
    asked = [*chains(2, "draft", "scene", guidance_scale=7.0), job_spec("row-2")]
    with database.read() as connection:
        found = compare(connection, asked, team="default", name="spring", explain=True)
    changes = {(change.stage, change.key): (change.jobs, change.was, change.now) for change in found.changes.values()}
    assert changes["draft", "guidance_scale"] == (2, 4.0, 7.0)
    assert changes["scene", "guidance_scale"] == (2, 4.0, 7.0)
    assert changes["scene", "image (stage draft)"][0] == 2
    assert changes["draft", NEW_IDENTITY][0] == 1
    assert len(changes) == 4


def test_jobs_without_a_picture_are_still_to_make(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    completed(audit, leased(audit, limit=2))
    with database.read() as connection:
        found = compare(connection, chains(4), team="default", name="spring")
    assert sum(found.to_make.values()) == 2


def test_the_new_jobs_whose_picture_the_team_has_are_counted_and_not_to_make(
    audit: AuditLog, database: Database
) -> None:
    published(audit, chains(3))
    completed(audit, leased(audit, limit=2))
    asked = [*chains(3), job_spec("double", prompt="a picture of row-0"), job_spec("row-9")]

    def reused(**changes: Any) -> tuple[int, int]:
        with database.read() as connection:
            found = compare(connection, asked, **{"team": "default", "name": "autumn"} | changes)
        return sum(found.reused.values()), sum(found.to_make.values())

    assert (reused(), reused(name="spring")) == ((3, 2), (1, 2))
    assert (reused(team="other"), reused(reuse=False)) == ((0, 5), (0, 5))


def test_what_a_policy_forbids_is_counted_and_not_to_make(audit: AuditLog, database: Database) -> None:
    forbidden = replace(job_spec("row-0"), blocked="policy.deny: 'row'")
    with database.read() as connection:
        found = compare(connection, [forbidden, job_spec("row-1")], team="default", name="spring")
    assert (found.blocked["draft"], found.new["draft"], sum(found.to_make.values())) == (1, 2, 1)


def test_what_a_policy_allows_again_is_new_as_a_submit_says(audit: AuditLog, database: Database) -> None:
    published(audit, [replace(job_spec("row-0"), blocked="policy.deny: 'row'")])
    with database.read() as connection:
        found = compare(connection, chains(1), team="default", name="spring")
    assert (found.new["draft"], published(audit, chains(1)).added) == (1, 1)


def test_what_pictures_of_a_batch_key_took_is_known_from_any_campaign(audit: AuditLog, database: Database) -> None:
    published(audit, chains(2))
    (key,) = {spec.batch_key for spec in chains(1)}
    with database.read() as connection:
        assert usual(connection, key) is None
    lease = leased(audit)
    completed(audit, lease)
    with database.read() as connection:
        took = usual(connection, key)
    assert took is not None
    assert took.gpu_seconds == pytest.approx(0.1)
    assert took.size_bytes > 0
