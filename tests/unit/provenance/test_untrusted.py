"""Malicious documents and pictures are refused quickly, each with a one-sentence error."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from sdpipeline.domain import OutputFormat
from sdpipeline.errors import InputImageError, RequestRefusedError
from sdpipeline.provenance import decode, encode, inspect, read_record, untrusted, verify
from sdpipeline.provenance.untrusted import UnreadableError, parse_json, parse_object
from tests.hostile import BOMBS, many_segments, png, progressive_jpeg, webp, with_record, with_xmp

every_bomb = pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)


@every_bomb
def test_a_bomb_is_refused_before_anything_is_planned_with_it(data: bytes) -> None:
    with pytest.raises(InputImageError) as refused:
        inspect(data, max_pixels=10_000)
    assert len(str(refused.value)) < 200


@every_bomb
def test_a_bomb_is_not_valid_and_verifying_it_ends(data: bytes) -> None:
    found = verify(data)
    assert (found.c2pa, found.ok, found.record) == ("invalid", False, None)
    assert len(found.faults) == 1


@pytest.mark.parametrize(
    "data",
    [
        png(),
        with_record(b"a note of another program's"),
        with_record(b"[1, 2]"),
        with_xmp(b"<a>" * 50 + b"</a>" * 50),
        with_xmp(b"<xmpmeta><RDF>text</RDF></xmpmeta>"),
        progressive_jpeg(10),
        many_segments(1_000),
        progressive_jpeg(10) + b"ftypmp42" + b"\xff\xda a film's own bytes" * 300,
        with_xmp(b"<a>" + b"<li>xmp.did:8E2A6B7C4F5D11E2</li>" * 60_000 + b"</a>"),
        webp(b"prVt\0\0\0\0" * 100),
    ],
    ids=["plain", "note", "list", "xmp", "odd-xmp", "progressive", "segments", "film", "photoshop", "webp"],
)
def test_an_unusual_picture_is_taken(data: bytes) -> None:
    assert inspect(data, max_pixels=10_000) == (64, 64)
    assert read_record(data) is None
    assert verify(data).c2pa == "missing"


def test_a_large_picture_in_many_chunks_is_taken() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)).save(file, "PNG")
    assert file.getvalue().count(b"IDAT") > 30
    assert decode(file.getvalue(), max_pixels=10**6).shape == (900, 900, 3)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "{", "1" * 5_000, b"\xff"]
)
def test_json_that_has_no_one_meaning_is_refused(text: str | bytes) -> None:
    with pytest.raises(UnreadableError):
        parse_json(text)


def test_json_is_bounded_by_size_and_depth() -> None:
    at_most = "[" * 64 + "]" * 64
    assert parse_json(at_most) == json.loads(at_most)
    for text in (f"[{at_most}]", "[" * 10**6, '{"a":' * 10**5, f'"{"a" * untrusted.LARGEST_RECORD}"'):
        with pytest.raises(UnreadableError, match=r"at most|levels deep"):
            parse_json(text)
    with pytest.raises(UnreadableError, match="is not a JSON object"):
        parse_object("[]")


def test_a_record_that_could_not_be_read_back_is_not_written() -> None:
    record = {"prompt": "a" * untrusted.LARGEST_RECORD}
    with pytest.raises(RequestRefusedError, match="too long to be read back"):
        encode(np.zeros((8, 8, 3), np.uint8), output=OutputFormat(), record=record)
