"""Contract of the object stores, run on every implementation."""

from __future__ import annotations

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

import pytest

from sdpipeline.errors import BadInputError, ObjectConflictError, ObjectMissingError
from sdpipeline.storage import ObjectStore, ObjectVersion, StoredObject, open_store
from tests.integration.conftest import Bucket

PICTURE = bytes(range(256)) * 100


def names(*, with_weak: bool) -> list[str]:
    own = ["endpoint"] if "SDP_TEST_S3_URL" in os.environ else []
    return ["directory", "moto", *(["rclone"] if with_weak else []), *own]


@pytest.fixture(params=names(with_weak=True))
def store(request: pytest.FixtureRequest) -> ObjectStore:
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture(params=names(with_weak=False))
def strong_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Every store except the one that ignores conditions."""
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def directory_store(tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "storage").as_uri())


@pytest.fixture
def moto_store(moto_bucket: Bucket) -> ObjectStore:
    return moto_bucket.store("some/prefix")


@pytest.fixture
def rclone_store(weak_bucket: Bucket) -> ObjectStore:
    return weak_bucket.store("some/prefix")


@pytest.fixture
def endpoint_store() -> ObjectStore:
    """The user's own endpoint, e.g. SDP_TEST_S3_URL=s3://bucket/prefix with AWS_ENDPOINT_URL; nothing is deleted."""
    return open_store(f"{os.environ['SDP_TEST_S3_URL'].rstrip('/')}/{uuid.uuid4().hex}")


def test_what_was_put_is_got(store: ObjectStore) -> None:
    stored = store.put("team/a.png", PICTURE, content_type="image/png")
    assert (stored.key, stored.sha256, stored.size_bytes) == ("team/a.png", sha256(PICTURE).hexdigest(), len(PICTURE))
    assert store.get("team/a.png") == PICTURE
    assert store.head("team/a.png") == stored


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.put("empty", b"", content_type="text/plain").size_bytes == 0
    assert store.get("empty") == b""


def test_the_same_bytes_again_are_success(store: ObjectStore) -> None:
    first = store.put("a", PICTURE, content_type="image/png")
    assert store.put("a", PICTURE, content_type="image/png") == first


@pytest.mark.parametrize("other", [b"other", bytes(reversed(PICTURE))], ids=["other-size", "same-size"])
def test_other_bytes_are_a_conflict_and_change_nothing(store: ObjectStore, other: bytes) -> None:
    store.put("a", PICTURE, content_type="image/png")
    with pytest.raises(ObjectConflictError, match="already holds different bytes"):
        store.put("a", other, content_type="image/png")
    assert store.get("a") == PICTURE


def test_what_is_not_there_is_missing(store: ObjectStore) -> None:
    store.put("folder/a", PICTURE, content_type="image/png")
    for key in ("b", "folder", "folder/b"):
        assert store.head(key) is None
        with pytest.raises(ObjectMissingError):
            store.get(key)


def test_a_listing_has_every_key_with_the_prefix(store: ObjectStore) -> None:
    for key in ("seals/1", "seals/10", "seals/2/x", "sealskin", "other"):
        store.put(key, b"x", content_type="text/plain")
    assert sorted(store.list("seals/1")) == ["seals/1", "seals/10"]
    assert sorted(store.list("seals/")) == ["seals/1", "seals/10", "seals/2/x"]
    assert sorted(store.list()) == ["other", "seals/1", "seals/10", "seals/2/x", "sealskin"]
    assert list(store.list("nothing/here")) == []


def test_a_listing_longer_than_a_page_is_whole(store: ObjectStore) -> None:
    # The strong test server returns ten keys per page.
    for n in range(12):
        store.put(f"many/{n}", b"", content_type="text/plain")
    assert sum(1 for _ in store.list("many/")) == 12


def test_an_object_has_one_version_and_what_is_not_there_none(store: ObjectStore) -> None:
    stored = store.put("seals/1", b"seal", content_type="application/json", retained=True)
    assert list(store.versions("seals/1")) == [ObjectVersion(version_id=stored.version_id, is_delete_marker=False)]
    assert list(store.versions("seals")) == []


def test_a_version_that_never_was_is_missing(store: ObjectStore) -> None:
    store.put("a", PICTURE, content_type="image/png")
    with pytest.raises(ObjectMissingError):
        store.get("a", version_id="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")


def test_a_moved_object_is_under_its_new_key_alone(store: ObjectStore) -> None:
    stored = store.put("team/a.png", PICTURE, content_type="image/png")
    store.move("team/a.png", "quarantine/2026-11-25/team/a.png")
    moved = store.head("quarantine/2026-11-25/team/a.png")
    assert moved is not None
    assert (moved.sha256, list(store.list())) == (stored.sha256, ["quarantine/2026-11-25/team/a.png"])
    with pytest.raises(ObjectMissingError):
        store.move("team/a.png", "elsewhere")


def test_a_move_that_was_cut_off_is_ended_by_another(store: ObjectStore) -> None:
    for key in ("a", "b"):
        store.put(key, PICTURE, content_type="image/png")
    store.move("a", "b")
    assert list(store.list()) == ["b"]


def test_nothing_is_moved_over_other_bytes(store: ObjectStore) -> None:
    store.put("a", PICTURE, content_type="image/png")
    store.put("b", b"other", content_type="image/png")
    with pytest.raises(ObjectConflictError):
        store.move("a", "b")
    assert (store.get("a"), store.get("b")) == (PICTURE, b"other")


def test_an_object_says_when_it_was_stored(store: ObjectStore) -> None:
    store.put("a", PICTURE, content_type="image/png")
    found = store.head("a")
    assert found is not None
    assert found.stored_at is not None
    assert abs(datetime.now(UTC) - found.stored_at) < timedelta(minutes=1)


def test_a_link_opens_without_credentials(store: ObjectStore) -> None:
    store.put("team/ä b.png", PICTURE, content_type="image/png")
    with urlopen(store.link("team/ä b.png", expires_s=60)) as opened:
        assert opened.read() == PICTURE


def test_a_store_that_answers_passes_its_check(store: ObjectStore) -> None:
    store.check()


def test_a_probe_leaves_nothing(store: ObjectStore) -> None:
    assert {"conditional put", "versions", "object lock"} <= {found.name for found in store.probe()}
    assert list(store.list()) == []


def test_a_key_outside_the_store_is_refused_by_every_verb(store: ObjectStore) -> None:
    for verb in (store.get, store.head, store.url, store.link, lambda key: store.put(key, b"", content_type="a/b")):
        with pytest.raises(BadInputError):
            verb("../a")
    with pytest.raises(BadInputError):
        list(store.list("../a"))


def test_one_of_many_writers_wins_and_the_others_learn_of_it(strong_store: ObjectStore) -> None:
    def put(writer: int) -> StoredObject | None:
        try:
            return strong_store.put("contested", b"%d" % writer * 1000, content_type="text/plain")
        except ObjectConflictError:
            return None

    with ThreadPoolExecutor(8) as threads:
        winners = [stored for stored in threads.map(put, range(8)) if stored]
    assert [stored.sha256 for stored in winners] == [sha256(strong_store.get("contested")).hexdigest()]


def test_what_was_deleted_is_gone_and_deleting_it_again_is_success(store: ObjectStore) -> None:
    store.put("team/a.png", PICTURE, content_type="image/png")
    store.put("team/a.png.json", PICTURE, content_type="application/json")
    store.delete("team/a.png")
    store.delete("team/a.png")
    assert (store.head("team/a.png"), store.versions("team/a.png")) == (None, [])
    assert list(store.list("team/")) == ["team/a.png.json"]


def test_a_deleted_object_leaves_no_older_version_behind(locked_bucket: Bucket) -> None:
    store = locked_bucket.store()
    stored = store.put("a.png", PICTURE, content_type="image/png")
    locked_bucket.client.delete_object(Bucket=locked_bucket.name, Key="a.png")
    assert store.get("a.png", version_id=stored.version_id) == PICTURE
    store.delete("a.png")
    assert store.versions("a.png") == []
