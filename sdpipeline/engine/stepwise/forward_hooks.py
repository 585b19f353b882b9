"""Replacement of a network's forward pass for the length of a block, by the hooks of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffusers.hooks import HookRegistry, ModelHook

if TYPE_CHECKING:
    import torch

NAME = "sdpipeline.stepwise"


@contextmanager
def hooked_forward(network: torch.nn.Module, hook: ModelHook) -> Iterator[None]:
    """Have the hook's ``new_forward`` answer the calls of this network."""
    inherited = "forward" not in vars(network)
    registry = HookRegistry.check_if_exists_or_initialize(network)
    registry.register_hook(hook, NAME)
    try:
        yield
    finally:
        registry.remove_hook(NAME, recurse=False)
        if inherited:
            del network.forward  # the registry leaves the class's method in the instance
