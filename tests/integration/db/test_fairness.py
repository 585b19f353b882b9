"""Fairness between campaigns: no campaign starves, and checkpoints are rarely changed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from sqlalchemy import update

from sdpipeline.db import tables
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.leasing import AgingPolicy, Cursor
from sdpipeline.domain import CheckpointRef
from sdpipeline.jobs import Lease
from tests.factories import CHECKPOINT, chains, completed, leased, published, try_lease

OTHER = CheckpointRef(alias="other", digest="0f" * 32)
MAX_WAIT_S = 120.0
BATCH_S = 10.0


@dataclass(slots=True)
class Device:
    """A worker that holds one checkpoint at a time, and the leases it got."""

    cursor: Cursor = field(default_factory=lambda: Cursor(AgingPolicy(MAX_WAIT_S)))
    leases: list[Lease] = field(default_factory=list)

    def work(self, audit: AuditLog, name: str) -> Lease:
        resident = [lease.checkpoint_digest for lease in self.leases[-1:]]
        lease = leased(audit, worker_id=name, limit=1, cursor=self.cursor, resident=resident)
        self.leases.append(lease)
        return lease

    @property
    def switches(self) -> int:
        return sum(a.checkpoint_digest != b.checkpoint_digest for a, b in pairwise(self.leases))


def time_passes(database: Database, seconds: float) -> None:
    """Move all submits and leases this many seconds into the past."""
    with database.write() as connection:
        for column in (tables.lease.c.created_at, tables.campaign_version.c.created_at):
            connection.execute(update(column.table).values({column: column - seconds}))


def rounds(audit: AuditLog, database: Database, devices: list[Device], count: int) -> Iterator[list[str]]:
    """The campaigns of the devices' leases, one list per batch."""
    for _ in range(count):
        leases = [device.work(audit, f"worker-{n}") for n, device in enumerate(devices)]
        for lease in leases:
            completed(audit, lease)
        time_passes(database, BATCH_S)
        yield [lease.jobs[0].campaign for lease in leases]


def longest_wait_s(worked: list[list[str]], campaign: str) -> float:
    served = [n for n, names in enumerate(worked) if campaign in names]
    return BATCH_S * max(later - earlier for earlier, later in pairwise([-1, *served, len(worked)]))


def test_no_campaign_starves_and_the_lowest_number_has_most_leases(audit: AuditLog, database: Database) -> None:
    published(audit, chains(100), name="urgent", priority=10)
    published(audit, chains(20), name="usual", priority=100)
    published(audit, chains(20, checkpoint=OTHER), name="later", priority=500)
    devices = [Device(), Device()]
    worked = list(rounds(audit, database, devices, 40))
    for name in ("usual", "later"):
        assert longest_wait_s(worked, name) <= MAX_WAIT_S + 3 * BATCH_S
    assert Counter(name for names in worked for name in names)["urgent"] >= 60
    assert worked[0] == ["urgent", "urgent"]


def test_equal_campaigns_share_a_device_and_change_its_checkpoint_rarely(audit: AuditLog, database: Database) -> None:
    published(audit, chains(80), name="spring")
    published(audit, chains(80, checkpoint=OTHER), name="autumn")
    device = Device()
    worked = list(rounds(audit, database, [device], 78))
    shares = Counter(name for names in worked for name in names)
    assert 30 <= shares["spring"] <= 48
    assert device.switches <= 78 * BATCH_S / MAX_WAIT_S


def test_a_checkpoint_is_leased_so_much_sooner_as_its_batch_begins_later(audit: AuditLog, database: Database) -> None:
    published(audit, chains(60), name="urgent", priority=10)
    published(audit, chains(10, checkpoint=OTHER), name="usual", priority=100)
    device = Device(Cursor(AgingPolicy(MAX_WAIT_S, lead_s=BATCH_S)))
    worked = list(rounds(audit, database, [device], 40))
    assert longest_wait_s(worked, "usual") <= MAX_WAIT_S - BATCH_S


def test_several_that_wait_are_let_go_first_by_turns_and_never_before_half_of_the_bound() -> None:
    assert AgingPolicy(100.0, lead_s=5.0, waiting_checkpoints=3).overdue_after_s == 70.0
    assert AgingPolicy(100.0, lead_s=50.0, waiting_checkpoints=3).overdue_after_s == 50.0
    aging = AgingPolicy(100.0)
    for after_s in (10.0, 1.0, 1.0):
        aging.record_lead(after_s)
    assert 6.0 < aging.lead_s < 7.0


def test_equal_campaigns_with_one_checkpoint_take_turns(audit: AuditLog, database: Database) -> None:
    for name in ("a", "b", "c"):
        published(audit, chains(5), name=name)
    worked = [names[0] for names in rounds(audit, database, [Device()], 9)]
    assert [set(worked[n : n + 3]) for n in (0, 3, 6)] == [{"a", "b", "c"}] * 3


def test_campaigns_that_waited_too_long_take_every_second_lease_at_most(audit: AuditLog, database: Database) -> None:
    published(audit, chains(10), name="first", priority=400)
    for n in range(4):
        published(audit, chains(5), name=f"late-{n}", priority=500)
    time_passes(database, MAX_WAIT_S)
    always_late = Device(Cursor(AgingPolicy(BATCH_S / 2)))
    worked = [names[0] for names in rounds(audit, database, [always_late], 9)]
    assert 4 <= worked.count("first") <= 6


def test_among_those_that_waited_too_long_lower_numbers_get_more(audit: AuditLog, database: Database) -> None:
    published(audit, chains(60), name="urgent", priority=0)
    published(audit, chains(30), name="often", priority=99)
    published(audit, chains(30), name="rarely", priority=399)
    time_passes(database, MAX_WAIT_S)
    device = Device(Cursor(AgingPolicy(BATCH_S)))
    shares = Counter(name for names in rounds(audit, database, [device], 60) for name in names)
    assert shares["often"] > 1.5 * shares["rarely"] > 0


def test_one_that_waited_too_long_gets_a_part_of_a_batch_though_full_ones_are_wanted(
    audit: AuditLog, database: Database
) -> None:
    published(audit, chains(8), name="large", priority=10)
    published(audit, chains(1), name="small", priority=500)
    cursor = Cursor(AgingPolicy(MAX_WAIT_S))
    completed(audit, leased(audit, limit=4, cursor=cursor))
    time_passes(database, MAX_WAIT_S)
    with database.write() as connection:  # the large campaign's turn is not over
        connection.execute(update(tables.lease).values(created_at=tables.lease.c.created_at + MAX_WAIT_S))
    lease = try_lease(audit, limit=4, full_only=True, cursor=cursor)
    assert lease is not None
    assert lease.jobs[0].campaign == "small"


def test_a_campaign_submitted_again_after_long_does_not_go_out_of_turn(audit: AuditLog, database: Database) -> None:
    published(audit, chains(1), name="old", priority=500)
    completed(audit, leased(audit))
    time_passes(database, 10 * MAX_WAIT_S)
    published(audit, chains(2, guidance_scale=2.0), name="old", priority=500)
    published(audit, chains(1), name="urgent", priority=10)
    assert Device().work(audit, "worker-1").jobs[0].campaign == "urgent"


def test_a_job_of_a_lower_number_goes_first_within_its_campaign(audit: AuditLog, database: Database) -> None:
    published(audit, chains(3))
    with database.write() as connection:
        connection.execute(update(tables.job).where(tables.job.c.id == 3).values(priority=50))
    assert Device().work(audit, "worker-1").jobs[0].id == 3


def test_what_is_on_the_device_is_worked_off_to_its_last_part_before_a_checkpoint_is_changed(audit: AuditLog) -> None:
    published(audit, chains(3), name="spring")
    published(audit, chains(4, checkpoint=OTHER), name="autumn")
    first = leased(audit, limit=2, resident=[CHECKPOINT.digest])
    rest = leased(audit, limit=2, resident=[CHECKPOINT.digest], full_only=True)
    assert [len(lease.jobs) for lease in (first, rest)] == [2, 1]
    assert {lease.jobs[0].campaign for lease in (first, rest)} == {"spring"}


def test_a_part_of_a_deeper_stage_waits_for_the_work_in_flight_that_may_fill_it(audit: AuditLog) -> None:
    published(audit, chains(1, "draft", "final"))
    completed(audit, leased(audit, limit=2))
    assert try_lease(audit, limit=2, resident=[CHECKPOINT.digest], full_only=True) is None
    assert [job.stage for job in leased(audit, limit=2, resident=[CHECKPOINT.digest]).jobs] == ["final"]


def test_each_checkpoint_of_one_campaign_gets_its_turn_in_time(audit: AuditLog, database: Database) -> None:
    published(audit, (*chains(60), *chains(60, "other", checkpoint=OTHER)))
    device = Device()
    for _ in rounds(audit, database, [device], 40):
        pass
    used = [[lease.checkpoint_digest] for lease in device.leases]
    assert longest_wait_s(used, OTHER.digest) <= MAX_WAIT_S + 3 * BATCH_S
    assert device.switches <= 40 * BATCH_S / MAX_WAIT_S
