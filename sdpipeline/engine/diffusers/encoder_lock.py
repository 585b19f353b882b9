"""Lock that lets the prefetch thread use the text encoders while the device thread denoises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class Turns:
    """Lock on text encoders and tokenizers between the device thread and the prefetch thread.

    During a forward pass the device thread calls only the denoiser and the autoencoder, so it can lend the lock.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state: Literal["idle", "taken", "lent"] = "idle"
        self._borrowed = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the lock in the device thread for the length of a batch."""
        self._become("taken")
        try:
            yield
        finally:
            self._become("idle")

    @contextmanager
    def lent(self, *, wanted: bool) -> Iterator[None]:
        """Lend the lock from the device thread for a pass; on exit, wait until the borrower returns it."""
        if not wanted:
            yield
            return
        self._become("lent")
        try:
            yield
        finally:
            self._become("taken")

    @contextmanager
    def borrowed(self) -> Iterator[bool]:
        """Wait in the prefetch thread until the lock is lent or idle. Yield True if it is lent, as during a pass."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != "taken")
            self._borrowed = self._state == "lent"
        try:
            yield self._borrowed
        finally:
            with self._changed:
                self._borrowed = False
                self._changed.notify_all()

    def _become(self, state: Literal["idle", "taken", "lent"]) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()
            if state == "taken":
                self._changed.wait_for(lambda: not self._borrowed)
