"""Rewrites of a checkpoint folder into the layouts that public repositories have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.integration.tiny_checkpoints import tiny_checkpoints

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"


def edit_json(path: Path, *, without: Sequence[str] = (), **keys: Any) -> None:
    document = {name: value for name, value in json.loads(path.read_text()).items() if name not in without}
    path.write_text(json.dumps(document | keys))


def _weights(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})


def _halved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.half() if each.is_floating_point() else each for name, each in tensors.items()}


def _add_half(path: Path) -> None:
    _save(_halved(load_file(path)), path.with_name(f"{path.stem}.fp16.safetensors"))


def sharded(folder: Path, variant: str = "") -> None:
    """Put shards and their index in the place of the U-Net's single file."""
    file = folder / UNET
    tensors = load_file(file) if not variant else _halved(load_file(file))
    file.unlink()
    dotted, names = f".{variant}" if variant else "", sorted(tensors)
    weight_map: dict[str, str] = {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model{dotted}-{n:05d}-of-00002.safetensors"
        _save({name: tensors[name] for name in part}, file.with_name(shard))
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": weight_map}
    file.with_name(f"diffusion_pytorch_model.safetensors.index{dotted}.json").write_text(json.dumps(index))


def everything(folder: Path) -> None:
    """Full precision, fp16, non-EMA, pickles, other frameworks and single files in one folder."""
    for path in _weights(folder):
        _add_half(path)
    unet = folder / UNET
    _save(load_file(unet), unet.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    (folder / "text_encoder" / "flax_model.msgpack").write_bytes(b"\0")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"PK")
    _save({"model.diffusion_model.x": torch.zeros(1_000_000)}, folder / "v1-5-pruned-emaonly.safetensors")


def fp16_only(folder: Path) -> None:
    for path in _weights(folder):
        _add_half(path)
        path.unlink()


def shard_missing(folder: Path) -> None:
    sharded(folder)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def index_missing(folder: Path) -> None:
    sharded(folder)
    (folder / f"{UNET}.index.json").unlink()


def tensor_of_a_shard_missing(folder: Path) -> None:
    sharded(folder)
    shard = folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors.pop(min(tensors))
    _save(tensors, shard)


def without_t5(folder: Path) -> None:
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
        _null(part, folder)


def public_text_encoders(folder: Path) -> None:
    """Public CLIPs: tensors under ``text_model.``, surplus position ids, and the ids of the first release."""
    for encoder in folder.glob("text_encoder*"):
        if "CLIP" in (encoder / "config.json").read_text():
            edit_json(encoder / "config.json", bos_token_id=0, eos_token_id=2, pad_token_id=1)
            named = load_file(encoder / "model.safetensors").items()
            tensors = {name if name.startswith("text_") else f"text_model.{name}": each for name, each in named}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            _save(tensors, encoder / "model.safetensors")


def public_sd15(folder: Path) -> None:
    """The layout of the public SD 1.5 repository, with a safety checker and its pickle."""
    public_text_encoders(folder)
    _split_tokenizer(folder / "tokenizer")
    attention = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, each in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        for new, old in attention.items() if ".attentions." in name else ():
            name = name.replace(f".{new}.", f".{old}.")  # noqa: PLW2901
        tensors[name] = each
    _save(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    parts: dict[str, Any] = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    parts["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    edit_json(folder / INDEX, **parts)
    for part in parts:
        (folder / part).mkdir(exist_ok=True)
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    (folder / "safety_checker" / "config.json").write_text('{"architectures": ["StableDiffusionSafetyChecker"]}')
    _save({"concept_embeds": torch.zeros(17, 4)}, folder / "safety_checker" / "model.safetensors")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"PK")


def _split_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt in place of tokenizer.json."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"] | {each["content"]: each["id"] for each in whole["added_tokens"]}
    merges = [each if isinstance(each, str) else " ".join(each) for each in whole["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()


def _pointer(name: str, folder: Path) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167534\n")


def _pickled(name: str, folder: Path) -> None:
    (folder / name).with_suffix(".bin").write_bytes(b"PK")
    (folder / name).unlink()


def _truncated(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1000])


def _written(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)


def _without(name: str, folder: Path) -> None:
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def _null(part: str, folder: Path) -> None:
    nothing: dict[str, Any] = {part: [None, None]}
    edit_json(folder / INDEX, **nothing)


def _unnamed(part: str, folder: Path) -> None:
    edit_json(folder / INDEX, without=(part,))


def _index(folder: Path, *, without: tuple[str, ...] = (), **keys: Any) -> None:
    edit_json(folder / INDEX, without=without, **keys)


def _other_network(folder: Path) -> None:
    shutil.copyfile(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / UNET)


def _renamed(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "my-unet.safetensors")


def _pix2pix(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", in_channels=8)
    _index(folder, _class_name="StableDiffusionInstructPix2PixPipeline")


LOADED: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "everything": ("sd1", everything),
    "sharded": ("sd1", sharded),
    "public-sd15": ("sd1", public_sd15),
    "public-sdxl": ("sdxl", public_text_encoders),
    "public-flux": ("flux", public_text_encoders),
    "fast-tokenizer": ("sd1", partial(_index, tokenizer=["transformers", "CLIPTokenizerFast"])),
}
"""Layouts that paint the same bits as the tiny checkpoint that they are made of."""

REFUSED: Mapping[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "shard-missing": ("sd1", shard_missing, ("00002-of-00002.safetensors", "download")),
    "index-missing": (
        "sd1",
        index_missing,
        ("its index unet/diffusion_pytorch_model.safetensors.index.json", "download"),
    ),
    "tensor-missing": ("sd1", tensor_of_a_shard_missing, ("-00001-of-00002.safetensors has no tensor", "download")),
    "lfs-unet": ("sd1", partial(_pointer, UNET), (UNET, "git lfs pull")),
    "lfs-tokenizer": ("sd1", partial(_pointer, "tokenizer/tokenizer.json"), ("tokenizer.json", "git lfs pull")),
    "login-page": ("sd1", partial(_written, UNET, b"<!DOCTYPE html><html>"), (UNET, "accept the licence")),
    "empty": ("sd1", partial(_written, UNET, b""), (f"{UNET} is empty", "download")),
    "no-header": ("sd1", partial(_written, UNET, b"PK\3\4" * 50), (f"{UNET} is not a safetensors file", "download")),
    "truncated": ("sd1", _truncated, (f"{UNET} is truncated", "download")),
    "bin-unet": (
        "sd1",
        partial(_pickled, UNET),
        ("unet/diffusion_pytorch_model.bin", "hf download", "save_pretrained"),
    ),
    "no-vae": ("sd1", partial(_without, "vae"), ("the folder vae is missing", "copy vae")),
    "no-config": ("sd1", partial(_without, "unet/config.json"), ("unet/config.json is missing", "download")),
    "no-weights": ("sd1", partial(_without, UNET), (f"{UNET} is missing", "download")),
    "no-scheduler": ("sd1", partial(_without, "scheduler/scheduler_config.json"), ("scheduler is missing", "download")),
    "no-vocabulary": ("sd1", partial(_without, "tokenizer/tokenizer.json"), ("tokenizer/tokenizer.json", "merges.txt")),
    "empty-vocabulary": (
        "sd1",
        partial(_written, "tokenizer/tokenizer.json", b'{"model": {"type": "BPE"}, "added_tokens": []}'),
        ("tokenizer/tokenizer.json has no vocabulary", "download"),
    ),
    "renamed": ("sd1", _renamed, ("unet/my-unet.safetensors", "rename it")),
    "other-network": ("sd1", _other_network, ("unet has no tensor conv_in.weight", "download")),
    "null-vae": ("sd1", partial(_null, "vae"), ("vae: [null, null]", "copy vae")),
    "null-scheduler": ("sd1", partial(_null, "scheduler"), ("scheduler: [null, null]", "copy scheduler")),
    "unnamed-tokenizer": ("sd1", partial(_unnamed, "tokenizer"), ("does not name tokenizer", "copy tokenizer")),
    "null-text-encoder-2": ("sdxl", partial(_null, "text_encoder_2"), ("text_encoder_2: [null, null]", "copy")),
    "flux-without-t5": ("flux", partial(_null, "text_encoder_2"), ("text_encoder_2: [null, null]", "copy")),
    "half-without-t5": ("sd3", partial(_null, "text_encoder_3"), ("tokenizer_3 without text_encoder_3", "for both")),
    "refiner": (
        "sdxl",
        partial(
            _index, _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None], tokenizer=[None, None]
        ),
        ("refiner", "use its base"),
    ),
    "image-variation": (
        "sd1",
        partial(_index, without=("text_encoder", "tokenizer"), _class_name="StableDiffusionImageVariationPipeline"),
        ("image variation checkpoint", "use an IP-Adapter"),
    ),
    "pix2pix": ("sd1", _pix2pix, ("InstructPix2Pix", "use task: image-to-image")),
    "custom": (
        "sd1",
        partial(_index, _class_name=["pipeline", "MyPipeline"]),
        ("MyPipeline", "use another checkpoint"),
    ),
    "custom-unet": ("sd1", partial(_index, unet=["my_unet", "MyUNet"]), ("my_unet", "use a checkpoint of")),
    "with-controlnet": (
        "sd1",
        partial(_index, controlnet=["diffusers", "ControlNetModel"]),
        ("controlnet", "sdpipeline checkpoints add"),
    ),
}
"""Layouts that are refused, with what the refusal has to name: the file or the part, and the next step."""


def laid_out(base: str, change: Callable[[Path], None], to: Path) -> Path:
    """Copy a tiny checkpoint, and rewrite the copy."""
    shutil.copytree(tiny_checkpoints().directory(base), to)
    change(to)
    return to
