"""Quantized denoisers (int8): close to the exact picture, reproducible from the record, and never used for exact
pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from torch._inductor import config as inductor

from sdpipeline import cli, provenance
from sdpipeline.domain import Json, Profile, Reproducibility
from sdpipeline.engine import Engine
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.diffusers.loading import size_bytes
from sdpipeline.engine.stepwise import Speedups, Stepwise
from sdpipeline.errors import InputImageError
from sdpipeline.reporting import reproduce
from tests.integration.engine.test_profiles import apart, shapes, under
from tests.integration.engine_requests import (
    SOURCE,
    adapter,
    equal,
    images,
    new_engine,
    noise,
    prepared,
    ref,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints
from tests.integration.worker_campaigns import campaign, picture_file, workplace

PROFILES = ("exact", "fast")
INT8 = Stepwise(Speedups(quantize="int8")).variant


@cache
def quantizing() -> DiffusersEngine:
    """A shared int8 engine for all tests that do not change it."""
    return new_engine(shortcuts=Stepwise(Speedups(quantize="int8")))


@pytest.mark.parametrize(("checkpoint", "reproducibility"), [("sd1", "strict"), ("sd3", "tolerant")])
def test_exact_pictures_are_the_same_before_and_after_quantized_ones(
    checkpoint: str, reproducibility: Reproducibility
) -> None:
    on = new_engine(shortcuts=Stepwise(Speedups(quantize="int8")))
    exact = under("exact", checkpoint=checkpoint, steps=2)
    exact = replace(exact, request=replace(exact.request, reproducibility=reproducibility))
    expected = images(exact)[0]
    for wanted in (exact, under("fast", checkpoint=checkpoint, steps=2), exact):
        made = images(wanted, on=on)[0]
        assert equal(made, expected) is (wanted is exact)
        assert (made.ran == expected.ran) is (wanted is exact)
    assert inductor.coordinate_descent_tuning is False  # torchao would configure the compiler for the whole process


def test_a_quantized_picture_is_near_the_exact_one_and_its_record_names_what_quantized() -> None:
    plain, quantized = images(*shapes("fast")), images(*shapes("fast"), on=quantizing())
    assert 0 < apart(quantized, plain) < 0.5
    ran = quantized[0].ran
    assert ran["profile"] == plain[0].ran["profile"] | {"quantize": "int8"}
    assert ran["libraries"] == plain[0].ran["libraries"] | {"torchao": version("torchao")}


@pytest.mark.long
@pytest.mark.parametrize(("profile", "checkpoint"), [("turbo", "sd1"), ("fast", "sd3"), ("fast", "flux")])
def test_neighbours_change_nothing_that_the_record_does_not_hold(profile: Profile, checkpoint: str) -> None:
    asked = [under(profile, n, checkpoint=checkpoint, steps=2 + n, guidance=3.0 - n) for n in range(3)]
    for given, made in zip(asked, images(*asked, on=quantizing()), strict=True):
        again = images(replace(given, calls=made.ran["calls"]), bucket=made.ran["bucket"], on=quantizing())[0]
        assert equal(again, made)
        assert again.ran == made.ran | {"slot": 0}


def test_a_row_is_multiplied_the_same_whatever_stands_beside_it() -> None:
    """If activations were scaled over the whole batch, each picture would depend on the others."""
    (layer,) = [
        module
        for name, module in _denoiser(quantizing()).named_modules()
        if name.endswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    ]
    rows = torch.randn(32, layer.in_features, generator=torch.Generator().manual_seed(0))
    louder = torch.cat([rows[:16], rows[16:] * 1000])
    assert torch.equal(layer(rows)[:16], layer(louder)[:16])


def test_only_large_layers_are_quantized_and_only_the_denoisers() -> None:
    loaded = quantizing().residency.get(ref("sd1"), variant=INT8)
    quantized = {name for name, tensor in loaded.denoiser.named_parameters() if _is_quantized(tensor)}
    assert "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight" in quantized
    assert [name for name in quantized if "emb" in name or "norm" in name] == []
    others = [network for network in loaded.networks() if network is not loaded.denoiser]
    assert not any(_is_quantized(tensor) for network in others for tensor in network.parameters())


def test_the_two_forms_of_a_checkpoint_share_no_memory_and_are_counted_and_dropped_apart() -> None:
    files = tiny_checkpoints().files("sd1")
    on = new_engine(shortcuts=Stepwise(Speedups(quantize="int8")), resident_bytes=int(files.size_bytes * 1.5))
    images(under("fast", steps=1), on=on)
    images(under("exact", steps=1), on=on)
    assert on.residency.drop(keep=()) == [(files.digest, None)]  # memory does not suffice for both
    roomy = new_engine(shortcuts=Stepwise(Speedups(quantize="int8")))
    plain, quantized = roomy.residency.get(ref("sd1")), roomy.residency.get(ref("sd1"), variant=INT8)
    cpu = torch.device("cpu")
    assert quantized.size_bytes(cpu) < plain.size_bytes(cpu)
    weight = quantized.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert weight.numel() < size_bytes(weight) < weight.numel() * 2  # one byte per weight, and a scale per row
    assert roomy.resident() == {files.digest}
    assert {id(part) for part in plain.networks()}.isdisjoint(map(id, quantized.networks()))


@pytest.mark.long
def test_adapters_go_on_a_quantized_denoiser_and_leave_neither_form_changed() -> None:
    exact, fast = under("exact", steps=2), under("fast", steps=2)
    before = [images(given, on=quantizing())[0] for given in (exact, fast)]
    likeness = (adapter("ip-adapter-sd1", image=SOURCE),)
    worn = prepared(replace(fast.request, loras=(adapter("lora-sd1"),), ip_adapters=likeness), ip_adapters_0=noise(1))
    dressed = images(worn, on=quantizing())[0]
    assert apart([dressed], [before[1]]) > 1
    assert apart([dressed], images(worn)) < apart([dressed], [before[1]])
    for given, made in zip((exact, fast), before, strict=True):
        assert equal(images(given, on=quantizing())[0], made)


@pytest.mark.parametrize("missing", [False, True])
def test_what_cannot_be_quantized_here_is_one_clear_error_before_any_work(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDP_ENGINE__QUANTIZE", "int8" if missing else "fp8")
    if missing:
        monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    file = tmp_path / "cats.yaml"
    file.write_text(yaml.safe_dump(campaign("cats", "shapes", {"id": "cat", "task": "text-to-image", "prompt": "cat"})))
    home = ("--home", str(tmp_path / "home"))
    for command in (["run", str(file)], ["bench", "engine", "--device", "cpu"]):
        assert cli.run([*command, *home]) == 2
    assert not (tmp_path / "home").exists()
    told = capsys.readouterr()
    reason = (
        "int8 needs torchao, which is not installed (pip install 'sdpipeline[quantize]')"
        if missing
        else "fp8 needs a GPU of compute capability 8.9 or more, and this worker's device is cpu "
        "(set it to int8, or leave it out)"
    )
    assert (told.out, told.err) == ("", 2 * f"SDP_ENGINE__QUANTIZE: {reason}\n")


def test_a_quantized_job_is_made_again_where_the_setting_holds_and_elsewhere_the_setting_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDP_ENGINE__QUANTIZE", "int8")
    stages = [{"id": profile, "task": "text-to-image", "prompt": "a cat", "profile": profile} for profile in PROFILES]
    with workplace(tmp_path) as place:
        place.approve("sd1")
        exact, fast = sorted(place.made(campaign("both", "sd1", *stages)), key=lambda job: job["stage"])
        assert _again(exact, place.engine) == (True, [])
        assert _again(fast, place.engine) == (True, [])
    assert _again(exact, new_engine()) == (True, [])
    equal_pixels, differences = _again(fast, new_engine())
    assert not equal_pixels
    assert differences == [
        {"what": "libraries.torchao", "then": differences[0]["then"], "now": None},
        {"what": "profile.quantize", "then": "int8", "now": None, "setting": "SDP_ENGINE__QUANTIZE=int8"},
    ]


def _again(job: Json, on: Engine) -> tuple[bool, list[Json]]:
    data = picture_file(job).read_bytes()
    record = reproduce.checked_record(provenance.read_record(data), "a picture")
    pixels = provenance.decode(data, max_pixels=2**20)
    made = reproduce.reproduce(record, on, _no_input, original=pixels, pixels_sha256=None)
    return made.bit_equal, made.differences


def _no_input(about: Json) -> bytes:
    raise InputImageError(f"no input {about}")


def _denoiser(on: DiffusersEngine) -> torch.nn.Module:
    network: torch.nn.Module = on.residency.get(ref("sd1"), variant=INT8).denoiser
    return network


def _is_quantized(tensor: torch.Tensor) -> bool:
    return type(tensor) is not torch.nn.Parameter
