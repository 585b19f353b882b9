"""DeepCache: reuse of the output of the U-Net's deep half from an earlier step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.hooks import ModelHook

from sdpipeline.engine.stepwise.forward_hooks import hooked_forward

if TYPE_CHECKING:
    import torch


@contextmanager
def kept_feature(unet: Any) -> Iterator[list[torch.Tensor]]:
    """Keep the input of the last up block, rows x channels x height x width, from the one call inside the block."""
    kept: list[torch.Tensor] = []
    handle = unet.up_blocks[-2].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def shallow(unet: Any, feature: torch.Tensor) -> Iterator[None]:
    """Run only the first down block and the last up block of the U-Net, with ``feature`` between them.

    DeepCache (Ma, Fang, Wang, arXiv 2312.00858), cut at the outermost block. The package of that name counts the
    steps of one pipeline in the network itself; here each picture of a call is at a step of its own.
    """
    nothing = feature.new_zeros(())
    with ExitStack() as hooked:
        for block in unet.down_blocks[1:]:
            # The U-Net counts these residuals and adds a ControlNet's to each, though no block uses them afterwards.
            count = len(block.resnets) + bool(block.downsamplers)
            hooked.enter_context(hooked_forward(block, _Constant((nothing, (nothing,) * count))))
        if unet.mid_block is not None:
            hooked.enter_context(hooked_forward(unet.mid_block, _Constant(nothing)))
        for block in unet.up_blocks[:-1]:
            hooked.enter_context(hooked_forward(block, _Constant(feature)))
        yield


class _Constant(ModelHook):  # type: ignore[misc]  # diffusers is not typed
    """Return the same output for every call."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def new_forward(self, _module: torch.nn.Module, *_inputs: Any, **_keywords: Any) -> Any:
        return self._output
