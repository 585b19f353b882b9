"""Every form of weights in the table of families makes the picture of the folder that it came from, in every cell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sdpipeline.domain import CheckpointRef, ControlNetInput, Task
from sdpipeline.engine import Pixels
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.families import FAMILIES, forms
from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.importer import import_file
from tests.integration.engine.test_families import CONTROLNETS, asked
from tests.integration.engine_requests import image_of, new_engine, results
from tests.integration.public_layouts import without_t5
from tests.integration.single_files import pack
from tests.integration.tiny_checkpoints import TinyCheckpoints, tiny_checkpoints

UNIONS = {"sdxl": "union-sdxl", "flux": "union-flux"}

SHORT_TIER = {forms.ONE_FILE, forms.UNION, forms.NO_T5}

OTHER_PICTURE = {forms.NO_T5}
"""Forms that lack weights of the folder, so that their picture is another; a test of layouts compares it."""


def _cell(name: str, task: Task, form: str, tasks: Iterable[Task]) -> Any:
    """A cell of the table; of each family, the first task in one file or as a union runs in the short tier."""
    is_short = task == next(iter(tasks)) and (form in SHORT_TIER or name == "sd1")
    marks = [] if is_short else [pytest.mark.long]
    return pytest.param(name, task, form, marks=marks, id=f"{name}-{task}-{form}")


CHECKPOINTS = [
    _cell(name, task, form, row.plain)
    for name, row in FAMILIES.items()
    if name != "gan-upscale"
    for task in row.plain
    for form in forms.CHECKPOINTS[name]
    if form != forms.FOLDER
]
CONTROLLED = [
    _cell(name, task, form, row.controlled)
    for name, row in FAMILIES.items()
    for task in row.controlled
    for form in forms.CONTROLNETS.get(name, ())
    if form != forms.FOLDER
]


def tensors_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def halve(folder: Path, *, named: bool) -> None:
    """Round all weights to half precision: in files of the variant fp16, or in plain files of full precision."""
    for path in tensors_of(folder):
        rounded = {
            name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
        }
        path.unlink()
        if named:
            save_file(rounded, path.with_name(f"{path.stem}.fp16.safetensors"), metadata={"format": "pt"})
        else:
            full = {name: each.float() if each.is_floating_point() else each for name, each in rounded.items()}
            save_file(full, path, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Cut the network that runs once per step in two."""
    path = next(path for path in tensors_of(folder) if path.parent.name in ("unet", "transformer"))
    tensors = load_file(path)
    path.unlink()
    weight_map: dict[str, str] = {}
    for n, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"{path.stem}-{n:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, path.with_name(file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))


@cache
def checkpoint(name: str, form: str) -> CheckpointFiles:
    """A tiny checkpoint in that form; ``rounded`` is the folder that a half-precision one equals."""
    base = tiny_checkpoints().directory(name)
    to = base.parent / f"forms-{name}" / form.replace(" ", "-")
    if form == forms.ONE_FILE:
        return import_file(
            name, pack(base, to.with_suffix(".safetensors")), to, Given(tokenizer=base), lambda *_: None
        ).files
    shutil.copytree(base, to)
    if form == forms.SHARDS:
        shard(to)
    elif form == forms.NO_T5:
        without_t5(to)
    elif form != forms.FOLDER:
        halve(to, named=form == forms.HALF)
    return inspect(name, to)


@cache
def engine_of(name: str, form: str) -> tuple[DiffusersEngine, CheckpointRef]:
    """An engine that has the weights in that form, and the usual tiny checkpoints."""
    files = checkpoint(name, form)
    own = TinyCheckpoints(tiny_checkpoints().directory(name).parent)
    return new_engine(own), own.add(files)


def painted(name: str, task: Task, form: str, *, controlnets: int = 0) -> Pixels:
    on, ref = engine_of(name, form)
    given = asked(name, task, controlnets)
    request = replace(given.request, checkpoint=ref, num_inference_steps=2)
    return image_of(results(replace(given, request=request), on=on)[0]).pixels


@pytest.mark.parametrize(("name", "task", "form"), CHECKPOINTS)
def test_a_checkpoint_in_every_form_paints_what_its_folder_paints(name: str, task: Task, form: str) -> None:
    same_as = "rounded" if form == forms.HALF else forms.FOLDER
    equal = (painted(name, task, form) == painted(name, task, same_as)).all()
    assert equal != (form in OTHER_PICTURE)


@cache
def controlnet_in_one_file(used: str) -> tuple[DiffusersEngine, CheckpointRef]:
    base = tiny_checkpoints().directory(used)
    to = base.parent / f"forms-{used}" / "one-file"
    files = import_file(used, pack(base, to.with_suffix(".safetensors")), to, Given(parts=base), lambda *_: None).files
    own = TinyCheckpoints(base.parent)
    return new_engine(own), own.add(files)


def controlled(name: str, task: Task, form: str) -> Pixels:
    given = asked(name, task, 1)
    use, on = given.request.controlnets[0], engine_of(name, forms.FOLDER)[0]
    if form == forms.ONE_FILE:
        on, ref = controlnet_in_one_file(CONTROLNETS[name])
        use = replace(use, checkpoint=ref)
    elif form == forms.UNION:
        use = ControlNetInput(checkpoint=tiny_checkpoints().ref(UNIONS[name]), image=use.image, control_mode=0)
    request = replace(given.request, controlnets=(use,), num_inference_steps=2)
    return image_of(results(replace(given, request=request), on=on)[0]).pixels


@pytest.mark.parametrize(("name", "task", "form"), CONTROLLED)
def test_a_controlnet_in_every_form_steers_every_cell(name: str, task: Task, form: str) -> None:
    made: dict[str, Any] = {each: controlled(name, task, each) for each in (forms.FOLDER, form)}
    assert (made[form] == made[forms.FOLDER]).all() == (form == forms.ONE_FILE)
    assert (made[form] != painted(name, task, forms.FOLDER)).any()


def test_a_gan_upscaler_is_registered_from_its_file() -> None:
    assert forms.CHECKPOINTS["gan-upscale"] == (forms.ONE_FILE,)
