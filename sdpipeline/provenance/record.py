"""The record of a picture and its sidecar: their fields, and their JSON documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from sdpipeline.domain import GenerationRequest, Json, canonical, request_from_document, to_document
from sdpipeline.jobs import IncludePrompt

RecordSchema = Literal["sdpipeline/record/1", "sdpipeline/record/2"]
SidecarSchema = Literal["sdpipeline/sidecar/1"]

RECORD_SCHEMA: Final = "sdpipeline/record/2"
RECORD_SCHEMAS: tuple[RecordSchema, ...] = ("sdpipeline/record/1", RECORD_SCHEMA)
"""Schemas that this release reads; it writes the last. Schema 1 nests the records of parents in ``inputs``."""

SIDECAR_SCHEMA: Final = "sdpipeline/sidecar/1"
SIDECAR_SCHEMAS: tuple[SidecarSchema, ...] = (SIDECAR_SCHEMA,)

CONTROL_MAP_SCHEMA: Final = "sdpipeline/control-map/1"

_DOCUMENTED = ConfigDict(use_attribute_docstrings=True)


@with_config(_DOCUMENTED)
class RecordedInput(TypedDict):
    """Input of a picture: a stored input, a pinned object of another bucket, or the picture of an earlier stage."""

    sha256: NotRequired[str]
    """SHA-256 of the input's bytes."""
    key: NotRequired[str]
    """Object key of a stored input or of an earlier stage's picture."""
    url: NotRequired[str]
    """Address of an object in another bucket, `s3://bucket/key`."""
    version: NotRequired[str | None]
    """Pinned version of that object: `version:ID` or `etag:TAG`."""
    stage: NotRequired[str]
    """Stage that made the picture."""
    pixels_sha256: NotRequired[str]
    """SHA-256 of the picture's decoded pixels."""
    fingerprint: NotRequired[str]
    """Fingerprint of the picture's request."""
    record: NotRequired[Json]
    """Record of the picture, in schema 1 only; schema 2 has it under `ancestors`."""


@with_config(_DOCUMENTED)
class Encoder(TypedDict):
    """Encoder of the file; the same encoder gives the same pixels again."""

    library: str
    """Name and version of the library."""
    parameters: Json
    """Arguments of the library's save call."""


@with_config(_DOCUMENTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Record of a picture: what was asked, what ran, and the inputs; enough to reproduce and to explain it.

    The sidecar always has the prompts. The copy in the file follows `include_prompt`.
    """

    schema: RecordSchema
    """Version of this document."""
    team: str
    """Team of the campaign."""
    campaign: str
    """Name of the campaign."""
    edition: str
    """Edition of the campaign; empty if it has none."""
    stage: str
    """Stage that made the picture."""
    row: str
    """Key of the table's row."""
    seed: int
    """Root seed of the job; the request has the noise seed derived from it."""
    identity: str
    """Hash of edition, stage, row, variables and root seed; unique in a campaign."""
    fingerprint: str
    """Hash of what determines the picture: equal fingerprints ask for the same pixels."""
    asked: GenerationRequest
    """Request, without the fields at their default."""
    ran: Json
    """Execution: engine, checkpoints, scheduler, device, batch and libraries."""
    inputs: Mapping[str, RecordedInput]
    """Inputs by role: `image`, `mask_image`, `controlnets.0`, `ip_adapters.0`, and so on."""
    encoder: Encoder
    """Encoder of the file."""
    made_at: str
    """Time at which the record was made, in UTC."""
    include_prompt: IncludePrompt = "full"
    """Disclosure of prompts in the file: in full, as their SHA-256, or not at all."""
    ancestors: Mapping[str, Json] | None = None
    """Records of all pictures that this one was made from, by the SHA-256 of the file."""
    reproduction_of: Json | None = None
    """Identity, fingerprint and time of the original, if `reproduce` made this picture."""

    @classmethod
    def from_document(cls, document: Json) -> Record:
        """Return the record of a document; raises KeyError or TypeError if the document is not a complete record."""
        return cls(**_known(cls, document) | {"asked": request_from_document(document["asked"])})

    def to_document(self) -> Json:
        """Return the record as it is embedded and stored; optional fields at their default are left out."""
        optional: Json = {} if self.include_prompt == "full" else {"include_prompt": self.include_prompt}
        optional |= {"ancestors": dict(self.ancestors)} if self.ancestors else {}
        optional |= {"reproduction_of": self.reproduction_of} if self.reproduction_of else {}
        required = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _OPTIONAL}
        return required | {"asked": to_document(self.asked), "inputs": dict(self.inputs)} | optional


_OPTIONAL = frozenset({"include_prompt", "ancestors", "reproduction_of"})


@with_config(_DOCUMENTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class PictureObject:
    """Object in storage that holds the picture."""

    key: str
    """Object key."""
    sha256: str
    """SHA-256 of the file."""
    size_bytes: int
    """Size of the file in bytes."""
    version_id: str | None
    """Version that a versioned bucket gave the object."""
    pixels_sha256: str
    """SHA-256 of the decoded pixels, `{height}x{width}x3`, a line feed and the RGB bytes."""


@with_config(_DOCUMENTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class ControlMap:
    """Object in storage that holds a control map of the picture."""

    key: str
    """Object key."""
    sha256: str
    """SHA-256 of the file."""
    annotator: str
    """Annotator that made the control map."""


@with_config(_DOCUMENTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class ReusedFrom:
    """Picture that was copied instead of making it again."""

    key: str
    """Object key of the original."""
    sha256: str
    """SHA-256 of the file."""
    job: int
    """Number of the job that made it."""
    fingerprint: str
    """Fingerprint of the request, the same as the copy's."""


@with_config(_DOCUMENTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """JSON object stored next to each picture: its record, and what is known only after encoding."""

    schema: SidecarSchema
    """Version of this document."""
    record: Json
    """Record of the picture, with its prompts; for a copy, that of the job that made the original."""
    object: PictureObject
    """The picture's object in storage."""
    control_maps: tuple[ControlMap, ...]
    """Control maps, in the order of the request's ControlNets."""
    timings: Mapping[str, float]
    """Seconds of each step."""
    attempt: int
    """Number of the attempt that stored the picture."""
    worker: str
    """Worker that stored the picture."""
    scores: Mapping[str, float | str] | None = None
    """Quality metrics: `sharpness`, `perceptual_hash` and `edge_agreement`; older releases did not measure."""
    reused_from: ReusedFrom | None = None
    """Original of a copy."""

    @classmethod
    def from_document(cls, document: Json) -> Sidecar:
        """Return the sidecar of a document; raises KeyError or TypeError if the document is not a sidecar."""
        reused = document.get("reused_from")
        parts = {
            "object": PictureObject(**_known(PictureObject, document["object"])),
            "control_maps": control_maps(document),
            "reused_from": ReusedFrom(**_known(ReusedFrom, reused)) if reused else None,
        }
        return cls(**_known(cls, document) | parts)

    def to_document(self) -> Json:
        """Return the sidecar as a JSON object; absent optional fields are left out."""
        document = _document(self) | {"object": _document(self.object)}
        document["control_maps"] = [_document(each) for each in self.control_maps]
        document |= {"reused_from": _document(self.reused_from)} if self.reused_from else {}
        return {name: value for name, value in document.items() if name not in _ABSENT or value is not None}

    def to_bytes(self) -> bytes:
        """Return the sidecar's object as it is stored."""
        return canonical(self.to_document())


_ABSENT = frozenset({"scores", "reused_from"})


def control_maps(sidecar: Json) -> tuple[ControlMap, ...]:
    """Return the control maps that a sidecar names."""
    return tuple(ControlMap(**_known(ControlMap, each)) for each in sidecar.get("control_maps", ()))


def control_maps_in(data: bytes) -> tuple[ControlMap, ...]:
    """Return the control maps that the bytes of a stored sidecar name."""
    return control_maps(json.loads(data))


def _known(kind: type[Any], document: Json) -> Json:
    """Return the fields of a class that a document has; another release may have written more."""
    return {each.name: document[each.name] for each in fields(kind) if each.name in document}


def _document(value: Any) -> Json:
    return {each.name: getattr(value, each.name) for each in fields(value)}
