"""Between the device's thread and the one that prepares, nobody reads prompts while the other may."""

from __future__ import annotations

import threading

from sdpipeline.engine.diffusers.encoder_lock import Turns


def test_the_end_of_a_pass_waits_for_who_borrowed_the_turn() -> None:
    turns, order, borrowed = Turns(), list[str](), threading.Event()

    def borrow() -> None:
        with turns.borrowed() as mine:
            order.append(f"borrowed: {mine}")
            borrowed.set()
            threading.Event().wait(0.2)  # meanwhile the pass ends
            order.append("given back")

    other = threading.Thread(target=borrow)
    with turns.taken():
        with turns.lent(wanted=True):
            other.start()
            assert borrowed.wait(10)
        order.append("the pass is over")
    other.join()
    assert order == ["borrowed: True", "given back", "the pass is over"]


def test_who_wants_to_borrow_waits_until_the_turn_is_lent_or_nobody_has_it() -> None:
    turns, answers, asking = Turns(), list[bool](), threading.Event()

    def borrow() -> None:
        asking.set()
        with turns.borrowed() as mine:
            answers.append(mine)

    with turns.taken(), turns.lent(wanted=False):
        other = threading.Thread(target=borrow)
        other.start()
        assert asking.wait(10)
        other.join(0.1)
        assert answers == []
    other.join()
    assert answers == [False]
