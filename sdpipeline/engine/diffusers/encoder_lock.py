"""Whose turn it is to use text encoders and tokenizers: the device's thread has it, and lends it out during a pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class Turns:
    """Between two threads. During a pass the first does nothing but call the denoiser and the autoencoder."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state: Literal["idle", "taken", "lent"] = "idle"
        self._borrowed = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The first thread's, for a batch."""
        self._become("taken")
        try:
            yield
        finally:
            self._become("idle")

    @contextmanager
    def lent(self, *, wanted: bool) -> Iterator[None]:
        """The first thread's, for a pass; its end waits for whoever has borrowed the turn."""
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
        """The second thread's: waits while the turn is taken, then says whether it is lent, as it is during a pass."""
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
