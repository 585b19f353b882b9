"""Single files paint exactly what the folders paint that they were packed from."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.importer import Imported, import_file
from tests.integration.single_files import pack
from tests.integration.tiny_checkpoints import tiny_checkpoints


def imported(file: Path, folder: Path, **given: object) -> Imported:
    return import_file("mine", file, folder, Given(**given), lambda *_: None)


def tensors(folder: Path) -> dict:
    return {
        f"{path.parent.relative_to(folder)}/{name}": tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", ["sd1", "sd2", "sd-inpaint", "sdxl", "sdxl-inpaint", "sd3", "flux"])
def test_every_tensor_of_a_packed_pipeline_comes_back(name: str, tmp_path: Path) -> None:
    base = tiny_checkpoints().directory(name)
    found = imported(pack(base, tmp_path / "in" / "x.safetensors"), tmp_path / "out", tokenizer=base)
    before, after = tensors(base), tensors(found.files.directory)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize("name", ["controlnet-sd1", "controlnet-sd2", "controlnet-sdxl", "vae", "vae-sdxl"])
def test_every_tensor_of_a_packed_network_comes_back(name: str, tmp_path: Path) -> None:
    base = tiny_checkpoints().directory(name)
    found = imported(pack(base, tmp_path / "in" / "x.safetensors"), tmp_path / "out", parts=base)
    before, after = tensors(base), tensors(found.files.directory)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    assert (found.files.kind, found.files.family) == (
        tiny_checkpoints().files(name).kind,
        tiny_checkpoints().files(name).family,
    )
