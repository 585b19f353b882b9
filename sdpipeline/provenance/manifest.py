"""C2PA manifests: signed statements of how a picture was made from which inputs, and their verification."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import c2pa
import numpy as np

from sdpipeline import __version__
from sdpipeline.domain import Json, OutputFormat
from sdpipeline.errors import InputImageError, SigningUnavailableError
from sdpipeline.provenance.disclosure import own_part
from sdpipeline.provenance.encoding import (
    COMPOSITE,
    GENERATED,
    EncodedImage,
    content_type,
    decode,
    encode,
    parsed_record,
    read_marks,
    record_text,
)
from sdpipeline.provenance.signing import DEVELOPMENT, DEVELOPMENT_IDENTITY, SigningKey, development_key
from sdpipeline.provenance.untrusted import (
    DEEPEST_MANIFEST,
    LARGEST_MANIFEST,
    SHAPE_ERRORS,
    UnreadableError,
    parse_object,
)

_RECORD = "sdpipeline.record"
_ACTIONS = "c2pa.actions.v2"
_PARENT = "image"
_AGENT = {"name": "sdpipeline", "version": __version__}

# Defaults would cost 46-59 ms and up to 1.8 MB a picture; signed pictures are verified after their upload
# instead. An untrusted picture must not be able to make us open a connection.
_SETTINGS: Json = {
    "version": 1,
    "builder": {
        "thumbnail": {"enabled": False},
        # All other assertions count as gathered from elsewhere, and the signer does not vouch for them.
        "created_assertion_labels": ["c2pa.actions", "c2pa.ingredient", _RECORD],
    },
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    """Input picture of another, as its file, with its role in the request.

    The one with the role ``image`` was edited and becomes the parent; all others are inputs.
    """

    role: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentPicture:
    """Ancestor named by the signed manifests.

    ``manifest`` is its own manifest's label, or None if it was not signed. ``child`` is the label of the picture made
    from it. ``depth`` counts generations up from the verified picture. ``relationship`` is parentOf or inputTo.
    ``faults`` lists what was wrong with it when it was used; they do not affect its child's marks.
    """

    role: str
    relationship: str
    depth: int
    child: str
    manifest: str | None = None
    digital_source_type: str | None = None
    record: Json | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedPicture:
    """Marks of a picture, and whether they hold.

    ``c2pa`` is *trusted* if the signer's chain ends in a trusted root; *valid* if not, or for a development key;
    *invalid* if the picture or its manifest was changed; *missing* if it has no manifest.
    ``record`` is the signed record without its ancestors' records, or the embedded one if nothing is signed.
    ``parents`` has every ancestor, nearest first. ``faults`` names what does not hold.
    """

    c2pa: Literal["trusted", "valid", "invalid", "missing"]
    digital_source_type: str | None
    record: Json | None
    signer: str | None = None
    signed_at: str | None = None
    development_key: bool = False
    parents: tuple[ParentPicture, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if the picture is signed, unchanged and marked as AI-made in all our ways."""
        return self.c2pa in ("trusted", "valid") and not self.faults

    @property
    def signed_by(self) -> str:
        """Name of the signer, for display."""
        return DEVELOPMENT_IDENTITY if self.development_key else self.signer or "nobody"


def sign(
    image: EncodedImage,
    *,
    key: SigningKey,
    record: Json,
    ingredients: Sequence[Ingredient] = (),
    from_photograph: bool = False,
) -> EncodedImage:
    """Add a signed manifest to the picture; any later change to the file breaks the signature.

    Only the record's own part is signed: the manifest of each ancestor holds that ancestor's record.
    Raises SigningUnavailableError, also for an expired certificate, and InputImageError for an ingredient that C2PA
    cannot read.
    """
    refusals: list[SigningUnavailableError] = []

    def signature(data: bytes) -> bytes:
        try:
            return key.sign(data)
        except SigningUnavailableError as error:
            refusals.append(error)  # c2pa keeps only the text of an error that its callback raises
            raise

    try:
        data = _signed(image, replace(key, sign=signature), record, ingredients, from_photograph=from_photograph)
    except c2pa.C2paError as error:
        if refusals:
            raise refusals[0]  # noqa: B904 - its own cause says more than c2pa's copy of its text
        rehearse(key, ingredients)
        raise _unavailable(error) from error
    return replace(image, data=data, sha256=hashlib.sha256(data).hexdigest())


def rehearse(key: SigningKey, ingredients: Sequence[Ingredient]) -> None:
    """Sign a blank picture with these ingredients, to find errors early.

    Raises InputImageError if no picture with these ingredients could be signed.
    Raises SigningUnavailableError if no picture could be signed at all.
    Neither the private key nor the time authority is used.
    """
    blank = encode(np.zeros((8, 8, 3), np.uint8), output=OutputFormat(), record={})
    offline = replace(key, sign=lambda _: bytes(64), tsa_url=None)
    for ingredient in ingredients:
        try:
            _signed(blank, offline, {}, [ingredient])
        except c2pa.C2paError as error:
            try:
                _signed(blank, offline, {}, ())
            except c2pa.C2paError as without:
                raise _unavailable(without) from without
            raise _unfit(ingredient, error) from error


def inspect(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Return width and height of an untrusted picture, after reading all that a worker will read of it.

    Raises InputImageError if its pixels, its record, its XMP or its C2PA manifest cannot be used.
    """
    height, width, _ = decode(data, max_pixels=max_pixels).shape
    read_marks(data)
    rehearse(_throwaway_key(), [Ingredient(role=_PARENT, data=data)])
    return width, height


@cache
def _throwaway_key() -> SigningKey:
    """Create a temporary key for rehearsals: they need certificates, and ``plan`` has none."""
    with TemporaryDirectory(prefix="sdpipeline-rehearsal-") as folder:
        return development_key(Path(folder))


def _signed(
    image: EncodedImage,
    key: SigningKey,
    record: Json,
    ingredients: Sequence[Ingredient],
    *,
    from_photograph: bool = False,
) -> bytes:
    signed = io.BytesIO()
    algorithm = c2pa.C2paSigningAlg[key.algorithm.upper()]
    with (
        c2pa.Signer.from_callback(key.sign, algorithm, key.certificates, key.tsa_url) as signer,
        _context() as context,
        c2pa.Builder(_manifest(record, ingredients, from_photograph=from_photograph), context=context) as builder,
    ):
        for ingredient in ingredients:
            _add(builder, ingredient)
        builder.sign(signer, image.content_type, io.BytesIO(image.data), signed)
    return signed.getvalue()


def _unavailable(error: c2pa.C2paError) -> SigningUnavailableError:
    # The error may contain the time authority's URL, with credentials before its host.
    why = re.sub(r"//\S*@", "//", str(error))
    return SigningUnavailableError(f"the picture cannot be signed: {why}")


def _unfit(ingredient: Ingredient, error: c2pa.C2paError) -> InputImageError:
    fix = "save it again without its metadata"
    return InputImageError(f"{ingredient.role} cannot be named as an ingredient: {error} ({fix})")


def verify(data: bytes, *, trust_anchors: str = "") -> VerifiedPicture:
    """Read and verify the marks of a png, jpeg or webp file; ``trust_anchors`` are root certificates in PEM.

    Raises InputImageError for any other file; a damaged one is *invalid*.
    """
    media_type = content_type(data)
    try:
        embedded, source_type = read_marks(data)
    except InputImageError as error:
        return VerifiedPicture(c2pa="invalid", digital_source_type=None, record=None, faults=(str(error),))
    invalid = partial(VerifiedPicture, c2pa="invalid", digital_source_type=source_type, record=embedded)
    try:
        with _context(trust_anchors) as context, c2pa.Reader(media_type, io.BytesIO(data), context=context) as reader:
            document = parse_object(reader.json(), largest=LARGEST_MANIFEST, deepest=DEEPEST_MANIFEST)
        if document["active_manifest"] not in document["manifests"]:
            return invalid(faults=("c2pa.unreadable: its manifest cannot be decoded",))
        return _verified(document, embedded, source_type)
    except c2pa.C2paError as error:
        if not isinstance(error, c2pa.C2paError.ManifestNotFound):
            return invalid(faults=(f"c2pa.unreadable: {error}",))
        return VerifiedPicture(
            c2pa="missing", digital_source_type=source_type, record=embedded, faults=("c2pa.missing",)
        )
    except UnreadableError as error:
        return invalid(faults=(f"c2pa.unreadable: its manifest {error}",))
    except InputImageError as error:  # a signed record that is too large or too deep
        return invalid(faults=(f"c2pa.unreadable: {error}",))
    except SHAPE_ERRORS as error:
        return invalid(faults=(f"c2pa.unreadable: its manifest has another structure than ours: {error!r}",))


def _context(trust_anchors: str = "") -> c2pa.Context:
    trust = {"trust": {"user_anchors": trust_anchors}} if trust_anchors else {}
    return c2pa.Context(c2pa.Settings.from_dict(_SETTINGS | trust))


def _manifest(record: Json, ingredients: Sequence[Ingredient], *, from_photograph: bool) -> Json:
    roles = [ingredient.role for ingredient in ingredients]
    edited, inputs = _PARENT in roles, [role for role in roles if role != _PARENT]
    made: Json = {
        "action": "c2pa.edited" if edited else "c2pa.created",
        "digitalSourceType": COMPOSITE if from_photograph else GENERATED,
        "softwareAgent": _AGENT,
    }
    if inputs:
        made["parameters"] = {"ingredientIds": inputs}
    opened = [{"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}}] if edited else []
    return {
        "claim_generator_info": [_AGENT],
        "assertions": [
            {"label": _ACTIONS, "data": {"actions": [*opened, made]}},
            {"label": _RECORD, "data": {"json": record_text(own_part(record))}},
        ],
    }


def _add(builder: c2pa.Builder, ingredient: Ingredient) -> None:
    relationship = "parentOf" if ingredient.role == _PARENT else "inputTo"
    described = {"title": ingredient.role, "label": ingredient.role, "relationship": relationship}
    try:
        builder.add_ingredient(described, content_type(ingredient.data), io.BytesIO(ingredient.data))
    except c2pa.C2paError as error:
        raise _unfit(ingredient, error) from error


def _verified(document: Json, embedded: Json | None, source_type: str | None) -> VerifiedPicture:
    manifests, active = document["manifests"], document["active_manifest"]
    signed, signature = _record(manifests[active]), manifests[active].get("signature_info", {})
    development = signature.get("issuer") == DEVELOPMENT
    state = document["validation_state"].lower()
    faults = [*_failures(document.get("validation_results", {}))]
    faults += ["xmp.missing"] if source_type is None else []
    faults += ["record.missing"] if signed is None else [] if signed == own_part(embedded or {}) else ["record.differs"]
    return VerifiedPicture(
        c2pa="valid" if development and state == "trusted" else state,
        digital_source_type=_source_type(manifests[active]) or source_type,
        record=signed or embedded,
        signer=signature.get("common_name"),
        signed_at=signature.get("time"),
        development_key=development,
        parents=tuple(_ancestors(manifests, active)),
        faults=tuple(faults),
    )


def _failures(results: Json) -> Iterator[str]:
    deltas = [delta["validationDeltas"] for delta in results.get("ingredientDeltas", [])]
    for status in (results.get("activeManifest", {}), *deltas):
        for failure in status.get("failure", []):
            # An unknown signer is not a fault: it only makes the difference between valid and trusted.
            if failure["code"] != "signingCredential.untrusted":
                yield failure["code"]


def _ancestors(manifests: Mapping[str, Json], active: str) -> Iterator[ParentPicture]:
    """Yield all ancestors; open each manifest only once, because an untrusted file may contain cycles."""
    generation, seen, depth = [active], {active}, 0
    while generation:
        depth += 1
        edges = [(child, ingredient) for child in generation for ingredient in manifests[child].get("ingredients", [])]
        generation = []
        for child, ingredient in edges:
            label = ingredient.get("active_manifest")
            manifest = manifests.get(label, {})
            yield ParentPicture(
                role=ingredient.get("title", ""),
                relationship=ingredient.get("relationship", ""),
                depth=depth,
                child=child,
                manifest=label,
                digital_source_type=_source_type(manifest),
                record=_record(manifest),
                faults=tuple(_failures(ingredient.get("validation_results", {}))),
            )
            if manifest and label not in seen:
                seen.add(label)
                generation.append(label)


def _record(manifest: Json) -> Json | None:
    # Stored as text, because c2pa returns a list of numbers as bytes.
    found = [data for label, data in _assertions(manifest) if label == _RECORD]
    return parsed_record(found[0].get("json")) if found else None


def _source_type(manifest: Json) -> str | None:
    found = [
        action["digitalSourceType"]
        for label, data in _assertions(manifest)
        if label.startswith("c2pa.actions") and isinstance(data.get("actions"), list)
        for action in data["actions"]
        if isinstance(action, dict) and isinstance(action.get("digitalSourceType"), str)
    ]
    return found[-1] if found else None


def _assertions(manifest: Json) -> Iterator[tuple[str, Json]]:
    """Yield labels and data of assertions whose data is an object: other programs' assertions may hold anything."""
    for each in manifest.get("assertions", []):
        if isinstance(each.get("data"), dict):
            yield each["label"], each["data"]
