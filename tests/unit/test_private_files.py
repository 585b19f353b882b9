"""Files of a home are private to their owner, and no link is followed out of it. Files that a user requests keep the
umask."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpipeline.private_files import private_files, remove_access, users_umask


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """The usual umask, which lets all users read."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_files_of_the_block_and_of_its_children_are_the_owners_alone(tmp_path: Path) -> None:
    with private_files():
        (tmp_path / "folder").mkdir()
        (tmp_path / "own").touch()
        subprocess.run([sys.executable, "-c", f"open({str(tmp_path / 'childs')!r}, 'w')"], check=True)
        with users_umask():
            (tmp_path / "asked").touch()
    (tmp_path / "after").touch()
    names = ("folder", "own", "childs", "asked", "after")
    assert [mode(tmp_path / name) for name in names] == [0o700, 0o600, 0o600, 0o644, 0o644]


def test_a_stricter_umask_of_the_user_stays() -> None:
    os.umask(0o777)
    with private_files():
        assert os.umask(0o777) == 0o777


def test_mending_closes_everything_and_keeps_the_owners_own_rights(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "keys").mkdir(parents=True)
    for name, was in (("a.png", 0o644), ("run.sh", 0o4755), ("fixed", 0o444), ("keys/key.pem", 0o600)):
        (home / name).touch()
        (home / name).chmod(was)
    found = remove_access(home)
    assert (found.inspected, found.closed, found.still_open) == (6, 5, [])
    names = (".", "a.png", "run.sh", "fixed", "keys", "keys/key.pem")
    assert [mode(home / name) for name in names] == [0o700, 0o600, 0o700, 0o400, 0o700, 0o600]
    assert remove_access(home).closed == 0


def test_mending_never_follows_a_link(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    (elsewhere / "file").touch()
    (home / "link").symlink_to(elsewhere / "file")
    (home / "linked").symlink_to(elsewhere)
    (home / "broken").symlink_to(home / "nowhere")
    assert remove_access(home).still_open == []
    assert (mode(elsewhere), mode(elsewhere / "file")) == (0o755, 0o644)


def test_a_home_of_another_user_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert remove_access(tmp_path).still_open == [
        (str(tmp_path), f"it belongs to user {owner}, and this is user {owner + 1}")
    ]
