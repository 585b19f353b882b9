"""checkpoints add for single files and for folders of adapters."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from sdpipeline import cli
from sdpipeline.app import services
from tests.factories import events
from tests.integration.single_files import pack
from tests.integration.tiny_checkpoints import tiny_checkpoints


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """A folder as a content team has it: adapters in folders of folders, a checkpoint, and what is no weights."""
    folder = tmp_path / "downloads"
    sources = {
        "My Style_v1.safetensors": "lora-sdxl",
        "people/my-style v1.safetensors": "lora-sd1",
        "people/Ink/pytorch_lora_weights.safetensors": "lora-sd1-other",
        "words/cat-toy.safetensors": "toy",
    }
    for name, checkpoint in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (file,) = tiny_checkpoints().directory(checkpoint).glob("*.safetensors")
        shutil.copyfile(file, folder / name)
    shutil.copytree(tiny_checkpoints().directory("sd1"), folder / "whole")
    pack(tiny_checkpoints().directory("vae"), folder / "kl-f8.safetensors")
    (folder / "old.ckpt").write_bytes(b"PK\x03\x04")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "notes.txt").write_text("trained by us")
    (folder / ".hidden.safetensors").write_bytes(b"")
    return folder


def ran(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Run a command in this process, and return its exit code, its JSON document and its messages."""
    capsys.readouterr()
    code = cli.run([*map(str, words), "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out or "null"), printed.err


def test_a_single_file_is_registered_without_any_connection(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = tiny_checkpoints().directory("sdxl")
    file = pack(base, tmp_path / "Juggernaut XL.safetensors")
    code, added, _ = ran(capsys, "checkpoints", "add", "mine", file, "--tokenizer", base, "--home", home)
    assert code == 0
    assert (added["kind"], added["family"]) == ("checkpoint", "sdxl")
    _, listed, _ = ran(capsys, "checkpoints", "list", "--home", home)
    row = next(row for row in listed["checkpoints"] if row["alias"] == "mine")
    assert row["origin_sha256"] == added["origin_sha256"]
    assert f"{file} (SHA-256 {added['origin_sha256']}, converted with diffusers" in row["source"]
    assert ran(capsys, "checkpoints", "verify", "mine", "--home", home)[0] == 0


def test_the_conversion_is_in_the_audit_log_and_an_alias_gives_its_tokenizer(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_checkpoints().directory("sd1")
    file = pack(base, tmp_path / "x" / "photo.safetensors")
    assert ran(capsys, "checkpoints", "add", "base", base, "--home", home)[0] == 0
    code, added, _ = ran(capsys, "checkpoints", "add", "mine", file, "--tokenizer", "base", "--home", home)
    assert code == 0
    with services.open_services(services.load_settings(home)) as have:
        (event,) = [each for each in events(have.database) if each.get("alias") == "mine"]
    assert event["conversion"]["origin"]["sha256"] == added["origin_sha256"]
    assert event["conversion"]["origin"]["file"] == "photo.safetensors"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["mine", "FILE"], "it needs the tokenizer of CLIP ViT-L/14"),
        (["mine", "FILE", "--tokenizer", "nowhere"], "neither a folder nor the alias"),
        (["mine", "FILE", "--revision", "a" * 40], "--revision is for hub repositories"),
        (["mine", "FILE", "--family", "sd4"], "--family sd4 is not one of"),
        (["mine", "FILE", "--prediction-type", "v"], "--prediction-type v is not one of"),
        (["mine", "DIR", "--tokenizer", "DIR"], "--tokenizer is for a single file"),
        (["mine", "nowhere.safetensors", "--tokenizer", "DIR"], "there is no file nowhere.safetensors"),
        (["mine"], "needs an alias and a source"),
        (["Mine", "FILE"], "'Mine' is not an alias"),
        (["mine", "--all", "DIR"], "--all DIR takes no ALIAS"),
        (["--all", "FILE"], "is not a folder"),
        (["--all", "EMPTY"], "holds no weights"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    base = tiny_checkpoints().directory("sd1")
    file = pack(base, tmp_path / "in" / "x.safetensors")
    (tmp_path / "empty").mkdir()
    places = {"FILE": file, "DIR": base, "EMPTY": tmp_path / "empty"}
    code, refused, _ = ran(capsys, "checkpoints", "add", *(places.get(word, word) for word in words), "--home", home)
    assert code == 2
    assert reason in json.dumps(refused)


def test_a_folder_of_adapters_is_added_and_odd_files_are_reported(
    home: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("checkpoints", "add", "--all", downloads, "--licence", "MIT", "--approved-by", "legal", "--home", home)
    code, found, _ = ran(capsys, *command)
    assert (code, found["ok"]) == (3, False)
    added = {row["alias"]: row["kind"] for row in found["checkpoints"] if row["ok"]}
    assert added == {"my-style-v1": "lora", "ink": "lora", "cat-toy": "textual-inversion"}
    refused = {Path(row["file"]).name: row["detail"] for row in found["checkpoints"] if not row["ok"]}
    reasons = {
        "my-style v1.safetensors": "has the same alias my-style-v1",
        "kl-f8.safetensors": "has to be converted",
        "dangling.safetensors": "a link to a file that is not there",
        "old.ckpt": "is a pickle",
        "pointer.safetensors": "git lfs pull",
        "whole": "is a checkpoint folder",
    }
    assert refused.keys() == reasons.keys()
    assert all(reason in refused[name] for name, reason in reasons.items())
    _, listed, _ = ran(capsys, "checkpoints", "list", "--home", home)
    rows = {row["alias"]: row for row in listed["checkpoints"]}
    assert all((rows[alias]["licence"], rows[alias]["approved_by"]) == ("MIT", "legal") for alias in added)


def test_adding_a_folder_again_changes_nothing_but_never_replaces_an_alias(
    home: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("checkpoints", "add", "--all", downloads / "people" / "Ink", "--home", home)
    first, again = ran(capsys, *command), ran(capsys, *command)
    assert first == again
    assert first[0] == 0
    shutil.copyfile(downloads / "people" / "my-style v1.safetensors", downloads / "people" / "Ink" / "ink.safetensors")
    (downloads / "people" / "Ink" / "pytorch_lora_weights.safetensors").unlink()
    code, refused, _ = ran(capsys, *command)
    assert code == 3
    assert "alias ink already means other weights" in refused["checkpoints"][0]["detail"]


def test_the_command_that_a_refusal_names_can_be_pasted(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pack(tiny_checkpoints().directory("sd1"), tmp_path / "my files" / "My Photo.safetensors")
    code, found, _ = ran(capsys, "checkpoints", "add", "--all", file.parent, "--home", home)
    assert code == 3
    detail = found["checkpoints"][0]["detail"]
    assert shlex.split(detail.rsplit("register it by itself: ", 1)[1])[-2:] == ["my-photo", str(file)]


def test_the_reasons_of_refused_files_follow_the_table(
    home: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.run(["checkpoints", "add", "--all", str(downloads), "--home", str(home)]) == 3
    printed = capsys.readouterr()
    assert "cat-toy" in printed.out
    assert f"refused: {downloads}/old.ckpt is a pickle" in printed.err


def test_a_link_to_itself_is_one_clear_error(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    code, document, _ = ran(capsys, "checkpoints", "add", "x", tmp_path / "loop.safetensors", "--home", home)
    assert code == 2
    assert "there is no file" in document["errors"][0]["message"]
