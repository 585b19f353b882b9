"""Frozen domain values of jobs and requests, and the hashes that identify them.

Standard library only: every other module may import this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import Any, Literal

Reproducibility = Literal["strict", "tolerant"]
"""How exactly a picture must be reproducible. ``strict``: alone in its batch, in float32, by deterministic algorithms,
and failed rather than made by a fallback. ``tolerant``: in the deployment's dtype and batches; fallbacks are taken and
recorded."""

StoredReproducibility = Literal["strict", "tolerant", "fast"]
"""Reproducibility of a stored request. Earlier releases stored ``fast``, which runs as ``tolerant``."""

Profile = Literal["exact", "fast", "turbo"]
"""Trade-off for speed. ``exact``: none. The others compute the steps of several pictures together and skip some of the
computation; see ``sdpipeline.engine.stepwise.profiles``. In the order of speed."""

PromptSyntax = Literal["plain", "weighted"]
"""Syntax of prompts. ``plain``: a prompt is text. ``weighted``: brackets weight words and ``BREAK`` starts a chunk; see
``sdpipeline.engine.weighted_prompts``."""

# JSON values; recursive aliases need Python 3.12's `type` statement, so this names only the outermost layer.
Json = dict[str, Any]


class Task(StrEnum):
    """Task of a stage."""

    TEXT_TO_IMAGE = "text-to-image"
    IMAGE_TO_IMAGE = "image-to-image"
    INPAINTING = "inpainting"
    SUPER_RESOLUTION = "super-resolution"


class Status(StrEnum):
    """Status of a job. ``waiting`` is for parents or for a back-off; the last five are terminal."""

    WAITING = "waiting"
    READY = "ready"
    LEASED = "leased"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    BLOCKED = "blocked"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.BLOCKED, Status.SKIPPED, Status.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """Reference to weights: the alias that people use, and the digest that was pinned at submit."""

    alias: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """Picture that a request consumes.

    With ``stage`` it is the picture of this job's parent in that stage, and ``digest`` is the parent's fingerprint.
    Without, it is the stored input ``inputs/{digest}``, and ``digest`` is its SHA-256. With ``url``, that input stays
    at ``s3://bucket/key``, and ``version`` pins it: ``version:ID`` or ``etag:TAG``.
    """

    digest: str
    stage: str | None = None
    url: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetInput:
    """ControlNet with its input picture and the annotator that turns it into a control map.

    ``annotator_checkpoint`` holds the weights of a learned annotator; the others need none. ``control_mode`` is the
    number of the kind of control map, for a union ControlNet.
    """

    checkpoint: CheckpointRef
    image: ImageSource
    annotator: str = "none"
    annotator_parameters: tuple[tuple[str, float | int | str], ...] = ()
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    annotator_checkpoint: CheckpointRef | None = None
    control_mode: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInput:
    """LoRA, textual inversion or IP-Adapter with its weight; the image is an IP-Adapter's reference."""

    checkpoint: CheckpointRef
    weight: float = 1.0
    image: ImageSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """Encoding of the picture. ``quality`` (1-100) is for jpeg and webp; ``None`` is lossless png."""

    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Request for one picture, with everything that determines its pixels; parameters carry diffusers' names.

    ``width`` and ``height`` are pixels of the result (of the input, for super-resolution). ``seed`` is the noise seed,
    already derived for this stage. ``strength`` is in (0, 1].
    """

    task: Task
    checkpoint: CheckpointRef
    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    negative_prompt: str = ""
    strength: float | None = None
    image: ImageSource | None = None
    mask_image: ImageSource | None = None
    controlnets: tuple[ControlNetInput, ...] = ()
    loras: tuple[AdapterInput, ...] = ()
    textual_inversions: tuple[AdapterInput, ...] = ()
    ip_adapters: tuple[AdapterInput, ...] = ()
    vae: CheckpointRef | None = None
    clip_skip: int | None = None
    noise_level: int | None = None
    resize: str | None = None
    reproducibility: StoredReproducibility = "tolerant"
    profile: Profile = "exact"
    output: OutputFormat = OutputFormat()
    prompt_syntax: PromptSyntax = "plain"

    @property
    def exact(self) -> bool:
        """Return True if no optimisation may change a bit of the picture."""
        return self.reproducibility == "strict"

    def sources(self) -> dict[str, ImageSource]:
        """Return every picture this request consumes, by role: ``image``, ``mask_image``, ``controlnets.0``, ..."""
        found = {"image": self.image, "mask_image": self.mask_image}
        found |= {f"controlnets.{n}": use.image for n, use in enumerate(self.controlnets)}
        found |= {f"ip_adapters.{n}": use.image for n, use in enumerate(self.ip_adapters)}
        return {role: source for role, source in found.items() if source is not None}

    def checkpoints(self) -> tuple[CheckpointRef, ...]:
        """Return every checkpoint this request needs, the base first."""
        adapters: tuple[ControlNetInput | AdapterInput, ...]
        adapters = (*self.controlnets, *self.loras, *self.textual_inversions, *self.ip_adapters)
        vae = (self.vae,) if self.vae else ()
        annotators = (use.annotator_checkpoint for use in self.controlnets if use.annotator_checkpoint)
        return (self.checkpoint, *(use.checkpoint for use in adapters), *vae, *annotators)


def to_document(value: Any) -> Any:
    """Return a frozen value as JSON.

    Fields at their default are left out, so that a field added later does not change the fingerprint of a request that
    does not use it.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_document(item) for item in value]
    document = {}
    for name, default in _fields_of(type(value)):
        item = getattr(value, name)
        if item is not default and item != default:
            document[name] = item if type(item) in _PLAIN else to_document(item)
    return document


_PLAIN = frozenset({str, int, float, bool, type(None)})


def _read_fields(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple((f.name, f.default) for f in fields(kind))


# mypy does not accept a class as the key of a cache.
_fields_of: Callable[[type], tuple[tuple[str, Any], ...]] = cache(_read_fields)


def request_from_document(document: Json) -> GenerationRequest:
    """Return the request of a document, as the inverse of :func:`to_document`.

    Raises KeyError or TypeError if the document is not one of a request.
    """
    d = dict(document)
    return GenerationRequest(
        **d
        | {
            "task": Task(d["task"]),
            "checkpoint": CheckpointRef(**d["checkpoint"]),
            "image": _source(d.get("image")),
            "mask_image": _source(d.get("mask_image")),
            "controlnets": tuple(_controlnet(use) for use in d.get("controlnets", ())),
            "vae": CheckpointRef(**d["vae"]) if d.get("vae") else None,
            "output": OutputFormat(**d.get("output", {})),
        }
        | {
            name: tuple(_adapter(use) for use in d.get(name, ()))
            for name in ("loras", "textual_inversions", "ip_adapters")
        }
    )


def _source(document: Json | None) -> ImageSource | None:
    return ImageSource(**document) if document else None


def _controlnet(d: Json) -> ControlNetInput:
    parameters = tuple((str(name), value) for name, value in d.get("annotator_parameters", ()))
    own = {"checkpoint": CheckpointRef(**d["checkpoint"]), "image": ImageSource(**d["image"])}
    if "annotator_checkpoint" in d:
        own["annotator_checkpoint"] = CheckpointRef(**d["annotator_checkpoint"])
    return ControlNetInput(**d | own | {"annotator_parameters": parameters})


def _adapter(d: Json) -> AdapterInput:
    return AdapterInput(**d | {"checkpoint": CheckpointRef(**d["checkpoint"]), "image": _source(d.get("image"))})


# Created once: `json.dumps` with options would create one for every job.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(document: Any) -> bytes:
    """Return the canonical bytes of a JSON value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(document).encode()


def digest(document: Any) -> str:
    """Return the SHA-256 of the canonical form, hexadecimal."""
    return hashed(canonical(document))


def hashed(data: bytes) -> str:
    """Return the SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(request: GenerationRequest) -> str:
    """Return the hash of what determines the picture: equal fingerprints ask for the same pixels.

    Aliases and addresses are only names, so only the digests count.
    """
    return digest(fingerprint_document(request))


def fingerprint_document(request: GenerationRequest) -> Json:
    """Return the values that :func:`fingerprint` hashes."""
    document: Json = _without_names(to_document(request))
    return document


_NAMES = frozenset({"alias", "url", "version"})


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(item) for key, item in value.items() if key not in _NAMES}
    return [_without_names(item) for item in value] if isinstance(value, list) else value


def changed_keys(was: Json, now: Json) -> dict[str, tuple[Any, Any]]:
    """Return the differences in pixels between two requests' documents: dotted key to both values, None for a missing
    one.

    A changed picture of another stage appears as ``image (stage draft)``.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    _compare(_without_names(was), _without_names(now), "", changed)
    return changed


def _compare(was: Any, now: Any, key: str, changed: dict[str, tuple[Any, Any]]) -> None:
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        stage = now.get("stage")
        if stage is not None and was.get("stage") == stage:
            changed[f"{key} (stage {stage})"] = (was.get("digest"), now.get("digest"))
            return
        for name in sorted({*was, *now}):
            _compare(was.get(name), now.get(name), f"{key}.{name}".removeprefix("."), changed)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for n, (before, after) in enumerate(zip(was, now, strict=True)):
            _compare(before, after, f"{key}[{n}]", changed)
    else:
        changed[key] = (was, now)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """Job as a campaign file specifies it, before it is in the database.

    ``variables`` are all values that this job's templates used; ``axes`` are those that distinguish it from its
    siblings. A table's row is identified by ``row_key`` instead (empty without ``rows:``), so that a corrected cell
    changes a job and does not create another. ``seed`` is the root seed that chains share, ``request.seed`` the noise
    seed of this stage. ``parents`` maps each parent's stage to its identity. ``chain`` numbers the chains of a
    campaign in the file's order: a row, a combination and a root seed. ``blocked`` names the policy rule that forbids
    this job, ``subject`` the data subject. ``identity`` makes this the same job when its campaign is
    submitted again; ``document`` is the canonical text of ``request``. Code that creates many similar jobs may pass
    both precomputed.
    """

    stage: str
    depth: int
    row_key: str
    variables: tuple[tuple[str, Any], ...]
    axes: tuple[tuple[str, Any], ...]
    seed: int
    request: GenerationRequest
    fingerprint: str
    batch_key: str
    edition: str = ""
    parents: tuple[tuple[str, str], ...] = ()
    chain: int = field(default=0, compare=False)
    blocked: str | None = None
    subject: str | None = None
    identity: str = field(init=False)
    document: str = field(init=False, compare=False, repr=False)
    known_identity: InitVar[str] = ""
    known_document: InitVar[str] = ""

    def __post_init__(self, known_identity: str, known_document: str) -> None:
        identity = known_identity or job_identity(self.edition, self.stage, self.row_key, dict(self.axes), self.seed)
        object.__setattr__(self, "identity", identity)
        object.__setattr__(self, "document", known_document or canonical(to_document(self.request)).decode())


def job_identity(edition: str, stage: str, row_key: str, axes: Json, seed: int) -> str:
    """Return the hash that is unique in a campaign: :func:`digest` of these five in a list."""
    return identities(edition, stage, row_key, axes)(seed)


def identities(edition: str, stage: str, row_key: str, axes: Json) -> Callable[[int], str]:
    """Return a function from seed to identity, for jobs that differ only in their seed."""
    begun = canonical([edition, stage, row_key, axes])[:-1]
    return lambda seed: hashed(b"%b,%d]" % (begun, seed))


def stage_seed(seed: int, stage: str) -> int:
    """Return a stage's noise seed in [0, 2**63), derived so that the stages of a chain do not repeat one noise."""
    derived = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return int.from_bytes(derived[:8], "big") >> 1
