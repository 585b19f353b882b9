"""LoRAs are named by their layers and widths, whatever their naming and network type."""

from __future__ import annotations

import pytest

from sdpipeline.engine.classification import classify_single_file, lora_format
from sdpipeline.engine.families import FAMILIES
from sdpipeline.errors import CheckpointError
from tests.weight_headers import RANK, Tensors, kohya, loha, lokr, peft

BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0_"
DOTTED = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
CLIP = "text_model_encoder_layers_0_self_attn_q_proj"

RUNS: dict[str, tuple[Tensors, str]] = {
    "sd1 kohya": (kohya(f"{BLOCK}attn2_to_k", 768, 640), "sd1"),
    "sd1 kohya in latent-diffusion's names": (
        kohya("input_blocks_1_1_transformer_blocks_0_attn2_to_v", 768, 320),
        "sd1",
    ),
    "sd2 diffusers": (peft(f"{DOTTED}attn2.to_k", 1024, 640), "sd2"),
    "sdxl kohya": (kohya("output_blocks_3_1_transformer_blocks_1_attn2_to_k", 2048, 640), "sdxl"),
    "sdxl, depth alone": (peft("unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q", 1280, 1280), "sdxl"),
    "sdxl, up block 0 alone": (
        peft("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 1280, 1280),
        "sdxl",
    ),
    "sdxl, attn1 of 640": (peft(f"{DOTTED}attn1.to_k", 640, 640), "sdxl"),
    "sd1 or sd2, attn1 of 320": (
        peft(f"{DOTTED}attn1.to_k", 640, 640)
        | peft("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", 320, 320),
        "sd1-or-sd2",
    ),
    "sd1 or sd2, up block 1 of 1280": (
        peft("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", 1280, 1280),
        "sd1-or-sd2",
    ),
    "sd1, attn1 and text encoder": (
        kohya("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k", 320, 320)
        | kohya(CLIP, 768, 768, prefix="lora_te_"),
        "sd1",
    ),
    "sd1, old diffusers": (
        {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": [RANK, 768],
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.up.weight": [320, RANK],
        },
        "sd1",
    ),
    "sd1 LoHa": (loha(f"lora_unet_{BLOCK}attn2_to_k", 768, 640), "sd1"),
    "sdxl LoKr": (lokr(f"lora_unet_{BLOCK}attn2_to_k", 2048, 640), "sdxl"),
    "sdxl DoRA": (
        kohya(f"{BLOCK}attn2_to_k", 2048, 640) | {f"lora_unet_{BLOCK}attn2_to_k.dora_scale": [640, 1]},
        "sdxl",
    ),
    "sdxl whole differences": ({f"lora_unet_{BLOCK}attn2_to_k.diff": [640, 2048]}, "sdxl"),
    "sd1 text encoder": (kohya(CLIP, 768, 768, prefix="lora_te_"), "sd1"),
    "sd2 text encoder": (kohya(CLIP, 1024, 1024, prefix="lora_te_"), "sd2"),
    "sdxl text encoders": (
        kohya(CLIP, 768, 768, prefix="lora_te1_") | kohya(CLIP, 1280, 1280, prefix="lora_te2_"),
        "sdxl",
    ),
    "sdxl text encoders of another width": (
        kohya(CLIP, 32, 32, prefix="lora_te1_") | kohya(CLIP, 32, 32, prefix="lora_te2_"),
        "sdxl",
    ),
    "T5 behind CLIP-L": (
        kohya(CLIP, 768, 768, prefix="lora_te1_")
        | kohya("encoder_block_0_layer_0_SelfAttention_k", 4096, 4096, prefix="lora_te2_"),
        "any",
    ),
    "any CLIP-L": (peft("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 768, 768), "any"),
    "flux kohya": (kohya("double_blocks_0_img_attn_qkv", 3072, 9216), "flux"),
    "flux kohya, single blocks": (kohya("single_blocks_37_linear1", 3072, 21504), "flux"),
    "flux native": (peft("diffusion_model.double_blocks.18.txt_mlp.0", 3072, 12288), "flux"),
    "flux diffusers, double blocks": (peft("transformer.transformer_blocks.0.attn.add_k_proj", 3072, 3072), "flux"),
    "flux diffusers, single blocks": (peft("transformer.single_transformer_blocks.0.proj_mlp", 3072, 12288), "flux"),
    "flux OneTrainer": (kohya("transformer_blocks_0_attn_to_k", 3072, 3072, prefix="lora_transformer_"), "flux"),
    "flux XLabs": (
        {
            "double_blocks.0.processor.qkv_lora1.down.weight": [RANK, 3072],
            "double_blocks.0.processor.qkv_lora1.up.weight": [9216, RANK],
        },
        "flux",
    ),
    "sd3 kohya": (kohya("joint_blocks_0_x_block_attn_qkv", 1536, 4608), "sd3"),
    "sd3 diffusers": (peft("transformer.transformer_blocks.0.attn.to_k", 1536, 1536), "sd3"),
    "sd3.5 medium": (
        peft("transformer.transformer_blocks.0.attn2.to_q", 1536, 1536)
        | peft("transformer.transformer_blocks.0.attn.to_q", 1536, 1536),
        "sd3",
    ),
    "sd3.5 large": (peft("transformer.transformer_blocks.37.attn.to_q", 2432, 2432), "sd3"),
    "with a peft adapter name": (
        {
            "base_model.model.transformer_blocks.0.attn.to_k.lora_A.default.weight": [RANK, 1536],
            "base_model.model.transformer_blocks.0.attn.to_k.lora_B.default.weight": [1536, RANK],
        },
        "sd3",
    ),
    "a network too small to be a published one": (peft(f"{DOTTED}attn2.to_k", 32, 32), "any"),
}

NAMED: dict[str, tuple[Tensors, str]] = {
    "refiner": (kohya("input_blocks_4_1_transformer_blocks_0_attn2_to_k", 1280, 768), "the SDXL refiner"),
    "qwen diffusers": (
        peft("transformer.transformer_blocks.0.attn.to_k", 3072, 3072)
        | peft("transformer.transformer_blocks.0.img_mlp.net.2", 12288, 3072),
        "Qwen-Image",
    ),
    "qwen, attention of 60 blocks": (peft("transformer.transformer_blocks.59.attn.to_k", 3072, 3072), "Qwen-Image"),
    "qwen native": (peft("diffusion_model.transformer_blocks.0.attn.to_k", 3072, 3072), "Qwen-Image"),
    "qwen kohya": (kohya("transformer_blocks_0_attn_add_k_proj", 3072, 3072), "Qwen-Image"),
    "z-image": (peft("diffusion_model.layers.0.attention.to_k", 3840, 3840), "Z-Image"),
    "z-image kohya": (kohya("layers_0_attention_to_q", 3840, 3840), "Z-Image"),
    "lumina": (peft("diffusion_model.layers.0.attention.qkv", 2304, 6912), "Lumina 2"),
    "wan native": (peft("diffusion_model.blocks.0.cross_attn.k", 5120, 5120), "Wan"),
    "wan kohya": (kohya("blocks_0_self_attn_q", 1536, 1536), "Wan"),
    "wan diffusers": (peft("transformer.blocks.0.attn1.to_q", 5120, 5120), "Wan"),
    "hunyuan video": (peft("diffusion_model.double_blocks.19.img_attn_qkv", 3072, 9216), "HunyuanVideo"),
    "hunyuan video diffusers": (
        peft("transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q", 3072, 3072)
        | peft("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072),
        "HunyuanVideo",
    ),
    "flux.2 dev": (peft("diffusion_model.double_blocks.0.img_attn.qkv", 6144, 18432), "Flux.2"),
    "flux.2 klein": (kohya("single_blocks_0_linear1", 3072, 27648), "Flux.2"),
    "flux.2 diffusers": (
        peft("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3072, 27648),
        "Flux.2",
    ),
    "chroma": (
        peft("diffusion_model.distilled_guidance_layer.layers.0.in_layer", 5120, 5120)
        | peft("diffusion_model.double_blocks.0.img_attn.qkv", 3072, 9216),
        "Chroma",
    ),
    "auraflow": (peft("transformer.joint_transformer_blocks.0.attn.to_q", 3072, 3072), "AuraFlow"),
    "pixart": (peft("transformer.transformer_blocks.0.attn2.to_k", 1152, 1152), "PixArt or Sana"),
    "ltx": (peft("diffusion_model.transformer_blocks.0.attn2.to_k", 2048, 2048), "LTX-Video"),
    "hidream": (peft("diffusion_model.double_stream_blocks.0.block.attn1.to_q", 2560, 2560), "HiDream"),
    "cosmos": (peft("diffusion_model.blocks.0.self_attn.q_proj", 2048, 2048), "Cosmos"),
    "animatediff": (
        peft("unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q", 320, 320),
        "AnimateDiff",
    ),
    "flux control": (
        peft("transformer.x_embedder", 128, 3072) | kohya("single_blocks_0_linear1", 3072, 21504),
        "Control",
    ),
    "unknown": (peft("transformer.stages.3.attention.q", 999, 999), "an unknown network"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_lora_is_of_the_family_whose_layers_it_changes(name: str) -> None:
    tensors, family = RUNS[name]
    found = classify_single_file("style", tensors, {})
    assert (found.kind, found.family, found.layout) == ("lora", family, None)


@pytest.mark.parametrize("name", NAMED)
def test_a_lora_of_a_network_that_does_not_run_is_refused_by_its_name(name: str) -> None:
    tensors, title = NAMED[name]
    with pytest.raises(CheckpointError, match=f"LoRA.*{title}|{title} LoRA") as refused:
        classify_single_file("style", tensors, {})
    assert "supported are LoRAs of SD 1.x and 2.x, SDXL, SD3 and Flux.1" in str(refused.value)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd-inpaint"])
def test_a_lora_that_fits_sd1_and_sd2_is_taken_by_both(family: str) -> None:
    assert "sd1-or-sd2" in FAMILIES[family].adapters_of
    assert "sd1-or-sd2" not in FAMILIES["sdxl"].adapters_of


LAYER = f"lora_unet_{BLOCK}attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "networks", "dora"),
    [
        (kohya(f"{BLOCK}attn1_to_q", 640, 640), {"lora"}, False),
        ({f"{LAYER}.lora_mid.weight": [RANK, RANK, 3, 3], **kohya(f"{BLOCK}attn1_to_q", 640, 640)}, {"lora"}, False),
        (loha(LAYER, 640, 640), {"loha"}, False),
        (lokr(LAYER, 640, 640), {"lokr"}, False),
        (lokr(LAYER, 640, 640) | {f"{LAYER}.dora_scale": [1, 640]}, {"lokr"}, True),
        ({f"{LAYER}.{part}.weight": [RANK, RANK] for part in ("a1", "a2", "b1", "b2")}, {"glora"}, False),
        ({f"{LAYER}.weight": [640], f"{LAYER}.on_input": []}, {"ia3"}, False),
        ({f"{LAYER}.oft_blocks": [4, 160, 160], f"{LAYER}.rescale": [640, 1]}, {"oft"}, False),
        ({f"{LAYER}.oft_blocks": [2, 4, 160, 160]}, {"boft"}, False),
        ({f"{LAYER}.diff": [640, 640], f"{LAYER}.diff_b": [640]}, {"full"}, False),
        ({"lora_unet_down_blocks_1_norm.w_norm": [640], "lora_unet_down_blocks_1_norm.b_norm": [640]}, {"norm"}, False),
        (
            peft(f"{DOTTED}attn1.to_q", 640, 640) | {f"{DOTTED}attn1.to_q.lora_magnitude_vector": [640]},
            {"lora"},
            True,
        ),
    ],
)
def test_the_network_type_of_a_lora_is_told(tensors: Tensors, networks: set[str], dora: bool) -> None:
    found = lora_format(tensors)
    assert found is not None
    assert (set(found.networks), found.dora, list(found.others)) == (networks, dora, [])
    assert found.network == next(iter(networks))
    classify_single_file("style", tensors, {})


def test_what_is_bundled_with_a_lora_is_named() -> None:
    found = lora_format(kohya(f"{BLOCK}attn2_to_k", 2048, 640) | {"bundle_emb.ohwx.clip_l": [1, 768]})
    assert found is not None
    assert found.others == ("bundle_emb.ohwx.clip_l",)


def test_naming_is_told() -> None:
    assert [found.naming for tensors in (
        kohya(f"{BLOCK}attn2_to_k", 768, 640),
        peft(f"{DOTTED}attn2.to_k", 768, 640),
        peft("diffusion_model.double_blocks.0.img_attn.qkv", 3072, 9216),
    ) if (found := lora_format(tensors))] == ["kohya", "diffusers", "native"]  # fmt: skip


def test_tensors_of_no_lora_have_no_format() -> None:
    assert lora_format({"conv.weight": [3, 3, 3, 3], "norm.scale": [3]}) is None
