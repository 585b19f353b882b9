# ruff: noqa: E501 -- a mistake is one line, regardless of its length
"""``controlnets[].control_mode``: the kind of control map of a union ControlNet, by name or number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sdpipeline.batching import batch_key
from sdpipeline.campaigns import expand, json_schema
from sdpipeline.domain import GenerationRequest, fingerprint, request_from_document, to_document
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, campaign_of, checkpoint_files, input_folder, jobs_of

CATALOGUE = CATALOG | {
    files.alias: files
    for files in (
        checkpoint_files("xl", family="sdxl"),
        checkpoint_files("flux", family="flux"),
        checkpoint_files("xl-canny", kind="controlnet", family="sdxl"),
        checkpoint_files("xl-union", kind="controlnet", family="sdxl-union"),
        checkpoint_files("xl-union-2", kind="controlnet", family="sdxl-union"),
        checkpoint_files("flux-union", kind="controlnet", family="flux-union"),
    )
}
STAGE = """
defaults: {width: 64, height: 64}
stages:
  - {id: draft, task: text-to-image, prompt: a circle}
  - id: final
    task: text-to-image
    checkpoint: BASE
    prompt: a circle
    controlnets: [USES]
"""


def _text(base: str, *uses: str) -> str:
    written = ", ".join(f"{{image: {{stage: draft}}, {use}}}" for use in uses)
    return STAGE.replace("BASE", base).replace("USES", written)


def _mistakes(base: str, *uses: str) -> list[str]:
    try:
        found = campaign_of(_text(base, *uses), catalog=CATALOGUE)
        expand.check(found, input_folder(Path("/nowhere")))
    except CampaignError as error:
        return [str(mistake).partition("stages[1].")[2] for mistake in error.mistakes]
    return []


def _request(base: str, *uses: str) -> GenerationRequest:
    jobs = jobs_of(_text(base, *uses), catalog=CATALOGUE)
    return next(job.request for job in jobs if job.stage == "final")


@pytest.mark.parametrize(
    ("base", "mode", "number"),
    [
        ("xl", "canny", 3),
        ("xl", "openpose", 0),
        ("xl", "anime_lineart", 3),
        ("xl", "Segment", 5),
        ("xl", "7", 7),
        ("flux", "canny", 0),
        ("flux", "lq", 6),
        ("flux", "9", 9),
    ],
)
def test_a_mode_is_a_name_in_the_published_order_or_a_number(base: str, mode: str, number: int) -> None:
    request = _request(base, f"checkpoint: {base}-union, control_mode: {mode}")
    assert request.controlnets[0].control_mode == number
    assert request_from_document(json.loads(json.dumps(to_document(request)))) == request


@pytest.mark.parametrize(
    ("base", "use", "expected"),
    [
        ("xl", "checkpoint: xl-union", "controlnets[0].control_mode: 'xl-union' is a union ControlNet and needs it (write one of pose (0), depth (1), "),
        ("flux", "checkpoint: flux-union", "controlnets[0].control_mode: 'flux-union' is a union ControlNet and needs it (write one of canny (0), tile (1), "),
        ("flux", "checkpoint: flux-union, control_mode: cany", "controlnets[0].control_mode: no control mode 'cany' (write one of canny (0), "),
        ("xl", "checkpoint: xl-union, control_mode: -1", "controlnets[0].control_mode: -1 is not a mode of 'xl-union' (write one of pose (0), "),
        ("xl", "checkpoint: xl-canny, control_mode: canny", "controlnets[0].control_mode: 'xl-canny' is not a union ControlNet and has no modes (remove it)"),
        ("shapes", "checkpoint: xl-union, control_mode: 0", "controlnets[0].checkpoint: 'xl-union' is for sdxl-union and cannot steer text-to-image of 'shapes' (sd1)"),
        ("flux", "checkpoint: xl-union, control_mode: 0", "controlnets[0].checkpoint: 'xl-union' is for sdxl-union and cannot steer text-to-image of 'flux' (flux)"),
    ],
)  # fmt: skip
def test_a_wrong_mode_is_refused_with_the_list(base: str, use: str, expected: str) -> None:
    (found,) = _mistakes(base, use)
    assert expected in found


def test_unions_run_with_several_modes_or_several_unions_but_not_with_ordinary_controlnets() -> None:
    canny, pose = "checkpoint: xl-union, control_mode: canny", "checkpoint: xl-union, control_mode: pose"
    other = "checkpoint: xl-union-2, control_mode: pose"
    assert _mistakes("xl", canny, pose) == _mistakes("xl", canny, other) == []
    assert "does not run together with 'xl-canny'" in _mistakes("xl", canny, "checkpoint: xl-canny")[0]
    assert "is used twice with the same control_mode" in _mistakes("xl", canny, canny)[0]
    assert "do not run together with another union" in _mistakes("xl", canny, pose, other)[0]


def test_modes_are_part_of_the_fingerprint_and_the_batch_but_change_nothing_where_there_is_none() -> None:
    one, other = (_request("xl", f"checkpoint: xl-union, control_mode: {mode}") for mode in ("canny", "pose"))
    assert fingerprint(one) != fingerprint(other)
    assert batch_key(one) != batch_key(other)
    ordinary: Any = to_document(_request("xl", "checkpoint: xl-canny"))
    assert "control_mode" not in ordinary["controlnets"][0]


def test_the_schema_takes_a_name_or_a_number() -> None:
    use = {"checkpoint": "xl-union", "image": {"stage": "draft"}}
    schema = json_schema.document()
    shape = {"$defs": schema["$defs"], "$ref": "#/$defs/ControlNetSpec"}
    for mode in ("canny", 3):
        jsonschema.validate(use | {"control_mode": mode}, shape)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(use | {"control_mode": [1]}, shape)
