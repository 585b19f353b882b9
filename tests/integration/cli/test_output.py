"""Output of commands on any stdout: 8-bit, narrow, closed, full, or read only in part."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import SDPIPELINE, environment, sdpipeline

CAMPAIGN = """\
name: spring
checkpoint: shapes
variables: {colour: ["rôt 😀", "猫"], size: [SIZES]}
defaults: {width: 64, height: 64, num_inference_steps: 4}
stages:
  - {id: draft, task: text-to-image, prompt: "a {{ colour }} circle {{ size }}"}
""".replace("SIZES", ", ".join(map(str, range(300))))
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1:strict"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a campaign of 600 jobs and names outside every 8-bit character set."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "spring.yaml").write_text(CAMPAIGN, encoding="utf-8")
    done = sdpipeline("submit", folder / "spring.yaml", "--home", folder)
    assert done.returncode == 0, done.stderr
    return folder


def in_bytes(*words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    given = options.pop("given", {})
    known: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*SDPIPELINE, *map(str, words)]
    return subprocess.run(command, env=environment(**given), timeout=100, check=False, **known | options)


@pytest.mark.parametrize(
    ("locale", "commands"),
    [
        (ASCII, ["jobs spring", "jobs spring --jsonl", "show 1"]),
        pytest.param(ASCII, ["doctor", "--help", "schema"], marks=pytest.mark.long),
        (LATIN, ["jobs spring", "jobs spring --jsonl"]),  # other commands would test nothing new
    ],
    ids=["ascii", "ascii-others", "latin-1"],
)
def test_no_character_fails_an_8_bit_stdout(home: Path, locale: dict[str, str], commands: list[str]) -> None:
    for words in map(str.split, commands):
        done = in_bytes(*words, *([] if words == ["--help"] else ["--home", home]), given=locale)
        assert b"Error" not in done.stderr, done.stderr
        assert done.returncode in {0, 3}
    refused = in_bytes("jobs", "nö 😀", "--home", home, given=locale)
    assert (refused.returncode, refused.stdout) == (2, b"")


def test_json_is_the_same_document_in_every_locale(home: Path) -> None:
    documents = [
        json.loads(in_bytes("show", 1, "--json", "--home", home, given=locale).stdout) for locale in (ASCII, LATIN, {})
    ]
    assert documents[0] == documents[1] == documents[2]
    assert "rôt 😀" in json.dumps(documents[0], ensure_ascii=False)


def test_an_error_of_a_json_command_is_one_document_too(home: Path) -> None:
    done = in_bytes("jobs", "nö 😀", "--json", "--home", home, given=ASCII)
    assert (done.returncode, done.stderr) == (2, b"")
    assert json.loads(done.stdout)["errors"][0]["fix"] == "set LC_ALL=C.UTF-8, or PYTHONUTF8=1"


def test_a_table_of_20_columns_has_every_value(home: Path) -> None:
    for words in (["jobs", "spring"], ["status"]):
        done = sdpipeline(*words, "--home", home, COLUMNS="20")
        assert done.returncode == 0
        assert "status: " in done.stdout
    assert "variables: " not in done.stdout
    assert "campaign: spring" in done.stdout


def test_a_long_table_has_a_line_for_each_job(home: Path) -> None:
    lines = sdpipeline("jobs", "spring", "--home", home).stdout.splitlines()
    assert lines[0] == "Jobs of spring"
    assert [int(line[:7]) for line in lines[3:] if line[:7].strip()] == list(range(1, 601))


@pytest.mark.parametrize("words", [["jobs", "spring"], ["jobs", "spring", "--jsonl"], ["jobs", "spring", "--json"]])
def test_a_reader_that_leaves_ends_a_command_quietly(home: Path, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = in_bytes(*words, "--home", home, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_or_full_stdout_does_no_harm(home: Path) -> None:
    for redirected, code, said in (("1>&-", 0, b""), ("1>&- 2>&-", 0, b""), (">/dev/full", 1, b"No space left")):
        command = " ".join([*SDPIPELINE, "current", f"2>&2 {redirected}"]).replace("current", 'status --home "$0"')
        done = subprocess.run(["sh", "-c", command, str(home)], capture_output=True, env=environment(), check=False)
        assert done.returncode == code, done
        assert said in done.stderr
        assert b"Traceback" not in done.stderr
