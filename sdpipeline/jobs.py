"""Values that travel between the queue, the worker and delivery: leased jobs, delivery rules and stored images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sdpipeline.domain import CheckpointRef, GenerationRequest, Json

IncludePrompt = Literal["full", "hash", "none"]
"""How a file discloses its prompts: in full, as their SHA-256, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedJob:
    """One job that a worker may finish, with its inputs.

    No other job gets a copy of a ``private`` picture.
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
    rules: DeliveryRules
    private: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityThresholds:
    """Minimum quality scores of a picture; ``None`` sets no minimum."""

    min_sharpness: float | None = None
    min_edge_agreement: float | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, float]) -> QualityThresholds:
        """Return the thresholds of :meth:`to_document`."""
        return cls(**{name: document[name] for name in cls.__dataclass_fields__ if name in document})

    def to_document(self) -> dict[str, float]:
        """Return the thresholds that are set, by name."""
        thresholds = {"min_sharpness": self.min_sharpness, "min_edge_agreement": self.min_edge_agreement}
        return {name: value for name, value in thresholds.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyCheck:
    """Safety checker that a policy requires; ``rule`` names the policy's key for error messages."""

    rule: str
    checker: CheckpointRef

    @classmethod
    def from_document(cls, document: Json) -> SafetyCheck:
        """Return the check of :meth:`to_document`."""
        checker = CheckpointRef(alias=document["alias"], digest=document["digest"])
        return cls(rule=document["rule"], checker=checker)

    def to_document(self) -> Json:
        """Return the check as a JSON object."""
        return {"rule": self.rule, "alias": self.checker.alias, "digest": self.checker.digest}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRules:
    """Rules of a stage for checking, reusing and publishing its pictures; they change no pixel.

    ``safety`` lists the safety checkers that every picture must pass. ``include_prompt`` limits how much of the prompts
    a file may disclose.
    """

    reuse: bool = True
    quality: QualityThresholds = QualityThresholds()
    safety: tuple[SafetyCheck, ...] = ()
    include_prompt: IncludePrompt = "full"

    @classmethod
    def from_document(cls, document: Json) -> DeliveryRules:
        """Return the rules of a database row; a missing key has its default, and unknown keys are ignored.

        A newer release may have written the row, and its keys must not stop this one.
        """
        return cls(
            reuse=document.get("reuse", True),
            quality=QualityThresholds.from_document(document.get("quality", {})),
            safety=tuple(SafetyCheck.from_document(each) for each in document.get("safety", ())),
            include_prompt=document.get("include_prompt", "full"),
        )

    def to_document(self) -> Json:
        """Return the rules as the database stores them; earlier releases read this form."""
        safety = [check.to_document() for check in self.safety]
        optional = ({"safety": safety} if safety else {}) | (
            {"include_prompt": self.include_prompt} if self.include_prompt != "full" else {}
        )
        return {"reuse": self.reuse, "quality": self.quality.to_document()} | optional


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
