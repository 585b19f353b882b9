"""The S3 store: headers of a put, features of endpoints, and faults of the connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sdpipeline.errors import ObjectConflictError, SettingsError, StorageUnavailableError
from sdpipeline.storage import S3Options, S3Store, open_store
from tests.integration.conftest import Bucket, free_port
from tests.integration.fault_proxy import Choose, Fault, FaultProxy, once

PICTURE = bytes(range(256)) * 100
KMS_KEY = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"


def test_a_bucket_is_opened_by_its_address(moto_bucket: Bucket) -> None:
    options = S3Options(endpoint_url=moto_bucket.endpoint_url)
    store = open_store(f"s3://{moto_bucket.name}/team/pictures/", options)
    store.put("a.png", PICTURE, content_type="image/png")
    assert store.url("a.png") == f"s3://{moto_bucket.name}/team/pictures/a.png"
    found = moto_bucket.client.get_object(Bucket=moto_bucket.name, Key="team/pictures/a.png")
    assert (found["Body"].read(), found["ContentType"]) == (PICTURE, "image/png")


def test_encryption_tags_and_checksum_are_part_of_the_put(moto_bucket: Bucket) -> None:
    store = moto_bucket.store(sse_kms_key_id=KMS_KEY, tags={"cost centre": "a=b+c"})
    store.put("a", PICTURE, content_type="image/png")
    found = moto_bucket.client.head_object(Bucket=moto_bucket.name, Key="a", ChecksumMode="ENABLED")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", KMS_KEY)
    assert "ChecksumSHA256" in found
    tags = moto_bucket.client.get_object_tagging(Bucket=moto_bucket.name, Key="a")
    assert tags["TagSet"] == [{"Key": "cost centre", "Value": "a=b+c"}]


def test_what_is_retained_is_locked_and_nothing_else_is(locked_bucket: Bucket) -> None:
    store = locked_bucket.store(object_lock_mode="COMPLIANCE", object_lock_days=10)
    seal = store.put("seal", b"seal", content_type="application/json", retained=True)
    picture = store.put("picture", PICTURE, content_type="image/png")
    assert picture.retained_until is None
    assert seal.retained_until is not None
    assert abs(seal.retained_until - datetime.now(UTC) - timedelta(days=10)) < timedelta(minutes=5)
    with pytest.raises(locked_bucket.client.exceptions.ClientError, match="AccessDenied"):
        locked_bucket.client.delete_object(Bucket=locked_bucket.name, Key="seal", VersionId=str(seal.version_id))


def test_a_replaced_and_deleted_object_is_still_read_by_its_version(locked_bucket: Bucket) -> None:
    store = locked_bucket.store()
    first = store.put("seal", b"seal", content_type="application/json")
    locked_bucket.client.put_object(Bucket=locked_bucket.name, Key="seal", Body=b"forged")
    locked_bucket.client.delete_object(Bucket=locked_bucket.name, Key="seal")
    assert store.get("seal", version_id=first.version_id) == b"seal"
    assert sorted(version.is_delete_marker for version in store.versions("seal")) == [False, False, True]


def test_a_large_object_goes_in_parts(moto_bucket: Bucket, weak_bucket: Bucket) -> None:
    data = os.urandom(11 * 2**20)
    for bucket in (moto_bucket, weak_bucket):
        store = bucket.store(part_size_bytes=5 * 2**20)
        stored = store.put("export", data, content_type="application/jsonl")
        assert store.get("export") == data
        assert store.put("export", data, content_type="application/jsonl") == stored
        with pytest.raises(ObjectConflictError):
            store.put("export", data[:-1] + b"x", content_type="application/jsonl")
    assert moto_bucket.client.head_object(Bucket=moto_bucket.name, Key="export")["ETag"].endswith('-3"')


def test_an_upload_in_parts_that_fails_is_not_left_open(moto_bucket: Bucket) -> None:
    with behind(moto_bucket, once("PUT", *[Fault.INTERNAL_ERROR] * 2)) as (store, _), unavailable("InternalError"):
        store.put("export", bytes(11 * 2**20), content_type="application/jsonl")
    assert "Uploads" not in moto_bucket.client.list_multipart_uploads(Bucket=moto_bucket.name)


def test_an_object_of_a_stranger_is_hashed(moto_bucket: Bucket) -> None:
    store = moto_bucket.store()
    stored = store.put("ours", PICTURE, content_type="image/png")
    moto_bucket.client.put_object(Bucket=moto_bucket.name, Key="theirs", Body=PICTURE)
    theirs = store.head("theirs")
    assert theirs is not None
    assert theirs.sha256 == stored.sha256


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.RESET, Fault.CONFLICT])
def test_a_put_that_fails_in_passing_succeeds(moto_bucket: Bucket, fault: Fault) -> None:
    with behind(moto_bucket, once("PUT", fault)) as (store, proxy):
        store.put("a", PICTURE, content_type="image/png")
    assert [seen for method, seen in proxy.seen if method == "PUT"] == [fault, None]
    assert moto_bucket.store().get("a") == PICTURE


def test_a_slow_endpoint_is_waited_for(moto_bucket: Bucket) -> None:
    with behind(moto_bucket, lambda _method, _path: Fault.SLOW) as (store, proxy):
        store.put("a", PICTURE, content_type="image/png")
    assert [method for method, _ in proxy.seen] == ["GET", "PUT", "GET"]


def test_permissions_that_are_lost_are_no_missing_object(moto_bucket: Bucket) -> None:
    moto_bucket.store().put("a", PICTURE, content_type="image/png")
    with behind(moto_bucket, lambda _method, _path: Fault.ACCESS_DENIED) as (store, proxy):
        for ask in (store.get, store.head, lambda key: list(store.list(key)), lambda key: store.move(key, "b")):
            with unavailable("check the credentials"):
                ask("a")
    assert len(proxy.seen) == 4


def test_a_move_whose_last_reply_is_lost_has_happened(moto_bucket: Bucket) -> None:
    moto_bucket.store().put("a", PICTURE, content_type="image/png")
    with behind(moto_bucket, once("DELETE", Fault.LOST_REPLY)) as (store, _):
        store.move("a", "b")
    assert list(moto_bucket.store().list()) == ["b"]


def test_a_put_whose_reply_is_lost_has_happened_once(moto_bucket: Bucket) -> None:
    with behind(moto_bucket, once("PUT", Fault.LOST_REPLY)) as (store, _):
        stored = store.put("a", PICTURE, content_type="image/png")
    assert moto_bucket.store().head("a") == stored
    assert moto_bucket.store().get("a") == PICTURE


@pytest.mark.parametrize("kind", ["moto", "weak"])
def test_an_upload_in_parts_whose_last_reply_is_lost_has_happened(request: pytest.FixtureRequest, kind: str) -> None:
    bucket, data, lost = request.getfixturevalue(f"{kind}_bucket"), os.urandom(11 * 2**20), [Fault.LOST_REPLY]

    def completion(method: str, path: str) -> Fault | None:
        return lost.pop() if lost and method == "POST" and "uploadId=" in path else None

    with behind(bucket, completion) as (store, _):
        store.put("a", data, content_type="application/jsonl")
    assert not lost
    assert bucket.store().get("a") == data


def test_a_reply_that_is_lost_does_not_hide_a_conflict(moto_bucket: Bucket) -> None:
    def another_writer(method: str, _path: str) -> Fault | None:
        if method == "PUT":
            moto_bucket.client.put_object(Bucket=moto_bucket.name, Key="a", Body=b"theirs")
        return None

    with behind(moto_bucket, another_writer) as (store, _), pytest.raises(ObjectConflictError):
        store.put("a", PICTURE, content_type="image/png")
    assert moto_bucket.store().get("a") == b"theirs"


def test_a_body_that_is_cut_is_read_again(moto_bucket: Bucket) -> None:
    moto_bucket.store().put("a", PICTURE, content_type="image/png")
    with behind(moto_bucket, once("GET", Fault.CUT_BODY)) as (store, proxy):
        assert store.get("a") == PICTURE
    assert [seen for _, seen in proxy.seen] == [Fault.CUT_BODY, None]


def test_a_body_that_is_always_cut_is_unavailable(moto_bucket: Bucket) -> None:
    moto_bucket.store().put("a", PICTURE, content_type="image/png")
    with (
        behind(moto_bucket, lambda _method, _path: Fault.CUT_BODY) as (store, proxy),
        unavailable("cut in every attempt"),
    ):
        store.get("a")
    assert len(proxy.seen) == 2


def test_an_endpoint_that_never_replies_is_unavailable(moto_bucket: Bucket) -> None:
    with behind(moto_bucket, lambda _method, _path: Fault.STALL) as (store, proxy), unavailable("Read timeout"):
        store.get("a")
    assert len(proxy.seen) == 2


def test_attempts_are_counted_in_total(moto_bucket: Bucket) -> None:
    with behind(moto_bucket, lambda _method, _path: Fault.SLOW_DOWN) as (store, proxy), unavailable("SlowDown"):
        store.get("a")
    assert len(proxy.seen) == 2


def test_a_put_that_the_endpoint_garbles_is_not_done(moto_bucket: Bucket) -> None:
    def garble(method: str, _path: str) -> Fault | None:
        if len(proxy.seen) == 2 and method == "GET":  # the check before the put, the put, and the read-back
            moto_bucket.client.put_object(Bucket=moto_bucket.name, Key="a", Body=b"garbled")
        return None

    with behind(moto_bucket, garble) as (store, proxy), unavailable("returned different bytes"):
        store.put("a", PICTURE, content_type="image/png")


def test_a_forked_process_makes_a_client_of_its_own(moto_bucket: Bucket) -> None:
    store = moto_bucket.store()
    store.put("parent", PICTURE, content_type="image/png")
    clients = len(store._clients)
    if (child := os.fork()) == 0:
        store.put("child", PICTURE, content_type="image/png")
        os._exit(len(store._clients))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == clients + 1
    assert store.get("child") == PICTURE


def test_a_probe_says_what_the_endpoint_can_do(locked_bucket: Bucket, weak_bucket: Bucket) -> None:
    strong = {found.name for found in locked_bucket.store(sse_kms_key_id=KMS_KEY).probe() if found.ok}
    weak = {found.name for found in weak_bucket.store(sse_kms_key_id=KMS_KEY).probe() if found.ok}
    # Both test servers differ from AWS: the strong one accepts any checksum, the weak one pretends to encrypt.
    assert strong == {"conditional put", "versions", "object lock", "encryption"}
    assert weak == {"checksums", "encryption"}


def test_what_an_endpoint_cannot_do_is_said_with_its_meaning(moto_bucket: Bucket, weak_bucket: Bucket) -> None:
    missing = {found.name: found.detail for found in moto_bucket.store().probe() if not found.ok}
    assert missing["versions"] == "not enabled: a replaced seal is detected only by its digest"
    assert missing["object lock"].startswith("ObjectLockConfigurationNotFoundError: users with write access")
    missing = {found.name: found.detail for found in weak_bucket.store().probe() if not found.ok}
    assert missing["conditional put"].startswith("the endpoint overwrites: two simultaneous writers of one key")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket-anywhere", r"NoSuchBucket.*create the bucket or correct SDP_STORAGE_URL"),
        ("s3://Not_A_Bucket!", r"check SDP_STORAGE_URL"),
    ],
)
def test_a_wrong_bucket_fails_the_check(moto_url: str, s3_credentials: None, url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        open_store(url, S3Options(endpoint_url=moto_url, addressing_style="path")).check()


def test_an_endpoint_that_is_not_there_fails_the_check(s3_credentials: None) -> None:
    store = S3Store("bucket", options=S3Options(endpoint_url=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(SettingsError, match=r"Could not connect.*check SDP_STORAGE_URL, SDP_S3__ENDPOINT_URL"):
        store.check()


def test_wrong_credentials_fail_the_check(weak_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SettingsError, match="check the credentials"):
        weak_bucket.store().check()


def test_no_credentials_fail_the_check(weak_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(SettingsError, match="credentials"):
        weak_bucket.store().check()


def test_a_directory_that_cannot_be_made_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be written"):
        open_store((tmp_path / "file/storage").as_uri()).check()


@contextmanager
def behind(bucket: Bucket, choose: Choose) -> Iterator[tuple[S3Store, FaultProxy]]:
    """The bucket's store through a proxy, with at most two attempts."""
    with FaultProxy(bucket.endpoint_url, choose) as proxy:
        yield (
            bucket.store(endpoint_url=proxy.url, total_max_attempts=2, read_timeout_s=1, part_size_bytes=5 * 2**20),
            proxy,
        )


def unavailable(message: str) -> AbstractContextManager[object]:
    return pytest.raises(StorageUnavailableError, match=message)
