from __future__ import annotations

from sdpipeline.worker.circuit_breaker import LONGEST_PAUSE_S, CircuitBreaker


def test_failures_in_a_row_open_it_and_a_success_closes_it() -> None:
    breaker = CircuitBreaker(max_failures=3)
    assert [breaker.failed() is None for _ in range(3)] == [True, True, False]
    assert (breaker.is_open, breaker.is_resting) == (True, True)
    assert breaker.succeeded()
    assert (breaker.is_open, breaker.failed()) == (False, None)


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker = CircuitBreaker(max_failures=2)
    for _ in range(5):
        assert breaker.failed() is None
        assert not breaker.succeeded()


def test_each_failure_doubles_the_pause_with_jitter_up_to_a_limit() -> None:
    breaker = CircuitBreaker(max_failures=1)
    for number in range(2000):
        longest_s = min(LONGEST_PAUSE_S, 5.0 * 2.0 ** min(number, 30))
        pause_s = breaker.failed()
        assert pause_s is not None
        assert longest_s / 2 <= pause_s <= longest_s


def test_workers_that_failed_together_do_not_try_again_together() -> None:
    pauses = {CircuitBreaker(max_failures=1).failed() for _ in range(50)}
    assert len(pauses) == 50


def test_once_its_pause_is_over_it_lets_one_try() -> None:
    breaker = CircuitBreaker(max_failures=1, first_pause_s=0.0)
    breaker.failed()
    assert (breaker.is_open, breaker.is_resting) == (True, False)
