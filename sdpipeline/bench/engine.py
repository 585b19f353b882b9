"""Engine benchmark: pictures per second by batch size, against a plain loop and the device's ceiling."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdpipeline.bench.baselines import PlainLoop, matmul_ceiling, peak_memory_gib
from sdpipeline.bench.gpu_idle import idle_share
from sdpipeline.bench.statistics import OnProgress, middle
from sdpipeline.bench.workload import Workload
from sdpipeline.domain import Json
from sdpipeline.engine import Batch, Engine, GeneratedImage, GenerationFailure
from sdpipeline.errors import BadPictureError

_PLAIN, _CEILING = 0, -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Batch sizes to measure, the number of rounds, device and dtype."""

    batches: Sequence[int]
    rounds: int
    device: str
    dtype: str


def measure(
    engine: Engine, open_plain: Callable[[], PlainLoop], workload: Workload, plan: Plan, on_progress: OnProgress
) -> Json:
    """Measure all batch sizes, the plain loop and matrix products in turn in each round.

    Other load on the machine thus affects all of them. The plain loop is opened after the engine's first pictures.
    The time of these is reported too, as the start-up time.
    """
    numbers, steps = Numbers(), Steps(on_progress, len(plan.batches) + 1 + plan.rounds * (len(plan.batches) + 2))
    first = []
    for size in plan.batches:
        took = make(engine, workload.batch(numbers.take(size), size))
        first.append({"batch": size, "seconds": round(took, 3)})
        steps.done()
    plain = open_plain()
    tflop = plain.flops(numbers.take(1)) / 1e12
    steps.done()
    taken = _rounds(engine, plain, workload, plan, numbers=numbers, steps=steps)
    ceiling = max(taken.pop(_CEILING))
    largest = max(plan.batches)
    idle = idle_share(plan.device, lambda: make(engine, workload.batch(numbers.take(largest), largest)))
    baseline = 1 / middle(taken[_PLAIN])
    reference = {"baseline": baseline, "tflop": tflop, "ceiling": ceiling}
    rates = [("plain loop", 1, baseline), *(("engine", size, 1 / middle(taken[size])) for size in plan.batches)]
    return {
        "rows": [_row(what, size, rate, **reference) for what, size, rate in rates],
        "tflop_per_picture": round(tflop, 6),
        "ceiling_tflop_per_s": round(ceiling, 6),
        "rounds": plan.rounds,
        "first_batch_s": first,
        "device_idle_share": idle,
        "peak_memory_gib": peak_memory_gib(plan.device),
        "differs_from_exact": _difference(engine, workload, numbers.take(largest), largest),
    }


def _rounds(
    engine: Engine, plain: PlainLoop, workload: Workload, plan: Plan, *, numbers: Numbers, steps: Steps
) -> dict[int, list[float]]:
    """Return seconds per picture by batch size and for the plain loop, and TFLOP/s of matrix products."""
    taken: dict[int, list[float]] = defaultdict(list)
    for _ in range(plan.rounds):
        for size in plan.batches:
            taken[size].append(make(engine, workload.batch(numbers.take(size), size)) / size)
            steps.done()
        started = time.perf_counter()
        plain.picture(numbers.take(1))
        taken[_PLAIN].append(time.perf_counter() - started)
        steps.done()
        taken[_CEILING].append(matmul_ceiling(plan.device, plan.dtype))
        steps.done()
    return taken


def make(engine: Engine, batch: Batch) -> float:
    """Return the seconds that a batch takes; raise the error of a failed picture in it."""
    started = time.perf_counter()
    results = engine.generate(batch)
    took = time.perf_counter() - started
    _pictures(results)
    return took


def _pictures(results: Sequence[GeneratedImage | GenerationFailure]) -> list[GeneratedImage]:
    made = []
    for result in results:
        if isinstance(result, GenerationFailure):
            raise BadPictureError(f"the engine made no picture to measure: {result.error}") from result.error
        made.append(result)
    return made


def _difference(engine: Engine, workload: Workload, first: int, count: int) -> Json | None:
    """Compare a profile's pictures with the exact ones of the same prompts and seeds.

    Returns the mean absolute difference in grey levels of 0-255, and the peak signal-to-noise ratio.
    The ratio is ``None`` if the pictures are equal.
    """
    if workload.profile == "exact":
        return None
    made, exact = (
        np.stack([each.pixels for each in _pictures(engine.generate(asked.batch(first, count)))]).astype(float)
        for asked in (workload, replace(workload, profile="exact"))
    )
    squared = float(np.square(made - exact).mean())
    decibels = round(10 * float(np.log10(255**2 / squared)), 2) if squared else None
    return {"grey_levels": round(float(np.abs(made - exact).mean()), 3), "decibels": decibels}


def _row(what: str, batch: int, rate: float, *, baseline: float, tflop: float, ceiling: float) -> Json:
    return {
        "what": what,
        "batch": batch,
        "pictures_per_s": round(rate, 4),
        "against_plain": round(rate / baseline, 3),
        "tflop_per_s": round(tflop * rate, 6),
        "share_of_ceiling": round(tflop * rate / ceiling, 4),
    }


class Numbers:
    """Counter of pictures, so that none is made twice."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> int:
        """Reserve ``count`` numbers and return the first."""
        first, self._next = self._next, self._next + count
        return first


class Steps:
    """Counter for the progress bar."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total, self._count = on_progress, total, 0

    def done(self) -> None:
        """Count one more step."""
        self._count += 1
        self._on_progress(self._count, self._total)
