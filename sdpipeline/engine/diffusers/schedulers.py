"""Creation of diffusers schedulers: from a name and a checkpoint's configuration, or as a record holds them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from sdpipeline.domain import Json
from sdpipeline.engine.families import Family
from sdpipeline.engine.families.scheduler_config import options_of, row_of
from sdpipeline.engine.families.schedulers import EDM_SCHEDULERS, FLOW_SCHEDULERS, NOISE_SCHEDULE, SCHEDULERS
from sdpipeline.errors import CheckpointError, RequestRefusedError

RECORDED_CLASSES = frozenset(class_name for class_name, _ in (*SCHEDULERS.values(), *EDM_SCHEDULERS.values()))
"""Classes that a record may name."""
LARGEST_NUMBER = 100_000
"""Limit on an untrusted record's whole numbers and lists, such as the number of trained timesteps."""

_REFUSALS = (TypeError, ValueError, NotImplementedError, ImportError, AttributeError, RuntimeError, IndexError)
_INFINITIES = {"inf": float("inf"), "-inf": float("-inf")}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedScheduler:
    """Scheduler of a record: its class, its configuration as JSON text, and its eta if it takes one."""

    class_name: str
    config: str
    eta: float | None = None


def create(name: str, row: Family, own: Mapping[str, Any], *, alias: str) -> Any:
    """Create the scheduler that a name stands for on a checkpoint with this configuration.

    Raises CheckpointError if the class does not accept the configuration. See
    :mod:`sdpipeline.engine.families.schedulers` for the origin of each option.
    """
    class_name, _ = row_of(name, own)
    scheduler_class = getattr(diffusers, class_name)
    options = options_of(name, row, own)
    if name not in FLOW_SCHEDULERS:
        options = _trained_defaults(own) | options
    known = inspect.signature(scheduler_class.__init__).parameters
    try:
        return scheduler_class.from_config({key: value for key, value in options.items() if key in known})
    except _REFUSALS as error:
        message = f"checkpoint {alias!r}: {class_name} does not accept its scheduler configuration: {error}"
        raise CheckpointError(message) from error


def recorded_scheduler(ran: Json | None) -> RecordedScheduler | None:
    """Return the scheduler of an untrusted record's ``ran``; ``None`` if there is no record, or no scheduler ran.

    Raises RequestRefusedError for a scheduler that this program never records.
    """
    scheduler = (ran or {}).get("scheduler")
    if not isinstance(scheduler, Mapping) or "class" not in scheduler or "config" not in scheduler:
        return None
    class_name, config = scheduler["class"], scheduler["config"]
    if not isinstance(class_name, str) or class_name not in RECORDED_CLASSES or not isinstance(config, Mapping):
        raise RequestRefusedError(f"scheduler: the record names {str(class_name)[:80]!r}, which is not used here")
    known = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    for key, value in config.items():
        if key not in known or not _plain(value):
            raise RequestRefusedError(f"scheduler: the record has {str(key)[:80]!r}, which {class_name} does not take")
    eta = scheduler.get("eta")
    if eta is not None and (type(eta) not in (int, float) or not 0 <= eta <= 1):
        raise RequestRefusedError(f"scheduler: the record has an eta of {str(eta)[:80]}, which is not from 0 to 1")
    return RecordedScheduler(class_name=class_name, config=json.dumps(config, sort_keys=True), eta=eta)


def recreate(recorded: RecordedScheduler) -> Any:
    """Create a scheduler exactly as it was recorded; raises RequestRefusedError if its class does not accept that."""
    config = {key: _INFINITIES.get(str(value), value) for key, value in json.loads(recorded.config).items()}
    try:
        return getattr(diffusers, recorded.class_name).from_config(config)
    except _REFUSALS as error:
        message = f"scheduler: {recorded.class_name} does not accept the record's configuration: {error}"
        raise RequestRefusedError(message) from error


def _trained_defaults(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise schedule that a configuration means by leaving options out: its own class's defaults."""
    own_class = getattr(diffusers, str(own.get("_class_name")), None)
    if own_class is None:
        return {}
    parameters = inspect.signature(own_class.__init__).parameters
    return {name: parameters[name].default for name in NOISE_SCHEDULE if name in parameters}


def _plain(value: Any) -> bool:
    """Return True for a value that a configuration may have, of a size that cannot exhaust the memory."""
    if isinstance(value, list):
        return len(value) <= LARGEST_NUMBER and all(type(each) in (int, float) for each in value)
    if type(value) is int:
        return abs(value) <= LARGEST_NUMBER
    return value is None or isinstance(value, bool | float) or (isinstance(value, str) and len(value) <= 40)
