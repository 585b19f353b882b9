"""Folders are classified by configurations and headers; damaged and odd ones are refused with one clear error."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.classification import Classification, classify
from sdpipeline.errors import CheckpointError
from tests.integration.tiny_checkpoints import tiny_checkpoints
from tests.weight_headers import Tensors, flux, kohya, ldm_unet, ldm_vae, peft

UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 64, "cross_attention_dim": 768}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}
SD1 = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
FLUX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
SD3 = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}


def pipeline(folder: Path, index: Mapping[str, Any], **parts: Mapping[str, Any]) -> Classification:
    """Classify a folder with this model_index.json and these configurations of parts."""
    documents = {"model_index.json": index} | {f"{part}/config.json": config for part, config in parts.items()}
    for name, document in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(document))
    return classify("given", folder, list(documents))


def component(folder: Path, **config: Any) -> Classification:
    (folder / "config.json").write_text(json.dumps(config))
    return classify("given", folder, ["config.json"])


def one_file(folder: Path, tensors: Tensors, name: str = "weights.safetensors") -> Classification:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, folder / name)
    return classify("given", folder, [name])


@pytest.mark.parametrize(
    ("index", "parts", "family", "native_size"),
    [
        (SD1, {"unet": UNET, "vae": VAE}, "sd1", 512),
        (SD1, {"unet": UNET | {"cross_attention_dim": 1024, "sample_size": 96}, "vae": VAE}, "sd2", 768),
        (SD1, {"unet": UNET | {"cross_attention_dim": [1024, 1024], "sample_size": [96, 96]}, "vae": VAE}, "sd2", 768),
        (SD1, {"unet": UNET | {"in_channels": 9}, "vae": VAE}, "sd-inpaint", 512),
        (SD1, {"unet": {"_class_name": "UNet2DConditionModel"}, "vae": {}}, "sd1", None),
        (SD1, {"unet": UNET}, "sd1", None),
        (
            SD1 | {"_class_name": "StableDiffusionXLPipeline"},
            {"unet": UNET | {"addition_embed_type": "text_time", "sample_size": 128}, "vae": VAE},
            "sdxl",
            1024,
        ),
        (SD3, {"transformer": {"in_channels": 16, "sample_size": 128}, "vae": VAE}, "sd3", 1024),
        (FLUX, {"transformer": {"in_channels": 64, "num_attention_heads": 24}}, "flux", 1024),
        (FLUX, {"transformer": {"num_attention_heads": 2}}, "flux", None),
    ],
)
def test_a_pipeline_is_classified_by_its_configurations(
    index: Mapping[str, Any], parts: Mapping[str, Any], family: str, native_size: int | None, tmp_path: Path
) -> None:
    found = pipeline(tmp_path, index, **parts)
    assert (found.kind, found.family, found.native_size) == ("checkpoint", family, native_size)


def test_the_native_size_of_a_folder_is_registered() -> None:
    sizes = {name: tiny_checkpoints().files(name).native_size for name in ("sd1", "sdxl", "flux", "vae")}
    assert sizes == {"sd1": 64, "sdxl": 64, "flux": None, "vae": None}


@pytest.mark.parametrize(
    ("class_name", "what", "fix"),
    [
        ("FluxKontextPipeline", "Flux Kontext", "task: image-to-image"),
        ("FluxKontextInpaintPipeline", "Flux Kontext", "task: image-to-image"),
        ("FluxPriorReduxPipeline", "Flux Redux", "IP-Adapter"),
        ("FluxFillPipeline", "Flux Fill", "Flux.1 dev or schnell"),
        ("FluxControlPipeline", "Flux Control", "Flux ControlNet"),
        ("Flux2KleinPipeline", "Flux.2", "Flux.1 dev or schnell"),
        ("StableDiffusionImageVariationPipeline", "image variation", "IP-Adapter"),
        ("StableDiffusionInstructPix2PixPipeline", "InstructPix2Pix", "task: image-to-image"),
        ("StableDiffusionXLInstructPix2PixPipeline", "InstructPix2Pix for SDXL", "task: image-to-image"),
        ("StableDiffusionXLPAGPipeline", "perturbed-attention", "StableDiffusionXLPipeline"),
        ("StableUnCLIPPipeline", "unCLIP", "IP-Adapter"),
        ("QwenImageEditPlusPipeline", "Qwen-Image", "plain checkpoint"),
        ("ZImagePipeline", "Z-Image", "plain checkpoint"),
        ("WanImageToVideoPipeline", "Wan", "no video"),
        ("StableVideoDiffusionPipeline", "Stable Video Diffusion", "no video"),
        ("LatentConsistencyModelPipeline", "a latent consistency model", "write that as _class_name"),
        ("MyPipeline", "no family runs a MyPipeline", "another checkpoint"),
        (["pipeline", "MyPipeline"], "no family runs a pipeline of class ['pipeline', 'MyPipeline']", "another"),
        (None, "no family runs a pipeline of class None", "another checkpoint"),
        (3, "no family runs a pipeline of class 3", "another checkpoint"),
    ],
)
def test_a_pipeline_that_does_not_run_is_refused_by_name(class_name: Any, what: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        pipeline(tmp_path, SD1 | {"_class_name": class_name}, unet=UNET, vae=VAE)
    assert what in str(refused.value)
    assert fix in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("in_channels", "sample_size", "cross_attention_dim")
            for value in ("4", {"a": 4}, 4.5, True, -4, 0)
        ),
        ("in_channels", [4]),  # the others may be a list of equal numbers
    ],
)
def test_a_number_of_another_type_is_refused_with_its_file_and_key(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{key} in unet/config.json is .* not a positive integer"):
        pipeline(tmp_path, SD1, unet=UNET | {key: value}, vae=VAE)


@pytest.mark.parametrize(
    ("index", "parts", "what"),
    [
        (SD1, {"unet": UNET, "vae": {"block_out_channels": "many"}}, "block_out_channels in vae/config.json is 'many'"),
        (SD1, {"unet": UNET | {"_class_name": ["my", "Net"]}}, "_class_name in unet/config.json"),
        (SD1, {"unet": UNET | {"_class_name": "UNet3DConditionModel"}}, "its unet is a UNet3DConditionModel"),
        (SD1 | {"unet": ["my_unet", "MyUNet"]}, {"unet": UNET}, "its unet is a MyUNet"),
        (SD1 | {"unet": [None, None]}, {"unet": UNET}, "names no unet"),
        (SD1 | {"unet": "UNet"}, {"unet": UNET}, "names no unet"),
        ({"_class_name": "StableDiffusionPipeline"}, {}, "names no unet"),
        (SD1, {}, "unet/config.json is missing"),
        (SD1, {"unet": UNET | {"in_channels": 8}}, "InstructPix2Pix (8 input channels)"),
        (
            SD1 | {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
            {"unet": UNET | {"addition_embed_type": "text_time"}},
            "an SDXL refiner cannot start a picture",
        ),
        (FLUX, {"transformer": {"in_channels": 384}}, "Flux Fill (384 input channels)"),
        (
            FLUX,
            {"transformer": {"_class_name": "ChromaTransformer2DModel"}},
            "its transformer is a ChromaTransformer2DModel",
        ),
        (FLUX | {"image_embedder": ["flux", "ReduxImageEncoder"]}, {"transformer": {}}, "Flux Redux"),
        (SD3, {"transformer": {"in_channels": 32}}, "an SD3 with 32 input channels"),
    ],
)
def test_an_odd_pipeline_is_refused_by_what_is_odd(
    index: Mapping[str, Any], parts: Mapping[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        pipeline(tmp_path, index, **parts)
    assert what in str(refused.value)


@pytest.mark.parametrize(
    ("config", "kind", "family"),
    [
        ({"_class_name": "ControlNetModel", "cross_attention_dim": 768}, "controlnet", "sd1"),
        ({"_class_name": "ControlNetModel", "cross_attention_dim": 1024}, "controlnet", "sd2"),
        ({"_class_name": "ControlNetModel", "addition_embed_type": "text_time"}, "controlnet", "sdxl"),
        ({"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}, "vae", "sdxl"),
        ({"_class_name": "AutoencoderKL", "latent_channels": 16, "shift_factor": 0.1159}, "vae", "flux"),
        ({"_class_name": "AutoencoderKL", "latent_channels": 16, "shift_factor": 0.0609}, "vae", "sd3"),
        ({"model_type": "dpt"}, "annotator", "depth"),
    ],
)
def test_a_network_is_classified_by_its_configuration(
    config: Mapping[str, Any], kind: str, family: str, tmp_path: Path
) -> None:
    found = component(tmp_path, **config)
    assert (found.kind, found.family) == (kind, family)


@pytest.mark.parametrize(
    ("config", "what", "fix"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "a U-Net alone", "model_index.json"),
        ({"_class_name": "T2IAdapter"}, "a T2I-Adapter", "use a ControlNet"),
        ({"_class_name": "QwenImageControlNetModel"}, "a ControlNet for Qwen-Image", "use a ControlNet"),
        ({"_class_name": "AutoencoderTiny"}, "a tiny autoencoder", "AutoencoderKL"),
        ({"_class_name": "AutoencoderKLWan"}, "an autoencoder of another family", "AutoencoderKL"),
        ({"_class_name": "AutoencoderKL", "latent_channels": 32}, "32 latent channels", "4 or 16"),
        ({"_class_name": "AutoencoderKL", "scaling_factor": "x"}, "scaling_factor in config.json is 'x'", "a number"),
        ({"_class_name": "ControlNetModel", "cross_attention_dim": "768"}, "cross_attention_dim", "positive integer"),
        ({"model_type": "clip_vision_model"}, "a CLIP vision encoder alone", "image_encoder"),
        ({"model_type": "t5"}, "a T5 text encoder alone", "model_index.json"),
        ({"model_type": ["t5"]}, "model_type in config.json", "a text"),
        ({"architectures": "StableDiffusionSafetyChecker"}, "architectures in config.json", "a list"),
        ({"_class_name": {"a": 1}}, "_class_name in config.json", "a text"),
        ({}, "config.json without _class_name", "is not supported"),
    ],
)
def test_a_network_that_does_not_run_is_refused_by_name(
    config: Mapping[str, Any], what: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        component(tmp_path, **config)
    assert what in str(refused.value)
    assert fix in str(refused.value)


@pytest.mark.parametrize("name", ["4x-lora-ip-adapter", "flux1-dev", "AbyssOrangeMix2_hard", "sdxl_vae", "x"])
def test_a_file_name_that_lies_changes_nothing(name: str, tmp_path: Path) -> None:
    found = one_file(
        tmp_path, kohya("input_blocks_1_1_transformer_blocks_0_attn2_to_k", 768, 320), f"{name}.safetensors"
    )
    assert found == Classification(kind="lora", family="sd1")


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (ldm_unet(768), "a whole sd1 checkpoint"),
        (flux(), "a whole flux checkpoint"),
        (ldm_vae(), "an autoencoder"),
        ({"control_model.input_hint_block.0.weight": [16, 3, 3, 3]}, "a ControlNet"),
    ],
)
def test_a_file_that_has_to_be_converted_is_refused_with_the_next_command(
    tensors: Tensors, what: str, tmp_path: Path
) -> None:
    shrunk = {name: [1 if side > 4096 else side for side in shape] for name, shape in tensors.items()}
    with pytest.raises(CheckpointError, match=what) as refused:
        one_file(tmp_path, shrunk, "flux1 x4.safetensors")
    assert "sdpipeline checkpoints add given 'flux1 x4.safetensors'" in str(refused.value)


def test_several_files_are_refused_with_the_command_for_a_folder_of_loras(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files.*checkpoints add --all DIR"):
        classify("given", tmp_path, ["a.safetensors", "b.safetensors"])


def _bytes(entries: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + data


TENSOR = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 200_000_000) + b"{}",
        _bytes("[]"),
        _bytes("{nonsense"),
        _bytes('{"a": ' + TENSOR + "}"),
        _bytes('{"a": ' + TENSOR + "}", bytes(4)),
        _bytes('{"a": ' + TENSOR + "}", bytes(9)),
        _bytes('{"a": ' + TENSOR + ', "b": ' + TENSOR + "}", bytes(8)),
        _bytes('{"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        _bytes('{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}', bytes(8)),
        _bytes('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', bytes(8)),
        _bytes('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', bytes(8)),
        _bytes('{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)),
        _bytes('{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 8]}}', bytes(8)),
        _bytes('{"a": ' + TENSOR + ', "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', bytes(16)),
        _bytes("[" * 100_000),
        _bytes('{"__metadata__": {"a": 3}}'),
        b"PK\x03\x04" + bytes(200),
    ],
)
def test_a_damaged_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=r"weights.safetensors is (not a safetensors file|truncated|longer than).*; download it again",
    ):
        classify("given", tmp_path, ["weights.safetensors"])


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(_bytes("{}"))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        classify("given", tmp_path, ["weights.safetensors"])


def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="`git lfs pull`"):
        classify("given", tmp_path, ["weights.safetensors"])


def test_a_lora_in_half_precision_and_with_a_scalar_is_registered(tmp_path: Path) -> None:
    tensors = peft("transformer.transformer_blocks.0.attn.to_k", 1536, 1536)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in tensors.items()}
    save_file(
        weights | {"transformer.transformer_blocks.0.attn.to_k.alpha": torch.tensor(1.0)}, tmp_path / "x2.safetensors"
    )
    files = inspect("style", tmp_path)
    assert (files.kind, files.family, files.scale) == ("lora", "sd3", 1)
