"""Model annotators: control maps from networks, in checkpoints of kind annotator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdpipeline.engine import Pixels
from tests.integration.engine_requests import (
    controlnet,
    engine,
    failure_of,
    images,
    noise,
    prepared,
    ref,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

KINDS = ["depth", "segmentation", "pose"]


def map_of(kind: str, picture: Pixels, **changes: Any) -> Pixels:
    control = controlnet("controlnet-sd1", annotator=f"{kind}-learned", annotator_checkpoint=ref(kind), **changes)
    asked = request(controlnets=(control,), num_inference_steps=1)
    return images(prepared(asked, controlnets_0=picture))[0].control_maps[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_annotator_is_recognised_by_its_configuration(kind: str) -> None:
    files = tiny_checkpoints().files(kind)
    assert (files.kind, files.family) == ("annotator", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_map_has_the_pictures_size_and_repeats_itself(kind: str) -> None:
    loose = {"annotator_parameters": (("confidence", 0),)} if kind == "pose" else {}
    first, second = (map_of(kind, noise(3), **loose) for _ in range(2))
    assert first.shape == (64, 64, 3)
    assert (first == second).all()
    assert first.max() > first.min()
    assert ref(kind).digest in engine().resident()


def test_depth_reaches_from_black_to_white() -> None:
    depth = map_of("depth", noise(4))
    assert (depth.min(), depth.max()) == (0, 255)


def test_a_segmentation_has_one_colour_per_label() -> None:
    colours = np.unique(map_of("segmentation", noise(5)).reshape(-1, 3), axis=0)
    assert 1 < len(colours) <= 5


def test_a_pose_below_the_confidence_asked_for_is_not_drawn() -> None:
    assert map_of("pose", noise(6), annotator_parameters=(("confidence", 1),)).max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotator": "depth-learned"},
            "annotator_checkpoint: annotator 'depth-learned' needs a checkpoint for depth",
        ),
        ({"annotator": "canny", "use": "depth"}, "annotator_checkpoint: annotator 'canny' does not take it"),
        ({"annotator": "pose-learned", "use": "depth"}, "'depth' is a annotator for depth, not an annotator for pose"),
    ],
)
def test_the_wrong_weights_for_an_annotator_are_refused(changes: dict[str, Any], message: str) -> None:
    weights = {"annotator_checkpoint": ref(changes["use"])} if "use" in changes else {}
    control = controlnet("controlnet-sd1", annotator=changes["annotator"], **weights)
    refused = results(prepared(request(controlnets=(control,)), controlnets_0=noise()))[0]
    assert message in failure_of(refused)
