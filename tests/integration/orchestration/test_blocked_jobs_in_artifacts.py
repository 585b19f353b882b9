"""Jobs that a policy blocks are shown in the artifact of failed jobs, although they did not fail."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters

from sdpipeline import orchestration
from sdpipeline.app import queries, services
from sdpipeline.orchestration.artifacts import RunArtifacts
from sdpipeline.orchestration.local_server import own_server
from tests.integration.commands import document

CAMPAIGN = """\
name: parlour
checkpoint: shapes
policy: {deny: [widow]}
variables: {who: ["widow ![x](http://a.b/c)", spider]}
defaults: {width: 64, height: 64}
stages: [{id: only, task: text-to-image, prompt: "a {{ who }}"}]
"""


def test_blocked_jobs_are_listed_with_their_rule(prefect_home: Path, tmp_path: Path) -> None:
    (tmp_path / "parlour.yaml").write_text(CAMPAIGN)
    document("submit", tmp_path / "parlour.yaml", "--home", tmp_path)
    settings = services.load_settings(tmp_path)

    @flow
    def shows() -> None:
        with services.open_services(settings) as have:
            RunArtifacts(have, "parlour").show(queries.campaign_progress(have, "parlour"))

    with own_server(prefect_home), orchestration.prefect_server(services.load_settings(prefect_home), always_own=True):
        shows()
        mine = filters.ArtifactFilter(key=filters.ArtifactFilterKey(any_=["failures-parlour"]))
        with get_client(sync_client=True) as client:
            (table,) = client.read_artifacts(artifact_filter=mine)
    assert table.description == "0 jobs failed, 1 blocked"
    assert not re.search(r"[!\[\]<]|://", str(table.data).strip("[]"))  # the page renders cells as Markdown
    (blocked,) = json.loads(str(table.data))
    assert [unescape(blocked[name]) for name in ("status", "error", "variables")] == [
        "blocked", "policy.deny: 'widow'", "widow ![x](http://a.b/c)",
    ]  # fmt: skip
    with services.open_services(settings) as have:
        told = queries.finish_report(have, "parlour")
    assert "0 jobs failed, 1 blocked:" in told
    assert "| 1 | blocked | only |  | 0 | policy.deny: 'widow' |" in unescape(told)
