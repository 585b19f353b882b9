"""Offloading of text encoders when prompts are cached. The device is a CPU here, and encoders are offloaded to torch's
meta device, which loses the weights, so that a later use without reloading is detected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdpipeline.app.factories import build_engine
from sdpipeline.engine import GeneratedImage
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.diffusers.loading import Loaded
from sdpipeline.engine.diffusers.model_cache import TextEncoders
from sdpipeline.errors import CheckpointError
from sdpipeline.settings import EngineSettings, Settings
from tests.integration.engine_requests import (
    adapter,
    distance,
    engine,
    equal,
    failure_of,
    images,
    new_engine,
    prepared,
    ref,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

CPU, NOWHERE = torch.device("cpu"), torch.device("meta")


def leaving(when: Any, **options: Any) -> DiffusersEngine:
    return new_engine(text_encoders=TextEncoders(offload=when, host=NOWHERE), **options)


def one(on: DiffusersEngine | None = None, checkpoint: str = "sd1", **changes: Any) -> GeneratedImage:
    return images(prepared(request(checkpoint, **changes)), on=on)[0]


def resident(on: DiffusersEngine, checkpoint: str = "sd1", *, exact: bool = False) -> Loaded:
    return on.residency.get(ref(checkpoint), exact=exact)


def lie_on(networks: list[torch.nn.Module]) -> set[str]:
    return {parameter.device.type for network in networks for parameter in network.parameters()}


def run_out_once(on: DiffusersEngine, *, exact: bool = False) -> list[int]:
    """Let the next batch run out of memory; return the batch sizes of the calls from then on."""
    sizes: list[int] = []

    def refuse(_module: Any, inputs: Any) -> None:
        sizes.append(inputs[0].shape[0])
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("injected")

    resident(on, exact=exact).parts["unet"].register_forward_pre_hook(refuse)
    return sizes


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_prompts_that_are_kept_make_the_same_pictures_without_text_encoders(family: str) -> None:
    on = leaving("always")
    assert equal(one(on, family), one(None, family))
    loaded = resident(on, family)
    assert lie_on(loaded.text_encoders()) == {"meta"}
    assert lie_on([network for network in loaded.networks() if network not in loaded.text_encoders()]) == {"cpu"}
    assert equal(one(on, family, seed=1), one(None, family, seed=1))


def test_a_prompt_that_is_not_kept_asks_for_them_back() -> None:
    on = leaving("always")
    one(on)
    with pytest.raises(CheckpointError, match="Cannot copy out of meta tensor"):
        one(on, prompt="a dog")


def test_strict_pictures_are_the_same_without_them() -> None:
    on = leaving("always")
    for seed in (0, 1):
        asked = prepared(request(seed=seed, reproducibility="strict"))
        assert equal(images(asked, on=on)[0], images(asked)[0])
    assert lie_on(resident(on, exact=True).text_encoders()) == {"meta"}


def test_adapters_are_taken_off_and_put_on_while_text_encoders_are_away() -> None:
    on, worn = leaving("always"), {"loras": (adapter("lora-sd1"),)}
    inverted: dict[str, Any] = {"prompt": "a <toy>", "textual_inversions": (adapter("toy"),)}
    together = images(*[prepared(request(**changes)) for changes in ({}, inverted, worn)], on=on, bucket=1)
    assert lie_on(resident(on).text_encoders()) == {"meta"}
    assert distance(together[0], together[2]) > 2
    for changes in ({}, worn, inverted):
        assert equal(one(on, **changes), one(None, **changes))


def test_they_stay_while_memory_is_not_short() -> None:
    on = leaving("auto")
    one(on)
    assert lie_on(resident(on).text_encoders()) == {"cpu"}


@pytest.mark.parametrize("strict", [False, True])
def test_out_of_memory_is_met_by_their_leaving_before_any_fallback(*, strict: bool) -> None:
    on, kind = leaving("auto"), "strict" if strict else "tolerant"
    asked = [prepared(request(seed=seed, reproducibility=kind)) for seed in (0, 1)]
    images(*asked, on=on)
    sizes = run_out_once(on, exact=strict)
    made = images(*asked, on=on)
    assert [image.ran["fallbacks"] for image in made] == [[], []]
    assert sizes[0] == sizes[1]
    assert all(equal(image, other) for image, other in zip(made, images(*asked), strict=True))
    assert lie_on(resident(on, exact=strict).text_encoders()) == {"meta"}


def test_once_memory_was_short_they_leave_after_every_batch() -> None:
    on = leaving("auto")
    one(on)
    run_out_once(on)
    one(on)
    one(on, "sdxl")
    assert lie_on(resident(on, "sdxl").text_encoders()) == {"meta"}


def test_told_never_they_stay_and_the_picture_falls_back() -> None:
    on = leaving("never")
    one(on)
    run_out_once(on)
    assert one(on).ran["fallbacks"] == ["VAE tiling"]
    assert lie_on(resident(on).text_encoders()) == {"cpu"}


def test_the_last_fallback_takes_them_off_whatever_was_told() -> None:
    on = leaving("never")
    one(on)
    refusals = iter([True, True])

    def refuse(*_: Any) -> None:
        if next(refusals, False):
            raise torch.OutOfMemoryError("injected")

    resident(on).parts["unet"].register_forward_pre_hook(refuse)
    assert one(on).ran["fallbacks"] == ["VAE tiling", "offload"]
    assert lie_on(resident(on).text_encoders()) == {"meta"}


def with_room(when: str, *, lacking_bytes: int) -> tuple[DiffusersEngine, Loaded, int]:
    """An engine that holds sd1 and lacks ``lacking_bytes`` to hold sdxl too, the loaded sd1, and its bytes on the
    device."""
    sd1_bytes = resident(engine()).size_bytes(CPU)
    room = sd1_bytes + tiny_checkpoints().files("sdxl").size_bytes - lacking_bytes
    on = leaving(when, resident_bytes=room)
    return on, resident(on), sd1_bytes


def test_memory_that_suffices_without_text_encoders_holds_both_checkpoints() -> None:
    on, sd1, whole_bytes = with_room("auto", lacking_bytes=1000)
    resident(on, "sdxl")
    assert on.resident() == {ref("sd1").digest, ref("sdxl").digest}
    assert lie_on(sd1.text_encoders()) == {"meta"}
    assert sd1.size_bytes(CPU) == whole_bytes - sd1.size_bytes(NOWHERE)
    assert sd1.size_bytes(NOWHERE) > 1000


@pytest.mark.parametrize(("when", "lacking_bytes"), [("never", 1000), ("auto", 300_000)])
def test_a_checkpoint_goes_where_text_encoders_may_not_or_would_not_suffice(when: str, lacking_bytes: int) -> None:
    on, sd1, _ = with_room(when, lacking_bytes=lacking_bytes)
    resident(on, "sdxl")
    assert on.resident() == {ref("sdxl").digest}
    assert lie_on(sd1.text_encoders()) == {"cpu"}


def test_where_they_do_not_fit_back_the_request_fails_alone_and_says_so() -> None:
    on = new_engine()
    one(on)

    def refuse(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    (encoder,) = resident(on).text_encoders()
    encoder.to(NOWHERE)
    encoder._apply = refuse  # type: ignore[method-assign]
    assert failure_of(results(prepared(request(prompt="a dog")), on=on)[0]) == (
        "DeviceExhaustedError: out of memory while the text encoders of checkpoint 'sd1' were loaded back"
    )
    assert equal(one(on), one())


def test_the_settings_reach_the_engine(tmp_path: Path) -> None:
    given = EngineSettings(offload_text_encoders="never")
    on = build_engine(Settings(home=tmp_path, engine=given), "cpu", None)
    assert on.describe()["text_encoders"] == {"offload": "never"}


def test_on_a_cpu_there_is_nowhere_to_go() -> None:
    on = new_engine(text_encoders=TextEncoders(offload="always"))
    one(on)
    assert not on.residency.free_encoders()
    assert equal(one(on, prompt="a dog"), one(prompt="a dog"))
