"""Storage of finished pictures: a picture without valid marks is never counted as stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline import provenance
from sdpipeline.domain import OutputFormat
from sdpipeline.errors import MarksLostError
from sdpipeline.storage import LocalStore
from sdpipeline.worker.picture_storage import put_marked
from tests.factories import signing_key
from tests.integration.engine_requests import noise

RECORD = {"seed": 1}


def test_a_picture_that_was_never_signed_is_refused(tmp_path: Path) -> None:
    unsigned = provenance.encode(noise(), output=OutputFormat(), record=RECORD)
    with pytest.raises(MarksLostError, match=r"has invalid marks: c2pa\.missing"):
        put_marked(LocalStore(tmp_path), "a.png", unsigned.data)


def test_a_signed_picture_is_stored(tmp_path: Path) -> None:
    encoded = provenance.encode(noise(), output=OutputFormat(), record=RECORD)
    signed = provenance.sign(encoded, key=signing_key(), record=RECORD)
    assert put_marked(LocalStore(tmp_path), "a.png", signed.data).sha256 == signed.sha256
