"""Local worker processes of one campaign run: one per device, restarted within limits, ended together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess

from sdpipeline import shutdown
from sdpipeline.db.queries import Progress
from sdpipeline.engine.devices import pinned_device, visible_gpus
from sdpipeline.errors import WorkersLostError
from sdpipeline.orchestration.supervision import Restarts, left_work, worker_needed
from sdpipeline.settings import Settings

STOP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Device of one worker, and the environment that hides other devices from it."""

    index: int
    device: str | None
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """Worker process that failed or had to be ended."""

    name: str
    pid: int
    exit_code: int

    def __str__(self) -> str:
        how = f"by signal {-self.exit_code}" if self.exit_code < 0 else f"with exit code {self.exit_code}"
        return f"{self.name} (process {self.pid}) ended {how}"


@dataclass(slots=True, kw_only=True)
class _Member:
    """Current process of a slot and its restarts. A slot is one device: failed exits count per slot."""

    slot: Slot
    process: BaseProcess | None = None
    starts: int = 0
    restarts: Restarts = field(default_factory=Restarts)
    finished_at_start: int = 0
    last_exit: WorkerExit | None = None

    @property
    def name(self) -> str:
        restart = f" · restart {self.starts - 1}" if self.starts > 1 else ""
        return f"worker {self.slot.index}{restart}"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.is_alive()


@dataclass(slots=True, kw_only=True)
class LocalWorkers:
    """Supervise one process per slot. ``spawn`` starts one under a name; ``on_exit`` is called for each that failed."""

    slots: Sequence[Slot]
    spawn: Callable[[Slot, str], BaseProcess]
    on_exit: Callable[[WorkerExit], None]
    stop_grace_s: float = STOP_GRACE_S
    _members: list[_Member] = field(default_factory=list)

    def start(self) -> None:
        """Start every worker."""
        self._members = [_Member(slot=slot) for slot in self.slots]
        for member in self._members:
            self._start(member, finished=0)

    def supervise(self, progress: Progress) -> None:
        """Report dead workers and restart those with work left; raises WorkersLostError when every slot gave up.

        A worker that ends with exit code 0 found nothing to do. It is started again when work appears. If it ends
        again with that work untouched, it counts as dead, so that restarts stay bounded.
        """
        for member in self._members:
            if member.running or member.process is None:
                continue
            if self._died(member, progress):
                member.restarts.record_exit()
            member.process = None
        for member in self._members:
            needed = worker_needed(progress, alone=not any(each.running for each in self._members))
            if member.process is None and needed and not member.restarts.exhausted():
                self._start(member, finished=progress.finished)
        if all(member.restarts.exhausted() for member in self._members):
            raise WorkersLostError("; ".join(str(m.last_exit or f"{m.name} found no work") for m in self._members))

    def wait(self, timeout_s: float) -> None:
        """Sleep, but wake when a worker ends."""
        processes = {member.process.sentinel: member.process for member in self._members if member.process is not None}
        for sentinel in connection.wait(list(processes), timeout=timeout_s):
            if isinstance(sentinel, int):
                processes[sentinel].join(1.0)  # its pipe closes a moment before it can be reaped

    def finish(self, timeout_s: float) -> list[WorkerExit]:
        """Let workers without work end by themselves; return those that did not and had to be ended."""
        for member in self._members:
            if member.process is not None:
                member.process.join(timeout_s)
        return self._end(STOP_GRACE_S)  # with nothing on their devices

    def stop(self) -> list[WorkerExit]:
        """Terminate every worker, and kill it after ``stop_grace_s``; return those that had to be ended."""
        return self._end(self.stop_grace_s)

    def _end(self, grace_s: float) -> list[WorkerExit]:
        running = [(m.name, m.process) for m in self._members if m.process is not None and m.process.is_alive()]
        for _, process in running:
            process.terminate()
        ends_at = time.monotonic() + grace_s
        for _, process in running:
            process.join(max(0.0, ends_at - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [WorkerExit(name=name, pid=p.pid or 0, exit_code=p.exitcode or 0) for name, p in running]

    def _start(self, member: _Member, *, finished: int) -> None:
        member.starts += 1
        member.finished_at_start = finished
        # Ctrl-C in the terminal is for the command, which ends its workers in order: they inherit this mask.
        resource_tracker.ensure_running()  # else the first start unmasks SIGINT again
        with shutdown.masked(signal.SIGINT):
            member.process = self.spawn(member.slot, member.name)

    def _died(self, member: _Member, progress: Progress) -> bool:
        process = member.process
        if process is None or process.pid is None or process.exitcode is None:
            return False
        if process.exitcode == 0:
            return left_work(progress, finished_at_start=member.finished_at_start)
        member.last_exit = WorkerExit(name=member.name, pid=process.pid, exit_code=process.exitcode)
        self.on_exit(member.last_exit)
        return True


def slots(settings: Settings, *, gpus: Sequence[str] | None = None, cores: int | None = None) -> list[Slot]:
    """Return one slot per GPU, or one for the CPU, unless ``SDP_WORKERS`` and ``SDP_DEVICE`` say otherwise."""
    pinned = pinned_device(settings)
    found = [] if pinned else list(visible_gpus() if gpus is None else gpus)
    count = settings.workers or len(found) or 1
    if found:
        return [
            Slot(index=n, device=settings.device, environment={"CUDA_VISIBLE_DEVICES": found[n % len(found)]})
            for n in range(count)
        ]
    threads = max(1, (cores or os.cpu_count() or 1) // count)
    shared = {} if count == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    return [Slot(index=n, device=pinned or settings.device, environment=shared) for n in range(count)]
