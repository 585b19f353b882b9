"""Reuse of existing pictures: delivered as copies, recorded in the audit log, and made again in case of doubt."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import select

from sdpipeline.audit import load_key, verify
from sdpipeline.db import queries, registry, reuse
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.registry import Approval
from sdpipeline.db.tables import campaign, image, job, spending
from sdpipeline.domain import ControlNetInput, ImageSource, JobSpec, Json
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import RequestRefusedError
from sdpipeline.jobs import DeliveryRules
from sdpipeline.storage import LocalStore, ObjectStore
from sdpipeline.worker.copies import copy_picture
from sdpipeline.worker.finished_picture import Attempt
from sdpipeline.worker.worker import Worker, WorkerLimits, WorkerSummary
from tests.factories import (
    CHECKPOINT,
    chains,
    checkpoint_files,
    events,
    expired,
    job_spec,
    leased,
    published,
    signing_key,
    statuses,
)
from tests.integration.commands import FAKE_ENGINE, document
from tests.integration.conftest import Bucket
from tests.integration.databases import on_sqlite

Generated = Sequence[GeneratedImage | GenerationFailure]


class Counting(FakeEngine):
    """The fake engine with a list of its requests; ``after`` may change its results."""

    def __init__(self, after: Callable[[int, Generated], Generated] = lambda _, made: made) -> None:
        super().__init__()
        self.asked: list[list[str]] = []
        self._after = after

    def generate(self, batch: Batch) -> Generated:
        self.asked.append([prepared.request.prompt for prepared in batch.requests])
        return self._after(len(self.asked), super().generate(batch))


@dataclass(slots=True)
class Place:
    """A database and storage, and a worker whose engine counts. ``overwrite`` changes objects without the store."""

    audit: AuditLog
    store: ObjectStore
    overwrite: Callable[[str, bytes | None], None]
    folder: Path
    engine: Counting = field(default_factory=Counting)

    def work(self, *, max_batch: int = 8, engine: Counting | None = None) -> WorkerSummary:
        limits = WorkerLimits(max_batch=max_batch, lease_ttl_s=60.0, max_pixels=10**7)
        return Worker("worker-1", self.audit, self.store, engine or self.engine, limits, signing_key()).run()

    def made(self, name: str, jobs: Sequence[JobSpec], **options: Any) -> list[Json]:
        """Submit a campaign, work it to its end, and return its pictures in the order of their jobs."""
        published(self.audit, jobs, name=name, **options)
        self.work()
        return self.pictures(name)

    def pictures(self, name: str) -> list[Json]:
        own = (image.c.job_id == job.c.id) & (image.c.fingerprint == job.c.fingerprint)
        statement = select(image, job.c.stage).join(job, own).join(campaign, campaign.c.id == job.c.campaign_id)
        with self.audit.database.read() as connection:
            rows = connection.execute(statement.where(campaign.c.name == name).order_by(job.c.id)).mappings()
            return [dict(row) for row in rows]

    def sidecar(self, picture: Json) -> Json:
        found: Json = json.loads(self.store.get(picture["sidecar_key"]))
        return found

    def faults(self) -> list[tuple[str, str]]:
        key = load_key(self.folder / "key.pem", create=True)
        return [(fault.kind, fault.subject) for fault in verify(self.audit.database, self.store, key).faults]


@pytest.fixture
def directory_place(audit: AuditLog, tmp_path: Path) -> Place:
    root = tmp_path / "storage"

    def overwrite(key: str, data: bytes | None) -> None:
        if data is None:
            (root / key).unlink()
        else:
            (root / key).write_bytes(data)

    return Place(audit, LocalStore(root), overwrite, tmp_path)


@pytest.fixture
def moto_place(audit: AuditLog, moto_bucket: Bucket, tmp_path: Path) -> Place:
    def overwrite(key: str, data: bytes | None) -> None:
        if data is None:
            moto_bucket.client.delete_object(Bucket=moto_bucket.name, Key=f"some/prefix/{key}")
        else:
            moto_bucket.client.put_object(Bucket=moto_bucket.name, Key=f"some/prefix/{key}", Body=data)

    return Place(audit, moto_bucket.store("some/prefix"), overwrite, tmp_path)


@pytest.fixture(params=["directory"])
def place(request: pytest.FixtureRequest, audit: AuditLog) -> Place:
    """On each kind of database; on S3 too for tests marked ``everywhere``."""
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found


everywhere = pytest.mark.parametrize("place", ["directory", "moto"], indirect=True)


def steered(count: int, **changes: Any) -> list[JobSpec]:
    """Chains of a draft and a scene that keeps its outline; ``changes`` apply to the scenes."""
    return list(_steered(count, changes))


def _steered(count: int, changes: dict[str, Any]) -> Iterator[JobSpec]:
    for number in range(count):
        draft = job_spec(f"row-{number}")
        source = ImageSource(stage="draft", digest=draft.fingerprint)
        use = ControlNetInput(checkpoint=CHECKPOINT, image=source, annotator="canny")
        yield draft
        yield job_spec(f"row-{number}", stage="scene", parents=(draft,), controlnets=(use,), **changes)


# Properties of a copy.


@everywhere
def test_another_campaign_gets_copies_under_keys_of_its_own_in_no_device_time(place: Place) -> None:
    firsts = place.made("spring", steered(2))
    asked = len(place.engine.asked)
    published(place.audit, steered(2), name="autumn")
    done = place.work()
    assert (done.succeeded, done.reused, done.batches, done.gpu_seconds) == (4, 4, 0, 0.0)
    assert len(place.engine.asked) == asked
    for first, copy in zip(firsts, place.pictures("autumn"), strict=True):
        assert copy["key"].startswith(f"default/autumn/{copy['stage']}/{copy['fingerprint']}/")
        assert place.store.get(copy["key"]) == place.store.get(first["key"])
        assert (copy["reused_from"], copy["gpu_seconds"]) == (first["key"], 0.0)
        assert (first["reused_from"], first["gpu_seconds"] > 0) == (None, True)
        assert copy["pixels_sha256"] == first["pixels_sha256"]
    assert place.faults() == []


@everywhere
def test_its_sidecar_names_the_original_and_keeps_the_makers_record(place: Place) -> None:
    firsts = place.made("spring", steered(1))
    for first, copy in zip(firsts, place.made("autumn", steered(1)), strict=True):
        told, before = place.sidecar(copy), place.sidecar(first)
        about = {"key": first["key"], "sha256": first["sha256"], "job": first["job_id"]}
        assert told["reused_from"] == about | {"fingerprint": first["fingerprint"]}
        assert told["record"] == before["record"]
        assert told["record"]["campaign"] == "spring"
        assert told["object"]["key"] == copy["key"]
        assert told["timings"]["generate_s"] == 0


@everywhere
def test_its_control_maps_are_copied_too_and_a_change_to_any_part_of_a_copy_is_found(place: Place) -> None:
    place.made("spring", steered(1))
    scene = place.made("autumn", steered(1))[1]
    (control_map,) = place.sidecar(scene)["control_maps"]
    assert control_map["key"].startswith("default/autumn/scene/")
    for key in (scene["key"], scene["sidecar_key"], control_map["key"]):
        before = place.store.get(key)
        place.overwrite(key, before + b" ")
        assert place.faults() == [("object-altered", key)]
        place.overwrite(key, before)


def test_a_job_that_got_a_copy_has_one_event_of_success_and_costs_its_campaign_nothing(place: Place) -> None:
    place.made("spring", steered(2))
    copies = place.made("autumn", steered(2))
    told = [event for event in events(place.audit.database) if event["event"] == "job.succeeded"]
    assert set(Counter(event["subject"] for event in told).values()) == {1}
    reused = {event["subject"]: event["image"]["reused_from"] for event in told if event["image"]["reused_from"]}
    assert reused == {f"job:{copy['job_id']}": copy["reused_from"] for copy in copies}
    with place.audit.database.read() as connection:
        paid = set(connection.execute(select(spending.c.campaign_id)).scalars())
        progress = queries.progress(connection, 2)
    assert paid == {1}
    assert (progress.succeeded, progress.gpu_seconds) == (4, 0.0)


def test_a_new_edition_of_a_campaign_has_copies_beside_its_older_pictures(place: Place) -> None:
    firsts = place.made("spring", list(chains(3)))
    asked = len(place.engine.asked)
    pictures = place.made("spring", [replace(spec, edition="two") for spec in chains(3)])
    assert len(place.engine.asked) == asked
    assert [each["reused_from"] for each in pictures] == [None] * 3 + [each["key"] for each in firsts]
    assert len({each["key"] for each in pictures} | {each["sidecar_key"] for each in pictures}) == 12
    assert place.faults() == []


def test_a_copy_is_made_of_the_picture_that_was_made_and_never_of_a_copy(place: Place) -> None:
    (first,) = place.made("spring", list(chains(1)))
    place.made("summer", list(chains(1)))
    assert [each["reused_from"] for each in place.made("autumn", list(chains(1)))] == [first["key"]]


def test_a_job_that_was_pruned_and_is_wanted_again_keeps_its_own_picture(place: Place) -> None:
    place.made("spring", list(chains(2)))
    published(place.audit, chains(1), name="spring", prune=True)
    pictures = place.made("spring", list(chains(2)))
    assert len(place.engine.asked) == 1
    assert [each["reused_from"] for each in pictures] == [None, None]


def test_what_is_made_from_a_reused_picture_consumes_the_pixels_of_the_original(place: Place) -> None:
    draft, _ = place.made("spring", steered(1))
    copy, scene = place.made("autumn", steered(1, prompt="another scene"))
    assert (copy["reused_from"], scene["reused_from"]) == (draft["key"], None)
    consumed = place.sidecar(scene)["record"]["inputs"]["image"]
    assert (consumed["key"], consumed["pixels_sha256"]) == (copy["key"], draft["pixels_sha256"])
    assert place.faults() == []


# Pictures that are made in spite of an original.


def _picture(place: Place, picture: Json) -> str:
    return str(picture["key"])


def _sidecar(place: Place, picture: Json) -> str:
    return str(picture["sidecar_key"])


def _control_map(place: Place, picture: Json) -> str:
    return str(place.sidecar(picture)["control_maps"][0]["key"])


@everywhere
@on_sqlite
@pytest.mark.parametrize("part", [_picture, _sidecar, _control_map])
@pytest.mark.parametrize("left", [None, b"something else"])
def test_an_original_that_is_missing_or_altered_is_made_anew_and_named(
    place: Place, part: Callable[[Place, Json], str], left: bytes | None
) -> None:
    first = place.made("spring", steered(1))[1]
    key = part(place, first)
    place.overwrite(key, left)
    with structlog.testing.capture_logs() as logs:
        scene = place.made("autumn", steered(1))[1]
    (warning,) = (each for each in logs if each["event"] == "picture_not_reused")
    assert (warning["job_id"], warning["key"]) == (scene["job_id"], first["key"])
    assert key in warning["error"]
    assert scene["reused_from"] is None
    assert place.pictures("autumn")[0]["reused_from"] is not None
    # From now on the new picture is the original.
    assert place.made("winter", steered(1))[1]["reused_from"] == scene["key"]


def test_a_campaign_that_says_so_makes_its_pictures_again(place: Place) -> None:
    place.made("spring", list(chains(2)))
    pictures = place.made(
        "autumn",
        [*chains(2), job_spec("double", prompt="a picture of row-0")],
        rules={"draft": DeliveryRules(reuse=False)},
    )
    assert [each["reused_from"] for each in pictures] == [None] * 3
    assert [len(prompts) for prompts in place.engine.asked] == [2, 3]


def test_the_pictures_of_another_team_are_not_reused(place: Place) -> None:
    place.made("spring", list(chains(2)))
    pictures = place.made("spring-elsewhere", list(chains(2)), team="other")
    assert [each["reused_from"] for each in pictures] == [None, None]
    assert len(place.engine.asked) == 2


def test_a_strict_job_takes_only_a_picture_whose_record_says_that_strictness_held(place: Place) -> None:
    asked = list(chains(1, reproducibility="strict"))
    assert asked[0].fingerprint != next(chains(1)).fingerprint

    def loosely(_: int, made: Generated) -> Generated:
        pictures = [each for each in made if isinstance(each, GeneratedImage)]
        return [replace(each, ran=each.ran | {"reproducibility": "tolerant"}) for each in pictures]

    published(place.audit, asked, name="spring")
    place.work(engine=Counting(loosely))
    (second,) = place.made("autumn", asked)
    (third,) = place.made("winter", asked)
    assert (second["reused_from"], third["reused_from"]) == (None, second["key"])


def test_the_pictures_of_a_load_test_are_not_delivered_by_another_engine(place: Place) -> None:
    class Other(Counting):
        def describe(self) -> dict[str, Any]:
            return super().describe() | {"engine": "other"}

    place.made("spring", list(chains(2)))
    place.engine = Other()
    pictures = place.made("autumn", list(chains(2)))
    assert [each["reused_from"] for each in pictures] == [None, None]
    assert len(place.engine.asked) == 1


def test_the_pictures_of_a_revoked_checkpoint_are_not_reused(place: Place, database: Database) -> None:
    with place.audit.transaction() as tx:
        registry.add(tx, checkpoint_files("shapes", digest=CHECKPOINT.digest), Approval(approved_by="a test"))
    place.made("spring", list(chains(2)))
    published(place.audit, chains(2), name="autumn")
    with place.audit.transaction() as tx:
        registry.revoke(tx, CHECKPOINT.digest, because="a test")
    assert place.work().succeeded == 0
    assert statuses(database, campaign=2) == ["blocked", "blocked"]
    assert place.faults() == []


# Equal jobs at the same time.


def _equal(*rows: str, prompt: str = "the same") -> list[JobSpec]:
    return [job_spec(row, prompt=prompt) for row in rows]


def test_equal_jobs_of_one_lease_are_made_once_and_delivered_to_each(place: Place) -> None:
    pictures = place.made("spring", [*_equal("a", "b", "c"), job_spec("d")])
    assert place.engine.asked == [["the same", "a picture of d"]]
    assert [each["reused_from"] for each in pictures] == [None, pictures[0]["key"], pictures[0]["key"], None]
    assert len({each["key"] for each in pictures}) == 4
    assert place.faults() == []


def test_jobs_wait_for_an_equal_one_that_the_same_worker_has_in_flight(place: Place) -> None:
    def slowly(_: int, made: Generated) -> Generated:
        time.sleep(0.5)
        return made

    engine = Counting(slowly)
    published(place.audit, _equal("a", "b", "c"))
    done = place.work(max_batch=1, engine=engine)
    assert (len(engine.asked), done.succeeded, done.reused) == (1, 3, 2)
    assert place.faults() == []


def test_jobs_whose_equal_one_failed_are_given_back_and_made(place: Place, database: Database) -> None:
    def refuse_the_first(number: int, made: Generated) -> Generated:
        return [GenerationFailure(error=RequestRefusedError("it is the first"))] if number == 1 else made

    engine = Counting(refuse_the_first)
    published(place.audit, _equal("a", "b", "c"))
    done = place.work(engine=engine)
    assert statuses(database, "status", "attempt") == [("failed", 1), ("succeeded", 1), ("succeeded", 1)]
    assert (engine.asked, done.reused) == ([["the same"], ["the same"]], 1)
    assert place.faults() == []


def test_jobs_do_not_wait_for_one_whose_input_could_not_be_fetched(place: Place, database: Database) -> None:
    missing = ImageSource(digest="1" * 64)
    published(place.audit, [job_spec(row, prompt="the same", image=missing) for row in ("a", "b", "c")])
    place.work()
    assert statuses(database) == ["failed"] * 3


# Any number of jobs.


@on_sqlite
def test_looking_pictures_up_begins_at_their_fingerprints_and_not_at_all_jobs_of_the_team(database: Database) -> None:
    lookup = reuse._made((image.c.key,), "default", ["f" * 64]).compile(
        database.reader, compile_kwargs={"literal_binds": True}
    )
    with database.read() as connection:
        steps = [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {lookup}")]
    assert "ix_image_fingerprint" in steps[0]


# Crashes.


@everywhere
def test_a_worker_killed_between_copy_and_commit_leaves_nothing_wrong(place: Place, database: Database) -> None:
    (first,) = place.made("spring", list(chains(1)))
    published(place.audit, chains(1), name="autumn")
    lease = leased(place.audit)
    with database.read() as connection:
        found = reuse.newest(connection, team="default", fingerprints=[first["fingerprint"]])
    attempt = Attempt(number=1, lease_id=lease.id, worker_id="worker-0", gpu_seconds=0.0)
    original = found[first["fingerprint"]]
    copied = copy_picture(place.store, lease.jobs[0], original, attempt, engine="fake", signing=signing_key())
    expired(place.audit, lease)
    assert place.work().reused == 1
    (copy,) = place.pictures("autumn")
    assert (copy["key"], copy["reused_from"]) == (copied.key, first["key"])
    assert copy["sidecar_key"] != copied.sidecar_key
    assert place.faults() == []


# From the command line.


@pytest.mark.timeout(300)
def test_the_commands_show_what_was_reused_and_verify_and_reproduce_it(tmp_path: Path) -> None:
    home, given = tmp_path / "home", {FAKE_ENGINE: "0"}
    file = tmp_path / "spring.yaml"
    file.write_text(
        "name: spring\ncheckpoint: shapes\nseeds: {count: 2}\ndefaults: {width: 64, height: 64}\nstages:\n"
        "  - {id: draft, task: text-to-image, prompt: a red circle}\n"
        "  - {id: scene, task: text-to-image, prompt: a blue star, controlnets: [\n"
        "     {checkpoint: shapes-canny, image: {stage: draft}, annotator: canny}]}\n"
    )
    other, again = tmp_path / "autumn.yaml", tmp_path / "again.yaml"
    other.write_text(file.read_text().replace("spring", "autumn"))
    again.write_text(file.read_text().replace("spring", "again") + "reuse: false\n")
    assert document("plan", other, "--home", home)["jobs"]["reused"] == 0
    document("submit", file, "--home", home)
    document("worker", "--until-idle", "--home", home, given=given)
    assert document("plan", other, "--home", home)["jobs"]["reused"] == 4
    assert document("plan", again, "--home", home)["jobs"]["reused"] == 0
    document("submit", other, "--home", home)
    document("submit", again, "--home", home)
    document("worker", "--until-idle", "--home", home, given=given)
    made, reused, remade = (document("jobs", name, "--home", home)["jobs"] for name in ("spring", "autumn", "again"))
    assert [job["reused_from"] for job in made + remade] == [None] * 8
    for first, copy in zip(made, reused, strict=True):
        assert first["image"]["url"].endswith(copy["reused_from"])
        assert copy["image"]["sha256"] == first["image"]["sha256"]
    shown = document("show", reused[-1]["id"], "--home", home)
    assert (shown["reused_from"], shown["attempts"]) == (reused[-1]["reused_from"], 1)
    assert document("reproduce", reused[-1]["id"], "--home", home, given=given)["bit_equal"] is True
    assert document("audit", "verify", "--home", home)["images"] == 12
    picture = Path(reused[-1]["image"]["url"].removeprefix("file://"))
    picture.write_bytes(picture.read_bytes() + b" ")
    (fault,) = document("audit", "verify", "--home", home, exit_code=3)["faults"]
    assert (fault["kind"], picture.as_posix().endswith(fault["subject"])) == ("object-altered", True)
