"""Exponential back-off with jitter: the delay before a retry, and the loop that retries."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Exception)

MAX_GROWTHS = 30
"""Later delays grow no further, so that any number of attempts has a delay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delays that grow by ``factor`` from one attempt to the next, up to ``longest_s``.

    Half of each delay is random, so that clients that failed together do not retry together:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    first_s: float
    longest_s: float
    factor: float = 2.0

    def delay_s(self, attempt: int) -> float:
        """Return the seconds to wait after attempt number ``attempt`` failed; the first attempt is number 1."""
        longest_s = min(self.longest_s, self.first_s * self.factor ** min(attempt - 1, MAX_GROWTHS))
        return random.uniform(longest_s / 2, longest_s)  # noqa: S311 - spreads load, keeps no secret


def retry(
    call: Callable[[], _T],
    *,
    on: type[_E] | tuple[type[_E], ...],
    backoff: Backoff,
    wait: Callable[[_E, float], None],
    failed: _E | None = None,
) -> _T:
    """Call until no error of the types ``on`` is raised; return the result.

    ``wait`` gets each error and the delay before the next attempt. It logs and sleeps, or raises to give up. ``failed``
    is the error of a first attempt that the caller made already.
    """
    for attempt in itertools.count(1):
        if failed is None:
            try:
                return call()
            except on as error:
                failed = error
        wait(failed, backoff.delay_s(attempt))
        failed = None
    raise AssertionError  # the count does not end
