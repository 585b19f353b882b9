"""S3 endpoints that lack a feature, proxies that answer in their place, and truncated responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.errors import ObjectConflictError, StorageUnavailableError
from sdpipeline.storage import ForeignObjects, S3Store
from tests.integration.commands import document
from tests.integration.conftest import Bucket
from tests.integration.fault_proxy import Fault, FaultProxy, Refuse, once

PICTURE = bytes(range(256)) * 100
TAGS = {"team": "night"}
HEADERS = {"checksums": "x-amz-checksum", "tags": "x-amz-tagging", "conditional put": "if-none-match"}


@contextmanager
def without(bucket: Bucket, refuse: Refuse, **options: Any) -> Iterator[tuple[S3Store, FaultProxy]]:
    """The bucket's store behind a proxy that refuses requests by their headers."""
    with FaultProxy(bucket.endpoint_url, refuse=refuse) as proxy:
        known: dict[str, Any] = {"endpoint_url": proxy.url, "total_max_attempts": 2, "read_timeout_s": 2, "tags": TAGS}
        yield bucket.store(**known | options), proxy


def lacking(refusal: str, *features: str) -> Refuse:
    """A server that does not support the headers of these features."""
    unknown = tuple(HEADERS[name] for name in features)
    return lambda _method, headers: refusal if any(name.startswith(unknown) for name in headers) else None


def always(refusal: str, *methods: str) -> Refuse:
    return lambda method, _headers: refusal if method in methods else None


def puts(proxy: FaultProxy) -> int:
    return sum(method == "PUT" for method, _ in proxy.seen)


@pytest.mark.parametrize("refusal", ["501 NotImplemented", "400 InvalidArgument x-amz-something"])
@pytest.mark.parametrize(
    "features", [(name,) for name in HEADERS] + [("checksums", "tags"), tuple(HEADERS)], ids=", ".join
)
def test_an_endpoint_without_a_feature_is_written_without_it_alone(
    moto_bucket: Bucket, refusal: str, features: tuple[str, ...]
) -> None:
    with without(moto_bucket, lacking(refusal, *features)) as (store, proxy):
        store.put("a", PICTURE, content_type="image/png")
        assert set(store.losses()) == set(features)
        before = puts(proxy)
        store.put("b", PICTURE, content_type="image/png")
        assert puts(proxy) == before + 1
        with pytest.raises(ObjectConflictError):
            store.put("b", b"other", content_type="image/png")
    tags = moto_bucket.client.get_object_tagging(Bucket=moto_bucket.name, Key="b")["TagSet"]
    assert bool(tags) == ("tags" not in features)


def test_parts_are_written_without_a_feature_too(moto_bucket: Bucket) -> None:
    data = bytes(6 * 2**20)
    refuse = lacking("501 NotImplemented", *HEADERS)
    with without(moto_bucket, refuse, part_size_bytes=5 * 2**20) as (store, _):
        store.put("export", data, content_type="application/jsonl")
    assert set(store.losses()) == set(HEADERS)
    assert moto_bucket.store().get("export") == data


@pytest.mark.parametrize("passing", [1, 3, 4, 5])
def test_a_501_that_passes_drops_no_header(moto_bucket: Bucket, passing: int) -> None:
    numbers = count()

    def refuse(method: str, headers: Mapping[str, str]) -> str | None:
        if method != "PUT":
            return None
        if next(numbers) < passing:
            return "501 NotImplemented"
        last.update(headers)
        return None

    last: dict[str, str] = {}
    with without(moto_bucket, refuse) as (store, _):
        store.put("a", PICTURE, content_type="image/png")
        store.put("b", PICTURE, content_type="image/png")
    assert store.losses() == {}
    assert {"x-amz-checksum-sha256", "x-amz-tagging", "if-none-match"} <= set(last)


def test_a_501_that_no_header_causes_is_an_outage(moto_bucket: Bucket) -> None:
    with without(moto_bucket, always("501 NotImplemented", "PUT")) as (store, _), outage("NotImplemented"):
        store.put("a", PICTURE, content_type="image/png")
    assert store.losses() == {}


def test_a_refused_feature_is_tried_again_later(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpipeline.storage.s3_features.TRY_AGAIN_S", 0.0)
    sent: list[str] = []

    def upgraded(_method: str, headers: Mapping[str, str]) -> str | None:
        sent.extend(name for name in headers if name == "if-none-match")
        return "501 NotImplemented" if len(sent) <= 5 and "if-none-match" in headers else None

    with without(moto_bucket, upgraded, tags={}) as (store, _):
        store.put("a", PICTURE, content_type="image/png")
        store.put("b", PICTURE, content_type="image/png")
    assert len(sent) == 6


def test_a_304_to_a_conditional_put_says_that_the_key_is_taken(moto_bucket: Bucket) -> None:
    def another_writer(method: str, headers: Mapping[str, str]) -> str | None:
        if method == "PUT":
            moto_bucket.client.put_object(Bucket=moto_bucket.name, Key="a", Body=other)
        return "304 NotModified" if "if-none-match" in headers else None

    for other in (b"other", PICTURE):
        with without(moto_bucket, another_writer) as (store, _):
            if other == PICTURE:
                assert store.put("a", PICTURE, content_type="image/png").size_bytes == len(PICTURE)
            else:
                with pytest.raises(ObjectConflictError):
                    store.put("a", PICTURE, content_type="image/png")
        moto_bucket.client.delete_object(Bucket=moto_bucket.name, Key="a")


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("403 AccessDenied is not authorized to perform: kms:GenerateDataKey", "SDP_S3__SSE_KMS_KEY_ID"),
        ("400 KMS.DisabledException key is disabled", "SDP_S3__SSE_KMS_KEY_ID"),
        ("507 XMinioStorageFull Storage backend has reached its minimum free drive threshold", "free space there"),
        ("403 QuotaExceeded quota", "raise the quota"),
        ("403 RequestTimeTooSkewed too large", "clock of this machine .*NTP"),
        ("400 TokenRefreshRequired refresh", "check the credentials"),
        ("301 PermanentRedirect elsewhere", "set SDP_S3__REGION"),
        ("502 <html><body><h1>502 Bad Gateway</h1>nginx</body></html>", "502"),
        ("403 <html><hr>Forbidden</html>", "403"),
        ("404 <html><hr>no backend</html>", "404"),
    ],
)
def test_a_refused_put_is_an_outage_that_names_its_reason(moto_bucket: Bucket, refusal: str, reason: str) -> None:
    with without(moto_bucket, always(refusal, "PUT")) as (store, _), outage(reason):
        store.put("a", PICTURE, content_type="image/png")
    assert store.losses() == {}


def test_a_page_of_a_proxy_is_neither_an_object_nor_a_listing(moto_bucket: Bucket) -> None:
    moto_bucket.store().put("a", PICTURE, content_type="image/png")
    for status in ("200", "404"):
        page = always(f"{status} <html><body>log in</body></html>", "GET", "HEAD")
        with without(moto_bucket, page) as (store, _):
            for ask in (store.get, store.head, store.delete, lambda key: list(store.list(key))):
                with pytest.raises(StorageUnavailableError):
                    ask("a")
            with pytest.raises(StorageUnavailableError):
                ForeignObjects(store._options).read(store.url("a"), most_bytes=10**6)
    assert moto_bucket.store().get("a") == PICTURE


def test_an_error_reply_that_is_cut_is_asked_again(moto_bucket: Bucket) -> None:
    def first(*_: str) -> Fault | None:
        return Fault.CUT_CHUNKS if len(proxy.seen) in {0, 2} else None

    with FaultProxy(moto_bucket.endpoint_url, first) as proxy:
        moto_bucket.store(endpoint_url=proxy.url).put("a", PICTURE, content_type="image/png")
    assert [fault for _, fault in proxy.seen].count(Fault.CUT_CHUNKS) == 2


@pytest.mark.parametrize("cut", [Fault.CUT_ERROR, Fault.CUT_CHUNKS])
def test_error_replies_that_are_always_cut_are_an_outage(moto_bucket: Bucket, cut: Fault) -> None:
    with FaultProxy(moto_bucket.endpoint_url, lambda _method, _path: cut) as proxy:
        store = moto_bucket.store(endpoint_url=proxy.url, total_max_attempts=2)
        for ask in (store.get, store.head, store.delete, store.versions, lambda key: list(store.list(key))):
            with pytest.raises(StorageUnavailableError):
                ask("a")
        with pytest.raises(StorageUnavailableError):
            store.put("a", PICTURE, content_type="image/png")
        with pytest.raises(StorageUnavailableError):
            ForeignObjects(store._options).read(store.url("a"), most_bytes=10**6)
    with FaultProxy(moto_bucket.endpoint_url, once("PUT", *[cut] * 9)) as proxy, outage("403|closed"):
        moto_bucket.store(endpoint_url=proxy.url, total_max_attempts=2).put("a", PICTURE, content_type="image/png")


def outage(reason: str) -> Any:
    return pytest.raises(StorageUnavailableError, match=reason)


def test_doctor_makes_the_put_of_a_worker_and_names_what_is_lost(moto_bucket: Bucket, tmp_path: Path) -> None:
    refuse = lacking("501 NotImplemented", *HEADERS)
    with FaultProxy(moto_bucket.endpoint_url, refuse=refuse) as proxy:
        checks = doctor(moto_bucket, proxy, tmp_path)
    for name in HEADERS:
        assert "the endpoint refuses" in checks[f"storage: {name}"]["detail"]
    assert "Contents" not in moto_bucket.client.list_objects_v2(Bucket=moto_bucket.name)


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("403 AccessDenied not authorized to perform: kms:GenerateDataKey", "SDP_S3__SSE_KMS_KEY_ID"),
        ("507 XMinioStorageFull full", "free space there"),
        ("400 ExpiredToken expired", "read again"),
    ],
)
def test_doctor_finds_a_put_that_no_worker_could_make(
    moto_bucket: Bucket, tmp_path: Path, refusal: str, reason: str
) -> None:
    with FaultProxy(moto_bucket.endpoint_url, refuse=always(refusal, "PUT")) as proxy:
        checks = doctor(moto_bucket, proxy, tmp_path, exit_code=3)
    assert not checks["storage"]["ok"]
    assert reason in checks["storage"]["detail"]


def test_a_probe_names_what_it_may_not_delete(moto_bucket: Bucket) -> None:
    with without(moto_bucket, always("403 AccessDenied", "DELETE"), tags={}) as (store, _):
        found = {each.name: each.detail for each in store.probe()}
    (left,) = moto_bucket.store().list()
    assert found["delete"] == f"AccessDenied: s3://{moto_bucket.name}/{left} stays: delete it by hand"


def test_a_probe_locks_an_object_as_a_seal_is_locked(locked_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpipeline.storage.s3.PROBE_LOCK_S", 1.0)
    store = locked_bucket.store(object_lock_mode="GOVERNANCE")
    found = {each.name: each.ok for each in store.probe()}
    assert found["object lock"]
    assert "Versions" not in locked_bucket.client.list_object_versions(Bucket=locked_bucket.name)


def test_a_lock_on_a_bucket_without_locks_fails_the_probe(moto_bucket: Bucket) -> None:
    with outage("ObjectLock"):
        moto_bucket.store(object_lock_mode="GOVERNANCE").probe()
    assert list(moto_bucket.store().list()) == []


def doctor(bucket: Bucket, proxy: FaultProxy, folder: Path, exit_code: int = 0) -> dict[str, Any]:
    """The checks of `doctor` by name, on this bucket behind the proxy."""
    found = document(
        "doctor",
        "--home",
        folder,
        exit_code=exit_code,
        SDP_STORAGE_URL=f"s3://{bucket.name}/prefix",
        SDP_S3__ENDPOINT_URL=proxy.url,
        SDP_S3__ADDRESSING_STYLE="path",
        SDP_S3__TAGS='{"team": "night"}',
    )
    return {check["name"]: check for check in found["checks"]}
