"""Archived editions: exported, sealed, deleted from the tables, and still readable."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sdpipeline import cli
from sdpipeline.archives import archiver, contents
from sdpipeline.audit import load_key, verify
from sdpipeline.db import archives
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.tables import archive as archive_table
from sdpipeline.db.tables import attempt, image, job, job_parent
from sdpipeline.domain import JobSpec, Json
from sdpipeline.errors import SealOverdueError
from sdpipeline.reporting.verify import Match, Register, check
from sdpipeline.storage import LocalStore
from tests.factories import chains, events, job_spec
from tests.integration.commands import FAKE_ENGINE
from tests.integration.conftest import Bucket
from tests.integration.databases import on_sqlite
from tests.integration.maintenance.test_retention import ANNA, DyingStore, Killed, Place, of

MONDAY, TUESDAY = "monday", "tuesday"


def edition_of(name: str, jobs: Iterable[JobSpec]) -> list[JobSpec]:
    """The same jobs as an edition of a campaign; parents are renamed to their identities in the edition."""
    found: list[JobSpec] = []
    names: dict[str, str] = {}
    for spec in jobs:
        parents = tuple((stage, names[identity]) for stage, identity in spec.parents)
        found.append(replace(spec, edition=name, parents=parents))
        names[spec.identity] = found[-1].identity
    return found


@dataclass(slots=True)
class Editions(Place):
    """A campaign with an edition of Monday (two chains of two, one about a data subject) and one of Tuesday."""

    def archive(self, *, days: float = 30, dry_run: bool = False) -> int:
        return archiver.archive(self.audit, self.store, self.seal, team="default", days=days, dry_run=dry_run)

    def archived_job(self, job_id: int) -> Json | None:
        with self.audit.database.read() as connection:
            return contents.show(connection, self.store, job_id, team="default")

    def ids(self) -> list[int]:
        return sorted(row["id"] for row in self.rows(job))


@pytest.fixture
def place(audit: AuditLog, tmp_path: Path) -> Editions:
    made = Editions(audit, LocalStore(tmp_path / "s"), tmp_path, load_key(tmp_path / "key.pem", create=True))
    mine = of(ANNA, *chains(1, "draft", "scene"))
    made.made(edition_of(MONDAY, [*mine, *list(chains(2, "draft", "scene"))[2:]]))
    made.age(1, 2, 3, 4)
    made.made(edition_of(TUESDAY, list(chains(2, "draft", "scene"))[2:]))
    return made


def test_a_closed_edition_leaves_the_tables_and_can_still_be_shown_and_verified(place: Editions) -> None:
    before = {job_id: place.show(job_id) for job_id in (1, 2, 3, 4)}
    assert place.archive(dry_run=True) == 1
    assert place.ids() == [1, 2, 3, 4, 5, 6]
    assert place.archive() == 1
    assert verify(place.audit.database, place.store, place.key).unsealed == 0
    assert place.ids() == [5, 6]
    assert {row["job_id"] for table in (attempt, image, job_parent) for row in place.rows(table)} == {5, 6}
    found = place.verified()
    assert (found.faults, found.images, found.deleted) == ([], 6, 0)
    for job_id, shown in before.items():
        again = place.archived_job(job_id)
        assert again is not None
        same = set(shown) - {"children", "history", "pictures"}
        assert {name: again[name] for name in same} == {name: shown[name] for name in same}
    assert place.archived_job(5) is None
    assert place.archive() == 0


def test_the_archive_holds_nothing_private_and_refers_to_events(place: Editions) -> None:
    place.archive()
    (row,) = place.rows(archive_table)
    text = gzip.decompress(place.store.get(row["key"])).decode()
    assert row["key"] == "archive/default/spring/monday.jsonl.gz"
    assert ANNA not in text
    assert "a picture of" not in text
    line = json.loads(text.splitlines()[1])
    told = {(e["writer"], e["seq"]) for e in events(place.audit.database) if e["subject"] == "job:1"}
    assert {tuple(each) for each in line["events"]} == told


def test_the_present_version_and_what_is_not_old_or_not_ended_stay(place: Editions) -> None:
    place.age(5, 6)
    assert place.archive(days=32) == 0
    place.edit(job, job.c.id == 4, status="ready")
    assert place.archive() == 0
    place.edit(job, job.c.id == 4, status="succeeded")
    assert place.archive() == 1
    assert place.ids() == [5, 6]


def test_an_edition_that_changes_while_it_is_read_is_left_for_the_next_run(
    place: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = contents.store_edition

    def and_meanwhile(*given: object) -> Json:
        stored = write(*given)  # type: ignore[arg-type]
        place.erase()
        return stored

    monkeypatch.setattr(contents, "store_edition", and_meanwhile)
    assert place.archive() == 0
    monkeypatch.undo()
    assert place.archive() == 1
    assert place.faults() == []


def test_a_run_that_is_killed_before_the_tables_are_emptied_is_taken_up(
    place: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> int:
        raise Killed

    monkeypatch.setattr(archives, "drop", kill)
    with pytest.raises(Killed):
        place.archive()
    monkeypatch.undo()
    assert place.ids() == [1, 2, 3, 4, 5, 6]
    assert place.faults() == []
    place.forget()
    assert place.ids() == [5, 6]
    assert place.faults() == []


def test_an_edition_stays_in_the_tables_until_it_is_sealed_whoever_takes_it_up(
    place: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overdue(_: Place) -> int:
        raise SealOverdueError

    monkeypatch.setattr(Place, "seal", overdue)
    for forget in (place.archive, place.forget, place.erase):
        with pytest.raises(SealOverdueError):
            forget()
        assert place.ids() == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    place.forget()
    assert place.ids() == [5, 6]
    assert place.faults() == []


def test_tables_are_emptied_in_bounded_transactions(place: Editions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiver, "DROPPED", 1)
    assert place.archive() == 1
    assert place.ids() == [5, 6]


def test_an_archive_knows_how_a_subjects_picture_looks_until_it_is_erased(place: Editions) -> None:
    hers = next(row for row in place.rows(image) if row["job_id"] == 1)
    data = place.store.get(hers["key"])

    def known() -> Match | None:
        register = Register(place.audit.database, place.store, "default")
        return check("hers", data, trust_anchors="", register=register).match

    place.archive()
    (row,) = place.rows(archive_table)
    assert hers["scores"]["perceptual_hash"] not in gzip.decompress(place.store.get(row["key"])).decode()
    match = known()
    assert match is not None
    assert match.picture.perceptual_hash == hers["scores"]["perceptual_hash"]
    place.erase()
    assert known() is None


def test_a_subject_is_erased_from_the_archive_too(place: Editions) -> None:
    place.archive()
    done = place.erase()
    assert (done.jobs, done.pictures) == (2, 2)
    hidden = b"".join(gzip.decompress(place.store.get(key)) for key in place.store.list("archive/")).decode()
    assert ANNA not in hidden + place.stored_text()
    assert len(list(place.store.list("archive/"))) == 2
    found = place.verified()
    assert (found.faults, found.deleted, found.erased) == ([], 2, 2)
    gone, kept = place.archived_job(1), place.archived_job(3)
    assert gone is not None
    assert kept is not None
    assert (gone["request"], gone["image"], gone["erased"]) == ({}, None, True)
    assert kept["request"]["prompt"] == "a picture of row-1"
    assert place.erase().jobs == 0


def test_an_erasure_that_is_killed_in_the_archive_is_taken_up(place: Editions) -> None:
    place.archive()
    for left in (1, 3):
        with pytest.raises(Killed):
            place.erase(store=DyingStore(place.folder / "s", left=left))
    place.erase()
    assert len(list(place.store.list("archive/"))) == 2
    assert place.faults() == []


def test_pictures_and_prompts_of_archives_go_after_their_days(place: Editions) -> None:
    place.archive()
    due = {"pictures": 4, "prompts": 4, "sources": 0, "editions": 0}
    assert place.forget(pictures_days=30, prompts_days=30, dry_run=True) == due
    done = place.forget(pictures_days=30, prompts_days=30)
    assert (done["pictures"], done["prompts"]) == (4, 4)
    assert [key for key in place.store.list("archive/") if "private" in key] == []
    found = place.verified()
    assert (found.faults, found.deleted, found.erased) == ([], 4, 4)
    assert place.forget(pictures_days=30, prompts_days=30)["pictures"] == 0


@on_sqlite
def test_an_audit_finds_an_archive_that_was_altered_or_is_missing(place: Editions) -> None:
    place.archive()
    (row,) = place.rows(archive_table)
    files = {name: place.folder / "s" / row[name] for name in ("key", "private_key")}
    kept = {name: path.read_bytes() for name, path in files.items()}
    for name, path in files.items():
        path.write_bytes(gzip.compress(b"{}\n"))
        assert [fault.split()[0] for fault in place.faults()] == ["archive-altered"]
        path.unlink()
        assert [fault.split()[0] for fault in place.faults()] == ["archive-missing"]
        path.write_bytes(kept[name])
    assert place.faults() == []
    place.edit(archive_table, archive_table.c.campaign_id == 1, edition="sunday")
    assert {fault.split()[0] for fault in place.faults()} >= {"archive-altered", "archive-missing"}
    place.edit(archive_table, archive_table.c.campaign_id == 1, edition=MONDAY)
    (place.folder / "s" / place.archived_job(3)["image"]["url"].partition("/s/")[2]).unlink()  # type: ignore[index]
    assert [fault.split()[0] for fault in place.faults()] == ["object-missing"]


@on_sqlite
def test_an_audit_finds_a_private_part_that_tells_another_story(place: Editions) -> None:
    place.archive()
    (row,) = place.rows(archive_table)
    lines = list(contents.private(place.store, row))
    lines[2]["request"]["prompt"] = "another"
    with place.audit.database.write() as connection:
        archives.change(connection, row, **contents.store_private(place.store, row | {"team": "t", "name": "n"}, lines))
    assert [fault.split(",")[0] for fault in place.faults()] == [
        "job-altered its request does not hash to its fingerprint",
        "job-altered its commitment is not to the request in its archive",
    ]


@on_sqlite
def test_the_archive_is_under_object_lock_and_its_private_part_is_not(
    audit: AuditLog, locked_bucket: Bucket, tmp_path: Path
) -> None:
    store = locked_bucket.store(object_lock_mode="GOVERNANCE", object_lock_days=1)
    made = Editions(audit, store, tmp_path, load_key(tmp_path / "key.pem", create=True))  # type: ignore[arg-type]
    made.made(edition_of(MONDAY, of(ANNA, job_spec("a"))))
    made.age(1)
    made.made(edition_of(TUESDAY, [job_spec("b")]))
    assert made.archive() == 1
    assert made.erase().jobs == 1
    (row,) = made.rows(archive_table)
    held = {key: store.head(key) for key in store.list("archive/")}
    assert {key: bool(stored and stored.retained_until) for key, stored in held.items()} == {
        row["key"]: True,
        row["private_key"]: False,
    }
    assert [len(store.versions(key)) for key in held] == [1, 1]
    made.seal()
    assert verify(audit.database, store, made.key).faults == []


CAMPAIGN = """
name: nightly
checkpoint: shapes
variables: {colour: [red, blue]}
defaults: {width: 64, height: 64, num_inference_steps: 2}
stages: [{id: draft, task: text-to-image, prompt: "a {{ colour }} circle on {{ edition }}"}]
"""


def test_an_edition_is_archived_shown_and_made_again_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> Json:
        capsys.readouterr()
        assert cli.run([*words, "--json"]) == 0
        found: Json = json.loads(capsys.readouterr().out)
        return found

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FAKE_ENGINE, "0")
    (tmp_path / "nightly.yaml").write_text(CAMPAIGN)
    for name in (MONDAY, TUESDAY):
        assert said("submit", "nightly.yaml", "--edition", name)["added"] == 2
        assert said("worker", "--until-idle")["succeeded"] == 2
    monkeypatch.setenv("SDP_RETENTION__EDITIONS_DAYS", "0")
    assert said("retention")["editions"] == 1
    assert said("retention")["editions"] == 0
    counts = said("audit", "verify")
    assert (counts["ok"], counts["images"], counts["unsealed"]) == (True, 4, 0)
    assert said("show", "1")["archive"] == "archive/default/nightly/monday.jsonl.gz"
    assert said("reproduce", "1")["bit_equal"] is True
    assert cli.run(["submit", "nightly.yaml", "--edition", MONDAY]) == 2
    assert "edition 'monday' is archived and cannot be made again" in capsys.readouterr().err
