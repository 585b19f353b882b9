"""Encoding, the embedded record and mark, and decoding untrusted pictures."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sdpipeline.domain import OutputFormat
from sdpipeline.engine import Pixels
from sdpipeline.errors import InputImageError, RequestRefusedError
from sdpipeline.provenance import (
    COMPOSITE,
    GENERATED,
    decode,
    digital_source_type,
    encode,
    encoder,
    pixels_sha256,
    read_record,
)

RECORD = {"prompt": "a <red> cup & 猫\n\x00\ufffe", "seed": 2**62, "ran": {"dtype": "float32", "sigmas": [0.1, 14.6]}}
PNG, LOSSLESS_WEBP = OutputFormat(), OutputFormat(format="webp")
OUTPUTS = [
    PNG,
    LOSSLESS_WEBP,
    OutputFormat(format="webp", quality=80),
    OutputFormat(format="jpeg"),
    OutputFormat(format="jpeg", quality=70),
]
every_output = pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: f"{output.format}-{output.quality}")


@every_output
def test_a_file_decodes_to_the_pixels_it_names(output: OutputFormat) -> None:
    image = encode(noise(), output=output, record=RECORD)
    decoded = decode(image.data, max_pixels=10_000)
    assert (image.height, image.width) == decoded.shape[:2] == (40, 60)
    assert image.pixels_sha256 == pixels_sha256(decoded)
    assert image.sha256 == hashlib.sha256(image.data).hexdigest()


@pytest.mark.parametrize("output", [PNG, LOSSLESS_WEBP], ids=lambda output: output.format)
def test_a_lossless_file_has_the_very_pixels(output: OutputFormat) -> None:
    pixels = noise()
    image = encode(pixels, output=output, record=RECORD)
    assert np.array_equal(decode(image.data, max_pixels=10_000), pixels)


@every_output
def test_the_record_comes_back_whole(output: OutputFormat) -> None:
    assert read_record(encode(noise(), output=output, record=RECORD).data) == RECORD


@every_output
def test_a_picture_says_that_a_machine_made_it(output: OutputFormat) -> None:
    generated = encode(noise(), output=output, record=RECORD)
    composite = encode(noise(), output=output, record=RECORD, from_photograph=True)
    assert digital_source_type(generated.data) == GENERATED
    assert digital_source_type(composite.data) == COMPOSITE


def test_a_strangers_picture_has_neither_record_nor_mark() -> None:
    assert read_record(saved(noise(), "PNG")) is None
    assert digital_source_type(saved(noise(), "JPEG")) is None


@every_output
def test_the_same_picture_is_the_same_file(output: OutputFormat) -> None:
    first, second = (encode(noise(), output=output, record=RECORD) for _ in range(2))
    assert first == second


def test_the_extension_and_content_type_are_the_formats_own() -> None:
    images = [encode(noise(), output=output, record=RECORD) for output in OUTPUTS]
    assert {(image.extension, image.content_type) for image in images} == {
        ("png", "image/png"),
        ("jpg", "image/jpeg"),
        ("webp", "image/webp"),
    }


def test_quality_is_what_was_asked_for() -> None:
    assert encoder(OutputFormat(format="jpeg", quality=31))["parameters"]["quality"] == 31
    sizes = [len(encode(noise(), output=OutputFormat(format="jpeg", quality=q), record={}).data) for q in (20, 90)]
    assert sizes[0] < sizes[1] / 2


def test_a_record_too_long_for_jpeg_is_refused_and_fits_into_the_others() -> None:
    record = {"prompt": "x" * 70_000}
    with pytest.raises(RequestRefusedError, match=r"output\.format: a record of 70,\d+ bytes does not fit into a jpeg"):
        encode(noise(), output=OutputFormat(format="jpeg"), record=record)
    assert all(read_record(encode(noise(), output=o, record=record).data) == record for o in (PNG, LOSSLESS_WEBP))


def test_the_pixel_digest_is_of_shape_and_bytes() -> None:
    pixels = noise()
    assert pixels_sha256(pixels) == hashlib.sha256(b"40x60x3\n" + pixels.tobytes()).hexdigest()
    assert pixels_sha256(pixels) != pixels_sha256(pixels.reshape(60, 40, 3))
    turned = pixels.transpose(1, 0, 2)
    assert pixels_sha256(turned) == pixels_sha256(np.ascontiguousarray(turned))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_picture_is_refused(form: str, part: float) -> None:
    data = saved(noise(), form)
    with pytest.raises(InputImageError, match="not a whole png, jpeg or webp picture"):
        decode(data[: int(len(data) * part)], max_pixels=10_000)


@given(st.binary(max_size=64), st.integers(0, 2000), st.sampled_from(OUTPUTS))
def test_broken_bytes_decode_or_are_refused_and_nothing_else(junk: bytes, at: int, output: OutputFormat) -> None:
    data = encode(noise(), output=output, record=RECORD).data
    broken = data[:at] + junk + data[at + len(junk) :]
    for read in (lambda: decode(broken, max_pixels=10_000), lambda: read_record(broken)):
        with contextlib.suppress(InputImageError):
            read()


def test_a_picture_larger_than_allowed_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(InputImageError, match=r"5000 x 5000 is larger than the 10,000 pixels allowed"):
        decode(png_header(5000, 5000), max_pixels=10_000)
    with pytest.raises(InputImageError, match=r"60 x 40 is larger than the 2,399 pixels allowed"):
        decode(saved(noise(), "PNG"), max_pixels=2399)
    assert decode(saved(noise(), "PNG"), max_pixels=2400).shape == (40, 60, 3)


def test_a_picture_that_no_limit_could_allow_is_refused() -> None:
    with pytest.raises(InputImageError, match="decompression bomb"):
        decode(png_header(100_000, 100_000), max_pixels=10**12)


def test_a_picture_with_no_pixels_is_refused() -> None:
    with pytest.raises(InputImageError):
        decode(png_header(0, 0), max_pixels=10_000)


def test_a_compressed_text_that_unpacks_to_much_is_refused() -> None:
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000)))
    with pytest.raises(InputImageError, match="too large"):
        decode(with_chunk(saved(noise(), "PNG"), bomb), max_pixels=10_000)


def test_xmp_that_declares_entities_is_refused() -> None:
    xmp = b'<!DOCTYPE x [<!ENTITY a "b">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&a;</x:xmpmeta>'
    with pytest.raises(InputImageError, match="not a whole"):
        read_record(saved(noise(), "WEBP", xmp=xmp))


def test_other_files_are_refused() -> None:
    for form in ("GIF", "TIFF", "BMP"):
        with pytest.raises(InputImageError, match="not a whole png, jpeg or webp picture"):
            decode(saved(noise(), form), max_pixels=10_000)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused(form: str) -> None:
    frames = [Image.fromarray(noise(seed)) for seed in range(2)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    with pytest.raises(InputImageError, match="animation"):
        decode(file.getvalue(), max_pixels=10_000)


def test_a_telephones_jpeg_with_a_second_picture_is_its_first() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), grey, dtype=np.uint8)) for grey in (200, 10)]
    file = io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    assert abs(int(decode(file.getvalue(), max_pixels=10_000)[0, 0, 0]) - 200) <= 1


def test_a_photograph_taken_sideways_stands_upright() -> None:
    image = Image.fromarray(noise())
    exif = image.getexif()
    exif[0x0112] = 6  # rotate clockwise for display
    decoded = decode(saved(noise(), "PNG", exif=exif), max_pixels=10_000)
    assert np.array_equal(decoded, np.rot90(noise(), k=-1))


def test_transparent_pixels_are_laid_on_white() -> None:
    rgba = np.dstack([noise(), np.zeros((40, 60), dtype=np.uint8)])
    rgba[:, 30:, 3] = 255
    decoded = decode(saved(rgba, "PNG"), max_pixels=10_000)
    assert (decoded[:, :30] == 255).all()
    assert np.array_equal(decoded[:, 30:], noise()[:, 30:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_kind_of_png_becomes_rgb(mode: str) -> None:
    flat = Image.new("RGB", (8, 8), "white").convert(mode)
    file = io.BytesIO()
    flat.save(file, "PNG")
    assert (decode(file.getvalue(), max_pixels=64) == np.full((8, 8, 3), 255)).all()


def test_a_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.fromarray(np.zeros((8, 8), dtype=np.uint8), "P")
    image.putpalette([255, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    assert (decode(file.getvalue(), max_pixels=64) == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = decode(saved(grey, "PNG"), max_pixels=4)
    assert decoded[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_a_print_shops_jpeg_becomes_rgb() -> None:
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    file = io.BytesIO()
    white.save(file, "JPEG")
    assert (decode(file.getvalue(), max_pixels=64) >= 254).all()


def test_an_embedded_colour_profile_is_applied() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red_is_green = srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    red = np.full((8, 8, 3), (250, 5, 5), dtype=np.uint8)
    decoded = decode(saved(red, "PNG", icc_profile=red_is_green), max_pixels=64)
    assert np.abs(decoded[0, 0].astype(int) - (5, 250, 5)).max() <= 2


def test_a_broken_colour_profile_is_refused() -> None:
    with pytest.raises(InputImageError, match="colour profile is broken"):
        decode(saved(noise(), "PNG", icc_profile=b"no profile"), max_pixels=10_000)


def noise(seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(array: npt.NDArray[Any], form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks: Sequence[bytes] = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", b""), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, chunk: bytes) -> bytes:
    after_header = 8 + 25
    return png[:after_header] + chunk + png[after_header:]
