"""Update frequency of run artifacts, with a fake clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline.app import services
from sdpipeline.app.services import Services
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import open_database
from sdpipeline.errors import StorageUnavailableError
from sdpipeline.orchestration.artifacts import REFRESH_EVERY_S, REFRESHING_SHARE, RunArtifacts, best_effort


class Wall:
    """Run artifacts with a manual clock, and the times of their updates."""

    def __init__(self, home: Path, *, takes_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.put_at: list[float] = []
        self._takes_s = takes_s
        settings = services.load_settings(home)
        log = AuditLog(open_database(settings.database), actor="test")
        self._artifacts = RunArtifacts(Services(settings, log.database, log), "spring", clock=lambda: self.now_s)

    def look(self, count: int, *, now: bool = False) -> None:
        self._artifacts._refresh("failures", count, self._put, now=now)

    def pass_by(self, seconds: int) -> None:
        """Pass the time, with new data every second."""
        for second in range(seconds):
            self.now_s = float(second)
            self.look(second + 1)

    def _put(self) -> None:
        self.put_at.append(self.now_s)
        self.now_s += self._takes_s


def test_what_changes_every_second_is_shown_now_and_then(tmp_path: Path) -> None:
    wall = Wall(tmp_path)
    wall.pass_by(61)
    assert wall.put_at == [0.0, 15.0, 30.0, 45.0, 60.0]


def test_what_is_dear_to_show_is_shown_more_rarely(tmp_path: Path) -> None:
    wall = Wall(tmp_path, takes_s=3.0)
    wall.pass_by(61)
    assert 3.0 / REFRESHING_SHARE > REFRESH_EVERY_S
    assert wall.put_at == [0.0, 60.0]


def test_what_did_not_change_is_not_shown_again(tmp_path: Path) -> None:
    wall = Wall(tmp_path)
    for seconds in (0, 20, 40):
        wall.now_s = float(seconds)
        wall.look(4)
    assert wall.put_at == [0.0]


def test_the_end_is_shown_at_once(tmp_path: Path) -> None:
    wall = Wall(tmp_path)
    wall.look(4)
    wall.look(5, now=True)
    assert len(wall.put_at) == 2


def test_storage_that_is_away_costs_the_picture_and_not_the_work() -> None:
    with best_effort():
        raise StorageUnavailableError("no answer")


def test_what_is_wrong_with_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), best_effort():
        raise ZeroDivisionError
