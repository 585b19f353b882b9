"""Fuzzing parsers of external data: any bytes are parsed, or refused with a message, and in time.

``SDP_TEST_FUZZ_EXAMPLES`` sets how many examples each parser gets (40).
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sdpipeline import audit, escaping, provenance
from sdpipeline.audit.offline import verify_export
from sdpipeline.audit.proof import verify_proof
from sdpipeline.campaigns import yaml_source
from sdpipeline.campaigns.tables import Table
from sdpipeline.campaigns.templates import TemplateRefusedError, compile_template
from sdpipeline.domain import Json, OutputFormat, to_document
from sdpipeline.errors import SdpError
from sdpipeline.maintenance import restore
from sdpipeline.provenance import signing
from sdpipeline.provenance.untrusted import UnreadableError, parse_json
from sdpipeline.reporting import reproduce
from sdpipeline.settings import sources as settings_sources
from sdpipeline.storage import LocalStore
from tests.factories import request, signing_key

pytestmark = pytest.mark.fuzz

EXAMPLES = int(os.environ.get("SDP_TEST_FUZZ_EXAMPLES", "40"))
REFUSALS = (SdpError, UnreadableError, TemplateRefusedError)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def taken_or_refused(parse: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Call the parser. Any exception other than our refusals fails the test."""
    try:
        parse(*given, **options)
    except REFUSALS as refused:
        escaping.terminal(str(refused)).encode()


@cache
def picture_seeds() -> tuple[bytes, ...]:
    """Pictures with all possible contents: marks, EXIF, a colour profile, scans, a second picture."""
    record = {"asked": to_document(request()), "ran": {"sigmas": [1.5]}}
    encoded = [
        provenance.encode(PIXELS, output=OutputFormat(format=form), record=record) for form in ("png", "jpeg", "webp")
    ]
    found = [each.data for each in encoded]
    found += [provenance.sign(each, key=signing_key(), record=record).data for each in encoded]
    exif = Image.Exif()
    exif[0x112], exif[0x10E], exif.get_ifd(0x8769)[0x9003] = 6, "a title", "2026:11:25 00:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photograph = Image.fromarray(PIXELS)
    for form in ("PNG", "JPEG", "WEBP"):
        found.append(_saved(photograph, form, exif=exif, icc_profile=profile))
    found.append(_saved(photograph, "JPEG", progressive=True))
    found.append(_saved(photograph, "MPO", save_all=True, append_images=[photograph]))
    found.append(_saved(photograph.convert("P"), "PNG", transparency=3))
    return tuple(found)


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@st.composite
def mutated(draw: st.DrawFn, seeds: Callable[[], tuple[bytes, ...]]) -> bytes:
    """One of the seeds with some bytes changed, deleted, inserted or doubled; PNG checksums are corrected again."""
    data = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, min(len(data) - 1, draw(st.sampled_from([60, 600, 10**6]))))))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["change", "cut", "insert", "double", "end"])):
            case "change":
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del data[place : place + length]
            case "insert":
                data[place:place] = draw(st.binary(max_size=12))
            case "double":
                data[place:place] = data[place : place + length]
            case _:
                del data[place:]
    return _with_checksums(bytes(data)) if data.startswith(b"\x89PNG") else bytes(data)


def _with_checksums(data: bytes) -> bytes:
    fixed, place = bytearray(data), 8
    while place + 12 <= len(fixed):
        end = place + 8 + int.from_bytes(fixed[place : place + 4], "big")
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(bytes(fixed[place + 4 : end])))
        place = end + 4
    return bytes(fixed)


@pytest.mark.filterwarnings("ignore")
@given(data=mutated(picture_seeds))
@fuzzed
def test_pictures(data: bytes) -> None:
    taken_or_refused(provenance.inspect, data, max_pixels=10**6)
    taken_or_refused(provenance.read_record, data)
    taken_or_refused(provenance.verify, data)


@given(data=st.binary(max_size=200))
@fuzzed
def test_bytes_that_are_no_picture(data: bytes) -> None:
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP"):
        taken_or_refused(provenance.inspect, start + data, max_pixels=10**6)
        taken_or_refused(provenance.verify, start + data)


@given(text=st.text() | documents.map(json.dumps) | st.text(alphabet='[]{}",:\\u0d8 19e.-'))
@fuzzed
def test_records(text: str) -> None:
    taken_or_refused(parse_json, text)
    taken_or_refused(parse_json, text.encode("utf-8", "surrogatepass"))


@given(record=documents, part=st.sampled_from(["asked", "ran", "inputs", "encoder", "ancestors", "identity", "width"]))
@example(record=True, part="asked")
@example(record="", part="width")
@example(record=64.0, part="width")
@fuzzed
def test_records_of_another_shape(record: Any, part: str) -> None:
    whole: Json = {
        "schema": "sdpipeline/record/2",
        "identity": "a",
        "fingerprint": "b",
        "made_at": "c",
        "inputs": {},
        "asked": to_document(request()),
        "ran": {"bucket": 1},
        "encoder": {},
    }
    reproduce.checked_record(whole, "a.png")
    changed = whole | {"asked": whole["asked"] | {part: record}} if part == "width" else whole | {part: record}
    taken_or_refused(reproduce.checked_record, changed, "a.png")
    taken_or_refused(reproduce.checked_record, record if isinstance(record, dict) else None, "a.png")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
@given(text=st.text() | st.text(alphabet='"\t,\n\r\0ab[]{}:1é') | st.lists(documents.map(json.dumps)).map("\n".join))
@fuzzed
def test_tables(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    table = Table(path=path, name=path.name)
    taken_or_refused(lambda: list(table.rows(lambda _: None)))


@cache
def parquet_seeds() -> tuple[bytes, ...]:
    """A table with every plain type, plain and compressed."""
    arrow = pytest.importorskip("pyarrow", reason="needs sdpipeline[parquet]")
    found = []
    for compression in ("none", "zstd"):
        file = io.BytesIO()
        table = arrow.table({"a": ["x", "y", None], "b": [1, 2, 3], "c": [[1], [2], None]})
        pytest.importorskip("pyarrow.parquet").write_table(table, file, compression=compression)
        found.append(file.getvalue())
    return tuple(found)


@given(data=mutated(parquet_seeds))
@settings(fuzzed, max_examples=max(4, EXAMPLES // 10))
def test_parquet(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(data)
    table = Table(path=path, name="t.parquet", columns={"a": "a", "b": "b"})
    taken_or_refused(lambda: list(table.rows(lambda _: None)))


@given(text=st.text() | st.text(alphabet="{}[]:,-&*!|>'\"# \n\tab<1~"))
@fuzzed
def test_campaign_files(text: str) -> None:
    taken_or_refused(yaml_source.parse, text, file="a.yaml")


@given(text=st.text(alphabet="{}%|-+~()'\"ab1 .replaceroundifelse") | st.text(), value=documents)
@fuzzed
def test_templates(text: str, value: Any) -> None:
    taken_or_refused(lambda: compile_template(text).render({"a": value, "b": "x" * 10_000}))


@given(text=st.text() | st.text(alphabet="[]{}=\"'.,#\nab1-:T"))
@fuzzed
def test_settings_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sdpipeline.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    taken_or_refused(settings_sources._in_toml, path)


@given(line=documents, more=documents, kind=st.sampled_from(["event", "seal", "end", "export"]))
@fuzzed
def test_audit_exports_and_proofs(line: Any, more: Any, kind: str) -> None:
    head = b'{"export":{"format":"sdpipeline/audit-export/1"}}\n'
    inner = json.dumps({kind: {"body": json.dumps(line), "signature": more}}).encode()
    for start in (b"", head):
        lines = [start, inner + b"\n", json.dumps(line).encode() + b"\n", b'{"seal":' + inner, b'{"end":' + inner]
        taken_or_refused(verify_export, [each for each in lines if each])
    proof = {"format": "sdpipeline/audit-proof/1", "seal": {"body": json.dumps(line), "signature": "a"}, "event": more}
    taken_or_refused(verify_proof, proof | {"index": line, "path": more})


@given(data=st.binary(max_size=80) | documents.map(lambda found: json.dumps(found).encode()))
@fuzzed
def test_sidecars(data: bytes, tmp_path: Path) -> None:
    store, key = LocalStore(tmp_path / str(zlib.crc32(data))), f"t/c/s/{'a' * 64}/{'b' * 64}.{'c' * 8}.json"
    store.put(key, data, content_type="application/json")
    assert isinstance(restore._examined(store, key), str)


@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
@fuzzed
def test_certificates_and_keys(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pem"
    for kind in ("CERTIFICATE", "PUBLIC KEY"):
        path.write_text(f"-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n")
        taken_or_refused(signing.trusted_roots, path)
        taken_or_refused(audit.public_key, str(path))
