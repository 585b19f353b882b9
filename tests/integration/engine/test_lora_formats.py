"""LoRAs as trainers write them: each equals the sum of its matrices, alone and in a batch with others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.domain import AdapterInput, CheckpointRef, digest, hashed
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect
from sdpipeline.engine.pixels import to_pixels
from sdpipeline.errors import CheckpointError
from tests.integration.engine_requests import (
    distance,
    equal,
    failure_of,
    images,
    prepared,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

Tensors = dict[str, torch.Tensor]
Deltas = dict[tuple[str, str], torch.Tensor]
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
KOHYA_XL = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PEFT_FLUX = {"transformer": "transformer."}
SGM = {"down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_attentions_0": "middle_block_1"}
"""Names of the publisher's code for blocks of the tiny SDXL, which has one layer per block."""


@cache
def stock(base: str) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory(base))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers(base: str, parts: Mapping[str, str], wanted: str) -> Iterator[tuple[str, str, Any]]:
    """The layers whose names match, with their part of the pipeline."""
    for part in parts:
        for name, module in getattr(stock(base), part).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and re.search(wanted, name):
                yield part, name, module


def matrices(module: Any, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two matrices of a layer and their product."""
    if isinstance(module, torch.nn.Linear):
        down = torch.randn(rank, module.in_features, generator=generator) * 0.2
        up = torch.randn(module.out_features, rank, generator=generator) * 0.2
        return down, up, up @ down
    down = torch.randn(rank, module.in_channels, *module.kernel_size, generator=generator) * 0.2
    up = torch.randn(module.out_channels, rank, 1, 1, generator=generator) * 0.2
    return down, up, torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


def kohya(
    base: str, parts: Mapping[str, str], wanted: str, *, mixed: bool = False, rename: Mapping[str, str] | None = None
) -> tuple[Tensors, Deltas]:
    """A LoRA as sd-scripts writes it, with scalar alphas; ``mixed`` has other ranks and alphas for each layer."""
    tensors: Tensors = {}
    deltas: Deltas = {}
    generator = torch.Generator().manual_seed(5)
    for n, (part, name, module) in enumerate(layers(base, parts, wanted)):
        rank, alpha = (2 + n % 3, 1.0 + n % 4) if mixed else (4, 1.0)
        down, up, product = matrices(module, rank, generator)
        path = f"text_model.{name}" if part.startswith("text") and not name.startswith("text_model.") else name
        key = path.replace(".", "_")
        for ours, theirs in (rename or {}).items():
            key = key.replace(ours, theirs)
        key = parts[part] + key
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        deltas[part, name] = product * alpha / rank
    return tensors, deltas


def peft(base: str, parts: Mapping[str, str], wanted: str, *, alpha: float | None = None) -> tuple[Tensors, Deltas]:
    """A LoRA as peft writes it, without alphas or with one for each layer."""
    tensors: Tensors = {}
    deltas: Deltas = {}
    generator = torch.Generator().manual_seed(6)
    for n, (part, name, module) in enumerate(layers(base, parts, wanted)):
        down, up, product = matrices(module, 2 + n % 2, generator)
        key = parts[part] + name
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha + n)
        deltas[part, name] = product * ((alpha + n) / (2 + n % 2) if alpha is not None else 1.0)
    return tensors, deltas


def flux_kohya() -> tuple[Tensors, Deltas]:
    """A LoRA of a double block with a fused projection of queries, keys and values, as sd-scripts writes it."""
    tensors: Tensors = {}
    deltas: Deltas = {}
    generator = torch.Generator().manual_seed(7)
    block = "transformer_blocks.0."
    fused = {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn_proj": ["attn.to_out.0"],
        "img_mlp_0": ["ff.net.0.proj"],
        "txt_mod_lin": ["norm1_context.linear"],
    }
    transformer = stock("flux").transformer
    for name, targets in fused.items():
        modules = [transformer.get_submodule(block + target) for target in targets]
        down = torch.randn(4, modules[0].in_features, generator=generator) * 0.2
        up = torch.randn(sum(module.out_features for module in modules), 4, generator=generator) * 0.2
        key = f"lora_unet_double_blocks_0_{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        products = torch.split(up @ down * 0.5, [module.out_features for module in modules])
        deltas |= {("transformer", block + target): product for target, product in zip(targets, products, strict=True)}
    return tensors, deltas


BLOCKS = r"transformer_blocks\.\d+\.(?:attn\.to_|ff\.net|proj_out|proj_mlp|norm1?\.linear)"


def flux_xlabs() -> tuple[Tensors, Deltas]:
    """The same kind of LoRA as XLabs' trainer writes it."""
    tensors, deltas = flux_kohya()
    renamed: Tensors = {}
    for name, theirs in {
        "img_attn_qkv": "qkv_lora1",
        "txt_attn_qkv": "qkv_lora2",
        "img_attn_proj": "proj_lora1",
    }.items():
        for matrix in ("down", "up"):
            tensor = tensors[f"lora_unet_double_blocks_0_{name}.lora_{matrix}.weight"]
            renamed[f"double_blocks.0.processor.{theirs}.{matrix}.weight"] = tensor
    return renamed, {key: delta * 2 for key, delta in deltas.items() if ".attn." in key[1]}  # it has no alpha


ATTENTION = r"attn[12]\.to_|self_attn|mlp"
EVERYTHING = r"attn[12]\.to_|ff\.net|proj_in|proj_out|conv|time_emb_proj|self_attn|mlp"
FORMATS: Mapping[str, tuple[str, Callable[[], tuple[Tensors, Deltas]]]] = {
    "kohya": ("sd1", lambda: kohya("sd1", KOHYA, ATTENTION)),
    "locon-mixed": ("sd1", lambda: kohya("sd1", KOHYA, EVERYTHING, mixed=True)),
    "xl": ("sdxl", lambda: kohya("sdxl", KOHYA_XL, EVERYTHING)),
    "xl-mixed": ("sdxl", lambda: kohya("sdxl", KOHYA_XL, ATTENTION, mixed=True)),
    "xl-sgm": (
        "sdxl",
        lambda: kohya("sdxl", {"unet": "lora_unet_"}, r"(down_blocks\.1|mid_block).*attn[12]\.to_", rename=SGM),
    ),
    "flux-kohya": ("flux", flux_kohya),
    "flux-xlabs": ("flux", flux_xlabs),
    "flux-peft": ("flux", lambda: peft("flux", PEFT_FLUX, BLOCKS)),
    "flux-alphas": ("flux", lambda: peft("flux", PEFT_FLUX, BLOCKS, alpha=1.0)),
}


class Loras:
    """LoRAs of all formats, written and registered on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[AdapterInput, Deltas]] = {}

    def use(self, name: str, weight: float = 1.0) -> AdapterInput:
        return AdapterInput(checkpoint=self._of(name)[0].checkpoint, weight=weight)

    def deltas(self, name: str) -> Deltas:
        return self._of(name)[1]

    def _of(self, name: str) -> tuple[AdapterInput, Deltas]:
        if name not in self._made:
            tensors, deltas = FORMATS[name][1]()
            self._made[name] = AdapterInput(checkpoint=self.write(name, tensors)), deltas
        return self._made[name]

    def write(self, name: str, tensors: Tensors) -> CheckpointRef:
        (self._root / name).mkdir()
        save_file(tensors, self._root / name / "style_v1.safetensors")
        return tiny_checkpoints().add(inspect(f"format-{name}", self._root / name))


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Loras:
    return Loras(tmp_path_factory.mktemp("loras"))


def merged_picture(base: str, deltas: Deltas, weight: float, prompt: str, seed: int) -> Any:
    """The picture of diffusers' own pipeline whose weights the LoRA's products were added to."""
    pipe = stock(base)
    held = {}
    for (part, name), delta in deltas.items():
        parameter = getattr(pipe, part).get_submodule(name).weight
        held[parameter] = parameter.data
        parameter.data = parameter.data + weight * delta
    try:
        asked = request(base)
        made = pipe(
            prompt,
            width=asked.width,
            height=asked.height,
            num_inference_steps=2,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).images[0]
    finally:
        for parameter, data in held.items():
            parameter.data = data
    return to_pixels(made)


def asked(base: str, *uses: AdapterInput, prompt: str = "a cat", seed: int = 0) -> Any:
    scheduler = "flow-match-euler" if base == "flux" else "ddim"
    return prepared(request(base, loras=uses, prompt=prompt, seed=seed, scheduler=scheduler, num_inference_steps=2))


def apart(made: Any, expected: Any) -> int:
    return int(abs(made.pixels.astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_adds_its_matrices_scaled_by_alpha_and_rank(name: str, loras: Loras) -> None:
    base = FORMATS[name][0]
    made = images(asked(base, loras.use(name, 0.7)))[0]
    assert apart(made, merged_picture(base, loras.deltas(name), 0.7, "a cat", 0)) <= 1
    assert distance(made, images(asked(base))[0]) > 2


@pytest.mark.parametrize("name", ["kohya", "xl"])
def test_a_lora_of_one_alpha_is_bit_equal_to_diffusers_own_application(name: str, loras: Loras) -> None:
    base, use = FORMATS[name][0], loras.use(name, 0.7)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_checkpoints().directory(base))
    pipe.set_progress_bar_config(disable=True)
    files = tiny_checkpoints().files(use.checkpoint.alias)
    pipe.load_lora_weights(files.directory, weight_name="style_v1.safetensors", adapter_name="own")
    pipe.set_adapters(["own"], [0.7])
    one = request(base)
    picture = pipe(
        "a cat",
        width=one.width,
        height=one.height,
        num_inference_steps=2,
        guidance_scale=one.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images[0]
    assert apart(images(asked(base, use))[0], to_pixels(picture)) == 0


def test_a_batch_of_eight_has_for_each_picture_its_own_loras_weights_and_prompt(loras: Loras) -> None:
    weights = [0.7, 0.0, -0.5, 1.8]
    wanted = [("kohya", weight, f"a cat {n}", n) for n, weight in enumerate(weights)]
    wanted += [("locon-mixed", 0.4, "a dog", 4), ("kohya", 0.7, "a dog", 5), ("", 0.0, "a cat", 6)]
    wanted += [("kohya", 0.7, "a house", 7)]
    batch = [
        asked("sd1", *([loras.use(name, weight)] if name else []), prompt=prompt, seed=seed)
        for name, weight, prompt, seed in wanted
    ]
    for made, (name, weight, prompt, seed) in zip(images(*batch), wanted, strict=True):
        deltas = loras.deltas(name) if name else {}
        assert apart(made, merged_picture("sd1", deltas, weight, prompt, seed)) <= 1


def test_two_loras_of_different_formats_add_up(loras: Loras) -> None:
    together = images(asked("sd1", loras.use("kohya", 0.5), loras.use("locon-mixed", 0.3)))[0]
    first, second = loras.deltas("kohya"), loras.deltas("locon-mixed")
    none = torch.zeros(())
    both = {key: first.get(key, none) * 0.5 + second.get(key, none) * 0.3 for key in first.keys() | second.keys()}
    assert apart(together, merged_picture("sd1", both, 1.0, "a cat", 0)) <= 1


def test_a_layer_that_the_checkpoint_does_not_have_is_named(loras: Loras) -> None:
    before = images(asked("sd1"))[0]
    tensors = FORMATS["kohya"][1]()[0]
    foreign = {name.replace("down_blocks_0", "down_blocks_7"): tensor for name, tensor in tensors.items()}
    use = AdapterInput(checkpoint=loras.write("foreign", foreign))
    failed = failure_of(results(asked("sd1", use))[0])
    assert "LoRA 'format-foreign' changes" in failed
    assert "down_blocks.7" in failed
    assert "would be ignored); use a LoRA made for it" in failed
    assert equal(images(asked("sd1"))[0], before)


def test_what_diffusers_drops_in_silence_is_named(loras: Loras) -> None:
    tensors = flux_kohya()[0]
    extra = {
        "lora_te1_text_model_embeddings_position_embedding.lora_down.weight": torch.ones(2, 32),
        "lora_te1_text_model_embeddings_position_embedding.lora_up.weight": torch.ones(77, 2),
    }
    use = AdapterInput(checkpoint=loras.write("dropped", tensors | extra))
    assert "changes lora_te1_text_model_embeddings_position_embedding" in failure_of(results(asked("flux", use))[0])
    zero = AdapterInput(checkpoint=loras.write("zero", tensors | {k: v * 0 for k, v in extra.items()}))
    assert equal(images(asked("flux", zero))[0], images(asked("flux", loras.use("flux-kohya")))[0])


def test_a_lora_of_other_widths_is_refused_and_named(loras: Loras) -> None:
    tensors = {
        name: tensor[:, :-1].contiguous() if name.endswith("attn2_to_k.lora_down.weight") else tensor
        for name, tensor in FORMATS["kohya"][1]()[0].items()
    }
    use = AdapterInput(checkpoint=loras.write("narrow", tensors))
    failed = failure_of(results(asked("sd1", use))[0])
    assert failed.startswith("CheckpointError")
    assert "format-narrow" in failed
    assert len(failed) < 600


def test_values_that_are_not_finite_are_refused_by_the_tensors_name(loras: Loras) -> None:
    tensors = FORMATS["kohya"][1]()[0]
    key = next(iter(tensors))
    use = AdapterInput(checkpoint=loras.write("nan", tensors | {key: tensors[key] * float("nan")}))
    assert f"{key} holds values that are not finite" in failure_of(results(asked("sd1", use))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_of_fewer_bits_is_applied(dtype: torch.dtype, loras: Loras) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in FORMATS["kohya"][1]()[0].items()}
    same = {name: tensor.float() for name, tensor in tensors.items()}
    name = str(dtype).removeprefix("torch.").replace("_", "-")
    uses = [AdapterInput(checkpoint=loras.write(f"{name}-{n}", each)) for n, each in enumerate((tensors, same))]
    one, other = (images(asked("sd1", use))[0] for use in uses)
    assert equal(one, other)


REFUSED = {
    "hada_w1_a": "is a LoHa",
    "lokr_w1": "is a LoKr",
    "a1.weight": "is a GLoRA",
    "diff": "is a file of whole weight differences",
    "oft_blocks": "is an OFT",
    "on_input": "is an (IA)3",
    "w_norm": "is a file of normalisation differences",
    "dora_scale": "is a DoRA",
    "lora_mid.weight": "is a LyCORIS network",
}


@pytest.mark.parametrize("ending", REFUSED)
def test_another_network_type_is_refused_by_name_at_add_and_in_jobs_registered_before(
    ending: str, loras: Loras, tmp_path: Path
) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = dict(FORMATS["kohya"][1]()[0])
    tensors[f"{layer}.{ending}"] = torch.ones(4, 4)
    if ending == "a1.weight":
        tensors[f"{layer}.b1.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(REFUSED[ending])) as refused:
        inspect("style", tmp_path)
    assert "merge it into a checkpoint" in str(refused.value)
    registered = _as_registered_before(tmp_path, f"old-{ending}")
    failed = failure_of(results(asked("sd1", AdapterInput(checkpoint=tiny_checkpoints().add(registered))))[0])
    assert REFUSED[ending] in failed


def _as_registered_before(folder: Path, alias: str) -> CheckpointFiles:
    """The files as an earlier release registered them, which read no network types."""
    manifest = {file.name: hashed(file.read_bytes()) for file in folder.iterdir()}
    good = tiny_checkpoints().files("lora-sd1")
    return replace(good, alias=alias, directory=folder, manifest=manifest, digest=digest(manifest))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, k: t | {k: t[k][:0]}, "a LoRA of rank 0 changes nothing"),
        (lambda t, k: {n: v for n, v in t.items() if n != k}, "without its first matrix"),
        (lambda t, k: {n: v for n, v in t.items() if n != k.replace("lora_down", "lora_up")}, "without .*lora_up"),
        (lambda t, k: t | {k: t[k][:2]}, "of rank 2, but"),
        (lambda t, k: {n: v.to(torch.int8) for n, v in t.items()}, "of dtype I8: quantized weights"),
        (lambda t, k: {n.replace("lora_down.weight", "lora_down"): v for n, v in t.items()}, "Nunchaku"),
        (lambda t, k: t | {"bundle_emb.style.string_to_param.*": t[k] + 1}, "does not belong to a LoRA"),
    ],
)
def test_a_damaged_lora_is_refused_at_add(change: Any, expected: str, tmp_path: Path) -> None:
    tensors = FORMATS["kohya"][1]()[0]
    key = next(name for name in tensors if name.endswith("lora_down.weight"))
    changed = {name: tensor.contiguous() for name, tensor in change(tensors, key).items()}
    save_file(changed, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=expected):
        inspect("style", tmp_path)


def test_the_prompts_of_a_lora_on_text_encoders_are_not_those_of_another(loras: Loras) -> None:
    only = {"text_encoder": "lora_te_"}
    tensors, deltas = kohya("sd1", only, "self_attn|mlp")
    use = AdapterInput(checkpoint=loras.write("text", tensors))
    for weight in (1.0, 2.0, 1.0):
        made = images(asked("sd1", AdapterInput(checkpoint=use.checkpoint, weight=weight)))[0]
        assert apart(made, merged_picture("sd1", deltas, weight, "a cat", 0)) <= 1
