"""Nightly campaigns: incremental ones make new rows only, editions make the whole campaign under a new date."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.campaigns import loader as campaigns
from sdpipeline.campaigns import submission
from sdpipeline.campaigns.loader import Campaign
from sdpipeline.db import budgets
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.storage import LocalStore
from tests.factories import CATALOG, completed, events, input_folder, leased, mistakes_of, statuses, try_lease
from tests.integration.commands import FAKE_ENGINE, document, sdpipeline

NIGHTLY = """
name: nightly
checkpoint: shapes
variables: {{colour: [red, blue]}}
budget: {budget}
schedule: {{cron: "30 2 * * *", timezone: Europe/Berlin, mode: {mode}, on_overlap: {on_overlap}}}
stages: [{{id: a, task: text-to-image, prompt: "a {{{{ colour }}}} circle{extra}"}}]
"""


class Nights:
    """A campaign submitted night after night to one database."""

    def __init__(
        self,
        audit: AuditLog,
        folder: Path,
        *,
        mode: str,
        on_overlap: str = "skip",
        extra: str = "",
        budget: str = "{}",
    ) -> None:
        self.audit, self.folder = audit, folder
        text = NIGHTLY.format(mode=mode, on_overlap=on_overlap, extra=extra, budget=budget)
        (folder / "nightly.yaml").write_text(text)

    def campaign(self, now: str) -> Campaign:
        at = datetime.fromisoformat(now).replace(tzinfo=UTC)
        return campaigns.load(self.folder / "nightly.yaml", CATALOG, now=at)

    def submit(self, now: str) -> Any:
        campaign, store = self.campaign(now), LocalStore(self.folder / "store")
        inputs = input_folder(self.folder)
        return submission.submit(campaign, inputs, self.audit, store, team="default", max_attempts=3)


def test_an_unchanged_campaign_run_again_adds_nothing(audit: AuditLog, tmp_path: Path) -> None:
    nights = Nights(audit, tmp_path, mode="incremental")
    assert nights.submit("2027-03-27T02:00").added == 2
    completed(audit, leased(audit))
    again = nights.submit("2027-03-28T02:00")
    assert (again.added, again.unchanged) == (0, 2)


def test_an_edition_makes_the_whole_campaign_under_each_new_date(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    nights = Nights(audit, tmp_path, mode="edition", extra=" on {{ edition }}")
    # Clocks are set forward at 02:00 on 28 March and back at 03:00 on 31 October.
    times = ["2027-03-27T02:00", "2027-03-28T02:00", "2027-03-29T02:00"]
    times += ["2027-10-30T03:00", "2027-10-31T00:45", "2027-10-31T01:45", "2027-11-01T03:00"]
    added = []
    for now in times:
        added.append(nights.submit(now).added)
        if added[-1]:
            completed(audit, leased(audit))
    assert added == [2, 2, 2, 2, 2, 0, 2]
    assert Counter(statuses(database, "edition")) == dict.fromkeys(
        ["2027-03-27", "2027-03-28", "2027-03-29", "2027-10-30", "2027-10-31", "2027-11-01"], 2
    )
    prompts = {request["prompt"] for request in statuses(database, "request")}
    assert "a red circle on 2027-03-28" in prompts


def test_an_edition_due_while_the_last_one_is_made_is_left_out_and_said_so(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    nights = Nights(audit, tmp_path, mode="edition")
    nights.submit("2027-03-27T02:00")
    late = nights.submit("2027-03-28T02:00")
    assert late.added == 0
    assert late.left_out == "edition 2027-03-28 is skipped: 2027-03-27 is still being made"
    assert len(statuses(database)) == 2
    assert nights.submit("2027-03-27T02:00").unchanged == 2


def test_an_edition_may_queue_behind_the_last_one(audit: AuditLog, tmp_path: Path) -> None:
    nights = Nights(audit, tmp_path, mode="edition", on_overlap="queue")
    nights.submit("2027-03-27T02:00")
    assert nights.submit("2027-03-28T02:00").added == 2


def test_a_larger_budget_is_heard_of_although_the_last_edition_paused(audit: AuditLog, tmp_path: Path) -> None:
    nights = Nights(audit, tmp_path, mode="edition", budget="{max_images: 1}")
    nights.submit("2027-03-27T02:00")
    for _ in range(2):
        with audit.transaction() as tx:
            budgets.admit(tx, wave=8)
        if (lease := try_lease(audit)) is not None:
            completed(audit, lease)
    Nights(audit, tmp_path, mode="edition", budget="{max_images: 100}").submit("2027-03-28T02:00")
    with audit.transaction() as tx:
        budgets.admit(tx, wave=8)
    assert len(leased(audit).jobs) == 3


def test_editions_keep_their_pictures_when_the_file_changes(
    audit: AuditLog, database: Database, tmp_path: Path
) -> None:
    Nights(audit, tmp_path, mode="edition").submit("2027-03-27T02:00")
    completed(audit, leased(audit))
    Nights(audit, tmp_path, mode="edition", extra=" at night").submit("2027-03-28T02:00")
    completed(audit, leased(audit))
    assert statuses(database) == ["succeeded"] * 4
    assert [event["added"] for event in events(database) if event["event"] == "campaign.submitted"] == [2, 2]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ('{cron: "0 25 * * *"}', "schedule.cron: '0 25 * * *' is not a cron expression"),
        ("{cron: nightly}", "schedule.cron: 'nightly' is not five fields"),
        ('{cron: "0 3 * * *", timezone: Europe/Berln}', "schedule.timezone: no time zone 'Europe/Berln' (did you mean"),
        ('{cron: "0 3 * * *", mode: nightly}', "schedule.mode: found 'nightly'"),
    ],
)
def test_a_schedule_that_is_none_is_refused(schedule: str, expected: str) -> None:
    text = f"schedule: {schedule}\nstages: [{{id: a, task: text-to-image, prompt: x}}]\n"
    (mistake,) = mistakes_of(text)
    assert expected in mistake


def test_the_edition_is_a_variable_only_where_there_are_editions() -> None:
    (mistake,) = mistakes_of('stages: [{id: a, task: text-to-image, prompt: "{{ edition }}"}]\n')
    assert "'edition' is not declared (add schedule: with mode: edition, or submit --edition NAME)" in mistake


def test_the_command_line_makes_an_edition_by_name_and_the_same_again_makes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "nightly.yaml"
    file.write_text(NIGHTLY.format(mode="incremental", on_overlap="skip", budget="{}", extra=" of {{ edition }}"))
    home: dict[str, Any] = {"given": {FAKE_ENGINE: "0"}}

    def submitted(edition: str) -> Any:
        return document("submit", file, "--edition", edition, "--home", tmp_path / "home", **home)

    assert submitted("spring")["added"] == 2
    assert submitted("spring")["added"] == 0
    assert submitted("summer")["added"] == 2
    planned = document("plan", file, "--edition", "autumn", "--home", tmp_path / "home", **home)
    assert (planned["edition"], planned["jobs"]["new"]) == ("autumn", 2)
    refused = sdpipeline("submit", file, "--edition", "a/b", "--home", tmp_path / "home")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
