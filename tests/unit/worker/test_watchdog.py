from __future__ import annotations

import threading

from sdpipeline.worker.watchdog import MIN_TIMEOUT_S, BatchTimings, Watchdog


def test_a_batch_may_take_twenty_times_what_such_batches_took() -> None:
    pace = BatchTimings()
    for seconds in (40.0, 100.0, 1.0):
        pace.took(1, seconds)
    assert (pace.allowed_s(1), pace.allowed_s(2)) == (2000.0, MIN_TIMEOUT_S)


def test_quick_batches_do_not_make_it_impatient() -> None:
    pace = BatchTimings()
    pace.took(1, 0.01)
    assert pace.allowed_s(1) == MIN_TIMEOUT_S


def test_what_the_settings_say_holds_for_every_batch() -> None:
    pace = BatchTimings(30.0)
    pace.took(1, 100.0)
    assert (pace.allowed_s(1), pace.allowed_s(2)) == (30.0, 30.0)


def test_it_tells_of_a_batch_that_hangs_and_of_none_that_ended() -> None:
    told = threading.Event()
    watchdog = Watchdog(threading.Event(), 0.0, late=lambda: None, hung=told.set)
    with watchdog.watching():
        with watchdog.batch(0.05):
            pass
        assert not told.wait(0.4)
        with watchdog.batch(0.05):
            assert told.wait(10)


def test_it_tells_of_an_end_that_takes_longer_than_its_grace() -> None:
    told, stop = threading.Event(), threading.Event()
    with Watchdog(stop, 0.1, late=told.set, hung=lambda: None).watching():
        assert not told.wait(0.4)
        stop.set()
        assert told.wait(10)
