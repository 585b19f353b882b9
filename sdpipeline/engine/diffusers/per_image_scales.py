"""ControlNet scales, distilled guidance and references for each picture inside one forward pass, by hooks of torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import diffusers
import torch

from sdpipeline.engine.diffusers.patches import PerImageScale, broadcast


@contextmanager
def controlnet_scales(controlnets: Sequence[torch.nn.Module], scales: Sequence[Sequence[float]]) -> Iterator[None]:
    """Multiply the output of each ControlNet by each picture's own scale; the pipelines get 1.0.

    A picture may use the same weights twice, so one module applies its scales in the order of the calls.
    """
    uses: dict[torch.nn.Module, list[torch.Tensor]] = defaultdict(list)
    for controlnet, scale in zip(controlnets, scales, strict=True):
        uses[controlnet].append(torch.tensor(scale, dtype=torch.float32))
    with ExitStack() as hooks:
        for controlnet, turns in uses.items():
            hooks.enter_context(_scaled_output(controlnet, turns))
        yield


@contextmanager
def _scaled_output(controlnet: torch.nn.Module, turns: list[torch.Tensor]) -> Iterator[None]:
    turn = cycle(turns)

    def scale(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        return _scaled(output, next(turn))

    handle = controlnet.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def control_map_scales(union: torch.nn.Module, scales: Sequence[Sequence[float]]) -> Iterator[None]:
    """Scale each control map that a union ControlNet reads in one call, by each picture's own scale.

    The network scales its maps itself, so its output cannot be scaled afterwards. The pipelines pass 1.0, or 0.0 for a
    map outside its steps.
    """

    def replace(_module: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        given = keywords["conditioning_scale"]
        own = [PerImageScale([on * each for each in scale]) for on, scale in zip(given, scales, strict=True)]
        return inputs, keywords | {"conditioning_scale": own}

    handle = union.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def control_mode_per_row(union: torch.nn.Module) -> Iterator[None]:
    """Repeat the control mode for each row of a Flux union; two of its three pipelines pass one row for a batch."""

    def repeat(_module: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        rows = keywords["hidden_states"].shape[0]
        return inputs, keywords | {"controlnet_mode": keywords["controlnet_mode"].expand(rows, -1)}

    handle = union.register_forward_pre_hook(repeat, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def distilled_guidance(network: torch.nn.Module, guidance_scales: Sequence[float]) -> Iterator[None]:
    """Pass each picture's own guidance to a guidance-distilled network; its pipelines pass one for all pictures."""
    values = torch.tensor(guidance_scales, dtype=torch.float32)

    def replace(_module: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        given = keywords.get("guidance")
        if given is not None:
            keywords["guidance"] = values.to(device=given.device, dtype=given.dtype)
        return inputs, keywords

    handle = network.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def guidance_embeddings(guidance_scales: Sequence[float], width: int) -> torch.Tensor:
    """Return the embedding of each guidance scale, float32, pictures x ``width``, as latent consistency models take it.

    From equation 11 of Luo et al., Latent Consistency Models (arXiv 2310.04378), by the function of the pipelines.
    """
    scales = torch.tensor([scale - 1 for scale in guidance_scales], dtype=torch.float32)
    embed: Any = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    result: torch.Tensor = embed(None, scales, embedding_dim=width)
    return result


@contextmanager
def embedded_guidance(network: torch.nn.Module, embeddings: torch.Tensor) -> Iterator[None]:
    """Pass each picture's own guidance embedding to a distilled U-Net.

    Most pipelines pass one for all pictures. Those for image-to-image and inpainting with ControlNets pass none, and
    would guide such a U-Net by a second row.
    """

    def replace(_module: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        keywords["timestep_cond"] = embeddings.to(device=inputs[0].device, dtype=inputs[0].dtype)
        return inputs, keywords

    handle = network.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def own_references(network: torch.nn.Module, references: Sequence[torch.Tensor]) -> Iterator[None]:
    """Pass each picture's own IP-Adapter references to a network; its pipelines pass those of one for all pictures."""

    def replace(_module: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        keywords["added_cond_kwargs"] = keywords["added_cond_kwargs"] | {"image_embeds": list(references)}
        return inputs, keywords

    handle = network.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _scaled(output: Any, scale: torch.Tensor) -> Any:
    """Multiply a ControlNet's residuals, in the containers of any class, by one scale per picture."""
    if isinstance(output, torch.Tensor):
        return output * broadcast(scale, output)
    if isinstance(output, tuple | list):
        return type(output)([_scaled(part, scale) for part in output])
    return output
