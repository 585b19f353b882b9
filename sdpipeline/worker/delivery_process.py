"""Delivery in a separate process, so that it does not compete with the engine for Python's interpreter lock.

Encoding, signing, storing and recording pictures hold that lock, and an engine's thread needs it for every operation
that it launches on the device. This module is the client; :mod:`sdpipeline.app.delivery_server` is the server. They
communicate over socket pairs that only these two processes hold, so that each detects the other's end.
"""

from __future__ import annotations

import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import structlog

from sdpipeline.errors import DeliveryLostError, DeliveryUnavailableError, SdpError
from sdpipeline.jobs import StoredImage
from sdpipeline.settings import Settings
from sdpipeline.worker.finished_picture import DeliveryRequest
from sdpipeline.worker.watchdog import MIN_TIMEOUT_S

SERVER = "sdpipeline.app.delivery_server"
TRIES = 3
EXIT_GRACE_S = 5.0
BEAT_S = 0.5
MISSED_BEATS = 4
"""Fewer consecutive missing heartbeats count as late, not missed."""
MIN_SILENCE_S = 5.0
MAX_SILENCE_S = 60.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Storage, signing key and audit actor of a delivery process.

    ``settings`` name the key; a bench may replace the other fields. ``certificate`` is the SHA-256 of the caller's
    certificate: pictures are signed with no other.
    """

    settings: Settings
    storage_url: str
    database_url: str = field(repr=False)
    actor: str
    certificate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits after which a delivery process is killed and replaced.

    ``silence_s`` counts from its last heartbeat, ``start_s`` from its start to its first heartbeat. ``call_s`` is for
    one call: heartbeats continue while a call waits for an outage to end, and while it hangs.
    """

    silence_s: float = 15.0
    start_s: float = 120.0
    call_s: float = MIN_TIMEOUT_S

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        """Allow a quarter of a lease without a heartbeat, so that a lease outlives the replacement.

        A call may take long during an outage, so ``SDP_BATCH_TIMEOUT_S`` can only lengthen the limit of a call.
        """
        silence_s = min(settings.lease_ttl_s / 4, settings.batch_timeout_s or math.inf, MAX_SILENCE_S)
        return cls(silence_s=max(silence_s, MIN_SILENCE_S), call_s=max(settings.batch_timeout_s, MIN_TIMEOUT_S))


class _GoneError(Exception):
    """The process ended during a call."""


class _HungError(_GoneError):
    """The process exceeded one of its bounds; nothing but SIGKILL ends it, which works on a stopped process too."""


@dataclass(slots=True)
class _Server:
    """Delivery process with its heartbeat connection and the connections that are free for calls."""

    process: subprocess.Popen[bytes]
    heart: Connection
    ours: tuple[Connection, ...]
    free: queue.SimpleQueue[Connection] = field(default_factory=queue.SimpleQueue)
    called_at: dict[Connection, float] = field(default_factory=dict)

    def deliver(self, request: DeliveryRequest) -> StoredImage:
        """Send the picture and wait for the answer; raises the delivery's own error, or _GoneError."""
        connection = self.free.get()
        self.called_at[connection] = time.monotonic()
        try:
            connection.send(request)
            done, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise _GoneError(repr(error)) from error
        finally:
            self.called_at.pop(connection, None)
            self.free.put(connection)
        if not done:
            raise answer
        stored: StoredImage = answer
        return stored

    def longest_call_s(self) -> float:
        """Return the duration of the longest call that is under way."""
        return time.monotonic() - min(tuple(self.called_at.values()), default=math.inf)

    def disconnect(self) -> None:
        """Shut the connections down, so that the process ends and calls under way fail.

        They are not closed: another thread may still read from one, and its number could be reused for a new
        connection.
        """
        for connection in (self.heart, *self.ours):
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as shared:
                shared.shutdown(socket.SHUT_RDWR)

    def end(self, *, at_once: bool = False) -> None:
        """End the process; use SIGKILL if ``at_once`` or if it takes too long."""
        self.disconnect()
        try:
            self.process.wait(0.0 if at_once else EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(EXIT_GRACE_S)
            except subprocess.TimeoutExpired:  # it waits in the kernel, as for a dead network file system
                _log.error("delivery_process_unkillable", pid=self.process.pid)


@dataclass(slots=True)
class DeliveryProcess:
    """Implement :class:`sdpipeline.worker.delivery.Deliverer` in a separate process.

    Pictures may be delivered from several threads; ``connections`` of them are served at a time. Each picture crosses
    to the process once.

    A dedicated thread starts the process, listens to its heartbeat, and replaces it when it dies or exceeds a limit.
    Interrupted calls are repeated one at a time, so that a call that kills the process is alone when it does so again.
    A picture that was already stored stays in storage, where ``reconcile`` finds it.
    """

    to: Destination
    connections: int = 4
    bounds: Bounds = field(default_factory=Bounds)
    _server: _Server | None = None
    _starting: Future[_Server] | None = None
    _start_requests: queue.SimpleQueue[Future[_Server] | None] = field(default_factory=queue.SimpleQueue)
    _supervisor: threading.Thread | None = None
    _silent_since: float | None = None
    _closed: bool = False
    _changing: threading.Lock = field(default_factory=threading.Lock)
    _repeating: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Start the process in the background; the first call raises its startup error."""
        with self._changing:
            self._request_start()

    def check(self) -> None:
        """Wait until the process answers; raises DeliveryUnavailableError."""
        self._current()

    def silent_s(self) -> float:
        """See :meth:`sdpipeline.worker.delivery.Deliverer.silent_s`; includes the time to replace a dead process."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    def deliver(self, request: DeliveryRequest) -> StoredImage:
        """See :meth:`sdpipeline.worker.delivery.Deliverer.deliver`; may also raise DeliveryLostError and
        DeliveryUnavailableError.

        A process that died may have recorded the picture: its successor then returns that one.
        """
        if (stored := self._try(request)) is not None:
            return stored
        with self._repeating:
            for _ in range(TRIES - 1):
                if (stored := self._try(request)) is not None:
                    return stored
        raise DeliveryLostError(f"the delivery process died {TRIES} times on this picture")

    def close(self) -> None:
        """End the process if it runs, and start no other."""
        with self._changing:
            self._closed = True
            if self._server is not None:
                self._server.disconnect()
            supervisor = self._supervisor
        self._start_requests.put(None)
        if supervisor is not None:
            supervisor.join()

    def _try(self, request: DeliveryRequest) -> StoredImage | None:
        """Deliver by the current process; return None if it died meanwhile."""
        server = self._current()
        try:
            return server.deliver(request)
        except _GoneError:
            self._discard(server)
            return None

    def _current(self) -> _Server:
        with self._changing:
            self._request_start()
            starting = self._starting
        if starting is None:
            raise DeliveryUnavailableError("the delivery process was closed")
        return starting.result()

    def _request_start(self) -> None:
        """Request a process unless one exists or this was closed. The caller holds the lock."""
        if self._closed:
            self._starting = None
        elif self._starting is None:
            self._starting = Future()
            self._start_requests.put(self._starting)
            if self._supervisor is None:
                self._supervisor = threading.Thread(target=self._supervise, name="sdp-delivery", daemon=True)
                self._supervisor.start()

    def _discard(self, server: _Server) -> None:
        """Discard a dead process, so that the next call waits for a new one."""
        server.process.kill()
        with self._changing:
            given = self._starting
            # Once per process: a late caller must not discard the future that another caller waits for.
            if given is not None and given.done() and given.exception() is None and given.result() is server:
                self._starting = None

    # Processes are started by one long-lived thread: the kernel kills a process when the thread that started it ends.

    def _supervise(self) -> None:
        while (starting := self._start_requests.get()) is not None:
            try:
                server = self._start()
            except DeliveryUnavailableError as error:
                self._clear_start(starting)
                starting.set_exception(error)
                continue
            starting.set_result(server)
            try:
                self._listen(server)
            except _GoneError as error:
                self._on_exit(server, error)
            self._clear_start(starting)
            # At once, even without a pending call: a long batch on the device needs its lease extended.
            self.begin()

    def _clear_start(self, starting: Future[_Server]) -> None:
        with self._changing:
            if self._starting is starting:
                self._starting = None

    def _start(self) -> _Server:
        """Start a process and wait until it answers; raises DeliveryUnavailableError, with the process's message if it
        sent one."""
        try:
            server = _spawn(self.connections)
        except OSError as error:
            self._silent_since = None
            raise DeliveryUnavailableError(f"the delivery process does not start: {error}") from error
        with self._changing:
            self._server = server
            if self._closed:
                server.disconnect()
        try:
            self._handshake(server)
        except (_GoneError, SdpError) as error:
            server.end(at_once=isinstance(error, _HungError))
            if not isinstance(error, _HungError):
                self._silent_since = None  # an answer: callers wait as for any other outage
            ended = isinstance(error, _GoneError) and not isinstance(error, _HungError)
            why = f"it ended with {server.process.returncode}" if ended else str(error)
            raise DeliveryUnavailableError(f"the delivery process does not start: {why}") from error
        return server

    def _handshake(self, server: _Server) -> None:
        first = server.ours[0]
        server.called_at[first] = time.monotonic() + self.bounds.start_s
        try:
            first.send(self.to)
            self._listen(server, answer=first)
            done, error = first.recv()
        except (EOFError, OSError) as gone:
            raise _GoneError(repr(gone)) from gone
        finally:
            server.called_at.pop(first, None)
        if not done:
            raise error
        self._silent_since = None  # the answer may come before the first heartbeat
        for connection in server.ours:
            server.free.put(connection)

    def _listen(self, server: _Server, *, answer: Connection | None = None) -> None:
        """Listen to the heartbeat until there is an ``answer``; raises _GoneError.

        Silence is counted in intervals in which this process ran: if both processes were frozen, the other has time to
        resume.
        """
        missed, allowed_s = 0, self.bounds.silence_s if answer is None else self.bounds.start_s
        sources = [server.heart] if answer is None else [server.heart, answer]
        while answer is None or not answer.poll():
            ready = wait(sources, BEAT_S)
            if server.heart in ready:
                try:
                    server.heart.recv_bytes()
                except (EOFError, OSError) as error:
                    raise _GoneError(repr(error)) from error
                missed, allowed_s, self._silent_since = 0, self.bounds.silence_s, None
            elif not ready:
                missed += 1
            if missed == MISSED_BEATS and self._silent_since is None:
                self._silent_since = time.monotonic() - missed * BEAT_S
            if missed * BEAT_S >= allowed_s:
                raise _HungError(f"no heartbeat for {allowed_s:g} s")
            if server.longest_call_s() > self.bounds.call_s:
                raise _HungError(f"a call took longer than {self.bounds.call_s:g} s")

    def _on_exit(self, dead: _Server, error: _GoneError) -> None:
        with self._changing:
            closed = self._closed
        if not closed:
            self._silent_since = self._silent_since or time.monotonic()
        if isinstance(error, _HungError):
            _log.error("delivery_process_silent", pid=dead.process.pid, error=str(error))
        dead.end(at_once=isinstance(error, _HungError))
        if not closed:
            _log.warning("delivery_process_died", exit_code=dead.process.returncode, error=str(error))


def _spawn(connections: int) -> _Server:
    """Start a new process; raises OSError."""
    with _pairs(connections + 1) as (ours, theirs):
        numbers = [each.fileno() for each in theirs]
        # Without the current folder on its path (-P). A separate process group, as Ctrl-C is for the parent;
        # in a separate session, Linux would give it the engine's share of the CPU despite its niceness.
        command = [sys.executable, "-P", "-m", SERVER, *map(str, numbers)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers, process_group=0)
    return _Server(process, ours[0], ours[1:])


@contextmanager
def _pairs(count: int) -> Iterator[tuple[tuple[Connection, ...], list[socket.socket]]]:
    """Yield our ends of the socket pairs and the ends of the process that the block starts."""
    pairs = [socket.socketpair() for _ in range(count)]
    try:
        yield tuple(Connection(mine.detach()) for mine, _ in pairs), [other for _, other in pairs]
    finally:
        for mine, other in pairs:
            mine.close()
            other.close()
