"""One file is classified by its tensors: adapters, upscalers, whole checkpoints and the parts of one."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdpipeline.engine.classification import classify_single_file
from sdpipeline.errors import CheckpointError
from tests.unit.engine.test_lora_families import NAMED, RUNS
from tests.weight_headers import Tensors, esrgan, flux, kohya, ldm_unet, ldm_vae, network, peft

CONTROL = {"control_model.input_hint_block.0.weight": [16, 3, 3, 3]}
IP_BLOCK = "ip_adapter.1.to_k_ip.weight"

KNOWN: dict[str, tuple[Tensors, tuple[str, str, int, str | None]]] = {
    "sd1": (ldm_unet(768) | ldm_vae(prefix="first_stage_model."), ("checkpoint", "sd1", 1, "ldm")),
    "sd2": (ldm_unet(1024), ("checkpoint", "sd2", 1, "ldm")),
    "sdxl": (ldm_unet(2048), ("checkpoint", "sdxl", 1, "ldm")),
    "sd1 inpainting": (ldm_unet(768, channels=9), ("checkpoint", "sd-inpaint", 1, "ldm")),
    "sdxl inpainting": (ldm_unet(2048, channels=9), ("checkpoint", "sdxl-inpaint", 1, "ldm")),
    "x4 upscaler": (ldm_unet(1024, channels=7), ("checkpoint", "upscale", 4, "ldm")),
    "flux": (flux(), ("checkpoint", "flux", 1, "native")),
    "flux with text encoders": (
        flux(prefix="model.diffusion_model.")
        | network("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", width_in=4096),
        ("checkpoint", "flux", 1, "native"),
    ),
    "sd3": (
        network("model.diffusion_model.joint_blocks.0.x_block.attn.qkv", width_in=1536, width_out=4608),
        ("checkpoint", "sd3", 1, "native"),
    ),
    "vae": (ldm_vae(), ("vae", "any", 1, "ldm")),
    "vae of 16 channels": (ldm_vae(16), ("vae", "any", 1, "ldm")),
    "vae in diffusers' names": (
        {"encoder.conv_in.weight": [128, 3, 3, 3], "decoder.mid_block.resnets.0.conv1.weight": [512, 512, 3, 3]},
        ("vae", "any", 1, "diffusers"),
    ),
    "controlnet sd1": (
        CONTROL
        | network("control_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k", width_in=768, width_out=640),
        ("controlnet", "sd1", 1, "ldm"),
    ),
    "controlnet sdxl in diffusers' names": (
        {"controlnet_cond_embedding.conv_in.weight": [16, 3, 3, 3], "add_embedding.linear_1.weight": [1280, 2816]}
        | network("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", width_in=2048, width_out=640),
        ("controlnet", "sdxl", 1, "diffusers"),
    ),
    "controlnet flux": (
        {"controlnet_x_embedder.weight": [3072, 64], "controlnet_blocks.0.weight": [3072, 3072]}
        | network("transformer_blocks.0.attn.to_q", width_in=3072),
        ("controlnet", "flux", 1, "diffusers"),
    ),
    "controlnet sd3": (
        network("controlnet_blocks.0", "transformer_blocks.0.attn.to_q", width_in=1536),
        ("controlnet", "sd3", 1, "diffusers"),
    ),
    "ip-adapter sd1": (
        {"image_proj.proj.weight": [3072, 1024], IP_BLOCK: [320, 768]},
        ("ip-adapter", "sd1", 1, None),
    ),
    "ip-adapter plus sdxl": (
        {"image_proj.latents": [1, 16, 1280], "image_proj.proj_in.weight": [1280, 1280], IP_BLOCK: [640, 2048]},
        ("ip-adapter", "sdxl", 1, None),
    ),
    "ip-adapter full face": (
        {"image_proj.proj.0.weight": [1280, 1280], "image_proj.proj.3.weight": [768], IP_BLOCK: [320, 768]},
        ("ip-adapter", "sd1", 1, None),
    ),
    "textual inversion sd1": ({"emb_params": [8, 768]}, ("textual-inversion", "sd1", 1, None)),
    "textual inversion sd1, one vector": ({"<cat>": [768]}, ("textual-inversion", "sd1", 1, None)),
    "textual inversion sd2": ({"emb_params": [8, 1024]}, ("textual-inversion", "sd2", 1, None)),
    "textual inversion sdxl": (
        {"clip_g": [2, 1280], "clip_l": [2, 768]},
        ("textual-inversion", "sdxl", 1, None),
    ),
    "upscaler x4": (esrgan(4), ("checkpoint", "gan-upscale", 4, None)),
    "upscaler x8": (esrgan(8), ("checkpoint", "gan-upscale", 8, None)),
    "upscaler x2 with folded pixels": (esrgan(4, channels=12), ("checkpoint", "gan-upscale", 2, None)),
    "upscaler x4, old names": (
        {"model.0.weight": [64, 3, 3, 3], "model.1.sub.0.RDB1.conv1.0.weight": [32, 64, 3, 3]}
        | {f"model.{n}.weight": [64, 64, 3, 3] for n in (3, 6, 8)}
        | {"model.10.weight": [3, 64, 3, 3]},
        ("checkpoint", "gan-upscale", 4, None),
    ),
    "upscaler x3, SwinIR": (
        {"conv_first.weight": [60, 3, 3, 3], "upsample.0.weight": [27, 60, 3, 3]},
        ("checkpoint", "gan-upscale", 3, None),
    ),
    "upscaler x4, HAT": (
        {"conv_first.weight": [180, 3, 3, 3], "conv_before_upsample.0.weight": [64, 180, 3, 3]}
        | {f"upsample.{n}.weight": [256, 64, 3, 3] for n in (0, 2)},
        ("checkpoint", "gan-upscale", 4, None),
    ),
}

REFUSED: dict[str, tuple[Tensors, str, str]] = {
    "refiner": (ldm_unet(1280), "the SDXL refiner", "SDXL base"),
    "instruct-pix2pix": (ldm_unet(768, channels=8), "instruct-pix2pix", "supported are"),
    "depth": (ldm_unet(1024, channels=5), "depth-to-image", "supported are"),
    "u-net alone": (ldm_unet(768, prefix=""), "a U-Net of sd1 alone", "checkpoints add given FILE --parts"),
    "u-net alone, diffusers": (
        {"conv_in.weight": [320, 4, 3, 3], "down_blocks.0.resnets.0.conv1.weight": [320, 320, 3, 3]},
        "a U-Net alone",
        "unet/diffusion_pytorch_model.safetensors",
    ),
    "flux fill": (flux(channels=384), "Flux Fill", "Flux.1 dev or schnell"),
    "flux control": (flux(channels=128), "Flux Control", "Flux.1 dev or schnell"),
    "flux redux": (
        {"redux_up.weight": [12288, 1152], "redux_down.weight": [4096, 12288]},
        "Flux Redux",
        "supported are",
    ),
    "flux transformer, diffusers": (
        network("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", width_in=3072),
        "a flux transformer alone",
        "transformer/diffusion_pytorch_model.safetensors",
    ),
    "qwen": (network("transformer_blocks.0.img_mlp.net.2", width_in=12288), "Qwen-Image", "supported are"),
    "wan": (network("blocks.0.cross_attn.k", width_in=5120), "Wan", "supported are"),
    "z-image": (network("layers.0.attention.qkv", width_in=3840), "Z-Image", "supported are"),
    "chroma": (flux() | network("distilled_guidance_layer.in_proj", width_in=64), "Chroma", "supported are"),
    "flux.2": (network("double_blocks.0.img_attn.qkv", width_in=6144), "Flux.2", "supported are"),
    "control-lora": (
        {"lora_controlnet": []} | network("input_blocks.1.1.transformer_blocks.0.attn2.to_k.up", width_in=4),
        "a Control-LoRA",
        "supported are",
    ),
    "t2i-adapter": (
        network("body.0.block1", width_in=320) | network("conv_in", width_in=192),
        "T2I-Adapter",
        "supported",
    ),
    "controlnet union": (
        {"controlnet_cond_embedding.conv_in.weight": [16, 3, 3, 3], "task_embedding": [6, 320]},
        "ControlNet-Union",
        "config.json",
    ),
    "controlnet of qwen": (
        network("controlnet_blocks.0", "transformer_blocks.0.img_mlp.net.2", width_in=3072),
        "a ControlNet for Qwen-Image",
        "supported are",
    ),
    "faceid": (
        {
            "image_proj.proj.0.weight": [1024, 512],
            "image_proj.proj.2.weight": [3072, 1024],
            "image_proj.norm.weight": [768],
        }
        | {IP_BLOCK: [320, 768]},
        "FaceID",
        "plain, plus and full",
    ),
    "ip-adapter flux": (
        {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": [3072, 4096]},
        "an IP-Adapter for Flux",
        "plain, plus and full",
    ),
    "ip-adapter sd3": (
        {"image_proj.latents": [1, 64, 1280], "ip_adapter.0.to_k_ip.weight": [2432, 2432]},
        "an IP-Adapter for text embeddings of 2432",
        "plain, plus and full",
    ),
    "ip-adapter flux, InstantX": (
        {"image_proj.proj.0.weight": [2304, 1152], "image_proj.proj.2.weight": [524288, 2304]}
        | {"image_proj.norm.weight": [4096], "ip_adapter.0.to_k_ip.weight": [3072, 4096]},
        "an IP-Adapter for text embeddings of 4096",
        "plain, plus and full",
    ),
    "instantid": (
        {"image_proj.latents": [1, 16, 1280], "image_proj.proj_in.weight": [1280, 512], IP_BLOCK: [640, 2048]},
        "FaceID",
        "plain, plus and full",
    ),
    "textual inversion of swapped encoders": (
        {"clip_g": [2, 768], "clip_l": [2, 1280]},
        "whose clip_l has shape [2, 1280]",
        "fetch it again",
    ),
    "quantized flux": (
        {"single_transformer_blocks.0.qkv_proj.qweight": [9216, 1536]}
        | {f"single_transformer_blocks.0.qkv_proj.lora_{end}": [3072, 32] for end in ("down", "up")},
        "quantized weights",
        "fp16 or bf16",
    ),
    "kolors lora": (
        kohya("down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 2048, 640)
        | kohya("encoder_hid_proj", 4096, 2048),
        "a LoRA for Kolors",
        "supported are",
    ),
    "omnigen2 lora": (peft("transformer.layers.0.attn.to_q", 2520, 2520), "a LoRA for OmniGen2", "supported are"),
    "textual inversion of two words": ({"<cat>": [1, 768], "<dog>": [1, 768]}, "of 2 words", "a file of its own"),
    "textual inversion without vectors": ({"emb_params": [0, 768]}, "is unknown", "model_index.json"),
    "one weight": ({"weight": [4, 4]}, "is unknown", "model_index.json"),
    "oft of kohya": (
        {"oft_unet_down_blocks_0_attentions_0_motion_modules_0_to_k.oft_blocks": [4, 80, 80]},
        "a LoRA for AnimateDiff",
        "supported are",
    ),
    "control-lora without its mark": (
        {"input_hint_block.0.weight": [16, 3, 3, 3], "input_blocks.4.1.transformer_blocks.0.attn2.to_k.up": [640, 4]},
        "a Control-LoRA",
        "supported are",
    ),
    "controlnet flux of X-Labs": (
        CONTROL
        | {"controlnet_blocks.0.weight": [3072, 3072], "input_hint_block.0.weight": [16, 3, 3, 3]}
        | network("double_blocks.0.img_attn.qkv", width_in=3072),
        "X-Labs",
        "diffusers' layout",
    ),
    "kolors": (ldm_unet(2048) | {"model.diffusion_model.encoder_hid_proj.weight": [2048, 4096]}, "Kolors", "SDXL"),
    "language model with eyes": (
        network("model.layers.0.self_attn.q_proj", width_in=3584) | network("visual.blocks.0.attn.qkv", width_in=1280),
        "a language model",
        "supported are",
    ),
    "detector": ({"model.0.conv.weight": [64, 3, 3, 3], "model.0.bn.weight": [64]}, "is unknown", "model_index.json"),
    "textual inversion flux": (
        {"clip_l": [2, 768], "t5": [2, 4096]},
        "a textual inversion for Flux",
        "SD 2.x and SDXL",
    ),
    "textual inversion sd3": (
        {"clip_l": [2, 768], "clip_g": [2, 1280], "t5xxl": [2, 4096]},
        "a textual inversion for SD3",
        "SD 2.x and SDXL",
    ),
    "clip": (
        network("text_model.encoder.layers.0.self_attn.q_proj", width_in=768),
        "CLIP text encoder",
        "whole checkpoint",
    ),
    "clip vision": (
        network("vision_model.encoder.layers.0.mlp.fc1", width_in=1280),
        "CLIP vision encoder",
        "supported",
    ),
    "t5": (network("encoder.block.0.layer.0.SelfAttention.q", width_in=4096), "T5 text encoder", "supported"),
    "video vae": ({"decoder.middle.0.residual.0.gamma": [384, 1, 1, 1]}, "a video autoencoder", "supported"),
    "no upscaler's factor": ({"conv_first.weight": [8, 3, 3, 3]}, "looks like a GAN upscaler", "sdpipeline[upscalers]"),
    "a restorer": (
        {f"body.{n}.weight": shape for n, shape in {0: [8, 3, 3, 3], 1: [8], 2: [3, 8, 3, 3]}.items()},
        "looks like a GAN upscaler",
        "sdpipeline[upscalers]",
    ),
    "nothing": ({}, "holds no tensors", "fetch it again"),
    "unknown": ({"mystery.weight": [7, 7]}, "is unknown: its tensors (as 'mystery.weight')", "model_index.json"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_file_is_of_the_kind_and_family_that_its_tensors_say(name: str) -> None:
    tensors, expected = KNOWN[name]
    found = classify_single_file("given", tensors, {})
    assert (found.kind, found.family, found.scale, found.layout) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_is_refused_by_name_and_with_what_to_do(name: str) -> None:
    tensors, what, fix = REFUSED[name]
    with pytest.raises(CheckpointError, match=re.escape(what)) as refused:
        classify_single_file("given", tensors, {})
    assert fix in str(refused.value)


def test_a_flux_kontext_is_told_by_what_its_file_says_of_itself() -> None:
    with pytest.raises(CheckpointError, match="Flux Kontext"):
        classify_single_file("given", flux(), {"modelspec.title": "FLUX.1 Kontext [dev]"})


def test_native_sizes_are_those_of_the_published_bases() -> None:
    sizes = {
        name: classify_single_file("given", KNOWN[name][0], {}).native_size for name in ("sd1", "sd2", "sdxl", "flux")
    }
    assert sizes == {"sd1": 512, "sd2": None, "sdxl": 1024, "flux": 1024}


FAMOUS = [
    name
    for tensors in (*(each for each, _ in (*RUNS.values(), *NAMED.values())), *(each for each, _ in KNOWN.values()),
                    *(each for each, _, _ in REFUSED.values()))
    for name in tensors
]  # fmt: skip
NAMES = (
    st.sampled_from(FAMOUS)
    | st.text(max_size=30)
    | st.builds("{}.{}".format, st.text(max_size=9), st.sampled_from(FAMOUS))
)
SHAPES = st.lists(st.integers(0, 2**40) | st.sampled_from([0, 1, 3, 4, 320, 768, 1024, 1280, 2048, 3072]), max_size=5)


@pytest.mark.fuzz
@given(tensors=st.dictionaries(NAMES, SHAPES, max_size=6))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_names_and_shapes_are_classified_or_refused(tensors: Tensors) -> None:
    with suppress(CheckpointError):
        found = classify_single_file("fuzzed", tensors, {})
        assert found.kind in {"checkpoint", "lora", "vae", "controlnet", "ip-adapter", "textual-inversion"}


@pytest.mark.parametrize(
    "tensors",
    [kohya("x", 4, 4), {"alpha": []}, {"a.alpha": []}, peft("x", 4, 4) | {"emb_params": []}],
)
def test_a_scalar_breaks_nothing(tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match="checkpoint 'given'"):
        classify_single_file("given", tensors, {})
