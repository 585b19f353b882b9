"""Speed of the profiles on this machine and their loss of quality: ratios of interleaved runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from sdpipeline.domain import Profile, Task
from sdpipeline.engine import GeneratedImage, PreparedRequest
from sdpipeline.engine.stepwise import Speedups, Stepwise
from tests.integration.engine_requests import SOURCE, disc, images, new_engine, prepared, request

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

ROUNDS = 3
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star")
MIXED_STEPS = (10, 20, 31, 10, 20, 31, 15, 25)
MIXED_STRENGTHS = (0.3, 0.5, 0.7, 0.9)


def asked(n: int, **changes: object) -> PreparedRequest:
    prompt = f"a {COLOURS[n % 6]} {SHAPES[n % 4]} in the center on a {'white' if n % 2 else 'black'} background"
    sized = {"width": 128, "height": 128, "num_inference_steps": 20, "scheduler": "dpmpp-2m"}
    return prepared(request("shapes", prompt=prompt, seed=n, **sized | changes))


def in_turn(*works: Callable[[], object]) -> list[float]:
    """Shortest processor time of each callable, in seconds. The runs are interleaved, so that other load on the machine
    affects all alike."""
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for n, work in enumerate(works):
            started = time.process_time()
            work()
            best[n] = min(best[n], time.process_time() - started)
    return best


def apart(made: Sequence[GeneratedImage], others: Sequence[GeneratedImage]) -> tuple[float, float]:
    """Mean absolute difference in grey levels, and peak signal-to-noise ratio in decibels."""
    difference = np.stack([one.pixels for one in made]).astype(float) - np.stack([one.pixels for one in others])
    return float(np.abs(difference).mean()), float(10 * np.log10(255**2 / np.square(difference).mean()))


@pytest.mark.parametrize("profile", ["fast", "turbo"])
def test_a_profile_is_quicker_than_exact_at_the_same_batch_size(profile: Profile) -> None:
    exact, quick = [asked(n) for n in range(8)], [asked(n, profile=profile) for n in range(8)]
    fewer = [asked(n, num_inference_steps=14) for n in range(8)]
    made = images(*exact)
    took = in_turn(lambda: images(*exact), lambda: images(*quick), lambda: images(*fewer))
    for name, others, seconds in ((profile, quick, took[1]), ("exact, 14 steps", fewer, took[2])):
        grey, decibels = apart(images(*others), made)
        print(f"{name}: {took[0] / seconds:.2f}x of exact, {grey:.2f} grey levels, {decibels:.1f} dB")
    assert took[1] < took[0]


def test_mixed_steps_in_one_batch_against_a_batch_for_each() -> None:
    mixed = [asked(n, num_inference_steps=steps, profile="fast") for n, steps in enumerate(MIXED_STEPS)]
    _compare("steps", mixed, key=lambda each: each.request.num_inference_steps)


def test_mixed_strengths_in_one_batch_against_a_batch_for_each() -> None:
    changes = {"task": Task.IMAGE_TO_IMAGE, "image": SOURCE, "profile": "fast"}
    mixed = [
        replace(asked(n, strength=strength, **changes), images={"image": disc()})
        for n, strength in enumerate(MIXED_STRENGTHS)
    ]
    _compare("strengths", mixed, key=lambda each: each.request.strength or 1.0)


def _compare(what: str, mixed: Sequence[PreparedRequest], *, key: Callable[[PreparedRequest], float]) -> None:
    kinds = [[each for each in mixed if key(each) == value] for value in sorted({key(each) for each in mixed})]
    images(*mixed)
    one, several = in_turn(lambda: images(*mixed), lambda: [images(*kind) for kind in kinds])
    print(f"{len(mixed)} pictures of {len(kinds)} {what}: one batch takes {one / several:.2f} of a batch for each")
    assert one < several * 1.05


@pytest.mark.parametrize("profile", ["fast", "turbo"])
def test_int8_against_the_same_profile_and_against_exact(profile: Profile) -> None:
    on, plain = new_engine(shortcuts=Stepwise(Speedups(quantize="int8"))), new_engine()
    exact, quick = [asked(n) for n in range(8)], [asked(n, profile=profile) for n in range(8)]
    made, unquantized, quantized = images(*exact, on=plain), images(*quick, on=plain), images(*quick, on=on)
    took = in_turn(lambda: images(*exact, on=plain), lambda: images(*quick, on=plain), lambda: images(*quick, on=on))
    print(f"{profile} in int8: {took[1] / took[2]:.2f}x of {profile}, {took[0] / took[2]:.2f}x of exact")
    for name, others in ((profile, unquantized), ("exact", made)):
        grey, decibels = apart(quantized, others)
        print(f"{profile} in int8 differs from {name} by {grey:.2f} grey levels, {decibels:.1f} dB")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # a warning of torch about itself
def test_compiled_blocks_make_the_same_pictures() -> None:
    on, plain = new_engine(shortcuts=Stepwise(Speedups(compile=True))), new_engine()
    given = [asked(n, num_inference_steps=4, profile="fast") for n in range(4)]
    started = time.perf_counter()
    made = images(*given, on=on)
    first_s = time.perf_counter() - started
    grey, _ = apart(made, images(*given, on=plain))
    compiled, eager = in_turn(lambda: images(*given, on=on), lambda: images(*given, on=plain))
    print(f"compiled {eager / compiled:.2f}x, {grey:.4f} grey levels apart; the first batch took {first_s:.0f} s")
    assert grey < 0.1
