"""Delivery of pictures: finish, store and record each one in a single call that may be repeated."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from sdpipeline.db import queue as jobs
from sdpipeline.db import workers
from sdpipeline.db.audit import AuditLog
from sdpipeline.errors import DatabaseUnavailableError, LeaseLostError, TransientError
from sdpipeline.jobs import StoredImage
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import ObjectStore
from sdpipeline.worker.finished_picture import DeliveryRequest, FinishedPicture, finish
from sdpipeline.worker.picture_storage import store_picture


class Deliverer(Protocol):
    """Interface that turns an engine's output into recorded pictures. Called from several threads."""

    def deliver(self, request: DeliveryRequest) -> StoredImage:
        """Encode, sign, store and record the picture; return it as recorded.

        A call that an outage interrupted may be repeated: it goes on with the same bytes, and a picture is recorded
        once. Raises the outage's TransientError, LeaseLostError if another worker owns the job now, and a
        PermanentError if the picture itself is refused.
        """

    def silent_s(self) -> float:
        """Return the seconds since the last sign of life of the delivering process; 0 while it runs, also during an
        outage."""


@dataclass(slots=True)
class _Progress:
    """Results of a delivery's steps so far."""

    picture: FinishedPicture | None = None
    stored: StoredImage | None = None


@dataclass(slots=True)
class LocalDeliverer:
    """Deliver in this process.

    An interrupted delivery keeps its progress for the next call, because objects that an outage left half stored must
    get the same bytes again. ``most_kept`` limits the interrupted deliveries; it must exceed those under way, as the
    oldest are dropped.
    """

    store: ObjectStore
    signing: SigningKey
    audit: AuditLog
    most_kept: int = 16
    _interrupted: dict[tuple[str, int], _Progress] = field(default_factory=dict)
    _keeping: threading.Lock = field(default_factory=threading.Lock)
    _shown: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def deliver(self, request: DeliveryRequest) -> StoredImage:
        """See :meth:`Deliverer.deliver`."""
        key = (request.attempt.lease_id, request.leased.id)
        with self._keeping:
            progress = self._interrupted.pop(key, None) or _Progress()
        try:
            return self._continue(request, progress)
        except TransientError:
            self._keep(key, progress)
            raise

    def silent_s(self) -> float:
        """Return 0: this process delivers."""
        return 0.0

    def _continue(self, request: DeliveryRequest, progress: _Progress) -> StoredImage:
        if progress.picture is None:
            progress.picture = finish(request, self.signing)
        if progress.stored is None:
            progress.stored = store_picture(self.store, progress.picture)
            self._show_losses(request.attempt.worker_id)
        return self._record(request, progress.stored)

    def _record(self, request: DeliveryRequest, stored: StoredImage) -> StoredImage:
        leased, attempt = request.leased, request.attempt
        with self.audit.transaction() as tx:
            if jobs.complete(tx, lease_id=attempt.lease_id, leased=leased, stored=stored, charge=attempt.charge):
                return stored
        # An earlier call may have recorded it, if only its answer was lost.
        with self.audit.database.read() as connection:
            recorded = jobs.recorded(connection, lease_id=attempt.lease_id, leased=leased)
        if recorded is None:
            raise LeaseLostError(f"the lease of job {leased.id} was lost before its picture was recorded")
        return recorded

    def _show_losses(self, worker_id: str) -> None:
        """Have ``status`` show the features that storage was found to refuse."""
        losses = self.store.losses()
        if losses != self._shown.get(worker_id, {}):
            with suppress(DatabaseUnavailableError), self.audit.database.write() as connection:
                workers.set_storage_losses(connection, worker_id, losses)
                self._shown[worker_id] = losses

    def _keep(self, key: tuple[str, int], progress: _Progress) -> None:
        with self._keeping:
            self._interrupted[key] = progress
            while len(self._interrupted) > self.most_kept:
                self._interrupted.pop(next(iter(self._interrupted)))
