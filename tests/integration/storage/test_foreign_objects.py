"""Objects in foreign buckets: read at the version that was found first, over real HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline.errors import ObjectConflictError, ObjectMissingError, StorageUnavailableError
from sdpipeline.storage import ForeignObjects, S3Options
from tests.integration.conftest import Bucket, free_port
from tests.integration.fault_proxy import Choose, Fault, FaultProxy, once

DATA = bytes(range(256)) * 2000


@pytest.fixture(params=["moto_bucket", "weak_bucket"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """A bucket without versions: on a good server and on a weak one."""
    found: Bucket = request.getfixturevalue(request.param)
    return found


def reader(endpoint_url: str, attempts: int = 2) -> ForeignObjects:
    options = S3Options(
        endpoint_url=endpoint_url,
        addressing_style="path",
        total_max_attempts=attempts,
        read_timeout_s=2,
        connect_timeout_s=2,
    )
    return ForeignObjects(options)


def put(bucket: Bucket, key: str, data: bytes = DATA) -> str:
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=data)
    return f"s3://{bucket.name}/{key}"


def test_an_object_without_versions_is_pinned_by_its_etag(bucket: Bucket) -> None:
    url = put(bucket, "in/a b%20+ü.png")
    objects = reader(bucket.endpoint_url)
    found = objects.read(url, most_bytes=10**6)
    assert (found.data, found.version[:5]) == (DATA, "etag:")
    assert objects.read(url, most_bytes=10**6, version=found.version) == found


def test_another_object_under_the_name_is_a_conflict(moto_bucket: Bucket) -> None:
    objects, url = reader(moto_bucket.endpoint_url), put(moto_bucket, "a.png")
    found = objects.read(url, most_bytes=10**6)
    put(moto_bucket, "a.png", b"other")
    with pytest.raises(ObjectConflictError, match=r"a\.png has changed since it was submitted"):
        objects.read(url, most_bytes=10**6, version=found.version)


def test_a_version_is_read_although_newer_ones_hide_it(locked_bucket: Bucket) -> None:
    objects, url = reader(locked_bucket.endpoint_url), put(locked_bucket, "a.png")
    found = objects.read(url, most_bytes=10**6)
    assert found.version.startswith("version:")
    put(locked_bucket, "a.png", b"other")
    locked_bucket.client.delete_object(Bucket=locked_bucket.name, Key="a.png")
    assert objects.read(url, most_bytes=10**6, version=found.version) == found


def test_what_is_not_there_is_missing_and_no_outage(bucket: Bucket) -> None:
    objects, url = reader(bucket.endpoint_url), put(bucket, "a.png")
    found = objects.read(url, most_bytes=10**6)
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    for gone, version in ((url, None), (url, found.version), ("s3://no-such-bucket-here/a.png", None)):
        with pytest.raises(ObjectMissingError):
            objects.read(gone, most_bytes=10**6, version=version)


def test_a_version_that_was_deleted_or_never_was_is_missing(locked_bucket: Bucket) -> None:
    objects, url = reader(locked_bucket.endpoint_url), put(locked_bucket, "a.png")
    version = objects.read(url, most_bytes=10**6).version
    locked_bucket.client.delete_object(
        Bucket=locked_bucket.name, Key="a.png", VersionId=version.removeprefix("version:")
    )
    for pin in (version, "version:nonsense"):
        with pytest.raises(ObjectMissingError):
            objects.read(url, most_bytes=10**6, version=pin)


def test_no_more_is_read_than_was_asked_for(bucket: Bucket) -> None:
    url = put(bucket, "a.png")
    assert len(reader(bucket.endpoint_url).read(url, most_bytes=1000).data) == 1001


@pytest.mark.parametrize("fault", [Fault.CUT_BODY, Fault.SHORT_BODY, Fault.RESET, Fault.INTERNAL_ERROR])
def test_a_fault_on_the_way_is_tried_again_and_then_an_outage(
    fault: Fault, moto_bucket: Bucket, tmp_path: Path
) -> None:
    url = put(moto_bucket, "a.png")

    def through(choose: Choose) -> FaultProxy:
        return FaultProxy(moto_bucket.endpoint_url, choose)

    with through(once("GET", fault)) as proxy:
        assert reader(proxy.url).read(url, most_bytes=10**6).data == DATA
    with through(once("GET", fault)) as proxy:
        reader(proxy.url).fetch(url, tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == DATA
    with through(once("GET", *[fault] * 4)) as proxy, pytest.raises(StorageUnavailableError):
        reader(proxy.url).read(url, most_bytes=10**6)


def test_an_endpoint_that_is_not_there_is_an_outage(s3_credentials: None) -> None:
    with pytest.raises(StorageUnavailableError, match="SDP_S3__ENDPOINT_URL"):
        reader(f"http://127.0.0.1:{free_port()}").read("s3://bucket/a.png", most_bytes=1)
