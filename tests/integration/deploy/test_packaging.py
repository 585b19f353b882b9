"""The package as a user installs it: sdist to wheel, next to folders of the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as `python -m build` makes it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with this wheel, and our libraries through a path file.

    Downloading torch anew would cost minutes and prove nothing about our own files. A path file does not
    run the path files of the folder it names, so the checkout's editable install stays out.
    """
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return home / "bin"


@pytest.fixture
def project_of_a_user(tmp_path: Path) -> Path:
    """A working directory whose own folders have the names of our packages."""
    for name in ("flows", "migrations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the package imported a folder of the user')")
    return tmp_path


def run(*command: object, cwd: Path | None = None, **settings: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_flows_migrations_the_demo_and_the_examples(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("flows", "migrations", "demo", "examples"):
        ours = [p for p in (ROOT / "sdpipeline" / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert ours
        assert {p.relative_to(ROOT).as_posix() for p in ours} <= set(names)
    assert "sdpipeline/orchestration/prefect.yaml" in names


def test_the_wheel_installs_no_other_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sdpipeline"}


def test_the_installed_package_is_the_wheels(installed: Path, project_of_a_user: Path) -> None:
    code = "import sdpipeline.flows, sdpipeline.migrations as m; print(sdpipeline.flows.__file__, m.__file__)"
    for path in run(installed / "python", "-c", code, cwd=project_of_a_user).split():
        assert Path(path).is_relative_to(installed.parent)


def test_an_installed_wheel_migrates_a_database(installed: Path, project_of_a_user: Path) -> None:
    home = project_of_a_user / "home"
    for command in ([installed / "sdpipeline"], [installed / "python", "-m", "sdpipeline"]):
        run(*command, "db", "upgrade", "--home", home, cwd=project_of_a_user)
    assert list(home.glob("*.sqlite*")) or list(home.glob("*.db"))


@pytest.mark.timeout(240)
def test_an_installed_wheel_submits_and_runs_a_campaign_under_prefect(installed: Path, project_of_a_user: Path) -> None:
    home = project_of_a_user / "home"
    (project_of_a_user / "spring.yaml").write_text(
        "name: spring\ncheckpoint: shapes\nseeds: {count: 3}\ndefaults: {width: 64, height: 64}\n"
        "stages: [{id: only, task: text-to-image, prompt: a red circle}]\n"
    )
    arguments = ("spring.yaml", "--home", home, "--json")
    submitted = json.loads(run(installed / "sdpipeline", "submit", *arguments, cwd=project_of_a_user))
    assert submitted["added"] == 3
    fake = {"SDP_ENGINE__FAKE_SECONDS_PER_BATCH": "0"}
    ran = json.loads(run(installed / "sdpipeline", "run", *arguments, cwd=project_of_a_user, **fake))
    assert ran["campaigns"][0]["jobs"]["succeeded"] == 3


def test_the_command_line_starts_without_what_only_some_commands_need(installed: Path, tmp_path: Path) -> None:
    code = "import sys, sdpipeline.cli, sdpipeline.orchestration; print(*sys.modules)"
    loaded = set(run(installed / "python", "-c", code, cwd=tmp_path).split())
    assert loaded.isdisjoint({"torch", "diffusers", "transformers", "prefect", "boto3", "psycopg"})
