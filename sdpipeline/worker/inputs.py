"""Input images of a job, read from storage with the provenance that its own picture will record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdpipeline import provenance
from sdpipeline.campaigns.inputs import LARGEST_INPUT_BYTES
from sdpipeline.domain import ImageSource, Json
from sdpipeline.engine import Pixels, PreparedRequest
from sdpipeline.errors import InputImageError, ObjectConflictError, ObjectMissingError
from sdpipeline.jobs import LeasedJob, ParentImage
from sdpipeline.provenance import GENERATED, Ingredient
from sdpipeline.provenance.record import RecordedInput
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.storage import ForeignObjects, ObjectStore
from sdpipeline.storage.keys import input_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """Inputs of a picture, as its record names them.

    ``inputs`` maps each role to its entry in the record. ``ancestors`` are the records of inputs made here and of
    their own ancestors, by the file's SHA-256. ``ingredients`` are the files themselves, once for each role. ``edits``
    is True if the edited picture was not entirely made by a generator.
    """

    inputs: Mapping[str, RecordedInput] = field(default_factory=dict)
    ancestors: Mapping[str, Json] = field(default_factory=dict)
    ingredients: Sequence[Ingredient] = ()
    edits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Request with its pictures decoded, and the provenance of those pictures."""

    prepared: PreparedRequest
    consumed: Consumed


def fetch(
    store: ObjectStore, foreign: ForeignObjects, leased: LeasedJob, *, max_pixels: int, signing: SigningKey
) -> Fetched:
    """Return the job's request with its pictures decoded.

    Raises InputImageError for an input that is missing or altered. It also raises for an external input with marks so
    damaged that no picture naming it could be signed. Both are found before the device is used.
    """
    images: dict[str, Pixels] = {}
    inputs: dict[str, RecordedInput] = {}
    ancestors: dict[str, Json] = {}
    ingredients: list[Ingredient] = []
    for role, source in leased.request.sources().items():
        parent = _parent(leased, source)
        about = _about(source, parent)
        data = pinned(foreign, about) if "url" in about else verified(store, about["key"], about["sha256"])
        images[role] = provenance.decode(data, max_pixels=max_pixels)
        inputs[role] = about
        ingredients.append(Ingredient(role=role, data=data))
        if parent is None:
            provenance.rehearse(signing, ingredients[-1:])
        else:
            # A picture that holds its ancestors' records is enough to reproduce its whole chain.
            ancestors |= _records(store, parent, data)
    consumed = Consumed(inputs=inputs, ancestors=ancestors, ingredients=ingredients, edits=_edits(ingredients))
    return Fetched(prepared=PreparedRequest(request=leased.request, images=images), consumed=consumed)


def pinned(foreign: ForeignObjects, about: Mapping[str, Any]) -> bytes:
    """Read the object that a record's ``url``, ``version`` and ``sha256`` name; raises InputImageError if it has
    changed."""
    url, fix = about["url"], "restore it, or submit the campaign again"
    try:
        found = foreign.read(url, most_bytes=LARGEST_INPUT_BYTES, version=about["version"])
    except ObjectMissingError as error:
        raise InputImageError(f"{error}; it existed when the campaign was submitted ({fix})") from error
    except ObjectConflictError as error:
        raise InputImageError(f"{url} was changed after the campaign was submitted ({fix})") from error
    if hashlib.sha256(found.data).hexdigest() != about["sha256"]:
        raise InputImageError(f"{url} was changed after the campaign was submitted ({fix})")
    return found.data


def verified(store: ObjectStore, key: str, sha256: str) -> bytes:
    """Read an object; raises InputImageError if it is missing or differs from the recorded one."""
    try:
        data = store.get(key)
    except ObjectMissingError as error:
        raise InputImageError(f"{key} is not in storage") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputImageError(f"{key} was altered in storage: its SHA-256 is not {sha256}")
    return data


def _parent(leased: LeasedJob, source: ImageSource) -> ParentImage | None:
    if source.stage is None:
        return None
    found = next((parent for parent in leased.parents if parent.stage == source.stage), None)
    if found is None:
        raise InputImageError(f"the picture of stage {source.stage!r} is not recorded")
    return found


def _about(source: ImageSource, parent: ParentImage | None) -> RecordedInput:
    if source.url is not None:
        return {"url": source.url, "version": source.version, "sha256": source.digest}
    if parent is None:
        return {"key": input_key(source.digest), "sha256": source.digest}
    return {
        "stage": parent.stage,
        "key": parent.key,
        "sha256": parent.sha256,
        "pixels_sha256": parent.pixels_sha256,
        "fingerprint": parent.fingerprint,
    }


def _records(store: ObjectStore, parent: ParentImage, data: bytes) -> dict[str, Json]:
    """Return the records of the parent and its ancestors; read the sidecar if the file withholds prompts."""
    record = provenance.read_record(data)
    if record is not None and provenance.include_prompt(record) != "full":
        record = json.loads(verified(store, parent.sidecar_key, parent.sidecar_sha256))["record"]
    if record is None:
        return {}
    return dict(record.get("ancestors", {})) | {parent.sha256: provenance.own_part(record)}


def _edits(ingredients: Sequence[Ingredient]) -> bool:
    """Return True if the edited picture, or an ancestor of it, is not marked as wholly made by a generator.

    Inputs that only steer (a mask, a control map, an IP-Adapter's reference) put none of their pixels into the result.
    """
    edited = [each.data for each in ingredients if each.role == "image"]
    return any(provenance.digital_source_type(data) != GENERATED for data in edited)
