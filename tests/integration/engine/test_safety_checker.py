"""A safety checker from the registry: flagged pictures are blocked by their rule and never stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdpipeline.app import keys, services
from sdpipeline.audit import verify
from sdpipeline.domain import CheckpointRef, Json
from sdpipeline.engine import Pixels
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.fake import FakeEngine
from sdpipeline.errors import CampaignError, CheckpointError
from tests.factories import events
from tests.integration.tiny_checkpoints import tiny_checkpoints
from tests.integration.worker_campaigns import Workplace, campaign, workplace

DRAFT = {"id": "draft", "task": "text-to-image", "prompt": "a cat"}
FINAL = {"id": "final", "task": "image-to-image", "prompt": "a cat", "image": {"stage": "draft"}, "strength": 0.5}
FORBIDS, ALLOWS = {"safety_checker": "safety-forbids"}, {"safety_checker": "safety-allows"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("safety")) as found:
        found.approve("sd1", "safety-allows", "safety-forbids")
        yield found


def stored(place: Workplace) -> set[Path]:
    return set((place.settings.home / "storage").rglob("*.png"))


def submitted(place: Workplace, name: str, policy: Mapping[str, Any], *stages: Mapping[str, Any]) -> list[Json]:
    place.submit(campaign(name, "sd1", *(stages or (DRAFT,)), policy=policy))
    return place.work(name)


def test_a_flagged_picture_is_blocked_by_its_rule_and_stored_nowhere(place: Workplace) -> None:
    before = stored(place)
    place.submit(campaign("forbidden", "sd1", DRAFT, FINAL, policy=FORBIDS))
    done = place.worker.run(campaign="forbidden")
    draft, final = place.jobs("forbidden")
    assert (done.blocked, done.failed, done.succeeded) == (1, 0, 0)
    assert (draft["status"], draft["error"], draft["image"]) == (
        "blocked",
        "policy.safety_checker: 'safety-forbids'",
        None,
    )
    assert (final["status"], stored(place)) == ("skipped", before)
    with services.open_services(place.settings) as have:
        (told,) = [event for event in events(have.database) if event["event"] == "job.failed"]
        assert told["subject"] == f"job:{draft['id']}"
        assert (told["error_kind"], told["rule"]) == ("PictureBlocked", draft["error"])
        assert verify(have.database, have.store, keys.seal_key(place.settings)).faults == []


def test_what_passes_says_in_its_record_who_saw_it(place: Workplace) -> None:
    (job,) = submitted(place, "allowed", ALLOWS)
    ref = tiny_checkpoints().ref("safety-allows")
    assert place.ran(job)["safety_checkers"] == [{"alias": ref.alias, "digest": ref.digest}]


def test_a_picture_that_nobody_saw_is_made_again_rather_than_copied(place: Workplace) -> None:
    other = DRAFT | {"prompt": "a dog"}
    submitted(place, "unseen", {}, other)
    (seen,) = submitted(place, "seen", ALLOWS, other)
    (copied,) = submitted(place, "copied", ALLOWS, other)
    (blocked,) = submitted(place, "judged", FORBIDS, other)
    assert ("reused_from" in place.sidecar(seen), "reused_from" in place.sidecar(copied)) == (False, True)
    assert blocked["status"] == "blocked"


def test_the_deployments_checker_looks_beside_the_campaigns_own(place: Workplace, tmp_path: Path) -> None:
    policy_file = tmp_path / "policy.yaml"
    policy_file.write_text("safety_checker: safety-forbids\n")
    strict = Workplace(place.settings.model_copy(update={"policy_file": policy_file}), place.folder, place.worker)
    (job,) = submitted(strict, "by-the-deployment", ALLOWS)
    assert (job["status"], job["error"]) == ("blocked", "deployment policy.safety_checker: 'safety-forbids'")


@pytest.mark.parametrize(
    ("alias", "why"), [("safety-forbid", "did you mean"), ("sd1", "is a checkpoint, not a safety checker")]
)
def test_a_checker_that_is_not_registered_or_is_none_refuses_the_campaign(
    place: Workplace, alias: str, why: str
) -> None:
    with pytest.raises(CampaignError, match=why):
        place.submit(campaign("refused", "sd1", DRAFT, policy={"safety_checker": alias}))


def test_pictures_are_told_apart_by_the_thresholds_in_the_weights(place: Workplace, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    source = tiny_checkpoints().directory("safety-allows")
    network, processor = (each.from_pretrained(source) for each in (StableDiffusionSafetyChecker, CLIPImageProcessor))
    pictures = [_grey(20), _grey(235)]
    seen = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedded = torch.nn.functional.normalize(network.visual_projection(network.vision_model(seen)[1]))
        near = embedded @ torch.nn.functional.normalize(network.concept_embeds).T
    concept = int((near[0] - near[1]).abs().argmax())
    network.concept_embeds_weights.data[concept] = near[:, concept].mean()
    network.save_pretrained(tmp_path / "between")
    processor.save_pretrained(tmp_path / "between")
    files = inspect("between", tmp_path / "between")
    place.add(files)
    flagged = place.engine.flagged(CheckpointRef(alias="between", digest=files.digest), pictures)
    assert list(flagged) == (near[:, concept] > near[:, concept].mean()).tolist()


def _grey(level: int) -> Pixels:
    noise = np.random.default_rng(level).integers(-10, 10, (64, 64, 3))
    return (level + noise).astype(np.uint8)


def test_the_double_for_load_tests_says_that_it_cannot_tell() -> None:
    with pytest.raises(CheckpointError, match="runs no network"):
        FakeEngine().flagged(CheckpointRef(alias="a", digest="b"), [_grey(1)])
