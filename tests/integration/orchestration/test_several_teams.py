"""Teams that share a Prefect server and use the same campaign name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas import filters

from sdpipeline import orchestration
from sdpipeline.app import services
from sdpipeline.flows.campaign import campaign
from sdpipeline.orchestration.campaign_request import EVERYTHING
from sdpipeline.orchestration.deployed_campaign import CAMPAIGN_DEPLOYMENT, run_request
from sdpipeline.orchestration.local_server import own_server
from tests.integration.commands import document

if TYPE_CHECKING:
    import pytest

CAMPAIGN = """\
name: twin
checkpoint: shapes
defaults: {width: 64, height: 64}
stages: [{id: only, task: text-to-image, prompt: "a circle"}]
"""


def test_every_team_gets_a_run_of_its_own_at_night(
    prefect_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twin.yaml").write_text(CAMPAIGN)
    tagged = filters.FlowRunFilter(tags=filters.FlowRunFilterTags(all_=["campaign:twin"]))
    told = []
    with (
        own_server(prefect_home),
        orchestration.prefect_server(services.load_settings(prefect_home), always_own=True),
        get_client(sync_client=True) as client,
    ):
        made: UUID = client.create_deployment(client.create_flow(campaign), CAMPAIGN_DEPLOYMENT.partition("/")[2])
        for team in ("east", "west", "west"):
            monkeypatch.setenv("SDP_TEAM", team)
            document("submit", tmp_path / "twin.yaml", "--home", tmp_path / "home", given={"SDP_TEAM": team})
            told.append(run_request(services.load_settings(tmp_path / "home"), EVERYTHING).message)
        runs = client.read_flow_runs(flow_run_filter=tagged)
        client.delete_deployment(made)
    assert told == ["started: twin", "started: twin", "no work is left"]
    assert sorted(tag for run in runs for tag in run.tags if tag.startswith("team:")) == ["team:east", "team:west"]
