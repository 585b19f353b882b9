"""Class and configuration of each part, and the tensors that its network has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpipeline.engine.single_files import architecture
from sdpipeline.engine.single_files.architecture import Shape
from sdpipeline.engine.single_files.layout import Part
from sdpipeline.engine.single_files.templates import Template, choose, templates
from sdpipeline.errors import CheckpointError

_PROJECTED, _CLIP, _T5 = "CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel"
TEXT_ENCODERS: Mapping[str, Sequence[str]] = {
    "sd1": (_CLIP,),
    "sd2": (_CLIP,),
    "sdxl": (_CLIP, _PROJECTED),
    "sd3": (_PROJECTED, _PROJECTED, _T5),
    "flux": (_CLIP, _T5),
}
"""transformers classes of the text encoders by family, in the order of the pipeline's parts."""

DENOISERS = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}


def text_encoders(family: str) -> dict[str, str]:
    """Return the classes of a family's text encoders by the names of the parts."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return dict(zip(names, TEXT_ENCODERS[family], strict=False))


def class_of(family: str, part: str) -> str:
    """Return the class of a part of a family's pipeline."""
    fixed = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "controlnet": "ControlNetModel"}
    if part == "transformer":
        return DENOISERS[family]
    return fixed.get(part) or text_encoders(family)[part]


def configuration(
    name: str, part: Part, *, families: Sequence[str], roots: Sequence[Path], own: Path | None, where: str
) -> tuple[dict[str, Any], str]:
    """Return (configuration, label of its template) of a part; CheckpointError if the file and folders cannot tell."""
    found = templates(name, families, roots, own=own)
    if part.naming == "diffusers" and name != "vae":
        return _of_same_tensors(name, part, found, families=families, where=where)
    inferred = _inferred(name, part, families[0], found, where)
    kind = "t5" if part.naming == "t5" else "text_encoder" if name.startswith("text_encoder") else name
    template = choose(kind, inferred, found, where=where)
    config = {key: value for key, value in template.config.items() if key not in _NOT_OF_THE_FILE} | inferred
    return _of_class(config, class_of(families[0], name)), template.label


_NOT_OF_THE_FILE = frozenset(
    {"dtype", "torch_dtype", "_name_or_path", "_diffusers_version", "transformers_version", "architectures"}
    | {"transformer_layers_per_block", "reverse_transformer_layers_per_block", "mid_block_type"}
    | {"qk_norm", "dual_attention_layers"}
)
"""Keys of a template that describe its own weights: shapes of the file tell the rest of them."""


def _inferred(name: str, part: Part, family: str, found: Sequence[Template], where: str) -> dict[str, Any]:
    shapes = Shape({key.removeprefix("text_model."): shape for key, shape in part.shapes.items()}, f"{where}: {name}")
    if part.naming == "open-clip":
        layers = next((t.config.get("num_hidden_layers") for t in found), None) if family == "sd2" else None
        return architecture.open_clip(shapes, layers or 0)
    if name.startswith("text_encoder"):
        return architecture.t5(shapes) if part.naming == "t5" else architecture.clip(shapes)
    if name == "transformer":
        return architecture.sd3(shapes) if family == "sd3" else architecture.flux(shapes)
    if name == "vae" and part.naming == "diffusers":
        return architecture.vae_of_diffusers(shapes)
    return {"unet": architecture.unet, "vae": architecture.vae, "controlnet": architecture.controlnet}[name](shapes)


def _of_class(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Return the keys that the class takes; diffusers names the class in its configuration, transformers in a list."""
    import diffusers

    if hasattr(diffusers, class_name):
        known = inspect.signature(getattr(diffusers, class_name).__init__).parameters.keys()
        return {"_class_name": class_name} | {key: value for key, value in config.items() if key in known}
    return {"architectures": [class_name]} | dict(config)


def _of_same_tensors(
    name: str, part: Part, found: Sequence[Template], *, families: Sequence[str], where: str
) -> tuple[dict[str, Any], str]:
    """Return the first configuration whose network has exactly the part's tensors."""
    for template in found:
        named = str(template.config.get("_class_name", ""))
        class_name = named if named.endswith("ControlNetModel") else class_of(families[0], name)
        config = _of_class({k: v for k, v in template.config.items() if not k.startswith("_")}, class_name)
        if expected_shapes(class_name, config) == dict(part.shapes):
            return config, template.label
    raise CheckpointError(
        f"{where}: no configuration of the {name} fits its tensors; put the author's config.json into the file's "
        "folder, or name a folder that has it with --parts DIR"
    )


def expected_shapes(class_name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that a network with this configuration has."""
    import diffusers
    import torch
    import transformers

    try:
        with torch.device("meta"):
            if hasattr(diffusers, class_name):
                network = getattr(diffusers, class_name).from_config(dict(config))
            else:
                cls = getattr(transformers, class_name)
                network = cls(cls.config_class.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"no {class_name} can be built with the file's configuration: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in _DERIVED}


_DERIVED = frozenset({"encoder.embed_tokens.weight", "embeddings.position_ids", "text_model.embeddings.position_ids"})
"""Tensors that repeat another one, or that the network computes."""
