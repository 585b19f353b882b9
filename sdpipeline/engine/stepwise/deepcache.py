"""DeepCache: reuse of the output of the U-Net's deep half from an earlier step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

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
    with ExitStack() as restored:
        for block in unet.down_blocks[1:]:
            # The U-Net counts these residuals and adds a ControlNet's to each, though no block uses them afterwards.
            count = len(block.resnets) + bool(block.downsamplers)
            _exchange(restored, block, lambda *_, count=count, **__: (nothing, (nothing,) * count))
        if unet.mid_block is not None:
            _exchange(restored, unet.mid_block, lambda *_, **__: nothing)
        for block in unet.up_blocks[:-1]:
            _exchange(restored, block, lambda *_, **__: feature)
        yield


def _exchange(restored: ExitStack, block: torch.nn.Module, forward: Callable[..., Any]) -> None:
    own = vars(block).get("forward")
    block.forward = forward
    if own is None:
        restored.callback(delattr, block, "forward")
    else:
        restored.callback(setattr, block, "forward", own)
