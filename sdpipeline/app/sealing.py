"""Sealing of the audit log: by this process, or by the process that has the seal key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import structlog

from sdpipeline import audit
from sdpipeline.app.keys import seal_key
from sdpipeline.app.services import Services
from sdpipeline.db.settings_events import declare
from sdpipeline.db.waiting import until_available

_log = structlog.get_logger(__name__)

SEAL_TIMEOUT_S = 300.0
"""How long to wait for the process that seals; it runs every minute, so this is five attempts."""


def seal(services: Services) -> int:
    """Seal the new events of the audit log; return their number."""
    key = seal_key(services.settings)
    _declare(services, key)
    return audit.seal(services.database, services.store, key)


def seal_here(services: Services) -> int | None:
    """Seal the new events of the audit log; return None if this process has only the public key and another one
    seals."""
    if services.settings.signing.seal_public_key_file is not None:
        _log.info("seal_skipped", reason="SDP_SIGNING__SEAL_PUBLIC_KEY_FILE is set: another process seals")
        return None
    return seal(services)


def seal_or_wait(services: Services) -> int:
    """Seal the new events of the audit log, or wait until the process with the seal key has done so.

    Raises SealOverdueError if that process does not seal within five minutes. Returns the number of events.
    """
    if (sealed := seal_here(services)) is not None:
        return sealed
    return audit.wait_for_seal(services.database, timeout_s=SEAL_TIMEOUT_S)


def keep_sealing(
    services: Services,
    stop: threading.Event,
    *,
    every_s: float,
    events: int,
    on_seal: Callable[[int], None] | None = None,
) -> None:
    """Seal the audit log at an interval until ``stop`` is set, and earlier once ``events`` new events exist."""
    key = seal_key(services.settings)
    until_available(partial(_declare, services, key), stop)
    audit.watch(services.database, services.store, key, stop, every_s=every_s, events=events, on_seal=on_seal)


def _declare(services: Services, key: audit.SealKey) -> None:
    """Record the keys and the retention of seals in the audit log when they changed."""
    lock = services.store.retention
    values = {"keys": list(key.public), "lock": lock and {"mode": lock.mode, "days": lock.days}}
    with services.audit.transaction() as tx:
        declare(tx, "seals", values)
