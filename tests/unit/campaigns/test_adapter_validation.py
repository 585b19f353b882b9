# ruff: noqa: E501 -- a mistake is one line, regardless of its length

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdpipeline.campaigns import expand
from sdpipeline.domain import AdapterInput, GenerationRequest, ImageSource, request_from_document, to_document
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, campaign_of, checkpoint_files, input_folder, jobs_of

WEIGHTS = CATALOG | {
    files.alias: files
    for files in (
        checkpoint_files("pencil", kind="lora", family="any"),
        checkpoint_files("xl-style", kind="lora", family="sdxl"),
        checkpoint_files("xl-sharp", kind="vae", family="sdxl"),
        checkpoint_files("gan", family="gan-upscale", scale=4),
    )
}
STAGE = """
variables: {strength: [0.25, 0.75]}
defaults: {width: 64, height: 64}
stages:
  - {id: draft, task: text-to-image, prompt: a circle}
  - id: final
    task: text-to-image
    prompt: a {{ strength }} circle
"""


def _mistakes(extra: str, stage: str = STAGE) -> list[str]:
    try:
        found = campaign_of(stage + f"    {extra}\n", catalog=WEIGHTS)
        expand.check(found, input_folder(Path("/nowhere")))
    except CampaignError as error:
        return [str(mistake).partition("stages[1].")[2] for mistake in error.mistakes]
    return []


def _requests(extra: str) -> list[GenerationRequest]:
    jobs = jobs_of(STAGE + f"    {extra}\n", catalog=WEIGHTS)
    return [job.request for job in jobs if job.stage == "final"]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("loras: [{checkpoint: stile}]", "loras[0].checkpoint: no LoRA 'stile' (did you mean 'style'?)"),
        ("loras: [{checkpoint: toy}]", "loras[0].checkpoint: no LoRA 'toy', it is a textual-inversion (there are pencil, style, xl-style)"),
        ("loras: [{checkpoint: xl-style}]", "loras[0].checkpoint: 'xl-style' is for sdxl, but 'shapes' is sd1 (did you mean 'style'?)"),
        ("loras: [{checkpoint: style, weight: 11}]", "loras[0].weight: 11 is not from -10 to 10"),
        ("loras: [{checkpoint: style, weight: much}]", "loras[0].weight: 'much' is not a number from -10 to 10"),
        ("loras: [{checkpoint: style, weigth: 1}]", "loras[0].weigth: unknown key (did you mean 'weight'?)"),
        ("loras: [{weight: 1}]", "loras[0].checkpoint: is missing (add it)"),
        ("loras: [style]", "loras[0]: found 'style', expected keys with values"),
        ("loras: {checkpoint: style}", "loras: found keys with values, expected a list"),
        ("textual_inversions: [{checkpoint: style}]", "textual_inversions[0].checkpoint: no textual inversion 'style', it is a lora (there is only toy)"),
        ("textual_inversions: [{checkpoint: toy, weight: 1}]", "textual_inversions[0].weight: unknown key (there is only checkpoint)"),
        ("ip_adapters: [{checkpoint: face}]", "ip_adapters[0].image: is missing (add it)"),
        ("ip_adapters: [{checkpoint: face, image: {}}]", "ip_adapters[0].image: needs exactly one of stage:, file: and url:"),
        ("ip_adapters: [{checkpoint: face, image: {stage: drft}}]", "ip_adapters[0].image.stage: no stage 'drft' (did you mean 'draft'?)"),
        ("ip_adapters: [{checkpoint: face, image: {file: no.png}}]", "ip_adapters[0].image.file: 'no.png' "),
        ("ip_adapters: [{checkpoint: fcae, image: {stage: draft}}]", "ip_adapters[0].checkpoint: no IP-Adapter 'fcae' (did you mean 'face'?)"),
        ("vae: shapes", "vae: no autoencoder 'shapes', it is a checkpoint (did you mean 'sharp'?)"),
        ("vae: xl-sharp", "vae: 'xl-sharp' is for sdxl, whose latents differ from those of 'shapes' (did you mean 'sharp'?)"),
        ("reproducibility: strikt", "reproducibility: found 'strikt' (did you mean 'strict'?)"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_key_and_the_nearest_fix(extra: str, expected: str) -> None:
    (found,) = _mistakes(extra)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("checkpoint", "extra", "expected"),
    [
        ("flux", "ip_adapters: [{checkpoint: face, image: {stage: draft}}]", "ip_adapters: Flux does not take it (remove it)"),
        ("flux", "textual_inversions: [{checkpoint: toy}]", "textual_inversions: Flux does not take it (remove it)"),
        ("flux", "loras: [{checkpoint: style}]", "loras[0].checkpoint: 'style' is for sd1, but 'flux' is flux (there is only pencil)"),
    ],
)  # fmt: skip
def test_what_a_family_cannot_wear_is_refused(checkpoint: str, extra: str, expected: str) -> None:
    assert _mistakes(extra, STAGE + f"    checkpoint: {checkpoint}\n") == [expected]


@pytest.mark.parametrize(
    ("upscaler", "worn", "title"),
    [
        ("upscaler", "loras: [{checkpoint: style}]", "Stable Diffusion x4 upscaler"),
        ("gan", "vae: sharp", "GAN upscaler"),
    ],
)
def test_what_an_upscaler_cannot_wear_is_refused(upscaler: str, worn: str, title: str) -> None:
    stage = f"""
stages:
  - {{id: draft, task: text-to-image, prompt: a circle}}
  - id: final
    task: super-resolution
    checkpoint: {upscaler}
    image: {{stage: draft}}
"""
    assert _mistakes(worn, stage) == [f"{worn.partition(':')[0]}: {title} does not take it (remove it)"]


def test_weights_may_be_another_for_each_row_and_keep_their_order() -> None:
    worn = _requests("loras: [{checkpoint: style, weight: '{{ strength }}'}, {checkpoint: pencil}]")
    assert [[(use.checkpoint.alias, use.weight) for use in asked.loras] for asked in worn] == [
        [("style", 0.25), ("pencil", 1.0)],
        [("style", 0.75), ("pencil", 1.0)],
    ]


def test_a_weight_that_only_a_row_shows_to_be_wrong_is_refused() -> None:
    found = _mistakes("loras: [{checkpoint: style, weight: '1{{ strength }}'}]")
    assert found == [f"loras[0].weight: '1{strength}' is not from -10 to 10" for strength in ("0.25", "0.75")]


def test_everything_worn_is_pinned_in_the_request_and_read_back_from_its_document() -> None:
    extra = (
        "loras: [{checkpoint: style}]\n    textual_inversions: [{checkpoint: toy}]\n    vae: sharp\n"
        "    ip_adapters: [{checkpoint: face, image: {stage: draft}, weight: 0.5}]\n    reproducibility: strict"
    )
    asked = _requests(extra)[0]
    assert {ref.alias: ref.digest for ref in asked.checkpoints()} == {
        alias: WEIGHTS[alias].digest for alias in ("shapes", "style", "toy", "face", "sharp")
    }
    assert asked.exact
    assert request_from_document(to_document(asked)) == asked


def test_an_ip_adapters_reference_is_a_parents_picture_of_any_size() -> None:
    text = STAGE.replace("prompt: a circle}", "prompt: a circle, width: 128}")
    extra = "    ip_adapters: [{checkpoint: face, image: {stage: draft}}]\n"
    jobs = jobs_of(text + extra, catalog=WEIGHTS)
    draft, final = jobs[0], next(job for job in jobs if job.stage == "final")
    (use,) = final.request.ip_adapters
    assert use == AdapterInput(checkpoint=use.checkpoint, image=ImageSource(stage="draft", digest=draft.fingerprint))
    assert (final.request.width, final.parents) == (64, (("draft", draft.identity),))


def test_a_stage_may_want_another_reproducibility_than_its_campaign() -> None:
    text = "reproducibility: strict\n" + STAGE + "    reproducibility: tolerant\n"
    asked = {job.stage: job.request.reproducibility for job in jobs_of(text, catalog=WEIGHTS)}
    assert asked == {"draft": "strict", "final": "tolerant"}


def test_the_default_reproducibility_changes_no_fingerprint() -> None:
    plain, named = _requests("seed: same"), _requests("seed: same\n    reproducibility: tolerant")
    assert plain == named
    assert "reproducibility" not in to_document(plain[0])


def test_a_lora_of_another_network_type_that_was_registered_before_is_refused_by_plan(tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{layer}.hada_w1_a": np.ones((4, 4), np.float32)}, tmp_path / "style.safetensors")
    old = replace(CATALOG["style"], directory=tmp_path, manifest={"style.safetensors": "0" * 64})
    with pytest.raises(CampaignError, match=r"loras\[0\]\.checkpoint: 'style' is a LoHa .*not applied here; merge it"):
        campaign_of(STAGE + "    loras: [{checkpoint: style}]\n", catalog=WEIGHTS | {"style": old})
