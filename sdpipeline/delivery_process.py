"""Delivery in a process of its own: to encode, sign, store and record pictures takes Python's lock, which an engine's
thread needs for every operation that it gives to its device.

This is the side of whoever asks; :mod:`sdpipeline.delivery_server` is the other.
"""

from __future__ import annotations

import pickle
import secrets
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.managers import BaseManager
from typing import Any

import structlog

from sdpipeline.db.budgets import Charge
from sdpipeline.db.queue import LeasedJob, StoredImage
from sdpipeline.delivery import Attempt, FinishedPicture
from sdpipeline.engine import GeneratedImage
from sdpipeline.errors import DeliveryLostError
from sdpipeline.fetching import Consumed
from sdpipeline.settings import Settings

SERVER = "sdpipeline.delivery_server"
TRIES = 3
LAST_WORDS_S = 5.0

_log = structlog.get_logger(__name__)


class _Calls(BaseManager):
    """Calls of another process's deliverer; each thread has a connection of its own, and a thread at the other end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where pictures go, and as whose: ``settings`` name the key, and the rest is as they or a measurement have it."""

    settings: Settings
    storage_url: str
    database_url: str
    actor: str


@dataclass(slots=True)
class _Running:
    """One such process, with what its methods are called by."""

    process: subprocess.Popen[bytes]
    deliverer: Any

    def end(self) -> None:
        """Nothing is being delivered any more."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class DeliveryProcess:
    """Implements :class:`sdpipeline.delivery.Deliverer`; its methods may be called from several threads.

    A process that died is replaced: what it was about is done again. A picture it had stored already stays where it is,
    which ``reconcile`` finds, and one it had recorded is fenced by its lease, which has ended then.
    """

    to: Destination
    _running: _Running | None = None
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Start the process in the background, so that no picture waits for it; what is wrong with it is said there."""

        def begin() -> None:
            with suppress(DeliveryLostError):
                self._process()

        threading.Thread(target=begin, daemon=True).start()

    def finish(
        self, leased: LeasedJob, consumed: Consumed, generated: GeneratedImage, attempt: Attempt
    ) -> FinishedPicture:
        """As :meth:`sdpipeline.delivery.Deliverer.finish`; raises DeliveryLostError besides."""
        finished: FinishedPicture = self._call("finish", leased, consumed, generated, attempt)
        return finished

    def deliver(self, picture: FinishedPicture) -> StoredImage:
        """As :meth:`sdpipeline.delivery.Deliverer.deliver`; raises DeliveryLostError besides."""
        stored: StoredImage = self._call("deliver", picture)
        return stored

    def complete(self, lease_id: str, leased: LeasedJob, stored: StoredImage, charge: Charge) -> bool:
        """As :meth:`sdpipeline.delivery.Deliverer.complete`; raises DeliveryLostError besides."""
        return bool(self._call("complete", lease_id, leased, stored, charge))

    def close(self) -> None:
        """End the process, if there is one."""
        with self._changing:
            if self._running is not None:
                self._running.end()
            self._running = None

    def _call(self, method: str, *arguments: Any) -> Any:
        for _ in range(TRIES):
            running = self._process()
            try:
                return getattr(running.deliverer, method)(*arguments)
            except (EOFError, ConnectionError, FileNotFoundError) as error:
                self._bury(running, error)
        raise DeliveryLostError(f"the process that delivers pictures died {TRIES} times at this one")

    def _process(self) -> _Running:
        with self._changing:
            if self._running is None:
                self._running = _start(self.to)
            return self._running

    def _bury(self, dead: _Running, error: Exception) -> None:
        with self._changing:
            if self._running is dead:
                dead.end()
                _log.warning("delivery_process_died", exit_code=dead.process.returncode, error=repr(error))
                self._running = None


def _start(to: Destination) -> _Running:
    secret = secrets.token_bytes(32)
    command = [sys.executable, "-m", SERVER]
    # A group of its own, as a Ctrl-C is for whoever started it; in a session of its own it would be the engine's equal
    # for Linux, however nice.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        pickle.dump((to, secret), process.stdin)
        process.stdin.flush()
    with process.stdout:
        address = process.stdout.readline().decode().rstrip("\n")
    if not address:
        process.stdin.close()
        raise DeliveryLostError(f"the process that delivers pictures ended with {process.wait()}")
    calls = _Calls(address=address, authkey=secret)
    calls.connect()
    return _Running(process, calls.deliverer())  # type: ignore[attr-defined]


_Calls.register("deliverer")
