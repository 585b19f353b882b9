"""Verification of pictures of any origin: their source, also without marks, and faults that the database knows."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from sqlalchemy import Select, select, text, update

from sdpipeline import provenance
from sdpipeline.archives import archiver
from sdpipeline.audit import load_key, seal
from sdpipeline.db import similar_images
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.tables import LOOKS, image, job
from sdpipeline.domain import JobSpec, Json, OutputFormat
from sdpipeline.engine import Batch, GeneratedImage, Pixels
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.engine.quality import perceptual_hash
from sdpipeline.jobs import DeliveryRules
from sdpipeline.maintenance.reconcile import reconcile
from sdpipeline.provenance import GENERATED
from sdpipeline.reporting.verify import Checked, Register, check
from sdpipeline.storage import LocalStore
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import job_spec, published, signing_key
from tests.integration.certificates import Authority
from tests.integration.commands import document, pictures, sdpipeline
from tests.integration.conftest import CREDENTIALS, Bucket
from tests.integration.databases import on_sqlite

PHOTOGRAPHS = [np.asarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "rocket", "chelsea")]


class Photographer(FakeEngine):
    """The fake engine with pictures that have content: one of four for each seed."""

    def generate(self, batch: Batch) -> Any:
        made = []
        for prepared, result in zip(batch.requests, super().generate(batch), strict=True):
            assert isinstance(result, GeneratedImage)
            pixels = np.ascontiguousarray(PHOTOGRAPHS[prepared.request.seed % 4][:256, :256])
            made.append(GeneratedImage(pixels=pixels, ran=result.ran, control_maps=result.control_maps))
        return made


@dataclass(slots=True)
class Place:
    """A database with four pictures, and everything needed to look them up."""

    audit: AuditLog
    store: LocalStore
    register: Register = field(init=False)

    def __post_init__(self) -> None:
        self.register = Register(self.audit.database, self.store, "default")

    def work(self, *jobs: JobSpec, **options: Any) -> list[Json]:
        published(self.audit, jobs, **options)
        limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
        Worker("worker-1", self.audit, self.store, Photographer(), limits, signing_key()).run()
        with self.audit.database.read() as connection:
            statement = select(image).join(job, image.c.job_id == job.c.id).order_by(job.c.id)
            return [dict(row) for row in connection.execute(statement).mappings()]

    def check(self, data: bytes) -> Checked:
        return check("a picture", data, trust_anchors="", register=self.register)


@pytest.fixture
def place(audit: AuditLog, tmp_path: Path) -> Place:
    return Place(audit, LocalStore(tmp_path / "storage"))


def four() -> list[JobSpec]:
    return [job_spec(f"row-{seed}", seed=seed) for seed in range(4)]


def test_a_picture_and_its_stripped_and_its_smaller_copy_are_found(place: Place) -> None:
    for picture in place.work(*four()):
        data = place.store.get(picture["key"])
        whole, bare, smaller = (place.check(each) for each in (data, stripped(data), thumbnail(data)))
        assert whole.ok
        assert matched(whole) == ("file", 0, picture["job_id"])
        assert matched(bare) == ("pixels", 0, picture["job_id"])
        by, distance, job_id = matched(smaller)
        assert (by, job_id) == ("perceptual_hash", picture["job_id"])
        assert 0 <= distance <= similar_images.MAX_BITS
        assert [each.faults for each in (bare, smaller)] == [("c2pa.missing",)] * 2


def test_a_picture_of_nobodys_is_not_known(place: Place) -> None:
    place.work(*four())
    assert place.check(saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))).match is None


def test_pictures_that_the_release_before_recorded_are_found_too(place: Place) -> None:
    first, *_ = place.work(*four())
    with place.audit.database.write() as connection:
        connection.execute(update(image).values(dict.fromkeys(LOOKS)))
    is_found_stripped_and_smaller(place, first)


def test_pictures_of_an_archived_edition_are_found_too(place: Place, tmp_path: Path) -> None:
    first, *_ = place.work(*(replace(spec, edition="monday") for spec in four()))
    place.work(replace(job_spec("another", seed=1), edition="tuesday"))
    assert archived(place, tmp_path) == 1
    is_found_stripped_and_smaller(place, first)


def test_the_same_pixels_in_an_archived_a_copied_and_a_new_file_are_each_editions_own(
    place: Place, tmp_path: Path
) -> None:
    (first,) = place.work(replace(job_spec("a"), edition="monday"))
    *_, copy = place.work(replace(job_spec("a"), edition="tuesday"))
    assert archived(place, tmp_path) == 1
    *_, again = place.work(replace(job_spec("a"), edition="wednesday"), rules={"draft": DeliveryRules(reuse=False)})
    assert (copy["reused_from"], again["reused_from"]) == (first["key"], None)
    checked = [place.check(place.store.get(picture["key"])) for picture in (first, copy, again)]
    assert [(each.faults, each.match and each.match.by) for each in checked] == [((), "file")] * 3


@on_sqlite
def test_a_copy_of_a_file_that_was_lost_and_made_again_is_still_what_was_delivered(
    place: Place, tmp_path: Path
) -> None:
    (picture,) = place.work(job_spec("a"))
    data = place.store.get(picture["key"])
    place.store.delete(picture["key"])
    key = load_key(tmp_path / "key.pem", create=True)
    reconcile(place.audit, place.store, lambda: key, grace_s=3600.0, repair=True)
    (again,) = place.work(job_spec("a"))
    assert again["sha256"] != picture["sha256"]
    assert place.check(data).faults == ()


def archived(place: Place, folder: Path) -> int:
    """Archive editions; return how many left the tables."""
    key = load_key(folder / "key.pem", create=True)

    def seal_all() -> None:
        seal(place.audit.database, place.store, key)

    return archiver.archive(place.audit, place.store, seal_all, team="default", days=0)


def is_found_stripped_and_smaller(place: Place, picture: Json) -> None:
    data = place.store.get(picture["key"])
    assert matched(place.check(stripped(data))) == ("pixels", 0, picture["job_id"])
    assert matched(place.check(thumbnail(data)))[::2] == ("perceptual_hash", picture["job_id"])


def test_any_seven_bits_of_a_hash_may_be_lost(place: Place) -> None:
    (picture, *_) = place.work(*four())
    own, random = int(picture["scores"]["perceptual_hash"], 16), np.random.default_rng(0)
    for _ in range(50):
        changed = own
        for bit in random.choice(64, similar_images.MAX_BITS, replace=False):
            changed ^= 1 << int(bit)
        with place.audit.database.read() as connection:
            found = similar_images.alike(connection, team="default", perceptual_hash=f"{changed:016x}")
        assert picture["job_id"] in [each.job for each in found]


def test_looking_pictures_up_asks_the_indexes(place: Place) -> None:
    looks = similar_images.looks({"perceptual_hash": perceptual_hash(PHOTOGRAPHS[0])})
    found = plan(place, similar_images._of_pixels("0" * 64))
    # With almost no rows PostgreSQL uses any index that covers them.
    found += plan(place, similar_images._alike(looks), without="ix_image_pixels_sha256")
    assert [name for name in ("pixels_sha256", *LOOKS) if f"ix_image_{name}" not in found] == [], found


def plan(place: Place, statement: Select[Any], *, without: str | None = None) -> str:
    """The database's query plan; on PostgreSQL ``without`` one of its indexes."""
    database = place.audit.database
    with database.read() as connection, connection.begin_nested() as trial:
        if not database.is_sqlite:
            connection.execute(text("SET LOCAL enable_seqscan = off"))
            if without is not None:
                connection.execute(text(f"DROP INDEX {without}"))
        word = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        asked = str(statement.compile(connection, compile_kwargs={"literal_binds": True}))
        found = str(connection.exec_driver_sql(f"{word} {asked}").all())
        trial.rollback()
    return found


@on_sqlite
def test_another_teams_pictures_are_not_known(place: Place) -> None:
    (picture, *_) = place.work(*four())
    place.register = Register(place.audit.database, place.store, "others")
    assert place.check(place.store.get(picture["key"])).match is None


@on_sqlite
def test_pixels_that_were_changed_and_signed_again_with_the_stolen_key_are_contradicted(place: Place) -> None:
    (picture, *_) = place.work(*four())
    data = place.store.get(picture["key"])
    record, pixels = provenance.read_record(data) or {}, provenance.decode(data, max_pixels=10**6).copy()
    pixels[:40, :40] = 0
    forged = resigned(pixels, record)
    assert provenance.verify(forged).ok
    found = place.check(forged)
    assert found.faults == (f"database.differs: job {picture['job_id']}, whose record it carries, has other pixels",)


@on_sqlite
def test_a_record_that_was_changed_and_signed_again_with_the_stolen_key_is_contradicted(place: Place) -> None:
    (picture, *_) = place.work(*four())
    data = place.store.get(picture["key"])
    record = (provenance.read_record(data) or {}) | {"campaign": "another"}
    found = place.check(resigned(provenance.decode(data, max_pixels=10**6), record))
    assert found.faults == (f"database.differs: job {picture['job_id']} has these pixels in another file",)


@on_sqlite
def test_where_roots_are_named_one_of_them_has_to_stand_behind_the_signature(place: Place) -> None:
    (picture, *_) = place.work(*four())
    data = place.store.get(picture["key"])
    found = check("a picture", data, trust_anchors=Authority("Acme").root_pem, register=None)
    assert (found.marks.c2pa, found.faults) == ("valid", ("signer.untrusted",))


@pytest.mark.timeout(300)
def test_the_demos_pictures_are_verified_with_their_chains(demo_home: Path) -> None:
    folder = demo_home / "storage" / "default" / "demo"
    found = document("verify", folder, "--home", demo_home)
    assert (found["ok"], found["images"]) == (True, 32)  # 24 pictures and eight control maps
    assert sum(each["known"] for each in found["pictures"]) == 24
    final = next(each for each in pictures(demo_home, "demo") if each["stage"] == "final")
    one = document("verify", final["image"]["url"].removeprefix("file://"), "--home", demo_home)
    assert (one["ok"], one["c2pa"], one["development_key"]) == (True, "valid", True)
    assert (one["digital_source_type"], one["known"], one["match"]["job"]) == (GENERATED, True, final["id"])
    assert [(each["depth"], each["relationship"], each["stage"]) for each in one["parents"]] == [
        (1, "parentOf", "scene"),
        (2, "inputTo", "draft"),
    ]


@pytest.mark.timeout(300)
def test_a_stripped_picture_leaves_with_3_and_says_whose_it_is(demo_home: Path, tmp_path: Path) -> None:
    final = next(each for each in pictures(demo_home, "demo") if each["stage"] == "final")
    data = Path(final["image"]["url"].removeprefix("file://")).read_bytes()
    (tmp_path / "copy.jpg").write_bytes(thumbnail(data))
    found = document("verify", tmp_path / "copy.jpg", "--home", demo_home, exit_code=3)
    assert (found["ok"], found["c2pa"], found["known"]) == (False, "missing", True)
    assert (found["match"]["by"], found["match"]["job"]) == ("perceptual_hash", final["id"])
    done = sdpipeline("verify", tmp_path, "--home", demo_home)
    assert done.returncode == 3
    assert "1 pictures, 0 ok; the database knows 1" in done.stdout
    assert f"of 64 bits of the perceptual hash: job {final['id']}, stage final of demo" in done.stdout


@pytest.mark.timeout(300)
def test_pictures_in_a_bucket_are_verified_and_the_endpoint_is_the_settings(
    demo_home: Path, moto_bucket: Bucket, tmp_path: Path
) -> None:
    final = next(each for each in pictures(demo_home, "demo") if each["stage"] == "final")
    data = Path(final["image"]["url"].removeprefix("file://")).read_bytes()
    moto_bucket.client.put_object(Bucket=moto_bucket.name, Key="shop/a.png", Body=data)
    settings = CREDENTIALS | {"SDP_S3__ENDPOINT_URL": moto_bucket.endpoint_url, "SDP_S3__ADDRESSING_STYLE": "path"}
    address = f"s3://{moto_bucket.name}/shop/"
    found = document("verify", address, "--home", tmp_path / "none", given=settings)
    assert [(each["file"], each["ok"], each["known"]) for each in found["pictures"]] == [
        (f"{address}a.png", True, None)
    ]
    one = document("verify", f"{address}a.png", "--home", demo_home, given=settings)
    assert (one["ok"], one["match"]["by"]) == (True, "file")


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    missing = tmp_path / "missing.png"
    for what, why in (
        (tmp_path / "a.txt", "not a png, jpeg or webp"),
        (missing, "cannot be read: No such file"),
        (tmp_path, "has no pictures"),
    ):
        done = sdpipeline("verify", what, "--home", tmp_path / "none")
        assert done.returncode == 2
        assert why in done.stderr


def matched(checked: Checked) -> tuple[str, int, int]:
    assert checked.match is not None
    return checked.match.by, checked.match.distance, checked.match.picture.job


def resigned(pixels: Pixels, record: Json) -> bytes:
    encoded = provenance.encode(pixels, output=OutputFormat(), record=record)
    return provenance.sign(encoded, key=signing_key(), record=record).data


def stripped(data: bytes) -> bytes:
    return saved(provenance.decode(data, max_pixels=10**6))


def thumbnail(data: bytes) -> bytes:
    """A thumbnail as a shop shows it: smaller, and a JPEG."""
    shown = Image.open(io.BytesIO(data)).convert("RGB")
    shown = shown.resize((shown.width * 3 // 5, shown.height * 3 // 5))
    return saved(np.asarray(shown), "JPEG", quality=70)


def saved(pixels: Pixels, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()
