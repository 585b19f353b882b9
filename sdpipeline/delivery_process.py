"""Delivery in a process of its own: to encode, sign, store and record pictures takes Python's lock, which an engine's
thread needs for every operation that it gives to its device.

This is the side of whoever asks; :mod:`sdpipeline.delivery_server` is the other. They talk over pairs of sockets that
only the two of them hold, so that each sees when the other is gone.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import structlog

from sdpipeline.db.budgets import Charge
from sdpipeline.db.queue import LeasedJob, StoredImage
from sdpipeline.delivery import Attempt, FinishedPicture
from sdpipeline.engine import GeneratedImage
from sdpipeline.errors import DeliveryLostError, DeliveryUnavailableError, SdpError
from sdpipeline.fetching import Consumed
from sdpipeline.settings import Settings

SERVER = "sdpipeline.delivery_server"
TRIES = 3
LAST_WORDS_S = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where pictures go, and as whose: ``settings`` name the key, and the rest is as they or a measurement have it.

    ``certificate`` is the SHA-256 of the one that whoever asks works with: pictures are signed with no other.
    """

    settings: Settings
    storage_url: str
    database_url: str = field(repr=False)
    actor: str
    certificate: str


class _GoneError(Exception):
    """The process ended in the middle of a call."""


@dataclass(slots=True)
class _Server:
    """One such process, and the connections that are free."""

    process: subprocess.Popen[bytes]
    free: queue.SimpleQueue[Connection]
    ours: tuple[Connection, ...]

    def ask(self, method: str, *arguments: Any) -> Any:
        """Raises what the method raised, or _GoneError."""
        connection = self.free.get()
        try:
            connection.send((method, arguments))
            done, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise _GoneError(repr(error)) from error
        finally:
            self.free.put(connection)
        if done:
            return answer
        raise answer

    def end(self) -> None:
        """Nothing is being delivered any more."""
        for connection in self.ours:
            with suppress(OSError):
                connection.close()
        try:
            self.process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class DeliveryProcess:
    """Implements :class:`sdpipeline.delivery.Deliverer`; its methods may be called from several threads, of which so
    many as ``connections`` are served at a time. Each raises DeliveryLostError and DeliveryUnavailableError besides.

    A process that died is replaced: what it was about is done again, one after the other, so that only what kills it
    meets its death again. A picture it had stored already stays where it is, which ``reconcile`` finds.
    """

    to: Destination
    connections: int = 5
    _server: _Server | None = None
    _closed: bool = False
    _changing: threading.Lock = field(default_factory=threading.Lock)
    _again: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Start the process in the background; what is wrong with it is told to the first who asks."""

        def begin() -> None:
            with suppress(DeliveryUnavailableError):
                self._current()

        threading.Thread(target=begin, daemon=True).start()

    def check(self) -> None:
        """Wait until the process answers; raises DeliveryUnavailableError."""
        self._current()

    def finish(
        self, leased: LeasedJob, consumed: Consumed, generated: GeneratedImage, attempt: Attempt
    ) -> FinishedPicture:
        """As :meth:`sdpipeline.delivery.Deliverer.finish`."""
        finished: FinishedPicture = self._ask("finish", leased, consumed, generated, attempt)[0]
        return finished

    def deliver(self, picture: FinishedPicture) -> StoredImage:
        """As :meth:`sdpipeline.delivery.Deliverer.deliver`."""
        stored: StoredImage = self._ask("deliver", picture)[0]
        return stored

    def complete(self, lease_id: str, leased: LeasedJob, stored: StoredImage, charge: Charge) -> bool:
        """As :meth:`sdpipeline.delivery.Deliverer.complete`."""
        done, tries = self._ask("complete", lease_id, leased, stored, charge)
        # One that died may have recorded it, and its successor is fenced then.
        return bool(done or (tries > 1 and self._ask("recorded", leased, stored)[0]))

    def close(self) -> None:
        """End the process, if there is one; there will be no other."""
        with self._changing:
            self._closed = True
            if self._server is not None:
                self._server.end()
            self._server = None

    def _ask(self, method: str, *arguments: Any) -> tuple[Any, int]:
        """The answer, and how many processes were asked for it."""
        server = self._current()
        try:
            return server.ask(method, *arguments), 1
        except _GoneError as error:
            self._bury(server, error)
        with self._again:
            for tries in range(2, TRIES + 1):
                server = self._current()
                try:
                    return server.ask(method, *arguments), tries
                except _GoneError as error:
                    self._bury(server, error)
        raise DeliveryLostError(f"the process that delivers pictures died {TRIES} times at this one")

    def _current(self) -> _Server:
        with self._changing:
            if self._closed:
                raise DeliveryUnavailableError("the process that delivers pictures was ended")
            if self._server is None:
                self._server = _start(self.to, self.connections)
            return self._server

    def _bury(self, dead: _Server, error: Exception) -> None:
        with self._changing:
            if self._server is dead:
                dead.end()
                _log.warning("delivery_process_died", exit_code=dead.process.returncode, error=str(error))
                self._server = None


def _start(to: Destination, connections: int) -> _Server:
    """Raises DeliveryUnavailableError, with the server's own words where it had any."""
    try:
        with _pairs(connections) as (ours, theirs):
            numbers = [each.fileno() for each in theirs]
            # Without the current folder on its path (-P). A group of its own, as a Ctrl-C is for whoever started it;
            # in a session of its own it would be the engine's equal for Linux, however nice.
            command = [sys.executable, "-P", "-m", SERVER, *map(str, numbers)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers, process_group=0)
    except OSError as error:
        raise DeliveryUnavailableError(f"the process that delivers pictures does not start: {error}") from error
    server = _Server(process, queue.SimpleQueue(), ours)
    server.free.put(ours[0])
    try:
        server.ask("", to)
    except (_GoneError, SdpError) as error:
        server.end()
        why = f"it ended with {process.returncode}" if isinstance(error, _GoneError) else str(error)
        raise DeliveryUnavailableError(f"the process that delivers pictures does not start: {why}") from error
    for connection in ours[1:]:
        server.free.put(connection)
    return server


@contextmanager
def _pairs(count: int) -> Iterator[tuple[tuple[Connection, ...], list[socket.socket]]]:
    """Our ends, and those of a process that is started in the block."""
    pairs = [socket.socketpair() for _ in range(count)]
    try:
        yield tuple(Connection(mine.detach()) for mine, _ in pairs), [other for _, other in pairs]
    finally:
        for mine, other in pairs:
            mine.close()
            other.close()
