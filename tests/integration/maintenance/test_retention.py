"""Retention and erasure: due data is deleted, tombstone and audit trail stay, and a kill at any point does no harm."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Table, select, update

from sdpipeline import cli
from sdpipeline.audit import SealKey, Verification, load_key, seal, verify
from sdpipeline.db import job_control, queries, reuse
from sdpipeline.db import retention as expired
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.queue import commitment
from sdpipeline.db.tables import LOOKS, campaign_version, image, job
from sdpipeline.domain import ImageSource, JobSpec, Json, Task
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.maintenance import erasure, retention
from sdpipeline.maintenance.retention import Periods
from sdpipeline.reporting import contact_sheet, report
from sdpipeline.reporting.verify import Register, check
from sdpipeline.storage import LocalStore
from sdpipeline.storage.keys import input_key
from sdpipeline.worker.worker import Worker, WorkerLimits
from tests.factories import chains, events, job_spec, leased, published, signing_key, statuses
from tests.integration.commands import FAKE_ENGINE
from tests.integration.databases import on_sqlite
from tests.integration.engine_requests import noise

DAY_S = 86_400
ANNA = "anna@example.com"


class Killed(BaseException):
    """Stands for the death of the process: no code handles it."""


@dataclass(slots=True)
class DyingStore(LocalStore):
    """A directory whose process is killed after this many deletions."""

    root: Path
    left: int = 10**9

    def __post_init__(self) -> None:
        LocalStore.__init__(self, self.root)

    def delete(self, key: str) -> None:
        if not self.left:
            raise Killed
        self.left -= 1
        LocalStore.delete(self, key)


@dataclass(slots=True)
class Place:
    """A database and storage, with a worker that uses the fake engine."""

    audit: AuditLog
    store: LocalStore
    folder: Path
    key: SealKey
    engine: FakeEngine = field(default_factory=FakeEngine)

    def made(self, jobs: list[JobSpec], **options: Any) -> int:
        """Submit a campaign and work it to its end; return how many pictures were made or copied."""
        published(self.audit, jobs, **options)
        limits = WorkerLimits(max_batch=8, lease_ttl_s=60.0, max_pixels=10**7)
        return Worker("worker-1", self.audit, self.store, self.engine, limits, signing_key()).run().succeeded

    def forget(self, *, dry_run: bool = False, **periods: float | None) -> Json:
        done = retention.delete_expired(
            self.audit, self.store, self.seal, team="default", periods=Periods(**periods), dry_run=dry_run
        )
        return done.document()

    def erase(self, name: str = ANNA, store: LocalStore | None = None) -> erasure.Erasure:
        return erasure.erase(self.audit, store or self.store, self.seal, name, team="default")

    def seal(self) -> int:
        return seal(self.audit.database, self.store, self.key)

    def verified(self) -> Verification:
        self.seal()
        return verify(self.audit.database, self.store, self.key)

    def faults(self) -> list[str]:
        return [f"{fault.kind} {fault.detail}" for fault in self.verified().faults]

    def rows(self, table: Table) -> list[Json]:
        with self.audit.database.read() as connection:
            return [dict(row) for row in connection.execute(select(table)).mappings()]

    def edit(self, table: Table, where: Any, **values: Any) -> None:
        with self.audit.database.write() as connection:
            connection.execute(update(table).where(where).values(**values))

    def age(self, *job_ids: int, days: float = 31) -> None:
        """Set the age of these jobs and their pictures."""
        for table, of, column in ((image, image.c.job_id, "created_at"), (job, job.c.id, "finished_at")):
            self.edit(table, of.in_(job_ids), **{column: table.c[column] - days * DAY_S})

    def show(self, job_id: int, *, team: str = "default") -> Json:
        with self.audit.database.read() as connection:
            found = queries.show(connection, job_id, team=team)
        assert found is not None
        return found

    def objects(self) -> set[str]:
        return set(self.store.list("default/")) | set(self.store.list("inputs/"))

    def stored_text(self) -> str:
        """All data in the database and storage, except seals."""
        tables = [self.rows(table) for table in job.metadata.sorted_tables]
        files = [
            path.read_bytes().decode("latin-1") for path in sorted((self.folder / "s").rglob("*")) if path.is_file()
        ]
        return json.dumps(tables, default=str) + "".join(files)


@pytest.fixture
def place(audit: AuditLog, tmp_path: Path) -> Place:
    return Place(audit, LocalStore(tmp_path / "s"), tmp_path, load_key(tmp_path / "key.pem", create=True))


def of(subject: str, *jobs: JobSpec) -> Iterator[JobSpec]:
    for spec in jobs:
        yield replace(spec, subject=subject)


def test_pictures_older_than_their_days_are_deleted_and_leave_a_tombstone(place: Place) -> None:
    place.made(list(chains(3, "draft", "scene")))
    before = place.objects()
    place.age(1, 2)
    assert place.forget(pictures_days=30, dry_run=True) == {"pictures": 2, "prompts": 0, "sources": 0, "editions": 0}
    assert place.objects() == before
    assert place.forget(pictures_days=30) == {"pictures": 2, "prompts": 0, "sources": 0, "editions": 0}
    assert len(before - place.objects()) == 4
    assert place.forget(pictures_days=30)["pictures"] == 0
    found = place.verified()
    assert (found.faults, found.deleted, found.images) == ([], 2, 4)
    shown = place.show(1)
    assert (shown["status"], shown["image"]) == ("succeeded", None)
    assert shown["image_deleted_at"]
    assert shown["pictures"][0]["sha256"]


def test_without_days_nothing_is_ever_due(place: Place) -> None:
    place.made(list(chains(1)))
    place.age(1, days=10_000)
    assert place.forget() == {"pictures": 0, "prompts": 0, "sources": 0, "editions": 0}


def test_a_picture_that_a_job_still_needs_is_left(place: Place) -> None:
    draft = job_spec("a")
    place.made([draft])
    place.age(1)
    published(place.audit, [draft, job_spec("a", stage="scene", parents=(draft,))])
    assert place.forget(pictures_days=30)["pictures"] == 0


def test_prompts_of_old_jobs_go_with_their_salt_and_their_campaign_file(place: Place) -> None:
    place.made([job_spec("a", prompt="a secret circle")], source="prompt: a secret circle")
    place.made([job_spec("b", prompt="a public square")], source="prompt: a public square")
    place.edit(campaign_version, campaign_version.c.id > 0, created_at=0.0)
    place.age(1)
    assert place.forget(pictures_days=30, prompts_days=30) == {"pictures": 1, "prompts": 1, "sources": 1, "editions": 0}
    assert "secret circle" not in place.stored_text()
    assert "public square" in place.stored_text()
    assert (place.show(1)["request"]["checkpoint"]["alias"], place.show(1)["row"]) == ("shapes", "a")
    found = place.verified()
    assert (found.faults, found.erased) == ([], 1)
    assert place.forget(pictures_days=30, prompts_days=30) == {"pictures": 0, "prompts": 0, "sources": 0, "editions": 0}


def test_a_run_that_is_killed_between_objects_and_rows_is_taken_up_by_the_next(place: Place) -> None:
    place.made(list(chains(3)))
    place.age(1, 2, 3)
    dying = DyingStore(place.folder / "s", left=3)
    with pytest.raises(Killed):
        retention.delete_expired(place.audit, dying, place.seal, team="default", periods=Periods(pictures_days=30))
    assert all(row["deleted_at"] is None for row in place.rows(image))
    assert place.forget(pictures_days=30)["pictures"] == 3
    assert place.objects() == set()
    assert place.faults() == []


def test_a_deleted_picture_is_never_copied_but_made_again(place: Place) -> None:
    place.made([job_spec("a")])
    place.age(1)
    place.forget(pictures_days=30)
    with place.audit.database.read() as connection:
        assert not reuse.known(connection, team="default", fingerprints=[job_spec("a").fingerprint])
    assert place.made([job_spec("a")], name="autumn") == 1
    assert [row["reused_from"] for row in place.rows(image)] == [None, None]
    assert place.faults() == []


def test_a_job_whose_picture_was_deleted_is_not_made_again(place: Place) -> None:
    place.made([job_spec("a")])
    place.age(1)
    place.forget(pictures_days=30, prompts_days=30)
    assert published(place.audit, [job_spec("a")]).added == 0
    assert published(place.audit, [job_spec("a", prompt="another")]).added == 1
    assert statuses(place.audit.database) == ["ready"]
    assert place.made([job_spec("a")]) == 0
    assert statuses(place.audit.database) == ["succeeded"]
    assert place.faults() == []


def test_nobody_can_retry_a_job_whose_prompt_is_gone(place: Place) -> None:
    published(place.audit, [job_spec("a")])
    with place.audit.transaction() as tx:
        job_control.cancel(tx, campaign_id=1)
    place.age(1)
    assert place.forget(pictures_days=30, prompts_days=30)["prompts"] == 1
    with place.audit.transaction() as tx:
        assert job_control.retry(tx, campaign_id=1, statuses=["cancelled"]) == 0
    assert published(place.audit, [job_spec("a")]).added == 0
    assert place.faults() == []


# Data of one subject.


def test_erasing_a_subject_leaves_nothing_of_it_and_all_of_others(place: Place) -> None:
    own = list(of(ANNA, job_spec(ANNA, prompt=f"a portrait of {ANNA}"), job_spec("x", prompt=f"{ANNA} again")))
    other = list(of("bert", job_spec("bert", prompt="a portrait of bert")))
    place.made([*own, *other], source=f"variables: {ANNA}")
    kept = {row["key"] for row in place.rows(image) if row["job_id"] == 3}
    done = place.erase()
    assert (done.jobs, done.pictures, done.sources) == (2, 2, 1)
    assert ANNA not in place.stored_text()
    assert {key for key in place.objects() if key.endswith(".png")} == kept
    found = place.verified()
    assert (found.faults, found.deleted, found.erased) == ([], 2, 2)
    assert (place.show(1)["variables"], place.show(1)["row"], place.show(3)["row"]) == ({}, "", "bert")
    assert place.show(1)["erased_at"]


def test_the_receipt_shows_whose_data_it_was_and_the_log_what_was_erased(place: Place) -> None:
    place.made(list(of(ANNA, job_spec("a"))))
    (made,) = (event["commitment"] for event in events(place.audit.database) if event["event"] == "job.succeeded")
    done = place.erase()
    (told,) = (event for event in events(place.audit.database) if event["event"] == "jobs.erased")
    assert told["jobs"] == [[1, made]]
    assert told["subject_commitment"] == commitment(done.subject.salt, {"subject": ANNA})
    assert done.subject.salt not in place.stored_text()


def test_nothing_is_left_by_which_an_erased_picture_is_known_again(place: Place) -> None:
    place.made(list(of(ANNA, job_spec("a", prompt="a portrait"))))
    (made,) = place.rows(image)
    (told,) = (event["image"] for event in events(place.audit.database) if event["event"] == "job.succeeded")
    assert made["scores"]["perceptual_hash"] not in json.dumps(told)
    assert place.faults() == []
    data = place.store.get(made["key"])
    place.erase()
    (left,) = place.rows(image)
    assert (left["scores"], [left[name] for name in LOOKS]) == ({}, [None] * 4)
    assert made["scores"]["perceptual_hash"] not in place.stored_text()
    register = Register(place.audit.database, place.store, "default")
    assert check("hers", data, trust_anchors="", register=register).match is None
    assert place.faults() == []


def test_scores_that_the_release_before_told_of_go_too_and_are_no_fault(place: Place) -> None:
    place.made([job_spec("a")])
    place.edit(job, job.c.id == 1, subject=ANNA)
    assert place.erase().pictures == 1
    assert place.rows(image)[0]["scores"] == {}
    assert place.faults() == []


def test_erasing_again_finds_nothing(place: Place) -> None:
    place.made(list(of(ANNA, job_spec("a"))))
    place.erase()
    again = place.erase()
    assert (again.jobs, again.pictures, again.objects) == (0, 0, 0)


def test_an_erasure_that_is_killed_is_taken_up_by_the_next(place: Place) -> None:
    place.made(list(of(ANNA, *chains(3, "draft", "scene"))))
    with pytest.raises(Killed):
        place.erase(store=DyingStore(place.folder / "s", left=5))
    assert place.erase().jobs == 6
    assert place.objects() == set()
    assert place.faults() == []


def test_what_is_not_made_yet_of_a_subject_is_cancelled(place: Place) -> None:
    published(place.audit, of(ANNA, *chains(2, "draft", "scene")))
    leased(place.audit, limit=1)
    done = place.erase()
    assert (done.cancelled, done.jobs) == (4, 4)
    assert set(statuses(place.audit.database)) == {"cancelled"}
    assert place.faults() == []


def test_an_input_goes_with_the_last_subject_that_used_it(place: Place) -> None:
    def edited(row: str, subject: str) -> JobSpec:
        source = ImageSource(digest=digest)
        return replace(job_spec(row, task=Task.IMAGE_TO_IMAGE, image=source, strength=0.5), subject=subject)

    file = io.BytesIO()
    Image.fromarray(noise()).save(file, "PNG")
    data = file.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    place.store.put(input_key(digest), data, content_type="image/png")
    place.made([edited("a", ANNA), edited("b", "bert")])
    assert place.erase().inputs == 0
    assert place.store.head(input_key(digest)) is not None
    assert place.erase("bert").inputs == 1
    assert place.store.head(input_key(digest)) is None
    assert digest not in json.dumps([e for e in events(place.audit.database) if e["event"] == "inputs.deleted"])
    assert place.faults() == []


def test_one_subjects_picture_is_never_delivered_to_another(place: Place) -> None:
    place.made([*of(ANNA, job_spec("a", prompt="same"))])
    place.made([*of("bert", job_spec("b", prompt="same"))], name="autumn")
    assert [row["reused_from"] for row in place.rows(image)] == [None, None]


def test_what_attempts_left_in_storage_is_erased_too(place: Place) -> None:
    place.made(list(of(ANNA, job_spec("a"))))
    (row,) = place.rows(image)
    place.store.put(row["key"].rpartition("/")[0] + "/orphan.png", b"of a dead worker", content_type="image/png")
    place.erase()
    assert place.objects() == set()


def test_submitting_the_same_again_brings_nothing_back(place: Place) -> None:
    jobs = list(of(ANNA, job_spec("a")))
    place.made(jobs)
    place.erase()
    assert published(place.audit, jobs).added == 0
    assert ANNA not in place.stored_text()
    assert place.faults() == []


def test_a_submit_that_only_says_whose_jobs_they_are_makes_nothing_again(place: Place) -> None:
    place.made([job_spec("a")], source="one file")
    done = published(place.audit, of(ANNA, job_spec("a")), source="one file")
    assert (done.added, statuses(place.audit.database, "subject")) == (0, [ANNA])
    assert place.erase().jobs == 1


# Findings of an audit.


@on_sqlite
def test_an_audit_finds_what_came_back_and_what_went_without_a_word(place: Place) -> None:
    place.made([*of(ANNA, job_spec("a")), job_spec("b"), job_spec("c")])
    before = place.rows(job)[0]
    key = next(row["key"] for row in place.rows(image) if row["job_id"] == 1)
    place.erase()
    place.store.put(key, b"back again", content_type="image/png")
    assert place.faults() == ["object-not-deleted the audit log says that it was deleted, but it is still in storage"]
    place.store.delete(key)
    erased = place.rows(job)[0]
    back = {name: before[name] for name in ("request", "salt", "erased_at", "row_key")}
    place.edit(job, job.c.id == 1, **back)
    assert "job-altered its request was erased, but is still stored" in place.faults()
    place.edit(job, job.c.id == 1, **{name: erased[name] for name in back})
    place.edit(job, job.c.id == 1, request={"erased": "0" * 64})
    assert "job-altered its commitment is not to the request that was erased" in place.faults()
    place.edit(job, job.c.id == 1, request=erased["request"])
    place.edit(image, image.c.job_id == 1, deleted_at=None)
    assert "image-altered it was deleted, but its row does not say so" in place.faults()
    place.edit(image, image.c.job_id == 1, deleted_at=1.0)
    place.edit(image, image.c.job_id == 2, deleted_at=1.0)
    assert "image-altered it is missing, and no deletion is recorded" in place.faults()
    place.edit(image, image.c.job_id == 2, deleted_at=None)
    place.edit(job, job.c.id == 3, erased_at=1.0, salt="")
    assert "job-altered its request is missing, and no erasure is recorded" in place.faults()


def test_a_picture_under_a_key_that_another_job_has_too_is_left(place: Place) -> None:
    place.made([job_spec("a")])
    with place.audit.database.write() as connection:
        connection.execute(image.update().where(image.c.job_id == 1).values(created_at=0.0))
    published(place.audit, [job_spec("a"), job_spec("b")])
    row = place.rows(image)[0]
    with place.audit.database.write() as connection:
        connection.execute(image.insert().values(**row | {"job_id": 2, "created_at": 1e12}))
    assert place.forget(pictures_days=30)["pictures"] == 1
    assert place.store.head(row["key"]) is not None


def test_forgetting_works_in_bounded_transactions(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(erasure, "BATCH", 2)
    place.made(list(of(ANNA, *chains(5))))
    place.age(1, 2, 3, 4, 5)
    place.forget(pictures_days=30)
    told = [event for event in events(place.audit.database) if event["event"] == "pictures.deleted"]
    assert [len(event["pictures"]) for event in told] == [2, 2, 1]
    place.erase()
    told = [event for event in events(place.audit.database) if event["event"] == "jobs.erased"]
    assert [len(event["jobs"]) for event in told] == [2, 2, 1]
    assert place.faults() == []


def test_what_prefect_keeps_names_no_subject_and_shows_no_picture_of_one(place: Place) -> None:
    place.engine = FakeEngine(poison=["bad"])
    hers = of(ANNA, job_spec(ANNA), job_spec(f"{ANNA} too", prompt="bad"))
    place.made([*hers, job_spec("nobody's", seed=1), job_spec("nobody's too", prompt="bad", seed=1)])
    drawn: contact_sheet.Thumbnails = {}
    assert contact_sheet.draw(place.audit.database, place.store, 1, max_bytes=200_000, kept=drawn)
    assert set(drawn) == {row["key"] for row in place.rows(image) if row["job_id"] == 3}
    with place.audit.database.read() as connection:
        assert [each["row"] for each in queries.failures(connection, 1, 100)] == ["nobody's too"]
    told = report.closing_report(place.audit.database, place.store, 1)
    assert "2 jobs failed, 1 of them here" in told
    assert ANNA not in told


def test_an_erasure_belongs_to_one_team(place: Place) -> None:
    place.made(list(of(ANNA, job_spec("a"))), team="other")
    assert place.erase().jobs == 0
    assert expired.ERASED not in place.show(1, team="other")["request"]


# From the command line.

CAMPAIGN = """
name: portraits
checkpoint: shapes
subject: "{{ customer }}"
variables: {rows: {file: people.csv, key: customer}}
defaults: {width: 64, height: 64, num_inference_steps: 2}
stages: [{id: draft, task: text-to-image, prompt: "a circle for {{ customer }}"}]
"""


def test_a_subject_is_erased_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> Json:
        capsys.readouterr()
        assert cli.run([*words, "--json"]) == 0
        found: Json = json.loads(capsys.readouterr().out)
        return found

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FAKE_ENGINE, "0")
    (tmp_path / "people.csv").write_text(f"customer\n{ANNA}\nbert\n")
    (tmp_path / "portraits.yaml").write_text(CAMPAIGN)
    assert said("submit", "portraits.yaml")["added"] == 2
    assert said("worker", "--until-idle")["succeeded"] == 2
    assert said("erase", "--subject", ANNA, "--dry-run")["pictures"] == 1
    done = said("erase", "--subject", ANNA)
    assert (done["jobs"], done["pictures"]) == (1, 1)
    counts = said("audit", "verify")
    assert (counts["ok"], counts["erased"], counts["deleted"], counts["unsealed"]) == (True, 1, 1, 0)
    assert said("show", "1")["erased_at"]
    assert said("erase", "--subject", ANNA)["jobs"] == 0
    monkeypatch.setenv("SDP_RETENTION__PICTURES_DAYS", "0")
    assert said("retention", "--dry-run")["pictures"] == 1
    assert said("retention")["pictures"] == 1
    assert said("audit", "verify")["deleted"] == 2
    assert cli.run(["reproduce", "1"]) == 2
    assert "its picture was deleted" in capsys.readouterr().err


def test_prompts_are_not_forgotten_before_pictures_that_carry_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDP_RETENTION__PROMPTS_DAYS", "30")
    assert cli.run(["retention"]) == 2
    assert "SDP_RETENTION__PROMPTS_DAYS: found '30': pictures contain their prompts" in capsys.readouterr().err
    monkeypatch.setenv("SDP_RETENTION__PICTURES_DAYS", "31")
    assert cli.run(["retention"]) == 2
