from __future__ import annotations

import pytest

from sdpipeline.backoff import Backoff, retry

BACKOFF = Backoff(first_s=2.0, longest_s=300.0)


def test_the_delay_doubles_with_jitter_up_to_a_limit() -> None:
    for attempt in range(1, 40):
        longest_s = min(300.0, 2.0 * 2 ** (attempt - 1))
        assert longest_s / 2 <= BACKOFF.delay_s(attempt) <= longest_s


def test_clients_that_failed_together_do_not_retry_together() -> None:
    assert len({BACKOFF.delay_s(3) for _ in range(100)}) == 100


def test_any_number_of_attempts_has_a_delay() -> None:
    assert BACKOFF.delay_s(5000) <= 300.0


class Flaky:
    """Fails once for each of its errors, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.waits: list[tuple[str, float]] = []

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "answer"

    def wait(self, error: Exception, delay_s: float) -> None:
        self.waits.append((str(error), delay_s))


def test_a_call_is_repeated_after_growing_delays_until_it_answers() -> None:
    flaky = Flaky(OSError("a"), TimeoutError("b"), OSError("c"))
    assert retry(flaky, on=OSError, backoff=BACKOFF, wait=flaky.wait) == "answer"
    assert [error for error, _ in flaky.waits] == ["a", "b", "c"]
    assert all(longest_s / 2 <= s <= longest_s for longest_s, (_, s) in zip((2, 4, 8), flaky.waits, strict=True))


def test_a_first_attempt_of_the_caller_counts_and_is_not_repeated_before_its_delay() -> None:
    flaky = Flaky()
    assert retry(flaky, on=OSError, backoff=BACKOFF, wait=flaky.wait, failed=OSError("first")) == "answer"
    assert [error for error, _ in flaky.waits] == ["first"]


def test_another_error_is_raised_at_once() -> None:
    flaky = Flaky(ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retry(flaky, on=OSError, backoff=BACKOFF, wait=flaky.wait)
    assert flaky.waits == []


def test_a_wait_that_raises_gives_up() -> None:
    def give_up(error: OSError, _: float) -> None:
        raise error

    flaky = Flaky(OSError("a"), OSError("b"))
    with pytest.raises(OSError, match="a"):
        retry(flaky, on=OSError, backoff=BACKOFF, wait=give_up)
    assert len(flaky.errors) == 1
