"""Odd folders among good ones: every command goes on, and lists them with the reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.app import checkpoints, services
from sdpipeline.db import registry
from sdpipeline.domain import digest
from sdpipeline.engine.checkpoints import inspect
from tests.integration.commands import FAKE_ENGINE, document, sdpipeline

SHAPES = checkpoints.BUILTIN_CHECKPOINTS / "shapes"
CANNY = checkpoints.BUILTIN_CHECKPOINTS / "shapes-canny" / "diffusion_pytorch_model.safetensors"
CARD = "---\nlicense: openrail++\nbase_model: somebody/base\n---\n"


def _odd(folder: Path, name: str, files: dict[str, bytes]) -> None:
    for file, data in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_bytes(data)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose checkpoints folder holds one good checkpoint and many odd entries."""
    home = tmp_path_factory.mktemp("odd") / "home"
    folder = home / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(SHAPES, folder / "good")
    (folder / "good" / "README.md").write_text(CARD)
    weights = {"x.safetensors": CANNY.read_bytes()}
    _odd(folder, "config-list", {"config.json": b"[1]", "diffusion_pytorch_model.safetensors": CANNY.read_bytes()})
    _odd(folder, "index-list", {"model_index.json": b"[1]"})
    _odd(folder, "deep", {"model_index.json": b"[" * 100_000} | weights)
    _odd(folder, "number", {"config.json": b'{"a": ' + b"9" * 5000 + b"}"} | weights)
    _odd(folder, "unhashable", {"config.json": b'{"model_type": ["x"]}', "model.safetensors": CANNY.read_bytes()})
    _odd(folder, "vae-words", {"config.json": b'{"_class_name": "AutoencoderKL", "scaling_factor": "x"}'} | weights)
    _odd(folder, "utf-16", {"config.json": '{"a": 1}'.encode("utf-16")} | weights)
    _odd(folder, "header", {"x.safetensors": (9).to_bytes(8, "little") + b'{"a": []}'})
    _odd(folder, "only-pickle", {"x.pt": b"PK"})
    _odd(folder, "crowd", dict.fromkeys((f"{n}.txt" for n in range(5001)), b"") | weights)
    _odd(folder, "bad-\udcff", weights)
    _odd(folder, "bad-name", {"x\udcff.safetensors": b""})
    (folder / "fifo").mkdir()
    os.mkfifo(folder / "fifo" / "x.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("nothing-there")
    (folder / "inner-loop").mkdir()
    (folder / "inner-loop" / "x.safetensors").symlink_to("../inner-loop")
    (folder / "single.safetensors").write_bytes(CANNY.read_bytes())
    (folder / "notes.txt").write_text("no checkpoint")
    (folder / "empty").mkdir()
    return home


ODD = {
    "config-list", "index-list", "deep", "number", "unhashable", "vae-words", "utf-16", "header", "only-pickle",
    "crowd", "bad-\\udcff", "bad-name", "fifo", "pipe", "loop", "nowhere", "inner-loop", "single.safetensors",
}  # fmt: skip


GOOD = {"good", "shapes", "shapes-canny", "shapes-upscale"}


def test_list_has_every_odd_entry_with_its_reason_beside_the_good_ones(home: Path) -> None:
    rows: list[dict[str, Any]] = document("checkpoints", "list", "--home", home)["checkpoints"]
    refused = {row["alias"].encode("ascii", "backslashreplace").decode(): row for row in rows if row["refused"]}
    assert set(refused) == ODD
    assert {row["status"] for row in refused.values()} == {"refused"}
    assert {row["alias"] for row in rows if row["status"] == "ok"} == {
        "good",
        "shapes",
        "shapes-canny",
        "shapes-upscale",
    }
    assert "checkpoints add ALIAS" in refused["single.safetensors"]["refused"]
    keys = {"family", "kind", "native_size", "defaults", "licence", "origin_sha256", "refused", "alias", "digest"}
    assert [row for row in rows if not keys <= row.keys()] == []


def test_the_printed_list_has_the_reasons_in_one_line_each(home: Path) -> None:
    printed = sdpipeline("checkpoints", "list", "--home", home)
    assert printed.returncode == 0
    assert "config-list is refused: checkpoint 'config-list': config.json is not a JSON object" in printed.stdout


def test_doctor_and_verify_name_the_odd_entries_and_check_the_others(home: Path) -> None:
    checks = {each["name"]: each for each in document("doctor", "--home", home, exit_code=3)["checks"]}
    assert checks["checkpoint good"]["ok"] is True
    assert checks["checkpoint deep"]["ok"] is False
    verified = document("checkpoints", "verify", "--home", home, exit_code=3)["checkpoints"]
    assert {row["alias"] for row in verified if row["ok"]} == GOOD


def test_plan_run_and_add_of_another_alias_go_on(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "campaign.yaml"
    stage = "{id: draft, task: text-to-image, prompt: a red circle}"
    file.write_text(f"name: goes-on\ncheckpoint: good\nseeds: {{count: 2}}\nstages:\n  - {stage}\n")
    assert document("plan", file, "--home", home)["jobs"]["total"] == 2
    assert document("submit", file, "--home", home)["added"] == 2
    document("worker", "--until-idle", "--home", home, given={FAKE_ENGINE: "0"})
    assert document("status", "--home", home)["campaigns"][0]["jobs"]["succeeded"] == 2
    own = Path(shutil.copytree(SHAPES, tmp_path / "own"))
    added = document("checkpoints", "add", "own", own, "--home", home)
    assert added["kind"] == "checkpoint"


def test_licences_and_sources_of_a_folder_are_listed_and_taken_at_registration(home: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(SHAPES, tmp_path / "own"))
    (own / "README.md").write_text(CARD)
    document("checkpoints", "add", "carded", own, "--home", home)
    document("checkpoints", "add", "named", own, "--licence", "ours", "--home", home)
    rows = {row["alias"]: row for row in document("checkpoints", "list", "--home", home)["checkpoints"]}
    licences = {name: rows[name]["licence"] for name in ("good", "carded", "named", "shapes")}
    assert licences == {"good": "openrail++", "carded": "openrail++", "named": "ours", "shapes": "Apache-2.0"}
    assert (rows["carded"]["source"], rows["shapes-canny"]["source"]) == (str(own), "shipped with sdpipeline")


def test_a_second_approval_of_what_an_earlier_release_approved_whole_keeps_its_digest(
    home: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(SHAPES, tmp_path / "own"))
    unet = own / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    files = inspect("whole", own)
    manifest = {
        path.relative_to(own).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in own.rglob("*")
        if path.is_file()
    }
    old = replace(files, manifest=manifest, digest=digest(manifest), ignored=())
    with services.open_services(services.load_settings(home)) as have, have.audit.transaction() as tx:
        registry.add(tx, old, registry.Approval(approved_by="an earlier release"))
    assert document("checkpoints", "add", "whole", own, "--home", home)["digest"] == old.digest
    assert document("checkpoints", "add", "fresh", own, "--home", home)["digest"] == files.digest
    (own / "unet" / "notes.txt").write_text("added")
    assert document("checkpoints", "add", "whole", own, "--home", home)["digest"] != old.digest
