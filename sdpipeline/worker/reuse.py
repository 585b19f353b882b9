"""Reuse of pictures: jobs whose picture exists, or is being made, are delivered as copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from sdpipeline.db import reuse
from sdpipeline.db.connection import Database
from sdpipeline.db.reuse import Original
from sdpipeline.errors import InputImageError, LeaseLostError, ObjectConflictError, SdpError
from sdpipeline.jobs import Lease, LeasedJob
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import ObjectStore
from sdpipeline.worker.copies import copy_picture
from sdpipeline.worker.held_leases import LeaseWork
from sdpipeline.worker.outages import Outages
from sdpipeline.worker.outcomes import Outcomes

_log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Reuse:
    """Find the jobs of a lease that need the device, and deliver copies for the others.

    With ``trust_anchors`` (roots in PEM), only pictures whose signature chains to one of them are copied. ``engine`` is
    the name of the engine that must have made them.
    """

    database: Database
    store: ObjectStore
    signing: SigningKey
    trust_anchors: str
    engine: str
    outages: Outages
    outcomes: Outcomes
    _being_made: set[str] = field(default_factory=set)

    def jobs_to_make(self, work: LeaseWork) -> Iterator[LeasedJob]:
        """Yield the jobs of the lease that need the device.

        Jobs whose picture exists are delivered as copies; jobs whose picture is being made wait for it. Equal jobs
        that two workers lease at the same time are made by both.
        """
        lease = work.lease
        # Read before the pictures are looked up: one finished in between is then found later, not made again.
        being_made = set(self._being_made)
        originals = self._originals([leased for leased in lease.jobs if leased.fingerprint not in being_made])
        for leased in lease.jobs:
            if not leased.rules.reuse:
                yield leased
            elif leased.fingerprint in being_made:
                work.waiting.append(leased)
            elif not self._deliver_copy(lease, leased, originals):
                if leased.private:
                    yield leased
                    continue
                being_made.add(leased.fingerprint)
                work.making.add(leased.fingerprint)
                self._being_made.add(leased.fingerprint)
                yield leased

    def forget(self, work: LeaseWork) -> None:
        """Let no other job wait for the pictures of this lease: they are delivered, or will not be made."""
        self._being_made -= work.making

    def deliver_waiting(self, work: LeaseWork) -> None:
        """Deliver copies of pictures made meanwhile; release the jobs whose picture was not made after all."""
        originals = self._originals(work.waiting)
        left = [leased for leased in work.waiting if not self._deliver_copy(work.lease, leased, originals)]
        if left:
            self.outcomes.release(work.lease)

    def _originals(self, jobs: Sequence[LeasedJob]) -> Mapping[str, Original]:
        """Return existing pictures for these jobs, by fingerprint."""
        fingerprints = {leased.fingerprint for leased in jobs if leased.rules.reuse}

        def find() -> Mapping[str, Original]:
            with self.database.read() as connection:
                return reuse.newest(connection, team=jobs[0].team, fingerprints=fingerprints)

        return self.outages.wait_for_database(find) if fingerprints else {}

    def _deliver_copy(self, lease: Lease, leased: LeasedJob, originals: Mapping[str, Original]) -> bool:
        """Deliver a copy of an existing picture; return False if there is none, or if it differs from its record."""
        original = originals.get(leased.fingerprint)
        if original is None:
            return False
        copy = partial(
            copy_picture,
            self.store,
            leased,
            original,
            self.outcomes.attempt(lease, leased, gpu_seconds=0.0),
            engine=self.engine,
            signing=self.signing,
            trust_anchors=self.trust_anchors,
        )
        try:
            stored = self.outages.wait_for_services(lease, copy)
        except (InputImageError, ObjectConflictError) as error:
            _log.warning("picture_not_reused", job_id=leased.id, key=original.stored.key, error=str(error))
            return False
        except LeaseLostError:
            self.outcomes.log_lost(leased)
        except SdpError as error:
            self.outcomes.fail(lease, leased, error)
        else:
            self.outcomes.complete_copy(lease, leased, stored)
        return True
