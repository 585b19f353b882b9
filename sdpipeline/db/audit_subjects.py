"""Parser of the subjects and actors of audit events, as in ``job:12`` and ``worker:0f3c sdpipeline/1.0``."""

from __future__ import annotations


def job_id(subject: str) -> int:
    """Return the id in ``job:ID``; raises ValueError for any other subject."""
    return int(_id(subject, "job"))


def campaign_id(subject: str) -> int:
    """Return the id in ``campaign:ID``; raises ValueError for any other subject."""
    return int(_id(subject, "campaign"))


def worker_id(actor: str) -> str | None:
    """Return the id in ``worker:ID sdpipeline/VERSION``; None if the actor is not a worker."""
    name = actor.partition(" ")[0]
    return _id(name, "worker") if name.startswith("worker:") else None


def _id(subject: str, kind: str) -> str:
    found, separator, identity = subject.partition(":")
    if not separator or found != kind:
        raise ValueError(f"{subject!r} is not the subject of a {kind}")
    return identity
