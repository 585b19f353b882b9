"""Audit events for changed settings of a starting process: how it marks and signs pictures."""

from __future__ import annotations

import json

from sdpipeline.db.audit import Event, Transaction, about
from sdpipeline.db.event_reader import readable
from sdpipeline.domain import Json


def declare(tx: Transaction, part: str, values: Json) -> bool:
    """Record these settings unless they equal the last recorded ones of this part; ``values`` hold no secret.

    Two machines with different settings record them in turn, which is intended.
    """
    subject = f"settings:{part}"
    events = [event for _, event in readable(about(tx.connection, subject))]
    last = max(events, key=lambda event: (event["at_us"], event["seq"]), default=None)
    if last is not None and last.get("values") == json.loads(json.dumps(values)):
        return False
    tx.record(Event.SETTINGS_CHANGED, subject, values=values)
    return True
