"""Reproduction of a picture from its record, ancestors first, and a comparison with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdpipeline import provenance
from sdpipeline.domain import GenerationRequest, Json, request_from_document
from sdpipeline.engine import Batch, Engine, GenerationFailure, Pixels, PreparedRequest
from sdpipeline.errors import BadInputError, InputImageError, Mistake
from sdpipeline.provenance import LARGEST_PICTURE
from sdpipeline.provenance.record import RECORD_SCHEMAS, Encoder
from sdpipeline.provenance.untrusted import SHAPE_ERRORS

MAX_STEPS = 10_000
LARGEST_BUCKET = 1024
"""Limits on what an untrusted record may request from this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """Reproduced picture. ``max_abs_diff`` is in 0-255, or None if the original's pixels are not available."""

    data: bytes
    bit_equal: bool
    max_abs_diff: int | None
    differences: list[Json]

    def document(self) -> Json:
        """Return the document that ``reproduce --json`` prints."""
        return {"bit_equal": self.bit_equal, "max_abs_diff": self.max_abs_diff, "differences": self.differences}


SETTINGS = {
    "profile.compile": "SDP_ENGINE__COMPILE",
    "profile.channels_last": "SDP_ENGINE__CHANNELS_LAST",
    "profile.attention": "SDP_ENGINE__ATTENTION",
    "profile.quantize": "SDP_ENGINE__QUANTIZE",
}
"""Settings that cause these differences; all other differences come from the machine itself."""

FindInput = Callable[[Json], bytes]
"""Return the bytes of an outside input from its description in the record: ``sha256``, and ``url`` if it has one.
Raises InputImageError."""


def reproduce(
    record: Json, engine: Engine, find_input: FindInput, *, original: Pixels | None, pixels_sha256: str | None
) -> Reproduction:
    """Make the picture of ``record`` again, in its recorded bucket, and compare; raises BadInputError or SdpError.

    The original is given as decoded pixels or, if only the record is left, as their digest.
    """
    data, ran = _made_again(record, engine, find_input, {})
    pixels = provenance.decode(data, max_pixels=LARGEST_PICTURE)
    if original is None:
        equal = provenance.pixels_sha256(pixels) == pixels_sha256
        apart = 0 if equal else None
    else:
        apart = int(np.abs(original.astype(np.int16) - pixels).max()) if original.shape == pixels.shape else 255
        equal = apart == 0
    return Reproduction(data=data, bit_equal=equal, max_abs_diff=apart, differences=_differences(record, ran))


def checked_record(record: Json | None, name: str) -> Json:
    """Return the record if this release can read it; else raise BadInputError."""
    if record is None:
        raise BadInputError(
            Mistake(file=name, message="has no record of this program", fix="give a picture made by this program")
        )
    if (schema := record.get("schema")) not in RECORD_SCHEMAS:
        raise BadInputError(Mistake(file=name, message=f"its record has the unknown schema {str(schema)[:80]!r}"))
    if isinstance(asked := record.get("asked"), dict) and "prompt" not in asked:
        fix = "give its job's number: the sidecar in storage has it"
        raise BadInputError(Mistake(file=name, message="its record omits the prompt", fix=fix))
    try:
        _request(record)
    except InputImageError as error:
        raise BadInputError(
            Mistake(file=name, message=str(error), fix="give a picture made by this program")
        ) from error
    return record


def _request(record: Json) -> GenerationRequest:
    """Return the request of an untrusted record; raises InputImageError for a record that was not written here."""
    try:
        request = request_from_document(record["asked"])
        shaped = all(
            isinstance(part, dict)
            for part in (record["ran"], record["encoder"], record.get("ancestors", {}), *record["inputs"].values())
        )
        named = all(isinstance(record[name], str) for name in ("identity", "fingerprint", "made_at"))
        figures = (request.width, request.height, request.num_inference_steps, record["ran"]["bucket"])
    except SHAPE_ERRORS as error:
        raise InputImageError(f"the record was not written by this program: {error!r}"[:200]) from error
    if not (shaped and named and all(type(figure) is int for figure in figures)):
        raise InputImageError("the record was not written by this program")
    width, height, steps, bucket = figures
    if not (0 < width * height <= LARGEST_PICTURE and steps <= MAX_STEPS and 0 < bucket <= LARGEST_BUCKET):
        raise InputImageError("the record's size, steps or batch exceed what this program makes")
    return request


def _made_again(
    record: Json, engine: Engine, find_input: FindInput, made: dict[str, bytes | None]
) -> tuple[bytes, Json]:
    """Return the file and what ran; encode as recorded, because children consume the pixels of the final file.

    ``made`` maps the digest of an ancestor to its bytes, so that each is made once; None marks one in progress.
    """
    request = _request(record)
    ancestors = record.get("ancestors", {})
    images = {role: _image(about, ancestors, engine, find_input, made) for role, about in record["inputs"].items()}
    ran = record["ran"]
    prepared = PreparedRequest(request=request, images=images, calls=ran.get("calls", ()), recorded=ran)
    (result,) = engine.generate(Batch(requests=(prepared,), bucket=int(ran["bucket"])))
    if isinstance(result, GenerationFailure):
        raise result.error
    own = _own_record(record, request, result.ran)
    shown = provenance.disclosed(own)
    return provenance.encode(result.pixels, output=request.output, record=shown).data, result.ran


def _image(
    about: Json, ancestors: Json, engine: Engine, find_input: FindInput, made: dict[str, bytes | None]
) -> Pixels:
    if "stage" not in about:
        return provenance.decode(find_input(about), max_pixels=LARGEST_PICTURE)
    sha256 = str(about.get("sha256", about.get("key")))
    record = about.get("record") or ancestors.get(sha256)
    if not isinstance(record, dict):
        raise InputImageError(f"the record of the picture of stage {about['stage']!r} is missing in this record")
    if sha256 not in made:
        made[sha256] = None
        made[sha256], _ = _made_again({"ancestors": ancestors} | record, engine, find_input, made)
    data = made[sha256]
    if data is None:
        raise InputImageError(f"the picture of stage {about['stage']!r} would be made from itself")
    return provenance.decode(data, max_pixels=LARGEST_PICTURE)


def _own_record(record: Json, request: GenerationRequest, ran: Json) -> Json:
    """Return the record of the new picture, which is marked as a reproduction."""
    about = {"identity": record["identity"], "fingerprint": record["fingerprint"], "made_at": record["made_at"]}
    return record | {"reproduction_of": about, "ran": ran, "encoder": provenance.encoder(request.output)}


def _differences(record: Json, ran: Json) -> list[Json]:
    """List differences from the original run: engine, device, dtype, scheduler, fallbacks, libraries, encoder."""
    then, now = _compared(record["ran"], record["encoder"]), _compared(ran, _encoder_of(record))
    names = sorted({*then, *now})
    return [
        {"what": name, "then": then.get(name), "now": now.get(name)} | _setting(name, then.get(name))
        for name in names
        if then.get(name) != now.get(name)
    ]


def _setting(name: str, then: Json | str | None) -> Json:
    """Return the setting that restores the recorded value."""
    if name not in SETTINGS:
        return {}
    value = str(then).lower() if then else None
    return {"setting": f"{SETTINGS[name]}={value}" if value else f"no {SETTINGS[name]}"}


def _encoder_of(record: Json) -> Encoder:
    return provenance.encoder(request_from_document(record["asked"]).output)


def _compared(ran: Json, encoder: Encoder) -> Json:
    names = ("engine", "pipeline", "device", "dtype", "bucket", "calls", "scheduler", "fallbacks")
    profile = {f"profile.{name}": value for name, value in ran.get("profile", {}).items()}
    libraries = {f"libraries.{name}": version for name, version in ran.get("libraries", {}).items()}
    return {name: ran[name] for name in names if name in ran} | profile | libraries | {"encoder": encoder}
