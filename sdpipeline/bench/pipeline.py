"""Pipeline benchmark: cost of database, marks and storage, against the engine alone and a plain loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from sdpipeline.bench.engine import Numbers, Steps, make
from sdpipeline.bench.gpu_idle import idle_share
from sdpipeline.bench.statistics import OnProgress, middle
from sdpipeline.bench.workload import Workload, publish
from sdpipeline.db import queries
from sdpipeline.domain import Json
from sdpipeline.engine import Engine
from sdpipeline.errors import BadPictureError
from sdpipeline.storage.scratch import Scratch
from sdpipeline.worker.worker import Worker, WorkerSummary

if TYPE_CHECKING:
    from sdpipeline.bench.baselines import PlainLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Each round has ``batches`` of ``batch`` pictures, and ``plain`` pictures of the plain loop."""

    batch: int
    batches: int
    plain: int
    rounds: int
    device: str

    @property
    def pictures(self) -> int:
        """Pictures in one round."""
        return self.batch * self.batches


@dataclass(slots=True)
class _RoundTimes:
    """Seconds of each round."""

    engine: list[float] = field(default_factory=list)
    line: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    lost: list[Json] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=lambda: {"engine": [], "line": [], "plain": []})

    @contextmanager
    def counting(self, what: str, pictures: int) -> Iterator[None]:
        """Record the CPU seconds per picture of this process and its children; other load hardly changes them."""
        started = _cpu_s()
        yield
        self.cpu[what].append((_cpu_s() - started) / pictures)


def measure(
    worker: Worker,
    scratch: Scratch,
    workload: Workload,
    plan: Plan,
    *,
    open_plain: Callable[[], PlainLoop],
    on_progress: OnProgress,
) -> Json:
    """Measure rounds of the engine alone, of the worker, and of the plain loop.

    The worker makes as many pictures as the engine alone, from the database to the marked picture in storage. The plain
    loop makes some, and saves to the same storage. The worker's database is a scratch one.
    """
    numbers, steps = Numbers(), Steps(on_progress, 2 + 3 * plan.rounds)
    make(worker.engine, workload.batch(numbers.take(plan.batch), plan.batch))
    steps.done()
    plain = open_plain()
    plain.picture(numbers.take(1))
    steps.done()
    taken, campaigns = _RoundTimes(), []
    for number in range(plan.rounds):
        with taken.counting("engine", plan.pictures):
            alone = _alone(worker.engine, workload, plan, numbers)
        steps.done()
        campaign_id = publish(worker.audit, workload.jobs(numbers.take(plan.pictures), plan.pictures), name=f"{number}")
        with taken.counting("line", plan.pictures):
            wall, summary = _line(worker, campaign_id, plan)
        steps.done()
        with taken.counting("plain", plan.plain):
            taken.plain.append(_plain(plain, scratch, plan, numbers) / plan.plain)
        steps.done()
        taken.engine.append(alone / plan.pictures)
        taken.line.append(wall / plan.pictures)
        taken.lost.append(_lost(alone, wall, summary))
        campaigns.append(campaign_id)
    host_s = _host_seconds(worker, campaigns)
    first = numbers.take(plan.pictures)
    campaign_id = publish(worker.audit, workload.jobs(first, plan.pictures), name="traced")
    idle = idle_share(plan.device, lambda: _line(worker, campaign_id, plan))
    return _document(plan, taken, host_s) | {"device_idle_share": idle}


def _cpu_s() -> float:
    own = psutil.Process()
    times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def _alone(engine: Engine, workload: Workload, plan: Plan, numbers: Numbers) -> float:
    return sum(make(engine, workload.batch(numbers.take(plan.batch), plan.batch)) for _ in range(plan.batches))


def _line(worker: Worker, campaign_id: int, plan: Plan) -> tuple[float, WorkerSummary]:
    """Return the seconds until the last picture is recorded, without the worker's search for more jobs after it."""
    started, ended = time.perf_counter(), [0.0]

    def on_progress(_: int) -> None:
        ended[0] = time.perf_counter()

    done = worker.run(campaign_id=campaign_id, on_progress=on_progress)
    if done.succeeded != plan.pictures:
        raise BadPictureError(f"{done.failed} of {plan.pictures} pictures failed: the log says why")
    return ended[0] - started, done


def _plain(plain: PlainLoop, scratch: Scratch, plan: Plan, numbers: Numbers) -> float:
    started = time.perf_counter()
    for number in range(first := numbers.take(plan.plain), first + plan.plain):
        scratch.save(f"{number}.png", plain.png(number))
    return time.perf_counter() - started


def _lost(alone: float, wall: float, done: WorkerSummary) -> Json:
    """Split the time of a round that exceeds the engine's own into causes, as shares of the whole round."""
    waited = dict(done.waited_for)
    known = {
        "waited for lease and fetch": waited["work"],
        "waited for the database": waited["database"],
        "waited for delivery": waited["delivery"],
        "passes slowed by the other work": done.gpu_seconds - alone,
    }
    known["last pictures' delivery"] = wall - done.gpu_seconds - sum(waited.values())
    return {name: seconds / wall for name, seconds in known.items()}


def _host_seconds(worker: Worker, campaigns: list[int]) -> Json:
    """Return the average seconds per picture of the steps that run in their own threads, parallel to the device."""
    with worker.audit.database.read() as connection:
        found = list(itertools.chain.from_iterable(queries.timings(connection, each) for each in campaigns))
    names = sorted({name for each in found for name in each} - {"generate_s"})
    return {name: round(sum(each.get(name, 0.0) for each in found) / len(found), 5) for name in names}


def _document(plan: Plan, taken: _RoundTimes, host_s: Json) -> Json:
    engine, line, plain = (middle(each) for each in (taken.engine, taken.line, taken.plain))
    shares = [alone / whole for alone, whole in zip(taken.engine, taken.line, strict=True)]
    faster = [slow / whole for slow, whole in zip(taken.plain, taken.line, strict=True)]
    cpu = {what: middle(seconds) for what, seconds in taken.cpu.items()}
    rows = [
        ("engine alone", plan.batch, engine, cpu["engine"]),
        ("whole line", plan.batch, line, cpu["line"]),
        ("plain loop, saved", 1, plain, cpu["plain"]),
    ]
    return {
        "rows": [
            {"what": what, "batch": batch, "pictures_per_s": round(1 / s, 4), "cpu_s": round(c, 4)}
            for what, batch, s, c in rows
        ],
        "share_of_engine": round(middle(shares), 4),
        "against_plain": round(middle(faster), 3),
        "by_round": [
            {"share_of_engine": round(s, 4), "against_plain": round(f, 3)} for s, f in zip(shares, faster, strict=True)
        ],
        "lost": [
            {"what": name, "share": round(middle([each[name] for each in taken.lost]), 4)} for name in taken.lost[0]
        ],
        "beside_the_device_s": host_s,
        "pictures": plan.pictures,
        "rounds": plan.rounds,
    }
