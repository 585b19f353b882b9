"""One form of each part's weights is chosen, by the names of the files alone."""

from __future__ import annotations

import pytest

from sdpipeline.engine.part_files import DIFFUSERS, TRANSFORMERS, chosen_form, unused

NET = "diffusion_pytorch_model"
SHARDS = [f"{NET}-00001-of-00002.safetensors", f"{NET}-00002-of-00002.safetensors"]
INDEX = f"{NET}.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "variant", "opened"),
    [
        ([f"{NET}.safetensors", f"{NET}.fp16.safetensors"], None, [f"{NET}.safetensors"]),
        ([f"{NET}.fp16.safetensors", f"{NET}.bf16.safetensors"], "fp16", [f"{NET}.fp16.safetensors"]),
        ([f"{NET}.bf16.safetensors", f"{NET}.fp8.safetensors"], "bf16", [f"{NET}.bf16.safetensors"]),
        ([f"{NET}.non_ema.safetensors", f"{NET}.fp16.safetensors"], "fp16", [f"{NET}.fp16.safetensors"]),
        ([f"{NET}.non_ema.safetensors"], "non_ema", [f"{NET}.non_ema.safetensors"]),
        ([*SHARDS, INDEX, f"{NET}.safetensors"], None, [INDEX, *SHARDS]),
        ([*SHARDS, f"{NET}.fp16.safetensors"], "fp16", [f"{NET}.fp16.safetensors"]),
        (
            [f"{NET}.safetensors.index.fp16.json", f"{NET}.fp16-00001-of-00001.safetensors"],
            "fp16",
            [f"{NET}.safetensors.index.fp16.json", f"{NET}.fp16-00001-of-00001.safetensors"],
        ),
        (
            [f"{NET}.safetensors.fp16.index.json", f"{NET}-00001-of-00001.fp16.safetensors"],
            "fp16",
            [f"{NET}.safetensors.fp16.index.json", f"{NET}-00001-of-00001.fp16.safetensors"],
        ),
    ],
)
def test_the_form_that_is_loaded(files: list[str], variant: str | None, opened: list[str]) -> None:
    form = chosen_form(files, DIFFUSERS)
    assert form is not None
    assert (form.variant, form.files()) == (variant, opened)


def test_transformers_opens_a_single_file_before_an_index() -> None:
    form = chosen_form(
        ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"], TRANSFORMERS
    )
    assert form is not None
    assert form.files() == ["model.safetensors"]


def test_a_pickle_is_unused_only_beside_safetensors_or_outside_the_parts() -> None:
    names = ["model_index.json", "unet/diffusion_pytorch_model.bin", "v1.ckpt", "safety_checker/pytorch_model.bin"]
    names += ["vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "tokenizer/x.pkl"]
    assert unused(names) == {"v1.ckpt", "safety_checker/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"}


def test_code_and_unknown_files_are_never_unused() -> None:
    names = ["model_index.json", "vae/diffusion_pytorch_model.safetensors", "vae/x.py", "vae/x.so", "vae/weights"]
    assert unused(names) == frozenset()


def test_a_network_keeps_one_form_and_an_adapter_its_file_and_encoder() -> None:
    network = ["config.json", f"{NET}.safetensors", f"{NET}.fp16.safetensors", "control.safetensors", f"{NET}.bin"]
    assert unused(network) == set(network) - {"config.json", f"{NET}.safetensors"}
    adapter = ["ip.safetensors", "image_encoder/model.safetensors", "image_encoder/model.fp16.safetensors"]
    assert unused(adapter) == {"image_encoder/model.fp16.safetensors"}
