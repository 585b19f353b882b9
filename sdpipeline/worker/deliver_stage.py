"""Deliver stage: deliver the pictures of each batch, and finish leases in order, behind the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from sdpipeline.engine import GeneratedImage, GenerationFailure
from sdpipeline.errors import LeaseLostError, SdpError, TransientError
from sdpipeline.jobs import LeasedJob
from sdpipeline.worker.delivery import Deliverer
from sdpipeline.worker.finished_picture import DeliveryRequest
from sdpipeline.worker.held_leases import Delivery, HeldLeases, LeaseWork
from sdpipeline.worker.inputs import Consumed
from sdpipeline.worker.outages import Outages
from sdpipeline.worker.outcomes import Outcomes
from sdpipeline.worker.reuse import Reuse
from sdpipeline.worker.stage_queue import StageQueue


@dataclass(slots=True, kw_only=True)
class DeliverStage:
    """Deliver pictures on the threads of ``pool``, and finish each lease when all of its pictures are."""

    deliverer: Deliverer
    pool: ThreadPoolExecutor
    outages: Outages
    outcomes: Outcomes
    reuse: Reuse
    held: HeldLeases

    def submit(self, work: LeaseWork) -> None:
        """Begin to deliver each result; the size of the stage's queue bounds the leases under way."""
        for leased, consumed, result in zip(work.jobs, work.consumed, work.results, strict=False):
            work.deliveries.append(self.pool.submit(self._deliver_result, work, leased, consumed, result))
        work.results = []

    def run(self, generated: StageQueue) -> None:
        """Finish leases in order: a job may wait for a picture of the previous lease."""
        while (work := generated.take()) is not None:
            deliveries = [delivery.result() for delivery in work.deliveries]
            faults = [delivery.fault for delivery in deliveries if delivery.fault is not None]
            if any(delivery.is_delivered for delivery in deliveries):
                self.outages.record_success()
            elif faults:
                self.outages.record_failure(faults[-1])
            self._finish(work)

    def _finish(self, work: LeaseWork) -> None:
        self.reuse.forget(work)
        if work.waiting and not self.held.is_lost(work.lease):
            self.reuse.deliver_waiting(work)
        self.outcomes.close(work.lease)

    def _deliver_result(
        self, work: LeaseWork, leased: LeasedJob, consumed: Consumed, result: GeneratedImage | GenerationFailure
    ) -> Delivery:
        if self.held.is_lost(work.lease):
            return Delivery()
        if isinstance(result, GenerationFailure):
            self.outcomes.fail(work.lease, leased, result.error, gpu_seconds=work.share_s)
            return Delivery()
        attempt = self.outcomes.attempt(work.lease, leased, gpu_seconds=work.share_s)
        return self._deliver(work, DeliveryRequest(leased=leased, consumed=consumed, generated=result, attempt=attempt))

    def _deliver(self, work: LeaseWork, request: DeliveryRequest) -> Delivery:
        """Deliver one picture; repeat the call until no outage interrupts it."""
        deliver = partial(self.deliverer.deliver, request)
        try:
            self.outages.wait_for_services(work.lease, partial(self.outages.wait_for_database, deliver))
        except LeaseLostError:
            self.outcomes.log_lost(request.leased)
            return Delivery()
        except SdpError as error:
            self.outcomes.fail(work.lease, request.leased, error, gpu_seconds=work.share_s)
            return Delivery(fault=error if isinstance(error, TransientError) else None)
        self.outcomes.count_delivered()
        return Delivery(is_delivered=True)
