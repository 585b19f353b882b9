"""Values that travel between the queue, the worker and delivery: leased jobs and stored images."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdpipeline.domain import GenerationRequest, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedJob:
    """One job that a worker may finish, with its inputs.

    ``rules`` say how its picture is delivered and change no pixel. No other job gets a copy of a ``private`` picture.
    """

    id: int
    attempt: int
    max_attempts: int
    team: str
    campaign: str
    edition: str
    stage: str
    row_key: str
    variables: Json
    seed: int
    identity: str
    fingerprint: str
    request: GenerationRequest
    parents: tuple[ParentImage, ...]
    rules: Json
    private: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentImage:
    """The finished picture of a parent."""

    stage: str
    key: str
    sha256: str
    pixels_sha256: str
    fingerprint: str
    sidecar_key: str
    sidecar_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to finish some attempts; ``id`` is the fencing token."""

    id: str
    group_id: int
    checkpoint_digest: str
    jobs: tuple[LeasedJob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """A verified picture in storage, ready to be recorded; a copy names the key of its original."""

    key: str
    url: str
    sha256: str
    pixels_sha256: str
    size_bytes: int
    version_id: str | None
    width: int
    height: int
    sidecar_key: str
    sidecar_sha256: str
    gpu_seconds: float
    timings: Json
    reused_from: str | None = None
    scores: Json = field(default_factory=dict)
