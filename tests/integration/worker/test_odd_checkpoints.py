"""A checkpoint that no library can load fails its own jobs with the reason; the worker goes on with all others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.domain import digest
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect
from tests.integration.public_layouts import INDEX, UNET, edit_json, laid_out
from tests.integration.tiny_checkpoints import tiny_checkpoints
from tests.integration.worker_campaigns import PICTURE, Workplace, campaign, workplace

TEXT = {"id": "draft", "task": "text-to-image", "prompt": "a cat"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("odd")) as found:
        found.approve("sd1")
        yield found


def keys(name: str, folder: Path, **changes: Any) -> None:
    edit_json(folder / name, **changes)


def written(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)


def parts_removed(folder: Path, *parts: str) -> None:
    nothing: dict[str, Any] = {part: [None, None] for part in parts}
    edit_json(folder / INDEX, **nothing)


def approved_earlier(alias: str, folder: Path) -> CheckpointFiles:
    """The folder as an earlier release approved it, which looked into no file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    manifest = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}
    base = tiny_checkpoints().files("sd1")
    return replace(base, alias=alias, directory=folder, manifest=manifest, digest=digest(manifest))


def _truncated(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-900])


ODD: dict[str, Callable[[Path], None]] = {
    "no-vae": lambda folder: parts_removed(folder, "vae"),
    "no-tokenizer": lambda folder: parts_removed(folder, "tokenizer"),
    "no-encoder": lambda folder: parts_removed(folder, "text_encoder"),
    "no-scheduler": lambda folder: parts_removed(folder, "scheduler"),
    "bad-tokenizer": partial(written, "tokenizer/tokenizer.json", "[1]"),
    "truncated": _truncated,
    "vae-blocks": partial(keys, "vae/config.json", block_out_channels=[]),
    "unet-blocks": partial(keys, "unet/config.json", down_block_types=["NoSuchBlock"] * 2),
    "unet-groups": partial(keys, "unet/config.json", norm_num_groups=0),
    "no-heads": partial(keys, "text_encoder/config.json", num_attention_heads=0),
    "activation": partial(keys, "text_encoder/config.json", hidden_act="no-such"),
}
"""Changes of a checkpoint that make diffusers or transformers raise anything from KeyError to ZeroDivisionError."""


def test_odd_checkpoints_fail_their_jobs_with_the_reason_and_the_worker_goes_on(
    place: Workplace, tmp_path: Path
) -> None:
    for alias, change in ODD.items():
        place.add(approved_earlier(alias, laid_out("sd1", change, tmp_path / alias)))
        place.submit(campaign(f"c-{alias}", alias, TEXT))
    place.submit(campaign("good", "sd1", TEXT))
    place.worker.run(campaign=None)
    outcomes = {alias: place.jobs(f"c-{alias}")[0] for alias in ODD}
    assert {alias: job["status"] for alias, job in outcomes.items()} == dict.fromkeys(ODD, "failed")
    assert [alias for alias, job in outcomes.items() if f"'{alias}'" not in job["error"]] == []
    assert place.jobs("good")[0]["status"] == "succeeded"


def _short_vocabulary(folder: Path) -> None:
    """A tokenizer with ids beyond the encoder's embedding."""
    path = folder / "tokenizer" / "tokenizer.json"
    document = json.loads(path.read_text())
    for token in document["added_tokens"]:
        token["id"] += 100_000
    document["model"]["vocab"] |= {each["content"]: each["id"] for each in document["added_tokens"]}
    path.write_text(json.dumps(document))


def test_parts_that_do_not_fit_each_other_fail_their_jobs_alone(place: Workplace, tmp_path: Path) -> None:
    place.add(approved_earlier("misfit", laid_out("sd1", _short_vocabulary, tmp_path / "misfit")))
    place.submit(campaign("c-misfit", "misfit", TEXT))
    (job,) = place.work("c-misfit")
    assert (job["status"], "'misfit' does not encode the prompt" in job["error"]) == ("failed", True)
    place.made(campaign("after-misfit", "sd1", TEXT, seeds=[6]))


def _odd_adapter(place: Workplace, kind: str, tmp_path: Path) -> dict[str, Any]:
    """A stage with an adapter that loads nowhere."""
    folder = tmp_path / kind
    if kind == "vae":
        files = inspect("odd-vae", laid_out("vae", partial(keys, "config.json", up_block_types=["Nope"] * 2), folder))
        place.add(files)
        return {"vae": "odd-vae"}
    if kind == "controlnet":
        change = partial(keys, "config.json", conditioning_embedding_out_channels=[])
        place.add(inspect("odd-controlnet", laid_out("controlnet-sd1", change, folder)))
        control = {"checkpoint": "odd-controlnet", "image": {"file": PICTURE}, "annotator": "none"}
        return {"controlnets": [control]}
    folder.mkdir()
    tensors = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(2, 7)}
    tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight"] = torch.zeros(5, 2)
    save_file(tensors, folder / "odd.safetensors")
    place.add(replace(inspect("odd-lora", folder), family="sd1"))
    return {"loras": [{"checkpoint": "odd-lora"}]}


@pytest.mark.parametrize("kind", ["vae", "controlnet", "lora"])
def test_an_odd_adapter_fails_the_jobs_that_name_it(kind: str, place: Workplace, tmp_path: Path) -> None:
    stage = TEXT | _odd_adapter(place, kind, tmp_path)
    place.submit(campaign(f"adapter-{kind}", "sd1", stage))
    (job,) = place.work(f"adapter-{kind}")
    assert (job["status"], f"odd-{kind}" in job["error"]) == ("failed", True), job["error"]
    place.made(campaign(f"after-{kind}", "sd1", TEXT, seeds=[len(kind)]))
