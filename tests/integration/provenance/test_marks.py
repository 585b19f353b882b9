"""Marks on a picture from the worker through storage to the reader of the file."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select, update

from sdpipeline import provenance
from sdpipeline.app import factories, keys, services
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.tables import image, job
from sdpipeline.domain import ControlNetInput, ImageSource, JobSpec, Json, OutputFormat, Task, hashed
from sdpipeline.engine import Batch, Pixels
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import BadInputError, SigningUnavailableError
from sdpipeline.jobs import DeliveryRules, IncludePrompt
from sdpipeline.maintenance.restore import examine
from sdpipeline.provenance import COMPOSITE, GENERATED, VerifiedPicture, verify
from sdpipeline.provenance.signing import SigningKey
from sdpipeline.reporting import reproduce
from sdpipeline.storage import LocalStore, ObjectStore
from sdpipeline.storage.keys import input_key
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import CHECKPOINT, damaged, job_spec, published, signing_key, statuses
from tests.hostile import BOMBS
from tests.integration.certificates import signing_settings
from tests.integration.conftest import Bucket
from tests.integration.databases import on_sqlite
from tests.integration.fault_proxy import FaultProxy

pytestmark = on_sqlite
"""Marks do not depend on the database."""

FORMATS = [OutputFormat(format="png"), OutputFormat(format="jpeg"), OutputFormat(format="webp")]
every_format = pytest.mark.parametrize("output", FORMATS, ids=lambda output: output.format)
SECRET = "zebrafinch"


class Counting(FakeEngine):
    """The fake engine with a count of its calls."""

    asked = 0

    def generate(self, batch: Batch) -> Any:
        self.asked += 1
        return super().generate(batch)


@dataclass(slots=True)
class Place:
    """A database with its storage, and a worker that signs."""

    audit: AuditLog
    store: ObjectStore
    key: SigningKey = field(default_factory=signing_key)
    engine: Counting = field(default_factory=Counting)

    def work(self, *jobs: JobSpec, **options: Any) -> list[Json]:
        """Submit, work to the end, and return all pictures in the order of their jobs."""
        published(self.audit, jobs, **options)
        limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
        Worker("worker-1", self.audit, self.store, self.engine, limits, self.key).run()
        return self.pictures()

    def pictures(self) -> list[Json]:
        with self.audit.database.read() as connection:
            statement = select(image, job.c.stage).join(job, image.c.job_id == job.c.id).order_by(job.c.id)
            return [dict(row) for row in connection.execute(statement).mappings()]

    def sidecar(self, picture: Json) -> Json:
        found: Json = json.loads(self.store.get(picture["sidecar_key"]))
        return found

    def marks(self, picture: Json) -> VerifiedPicture:
        return verify(self.store.get(picture["key"]))

    def outside(self, pixels: Pixels, **options: Any) -> ImageSource:
        """A submitted photograph."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", **options)
        sha256 = hashed(file.getvalue())
        self.store.put(input_key(sha256), file.getvalue(), content_type="image/jpeg")
        return ImageSource(digest=sha256)


@pytest.fixture
def place(audit: AuditLog, tmp_path: Path) -> Place:
    return Place(audit, LocalStore(tmp_path / "storage"))


@every_format
def test_each_format_comes_back_from_a_bucket_valid_and_walks_back_to_its_draft(
    audit: AuditLog, moto_bucket: Bucket, output: OutputFormat
) -> None:
    place = Place(audit, moto_bucket.store())
    pictures = place.work(*chain(output=output))
    for picture in pictures:
        # As any user would download it.
        data = moto_bucket.client.get_object(Bucket=moto_bucket.name, Key=picture["key"])["Body"].read()
        found = verify(data)
        assert found.ok, found.faults
        assert (found.c2pa, found.digital_source_type, found.development_key) == ("valid", GENERATED, True)
        assert found.record == provenance.own_part(place.sidecar(picture)["record"])
    steps = [(each.depth, each.role, each.relationship, (each.record or {})["stage"]) for each in found.parents]
    assert steps == [(1, "image", "parentOf", "scene"), (2, "controlnets.0", "inputTo", "draft")]


def test_control_maps_are_signed_too(place: Place) -> None:
    _, scene, _ = place.work(*chain())
    (about,) = place.sidecar(scene)["control_maps"]
    found = verify(place.store.get(about["key"]))
    assert found.ok, found.faults
    assert found.digital_source_type == GENERATED


def test_an_edited_photograph_is_a_composite_down_to_the_last_picture(place: Place) -> None:
    source = place.outside(noise())
    edited: dict[str, Any] = {"task": Task.IMAGE_TO_IMAGE, "image": source, "strength": 0.5}
    scene = job_spec("a", stage="scene", **edited)
    pictures = place.work(scene, job_spec("a", stage="final", parents=(scene,), task=Task.SUPER_RESOLUTION))
    scene_marks, final_marks = (place.marks(picture) for picture in pictures)
    assert [each.digital_source_type for each in (scene_marks, final_marks)] == [COMPOSITE, COMPOSITE]
    assert all(provenance.digital_source_type(place.store.get(each["key"])) == COMPOSITE for each in pictures)
    assert [(each.role, each.relationship, each.manifest) for each in scene_marks.parents] == [
        ("image", "parentOf", None)
    ]
    assert [each.depth for each in final_marks.parents] == [1, 2]


def test_a_photograph_that_only_steers_leaves_the_picture_generated(place: Place) -> None:
    source = place.outside(noise())
    use = ControlNetInput(checkpoint=CHECKPOINT, image=source, annotator="canny")
    (picture,) = place.work(job_spec("a", controlnets=(use,)))
    found = place.marks(picture)
    assert (found.ok, found.digital_source_type) == (True, GENERATED)
    assert [(each.role, each.relationship) for each in found.parents] == [("controlnets.0", "inputTo")]
    (about,) = place.sidecar(picture)["control_maps"]
    assert verify(place.store.get(about["key"])).digital_source_type == COMPOSITE


@pytest.mark.timeout(60)
@pytest.mark.parametrize("cut", [False, True], ids=["undecodable", "cut"])
def test_an_input_with_damaged_marks_fails_its_job_before_the_device_works_for_it(place: Place, *, cut: bool) -> None:
    encoded = provenance.encode(noise(), output=OutputFormat(), record={"asked": {}})
    data = damaged(provenance.sign(encoded, key=place.key, record={"asked": {}}).data, cut=cut)
    source = ImageSource(digest=hashed(data))
    place.store.put(input_key(source.digest), data, content_type="image/png")
    (picture,) = place.work(job_spec("a", task=Task.IMAGE_TO_IMAGE, image=source, strength=0.5), job_spec("b"))
    assert place.marks(picture).ok
    assert statuses(place.audit.database, "status", "error_kind") == [("failed", "InputImage"), ("succeeded", None)]
    assert place.engine.asked == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", ["deep_record", "deep_xmp", "many_scans"])
def test_an_input_that_is_a_bomb_fails_its_job_alone_and_its_neighbours_are_made(place: Place, bomb: str) -> None:
    source = ImageSource(digest=hashed(BOMBS[bomb]))
    place.store.put(input_key(source.digest), BOMBS[bomb], content_type="image/png")
    edited = job_spec("a", task=Task.IMAGE_TO_IMAGE, image=source, strength=0.5)
    (picture,) = place.work(edited, job_spec("b"))
    assert place.marks(picture).ok
    assert statuses(place.audit.database, "status", "error_kind") == [("failed", "InputImage"), ("succeeded", None)]


def test_two_roles_of_one_picture_do_not_double_what_is_told_of_it(place: Place) -> None:
    above = job_spec("a", stage="s0")
    jobs = [above]
    for depth in range(1, 7):
        source = ImageSource(stage=above.stage, digest=above.fingerprint)
        use = ControlNetInput(checkpoint=CHECKPOINT, image=source, annotator="canny")
        above = job_spec("a", stage=f"s{depth}", parents=(above,), controlnets=(use,))
        jobs.append(above)
    pictures = place.work(*jobs)
    sizes = [picture["size_bytes"] for picture in pictures]
    steps = np.diff(sizes[1:])
    assert steps.max() < 1.5 * steps.min(), sizes
    assert len(place.sidecar(pictures[-1])["record"]["ancestors"]) == 6


def stripped(data: bytes) -> bytes:
    return rewritten(data, "PNG")


def made_smaller(data: bytes) -> bytes:
    return rewritten(data, "JPEG", quality=80)


def rewritten(data: bytes, form: str, **options: Any) -> bytes:
    """The picture re-encoded as an optimising server does; data of other types passes unchanged."""
    if not data.startswith(b"\x89PNG"):
        return data
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("rewrite", [stripped, made_smaller])
def test_a_picture_that_comes_back_without_its_marks_fails_its_job(
    audit: AuditLog, moto_bucket: Bucket, rewrite: Callable[[bytes], bytes]
) -> None:
    with FaultProxy(moto_bucket.endpoint_url, lambda *_: None, rewrite) as proxy:
        place = Place(audit, replace(moto_bucket, endpoint_url=proxy.url).store())
        assert place.work(job_spec("a")) == []
    ((status, kind, error),) = statuses(audit.database, "status", "error_kind", "error")
    assert (status, kind) == ("failed", "MarksLost")
    assert "was returned from storage without its marks (c2pa.missing)" in error


def test_a_key_that_is_away_is_waited_for_and_the_picture_is_not_made_again(place: Place) -> None:
    refusals = [SigningUnavailableError("KMS key 1: throttled")]

    def sign(data: bytes) -> bytes:
        if refusals:
            raise refusals.pop()
        return signing_key().sign(data)

    place.key = replace(signing_key(), sign=sign)
    (picture,) = place.work(job_spec("a"))
    assert place.marks(picture).ok
    assert (refusals, place.engine.asked, picture["attempt"]) == ([], 1, 1)


def test_pictures_are_signed_away_from_the_thread_that_owns_the_device(place: Place) -> None:
    signers = set[str]()

    def sign(data: bytes) -> bytes:
        signers.add(threading.current_thread().name)
        return signing_key().sign(data)

    place.key = replace(signing_key(), sign=sign)
    assert len(place.work(*chain())) == 3
    assert signers
    assert threading.current_thread().name not in signers


class Counted(LocalStore):
    """A directory that records which objects were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read = Counter[str]()

    def get(self, key: str, *, version_id: str | None = None) -> bytes:
        self.read[key] += 1
        return super().get(key, version_id=version_id)


def test_an_ingredient_is_the_file_that_was_fetched_for_its_pixels(audit: AuditLog, tmp_path: Path) -> None:
    store = Counted(tmp_path / "storage")
    draft, scene, _ = Place(audit, store).work(*chain())
    assert [store.read[picture["key"]] for picture in (draft, scene)] == [1, 1]


def test_a_picture_of_a_time_before_signatures_is_made_again_and_not_copied(place: Place) -> None:
    (picture,) = place.work(job_spec("a"), name="spring")
    record = place.sidecar(picture)["record"]
    pixels = provenance.decode(place.store.get(picture["key"]), max_pixels=10**6)
    unsigned = provenance.encode(pixels, output=OutputFormat(), record=record)
    place.store.delete(picture["key"])
    place.store.put(picture["key"], unsigned.data, content_type="image/png")
    with place.audit.database.write() as connection:
        connection.execute(update(image).values(sha256=unsigned.sha256))
    *_, again = place.work(job_spec("a"), name="autumn")
    assert (again["reused_from"], place.engine.asked) == (None, 2)
    assert place.marks(again).ok


def test_what_an_older_key_signed_is_made_again_where_it_is_not_trusted(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    companies = {}
    for company in ("one", "two"):
        (tmp_path / company).mkdir()
        companies[company] = signing_settings(tmp_path / company)

    def work_for(company: str, name: str, *, trust: bool) -> Json:
        for setting, value in companies[company].items():
            if trust or "TRUST" not in setting:
                monkeypatch.setenv(setting, value)
        published(place.audit, [job_spec("a")], name=name)
        settings = services.load_settings(tmp_path)
        key = keys.picture_key(settings)
        factories.make_worker(settings, place.audit.database, place.store, place.engine, key).run()
        return place.pictures()[-1]

    place.work(job_spec("a"), name="by-a-development-key")
    first, second = work_for("one", "by-the-first", trust=False), work_for("two", "by-the-second", trust=True)
    assert [(each["reused_from"], place.marks(each).development_key) for each in (first, second)] == [(None, False)] * 2
    assert place.engine.asked == 3
    again = work_for("two", "by-the-second-again", trust=True)
    assert again["reused_from"] == second["key"]


@pytest.mark.parametrize("told", ["hash", "none"])
@every_format
def test_prompts_that_are_kept_back_stand_in_no_file_of_the_chain(
    place: Place, output: OutputFormat, told: IncludePrompt
) -> None:
    jobs = chain(output=output, prompt=f"a {SECRET}", negative_prompt=f"no {SECRET}")
    pictures = place.work(*jobs, rules={each.stage: DeliveryRules(include_prompt=told) for each in jobs})
    for picture in pictures:
        data = place.store.get(picture["key"])
        assert SECRET.encode() not in data
        assert place.marks(picture).ok
        asked = (provenance.read_record(data) or {})["asked"]
        assert asked.get("prompt_sha256") == (hashed(f"a {SECRET}".encode()) if told == "hash" else None)
        assert place.sidecar(picture)["record"]["asked"]["negative_prompt"] == f"no {SECRET}"
        # After a database restore they are still found intact.
        assert examine(place.store, picture["sidecar_key"])[0].stored.sha256 == picture["sha256"]


def test_what_keeps_its_prompt_back_is_made_again_from_its_sidecar_and_not_from_its_file(place: Place) -> None:
    jobs = chain(prompt=SECRET, negative_prompt=SECRET)
    *_, final = place.work(*jobs, rules={each.stage: DeliveryRules(include_prompt="none") for each in jobs})
    record = reproduce.checked_record(place.sidecar(final)["record"], "sidecar")
    done = reproduce.reproduce(record, FakeEngine(), lambda _: b"", original=None, pixels_sha256=final["pixels_sha256"])
    assert done.bit_equal
    assert SECRET.encode() not in done.data
    with pytest.raises(BadInputError, match=r"omits the prompt \(give its job's number"):
        reproduce.checked_record(provenance.read_record(place.store.get(final["key"])), "a.png")


def test_a_record_of_the_schema_before_with_its_parents_inside_is_made_again_too(place: Place) -> None:
    *_, final = place.work(*chain())
    record = place.sidecar(final)["record"]
    ancestors = record.pop("ancestors")

    def nested(own: Json) -> Json:
        inputs = {role: about | {"record": nested(ancestors[about["sha256"]])} for role, about in own["inputs"].items()}
        return own | {"schema": "sdpipeline/record/1", "inputs": inputs}

    checked = reproduce.checked_record(nested(record), "sidecar")
    made = reproduce.reproduce(
        checked, FakeEngine(), lambda _: b"", original=None, pixels_sha256=final["pixels_sha256"]
    )
    assert made.bit_equal


def test_a_campaign_that_keeps_prompts_back_gets_no_copy_that_tells_them(place: Place) -> None:
    keeps_back = {"draft": DeliveryRules(include_prompt="none")}
    place.work(job_spec("a", prompt=SECRET), name="open")
    *_, closed = place.work(job_spec("a", prompt=SECRET), name="closed", rules=keeps_back)
    assert closed["reused_from"] is None
    assert SECRET.encode() not in place.store.get(closed["key"])
    *_, again = place.work(job_spec("a", prompt=SECRET), name="closed-too", rules=keeps_back)
    assert again["reused_from"] == closed["key"]


def chain(**changes: Any) -> list[JobSpec]:
    """A draft, a scene that keeps its outline, and a larger final picture."""
    draft = job_spec("a", **changes)
    source = ImageSource(stage="draft", digest=draft.fingerprint)
    use = ControlNetInput(checkpoint=CHECKPOINT, image=source, annotator="canny")
    steered = {"task": Task.TEXT_TO_IMAGE, "image": None, "strength": None, "controlnets": (use,)}
    scene = job_spec("a", stage="scene", parents=(draft,), **steered | changes)
    final = job_spec("a", stage="final", parents=(scene,), task=Task.SUPER_RESOLUTION, **changes)
    return [draft, scene, final]


def noise() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
