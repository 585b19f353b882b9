"""LoRAs, IP-Adapters, textual inversions and other conditioning: they change the picture while active, and no later
one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import pytest
import torch

from sdpipeline.engine import GeneratedImage
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.diffusers.loras import LoraLoader
from sdpipeline.engine.pixels import to_pixels
from tests.integration.engine_requests import (
    SOURCE,
    adapter,
    distance,
    engine,
    equal,
    failure_of,
    images,
    new_engine,
    noise,
    prepared,
    ref,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

PLAIN = "a cat"


def one(checkpoint: str = "sd1", **changes: Any) -> GeneratedImage:
    return images(prepared(request(checkpoint, **changes)))[0]


def base_weights(on: Any, checkpoint: str = "sd1") -> dict[str, torch.Tensor]:
    loaded = on.residency.get(request(checkpoint).checkpoint)
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in loaded.parts[part].state_dict().items()
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_lora_is_felt_by_its_weight_and_leaves_no_trace(family: str) -> None:
    before = one(family)
    full = one(family, loras=(adapter(f"lora-{family}"),))
    half = one(family, loras=(adapter(f"lora-{family}", weight=0.5),))
    assert min(distance(before, full), distance(before, half), distance(full, half)) > 2
    assert equal(one(family), before)


def test_a_lora_is_the_one_that_diffusers_applies() -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory("sd1"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tiny_checkpoints().directory("lora-sd1"), adapter_name="worn")
    pipe.set_adapters(["worn"], [0.7])
    asked = request(loras=(adapter("lora-sd1", weight=0.7),), scheduler="ddim")
    picture = pipe(
        asked.prompt,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="np",
    ).images[0]
    made = images(prepared(asked))[0]
    assert np.abs(made.pixels.astype(int) - to_pixels(picture).astype(int)).max() <= 1


def test_two_loras_are_worn_together_and_the_next_set_replaces_them() -> None:
    both = (adapter("lora-sd1"), adapter("lora-sd1-other", weight=0.5))
    together, first = one(loras=both), one(loras=both[:1])
    assert distance(together, first) > 2
    assert equal(one(loras=both), together)
    assert [(worn["alias"], worn["weight"]) for worn in together.ran["loras"]] == [
        ("lora-sd1", 1.0),
        ("lora-sd1-other", 0.5),
    ]


def test_a_lora_changes_the_prompt_too() -> None:
    loras = (adapter("lora-sd1"),)
    engine()  # the prompt is cached without the LoRA first
    assert one().ran["checkpoints"] != one(loras=loras).ran["checkpoints"]
    fresh = new_engine()
    assert equal(images(prepared(request(loras=loras)), on=fresh)[0], one(loras=loras))


def test_a_lora_of_another_family_is_refused_and_leaves_no_trace() -> None:
    before = one()
    refused = failure_of(results(prepared(request(loras=(adapter("lora-flux"),))))[0])
    assert refused == "RequestRefusedError: loras: 'lora-flux' is for flux, but 'sd1' is sd1"
    assert equal(one(), before)


def test_a_refused_lora_takes_the_good_one_beside_it_off_again() -> None:
    before = one()
    loras = (adapter("lora-sd1"), adapter("lora-sdxl"))  # too small for its family to be detected from its header
    for _ in range(2):  # the second time, active adapters must not be mistaken for the requested ones
        refused = failure_of(results(prepared(request(loras=loras)))[0])
        assert "CheckpointError: adapters 'lora-sd1', 'lora-sdxl' do not fit 'sd1'" in refused
    assert equal(one(), before)


def test_memory_that_runs_out_while_a_lora_is_loaded_is_no_fault_of_the_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    exhausted, load = chain([True], repeat(False)), LoraLoader.load

    def full_at_first(self: LoraLoader, *args: Any) -> None:
        if next(exhausted):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        load(self, *args)

    monkeypatch.setattr(LoraLoader, "load", full_at_first)
    given, fresh = prepared(request(loras=(adapter("lora-sd1"),))), new_engine()
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate"):
        results(given, on=fresh)
    assert equal(images(given, on=fresh)[0], images(given)[0])


def _own_lora(tmp_path: Path) -> Path:
    """The weights of a LoRA file, known to the engine as lora-<name of the folder>."""
    folder = Path(shutil.copytree(tiny_checkpoints().directory("lora-sd1"), tmp_path / "lora"))
    tiny_checkpoints().add(inspect(f"lora-{tmp_path.name}", folder))
    return next(folder.iterdir())


def _zero_last_half(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def test_an_altered_lora_fails_each_of_its_jobs_and_its_base_goes_on_without_it(tmp_path: Path) -> None:
    _zero_last_half(_own_lora(tmp_path))
    fresh, asked = new_engine(), prepared(request(loras=(adapter(f"lora-{tmp_path.name}"),)))
    for made in (*results(asked, asked, on=fresh), *results(asked, on=fresh)):
        assert "does not have the bytes that were registered" in failure_of(made)
    assert equal(images(prepared(request()), on=fresh)[0], one())


def test_a_lora_that_is_overwritten_while_it_is_worn_does_not_change_pictures(tmp_path: Path) -> None:
    path = _own_lora(tmp_path)
    fresh, asked = new_engine(), request(loras=(adapter(f"lora-{tmp_path.name}"),))
    before = images(prepared(asked), on=fresh)[0]
    assert equal(before, one(loras=(adapter("lora-sd1"),)))
    _zero_last_half(path)
    assert equal(images(prepared(asked), on=fresh)[0], before)


@pytest.mark.long
def test_fifty_switches_leave_memory_and_base_weights_as_they_were() -> None:
    on = new_engine(resident_bytes=tiny_checkpoints().files("sdxl").size_bytes + 10)
    worn = [request(loras=(adapter(name),), num_inference_steps=1) for name in ("lora-sd1", "lora-sd1-other")]
    wardrobe = [*worn, *worn, request("sdxl", num_inference_steps=1), request(num_inference_steps=1)]
    for asked in wardrobe:
        images(prepared(asked), on=on)
    before, weights = psutil.Process().memory_info().rss, base_weights(on)
    for n in range(50):
        images(prepared(wardrobe[n % len(wardrobe)]), on=on)
    images(prepared(request()), on=on)
    assert psutil.Process().memory_info().rss < before * 1.05
    after = base_weights(on)
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_taking_adapters_off_restores_the_same_resident_weights_bit_for_bit() -> None:
    on = new_engine()
    images(prepared(request()), on=on)
    weights = base_weights(on)
    dressed = request(loras=(adapter("lora-sd1"),), ip_adapters=(adapter("ip-adapter-sd1", image=SOURCE),))
    images(prepared(dressed, ip_adapters_0=noise(3)), on=on)
    images(prepared(request()), on=on)
    after = base_weights(on)
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize(("family", "guidance_scale"), [("sd1", 4.0), ("sd1", 1.0), ("sdxl", 4.0)])
def test_each_picture_of_a_batch_has_its_own_reference_picture(family: str, guidance_scale: float) -> None:
    worn = (adapter(f"ip-adapter-{family}", image=SOURCE),)
    given = request(family, ip_adapters=worn, guidance_scale=guidance_scale)
    asked = [prepared(replace(given, seed=n), ip_adapters_0=noise(n)) for n in range(3)]
    together = images(*asked)
    alone = [images(single, bucket=1)[0] for single in asked]
    assert max(distance(a, b) for a, b in zip(together, alone, strict=True)) <= 1
    other = images(prepared(asked[0].request, ip_adapters_0=noise(9)))[0]
    assert distance(other, alone[0]) > 2
    assert not engine().residency.get(given.checkpoint).denoiser._forward_pre_hooks


def test_an_ip_adapter_is_the_one_that_diffusers_applies() -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoints().directory("sd1"))
    pipe.set_progress_bar_config(disable=True)
    directory = tiny_checkpoints().directory("ip-adapter-sd1")
    pipe.load_ip_adapter(str(directory), subfolder="", weight_name="ip-adapter.safetensors", local_files_only=True)
    pipe.set_ip_adapter_scale(0.6)
    asked = request(ip_adapters=(adapter("ip-adapter-sd1", weight=0.6, image=SOURCE),), scheduler="ddim")
    from sdpipeline.engine.pixels import to_pil

    picture = pipe(
        asked.prompt,
        ip_adapter_image=to_pil(noise(5)),
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="np",
    ).images[0]
    made = images(prepared(asked, ip_adapters_0=noise(5)))[0]
    assert np.abs(made.pixels.astype(int) - to_pixels(picture).astype(int)).max() <= 1


def test_two_ip_adapters_without_guidance_still_work() -> None:
    worn = (
        adapter("ip-adapter-sd1", image=SOURCE),
        adapter("ip-adapter-sd1-other", weight=0.3, image=SOURCE),
    )
    asked = request(ip_adapters=worn, guidance_scale=1.0)
    made = images(prepared(asked, ip_adapters_0=noise(1), ip_adapters_1=noise(2)))[0]
    swapped = images(prepared(asked, ip_adapters_0=noise(2), ip_adapters_1=noise(1)))[0]
    assert distance(made, swapped) > 0


def test_a_textual_inversion_is_the_one_that_diffusers_applies() -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoints().directory("sd1"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(tiny_checkpoints().directory("toy")), weight_name="learned_embeds.safetensors")
    asked = request(prompt="a <cat-toy> on a mat", textual_inversions=(adapter("toy"),), scheduler="ddim")
    picture = pipe(
        asked.prompt,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="np",
    ).images[0]
    made = images(prepared(asked))[0]
    assert np.abs(made.pixels.astype(int) - to_pixels(picture).astype(int)).max() <= 1


def test_a_textual_inversion_answers_to_its_alias_and_to_its_own_token() -> None:
    worn = (adapter("toy"),)
    own = one(prompt="a <cat-toy>", textual_inversions=worn)
    assert equal(one(prompt="a <toy>", textual_inversions=worn), own)
    assert distance(one(prompt="a <cat-toy>"), own) > 2


def test_sdxl_takes_a_textual_inversion_for_both_of_its_encoders() -> None:
    worn = one("sdxl", prompt="a <toy-sdxl>", textual_inversions=(adapter("toy-sdxl"),))
    assert distance(worn, one("sdxl", prompt="a <toy-sdxl>")) > 2


def test_a_textual_inversion_that_no_prompt_mentions_is_refused() -> None:
    refused = failure_of(results(prepared(request(textual_inversions=(adapter("toy"),))))[0])
    assert refused == "RequestRefusedError: textual_inversions: write <toy> where the prompt means 'toy'"


def test_a_textual_inversion_of_another_width_is_refused() -> None:
    asked = request("sd2", prompt="a <toy>", textual_inversions=(adapter("toy"),))
    assert "is for sd1, but 'sd2' is sd2" in failure_of(results(prepared(asked))[0])


def test_another_autoencoder_takes_the_place_of_the_checkpoints_own() -> None:
    swapped = one(vae=ref("vae"))
    assert distance(swapped, one()) > 2
    assert [entry["alias"] for entry in swapped.ran["checkpoints"]] == ["sd1", "vae"]


def test_an_autoencoder_with_other_latents_is_refused() -> None:
    refused = failure_of(results(prepared(request(vae=ref("vae-sdxl"))))[0])
    assert refused == "RequestRefusedError: vae: 'vae-sdxl' is for sdxl, whose latents differ from those of 'sd1'"


@pytest.mark.parametrize(("family", "skipped"), [("sd1", 1), ("sd1", 2), ("sdxl", 1), ("sd3", 1)])
def test_clip_skip_is_felt(family: str, skipped: int) -> None:
    assert distance(one(family, clip_skip=skipped), one(family)) > 0


def test_clip_skip_beyond_the_encoders_layers_is_refused() -> None:
    assert "clip_skip: the text encoder has 3 layers; skip at most 2" in failure_of(
        results(prepared(request(clip_skip=3)))[0]
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_beyond_the_seventy_seventh_token_count(family: str) -> None:
    long = "dog " * 100
    assert distance(one(family, prompt=long + "a cat"), one(family, prompt=long + "no fish")) > 0
    assert one(family, prompt=long).ran["prompt_tokens"] == 154


def test_a_long_prompt_beside_a_short_one_does_not_change_it() -> None:
    short, long = prepared(request()), prepared(request(prompt="dog " * 100))
    mixed = images(short, long, bucket=2)
    assert equal(mixed[0], images(short, bucket=2)[0])
    assert equal(mixed[1], images(long, bucket=2)[0])


def test_a_prompt_beyond_what_t5_reads_is_refused() -> None:
    refused = failure_of(results(prepared(request("flux", prompt="x" * 600)))[0])
    assert "this family reads at most 512; shorten it" in refused


def test_what_a_family_cannot_wear_is_refused() -> None:
    refused = failure_of(results(prepared(request("upscale", loras=(adapter("lora-sd1"),))))[0])
    assert "Stable Diffusion x4 upscaler has no text-to-image" in refused
    worn = (adapter("ip-adapter-sd1", image=SOURCE),)
    assert "ip_adapters: Flux does not take it" in failure_of(results(prepared(request("flux", ip_adapters=worn)))[0])
