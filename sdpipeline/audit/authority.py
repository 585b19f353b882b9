"""Checks of event authorship: one actor and one database login per chain, and only events that the actor may write.

PostgreSQL refuses such events when they are inserted (migration 0004). This check finds events that were written around
that trigger. On SQLite and in an export, it is the only check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sdpipeline.db.audit import Event, Writer
from sdpipeline.db.audit_subjects import worker_id
from sdpipeline.domain import Json

WORKER_EVENTS = frozenset(
    {
        Event.LEASE_TAKEN,
        Event.LEASE_RELEASED,
        Event.LEASE_EXPIRED,
        Event.JOB_SUCCEEDED,
        Event.JOB_FAILED,
        Event.JOB_DEFERRED,
        Event.JOBS_SKIPPED,
        Event.WORKER_STARTED,
        Event.WORKER_STOPPED,
        Event.CAMPAIGN_PAUSED,
        Event.SETTINGS_CHANGED,
        Event.CHAIN_TAKEN,
    }
)
"""All events that a worker writes. Migration 0004 holds the same list."""

MAX_NAMED = 1000
"""Limit of foreign events reported per chain, because their writer chooses their sequence numbers."""

SEALER_EVENTS = frozenset({Event.SETTINGS_CHANGED, Event.CHAIN_TAKEN})


@dataclass(frozen=True, slots=True)
class _Author:
    """Author of the first event of a chain; ``login`` is None on SQLite and in events of older releases."""

    actor: str
    login: str | None


class Authors:
    """The author of every chain, learned from its first event."""

    def __init__(self, writers: Mapping[str, Writer] | None = None) -> None:
        """Take the logins that the database bound chains to; ``writers`` is None if it binds none."""
        self._writers = writers
        self._authors: dict[str, _Author] = {}
        self._taken: dict[tuple[str, _Author], int] = {}
        self._newest: dict[str, int] = {}

    def faults(self, event: Json) -> Iterator[str]:
        """Explain why this event is not its chain's own; raises KeyError or TypeError for a malformed event."""
        writer, seq, kind = event["writer"], event["seq"], event["event"]
        author = _Author(str(event["actor"]), event.get("login"))
        first = self._authors.setdefault(writer, author)
        self._newest[writer] = max(seq, self._newest.get(writer, seq))
        if kind == Event.CHAIN_TAKEN:
            taken = str(event["chain"]), author
            self._taken[taken] = min(int(event["first"]), self._taken.get(taken, int(event["first"])))
        if author.actor != first.actor:
            yield f"its actor is {author.actor!r}, its chain's is {first.actor!r}"
        if author.login != first.login:
            yield f"its login is {author.login!r}, its chain's is {first.login!r}"
        bound = None if self._writers is None else self._writers.get(writer)
        if self._writers is not None and (bound is None or bound.actor != first.actor):
            yield "no login is bound to its chain"
        elif bound is not None and None not in (bound.login, author.login) and bound.login != author.login:
            yield f"its login is {author.login!r}, its chain belongs to {bound.login!r}"
        if reason := _beyond(event, author.actor, bound):
            yield reason

    def foreign(self) -> Iterator[str]:
        """Yield the events that the chain's own author disowned in its next chain."""
        for (writer, author), first in self._taken.items():
            if self._authors.get(writer) == author:
                events = range(first, self._newest[writer] + 1)[:MAX_NAMED]
                yield from (f"event:{writer}/{seq}" for seq in events)


def _beyond(event: Json, actor: str, bound: Writer | None) -> str | None:
    """Explain why this actor, or the login behind it, does not write such events."""
    kind = event["event"]
    if bound is not None and bound.kind == "sealer" and kind not in SEALER_EVENTS:
        return f"a sealer's login may not write {kind}"
    own = worker_id(actor)
    if own is None:
        is_worker = bound is not None and bound.kind == "worker"
        return f"a worker's login may not write as {actor!r}" if is_worker else None
    if kind not in WORKER_EVENTS:
        return f"a worker may not write {kind}"
    if str(event.get("worker", own)) != own:
        return f"worker:{own} may not write about worker {event['worker']}"
    if kind in (Event.WORKER_STARTED, Event.WORKER_STOPPED) and event["subject"] != f"worker:{own}":
        return f"worker:{own} may not write about {event['subject']}"
    if kind == Event.CAMPAIGN_PAUSED and event.get("reason") != "budget":
        return "a worker may pause a campaign only for its budget"
    return None
