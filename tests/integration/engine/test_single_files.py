"""Single files are converted exactly: they paint what the folders paint that they were packed from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdpipeline.engine.single_files import conversion, importer, networks
from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.importer import Imported, import_file
from sdpipeline.engine.single_files.layout import Part, recognise
from sdpipeline.engine.single_files.record import RECORD
from sdpipeline.engine.single_files.source_file import SourceFile, TensorInfo
from sdpipeline.engine.single_files.templates import published
from sdpipeline.errors import CheckpointError
from tests.integration.engine_requests import equal, images, prepared, request
from tests.integration.single_files import PACKERS, pack, packed
from tests.integration.tiny_checkpoints import tiny_checkpoints

PIPELINES = ["sd1", "sd2", "sd-inpaint", "sdxl", "sdxl-inpaint", "sd3", "flux"]
NETWORKS = ["controlnet-sd1", "controlnet-sd2", "controlnet-sdxl", "vae", "vae-sdxl"]


def imported(file: Path, folder: Path, **given: Any) -> Imported:
    return import_file("mine", file, folder, Given(**given), lambda *_: None)


@cache
def converted_file(name: str) -> Path:
    """A tiny checkpoint, packed into one file."""
    base = tiny_checkpoints().directory(name)
    return pack(base, base.parent / f"{name}-in-one-file" / "in" / f"{name}.safetensors")


@cache
def converted(name: str) -> Imported:
    """A tiny checkpoint, packed into one file and converted back with its own folder's configurations."""
    base, file = tiny_checkpoints().directory(name), converted_file(name)
    given = {"tokenizer": base} if name in PIPELINES else {"parts": base}
    return imported(file, file.parents[1] / "out", **given)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.relative_to(folder)}/{name}": tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", PIPELINES + NETWORKS)
def test_every_tensor_comes_back_bit_by_bit(name: str) -> None:
    before, after = tensors(tiny_checkpoints().directory(name)), tensors(converted(name).files.directory)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    known = tiny_checkpoints().files(name)
    assert (converted(name).files.kind, converted(name).files.family) == (known.kind, known.family)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_a_converted_file_paints_what_its_folder_paints(name: str) -> None:
    mine = tiny_checkpoints().add(replace(converted(name).files, alias=f"{name}-one-file"))
    one, other = images(prepared(replace(request(name), checkpoint=mine))), images(prepared(request(name)))
    assert equal(one[0], other[0])


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-inpaint"])
def test_a_tokenizer_folder_stands_for_the_folder_that_holds_it(name: str, tmp_path: Path) -> None:
    base = tiny_checkpoints().directory(name)
    file = shutil.copy(converted_file(name), tmp_path / f"{name}.safetensors")
    assert imported(Path(file), tmp_path, tokenizer=base / "tokenizer").files.digest == converted(name).files.digest


def test_the_record_names_the_file_and_its_converter() -> None:
    found = converted("sdxl")
    record = json.loads((found.files.directory / RECORD).read_text())
    assert record["origin"] == {
        "file": "sdxl.safetensors",
        "sha256": hashlib.sha256(converted_file("sdxl").read_bytes()).hexdigest(),
        "size_bytes": converted_file("sdxl").stat().st_size,
    }
    assert record["converter"] == {"diffusers": diffusers.__version__, "revision": conversion.REVISION}
    assert found.files.origin_sha256 == found.sha256 == record["origin"]["sha256"]
    assert RECORD in found.files.manifest


def test_the_same_file_is_converted_once_and_an_altered_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first = tiny_checkpoints().directory("sd1"), converted("sd1")
    folder = first.files.directory.parent
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", None)
        assert imported(converted_file("sd1"), folder, tokenizer=base).files.directory == first.files.directory
    altered = load_file(converted_file("sd1"))
    altered["model.diffusion_model.out.2.bias"] += 1
    save_file(altered, tmp_path / "sd1.safetensors")
    assert imported(tmp_path / "sd1.safetensors", folder, tokenizer=base).files.digest != first.files.digest


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), FULL])
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(conversion, "_record", fail)
    with pytest.raises(OSError, match="No space left on device"):
        imported(converted_file("sd1"), tmp_path, tokenizer=tiny_checkpoints().directory("sd1"))
    assert list(tmp_path.rglob("*")) == [tmp_path / ".converting"]


def test_an_unfinished_conversion_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".converting" / "dead" / "checkpoint").mkdir(parents=True)
    imported(converted_file("vae"), tmp_path, parts=tiny_checkpoints().directory("vae"))
    assert list((tmp_path / ".converting").iterdir()) == []


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, torch.float16), (torch.float8_e4m3fn, torch.bfloat16)])
def test_dtypes_are_kept_and_float8_becomes_bfloat16_exactly(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    base = tiny_checkpoints().directory("flux")
    halved = {name: tensor.to(dtype) for name, tensor in packed(base).items()}
    save_file(halved, tmp_path / "half.safetensors")
    found = imported(tmp_path / "half.safetensors", tmp_path, tokenizer=base)
    assert {tensor.dtype for tensor in tensors(found.files.directory).values()} == {stored}
    name = "transformer/x_embedder.weight"
    assert tensors(found.files.directory)[name].equal(tensors(base)[name].to(dtype).to(stored))
    assert bool(found.notes) == (stored == torch.bfloat16)


def test_missing_parts_are_taken_from_the_folder_that_is_named_for_them(tmp_path: Path) -> None:
    base = tiny_checkpoints().directory("flux")
    file = pack(base, tmp_path / "x" / "model-only.safetensors", without=("vae", "text_encoder", "text_encoder_2"))
    with pytest.raises(CheckpointError, match=r"holds no vae, no text_encoder, no text_encoder_2; .*--parts"):
        imported(file, tmp_path, tokenizer=base)
    found = imported(file, tmp_path, parts=base)
    assert tensors(found.files.directory).keys() == tensors(base).keys()
    assert "the vae is not of the file" in " ".join(found.notes)


def test_parts_of_another_family_are_refused(tmp_path: Path) -> None:
    """The autoencoder of an SD 1 loads into an SDXL, and every picture would be wrong."""
    base = tiny_checkpoints().directory("sdxl")
    file = pack(base, tmp_path / "x" / "no-vae.safetensors", without=("vae",))
    with pytest.raises(CheckpointError, match=r"is sdxl of other widths than the pipeline in .*, whose vae would not"):
        imported(file, tmp_path, tokenizer=base, parts=tiny_checkpoints().directory("sd1"))
    shutil.copytree(tiny_checkpoints().directory("vae"), tmp_path / "parts" / "vae")
    with pytest.raises(CheckpointError, match="whose vae would not fit"):
        imported(file, tmp_path, tokenizer=base, parts=tmp_path / "parts")


def test_an_sd3_without_t5_is_a_pipeline_without_t5(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoints().directory("sd3"), tmp_path / "base"))
    shutil.rmtree(base / "tokenizer_3")
    file = pack(base, tmp_path / "x" / "clips.safetensors", without=("text_encoder_3",))
    found = imported(file, tmp_path, tokenizer=base).files.directory
    index = json.loads((found / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert not (found / "text_encoder_3").exists()


@pytest.mark.parametrize(
    ("markers", "metadata", "prediction_type", "zero_snr"),
    [
        ((), {}, "epsilon", None),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", None),
        (("v_pred",), {}, "v_prediction", None),
        (("v_pred", "ztsnr"), {}, "v_prediction", True),
    ],
)
def test_a_file_that_states_its_prediction_type_is_believed(
    tmp_path: Path, markers: tuple[str, ...], metadata: dict[str, str], prediction_type: str, *, zero_snr: bool | None
) -> None:
    base = tiny_checkpoints().directory("sdxl")
    marked = load_file(converted_file("sdxl")) | {name: torch.zeros(0) for name in markers}
    save_file(marked, tmp_path / "x.safetensors", metadata=metadata)
    found = imported(tmp_path / "x.safetensors", tmp_path, tokenizer=base).files.directory
    scheduler = json.loads((found / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler.get("rescale_betas_zero_snr") or None) == (
        prediction_type,
        zero_snr,
    )


def test_the_prediction_type_of_an_sd2_is_asked_for_if_nothing_tells_it(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoints().directory("sd2"), tmp_path / "base"))
    shutil.rmtree(base / "scheduler")
    with pytest.raises(CheckpointError, match=r"--prediction-type epsilon .* or --prediction-type v_prediction"):
        imported(converted_file("sd2"), tmp_path, tokenizer=base)
    found = imported(converted_file("sd2"), tmp_path, tokenizer=base, prediction_type="v_prediction").files.directory
    assert json.loads((found / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_heads_and_groups_are_never_guessed(tmp_path: Path) -> None:
    """Tokenizers alone do not tell how many heads a network of no published width has."""
    base = tiny_checkpoints().directory("sdxl")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(base / name, tmp_path / "words" / name)
    with pytest.raises(CheckpointError, match=r"number of attention heads and groups; .*--parts DIR"):
        imported(converted_file("sdxl"), tmp_path, tokenizer=tmp_path / "words")


def test_one_clip_vocabulary_serves_both_encoders_with_the_padding_of_each(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoints().directory("sdxl"), tmp_path / "base"))
    shutil.rmtree(base / "tokenizer_2")
    found = imported(converted_file("sdxl"), tmp_path, tokenizer=base).files.directory
    pads = [json.loads((found / each / "tokenizer_config.json").read_text())["pad_token"] for each in TOKENIZERS]
    assert pads == ["<|endoftext|>", "!"]


TOKENIZERS = ("tokenizer", "tokenizer_2")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoints().directory("sd1"), tmp_path / "base"))
    words = json.loads((base / "tokenizer" / "tokenizer.json").read_text())
    words["model"]["vocab"]["zebra"] = len(words["model"]["vocab"])
    (base / "tokenizer" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens and its text encoder \d+; .*--tokenizer"):
        imported(converted_file("sd1"), tmp_path, tokenizer=base)


def test_a_tokenizer_that_its_library_cannot_read_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoints().directory("sd1"), tmp_path / "base"))
    words = json.loads((base / "tokenizer" / "tokenizer.json").read_text())
    words["model"]["type"] = "Unheard"
    (base / "tokenizer" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="tokenizer does not load: "):
        imported(converted_file("sd1"), tmp_path, tokenizer=base)


def test_an_import_does_not_remove_the_unfinished_folder_of_another_one_that_begins(tmp_path: Path) -> None:
    begin, others = tempfile.mkdtemp, list[threading.Thread]()

    def other() -> None:
        with importer._unfinished(tmp_path):
            pass

    def made_while_another_begins(**options: Any) -> str:
        """Give another import the time between the creation of this one's folder and its lock."""
        made = str(begin(**options))
        if not others:
            others.append(threading.Thread(target=other))
            others[0].start()
            others[0].join(0.2)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", made_while_another_begins)
        with importer._unfinished(tmp_path) as folder:
            others[0].join()
            assert folder.is_dir()


def test_a_copy_that_was_changed_since_is_not_approved_as_the_file(tmp_path: Path) -> None:
    file = next(tiny_checkpoints().directory("lora-sd1").glob("*.safetensors"))
    copy = imported(file, tmp_path).files.directory
    save_file(load_file(file), copy / file.name, metadata={"changed": "since"})
    with pytest.raises(CheckpointError, match=r"is not the file that it was copied from; remove that folder"):
        imported(file, tmp_path)


@pytest.mark.parametrize(
    ("name", "vocabularies"),
    [
        ("sd1", ["CLIP ViT-L/14"]),
        ("sd2", ["OpenCLIP ViT-H/14"]),
        ("sdxl", ["CLIP ViT-L/14", "OpenCLIP ViT-bigG/14"]),
        ("sd3", ["CLIP ViT-L/14", "OpenCLIP ViT-bigG/14", "T5 v1.1 XXL"]),
        ("flux", ["CLIP ViT-L/14", "T5 v1.1 XXL"]),
    ],
)
def test_missing_vocabularies_are_named(name: str, vocabularies: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--tokenizer") as refused:
        imported(converted_file(name), tmp_path)
    assert all(vocabulary in str(refused.value) for vocabulary in vocabularies)


@pytest.mark.parametrize(("name", "families"), [("vae", "sd1 or sdxl"), ("flux", "sd3 or flux")])
def test_the_family_of_an_autoencoder_is_asked_for(name: str, families: str, tmp_path: Path) -> None:
    """At the published width, autoencoders of two families differ in their configuration only."""
    config = published("flux" if name == "flux" else "sd1")["parts"]["vae"]
    with torch.device("meta"):
        state = diffusers.AutoencoderKL.from_config(config).state_dict()
    source = SourceFile(path=tmp_path / "vae.safetensors", tensors=_infos(state), metadata={})
    layout = recognise(source)
    assert layout is not None
    with pytest.raises(CheckpointError, match=f"say --family {families}"):
        conversion.convert(source, layout, Given(), tmp_path, sha256="", report=print)


def _infos(state: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), "F16") for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {}),
        ("sd1", {"in_channels": 9}),
        ("sd2", {}),
        ("sdxl", {}),
        ("sd3", {}),
        ("sd3", {"dual_attention_layers": [0, 1, 2], "qk_norm": "rms_norm", "pos_embed_max_size": 16}),
        ("sd3", {"num_attention_heads": 38, "caption_projection_dim": 2432, "num_layers": 38, "qk_norm": "rms_norm"}),
        ("flux", {}),
        ("flux", {"guidance_embeds": False}),
    ],
)
def test_published_denoisers_are_rebuilt_from_their_shapes_alone(family: str, changes: dict[str, Any]) -> None:
    name = "transformer" if family in networks.DENOISERS else "unet"
    config = dict(published(family)["parts"][name]) | changes
    with torch.device("meta"):
        state = getattr(diffusers, config["_class_name"]).from_config(config).state_dict()
    original = PACKERS[family](state, config)
    names = {key: f"model.diffusion_model.{key}" for key in original}
    shapes = {key: tuple(tensor.shape) for key, tensor in original.items()}
    part = Part(naming="ldm", names=names, shapes=shapes)
    found, _ = networks.configuration(name, part, families=[family], roots=[], own=None, where="x")
    assert {key: found.get(key) for key in config if key != "sample_size"} == {
        key: value for key, value in config.items() if key != "sample_size"
    }


def _refused(file: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        imported(file, tmp_path / "out", tokenizer=tmp_path)
    assert str(file) in str(refused.value) or "checkpoint 'mine'" in str(refused.value)
    return str(refused.value)


def _header(entries: str) -> bytes:
    return (len(entries) + 2).to_bytes(8, "little") + f"{{{entries}}}".encode()


@pytest.mark.parametrize(
    ("name", "start", "reason"),
    [
        ("x.ckpt", b"anything", "is a pickle"),
        ("x.pt", b"anything", "is a pickle"),
        ("x.safetensors", b"PK\x03\x04rest", "is a pickle"),
        ("x.safetensors", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        ("x.gguf", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("x.safetensors", b"", "is not a safetensors file"),
        ("x.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "is incomplete"),
        ("x.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no tensors"),
        ("x.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "is not a safetensors file"),
        ("x.safetensors", _header('"__metadata__": [1]'), "is not a safetensors file"),
        ("x.safetensors", _header('"a": {"dtype": "F33", "shape": [0], "data_offsets": [0, 0]}'), "is damaged"),
        ("x.safetensors", _header('"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}'), "is damaged"),
    ],
)
def test_a_file_that_is_not_whole_safetensors_is_refused(name: str, start: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(start)
    assert reason in _refused(tmp_path / name, tmp_path)


def test_a_truncated_file_is_refused_before_it_is_hashed(tmp_path: Path) -> None:
    whole = converted_file("vae").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-100])
    assert "is incomplete: its header describes" in _refused(tmp_path / "x.safetensors", tmp_path)


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "refiner": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 8),
            "conditioner.embedders.0.model.positional_embedding": (77, 8),
        },
        "an SDXL refiner",
    ),
    "upscaler": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 7, 3, 3),
            "model.diffusion_model.label_emb.weight": (8, 8),
        },
        "the x4 upscaler",
    ),
    "pix2pix": ({"model.diffusion_model.input_blocks.0.0.weight": (8, 8, 3, 3)}, "instruct-pix2pix"),
    "flat": ({"model.diffusion_model.input_blocks.0.0.weight": (8,)}, "0 input channels"),
    "unknown-width": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 640),
        },
        "640 wide",
    ),
    "chroma": ({"distilled_guidance_layer.in_proj.bias": (8,), "double_blocks.0.img_attn.qkv.bias": (8,)}, "Chroma"),
    "wan": ({"model.diffusion_model.patch_embedding.weight": (8, 8)}, "Wan"),
    "playground": (
        {"edm_mean": (1, 4, 1, 1), "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
        "an EDM checkpoint",
    ),
    "flux-fill": (
        {"double_blocks.0.img_attn.qkv.weight": (8, 8), "img_in.weight": (8, 384)},
        "Flux Fill",
    ),
    "scaled-fp8": (
        {"double_blocks.0.img_attn.qkv.weight": (8, 8), "double_blocks.0.img_attn.qkv.scale_weight": (1,)},
        "quantized weights",
    ),
    "half-a-controlnet": ({"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}, "is incomplete"),
    "half-a-vae": ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "is incomplete"),
    "half-a-flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "holds no vae"),
    "flux-controlnet-xlabs": (
        {
            "controlnet_blocks.0.weight": (8, 8),
            "input_hint_block.0.weight": (16, 3, 3, 3),
            "double_blocks.0.img_attn.qkv.weight": (8, 8),
            "img_in.weight": (8, 64),
        },
        "X-Labs' names",
    ),
    "refiner-unet": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (384, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 2560),
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280),
        },
        "an SDXL refiner",
    ),
    "kolors": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "model.diffusion_model.encoder_hid_proj.weight": (8, 8),
        },
        "a Kolors U-Net",
    ),
    "video": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 8, 3, 3),
            "model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_k.weight": (8, 8),
        },
        "Stable Video Diffusion",
    ),
    "flux2-vae": ({"decoder.conv_in.weight": (8, 32, 3, 3)}, "32 latent channels"),
    "flux-control-lora": (
        {
            "double_blocks.0.img_attn.qkv.lora_A.weight": (4, 3072),
            "double_blocks.0.img_attn.qkv.lora_B.weight": (9216, 4),
            "img_in.lora_A.weight": (4, 128),
            "img_in.lora_B.weight": (3072, 4),
        },
        "a Flux Control LoRA",
    ),
    "control-lora": (
        {
            "lora_controlnet": (0,),
            "input_hint_block.0.weight": (16, 3, 3, 3),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.up": (640, 4),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.down": (4, 2048),
        },
        "is a Control-LoRA",
    ),
    "flux-controlnet": ({"controlnet_x_embedder.weight": (8, 8)}, "config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_cannot_run_here_are_refused_by_name(name: str, tmp_path: Path) -> None:
    shapes, reason = REFUSED[name]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    assert reason in _refused(tmp_path / "x.safetensors", tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    base = tiny_checkpoints().directory("sdxl")
    left = load_file(converted_file("sdxl"))
    del left["conditioner.embedders.1.model.ln_final.bias"]
    save_file(left, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"text_encoder_2 has no tensor for .*final_layer_norm\.bias"):
        imported(tmp_path / "x.safetensors", tmp_path, tokenizer=base)


def test_a_lora_is_copied_and_has_the_digest_of_its_folder(tmp_path: Path) -> None:
    folder = tiny_checkpoints().directory("lora-sdxl")
    found = imported(folder / "pytorch_lora_weights.safetensors", tmp_path)
    assert found.files.digest == tiny_checkpoints().files("lora-sdxl").digest
    assert found.files.directory.parent == tmp_path
    assert found.files.origin_sha256 == found.sha256


def test_a_copy_that_cannot_run_here_is_refused_before_it_is_made(tmp_path: Path) -> None:
    save_file({"lora_controlnet": torch.zeros(0), "input_blocks.0.0.up": torch.zeros(8, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="Control-LoRA"):
        imported(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_last_of_24_openclip_layers_is_left_out(tmp_path: Path) -> None:
    """SD 2 reads the penultimate layer: its folders have one layer less than its files."""
    base, before = tiny_checkpoints().directory("sd2"), load_file(converted_file("sd2"))
    layer = "cond_stage_model.model.transformer.resblocks."
    more = {name.replace(f"{layer}2.", f"{layer}3."): t for name, t in before.items() if name.startswith(f"{layer}2.")}
    save_file(before | {name: tensor + 1 for name, tensor in more.items()}, tmp_path / "x.safetensors")
    found = imported(tmp_path / "x.safetensors", tmp_path, tokenizer=base).files.directory
    known = tensors(base)
    assert all(tensor.equal(known[name]) for name, tensor in tensors(found).items())


def test_half_precision_parts_are_borrowed_in_one_form(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoints().directory("sd1"), tmp_path / "base"))
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(vae).items()}
    save_file(half, vae.with_suffix(".fp16.safetensors"))
    file = pack(base, tmp_path / "x" / "no-vae.safetensors", without=("vae",))
    found = imported(file, tmp_path, parts=base).files.directory
    assert [path.name for path in (found / "vae").glob("*.safetensors")] == [vae.name]


def test_the_metadata_of_a_file_gives_its_licence(tmp_path: Path) -> None:
    state = load_file(tiny_checkpoints().directory("lora-sdxl") / "pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "style.safetensors", metadata={"modelspec.license": "CC-BY-4.0"})
    assert imported(tmp_path / "style.safetensors", tmp_path).licence == "CC-BY-4.0"


def test_a_checkpoints_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="SDP_CHECKPOINTS_DIR"):
        imported(converted_file("sd1"), tmp_path / "out", tokenizer=tiny_checkpoints().directory("sd1"))


def test_an_ip_adapter_is_copied_with_the_image_encoder_of_its_repository(tmp_path: Path) -> None:
    folder = tiny_checkpoints().directory("ip-adapter-sd1")
    shutil.copytree(folder, tmp_path / "h94" / "models")
    found = imported(tmp_path / "h94" / "models" / "ip-adapter.safetensors", tmp_path / "out").files
    assert found.kind == "ip-adapter"
    assert dict(found.manifest) == dict(tiny_checkpoints().files("ip-adapter-sd1").manifest)


@pytest.mark.parametrize("renamed", [True, False])
def test_other_names_of_the_second_text_encoder_are_read(tmp_path: Path, *, renamed: bool) -> None:
    base, second = tiny_checkpoints().directory("sdxl"), "conditioner.embedders.1."
    state = load_file(converted_file("sdxl"))
    if renamed:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(second)}
        own = load_file(base / "text_encoder_2" / "model.safetensors")
        state |= {f"{second}transformer.{name}": tensor for name, tensor in own.items()}
    else:
        state[f"{second}model.text_projection.weight"] = state.pop(f"{second}model.text_projection").T.contiguous()
    save_file(state, tmp_path / "x.safetensors")
    found, known = (
        tensors(imported(tmp_path / "x.safetensors", tmp_path, tokenizer=base).files.directory),
        tensors(base),
    )
    assert found.keys() == known.keys()
    assert all(tensor.equal(known[name]) for name, tensor in found.items())
