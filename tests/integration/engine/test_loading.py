"""Weights are verified against the registry, loaded safely, and dropped when memory runs short."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdpipeline.domain import CheckpointRef, digest
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect, vae_refusal, verify
from sdpipeline.errors import CheckpointError
from tests.integration.engine_requests import failure_of, image_of, new_engine, prepared, ref, request, results
from tests.integration.tiny_checkpoints import TinyCheckpoints, tiny_checkpoints

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sd1 checkpoint that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoints().directory("sd1"), tmp_path / "copy"))


def failure(files: CheckpointFiles) -> str:
    """The failure of a request on that checkpoint."""
    own = TinyCheckpoints(files.directory)
    asked = replace(request(), checkpoint=own.add(files))
    return failure_of(results(prepared(asked), on=new_engine(own))[0])


def approved_earlier(copy: Path) -> CheckpointFiles:
    """The directory as an earlier release approved it: every file counts, and nothing was looked into."""
    manifest = {
        path.relative_to(copy).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in copy.rglob("*")
        if path.is_file()
    }
    files = replace(tiny_checkpoints().files("sd1"), alias="old", directory=copy, manifest=manifest)
    return replace(files, digest=digest(manifest))


@pytest.mark.parametrize(
    ("name", "kind", "family", "scale"),
    [
        ("sd1", "checkpoint", "sd1", 1),
        ("sd2", "checkpoint", "sd2", 1),
        ("sd-inpaint", "checkpoint", "sd-inpaint", 1),
        ("sdxl", "checkpoint", "sdxl", 1),
        ("sdxl-inpaint", "checkpoint", "sdxl-inpaint", 1),
        ("sd3", "checkpoint", "sd3", 1),
        ("flux", "checkpoint", "flux", 1),
        ("upscale", "checkpoint", "upscale", 4),
        ("latent-upscale", "checkpoint", "latent-upscale", 2),
        ("controlnet-sd1", "controlnet", "sd1", 1),
        ("controlnet-sd2", "controlnet", "sd2", 1),
        ("controlnet-sdxl", "controlnet", "sdxl", 1),
        ("controlnet-sd3", "controlnet", "sd3", 1),
        ("controlnet-sd3-inpaint", "controlnet", "sd3-inpaint", 1),
        ("controlnet-flux", "controlnet", "flux", 1),
        ("vae", "vae", "sd1", 1),
    ],
)
def test_a_directory_is_recognised(name: str, kind: str, family: str, scale: int) -> None:
    files = tiny_checkpoints().files(name)
    assert (files.kind, files.family, files.scale) == (kind, family, scale)


def test_the_digest_is_of_the_contents_and_not_of_names_or_readme_files(copy: Path) -> None:
    (copy / "README.md").write_text("other words")
    assert inspect("another-name", copy).digest == tiny_checkpoints().files("sd1").digest


def test_a_flipped_byte_is_found_before_anything_is_loaded(copy: Path) -> None:
    files = inspect("damaged", copy)
    data = bytearray((copy / UNET).read_bytes())
    data[-1] ^= 1
    (copy / UNET).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{UNET} does not have the bytes that were registered"):
        verify(files)
    assert f"CheckpointError: checkpoint 'damaged': {UNET} does not have the bytes" in failure(files)


def test_a_missing_file_is_named(copy: Path) -> None:
    files = inspect("damaged", copy)
    (copy / UNET).unlink()
    assert f"{UNET} is missing" in failure(files)


def test_a_missing_key_is_refused_although_diffusers_would_load_it(copy: Path) -> None:
    tensors = load_file(copy / UNET)
    del tensors["time_embedding.linear_2.weight"]
    save_file(tensors, copy / UNET)
    assert "CheckpointError: checkpoint 'damaged': unet has no tensor time_embedding.linear_2.weight" in failure(
        inspect("damaged", copy)
    )


def test_a_truncated_file_that_an_earlier_release_approved_does_not_load(copy: Path) -> None:
    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-1000])
    assert "CheckpointError: checkpoint 'old' does not load" in failure(approved_earlier(copy))


def test_other_weights_under_a_pinned_name_are_refused() -> None:
    asked = replace(request(), checkpoint=CheckpointRef(alias="sd1", digest="0" * 64))
    assert "was pinned as 000000000000" in failure_of(results(prepared(asked), on=new_engine())[0])


def test_a_pickle_without_safetensors_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        inspect("pickled", tmp_path)


def test_a_part_that_is_only_a_pickle_is_refused(copy: Path) -> None:
    tensors = load_file(copy / UNET)
    (copy / UNET).unlink()
    torch.save(tensors, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model.bin.* a pickle can run code"):
        inspect("half-pickled", copy)


def test_an_index_and_a_shard_added_after_approval_make_no_picture(copy: Path) -> None:
    files = inspect("mine", copy)
    tensors = {name: tensor + 1 for name, tensor in load_file(copy / UNET).items()}
    save_file(tensors, copy / "unet" / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (copy / f"{UNET}.index.json").write_text(json.dumps(index))
    assert f"{UNET}.index.json was added after approval" in failure(files)


def test_weights_that_an_earlier_release_approved_run_no_code_and_ask_nothing(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "AutoTokenizer"]}))
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    why = failure(approved_earlier(copy))
    assert "component tokenizer asks for transformers.AutoTokenizer, which is not loaded" in why


def test_a_file_that_is_overwritten_after_loading_does_not_change_pictures(copy: Path) -> None:
    files = inspect("mine", copy)
    own = TinyCheckpoints(copy)
    on, asked = new_engine(own), replace(request(), checkpoint=own.add(files))
    before = image_of(results(prepared(asked), on=on)[0])
    for path in copy.rglob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size - size // 2))
    assert (image_of(results(prepared(replace(asked, prompt="a dog")), on=on)[0]).pixels != before.pixels).any()
    assert (image_of(results(prepared(asked), on=on)[0]).pixels == before.pixels).all()


def test_code_in_the_directory_is_refused(copy: Path) -> None:
    (copy / "pipeline.py").write_text("print('run')")
    with pytest.raises(CheckpointError, match=r"contains code \(pipeline.py\)"):
        inspect("clever", copy)


def test_a_component_from_another_library_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"unet": ["evil_module", "Net"]}))
    with pytest.raises(CheckpointError, match="component unet asks for code from 'evil_module'"):
        inspect("foreign", copy)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        inspect("gone", tmp_path / "nowhere")


def test_the_least_recently_used_checkpoint_makes_room_for_the_next() -> None:
    files = tiny_checkpoints().files
    budget = files("sd1").size_bytes + files("sdxl").size_bytes
    on = new_engine(resident_bytes=budget)
    for name in ("sd1", "sd-inpaint", "sd1", "controlnet-sd1"):
        on.residency.get(ref(name))
    assert on.resident() == {ref("sd1").digest, ref("controlnet-sd1").digest}


def test_a_checkpoint_that_was_dropped_makes_the_same_picture_again() -> None:
    on = new_engine(resident_bytes=1)
    first = image_of(results(prepared(request()), on=on)[0])
    on.residency.get(ref("sd-inpaint"))
    assert ref("sd1").digest not in on.resident()
    assert (image_of(results(prepared(request()), on=on)[0]).pixels == first.pixels).all()


@pytest.mark.parametrize(("scaling", "fits"), [(0.5, True), (0.18215, False)])
def test_an_autoencoder_fits_by_its_configuration_whatever_its_family_is_called(
    scaling: float, fits: bool, tmp_path: Path
) -> None:
    base = replace(tiny_checkpoints().files("sdxl"), directory=tmp_path / "base")
    vae = replace(tiny_checkpoints().files("vae"), directory=tmp_path / "other")
    for folder, factor in ((tmp_path / "base" / "vae", 0.5), (tmp_path / "other", scaling)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"scaling_factor": factor}))
    assert (vae_refusal(base, vae) is None) is fits
