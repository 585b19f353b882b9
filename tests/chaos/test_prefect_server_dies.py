"""The Prefect server killed during a run: it only displays the work, and the work continues without it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from sdpipeline.app import keys, services
from sdpipeline.db import queries
from tests.chaos.invariants import violations
from tests.conftest import copied_into
from tests.factories import statuses
from tests.integration.commands import FAKE_ENGINE, kill_tree, start

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(300)]

JOBS = 48
CAMPAIGN = f"""\
name: spring
checkpoint: shapes
seeds: {{start: 0, count: {JOBS}}}
defaults: {{width: 64, height: 64, num_inference_steps: 1, guidance_scale: 1.0}}
stages:
  - {{id: draft, task: text-to-image, prompt: a red circle}}
"""


def test_a_run_outlives_its_prefect_server(home: Path, prefect_database: Path) -> None:
    copied_into(home / "prefect", prefect_database)
    (home / "campaign.yaml").write_text(CAMPAIGN)
    fake = {FAKE_ENGINE: "0.3", "SDP_ENGINE__MAX_BATCH": "4"}
    running = start("run", home / "campaign.yaml", "--home", home, **fake)
    try:
        settings = services.load_settings(home)
        with services.open_services(settings) as have:
            while not _succeeded(have):
                assert running.poll() is None, "it ended before there was anything to lose"
                time.sleep(0.1)
            server = json.loads((home / "prefect" / "server.json").read_text())["server"]
            os.killpg(server["pid"], signal.SIGKILL)
            assert set(statuses(have.database)) - {"succeeded"}, "the kill came too late to tell"
            while set(statuses(have.database)) != {"succeeded"}:
                assert running.poll() is None, "it gave up with work to do"
                time.sleep(0.1)
            # The command keeps trying to report to the server for a minute or two; the test does not wait for that.
            assert violations(have.database, have.store, keys.seal_key(settings)) == []
    finally:
        if running.poll() is None:
            kill_tree(running)


def test_a_killed_run_leaves_no_process_behind(home: Path, prefect_database: Path) -> None:
    copied_into(home / "prefect", prefect_database)
    (home / "campaign.yaml").write_text(CAMPAIGN)
    running = start("run", home / "campaign.yaml", "--home", home, **{FAKE_ENGINE: "5"})
    family = [psutil.Process(running.pid)]
    try:
        with services.open_services(services.load_settings(home)) as have:
            while "leased" not in statuses(have.database):
                assert running.poll() is None, "it ended before there was anything to lose"
                time.sleep(0.1)
        family += family[0].children(recursive=True)
        assert [each for each in family if "local_server_process" in str(each.cmdline())]
        running.kill()
        running.wait()
        psutil.wait_procs(family, timeout=150)
    finally:
        left = [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        for each in left:
            each.kill()
    assert left == []


def _succeeded(have: services.Services) -> int:
    with have.database.read() as connection:
        (campaign_id,) = [queries.campaign_id(connection, team="default", name="spring")]
        return queries.progress(connection, campaign_id).succeeded if campaign_id is not None else 0
