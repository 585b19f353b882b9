"""The checkpoint registry: approved, verified, pinned by jobs, and withdrawn."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from sdpipeline.app import checkpoints, services
from sdpipeline.db import registry
from tests.factories import events
from tests.integration.commands import FAKE_ENGINE, SDPIPELINE, document, environment, pictures, sdpipeline

CAMPAIGN = """\
name: two-bases
checkpoint: {base}
defaults: {{width: 64, height: 64, num_inference_steps: 2}}
seeds: {{count: 3}}
stages:
  - {{id: draft, task: text-to-image, prompt: a red circle}}
  - {{id: scene, task: text-to-image, prompt: a red circle,
     controlnets: [{{checkpoint: shapes-canny, image: {{stage: draft}}, annotator: canny}}]}}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A user's own checkpoint: the shipped one with one letter of a configuration changed."""
    folder = Path(shutil.copytree(checkpoints.BUILTIN_CHECKPOINTS / "shapes", tmp_path / "weights"))
    index = folder / "model_index.json"
    index.write_text(index.read_text() + " ")
    return folder


def _campaign(tmp_path: Path, base: str) -> Path:
    file = tmp_path / "campaign.yaml"
    file.write_text(CAMPAIGN.format(base=base))
    return file


def test_the_shipped_checkpoints_are_listed_and_verify_without_a_database(home: Path) -> None:
    listed = document("checkpoints", "list", "--home", home)["checkpoints"]
    assert {"shapes", "shapes-canny"} <= {row["alias"] for row in listed}
    assert {row["status"] for row in listed} == {"ok"}
    assert document("checkpoints", "verify", "--home", home)["ok"] is True
    assert not home.exists()


def test_an_added_checkpoint_can_be_named_and_keeps_its_terms(tmp_path: Path, home: Path, weights: Path) -> None:
    added = document(
        "checkpoints", "add", "mine", weights, "--licence", "Apache-2.0", "--purpose", "catalogue",
        "--expires", "2099-12-31", "--approved-by", "legal", "--home", home,
    )  # fmt: skip
    row = next(r for r in document("checkpoints", "list", "--home", home)["checkpoints"] if r["alias"] == "mine")
    assert (row["digest"], row["licence"], row["purposes"]) == (added["digest"], "Apache-2.0", ["catalogue"])
    assert row["approved_by"] == "legal"
    assert document("submit", _campaign(tmp_path, "mine"), "--home", home)["added"] == 6
    assert document("show", 1, "--home", home)["request"]["checkpoint"]["digest"] == added["digest"]


def test_approving_the_same_weights_again_keeps_their_licence(home: Path, weights: Path) -> None:
    document("checkpoints", "add", "mine", weights, "--licence", "OpenRAIL", "--home", home)
    assert document("checkpoints", "add", "mine", weights, "--home", home)["licence"] == "OpenRAIL"
    assert document("checkpoints", "add", "mine", weights, "--licence", "MIT", "--home", home)["licence"] == "MIT"


def test_an_alias_tells_of_the_weights_that_it_meant_and_never_changes_its_kind(home: Path, weights: Path) -> None:
    first = document("checkpoints", "add", "mine", weights, "--home", home)
    (weights / "model_index.json").write_text((weights / "model_index.json").read_text() + " ")
    again = document("checkpoints", "add", "mine", weights, "--home", home)
    assert again["notes"] == [f"mine meant other weights until now, digest {first['digest'][:16]}"]
    refused = sdpipeline("checkpoints", "add", "mine", weights / "vae", "--home", home)
    assert refused.returncode == 2
    assert "alias 'mine' is a checkpoint, and these weights are a vae (choose another alias)" in refused.stderr


def test_a_file_that_is_not_there_is_called_missing(home: Path) -> None:
    refused = sdpipeline("checkpoints", "add", "mine", "downloads/style.safetensors", "--home", home)
    assert "there is no file downloads/style.safetensors (check the path)" in refused.stderr


def test_an_approval_that_is_over_does_not_run(tmp_path: Path, home: Path, weights: Path) -> None:
    document("checkpoints", "add", "mine", weights, "--expires", "2020-01-01", "--home", home)
    refused = sdpipeline("submit", _campaign(tmp_path, "mine"), "--home", home)
    assert refused.returncode == 2
    assert "no checkpoint 'mine'" in refused.stderr


def test_a_changed_file_of_an_added_checkpoint_is_found_by_name(home: Path, weights: Path) -> None:
    document("checkpoints", "add", "mine", weights, "--home", home)
    file = weights / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    checked = document("checkpoints", "verify", "mine", "--home", home, exit_code=3)["checkpoints"]
    assert "unet/diffusion_pytorch_model.safetensors" in checked[0]["detail"]


def _on_a_terminal(*arguments: object) -> tuple[int, str]:
    """Exit code and output of a command that has a terminal for stdin, stdout and stderr."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*SDPIPELINE, *map(str, arguments)], env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # how Linux reports the end of a terminal's output
            while data := os.read(ours, 65536):
                said += data
    os.close(ours)
    return process.returncode, " ".join(said.decode().split())


def _bring_code(weights: Path) -> None:
    """Add code to the checkpoint, in the way that made transformers ask at a terminal whether to run it."""
    index = json.loads((weights / "model_index.json").read_text())
    (weights / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "AutoTokenizer"]}))
    config = weights / "tokenizer" / "tokenizer_config.json"
    (weights / "tokenizer" / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))


def test_every_command_names_a_file_that_was_added_to_approved_weights(
    tmp_path: Path, home: Path, weights: Path
) -> None:
    document("checkpoints", "add", "mine", weights, "--home", home)
    file = _campaign(tmp_path, "mine")
    assert document("submit", file, "--home", home)["added"] == 6
    added = weights / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    added.write_text('{"metadata": {}, "weight_map": {"conv_in.bias": "diffusion_pytorch_model.safetensors"}}')
    checked = document("checkpoints", "verify", "mine", "--home", home, exit_code=3)["checkpoints"]
    assert f"unet/{added.name} was added after approval" in checked[0]["detail"]
    (fault,) = document("audit", "verify", "--full", "--home", home, exit_code=3)["faults"]
    assert (fault["kind"], added.name in fault["detail"]) == ("checkpoint-changed", True)
    for command in ("plan", "submit"):
        refused = sdpipeline(command, file, "--home", home)
        assert (refused.returncode, f"unet/{added.name} was added after" in refused.stderr) == (2, True)
    added.unlink()
    assert document("checkpoints", "verify", "mine", "--home", home)["ok"] is True
    assert document("audit", "verify", "--full", "--home", home)["ok"] is True


@pytest.mark.long
def test_neither_registration_nor_a_worker_asks_about_code_in_weights(
    tmp_path: Path, home: Path, weights: Path
) -> None:
    document("checkpoints", "add", "mine", weights, "--home", home)
    document("submit", _campaign(tmp_path, "mine"), "--home", home)
    _bring_code(weights)
    exit_code, said = _on_a_terminal("checkpoints", "add", "other", weights, "--home", home)
    assert (exit_code, "contains code (tokenizer/evil.py)" in said) == (2, True)
    _, said = _on_a_terminal("worker", "--until-idle", "--home", home)
    assert "[y/N]" not in said
    assert "contains code" in said
    assert {job["status"] for job in pictures(home, "two-bases")} == {"failed", "skipped"}


def test_weights_of_the_folder_that_are_refused_are_named_with_the_reason(
    tmp_path: Path, home: Path, weights: Path
) -> None:
    (home / "checkpoints").mkdir(parents=True)
    weights = weights.rename(home / "checkpoints" / "mine")
    _bring_code(weights)
    (checked,) = document("checkpoints", "verify", "mine", "--home", home, exit_code=3)["checkpoints"]
    assert "contains code" in checked["detail"]
    refused = sdpipeline("plan", _campaign(tmp_path, "mine"), "--home", home)
    assert (refused.returncode, "contains code (tokenizer/evil.py)" in refused.stderr) == (2, True)


def test_a_link_in_the_folder_stands_for_the_directory_that_it_named_first(
    tmp_path: Path, home: Path, weights: Path
) -> None:
    (home / "checkpoints").mkdir(parents=True)
    link = home / "checkpoints" / "mine"
    link.symlink_to(weights)
    document("submit", _campaign(tmp_path, "mine"), "--home", home)
    link.unlink()
    link.symlink_to(checkpoints.BUILTIN_CHECKPOINTS / "shapes")
    settings = services.load_settings(home)
    with services.open_services(settings) as have:
        assert checkpoints.catalog(settings, have.database)["mine"].directory == weights


def test_a_file_added_to_shipped_weights_is_found(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(shutil.copytree(checkpoints.BUILTIN_CHECKPOINTS, tmp_path / "shipped"))
    (shipped / "shapes" / "unet" / "more.json").write_text("{}")
    monkeypatch.setattr(checkpoints, "BUILTIN_CHECKPOINTS", shipped)
    settings = services.load_settings(home)
    assert "unet/more.json is not as shipped" in str(checkpoints.refused_checkpoints(settings)["shapes"])
    assert {"shapes-canny", "shapes-upscale"} == checkpoints.catalog(settings).keys()


def test_revoking_blocks_what_is_not_made_lists_what_was_and_refuses_new_campaigns(tmp_path: Path, home: Path) -> None:
    file = _campaign(tmp_path, "shapes")
    document("submit", file, "--home", home)
    document("worker", "--until-idle", "--home", home, given={FAKE_ENGINE: "0"})
    file.write_text(file.read_text().replace("count: 3", "count: 5"))
    assert document("submit", file, "--home", home)["added"] == 4
    revoked = document("checkpoints", "revoke", "shapes-canny", "--because", "licence withdrawn", "--home", home)
    assert revoked["blocked"] == 2
    document("worker", "--until-idle", "--home", home, given={FAKE_ENGINE: "0"})
    jobs = pictures(home, "two-bases")
    assert {(j["stage"], j["status"]) for j in jobs if j["seed"] >= 3} == {("draft", "succeeded"), ("scene", "blocked")}
    made = document("jobs", "two-bases", "--checkpoint", revoked["digest"], "--home", home)["jobs"]
    assert {job["stage"] for job in made} == {"scene"}
    assert len(made) == 5
    refused = sdpipeline("plan", file, "--home", home)
    assert (refused.returncode, "no ControlNet 'shapes-canny'" in refused.stderr) == (2, True)
    assert document("audit", "verify", "--home", home)["ok"] is True


def test_blocked_jobs_run_once_their_checkpoint_is_approved_again(tmp_path: Path, home: Path) -> None:
    document("submit", _campaign(tmp_path, "shapes"), "--home", home)
    document("checkpoints", "revoke", "shapes-canny", "--because", "a doubt", "--home", home)
    assert document("retry", "two-bases", "--status", "blocked", "--home", home)["retried"] == 3
    counts = document("status", "--home", home)["campaigns"][0]["jobs"]
    assert counts["blocked"] == 3
    shipped = checkpoints.BUILTIN_CHECKPOINTS / "shapes-canny"
    document("checkpoints", "add", "shapes-canny", shipped, "--home", home)
    document("retry", "two-bases", "--status", "blocked", "--home", home)
    document("worker", "--until-idle", "--home", home, given={FAKE_ENGINE: "0"})
    assert document("status", "--home", home)["campaigns"][0]["jobs"]["succeeded"] == 6
    assert document("audit", "verify", "--home", home)["ok"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Big Name", "."], "is not an alias"),
        (["mine", "nowhere/here"], "needs --revision"),
        (["mine", "nowhere/here", "--revision", "main"], "is not a full commit hash"),
        (["mine", "nowhere/here", "--revision", "0" * 40], "cannot be fetched"),
        (["mine", "."], "holds no .safetensors"),
    ],
)
def test_what_cannot_be_added_is_refused_with_its_reason(
    arguments: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "." else word for word in arguments]
    refused = sdpipeline("checkpoints", "add", *words, "--home", home)
    assert refused.returncode in (1, 2)
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_shipped_weights_keep_their_licence_and_may_be_approved_for_a_purpose(home: Path) -> None:
    settings = services.load_settings(home)
    with services.open_services(settings) as have:
        shipped = checkpoints.catalog(settings, have.database)["shapes"]
        assert (shipped.licence, shipped.purposes) == ("Apache-2.0", ())
        with have.audit.transaction() as tx:
            registry.add(tx, shipped, registry.Approval(approved_by="legal", purposes=("advertising",)))
        approved = checkpoints.catalog(settings, have.database)["shapes"]
        (told,) = [event for event in events(have.database) if event["event"] == "checkpoint.added"]
    assert (approved.licence, approved.purposes) == ("Apache-2.0", ("advertising",))
    assert (told["licence"], told["purposes"]) == (None, ["advertising"])
