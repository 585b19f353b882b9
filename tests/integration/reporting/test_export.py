"""Exports from a finished home, from a bucket, and from damaged storage."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdpipeline import cli
from tests.integration.commands import FAKE_ENGINE, document, sdpipeline
from tests.integration.conftest import Bucket

FINALS = [f"C-{number:03}-1.png" for number in range(1, 9)]
CAMPAIGN = """\
name: spring
checkpoint: shapes
variables: {colour: [red, blue], note: ["a/b", "a b"]}
defaults: {width: 64, height: 64}
stages: [{id: only, task: text-to-image, prompt: "a {{ colour }} circle, {{ note }}"}]
output: {format: jpeg}
"""


@dataclass(frozen=True, slots=True)
class Desk:
    """The command line in this process, and a folder to export to."""

    home: Path
    to: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: object, campaign: str = "demo", code: int = 0) -> Any:
        """The JSON document of one export."""
        words = ["export", campaign, "--to", self.to, "--home", self.home, "--json", *arguments]
        done = cli.run([str(word) for word in words])
        said = self.capsys.readouterr()
        assert done == code, said
        return json.loads(said.out)

    def refused(self, *arguments: object) -> list[str]:
        """Error output of an export that must be refused, with nothing written."""
        before = list(self.to.rglob("*"))
        errors = self.run(*arguments, code=2)["errors"]
        assert list(self.to.rglob("*")) == before
        return [f"{error['key']}: {error['message']} ({error['fix']})" for error in errors]

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.to).as_posix() for path in self.to.rglob("*") if path.is_file())

    def manifest(self) -> list[dict[str, str]]:
        with (self.to / "manifest.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def desk(demo_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(demo_home, tmp_path / "out", capsys)


@pytest.fixture
def damaged(desk: Desk, tmp_path: Path) -> Desk:
    """A copy of that home for manual changes."""
    return Desk(Path(shutil.copytree(desk.home, tmp_path / "home")), desk.to, desk.capsys)


def _stored(desk: Desk, name: str) -> Path:
    """The stored object of an exported name."""
    sha256 = next(row["sha256"] for row in desk.manifest() if row["file"] == name)
    return next((desk.home / "storage").rglob(f"{sha256}.png"))


def test_the_last_stages_pictures_are_copied_unchanged_under_readable_names(desk: Desk) -> None:
    done = desk.run()
    assert (done["copied"], done["unchanged"], done["without_picture"], done["faults"]) == (8, 0, 0, [])
    assert desk.files() == [*FINALS, "manifest.csv"]
    for row in desk.manifest():
        data = (desk.to / row["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), str(len(data))) == (row["sha256"], row["size_bytes"])
        assert data == _stored(desk, row["file"]).read_bytes()


def test_exported_files_have_the_modes_of_the_users_own_umask(desk: Desk) -> None:
    before = os.umask(0o027)
    try:
        desk.run()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in desk.to.rglob("*") if path.is_file()} == {0o640}


def test_the_manifest_says_of_every_picture_what_it_is(desk: Desk) -> None:
    desk.run()
    row = desk.manifest()[0]
    assert row | {"job": "", "sha256": "", "size_bytes": "", "url": ""} == {
        "job": "",
        "stage": "final",
        "row": "C-001",
        "seed": "1",
        "edition": "",
        "file": "C-001-1.png",
        "sha256": "",
        "size_bytes": "",
        "width": "512",
        "height": "512",
        "url": "",
        "checkpoint": "shapes-upscale",
        "prompt": "a red circle on a blue background",
    }
    shown = document("show", row["job"], "--home", desk.home)
    assert (row["sha256"], row["url"]) == (shown["image"]["sha256"], shown["image"]["url"])


def test_a_template_may_use_an_earlier_stages_variables_and_the_keys_column(desk: Desk) -> None:
    desk.run("--name", "{{ ground }}/{{ sku }} {{ shape|title }}")
    assert "white/C-001 Circle.png" in desk.files()
    assert len(desk.manifest()) == 8


def test_several_stages_are_exported_into_folders_of_their_own(desk: Desk) -> None:
    assert desk.run("--stage", "draft", "--stage", "final")["copied"] == 16
    assert {"draft/C-001-1.png", "final/C-001-1.png"} <= set(desk.files())


def test_again_copies_only_what_is_missing_or_different_and_deletes_nothing(desk: Desk) -> None:
    desk.run()
    before = {name: (desk.to / name).read_bytes() for name in FINALS}
    (desk.to / FINALS[0]).unlink()
    (desk.to / FINALS[1]).write_bytes(before[FINALS[1]][:-1] + b"x")
    (desk.to / FINALS[2]).write_bytes(b"")
    (desk.to / "mine.txt").write_text("mine")
    done = desk.run()
    assert (done["copied"], done["unchanged"]) == (3, 5)
    assert {name: (desk.to / name).read_bytes() for name in FINALS} == before
    assert desk.files() == [*FINALS, "manifest.csv", "mine.txt"]


def test_a_missing_and_an_altered_object_are_named_and_the_rest_is_exported(damaged: Desk) -> None:
    damaged.run()
    missing, altered = _stored(damaged, FINALS[0]), _stored(damaged, FINALS[1])
    missing.unlink()
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    shutil.rmtree(damaged.to)
    done = damaged.run(code=3)
    assert [(fault["file"], fault["detail"].split(":")[0]) for fault in done["faults"]] == [
        (FINALS[0], "is missing in storage"),
        (FINALS[1], "was altered in storage"),
    ]
    assert damaged.files() == [*FINALS[2:], "manifest.csv"]
    assert [row["file"] for row in damaged.manifest()] == FINALS[2:]


def test_people_are_told_of_a_fault_on_stderr(damaged: Desk) -> None:
    damaged.run()
    _stored(damaged, FINALS[0]).unlink()
    shutil.rmtree(damaged.to)
    assert cli.run(["export", "demo", "--to", str(damaged.to), "--home", str(damaged.home)]) == 3
    said = damaged.capsys.readouterr()
    assert f"7 pictures copied to {damaged.to}, 0 existed already" in said.out
    assert "C-001-1.png: job " in said.err
    assert "is missing in storage" in said.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--name", "{{ sku }}", "--stage", "draft", "--stage", "scene"], "would both be 'C-001.png' (add {{ stage }}"),
        (["--name", "{{ seed }}"], "would both be '1.png' (add {{ sku }} or {{ colour }})"),
        (["--name", "{{ sku }}{{ color }}"], "has no variable 'color' (did you mean 'colour'?)"),
        (["--name", "../{{ sku }}"], "'../C-001' is not a path inside the folder"),
        (["--name", "{{ sku }}: {{ seed }}"], "holds the character :"),
        (["--name", "{{ sku.x }}"], "--name: reaching into a value with a dot is not allowed"),
        (["--stage", "finals"], "--stage: no stage 'finals' (did you mean 'final'?)"),
        (["--edition", "2026-11-25"], "--edition: no edition '2026-11-25'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    desk: Desk, arguments: list[str], expected: str
) -> None:
    (said,) = desk.refused(*arguments)
    assert expected in said
    assert not desk.to.exists()


def test_a_folder_is_not_left_through_a_link_in_it(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    desk.to.mkdir()
    (desk.to / "final").symlink_to(tmp_path / "elsewhere")
    (said,) = desk.refused("--name", "{{ stage }}/{{ sku }}")
    assert "is a link that leads out of the folder" in said
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_in_a_pictures_place_is_replaced_and_not_followed(desk: Desk, tmp_path: Path) -> None:
    desk.run()
    same, other = (desk.to / FINALS[0]).rename(tmp_path / "same.png"), tmp_path / "other.png"
    other.write_bytes(b"mine")
    (desk.to / FINALS[1]).unlink()
    (desk.to / FINALS[0]).symlink_to(same)
    (desk.to / FINALS[1]).symlink_to(other)
    assert desk.run()["copied"] == 2
    assert other.read_bytes() == b"mine"
    assert not any((desk.to / name).is_symlink() for name in FINALS)


def test_a_table_of_someone_elses_is_not_overwritten(desk: Desk) -> None:
    desk.to.mkdir()
    (desk.to / "manifest.csv").write_text("name,price\n")
    (said,) = desk.refused()
    assert "is not from an export and would be lost" in said


def test_a_file_in_the_folders_place_is_refused(desk: Desk) -> None:
    desk.to.write_text("mine")
    assert "is not a folder" in desk.refused()[0]


def test_a_refusal_is_one_line_on_stderr(desk: Desk) -> None:
    assert cli.run(["export", "demo", "--to", str(desk.to), "--home", str(desk.home), "--name", "x"]) == 2
    said = desk.capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_bucket_is_exported_whole_with_editions_apart_and_lost_characters_told_apart(
    moto_bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "SDP_STORAGE_URL": f"s3://{moto_bucket.name}/production",
        "SDP_S3__ENDPOINT_URL": moto_bucket.endpoint_url,
        "SDP_S3__ADDRESSING_STYLE": "path",
        "SDP_HOME": str(tmp_path / "home"),
        FAKE_ENGINE: "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    desk = Desk(tmp_path / "home", tmp_path / "out", capsys)
    (tmp_path / "spring.yaml").write_text(CAMPAIGN)
    for edition in ("monday", "tuesday"):
        assert cli.run(["submit", str(tmp_path / "spring.yaml"), "--edition", edition]) == 0
    capsys.readouterr()
    waiting = desk.run(campaign="spring")
    assert (waiting["copied"], waiting["without_picture"]) == (0, 8)
    assert sdpipeline("worker", "--until-idle", **settings).returncode == 0
    assert desk.run(campaign="spring")["copied"] == 8
    assert [name.rpartition("~")[0] for name in desk.files() if name != "manifest.csv"] == [
        f"{edition}/{colour}-a-b-0" for edition in ("monday", "tuesday") for colour in ("blue", "blue", "red", "red")
    ]
    for row in desk.manifest():
        assert hashlib.sha256((desk.to / row["file"]).read_bytes()).hexdigest() == row["sha256"]
    assert Desk(desk.home, tmp_path / "one", capsys).run("--edition", "monday", campaign="spring")["copied"] == 4
    key = next(key for key in moto_bucket.store("production").list("default/spring") if key.endswith(".jpg"))
    moto_bucket.client.delete_object(Bucket=moto_bucket.name, Key=f"production/{key}")
    shutil.rmtree(desk.to)
    lost = desk.run(campaign="spring", code=3)
    # Of two editions that request the same picture, one may be a copy that shares the other's object.
    assert {fault["url"] for fault in lost["faults"]} == {f"{settings['SDP_STORAGE_URL']}/{key}"}
    assert lost["copied"] == 8 - len(lost["faults"])
