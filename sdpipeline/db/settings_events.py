"""What a process declares in the audit log when it starts: how it marks and signs, where that is not as before."""

from __future__ import annotations

import json

from sdpipeline.db.audit import Event, Transaction, about
from sdpipeline.db.event_reader import readable
from sdpipeline.domain import Json


def declare(tx: Transaction, part: str, values: Json) -> bool:
    """Record these settings unless they are what was recorded last of this part; ``values`` hold no secret.

    Two machines that are set up differently declare in turn, and so they should.
    """
    subject = f"settings:{part}"
    told = [event for _, event in readable(about(tx.connection, subject))]
    last = max(told, key=lambda event: (event["at_us"], event["seq"]), default=None)
    if last is not None and last.get("values") == json.loads(json.dumps(values)):
        return False
    tx.record(Event.SETTINGS_CHANGED, subject, values=values)
    return True
