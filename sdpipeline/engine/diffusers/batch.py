"""Values of one forward pass: its settings, its pictures, the weights it runs on, and its latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sdpipeline.domain import CheckpointRef, GenerationRequest, Json, Profile, Task
from sdpipeline.engine import Calls
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.diffusers.loading import Loaded
from sdpipeline.engine.diffusers.preprocessing import Pictures
from sdpipeline.engine.diffusers.schedulers import RecordedScheduler
from sdpipeline.engine.diffusers.text import Embedding
from sdpipeline.engine.families import Cell, Family
from sdpipeline.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSettings:
    """Settings that all pictures of one forward pass share; all others may differ within a batch."""

    task: Task
    checkpoint: CheckpointRef
    vae: CheckpointRef | None
    controlnets: tuple[tuple[CheckpointRef, float, float], ...]
    control_modes: tuple[int | None, ...]
    loras: tuple[tuple[CheckpointRef, float], ...]
    ip_adapters: tuple[tuple[CheckpointRef, float], ...]
    width: int
    height: int
    scheduler: str
    scheduler_config: RecordedScheduler | None
    num_inference_steps: int
    strength: float | None
    guided: bool
    noise_level: int | None
    prompt_tokens: int
    latent_statistics: bool
    exact: bool
    profile: Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Embeddings of an IP-Adapter's reference picture and of its absence, with batch dimension 1."""

    image: torch.Tensor
    nothing: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One request of a batch, ready to run; ``index`` is its position in the requested batch.

    ``calls`` are the recorded network calls, and ``scheduler_config`` the recorded scheduler, if the picture is
    reproduced. ``latent_statistics`` is False for a picture of a release that decoded without them.
    """

    index: int
    request: GenerationRequest
    pictures: Pictures
    prompt: Embedding
    negative: Embedding | None
    references: tuple[Reference, ...] = ()
    calls: Calls = ()
    scheduler_config: RecordedScheduler | None = None
    latent_statistics: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The resident parts that one pass uses."""

    row: Family
    cell: Cell
    base: Loaded
    controlnets: tuple[Loaded, ...] = ()
    vae: Loaded | None = None
    loras: tuple[tuple[CheckpointFiles, float], ...] = ()
    ip_adapters: tuple[tuple[Loaded, float], ...] = ()

    @property
    def autoencoder(self) -> Any:
        """The checkpoint's own autoencoder, or the one with which the request replaces it."""
        if self.vae:
            return self.vae.module
        if "vae" not in self.base.parts:  # only possible for weights that an earlier release approved
            alias = self.base.files.alias
            raise CheckpointError(f"checkpoint {alias!r} has no vae: name one with `vae:`, or use another checkpoint")
        return self.base.parts["vae"]

    def loaded(self) -> list[Loaded]:
        """Return all resident checkpoints that the pass uses."""
        adapters = [loaded for loaded, _ in self.ip_adapters]
        return [self.base, *self.controlnets, *adapters, *([self.vae] if self.vae else [])]

    def networks(self) -> list[torch.nn.Module]:
        """Return every network that the pass uses, without the text encoders, which have run before."""
        return [
            network
            for loaded in self.loaded()
            for network in loaded.networks()
            if network not in loaded.text_encoders()
        ]

    @property
    def denoiser(self) -> Any:
        """The network that runs once per step."""
        return self.base.denoiser

    @property
    def guidance_embedding_dim(self) -> int | None:
        """Width of the embedding by which a distilled U-Net takes its guidance scale; None if it takes none."""
        if not self.row.guidance_embedding:
            return None
        width: int | None = getattr(self.denoiser.config, "time_cond_proj_dim", None)
        return width


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """Latents with the scheduler's configuration, and the network calls of a picture that shared them.

    They keep the memory layout in which their pipeline left them, because bits depend on it.
    """

    values: torch.Tensor
    scheduler: Json
    calls: Calls = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoised:
    """Latents of each picture, and the batches of ``decode_batch`` rows in which they are decoded."""

    latents: Sequence[Latents]
    batches: Sequence[torch.Tensor]
    decode_batch: int


def settings_of(member: Member, weights: Weights) -> PassSettings:
    """Return the settings of a request that must be equal throughout a pass."""
    request, cell = member.request, weights.cell
    strength = cell.strength if request.strength is None else request.strength
    noise_level = weights.row.noise_level if request.noise_level is None else request.noise_level
    return PassSettings(
        task=request.task,
        checkpoint=request.checkpoint,
        vae=request.vae,
        controlnets=tuple(
            (use.checkpoint, use.control_guidance_start, use.control_guidance_end) for use in request.controlnets
        ),
        control_modes=tuple(use.control_mode for use in request.controlnets),
        loras=tuple((use.checkpoint, use.weight) for use in request.loras),
        ip_adapters=tuple((use.checkpoint, use.weight) for use in request.ip_adapters),
        width=request.width,
        height=request.height,
        scheduler=request.scheduler,
        scheduler_config=member.scheduler_config,
        num_inference_steps=request.num_inference_steps,
        strength=strength,
        guided=member.negative is not None,
        noise_level=noise_level,
        prompt_tokens=member.prompt.embeds.shape[1],
        latent_statistics=member.latent_statistics,
        exact=request.exact,
        profile=request.profile,
    )


def padded(items: Sequence[Item], size: int) -> list[Item]:
    """Pad a sequence with copies of its last item."""
    return [*items, *[items[-1]] * (size - len(items))]
