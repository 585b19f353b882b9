"""IP-Adapters of all supported kinds, with the encoder that their widths ask for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sdpipeline.domain import AdapterInput
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.ip_adapters import ip_adapter_folder
from sdpipeline.engine.pixels import to_pil, to_pixels
from sdpipeline.errors import CheckpointError
from tests.integration.engine_requests import SOURCE, distance, failure_of, images, noise, prepared, request, results
from tests.integration.tiny_checkpoints import tiny_checkpoints

CROSS = {"sd1": 32, "sdxl": 64}
ENCODERS = {"vit-h": (48, 32), "big-g": (40, 24)}
"""Hidden and projected widths of two encoders, as those of SD 1.5 and SDXL differ."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.5


def plain(encoder: str, cross: int) -> dict[str, torch.Tensor]:
    width = ENCODERS[encoder][1]
    weights = {"proj.weight": normal(4 * cross, width), "proj.bias": torch.zeros(4 * cross)}
    return weights | {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}


def full(encoder: str, cross: int) -> dict[str, torch.Tensor]:
    width = ENCODERS[encoder][0]
    weights = {"proj.0.weight": normal(width, width), "proj.0.bias": torch.zeros(width)}
    weights |= {"proj.2.weight": normal(cross, width), "proj.2.bias": torch.zeros(cross)}
    return weights | {"proj.3.weight": torch.ones(cross), "proj.3.bias": torch.zeros(cross)}


def plus(encoder: str, cross: int) -> dict[str, torch.Tensor]:
    """The resampler of the plus adapters: four layers of attention with 64 wide heads, over four queries."""
    width, inner = ENCODERS[encoder][0], 32
    weights = {"latents": normal(1, 4, inner)}
    for name, shape in {"proj_in": (inner, width), "proj_out": (cross, inner)}.items():
        weights |= {f"{name}.weight": normal(*shape), f"{name}.bias": torch.zeros(shape[0])}
    weights |= {"norm_out.weight": torch.ones(cross), "norm_out.bias": torch.zeros(cross)}
    for n in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            weights |= {f"layers.{n}.{norm}.weight": torch.ones(inner), f"layers.{n}.{norm}.bias": torch.zeros(inner)}
        weights |= {f"layers.{n}.0.to_q.weight": normal(64, inner), f"layers.{n}.0.to_kv.weight": normal(128, inner)}
        weights |= {f"layers.{n}.0.to_out.weight": normal(inner, 64)}
        weights |= {
            f"layers.{n}.1.1.weight": normal(4 * inner, inner),
            f"layers.{n}.1.3.weight": normal(inner, 4 * inner),
        }
    return weights


KINDS = {"plain": plain, "plus": plus, "full": full}


def matrices(base: str) -> dict[str, torch.Tensor]:
    """Keys and values for each cross-attention of a base's U-Net."""
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(tiny_checkpoints().directory(base) / "unet")
    found = {}
    for n, name in enumerate(unet.attn_processors):
        if ".attn2." in name:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for matrix in ("to_k_ip", "to_v_ip"):
                found[f"ip_adapter.{n}.{matrix}.weight"] = normal(attention.inner_dim, unet.config.cross_attention_dim)
    return found


def write(path: Path, kind: str, encoder: str, base: str) -> Path:
    tensors = matrices(base)
    cross = next(iter(tensors.values())).shape[1]
    projection = {f"image_proj.{name}": tensor for name, tensor in KINDS[kind](encoder, cross).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(projection | tensors, path)
    return path


def write_encoder(directory: Path, encoder: str) -> None:
    hidden, projected = ENCODERS[encoder]
    config = transformers.CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=64,
        projection_dim=projected,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    network: Any = transformers.CLIPVisionModelWithProjection(config)
    network.save_pretrained(directory)


@pytest.fixture(scope="module")
def h94(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the repository h94/IP-Adapter: two folders of adapters, each with an encoder of its own."""
    root = tmp_path_factory.mktemp("h94")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        write_encoder(root / "models" / "image_encoder", "vit-h")
        write_encoder(root / "sdxl_models" / "image_encoder", "big-g")
        (root / "models" / "image_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
        for kind, name in (("plain", "ip-adapter_sd15"), ("plus", "ip-adapter-plus_sd15"), ("full", "full-face_sd15")):
            write(root / "models" / f"{name}.safetensors", kind, "vit-h", "sd1")
        write(root / "sdxl_models" / "ip-adapter_sdxl.safetensors", "plain", "big-g", "sdxl")
        write(root / "sdxl_models" / "ip-adapter-plus_sdxl_vit-h.safetensors", "plus", "vit-h", "sdxl")
    return root


FILES = {
    "models/ip-adapter_sd15.safetensors": ("sd1", "models/image_encoder"),
    "models/ip-adapter-plus_sd15.safetensors": ("sd1", "models/image_encoder"),
    "models/full-face_sd15.safetensors": ("sd1", "models/image_encoder"),
    "sdxl_models/ip-adapter_sdxl.safetensors": ("sdxl", "sdxl_models/image_encoder"),
    "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors": ("sdxl", "models/image_encoder"),
}


def gathered(file: Path, to: Path) -> Path:
    """A folder of its own with the files that an adapter needs."""
    for name, source in ip_adapter_folder(file).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, to / name)
    return to


def stock(base: str, file: Path, encoder: Path, reference: Any, *, weight: float) -> Any:
    """The picture of diffusers' own pipeline after ``load_ip_adapter`` of that file."""
    vision: Any = transformers.CLIPVisionModelWithProjection
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        tiny_checkpoints().directory(base),
        image_encoder=vision.from_pretrained(encoder),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, local_files_only=True)
    pipe.set_ip_adapter_scale(weight)
    asked = request(base)
    made = pipe(
        "a cat",
        ip_adapter_image=to_pil(reference),
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images[0]
    return to_pixels(made)


@pytest.mark.parametrize("name", FILES)
def test_each_adapter_is_the_one_of_diffusers_alone_and_in_a_batch_with_others_references(
    name: str, h94: Path, tmp_path: Path
) -> None:
    base, encoder = FILES[name]
    folder = gathered(h94 / name, tmp_path / "adapter")
    use = AdapterInput(checkpoint=tiny_checkpoints().add(inspect(f"h94-{Path(name).stem}", folder)), image=SOURCE)
    use = replace(use, weight=0.6)
    given = request(base, ip_adapters=(use,), scheduler="ddim", num_inference_steps=2)
    asked = [prepared(replace(given, seed=n), ip_adapters_0=noise(n + 20)) for n in range(3)]
    together = images(*asked)
    expected = stock(base, h94 / name, h94 / encoder, noise(20), weight=0.6)
    for made in (together[0], images(asked[0], bucket=1)[0]):
        assert abs(made.pixels.astype(int) - expected.astype(int)).max() <= 1
    swapped = images(prepared(asked[0].request, ip_adapters_0=noise(9)))[0]
    assert distance(together[0], swapped) > 0


@pytest.mark.parametrize("name", FILES)
def test_the_encoder_is_found_by_the_adapters_own_widths_and_no_pickle_is_taken(name: str, h94: Path) -> None:
    encoder = h94 / FILES[name][1]
    file = h94 / name
    assert ip_adapter_folder(file) == {
        file.name: file,
        "image_encoder/config.json": encoder / "config.json",
        "image_encoder/model.safetensors": encoder / "model.safetensors",
    }


def test_a_missing_encoder_is_named_with_its_widths_and_its_place(h94: Path, tmp_path: Path) -> None:
    file = tmp_path / "sdxl_models" / "adapter.safetensors"
    file.parent.mkdir()
    shutil.copy(h94 / "sdxl_models" / "ip-adapter_sdxl.safetensors", file)
    with pytest.raises(CheckpointError, match="needs an image encoder with embeddings of 24"):
        ip_adapter_folder(file)
    shutil.copytree(h94 / "models" / "image_encoder", file.parent / "image_encoder")
    with pytest.raises(CheckpointError, match=r"found .*hidden states of 48 and embeddings of 32"):
        ip_adapter_folder(file)
    (file.parent / "image_encoder" / "model.safetensors").unlink()
    plain_file = h94 / "models" / "ip-adapter_sd15.safetensors"
    shutil.copy(plain_file, file)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; fetch the \.safetensors file"):
        ip_adapter_folder(file)


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/hosts", "absent.safetensors"])
def test_an_encoders_index_names_no_file_outside_its_folder(shard: str, h94: Path, tmp_path: Path) -> None:
    file = tmp_path / "download" / "models" / "ip-adapter_sd15.safetensors"
    shutil.copytree(h94 / "models", file.parent)
    (tmp_path / "download" / "secret.safetensors").write_bytes(b"of somebody else")
    encoder = file.parent / "image_encoder"
    (encoder / "model.safetensors").unlink()
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="which is not in the same folder"):
        ip_adapter_folder(file)


def test_a_folder_without_encoder_or_with_another_one_is_refused_at_add(h94: Path, tmp_path: Path) -> None:
    folder = gathered(h94 / "models" / "ip-adapter_sd15.safetensors", tmp_path / "adapter")
    shutil.rmtree(folder / "image_encoder")
    with pytest.raises(CheckpointError, match=r"has no folder image_encoder .*sdpipeline checkpoints add mine"):
        inspect("mine", folder)
    shutil.copytree(h94 / "sdxl_models" / "image_encoder", folder / "image_encoder")
    with pytest.raises(CheckpointError, match="reads embeddings of 32, but its image_encoder has hidden states of 40"):
        inspect("mine", folder)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_an_adapter_of_another_network_is_refused_by_the_layer(change: str, h94: Path, tmp_path: Path) -> None:
    folder = gathered(h94 / "models" / "ip-adapter_sd15.safetensors", tmp_path / "adapter")
    file = folder / "ip-adapter_sd15.safetensors"
    tensors: Mapping[str, torch.Tensor] = load_file(file)
    if change == "missing":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("ip_adapter.1.")}
    else:
        tensors = dict(tensors) | {"ip_adapter.99.to_k_ip.weight": torch.ones(8, 32)}
    save_file(dict(tensors), file)
    ref = tiny_checkpoints().add(inspect(f"h94-{change}", folder))
    asked = request(ip_adapters=(AdapterInput(checkpoint=ref, image=SOURCE),))
    failed = failure_of(results(prepared(asked, ip_adapters_0=noise(1)))[0])
    assert "was made for another network than 'sd1' (sd1)" in failed
    assert ("ip_adapter.1.to_k_ip.weight is missing" if change == "missing" else "ip_adapter.99.") in failed
