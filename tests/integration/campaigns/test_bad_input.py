"""Bad input at the real command line: exit code 2, one line per mistake, and nothing written."""

from __future__ import annotations

import io
import json
import sqlite3
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpipeline import cli
from tests.hostile import DEEP_RECORD
from tests.integration.commands import installed

GOOD = """\
name: spring
checkpoint: shapes
variables:
  colour: [red, blue]
defaults: {width: 64, height: 64, num_inference_steps: 4}
stages:
  - id: draft
    task: text-to-image
    prompt: "a {{ colour }} circle"
"""
EDIT = """\
  - id: edit
    task: image-to-image
    prompt: x
    image: IMAGE
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@dataclass(frozen=True)
class Desk:
    """A folder with a campaign file, a home, and the command line in this process."""

    folder: Path
    home: Path
    capsys: pytest.CaptureFixture[str]

    def write(self, text: str) -> Path:
        path = self.folder / "spring.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def refused(self, text: str, command: str = "submit") -> list[str]:
        """Error output of a command that must refuse a file with that text, without the file's own path."""
        code = cli.run([command, str(self.write(text)), "--home", str(self.home)])
        said = self.capsys.readouterr()
        assert code == 2, said
        assert said.out == ""
        assert "Traceback" not in said.err
        return [line.removeprefix(f"{self.folder}/spring.yaml:") for line in said.err.splitlines()]

    def state(self) -> tuple[list[str], list[str]]:
        """The contents of the database, and every file in the home with its size, except SQLite's own."""
        with sqlite3.connect(self.home / "sdpipeline.db") as database:
            dump = list(database.iterdump())
        files = [f"{path} {path.stat().st_size}" for path in sorted(self.home.rglob("*")) if path.is_file()]
        return dump, [name for name in files if "sdpipeline.db" not in name]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Desk(folder, tmp_path / "home", capsys)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  - id: draft", "  - id: draft\n    promt: x", "8:5: stages[0].promt: unknown key (did you mean 'prompt'?)"),
        ("num_inference_steps: 4", "num_inference_steps: []", "5:35: defaults.num_inference_steps: found a list"),
        ("{{ colour }}", "{{ color }}", "9:5: stages[0].prompt: the variable 'color' is not declared"),
        ("[red, blue]", "[red, blue]\n  shape: [x]", "5:3: variables.shape: the variable 'shape' is never used"),
        ("{{ colour }}", "{{ colour.__class__ }}", "9:5: stages[0].prompt: reaching into a value with a dot"),
        ("{{ colour }}", "{% for c in colour %}{{ c }}{% endfor %}", "9:5: stages[0].prompt: a loop is not allowed"),
        ("checkpoint: shapes", "checkpoint: !!python/name:os.system ''", "2:13: checkpoint: the tag !!python/name:os"),
        ("checkpoint: shapes\n", f"checkpoint: shapes\n{BOMB}", "3:4: f[0][3][3][7][2]: expands to too many values"),
        ("width: 64", "width: 0", "5:12: defaults.width: 0 is not from 8 to 8192"),
        ("width: 64", "width: -64", "5:12: defaults.width: -64 is not from 8 to 8192"),
        ("width: 64", "width: 100000", "5:12: defaults.width: 100000 is not from 8 to 8192"),
        ("width: 64", "guidance_scale: .nan", "5:28: defaults.guidance_scale: .nan is not a finite number"),
        ("width: 64", 'guidance_scale: "nan"', "5:12: defaults.guidance_scale: 'nan' is not a number from 0 to 100"),
        ("name: spring", "name: ../../spring", "1:1: name: found '../../spring', expected a name of a-z, 0-9 and -"),
        ("checkpoint: shapes", "checkpoint: shape", "2:1: checkpoint: no checkpoint 'shape' (did you mean 'shapes'?)"),
        ("text-to-image", "text-to-imag", "8:5: stages[0].task: found 'text-to-imag' (did you mean 'text-to-image'?)"),
        ("name: spring", 'name: "spr\\0ing"', "1:7: name: holds the character U+0000"),
        ("name: spring", "name: spring\nname: autumn", "2:1: name: is written twice (keep one of them)"),
        ("stages:", "seeds: {count: 99999999}\nstages:", "6:9: seeds.count: found 99999999, expected at most"),
        ("stages:", "stages: [", "7:3: is not YAML: while parsing a flow node, expected"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_comes_into_being(desk: Desk, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) >= 1
    line = desk.refused(GOOD.replace(old, new, 1))[0]
    assert line.startswith(expected)
    assert not desk.home.exists()


@pytest.mark.parametrize("command", ["plan", "submit", "run"])
def test_every_mistake_of_a_file_is_told_at_once_by_every_command(desk: Desk, command: str) -> None:
    text = GOOD.replace("spring", "Spring").replace("width: 64", "width: 0").replace("image\n", "imag\n")
    assert [line.split(":")[0] for line in desk.refused(text, command)] == ["1", "5", "8"]
    assert not desk.home.exists()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("{file: missing.png}", "'missing.png' cannot be read: No such file or directory"),
        ("{file: ../outside.png}", "'../outside.png' lies outside the allowed folders: see SDP_INPUTS__ALLOWED"),
        ("{file: link.png}", "'link.png' lies outside the allowed folders: see SDP_INPUTS__ALLOWED"),
        ("{file: /etc/hostname}", "'/etc/hostname' lies outside the allowed folders: see SDP_INPUTS__ALLOWED"),
        ("{file: bomb.png}", "'bomb.png': the picture is a decompression bomb"),
        ("{file: truncated.png}", "'truncated.png': not a whole png, jpeg or webp picture"),
        ("{file: text.png}", "'text.png': not a whole png, jpeg or webp picture"),
        ("{file: deep.png}", "'deep.png': its embedded record is nested more than 64 levels deep"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "submit"])
def test_a_picture_that_cannot_be_used_is_refused_where_it_is_named(
    desk: Desk, image: str, expected: str, command: str
) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    (desk.folder.parent / "outside.png").write_bytes(file.getvalue())
    (desk.folder / "link.png").symlink_to(desk.folder.parent / "outside.png")
    (desk.folder / "bomb.png").write_bytes(bomb())
    (desk.folder / "truncated.png").write_bytes(file.getvalue()[:2000])
    (desk.folder / "text.png").write_text("hello")
    (desk.folder / "deep.png").write_bytes(DEEP_RECORD)
    (line,) = desk.refused(GOOD + EDIT.replace("IMAGE", image), command)
    assert line.startswith(f"13:13: stages[1].image.file: {expected}")
    assert not desk.home.exists()


def test_verify_says_of_a_bomb_in_one_line_that_it_is_not_ok(desk: Desk) -> None:
    picture = desk.folder / "deep.png"
    picture.write_bytes(DEEP_RECORD)
    assert cli.run(["verify", str(picture), "--home", str(desk.home), "--json"]) == 3
    said = desk.capsys.readouterr()
    assert json.loads(said.out)["faults"] == ["its embedded record is nested more than 64 levels deep"]
    assert said.err == ""


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("{stage: edit}", "13:13: stages[1].image.stage: 'edit' cannot use its own picture (name another)"),
        ("{stage: edti}", "13:13: stages[1].image.stage: no stage 'edti' (there is only draft)"),
    ],
)
def test_a_stage_that_waits_for_itself_or_for_none_is_refused(desk: Desk, image: str, expected: str) -> None:
    assert desk.refused(GOOD + EDIT.replace("IMAGE", image)) == [expected]


def test_a_cycle_of_stages_is_refused_and_shown(desk: Desk) -> None:
    text = (
        GOOD + EDIT.replace("IMAGE", "{stage: third}") + EDIT.replace("edit", "third").replace("IMAGE", "{stage: edit}")
    )
    assert desk.refused(text) == [
        "10:5: stages[1]: is part of a cycle: 'edit' needs 'third' needs 'edit' (let one of them use another picture)"
    ]


def test_two_stages_of_one_name_are_refused(desk: Desk) -> None:
    text = GOOD + EDIT.replace("id: edit", "id: draft").replace("IMAGE", "{stage: draft}")
    assert desk.refused(text) == ["10:5: stages[1].id: there are two stages 'draft' (rename one)"]


def test_mistakes_that_only_rows_show_name_the_table_and_its_line(desk: Desk) -> None:
    (desk.folder / "products.csv").write_text(
        'sku,colour,width\nA,"{{ 7 * 7 }}",64\nB,red\nC,green,wide\nA,red,64\nD,"bl\x00ue",64\n'
    )
    text = GOOD.replace("colour: [red, blue]", "rows: {file: products.csv, key: sku}")
    assert desk.refused(text.replace("width: 64", 'width: "{{ width }}"')) == [
        "products.csv:3: has 2 cells where the first line has 3",
        "5:12: defaults.width: 'wide' is not a whole number from 8 to 8192, in products.csv:4",
        "products.csv:5: the key 'A' is used twice; keys must be unique",
        "products.csv:6: holds the character U+0000",
    ]
    assert not desk.home.exists()


def test_the_json_form_holds_the_same_mistakes(desk: Desk) -> None:
    path = desk.write(GOOD.replace("width: 64", "width: 0").replace("colour }}", "color }}"))
    assert cli.run(["submit", str(path), "--home", str(desk.home), "--json"]) == 2
    errors = json.loads(desk.capsys.readouterr().out)["errors"]
    assert [(error["line"], error["key"], error["file"]) for error in errors] == [
        (5, "defaults.width", str(path)),
        (9, "stages[0].prompt", str(path)),
    ]
    assert errors[1]["fix"] == "did you mean 'colour'?"


def test_a_refused_change_leaves_database_and_storage_as_they_were(desk: Desk) -> None:
    assert cli.run(["submit", str(desk.write(GOOD)), "--home", str(desk.home)]) == 0
    desk.capsys.readouterr()
    before = desk.state()
    (desk.folder / "products.csv").write_text("colour\nred\n\x01\n")
    for text in (
        GOOD.replace("width: 64", "width: 0"),
        GOOD.replace("colour: [red, blue]", "rows: {file: products.csv}"),
        GOOD + EDIT.replace("IMAGE", "{file: missing.png}"),
    ):
        for command in ("plan", "submit"):
            desk.refused(text, command)
            assert desk.state() == before


def test_a_file_that_is_not_there_is_said_so(desk: Desk) -> None:
    assert cli.run(["submit", "nowhere.yaml", "--home", str(desk.home)]) == 2
    assert desk.capsys.readouterr().err == "nowhere.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (".env", "SDP_TEEM=x\n", ".env:1: SDP_TEEM: no such setting (did you mean SDP_TEAM?)"),
        ("sdpipeline.toml", "\nteem = 1\n", "sdpipeline.toml:2: teem: no such setting (did you mean team?)"),
        (
            ".env",
            "SDP_ENGINE__ENCODE_AHEAD=true\n",
            ".env:1: SDP_ENGINE__ENCODE_AHEAD: no such setting (remove it: it saved no time)",
        ),
        ("sdpipeline.toml", "team = \n", "sdpipeline.toml:1:8: is not TOML: Invalid value"),
    ],
)
def test_a_misspelt_setting_is_refused_before_the_campaign_is_read(
    desk: Desk, name: str, text: str, expected: str
) -> None:
    (desk.folder / name).write_text(text)
    (line,) = desk.refused(GOOD)
    assert line.removeprefix(f"{desk.folder}/") == expected
    assert not desk.home.exists()


def test_the_installed_command_leaves_with_2_and_no_traceback(desk: Desk) -> None:
    path = desk.write(GOOD.replace("width: 64", "width: .nan").replace("draft", "Draft"))
    done = installed("submit", path, "--home", desk.home)
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first == f"{path}:5:19: defaults.width: .nan is not a finite number (write a number)"
    assert second.startswith(f"{path}:7:5: stages[0].id: found 'Draft', expected a name of a-z, 0-9 and -")
    misspelt = installed("plan", path, "--home", desk.home, SDP_LEASE_TTL="5")
    assert (misspelt.returncode, misspelt.stderr) == (
        2,
        "the environment: SDP_LEASE_TTL: no such setting (did you mean SDP_LEASE_TTL_S?)\n",
    )
    assert not desk.home.exists()


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header claims 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(99))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
