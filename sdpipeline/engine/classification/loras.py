"""LoRA files: the network types in them, their naming, and the layers that they change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Sequence[int]
Naming = Literal["kohya", "diffusers", "native"]

_NETWORKS: Mapping[str, str] = {
    r"lora_(?:A|down)(?:\.weight)?": "lora",
    r"lora_(?:B|up)(?:\.(?:weight|bias))?": "lora",
    r"(?:lora|\w*_lora\d*|lora_linear_layer)\.(?:down|up)\.weight": "lora",
    r"lora_embedding_[AB]": "lora",
    r"lora_mid\.weight": "lora",
    r"hada_(?:w[12]_[ab]|t[12])": "loha",
    r"lokr_(?:w[12](?:_[ab])?|t[12])": "lokr",
    r"[ab][12]\.weight": "glora",
    r"on_input": "ia3",
    r"(?:ia3_l(?:\.weight)?)": "ia3",
    r"(?:diff|diff_b|set_weight|set_bias)": "full",
    r"[wb]_norm": "norm",
    r"(?:oft_blocks|oft_diag|oft_R(?:\.weight)?)": "oft",
    r"(?:boft_[RS])": "boft",
    r"vera_lambda_[bd]": "vera",
    r"(?:dora_scale|lora_magnitude_vector(?:\.weight)?)": "dora",
    r"(?:alpha|scale|rank|rescale|reshape_weight|scalar)": "",
}
"""Ends of tensor names and their network type, as kohya sd-scripts, LyCORIS and peft write them; '' is a setting."""

_ENDS = "|".join(f"(?P<n{n}>{each})" for n, each in enumerate(_NETWORKS))
_PART = re.compile(rf"(?:^|[._])(?:{_ENDS})$")
_TYPES = tuple(_NETWORKS.values())

_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?(?:lycoris_)?(?:"
    r"(?P<text>(?:lora|oft)_te(?P<te>\d?)_|text_encoder(?:_(?P<encoder>\d))?\.|te(?P<native>\d?)_|"
    r"(?:lora_)?text_encoders\.(?P<comfy>\w+?)\.(?:transformer\.)?)|"
    r"lora_unet_|oft_unet_|lora_transformer_|lora_prior_|lycoris_|model\.diffusion_model\.|diffusion_model\.|unet\.|transformer\.)?"
)
_TEXT = re.compile(r"^(?:text_model_)?encoder_layers_\d+_(?:self_attn|mlp)|^encoder_block_\d+_layer_|^text_projection$")
_KNOWN_ENCODERS = {"clip_l": "1", "clip_g": "2", "t5xxl": "3"}


@dataclass(frozen=True, slots=True)
class LoraFormat:
    """Network types of a LoRA file, and how it names its layers.

    ``networks`` holds ``lora`` (also of convolutions), ``loha``, ``lokr``, ``glora``, ``ia3``, ``full`` (differences of
    whole weights), ``norm``, ``oft``, ``boft`` and ``vera``. ``dora``: it has magnitudes of weight-decomposed LoRA.
    ``naming`` is ``kohya`` (lora_unet_…), ``diffusers`` (unet.…, transformer.…) or ``native`` (diffusion_model.… or no
    prefix). ``others`` are tensors that belong to no layer, such as textual inversions bundled with it.
    """

    networks: frozenset[str]
    dora: bool
    naming: Naming
    others: tuple[str, ...] = ()

    @property
    def network(self) -> str:
        """The network type to name it by: ``lora``, or the first other one."""
        return next(iter(sorted(self.networks - {"lora"})), "lora")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that a network has, or that a LoRA changes.

    ``name`` is the path in the network with underscores, without a prefix. ``part`` is ``denoiser``,
    ``text_encoder``, ``text_encoder_2`` or ``text_encoder_3``. Widths are None where the tensors do not tell them.
    """

    name: str
    part: str
    width_in: int | None = None
    width_out: int | None = None


def lora_format(tensors: Mapping[str, Shape]) -> LoraFormat | None:
    """Return the format of a LoRA file; None if it holds no LoRA of any type."""
    found: set[str] = set()
    layers: set[str] = set()
    others: list[str] = []
    dora = False
    for name, shape in tensors.items():
        layer, kind, _ = _split(name)
        if kind is None:
            others.append(name)
            continue
        layers.add(layer)
        dora = dora or kind == "dora"
        found.add("boft" if kind == "oft" and len(shape) == 4 else kind)
    found -= {"", "dora"}
    if "glora" in found and not _is_glora(tensors):
        found.discard("glora")
    if "ia3" in found:
        others = [name for name in others if name.removesuffix(".weight") not in layers]
    if not found:
        return None
    return LoraFormat(networks=frozenset(found), dora=dora, naming=_naming(tensors), others=tuple(others))


def lora_layers(tensors: Mapping[str, Shape]) -> list[Layer]:
    """Return the layers that a LoRA file changes, with their widths."""
    grouped: dict[str, dict[str, Shape]] = {}
    for name, shape in tensors.items():
        layer, kind, part = _split(name)
        if kind is not None:
            grouped.setdefault(layer, {})[part] = shape
    return [_layer(name, parts) for name, parts in grouped.items()]


def path_of(name: str) -> tuple[str, str]:
    """Return (part, path with underscores) of a layer's full name."""
    match = _PREFIX.match(name)
    prefix = match.group() if match else ""
    path = name.removeprefix(prefix).replace(".", "_")
    numbers = [match[key] for key in ("te", "encoder", "native") if match[key]] if match else []
    if match and match["comfy"]:
        numbers = [_KNOWN_ENCODERS.get(match["comfy"], "1")]
    if (match and match["text"]) or _TEXT.search(path):
        number = numbers[0] if numbers else "1"
        return ("text_encoder" if number == "1" else f"text_encoder_{number}"), path
    return "denoiser", path


def _split(name: str) -> tuple[str, str | None, str]:
    """Return (layer, network type, end of the name); the type is None for a tensor of no LoRA."""
    plain = name.replace(".default.", ".").removesuffix(".default")
    match = _PART.search(plain)
    if match is None:
        return plain, None, ""
    kind = next(kind for n, kind in enumerate(_TYPES) if match[f"n{n}"] is not None)
    part = plain[match.start() :].lstrip("._")
    layer = plain[: match.start()]
    if inner := re.fullmatch(r"(\w*)_lora\d*\.(?:down|up)\.weight", part):  # to_k_lora.down.weight of diffusers 0.1x
        layer = f"{layer}.{inner[1]}"
        part = part.removeprefix(f"{inner[1]}_")
    return layer, kind, part


def _is_glora(tensors: Mapping[str, Shape]) -> bool:
    ends = [name.removesuffix("a1.weight") for name in tensors if name.endswith(".a1.weight")]
    return any(f"{layer}b1.weight" in tensors for layer in ends)


def _naming(tensors: Mapping[str, Shape]) -> Naming:
    if any(
        name.startswith(
            ("lora_unet_", "lora_te", "oft_unet_", "oft_te", "lora_transformer_", "lycoris_", "lora_prior_")
        )
        for name in tensors
    ):
        return "kohya"
    starts = ("unet.", "transformer.", "text_encoder.", "text_encoder_", "base_model.model.")
    return "diffusers" if any(name.startswith(starts) for name in tensors) else "native"


def _layer(name: str, parts: Mapping[str, Shape]) -> Layer:
    part, path = path_of(name)
    width_in, width_out = _widths(parts)
    return Layer(name=path, part=part, width_in=width_in, width_out=width_out)


def _widths(parts: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """Return (input, output) width of a layer, by the shapes of the network's own formula."""
    width_in = width_out = None
    for part, shape in parts.items():
        if len(shape) < 2:
            continue
        if re.fullmatch(r"(lora_A|lora_down|.*down|b2|a2|hada_w[12]_b)(\.weight)?", part):
            width_in = shape[1]
        elif re.fullmatch(r"(lora_B|lora_up|.*up|b1|hada_w[12]_a)(\.weight)?", part):
            width_out = shape[0]
        elif part.startswith("oft_") and len(shape) == 3:
            width_out = shape[0] * shape[1]
        elif part == "diff":
            width_out, width_in = shape[0], shape[1]
    if any(part.startswith("lokr_") for part in parts):
        width_out, width_in = _kronecker(parts, 0), _kronecker(parts, 1)
    return width_in, width_out


def _kronecker(parts: Mapping[str, Shape], axis: int) -> int | None:
    """Return one side of the Kronecker product of two matrices, each whole or in two factors of low rank."""
    sides = []
    for factor in ("lokr_w1", "lokr_w2"):
        shape = parts.get(factor) or parts.get(f"{factor}_{'ab'[axis]}")
        if not shape or len(shape) <= axis:
            return None
        sides.append(shape[axis])
    return sides[0] * sides[1]
