"""Settings, read from small files in a temporary folder and from a changed environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from sdpipeline import settings
from sdpipeline.errors import SettingsError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an environment without settings."""
    for name in list(os.environ):
        if name.upper().startswith("SDP_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusals() -> list[str]:
    with pytest.raises(SettingsError) as refused:
        settings.load()
    return [str(mistake) for mistake in refused.value.mistakes]


def test_without_any_setting_everything_lies_in_the_home_beside_us(folder: Path) -> None:
    s = settings.load()
    assert s.home == folder / "sdp-home"
    assert s.database == f"sqlite:///{folder / 'sdp-home' / 'sdpipeline.db'}"
    assert s.storage == f"file://{folder / 'sdp-home' / 'storage'}"
    assert s.checkpoints == folder / "sdp-home" / "checkpoints"
    assert s.embedded


def test_the_environment_beats_the_env_file_which_beats_the_toml_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sdpipeline.toml").write_text('team = "toml"\nworkers = 2\nmax_attempts = 7\n')
    (folder / ".env").write_text("SDP_TEAM=dotenv\nSDP_WORKERS=3\n")
    monkeypatch.setenv("SDP_TEAM", "environment")
    s = settings.load()
    assert (s.team, s.workers, s.max_attempts) == ("environment", 3, 7)


def test_a_home_given_on_the_command_line_beats_them_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_HOME", "elsewhere")
    assert settings.load(home=Path("here")).home == folder / "here"


def test_sections_are_nested_with_two_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_S3__REGION", "eu-central-1")
    monkeypatch.setenv("SDP_S3__TAGS__OWNER", "content")
    monkeypatch.setenv("SDP_INPUTS__ALLOWED", '["/data", "s3://bucket/in"]')
    s = settings.load()
    assert (s.s3.region, s.s3.tags) == ("eu-central-1", {"owner": "content"})
    assert s.inputs.allowed == ["/data", "s3://bucket/in"]


def test_the_toml_file_is_found_by_walking_up_and_its_paths_are_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sdpipeline.toml").write_text('home = "data"\ncheckpoints_dir = "/weights"\n[s3]\nregion = "x"\n')
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    s = settings.load()
    assert (s.home, s.checkpoints, s.s3.region) == (folder / "data", Path("/weights"), "x")


def test_the_nearest_toml_file_counts_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sdpipeline.toml").write_text('team = "outer"\nworkers = 2\n')
    (folder / "inner").mkdir()
    (folder / "inner" / "sdpipeline.toml").write_text('team = "inner"\n')
    monkeypatch.chdir(folder / "inner")
    s = settings.load()
    assert (s.team, s.workers) == ("inner", None)


def test_a_tilde_is_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("SDP_HOME", "~/pictures")
    monkeypatch.setenv("SDP_CHECKPOINTS_DIR", "~/weights")
    s = settings.load()
    assert (s.home, s.checkpoints) == (Path("/home/anna/pictures"), Path("/home/anna/weights"))


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_DEVICE", "")
    monkeypatch.setenv("SDP_WORKERS", "")
    s = settings.load()
    assert (s.device, s.workers) == (None, None)


def test_an_env_file_may_hold_other_programs_names(folder: Path) -> None:
    (folder / ".env").write_text("AWS_PROFILE=x\nPOSTGRES_PASSWORD=y\nSDP_TEAM=content\n")
    assert settings.load().team == "content"


def test_variables_of_the_tests_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_TEST_FUZZ_S", "60")
    settings.load()


def test_a_misspelt_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_DATABSE_URL", "sqlite:///x")
    assert refusals() == ["the environment: SDP_DATABSE_URL: no such setting (did you mean SDP_DATABASE_URL?)"]


def test_a_misspelt_name_in_an_env_file_is_refused_with_its_line(folder: Path) -> None:
    (folder / ".env").write_text("# ours\nSDP_TEAM=content\nexport SDP_LEASE_TTL=5\n")
    assert refusals() == [".env:3: SDP_LEASE_TTL: no such setting (did you mean SDP_LEASE_TTL_S?)"]


def test_a_misspelt_key_in_a_toml_file_is_refused_with_its_line(folder: Path) -> None:
    (folder / "sdpipeline.toml").write_text('region = "x"\n[s3]\nregion = "x"\nregoin = "y"\n[qqqq]\nzz = 1\n')
    assert [line.removeprefix(str(folder) + "/") for line in refusals()] == [
        "sdpipeline.toml:1: region: no such setting (did you mean s3.region?)",
        "sdpipeline.toml:4: s3.regoin: no such setting (did you mean s3.region?)",
        "sdpipeline.toml:6: qqqq.zz: no such setting (see docs/reference/settings.md)",
    ]


def test_every_mistake_of_every_source_is_told_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sdpipeline.toml").write_text('[engine]\nmax_batch = "many"\n')
    (folder / ".env").write_text("\nSDP_TEEM=x\nSDP_WORKERS=0\n")
    monkeypatch.setenv("SDP_LEASE_TTL_S", "nan")
    assert [line.removeprefix(str(folder) + "/") for line in refusals()] == [
        ".env:2: SDP_TEEM: no such setting (did you mean SDP_TEAM?)",
        ".env:3: SDP_WORKERS: found '0': input should be greater than or equal to 1",
        "the environment: SDP_LEASE_TTL_S: found 'nan': input should be a finite number",
        "sdpipeline.toml:2: engine.max_batch: found 'many': input should be a valid integer, unable to parse string as an integer",  # noqa: E501
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SDP_TEAM", "../x", "found '../x': string should match pattern"),
        ("SDP_ENGINE__DTYPE", "int8", "found 'int8': input should be 'float32', 'float16' or 'bfloat16'"),
        ("SDP_INPUTS__ALLOWED", "/data", 'is not JSON (write ["/data"])'),
        ("SDP_S3__TAGS", "x", 'is not JSON (write {"team": "web"})'),
        ("SDP_S3", "5", "holds settings, as in SDP_S3__ENDPOINT_URL"),
        ("SDP_S3", '{"regoin": "x"}', "no such setting: SDP_S3__REGOIN"),
        ("SDP_DATABASE_URL", "mysql://u:hidden@h/n", "expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"),
        ("SDP_DATABASE_URL", "postgresql://u:hidden@h:x/n", "expected sqlite:///FILE or postgresql://"),
        ("SDP_STORAGE_URL", "ftp://x", "found 'ftp://x': expected file:///FOLDER or s3://BUCKET/PREFIX"),
    ],
)
def test_a_wrong_value_says_what_would_be_right(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    (found,) = refusals()
    assert found.startswith(f"the environment: {name}: {expected}")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("sdpipeline.toml", b'team = "x"\nteam = "y"\n', "sdpipeline.toml:2:11: is not TOML: Cannot overwrite a value"),
        ("sdpipeline.toml", b"team = x\n", "sdpipeline.toml:1:8: is not TOML: Invalid value"),
        ("sdpipeline.toml", b"\xff\xfe", "sdpipeline.toml: cannot be read: 'utf-8' codec can't decode"),
        (".env", b"SDP_TEAM=\xff", ".env: cannot be read: 'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(folder: Path, name: str, data: bytes, expected: str) -> None:
    (folder / name).write_bytes(data)
    (found,) = refusals()
    assert found.removeprefix(str(folder) + "/").startswith(expected)


def test_a_password_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_DATABASE_URL", "postgresql://u:hidden-word@host/name")
    s = settings.load()
    assert "hidden-word" in s.database
    assert "hidden-word" not in repr(s) + str(s) + str(s.model_dump()) + s.model_dump_json()
    monkeypatch.setenv("SDP_DATABASE_URL", "oracle://u:hidden-word@host/name")
    monkeypatch.setenv("SDP_LEASE_TTL_S", "0")
    with pytest.raises(SettingsError) as refused:
        settings.load()
    assert "hidden-word" not in str(refused.value) + repr(refused.value.mistakes) + str(refused.value.__cause__)


@pytest.mark.parametrize("name", ["SDP_SIGNING__TSA_URL", "SDP_SIGNING__KMS_ENDPOINT_URL"])
def test_an_address_that_is_told_to_the_audit_log_holds_no_password(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://user:hidden-word@host/tsa")
    with pytest.raises(SettingsError) as refused:
        settings.load()
    assert f"{name}: found 'http://host/tsa': expected an address without user and password" in str(refused.value)
    assert "hidden-word" not in str(refused.value) + repr(refused.value.mistakes) + str(refused.value.__cause__)
    monkeypatch.setenv(name, "http://host/tsa")
    assert settings.load().signing.model_dump()[name.removeprefix("SDP_SIGNING__").lower()] == "http://host/tsa"


def test_every_setting_has_a_name_a_description_and_a_default_that_is_accepted() -> None:
    names = settings.setting_names()
    assert {"SDP_HOME", "SDP_LEASE_TTL_S", "SDP_S3__REGION", "SDP_INPUTS__MAX_PIXELS", "SDP_ENGINE__DTYPE"} <= set(
        names
    )
    for name, (description, default) in names.items():
        assert description, name
        assert not isinstance(default, SecretStr), name
    assert names["SDP_LEASE_TTL_S"][1] == settings.load().lease_ttl_s


def test_settings_cannot_be_changed_after_they_were_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.load().team = "other"  # type: ignore[misc]
