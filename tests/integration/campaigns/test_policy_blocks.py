"""Policy blocks: a forbidden job is blocked in any status until a submit that allows it; on SQLite and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpipeline import cli
from sdpipeline.audit import load_key, verify
from sdpipeline.db import job_control, registry
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.connection import Database
from sdpipeline.db.submit import Submitted
from sdpipeline.domain import CheckpointRef, JobSpec
from sdpipeline.storage import LocalStore
from tests.factories import (
    chains,
    checkpoint_files,
    completed,
    events,
    failed,
    job_spec,
    leased,
    published,
    statuses,
    try_lease,
)
from tests.integration.commands import FAKE_ENGINE

RULE = "policy.deny: 'widow'"
WHY = ("blocked", "policy", RULE)
DIGEST = checkpoint_files("shapes").digest


def judged(*denied: str, rule: str = RULE, count: int = 3) -> list[JobSpec]:
    """Chains of a draft and a scene; the drafts of the given rows are denied."""
    return [
        replace(spec, blocked=rule if spec.row_key in denied and spec.stage == "draft" else None)
        for spec in chains(count, "draft", "scene")
    ]


def submitted(audit: AuditLog, *denied: str, rule: str = RULE, source: str = "the same text") -> Submitted:
    return published(audit, judged(*denied, rule=rule), source=source)


@pytest.fixture
def clean(database: Database, tmp_path: Path) -> Iterator[LocalStore]:
    """A store for pictures; afterwards the audit must find no fault."""
    store = LocalStore(tmp_path / "storage")
    yield store
    assert verify(database, store, load_key(tmp_path / "key.pem", create=True)).faults == []


def test_a_denied_job_is_blocked_what_needs_it_is_skipped_and_the_rest_runs(
    audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    done = submitted(audit, "row-1")
    assert (done.added, done.blocked) == (6, 1)
    assert statuses(database, "status", "error_kind", "error")[2:4] == [
        WHY,
        ("skipped", "AncestorNotSucceeded", "a parent of this job did not succeed; retry the parent"),
    ]
    while lease := try_lease(audit):
        completed(audit, lease, clean)
    assert statuses(database) == ["succeeded", "succeeded", "blocked", "skipped", "succeeded", "succeeded"]
    (told,) = [event for event in events(database) if event["event"] == "jobs.blocked"]
    assert (told["jobs"], told["rule"]) == ([3], "policy")


def test_a_policy_that_is_lifted_lets_the_job_and_what_was_skipped_run(
    audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    submitted(audit, "row-1")
    done = submitted(audit)
    assert (done.version, done.added, done.unchanged, done.blocked) == (2, 2, 4, 0)
    assert statuses(database, "status", "error") == [("ready", None), ("waiting", None)] * 3
    while lease := try_lease(audit):
        completed(audit, lease, clean)
    assert set(statuses(database)) == {"succeeded"}


def test_a_policy_that_is_tightened_blocks_what_has_not_succeeded_though_the_text_is_the_same(
    audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    submitted(audit)
    first, second, third = (leased(audit, limit=1) for _ in range(3))
    completed(audit, first, clean)
    failed(audit, second, second.jobs[0])
    done = submitted(audit, "row-0", "row-1", "row-2")
    assert (done.version, done.blocked) == (2, 3)
    assert statuses(database) == ["succeeded", "ready", "blocked", "skipped", "blocked", "skipped"]
    assert statuses(database, "status", "error_kind", "error")[2::2] == [WHY, WHY]
    assert completed(audit, third, clean) == [False]  # it was leased when it was blocked, so it is not recorded
    again = submitted(audit, "row-0", "row-1", "row-2")
    assert (again.version, again.added, again.blocked) == (2, 0, 3)


def test_a_job_that_is_denied_by_another_rule_names_that_one(
    audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    submitted(audit, "row-1")
    other = "deployment policy.deny: 'widow'"
    assert submitted(audit, "row-1", rule=other).version == 2
    assert statuses(database, "status", "error")[2] == ("blocked", other)
    assert submitted(audit, "row-1", rule=other).version == 2


def test_a_job_whose_prompt_changed_and_is_still_denied_stays_blocked(
    audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    published(audit, [replace(job_spec("a"), blocked=RULE)])
    published(audit, [replace(job_spec("a", prompt="changed"), blocked=RULE)])
    assert statuses(database, "status", "error_kind", "error") == [WHY]
    published(audit, [job_spec("a", prompt="changed again")])
    assert statuses(database) == ["ready"]


@pytest.mark.parametrize("status", ["blocked", "failed", "skipped", "cancelled"])
def test_no_retry_brings_a_denied_job_to_run(
    status: str, audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    submitted(audit)
    one = leased(audit, limit=1)
    failed(audit, one, one.jobs[0])
    done = submitted(audit, "row-0", "row-1", "row-2")
    if status == "cancelled":
        published(audit, judged(count=1), prune=True)
    with audit.transaction() as tx:
        job_control.retry(tx, campaign_id=done.campaign_id, statuses=[status])
        kept = job_control.forbidden(tx.connection, campaign_id=done.campaign_id, status=status)
    assert kept == {"blocked": 3, "cancelled": 2}.get(status, 0)
    ready = try_lease(audit)
    made = [] if ready is None else [job.row_key for job in ready.jobs]
    assert made == (["row-0"] if status == "cancelled" else [])  # requested and allowed by the latest version


def test_a_denied_job_whose_weights_were_revoked_too_needs_both_lifted(
    audit: AuditLog, database: Database, clean: LocalStore
) -> None:
    spec = next(chains(1, checkpoint=CheckpointRef(alias="shapes", digest=DIGEST)))
    with audit.transaction() as tx:
        registry.remember(tx, [checkpoint_files("shapes")])
    done = published(audit, [spec])
    with audit.transaction() as tx:
        registry.revoke(tx, DIGEST, because="licence")
    published(audit, [replace(spec, blocked=RULE)])
    assert statuses(database, "status", "error_kind", "error") == [WHY]
    with audit.transaction() as tx:
        assert job_control.retry(tx, campaign_id=done.campaign_id, statuses=["blocked"]) == 0
    published(audit, [spec])
    assert statuses(database, "status", "error_kind") == [("blocked", "checkpoint-revoked")]


CAMPAIGN = """\
name: spiders
checkpoint: shapes
variables: {who: [widow, black widow spider, star]}
defaults: {width: 64, height: 64, num_inference_steps: 2}
policy: {deny: [Widow], allow: [black widow spider]}
stages:
  - {id: draft, task: text-to-image, prompt: "a {{ who }}"}
  - {id: scene, task: image-to-image, prompt: x, image: {stage: draft}, strength: 0.5}
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the fake engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FAKE_ENGINE, "0")
    (tmp_path / "spiders.yaml").write_text(CAMPAIGN)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str, exit_code: int = 0) -> Any:
    """The JSON document of one command."""
    capsys.readouterr()
    assert cli.run([*words, "--json"]) == exit_code
    return json.loads(capsys.readouterr().out)


def test_the_commands_say_what_is_blocked_by_which_rule_and_a_retry_is_refused(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["submit", "spiders.yaml"]) == 0
    assert capsys.readouterr().out == "spiders version 1: 6 jobs added, 0 unchanged, 1 blocked by a policy\n"
    assert run(capsys, "worker", "--until-idle")["succeeded"] == 4
    counts = run(capsys, "status", "spiders")["campaigns"][0]["jobs"]
    assert (counts["succeeded"], counts["blocked"], counts["skipped"]) == (4, 1, 1)
    (blocked,) = run(capsys, "jobs", "spiders", "--status", "blocked")["jobs"]
    assert (blocked["variables"], blocked["error"]) == ({"who": "widow"}, "policy.deny: 'Widow'")
    assert cli.run(["retry", "spiders", "--status", "blocked"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("a policy forbids all 1 blocked jobs of spiders, and a retry does not change that (")
    assert run(capsys, "audit", "verify")["faults"] == []


def test_a_campaign_cannot_loosen_the_deployments_policy(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDP_POLICY_FILE", "policy.yaml")
    (desk / "policy.yaml").write_text("deny: [star]\nallow: [a widow]\n")
    (desk / "spiders.yaml").write_text(CAMPAIGN.replace("allow: [", "allow: [a star, "))
    assert run(capsys, "submit", "spiders.yaml")["blocked"] == 2
    found = run(capsys, "jobs", "spiders", "--status", "blocked")["jobs"]
    assert [job["error"] for job in found] == ["policy.deny: 'Widow'", "deployment policy.deny: 'star'"]
    (desk / "policy.yaml").write_text("deny: [moon]\n")
    assert run(capsys, "submit", "spiders.yaml")["blocked"] == 1
    assert run(capsys, "worker", "--until-idle")["succeeded"] == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("policy:\n  denny: [x]\n", "policy.yaml:2:3: policy.denny: unknown key (did you mean 'deny'?)"),
        (
            "max_width: 32\n",
            "spiders.yaml:4:12: defaults.width: makes a picture of width 64, deployment policy.max_width",
        ),
        (
            "checkpoints: [flux]\n",
            "spiders.yaml:2:1: checkpoint: deployment policy.checkpoints does not allow 'shapes'",
        ),
        (None, "policy.yaml: cannot be read: No such file or directory"),
    ],
)
def test_what_the_deployments_policy_refuses_is_one_line_and_nothing_is_written(
    text: str | None, expected: str, desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDP_POLICY_FILE", "policy.yaml")
    if text is not None:
        (desk / "policy.yaml").write_text(text)
    assert cli.run(["submit", "spiders.yaml"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(expected)
    assert said.err.count("\n") == 1
    assert not (desk / "sdp-home").exists()
