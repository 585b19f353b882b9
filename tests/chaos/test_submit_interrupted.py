"""A submit that is killed at any point leaves all of a version or none of it."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest

from sdpipeline.db import audit_queries
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from tests.factories import chains, published, statuses
from tests.integration.processes import processes

pytestmark = pytest.mark.chaos

CHAINS = 600
KILLS = 6
STAGES = ("draft", "final")


def _publish(url: str, changes: dict[str, Any]) -> None:
    database = open_database(url)
    published(AuditLog(database, actor="user:test"), chains(CHAINS, *STAGES, **changes), source=str(changes))
    database.close()


def test_a_submit_killed_anywhere_leaves_all_of_a_version_or_none(database_url: str) -> None:
    database = open_database(database_url)
    started = time.monotonic()
    _publish(database_url, {"guidance_scale": 1.0})
    whole_s = time.monotonic() - started
    seen = Counter[str]()
    chance = random.Random(7)
    present = {"guidance_scale": 1.0}
    for number in range(KILLS):
        wanted = {"guidance_scale": 2.0 + number}
        child = processes.Process(target=_publish, args=(database_url, wanted))
        child.start()
        time.sleep(chance.uniform(0, 2.5 * whole_s))
        child.kill()
        child.join()
        scales = Counter(request["guidance_scale"] for request in statuses(database, "request"))
        assert scales in (
            {present["guidance_scale"]: CHAINS * len(STAGES)},
            {wanted["guidance_scale"]: CHAINS * len(STAGES)},
        )
        arrived = wanted["guidance_scale"] in scales
        seen["all" if arrived else "none"] += 1
        present = wanted if arrived else present
        assert Counter(statuses(database)) == {"ready": CHAINS, "waiting": CHAINS}
        with database.read() as connection:
            assert len(list(audit_queries.published_roots(connection))) == 1
    assert seen["none"], seen  # at least one was interrupted midway, else all kills came too late
    database.close()
