"""Checkpoints as public repositories have them: the same picture as the folder they came from, or a clear refusal."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import diffusers
import httpx
import huggingface_hub
import pytest
import torch

from sdpipeline.domain import digest
from sdpipeline.engine import Pixels
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect, verify
from sdpipeline.engine.diffusers.text import PromptEncoder
from sdpipeline.engine.hub import fetch, fetched_files
from sdpipeline.errors import CheckpointError
from tests.integration.engine_requests import engine, failure_of, image_of, new_engine, prepared, request, results
from tests.integration.public_layouts import LOADED, REFUSED, UNET, everything, fp16_only, laid_out, sharded, without_t5
from tests.integration.tiny_checkpoints import TinyCheckpoints, tiny_checkpoints


def painted(files: CheckpointFiles, base: str) -> Pixels:
    """The picture of a request on these weights, which are a form of that tiny checkpoint."""
    own = TinyCheckpoints(files.directory)
    asked = replace(request(base, num_inference_steps=2), checkpoint=own.add(files))
    return image_of(results(prepared(asked), on=new_engine(own))[0]).pixels


def original(base: str) -> Pixels:
    return image_of(results(prepared(request(base, num_inference_steps=2)), on=engine())[0]).pixels


@pytest.mark.parametrize("name", LOADED)
def test_a_public_layout_paints_what_the_plain_folder_paints(name: str, tmp_path: Path) -> None:
    base, change = LOADED[name]
    files = inspect(name, laid_out(base, change, tmp_path / name))
    assert (painted(files, base) == original(base)).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_at_registration_with_the_next_step(name: str, tmp_path: Path) -> None:
    base, change, named = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        inspect(name, laid_out(base, change, tmp_path / name))
    assert [word for word in named if word not in str(caught.value)] == []


def test_only_the_chosen_form_of_each_part_is_counted_and_hashed(tmp_path: Path) -> None:
    files = inspect("everything", laid_out("sd1", everything, tmp_path / "everything"))
    plain = tiny_checkpoints().files("sd1")
    assert (files.digest, files.size_bytes) == (plain.digest, plain.size_bytes)
    assert {"v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin"} <= set(files.ignored)
    verify(files)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bf16.safetensors", "v2.safetensors", "vae/x.bin"])
def test_a_form_that_is_added_after_approval_is_refused_although_others_lay_there(name: str, tmp_path: Path) -> None:
    files = inspect("everything", laid_out("sd1", everything, tmp_path / "everything"))
    shutil.copyfile(files.directory / UNET, files.directory / name)
    with pytest.raises(CheckpointError, match=name):
        verify(files)


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_half_precision_alone_is_loaded_as_diffusers_loads_it(tmp_path: Path, *, shards: bool) -> None:
    change = partial(sharded, variant="fp16") if shards else fp16_only
    files = inspect("half", laid_out("sd1", change, tmp_path / "half"))
    assert not files.ignored
    theirs = diffusers.UNet2DConditionModel.from_pretrained(files.directory / "unet", variant="fp16")
    own = TinyCheckpoints(files.directory)
    loaded = new_engine(own).residency.get(own.add(files))
    ours = loaded.parts["unet"].state_dict()
    assert all(torch.equal(ours[name], tensor.float()) for name, tensor in theirs.state_dict().items())


def test_weights_that_an_earlier_release_approved_whole_keep_their_digest_and_pictures(tmp_path: Path) -> None:
    folder = laid_out("sd1", everything, tmp_path / "everything")
    for name in ("v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "text_encoder/flax_model.msgpack"):
        (folder / name).unlink()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    manifest = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}
    old = replace(tiny_checkpoints().files("sd1"), directory=folder, manifest=manifest, digest=digest(manifest))
    verify(old)
    assert (painted(old, "sd1") == original("sd1")).all()


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(CheckpointError, match=r"a/b at 000000000000 cannot be fetched: \[Errno 111\]"):
        fetch("a/b", "0" * 40, tmp_path)


def test_only_the_chosen_files_of_a_repository_are_fetched(tmp_path: Path) -> None:
    folder = laid_out("sd1", everything, tmp_path / "everything")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "unet" / "notes.md").write_text("")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names += ["safety_checker/model.safetensors", "safety_checker/config.json", ".gitattributes"]
    assert set(fetched_files(names)) == {*tiny_checkpoints().files("sd1").manifest, "README.md"}


@pytest.fixture(scope="module")
def sd3_without_t5(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFiles:
    return inspect("sd3-no-t5", laid_out("sd3", without_t5, tmp_path_factory.mktemp("sd3") / "weights"))


def test_sd3_without_t5_encodes_prompts_as_the_stock_pipeline_does(sd3_without_t5: CheckpointFiles) -> None:
    nothing = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_without_t5.directory, **nothing)
    expected, _, pooled, _ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
    encoder = PromptEncoder(kind="sd3", parts={k: part for k, part in pipe.components.items() if part is not None})
    found = encoder.encode("a cat", length=encoder.length("a cat"))
    assert torch.equal(found.embeds, expected)
    assert found.pooled is not None
    assert torch.equal(found.pooled, pooled)


def test_sd3_without_t5_paints_and_refuses_a_prompt_that_its_clips_would_cut(sd3_without_t5: CheckpointFiles) -> None:
    own = TinyCheckpoints(sd3_without_t5.directory)
    asked = replace(request("sd3", num_inference_steps=2), checkpoint=own.add(sd3_without_t5))
    long = replace(asked, prompt="cat " * 100)
    made, refused = results(prepared(asked), prepared(long), on=new_engine(own))
    assert image_of(made).pixels.std() > 0
    assert "no T5, and its CLIPs read 75" in failure_of(refused)
