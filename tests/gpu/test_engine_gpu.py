"""The engine on a CUDA device: half precision, real memory limits, and determinism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.domain import Task
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.diffusers.engine import DiffusersEngine
from sdpipeline.engine.diffusers.model_cache import TextEncoders
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.stepwise import Speedups, Stepwise
from sdpipeline.engine.stepwise.quantization import FP8_CAPABILITY
from tests.integration.engine.test_families import CELLS
from tests.integration.engine.test_families import asked as asked_for
from tests.integration.engine_requests import (
    SOURCE,
    adapter,
    controlnet,
    distance,
    equal,
    images,
    new_engine,
    noise,
    prepared,
    ref,
    request,
)
from tests.integration.tiny_checkpoints import TinyCheckpoints, tiny_checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the installed libraries may differ from the pinned releases
]


@pytest.fixture(scope="module")
def on() -> DiffusersEngine:
    return new_engine(device="cuda")


def mixed(family: str, n: int, **changes: Any) -> Any:
    return prepared(request(family, prompt=f"a cat {n}", seed=n, guidance_scale=2.0 + n, **changes))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_the_same_bucket_gives_the_same_bits_whoever_the_neighbours_are(on: DiffusersEngine, family: str) -> None:
    together = images(*[mixed(family, n) for n in range(8)], bucket=8, on=on)
    others = images(*[mixed(family, n) for n in (5, 2, 7)], bucket=8, on=on)
    assert all(equal(together[n], other) for n, other in zip((5, 2, 7), others, strict=True))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_half_precision_stays_near_float32_on_the_cpu(on: DiffusersEngine, family: str) -> None:
    made = images(mixed(family, 1), on=on)[0]
    assert made.ran["dtype"] == ("bfloat16" if family == "flux" else "float16")
    assert made.ran["device"] == "cuda"
    assert distance(made, images(mixed(family, 1))[0]) < 64


def test_float32_on_the_device_equals_the_cpu_within_a_few_grey_levels() -> None:
    made = images(mixed("sd1", 3), on=new_engine(device="cuda", dtype="float32"))[0]
    assert distance(made, images(mixed("sd1", 3))[0]) <= 8


def test_controlnet_and_adapters_run_in_half_precision(on: DiffusersEngine) -> None:
    worn: dict[str, Any] = {
        "controlnets": (controlnet("controlnet-sd1", annotator="canny"),),
        "loras": (adapter("lora-sd1"),),
        "ip_adapters": (adapter("ip-adapter-sd1"),),
    }
    asked = prepared(request(**worn), controlnets_0=noise(1), ip_adapters_0=noise(2))
    assert distance(images(asked, on=on)[0], images(prepared(request()), on=on)[0]) > 2


def test_offload_gives_the_same_picture_and_puts_everything_back(on: DiffusersEngine) -> None:
    asked = prepared(request("sdxl", seed=5))
    plain = images(asked, on=on)[0]
    unet = on.residency.get(asked.request.checkpoint).parts["unet"]
    refusals = iter([True, True])

    def refuse(*_: Any) -> None:
        if next(refusals, False):
            raise torch.OutOfMemoryError("injected")

    handle = unet.register_forward_pre_hook(refuse)
    made = images(asked, on=on)[0]
    handle.remove()
    assert made.ran["fallbacks"] == ["VAE tiling", "offload"]
    assert distance(made, plain) <= 2
    assert next(unet.parameters()).device.type == "cuda"


@pytest.fixture
def little_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 0.25 * 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_real_exhaustion_makes_smaller_buckets_and_no_failure(little_memory: None) -> None:
    large: dict[str, Any] = {"width": 1024, "height": 1024, "num_inference_steps": 1}
    asked = [prepared(request(seed=n, **large)) for n in range(8)]
    made = images(*asked, on=new_engine(device="cuda"))
    assert made[0].ran["bucket"] < 8
    assert made[0].ran["fallbacks"][0].endswith("instead of 8: out of memory")


def test_fifty_switches_leave_the_devices_memory_as_it_was(on: DiffusersEngine) -> None:
    worn = [request(loras=(adapter(name),), num_inference_steps=1) for name in ("lora-sd1", "lora-sd1-other")]
    for asked in (*worn, *worn):
        images(prepared(asked), on=on)
    before = torch.cuda.memory_allocated()
    for n in range(50):
        images(prepared(worn[n % 2]), on=on)
    assert torch.cuda.memory_allocated() <= before * 1.05


def test_a_gan_upscaler_enlarges(tmp_path: Path) -> None:
    esrgan = pytest.importorskip("spandrel.architectures.ESRGAN", reason="needs sdpipeline[upscalers]")
    network = esrgan.ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4)
    save_file(network.state_dict(), tmp_path / "4x-tiny.safetensors")
    own = TinyCheckpoints(tmp_path)
    upscaler = own.add(inspect("tiny", tmp_path))
    asked = replace(request(task=Task.SUPER_RESOLUTION, width=600, height=40), checkpoint=upscaler)
    made = images(prepared(asked, image=noise(size=600)[:40]), on=new_engine(own, device="cuda"))[0]
    assert made.pixels.shape == (160, 2400, 3)
    assert (made.ran["pipeline"], made.ran["scheduler"]) == ("spandrel", {"name": "none"})


def test_checkpoints_are_dropped_from_the_device() -> None:
    own = new_engine(device="cuda", resident_bytes=tiny_checkpoints().files("sdxl").size_bytes)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for family in ("sd1", "sdxl"):
            images(prepared(request(family, num_inference_steps=1)), on=own)
    assert torch.cuda.memory_allocated() - before < 3 * tiny_checkpoints().files("sdxl").size_bytes


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_text_encoders_leave_the_devices_memory_and_come_back_for_a_new_prompt(family: str) -> None:
    rules = (TextEncoders(offload="always"), TextEncoders(offload="never"))
    always, never = (new_engine(device="cuda", text_encoders=each) for each in rules)
    images(prepared(request(family)), on=always)
    loaded = always.residency.get(ref(family))
    left, left_bytes = torch.cuda.memory_allocated(), loaded.size_bytes(torch.device("cuda"))
    always.residency.reload_encoders(loaded)
    back_bytes = loaded.size_bytes(torch.device("cuda")) - left_bytes
    assert torch.cuda.memory_allocated() - left >= back_bytes > 0
    always.residency.offload_encoders()
    assert torch.cuda.memory_allocated() == left
    for prompt in ("a cat", "a dog", "a cat"):
        asked = prepared(request(family, prompt=prompt, seed=2, reproducibility="strict"))
        assert equal(images(asked, on=always)[0], images(asked, on=never)[0])


def test_a_lora_is_put_on_text_encoders_that_wait_in_host_memory() -> None:
    own = new_engine(device="cuda", text_encoders=TextEncoders(offload="always"))
    dressed = [request(loras=(adapter(name),), reproducibility="strict") for name in ("lora-sd1", "lora-sd1-other")]
    for asked in (*dressed, *dressed):
        assert equal(*(images(prepared(asked), on=each)[0] for each in (own, new_engine(device="cuda"))))


@pytest.mark.parametrize(("name", "task", "controlnets"), CELLS)
def test_every_cell_can_be_made_exactly(name: str, task: Task, controlnets: int, on: DiffusersEngine) -> None:
    given = asked_for(name, task, controlnets)
    exact = replace(given, request=replace(given.request, reproducibility="strict"))
    first, second = (images(exact, bucket=bucket, on=on)[0] for bucket in (1, 8))
    assert equal(first, second)
    assert [first.ran[key] for key in ("reproducibility", "dtype", "bucket", "fallbacks")] == [
        "strict",
        "float32",
        1,
        [],
    ]


@pytest.mark.parametrize("annotator", ["depth", "segmentation", "pose"])
def test_learned_annotators_and_adapters_can_run_exactly(annotator: str, on: DiffusersEngine) -> None:
    use = controlnet("controlnet-sd1", annotator=f"{annotator}-learned", annotator_checkpoint=ref(annotator))
    worn: dict[str, Any] = {
        "controlnets": (use,),
        "loras": (adapter("lora-sd1"),),
        "ip_adapters": (adapter("ip-adapter-sd1", image=SOURCE),),
        "textual_inversions": (adapter("toy"),),
        "vae": ref("vae"),
    }
    exact = prepared(
        request(prompt="a <toy>", reproducibility="strict", **worn), controlnets_0=noise(1), ip_adapters_0=noise(2)
    )
    assert equal(*(images(exact, on=on)[0] for _ in range(2)))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("profile", ["fast", "turbo"])
def test_a_picture_that_shared_calls_is_made_again_bit_by_bit(on: DiffusersEngine, family: str, profile: str) -> None:
    if profile not in FAMILIES[family].profiles:
        profile = "fast"
    asked = [mixed(family, n, num_inference_steps=2 + 2 * n, profile=profile) for n in range(3)]
    for given, made in zip(asked, images(*asked, on=on), strict=True):
        again = images(replace(given, calls=made.ran["calls"]), bucket=made.ran["bucket"], on=on)[0]
        assert equal(again, made)


@pytest.mark.parametrize(
    "speedups",
    [
        Speedups(compile=True),
        Speedups(channels_last=True),
        Speedups(attention="flash"),
        Speedups(attention="efficient"),
        Speedups(compile=True, channels_last=True, decode_batch=2),
        Speedups(quantize="int8"),
        Speedups(compile=True, quantize="int8"),
    ],
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_the_deployment_allows_keeps_quick_pictures_near_and_exact_ones_the_same(
    on: DiffusersEngine, family: str, speedups: Speedups
) -> None:
    own = new_engine(device="cuda", shortcuts=Stepwise(speedups))
    quick = mixed(family, 1, profile="fast")
    assert distance(images(quick, on=own)[0], images(quick, on=on)[0]) < 24
    strict = mixed(family, 1, reproducibility="strict")
    assert equal(images(strict, on=own)[0], images(strict, on=on)[0])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_fp8_keeps_quick_pictures_near_and_exact_ones_the_same(family: str, compiled: bool) -> None:
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("needs a GPU that multiplies in fp8")
    plain = new_engine(device="cuda", dtype="bfloat16")
    own = new_engine(device="cuda", dtype="bfloat16", shortcuts=Stepwise(Speedups(compile=compiled, quantize="fp8")))
    quick = mixed(family, 1, profile="fast")
    made = images(quick, on=own)[0]
    assert 0 < distance(made, images(quick, on=plain)[0]) < 64
    again = images(replace(quick, calls=made.ran["calls"]), bucket=made.ran["bucket"], on=own)[0]
    assert compiled or equal(again, made)
    exact = mixed(family, 1)
    assert equal(images(exact, on=own)[0], images(exact, on=plain)[0])
