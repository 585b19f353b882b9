"""Validating reader for audit events: a login that may insert events controls all of their bytes.

A worker's login can insert an event whose fields are missing, of other types, or nested without end. This module
detects such events in one place, so that readers of the log can continue.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, Field, Strict, StringConstraints, ValidationError

from sdpipeline.db.audit import Event
from sdpipeline.domain import Json

_Int = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]
_Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(ge=-1e300, le=1e300)]
_Str = Annotated[str, Strict()]
_Row = Annotated[list[_Int], Field(min_length=2, max_length=2)]
_OfJob = Annotated[str, StringConstraints(strict=True, pattern=r"^job:[0-9]{1,18}$")]
_OfCampaign = Annotated[str, StringConstraints(strict=True, pattern=r"^campaign:[0-9]{1,18}$")]


class _Spent(BaseModel):
    campaign: _Int
    group: _Int
    images: _Number
    size_bytes: _Number
    gpu_seconds: _Number
    cost: _Number


class _Image(BaseModel):
    key: _Str
    sha256: _Str
    scores: dict[str, Any] = {}


class _Any(BaseModel):
    writer: _Str
    seq: _Count
    prev: _Str
    actor: _Str
    event: _Str
    subject: _Str
    at_us: _Int
    login: _Str | None = None
    worker: _Str | None = None


class _Lease(_Any):
    jobs: list[_Row]


class _Attempt(_Any):
    subject: _OfJob
    attempt: _Int
    lease: _Str | None = None
    spent: _Spent | None = None


class _Success(_Attempt):
    worker: _Str
    fingerprint: _Str
    commitment: _Str
    image: _Image


class _Jobs(_Any):
    jobs: list[_Int]


class _OnCampaign(_Any):
    subject: _OfCampaign


class _Submitted(_OnCampaign):
    version_id: _Int
    version: _Int
    source_sha256: _Str
    jobs_root: _Str


class _Sources(_OnCampaign):
    versions: list[_Int]


class _Archived(_OnCampaign):
    edition: _Str
    key: _Str
    sha256: _Str


class _Pictures(_Any):
    pictures: list[Annotated[list[_Int | _Str], Field(min_length=3, max_length=3)]]


class _Erased(_Any):
    jobs: list[Annotated[list[_Int | _Str], Field(min_length=2, max_length=2)]]


class _Checkpoint(_Any):
    digest: _Str


class _Approved(_Checkpoint):
    alias: _Str


class _Settings(_Any):
    values: Any


class _Taken(_Any):
    chain: _Str
    first: _Count


class _Gap(_Any):
    first_seal: _Count
    last_seal: _Count
    events: _Count
    missing: list[Any]


_KINDS: dict[str, type[BaseModel]] = {
    **dict.fromkeys((Event.LEASE_TAKEN, Event.LEASE_RELEASED, Event.LEASE_EXPIRED), _Lease),
    **dict.fromkeys((Event.JOB_SUCCEEDED, Event.JOB_ADOPTED), _Success),
    **dict.fromkeys((Event.JOB_FAILED, Event.JOB_DEFERRED), _Attempt),
    **dict.fromkeys((Event.JOBS_SKIPPED, Event.JOBS_CANCELLED, Event.JOBS_BLOCKED), _Jobs),
    **dict.fromkeys((Event.JOBS_RETRIED, Event.JOBS_CHANGED, Event.JOBS_REOPENED), _Jobs),
    **dict.fromkeys((Event.CAMPAIGN_PAUSED, Event.CAMPAIGN_RESUMED), _OnCampaign),
    Event.CAMPAIGN_SUBMITTED: _Submitted,
    Event.SOURCES_DELETED: _Sources,
    Event.EDITION_ARCHIVED: _Archived,
    Event.PICTURES_DELETED: _Pictures,
    Event.JOBS_ERASED: _Erased,
    Event.CHECKPOINT_ADDED: _Approved,
    Event.CHECKPOINT_REVOKED: _Checkpoint,
    Event.SETTINGS_CHANGED: _Settings,
    Event.CHAIN_TAKEN: _Taken,
    Event.AUDIT_GAP: _Gap,
}


def read_event(body: str | bytes) -> Json:
    """Parse an event; raises ValueError unless it has the fields, with their types, of its kind."""
    try:
        event = json.loads(body)
        kind = event.get("event") if isinstance(event, dict) else None
        (_KINDS.get(kind, _Any) if isinstance(kind, str) else _Any).model_validate(event)
    except (ValidationError, RecursionError, MemoryError) as error:
        raise ValueError("not an event written by this program") from error
    return event  # type: ignore[no-any-return]


def readable(rows: Iterable[Any]) -> Iterator[tuple[Any, Json]]:
    """Yield valid events with their documents; ``audit verify`` reports the others."""
    for row in rows:
        try:
            yield row, read_event(row.body)
        except ValueError:
            continue
