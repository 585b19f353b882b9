"""Outages of the database, storage, signing and delivery: wait until they end, and show them in ``status``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import structlog

from sdpipeline.backoff import Backoff, retry
from sdpipeline.db import workers
from sdpipeline.db.connection import Database
from sdpipeline.db.waiting import DATABASE_BACKOFF, log_outage
from sdpipeline.errors import (
    DatabaseUnavailableError,
    DeliveryUnavailableError,
    LeaseLostError,
    SdpError,
    SigningUnavailableError,
    StorageUnavailableError,
    TransientError,
)
from sdpipeline.jobs import Lease
from sdpipeline.worker.circuit_breaker import CircuitBreaker
from sdpipeline.worker.held_leases import HeldLeases
from sdpipeline.worker.stage_queue import RunEnd

SERVICES: Mapping[type[TransientError], str] = {
    StorageUnavailableError: "storage",
    SigningUnavailableError: "signing",
    DeliveryUnavailableError: "delivery",
}
"""Services whose outages are waited out while a lease lives, by the error that reports the outage."""

SERVICE_BACKOFF = Backoff(first_s=1.0, longest_s=30.0)

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class Outages:
    """Wait out the outages of one run, and count failures that no job caused in the circuit breaker.

    Each wait ends with RunEnded if the run ends or is stopped meanwhile.
    """

    def __init__(
        self, database: Database, worker_id: str, *, breaker: CircuitBreaker, held: HeldLeases, end: RunEnd
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._breaker = breaker
        self._held = held
        self._end = end
        self._retrying = threading.Lock()

    def wait_for_database(self, call: Callable[[], _T]) -> _T:
        """Call until the database is available. Every transition is fenced, so repeating a call is safe."""
        noted = ""

        def wait(error: DatabaseUnavailableError, delay_s: float) -> None:
            nonlocal noted
            log_outage(error, delay_s)
            noted = noted or self._note_database_outage(error)
            self._end.pause(delay_s)

        try:
            return retry(call, on=DatabaseUnavailableError, backoff=DATABASE_BACKOFF, wait=wait)
        finally:  # also if the call fails for another reason, such as a lease that expired during the outage
            if noted:
                self._remove_note(noted)

    def wait_for_services(self, lease: Lease, call: Callable[[], _T]) -> _T:
        """Call until storage, signing and delivery are available; raises LeaseLostError if the lease is lost first."""
        while True:
            try:
                return call()
            except tuple(SERVICES) as error:
                # One thread retries for all, so that an outage counts once, however many pictures it affects.
                if self._retrying.acquire(blocking=False):
                    try:
                        return self._retry_service(lease, call, error)
                    finally:
                        self._retrying.release()
                with self._retrying:
                    self._end.pause(0.0)
                    self._check_lease(lease, error)

    def record_failure(self, error: TransientError) -> None:
        """Count a failure that no job caused; after too many in a row, pause the worker and note the reason."""
        pause_s = self._breaker.failed()
        if pause_s is None:
            return
        failures = self._breaker.failures
        _log.warning("worker_paused", failures=failures, error=str(error), retry_in_s=round(pause_s, 1))
        self._note(f"paused after {failures} failures in a row, the last: {error}", paused=True)

    def record_success(self) -> None:
        """Count a success; resume the worker if it was paused."""
        if self._breaker.succeeded():
            _log.warning("worker_resumed")
            self._note(None)

    def _retry_service(self, lease: Lease, call: Callable[[], _T], failed: TransientError) -> _T:
        noted = ""

        def wait(error: TransientError, delay_s: float) -> None:
            nonlocal noted
            service = next(name for kind, name in SERVICES.items() if isinstance(error, kind))
            _log.warning("service_unavailable", service=service, error=str(error), retry_in_s=round(delay_s, 1))
            noted = f"waits for {service}: {error}"
            self._note(noted)
            self.record_failure(error)
            self._end.pause(delay_s)
            self._check_lease(lease, error)

        try:
            answer = retry(call, on=tuple(SERVICES), backoff=SERVICE_BACKOFF, wait=wait, failed=failed)
        except SdpError:  # such as a lost lease; the next call notes an outage that lasts
            self._remove_note(noted)
            raise
        self._note(None)
        self.record_success()
        return answer

    def _check_lease(self, lease: Lease, error: TransientError) -> None:
        if self._held.is_lost(lease):
            raise LeaseLostError(f"{error}, and the lease was lost meanwhile") from error

    def _note(self, note: str | None, *, paused: bool = False) -> None:
        """Show why the worker waits in ``status``; None clears it."""

        def write() -> None:
            with self._database.write() as connection:
                workers.note(connection, self._worker_id, note, paused=paused)

        self.wait_for_database(write)

    def _note_database_outage(self, error: DatabaseUnavailableError) -> str:
        """Note the reason that the database gives, if it accepts the note; return what was noted.

        Notes of others stay.
        """
        if error.fix is None:
            return ""
        text = f"waits for the database: {error}"
        try:
            with self._database.write() as connection:
                workers.set_note_if_none(connection, self._worker_id, text)
        except DatabaseUnavailableError:
            return ""
        return text

    def _remove_note(self, text: str) -> None:
        with suppress(DatabaseUnavailableError), self._database.write() as connection:
            workers.remove_note(connection, self._worker_id, text)
