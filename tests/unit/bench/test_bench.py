from __future__ import annotations

import pytest

from sdpipeline.bench.gpu_idle import covered
from sdpipeline.bench.statistics import Clock, percentile
from sdpipeline.bench.workload import PROMPTS


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 2), (1, 4)], 5), ([(0, 10), (2, 3), (9, 12)], 12)],
)
def test_kernels_that_overlap_are_counted_once(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([], 99)) == (51.0, 100.0, 0.0)


def test_what_fails_is_not_counted() -> None:
    clock = Clock()
    with pytest.raises(RuntimeError), clock.timing("put"):
        raise RuntimeError
    with clock.timing("put"):
        pass
    assert clock.figures("put", wall_s=0.5)["count"] == 1
    assert clock.figures("put", wall_s=0.5)["per_s"] == 2.0


def test_no_two_prompts_of_a_bench_are_alike() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) > 200
