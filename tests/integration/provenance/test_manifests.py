"""Signed pictures as the C2PA reader sees them: intact, chained, changed and stripped."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import c2pa
import numpy as np
import pytest
import skimage.data
from PIL import Image

from sdpipeline.domain import OutputFormat
from sdpipeline.engine import Pixels
from sdpipeline.engine.quality import perceptual_distance, perceptual_hash
from sdpipeline.errors import InputImageError, SigningUnavailableError
from sdpipeline.provenance import (
    COMPOSITE,
    GENERATED,
    EncodedImage,
    Ingredient,
    decode,
    encode,
    pixels_sha256,
    read_record,
    sign,
    verify,
)
from sdpipeline.provenance.signing import SigningKey, development_key, development_root
from tests.factories import damaged

ASTRONAUT, *OTHERS = (getattr(skimage.data, name)() for name in ("astronaut", "coffee", "rocket", "chelsea"))
RECORD = {"prompt": "a <red> cup & 猫\n\x00", "seed": 2**62, "ran": {"dtype": "float32", "sigmas": [0.1, 14.0, 1e-7]}}
OUTPUTS = [OutputFormat(format="png"), OutputFormat(format="jpeg"), OutputFormat(format="webp")]
every_format = pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.format)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture
def key(keys: Path) -> SigningKey:
    return development_key(keys)


@every_format
def test_a_signed_picture_is_valid_and_marked(output: OutputFormat, key: SigningKey) -> None:
    found = verify(signed(key, output=output).data)
    assert (found.c2pa, found.digital_source_type, found.record) == ("valid", GENERATED, RECORD)
    assert found.ok
    assert found.parents == ()


@every_format
def test_signing_keeps_pixels_and_the_embedded_record(output: OutputFormat, key: SigningKey) -> None:
    image = signed(key, output=output)
    assert pixels_sha256(decode(image.data, max_pixels=10_000)) == image.pixels_sha256
    assert read_record(image.data) == RECORD


def test_the_signer_answers_for_the_actions_and_the_record_and_names_the_inputs(key: SigningKey) -> None:
    draft = signed(key).data
    final = signed(key, ingredients={"image": draft, "controlnets.0": draft})
    with c2pa.Reader("image/png", io.BytesIO(final.data)) as reader:
        document = json.loads(reader.detailed_json())
    manifest = document["manifests"][document["active_manifest"]]
    created = {assertion["url"].rpartition("/")[2] for assertion in manifest["claim"]["created_assertions"]}
    assert {"c2pa.actions.v2", "sdpipeline.record", "c2pa.ingredient.v3", "c2pa.ingredient.v3__1"} <= created
    actions = manifest["assertion_store"]["c2pa.actions.v2"]["actions"]
    inputs = [[each["url"].rpartition("/")[2] for each in action["parameters"]["ingredients"]] for action in actions]
    assert [action["action"] for action in actions] == ["c2pa.opened", "c2pa.edited"]
    assert inputs == [["c2pa.ingredient.v3"], ["c2pa.ingredient.v3__1"]]


def test_signing_adds_no_second_picture(key: SigningKey) -> None:
    image = encode(ASTRONAUT, output=OutputFormat(), record={})
    assert len(sign(image, key=key, record={}).data) - len(image.data) < 16_000


@every_format
def test_another_tool_reads_the_mark(output: OutputFormat, key: SigningKey, tmp_path: Path) -> None:
    exiftool = shutil.which("exiftool")
    if exiftool is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    image = signed(key, output=output)
    (tmp_path / f"it.{image.extension}").write_bytes(image.data)
    command = [exiftool, "-json", "-G1", "-validate", "-warning", str(tmp_path / f"it.{image.extension}"), "-XMP:all"]
    (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["ExifTool:Validate"] == "OK"
    assert found["XMP-iptcExt:DigitalSourceType"] == GENERATED
    assert json.loads(found["XMP-sdp:Record"]) == RECORD


def test_a_development_key_is_never_trusted(key: SigningKey, keys: Path) -> None:
    found = verify(signed(key).data, trust_anchors=development_root(keys))
    assert (found.c2pa, found.development_key, found.signer) == ("valid", True, "signer")


def test_a_photograph_inside_makes_a_composite(key: SigningKey) -> None:
    photograph = Ingredient(role="image", data=saved(ASTRONAUT))
    image = encode(noise(), output=OutputFormat(), record=RECORD, from_photograph=True)
    found = verify(sign(image, key=key, record=RECORD, ingredients=[photograph], from_photograph=True).data)
    assert (found.c2pa, found.digital_source_type) == ("valid", COMPOSITE)
    (parent,) = found.parents
    assert (parent.role, parent.relationship, parent.manifest, parent.record) == ("image", "parentOf", None, None)


@every_format
def test_a_chain_is_walked_from_its_last_picture_alone(output: OutputFormat, key: SigningKey) -> None:
    draft = signed(key, output=output, stage="draft")
    scene = signed(key, output=output, stage="scene", ingredients={"controlnets.0": draft.data})
    final = signed(key, output=output, stage="final", ingredients={"image": scene.data, "mask_image": draft.data})
    found = verify(final.data)
    assert found.ok, found.faults
    assert [
        (parent.depth, parent.role, parent.relationship, (parent.record or {}).get("stage"), parent.digital_source_type)
        for parent in found.parents
    ] == [
        (1, "image", "parentOf", "scene", GENERATED),
        (1, "mask_image", "inputTo", "draft", GENERATED),
        (2, "controlnets.0", "inputTo", "draft", GENERATED),
    ]


@every_format
def test_a_change_anywhere_is_found(output: OutputFormat, key: SigningKey) -> None:
    data = signed(key, output=output).data
    # Signatures leave zero padding for a time stamp. It is not covered by the signature, and no reader uses it.
    for at in [at for at in range(16, len(data) - 16, len(data) // 200) if data[at]]:
        found = verify(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not found.ok, at
        assert found.c2pa in ("invalid", "missing"), at


def test_a_changed_pixel_is_named(key: SigningKey) -> None:
    data = bytearray(signed(key, output=OutputFormat(format="jpeg")).data)
    data[-100] ^= 1
    found = verify(bytes(data))
    assert (found.c2pa, found.faults) == ("invalid", ("assertion.dataHash.mismatch",))


def test_a_changed_record_is_named(key: SigningKey) -> None:
    data = signed(key, output=OutputFormat(format="jpeg")).data
    found = verify(data.replace(b"float32", b"float16", 1))
    assert found.c2pa == "invalid"
    assert "record.differs" in found.faults


@every_format
def test_a_stripped_picture_is_missing_its_marks_and_found_by_its_pixels(output: OutputFormat, key: SigningKey) -> None:
    image = signed(key, output=output)
    stripped = saved(decode(image.data, max_pixels=10_000))
    found = verify(stripped)
    assert (found.c2pa, found.digital_source_type, found.record) == ("missing", None, None)
    assert not found.ok
    assert pixels_sha256(decode(stripped, max_pixels=10_000)) == image.pixels_sha256


def test_marks_given_back_without_a_signature_are_not_ok(key: SigningKey) -> None:
    forged = encode(decode(signed(key).data, max_pixels=10_000), output=OutputFormat(), record=RECORD)
    found = verify(forged.data)
    assert (found.c2pa, found.record, found.ok) == ("missing", RECORD, False)


def test_a_signed_picture_without_our_marks_is_not_ok(key: SigningKey) -> None:
    bare = replace(signed(key), data=saved(noise()))
    found = verify(sign(bare, key=key, record=RECORD).data)
    assert (found.c2pa, found.ok) == ("valid", False)
    assert found.faults == ("xmp.missing", "record.differs")


def test_swapped_pictures_keep_their_own_records(key: SigningKey) -> None:
    one, other = (signed(key, stage=stage) for stage in ("draft", "final"))
    assert [(verify(image.data).record or {})["stage"] for image in (other, one)] == ["final", "draft"]


def test_a_parent_that_was_altered_before_its_use_is_named(key: SigningKey) -> None:
    parent = bytearray(signed(key, output=OutputFormat(format="jpeg")).data)
    parent[-100] ^= 1
    found = verify(signed(key, ingredients={"image": bytes(parent)}).data)
    assert found.ok
    assert found.parents[0].faults == ("assertion.dataHash.mismatch",)


def test_a_key_that_does_not_answer_is_said_so(key: SigningKey) -> None:
    def sign_not(_data: bytes) -> bytes:
        raise SigningUnavailableError("KMS key 1: throttled")

    with pytest.raises(SigningUnavailableError, match="KMS key 1: throttled"):
        signed(replace(key, sign=sign_not))


def test_a_key_whose_certificate_is_refused_is_unavailable(key: SigningKey) -> None:
    with pytest.raises(SigningUnavailableError, match="the picture cannot be signed"):
        signed(replace(key, certificates="no certificate"))


@pytest.mark.parametrize("cut", [False, True], ids=["undecodable", "cut"])
def test_an_ingredient_with_damaged_marks_is_the_inputs_fault_and_not_the_keys(key: SigningKey, *, cut: bool) -> None:
    broken = damaged(signed(key).data, cut=cut)
    with pytest.raises(InputImageError, match="image cannot be named as an ingredient"):
        signed(key, ingredients={"controlnets.0": saved(noise()), "image": broken})
    found = verify(broken)
    assert (found.c2pa, found.ok) == ("invalid", False)


def test_something_that_is_no_picture_is_refused() -> None:
    with pytest.raises(InputImageError):
        verify(b"no picture")


def test_a_picture_looks_like_itself_after_resizing_and_encoding() -> None:
    pictures = [ASTRONAUT, *OTHERS]
    for picture in pictures:
        smaller = Image.fromarray(picture).resize((picture.shape[1] * 3 // 5, picture.shape[0] * 3 // 5))
        copy = decode(saved(np.asarray(smaller), "JPEG", quality=60), max_pixels=10**6)
        distances = [perceptual_distance(perceptual_hash(copy), perceptual_hash(other)) for other in pictures]
        assert min(distances) == perceptual_distance(perceptual_hash(copy), perceptual_hash(picture)) <= 6
        assert sorted(distances)[1] >= 16


def signed(
    key: SigningKey,
    *,
    output: OutputFormat = OutputFormat(),  # noqa: B008 - frozen
    stage: str | None = None,
    ingredients: dict[str, bytes] | None = None,
) -> EncodedImage:
    record = RECORD | ({"stage": stage} if stage else {})
    image = encode(noise(), output=output, record=record)
    inputs = [Ingredient(role=role, data=data) for role, data in (ingredients or {}).items()]
    return sign(image, key=key, record=record, ingredients=inputs)


def noise() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(pixels: Pixels, form: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()
