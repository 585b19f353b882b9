"""Input that `deploy` and `schedule` refuse before they contact any server."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline.cli import run

CAMPAIGN = """\
name: spring
checkpoint: shapes
defaults: {width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}
stages:
  - {id: draft, task: text-to-image, prompt: "a red circle"}
"""
NIGHTLY = CAMPAIGN + 'schedule: {cron: "0 3 * * *", timezone: Europe/Berlin}\n'
TABLE = "variables: {rows: {file: products.csv, key: sku}}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a table in it, and no Prefect server configured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "products.csv").write_text("sku,colour\nC-1,red\n")
    return tmp_path


@pytest.mark.parametrize("words", [["deploy"], ["schedule", "spring.yaml"], ["schedule", "spring", "--off"]])
def test_a_server_that_stays_has_to_be_named(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "spring.yaml").write_text(NIGHTLY)
    assert run(words) == 2
    assert capsys.readouterr().err.startswith("PREFECT_API_URL: is not set")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (CAMPAIGN, "spring.yaml has no schedule"),
        (
            NIGHTLY.replace("red circle", "{{ colour }} circle") + TABLE,
            "spring.yaml: a scheduled run reads only this file",
        ),
        (NIGHTLY.replace("shapes", "shaped"), "spring.yaml:2:1: checkpoint"),
    ],
)
def test_what_no_night_could_make_is_refused(
    folder: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "spring.yaml").write_text(text)
    assert run(["schedule", "spring.yaml"]) == 2
    assert why in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
