"""A checkpoint is the approved set of files: none may be added, linked, replaced or executed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.app import checkpoints
from sdpipeline.demo.manifest import read_manifest
from sdpipeline.domain import digest
from sdpipeline.engine import hash_cache
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect, unchanged, verify
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NETWORKS = {
    "unet": (WEIGHTS, ["conv_in", "conv_out"]),
    "vae": (WEIGHTS, ["encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"]),
    "text_encoder": (
        "model.safetensors",
        ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"],
    ),
}
"""Weight file and names of tensors by the folder of the network."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline that is never loaded: small files at the paths that loaders read."""
    made = tmp_path / "weights"
    for part, (weights, tensors) in NETWORKS.items():
        (made / part).mkdir(parents=True)
        (made / part / "config.json").write_text("{}")
        save_file({f"{name}.weight": torch.zeros(4) for name in tensors}, made / part / weights)
    for name in ("tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        (made / name).parent.mkdir()
        (made / name).write_text('{"a": 0}')
    (made / "tokenizer" / "merges.txt").write_text("")
    (made / "model_index.json").write_text(json.dumps(INDEX))
    return made


def refused(files: CheckpointFiles) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(files)
    return str(caught.value)


def unapprovable(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect("mine", folder)
    return str(caught.value)


def change_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}.index.json", "unet/diffusion_pytorch_model.bin", "v1.ckpt"])
def test_an_ignored_name_never_covers_a_file_that_a_loader_opens(name: str, folder: Path) -> None:
    files = replace(inspect("mine", folder), ignored=(name,))
    (folder / name).write_text("{}")
    if name.endswith((".bin", ".ckpt")):
        verify(files)
        (folder / "unet" / WEIGHTS).rename(folder / "unet" / "moved")
        assert "unet" in refused(files)
        return
    assert f"{name} was added after approval, and a loader could prefer it" in refused(files)


@pytest.mark.parametrize(
    "name",
    [
        f"unet/{WEIGHTS}.index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/shard-00001.safetensors",
        "unet/adapter_config.json", "tokenizer/tokenizer.json", "tokenizer/added_tokens.json",
        "tokenizer/special_tokens_map.json", "tokenizer/chat_template.jinja", "text_encoder/generation_config.json",
        "preprocessor_config.json", "scheduler/config.json", "notes.txt", "spiece.model",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin", "model.ckpt", "unet/model.PT", "unet/flax_model.msgpack", "vae/model.onnx",
        "unet/openvino_model.xml", "model.gguf", "pipeline.py", "unet/modeling_evil.py", "unet/native.so",
        f"unet/{WEIGHTS.upper()}", "VAE/config.json", "unet/CONFIG.JSON", "model.dduf", "unet/weights",
        "text_encoder/shard-00000-model-00001-of-00001.safetensors",
    ],
)  # fmt: skip
def test_a_file_that_was_added_after_approval_is_named(name: str, folder: Path) -> None:
    files = inspect("mine", folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes((folder / "vae" / WEIGHTS).read_bytes() if name.endswith("safetensors") else b"{}")
    assert name in refused(files)
    assert "remove" in refused(files) or "lower case" in refused(files)
    (folder / name).unlink()
    verify(files)


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "LICENSE", "LICENSE-1.0", ".gitattributes", ".cache/huggingface/x.lock", ".hidden.safetensors",
        "v1-inference.yaml", "sample.png", "LICENSE_weights", "FLUX_LICENSE", "MODEL_CARD", "Thumbs.db",
    ],
)  # fmt: skip
def test_documents_samples_and_hidden_files_change_nothing(name: str, folder: Path) -> None:
    files = inspect("mine", folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("words")
    (folder / "empty").mkdir()
    verify(files)
    assert inspect("mine", folder).digest == files.digest


def test_a_distributed_checkpoint_is_not_approved_as_its_loader_reads_hidden_files(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "shard-00000-model-00001-of-00001.safetensors")
    assert "is a shard of a distributed checkpoint" in unapprovable(folder)


@pytest.mark.parametrize("name", ["unet", "unet/config.json", "vae/other.safetensors", "nowhere", ".hidden"])
def test_a_link_anywhere_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    files = inspect("mine", folder)
    if (folder / name).exists():
        shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a symbolic link" in refused(files)
    assert f"{name} is a symbolic link" in unapprovable(folder)


def test_a_directory_that_became_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    files = inspect("mine", folder)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(files)


def test_a_fifo_is_refused_and_never_waited_for(folder: Path) -> None:
    files = inspect("mine", folder)
    (folder / "unet" / "config.json").unlink()
    os.mkfifo(folder / "unet" / "config.json")
    assert "unet/config.json is not a regular file" in refused(files)


def test_names_that_differ_in_case_only_are_not_approved(folder: Path) -> None:
    shutil.copytree(folder / "vae", folder / "VAE")
    assert "VAE/config.json and vae/config.json differ in upper and lower case only" in unapprovable(folder)


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("tokenizer", ["transformers", "AutoTokenizer", "again"]),
        ("unet", ["evil_module", "Net"]),
        ("unet", ["diffusers", "AutoModel"]),
        ("unet", {"class": "Net"}),
        ("../../elsewhere", ["diffusers", "UNet2DConditionModel"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("text_encoder", ["transformers", "pipeline"]),
        ("_class_name", ["my_pipeline", "MyPipeline"]),
        ("_class_name", "StableDiffusionEvilPipeline"),
        ("_class_name", "FluxEvilPipeline"),
    ],
)
def test_only_classes_of_the_allow_list_are_approved(part: str, entry: Any, folder: Path) -> None:
    change_json(folder / "model_index.json", **{part: entry})
    assert str(entry[-1] if part == "_class_name" and isinstance(entry, list) else part) in unapprovable(folder)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "/tmp/vocab.json"}),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Net"}}),
        ("text_encoder/config.json", {"text_config": {"auto_map": {"AutoModel": "evil.Net"}}}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("text_encoder/config.json", {"attn_implementation": "somebody/kernel"}),
        ("text_encoder/config.json", {"backbone": "somebody/net", "use_pretrained_backbone": True}),
        ("text_encoder/config.json", {"transformers_weights": ".hidden.safetensors"}),
        ("preprocessor_config.json", {"image_processor_type": "EvilProcessor"}),
        ("unet/adapter_config.json", {"base_model_name_or_path": "/tmp/other"}),
    ],
)
def test_configurations_that_lead_outside_the_checkpoint_are_refused(
    name: str, keys: dict[str, Any], folder: Path
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(keys))
    assert name in unapprovable(folder)


@pytest.mark.parametrize("shard", ["../../other.safetensors", "/tmp/other.safetensors", ".other.safetensors", "gone"])
def test_an_index_may_only_name_approved_files_beside_it(shard: str, folder: Path) -> None:
    save_file({"weight": torch.ones(4)}, folder / "unet" / ".other.safetensors")
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": shard}}))
    assert f"names {shard}, which is not in the same folder" in unapprovable(folder)


def _exchanged_and_back(folder: Path) -> None:
    part = folder / "unet"
    part.rename(folder / "aside")
    part.mkdir()
    part.rmdir()
    (folder / "aside").rename(part)


def _overwritten_with_old_times(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    about, data = file.stat(), file.read_bytes()
    file.write_bytes(data[:-1] + b"\1")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def _written_through_a_hard_link(folder: Path) -> None:
    other = folder.parent / "other-name"
    os.link(folder / "unet" / WEIGHTS, other)
    other.write_bytes(other.read_bytes())


def _added_and_removed(folder: Path) -> None:
    (folder / "unet" / "new.safetensors").write_bytes(b"")
    (folder / "unet" / "new.safetensors").unlink()


@pytest.mark.parametrize(
    "change",
    [_exchanged_and_back, _overwritten_with_old_times, _written_through_a_hard_link, _added_and_removed],
)
def test_a_change_between_hashing_and_the_end_of_loading_is_refused(
    change: Callable[[Path], None], folder: Path
) -> None:
    files = inspect("mine", folder)
    with pytest.raises(CheckpointError, match="changed while it was read"), unchanged(files):
        change(folder)


def test_a_directory_that_took_the_place_of_the_hashed_one_is_not_loaded(folder: Path) -> None:
    seen = []

    def load(files: CheckpointFiles) -> None:
        with unchanged(files) as directory:
            folder.rename(folder.parent / "aside")
            shutil.copytree(folder.parent / "aside", folder)
            (folder / "unet" / "config.json").write_text('{"evil": true}')
            seen.append((directory / "unet" / "config.json").read_text())

    with pytest.raises(CheckpointError, match="changed while it was read"):
        load(inspect("mine", folder))
    assert seen == ["{}"]


def test_a_cached_hash_is_not_believed_of_a_file_whose_times_were_set_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "SETTLED_S", -1.0)
    cache = HashCache(tmp_path / "hashes.json")
    files = inspect("mine", folder, cache=cache)
    cache.save()
    assert len(json.loads((tmp_path / "hashes.json").read_text())) == len(files.manifest)
    assert (tmp_path / "hashes.json").stat().st_mode & 0o777 == 0o600
    _overwritten_with_old_times(folder)
    with pytest.raises(CheckpointError, match=f"unet/{WEIGHTS} does not have the bytes"):
        verify(files, cache=HashCache(tmp_path / "hashes.json"))


@pytest.mark.parametrize("name", ["shapes", "shapes-canny", "shapes-upscale"])
def test_shipped_checkpoints_keep_the_digests_of_earlier_releases(name: str) -> None:
    found = inspect(name, checkpoints.BUILTIN_CHECKPOINTS / name)
    assert found.digest == digest(dict(read_manifest()[name]))
