"""Campaigns on Prefect: deployed, dispatched to a pool, scheduled, killed, cancelled, resumed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpipeline.audit import load_key
from tests.chaos.invariants import violations
from tests.conftest import copied_into
from tests.integration.conftest import new_postgres_database
from tests.integration.deployed import FAKE, SILENCE_S, Site, site

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

JOBS = 96
MANY = 192
"""Half a minute for one worker of the fake engine: long enough for a second one to start on a busy machine."""
BATCH = 4


def campaign(name: str, *, jobs: int = JOBS, extra: str = "") -> str:
    return f"""\
name: {name}
checkpoint: shapes
{extra}
seeds: {{start: 0, count: {jobs}}}
defaults: {{width: 64, height: 64, num_inference_steps: 8, guidance_scale: 4.0}}
stages:
  - {{id: draft, task: text-to-image, prompt: "a red circle, {name}"}}
"""


@pytest.fixture(scope="module")
def here(
    postgres_server: str, moto_url: str, prefect_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with all deployments, a worker for the pool `cpu`, and a schedule that is due in a minute or two."""
    folder = tmp_path_factory.mktemp("site")
    load_key(folder / "seal.pem", create=True)
    copied_into(folder / "prefect", prefect_database)
    with (
        new_postgres_database(postgres_server) as url,
        site(folder, url, moto_url, folder / "seal.pem") as here,
    ):
        here.command("deploy", "--max-campaigns", "2", "--silence-s", SILENCE_S)
        here.start_worker("cpu", "cpu")
        yield here


@pytest.fixture(scope="module")
def due(here: Site) -> datetime:
    """The time at which the scheduled campaign `nightly`, whose file is in a bucket, is made once as an edition."""
    at = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    at += timedelta(minutes=1) if at - datetime.now(UTC) < timedelta(seconds=15) else timedelta()
    schedule = f'schedule: {{cron: "{at:%M %H * * *}", timezone: UTC, mode: edition}}'
    text = campaign("nightly", jobs=2, extra=schedule).encode()
    here.bucket.client.put_object(Bucket=here.bucket.name, Key="campaigns/nightly.yaml", Body=text)
    made = here.command("schedule", f"s3://{here.bucket.name}/campaigns/nightly.yaml")
    assert made["deployment"] == "campaign/default.nightly"
    return at


@pytest.fixture(scope="module")
def together(here: Site, due: datetime) -> dict[str, Any]:
    """The worker runs of a finished campaign that was dispatched to two real workers in separate folders."""
    workers = [here.start_worker("gpu", name, SDP_ENGINE__MAX_BATCH="4") for name in ("left", "right")]
    run = here.run(parameters={"request": {"text": campaign("spring"), "min_workers": 2, "max_workers": 2}})
    here.until(lambda: here.state(run) in {"Completed", "Failed", "Crashed"})
    assert here.state(run) == "Completed", here.output("cpu")
    here.until(lambda: {each["state"]["name"] for each in here.workers("spring").values()} == {"Completed"})
    for worker in workers:
        _kill(worker)
    return here.workers("spring")


@pytest.fixture(scope="module")
def gpus(together: dict[str, Any], here: Site) -> dict[str, subprocess.Popen[bytes]]:
    """The two workers of the pool `gpu` from here on: they use the fake engine, with batches of 0.6 seconds."""
    return {name: here.start_worker("gpu", name, **FAKE) for name in ("first", "second")}


def test_what_is_deployed_has_its_schedules_its_form_and_its_limit(here: Site) -> None:
    deployed = {each["name"]: each for each in here.ask("deployments/filter")}
    crons = {name: [s["schedule"]["cron"] for s in each["schedules"]] for name, each in deployed.items()}
    assert [name for name in ("campaign", "reclaim", "seal", "reconcile", "retention", "audit-verify") if crons[name]]
    form = deployed["campaign"]["parameter_openapi_schema"]["definitions"]
    assert form["Reopen"]["enum"] == ["nothing", "failed", "blocked", "cancelled"]
    assert form["CampaignRequest"]["properties"]["max_workers"]["anyOf"][0]["maximum"] == 1000
    assert all(each["description"] for each in form["CampaignRequest"]["properties"].values())
    assert here.look("work_pools/cpu/queues/campaigns")["concurrency_limit"] == 2
    assert [each["enabled"] for each in here.ask("automations/filter")] == [True]


def test_two_workers_of_a_pool_make_each_picture_once(here: Site, together: dict[str, Any]) -> None:
    assert sorted(together) == ["spring · worker 0", "spring · worker 1"]
    assert all(
        {"campaign:spring", "team:default", "checkpoint:shapes"} <= set(run["tags"]) for run in together.values()
    )
    made = Counter(each.worker_id for each in here.attempts("spring"))
    assert len(made) == 2, "one of them came too late to take part"
    assert here.succeeded("spring") == sum(made.values()) == JOBS  # so no job was attempted twice


def test_each_worker_loaded_its_checkpoint_once(here: Site, together: dict[str, Any]) -> None:
    assert [here.output(name).count("checkpoint_loaded") for name in ("left", "right")] == [1, 1]


@pytest.fixture(scope="module")
def survivor(here: Site, gpus: dict[str, subprocess.Popen[bytes]]) -> dict[str, Any]:
    """A campaign that finished although one worker process was killed, and another together with its supervising
    processes."""
    run = here.run(parameters={"request": {"text": campaign("summer", jobs=MANY), "min_workers": 2, "max_workers": 2}})
    here.until(lambda: len(here.at_work("summer")) == 2)
    theirs = {each.pid for each in _family(gpus["second"])}
    lonely, other = sorted(here.at_work("summer"), key=lambda worker: worker["pid"] not in theirs)
    os.kill(other["pid"], signal.SIGKILL)
    here.until(lambda: _taken_over(here, other["id"], lonely["id"]))
    _kill(gpus["second"])
    gpus["second"] = here.start_worker("gpu", "third", **FAKE)
    here.until(lambda: here.state(run) == "Completed")
    return {"killed": other["id"], "lonely": lonely["id"]}


@pytest.mark.chaos
def test_a_killed_worker_shows_as_crashed_and_another_is_dispatched(here: Site, survivor: dict[str, Any]) -> None:
    states = Counter(run["state"]["name"] for run in here.workers("summer").values())
    assert states["Crashed"] >= 1
    assert "summer · worker 2" in here.workers("summer")


@pytest.mark.chaos
def test_what_a_killed_worker_held_is_made_by_one_that_lives_when_its_lease_ran_out(
    here: Site, survivor: dict[str, Any]
) -> None:
    assert _taken_over(here, survivor["killed"], survivor["lonely"])
    assert here.succeeded("summer") == MANY


def test_a_campaign_that_is_cancelled_stops_within_a_batch_and_keeps_its_pictures(
    here: Site, gpus: dict[str, subprocess.Popen[bytes]], survivor: dict[str, Any]
) -> None:
    run = here.run(parameters={"request": {"text": campaign("autumn", jobs=MANY)}})
    here.until(lambda: here.succeeded("autumn"))
    here.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    here.until(lambda: not here.progress("autumn").leased)
    made = here.succeeded("autumn")
    here.until(lambda: here.state(run) == "Cancelled")
    here.until(lambda: {each["state"]["name"] for each in here.workers("autumn").values()} == {"Cancelled"})
    progress = here.progress("autumn")
    assert (progress.succeeded, progress.leased, progress.ready) == (made, 0, MANY - made)
    assert 0 < made < MANY
    assert {each.outcome for each in here.attempts("autumn")} == {"succeeded", "released"}
    said = "".join(here.output(name) for name in ("cpu", "first", "third"))
    assert "Finished in state Cancelling" in said
    assert "Finished in state Running" not in said


def test_a_worker_that_is_told_to_move_gives_its_work_back_and_goes_on_elsewhere(
    here: Site, gpus: dict[str, subprocess.Popen[bytes]], survivor: dict[str, Any]
) -> None:
    # As a pod is started: no other worker may take the run until it is rescheduled.
    run = here.run("gpu-worker/gpu-worker", parameters={"campaign": "autumn"}, state={"type": "PENDING"})
    pod = here.execute(run, PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR="reschedule", **FAKE)
    (mine,) = here.until(lambda: here.at_work("autumn"))
    pod.send_signal(signal.SIGTERM)
    here.until(lambda: mine["id"] not in {each["id"] for each in here.at_work("autumn")})
    assert {each.outcome for each in here.attempts("autumn", worker=mine["id"])} == {"succeeded", "released"}
    assert pod.wait(30) == 0
    (elsewhere,) = here.until(lambda: here.at_work("autumn"))
    assert elsewhere["pid"] in {each.pid for gpu in gpus.values() for each in _family(gpu)}
    here.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    here.until(lambda: here.state(run) == "Cancelled")


@pytest.mark.chaos
def test_a_worker_that_was_killed_with_whatever_watched_it_is_marked_crashed(
    here: Site, survivor: dict[str, Any]
) -> None:
    here.until(lambda: Counter(run["state"]["name"] for run in here.workers("summer").values())["Crashed"] == 2)
    messages = [run["state"]["message"] for run in here.workers("summer").values()]
    assert f"no heartbeat for {SILENCE_S} s" in messages


def test_a_schedule_made_its_edition_when_it_was_due(here: Site, due: datetime, survivor: dict[str, Any]) -> None:
    here.until(lambda: (progress := here.progress("nightly")) and not progress.remaining)
    (run,) = here.campaign_runs("nightly")
    assert datetime.fromisoformat(run["expected_start_time"]) == due
    here.until(lambda: here.state(run["id"]) == "Completed")
    made = here.command("jobs", "nightly")["jobs"]
    assert {each["edition"] for each in made} == {f"{due:%Y-%m-%d}"}
    assert here.command("schedule", "nightly", "--off") == {"campaign": "nightly", "deployment": None}
    here.command("schedule", "nightly", "--off", exit_code=2)


@pytest.mark.chaos
def test_a_campaign_outlives_the_prefect_server_in_its_middle(here: Site, survivor: dict[str, Any]) -> None:
    nightly = here.run()  # the nightly run, which takes all unfinished campaigns
    here.until(lambda: here.state(nightly) == "Completed")
    assert here.look(f"flow_runs/{nightly}")["state"]["message"] == "started: autumn"
    run = here.campaign_runs("autumn")[-1]["id"]
    before = here.succeeded("autumn")
    here.until(lambda: here.succeeded("autumn") > before)
    assert here.server is not None
    _kill(here.server)
    at_the_kill = here.succeeded("autumn")
    here.until(lambda: here.succeeded("autumn") > at_the_kill + 2 * BATCH)  # leases are taken and finished without it
    here.start_server()
    here.until(lambda: here.succeeded("autumn") == MANY)
    here.until(lambda: here.state(run) == "Completed")
    assert violations(here.database, here.bucket.store("sdp"), load_key(here.folder / "seal.pem", create=False)) == []


def _taken_over(here: Site, dead: str, living: str) -> set[int]:
    """The jobs that one worker held when its lease expired, and that the other worker leased again."""
    held = {each.job_id for each in here.attempts("summer", worker=dead) if each.outcome == "expired"}
    return held & {each.job_id for each in here.attempts("summer", worker=living)}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process and all its children, at once."""
    family = _family(process)
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for member in family:
            act(member)
    process.wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
