"""The whole pipeline on PostgreSQL and S3 over HTTP with marked pictures, compared with the engine alone and with a
plain loop that saves to the same storage. Prints ratios, which on two cores depend on other load."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.certificates import signing_settings
from tests.integration.commands import document
from tests.integration.conftest import Bucket, rclone_url, s3_credentials, weak_bucket  # noqa: F401 -- fixtures

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

MIN_OF_ENGINE, MIN_AGAINST_PLAIN = 0.95, 3.0
DEFAULT = "--width 64 --height 64 --batch 16 --batches 16 --rounds 5"
ARGUMENTS = os.environ.get("SDP_TEST_BENCH_PIPELINE", DEFAULT).split()


def test_the_whole_line_keeps_up_with_the_engine(
    postgres_url: str,
    weak_bucket: Bucket,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = {
        "SDP_DATABASE_URL": postgres_url,
        "SDP_STORAGE_URL": f"s3://{weak_bucket.name}/bench",
        "SDP_S3__ENDPOINT_URL": weak_bucket.endpoint_url,
        "SDP_S3__ADDRESSING_STYLE": "path",
        **signing_settings(tmp_path),
    }
    load = os.getloadavg()[0]
    found = document("bench", "pipeline", *ARGUMENTS, "--home", tmp_path / "home", given=given)
    print(json.dumps(found, indent=1))
    print(f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}")
    print(f"{found['share_of_engine']:.3f} of the engine alone, {found['against_plain']:.2f} times the plain loop")
    assert found["share_of_engine"] >= MIN_OF_ENGINE
    assert found["against_plain"] >= MIN_AGAINST_PLAIN
