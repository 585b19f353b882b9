"""Stepwise denoising: pictures of different steps, strengths, guidance and schedulers share network calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, repeat
from typing import Any

import torch

from sdpipeline.engine import Calls
from sdpipeline.engine.diffusers.batch import Latents, Member, PassSettings, Weights, settings_of
from sdpipeline.engine.diffusers.per_image_scales import guidance_embeddings
from sdpipeline.engine.diffusers.pipeline_call import (
    assemble,
    call_arguments,
    latents_of,
    offloaded,
    patched,
    scheduler_of,
)
from sdpipeline.engine.stepwise.call_batching import Call, in_lockstep, join, make_as_one, split
from sdpipeline.engine.stepwise.deepcache import kept_feature, shallow
from sdpipeline.engine.stepwise.profiles import Shortcuts

GUIDANCE = "timestep_cond"
"""Argument by which a distilled U-Net takes the embedding of its guidance scale."""

FEWEST_ROWS_CUT = 5
"""A call of fewer rows is padded rather than cut in two: the second call would cost more than the padding."""


@dataclass(slots=True, eq=False, kw_only=True)
class Denoising:
    """Progress of one picture: number of denoiser calls (``done``), and ``sizes`` in rows of all its calls.

    ``recorded`` are the sizes to reproduce, if any. ``feature`` is the last output of the U-Net's deep half,
    ``difference`` the last change of the output by the prompt. ``guidance`` is the embedding of its guidance scale,
    1 x width, if the U-Net takes one.
    """

    settings: PassSettings
    guided: bool
    scheduler: Any
    guidance: torch.Tensor | None = None
    recorded: Iterator[int] | None = None
    sizes: list[int] = field(default_factory=list)
    done: int = 0
    feature: torch.Tensor | None = None
    difference: torch.Tensor | None = None


def denoise_stepwise(
    weights: Weights, members: Sequence[Member], shortcuts: Shortcuts, *, offload_to: torch.device | None = None
) -> list[Latents]:
    """Return the latents of these members, in order, with the network calls that each shared."""
    pictures = [_begun(weights, member) for member in members]
    bodies = [
        partial(_denoise_alone, weights, picture.settings, member, picture.scheduler, offload_to=offload_to)
        for member, picture in zip(members, pictures, strict=True)
    ]
    networks = [*dict.fromkeys(loaded.module for loaded in weights.controlnets), weights.denoiser]
    answers = _Answers(weights.denoiser, pictures, shortcuts)
    with patched(weights), torch.no_grad():
        made = in_lockstep(bodies, networks, answers)
    return [replace(latents, calls=_pairs(picture.sizes)) for latents, picture in zip(made, pictures, strict=True)]


def cuts(rows: Sequence[int]) -> list[int]:
    """Return how many of these calls, given by their rows, go into each batched call.

    That is all of them in one. If padding would be a quarter or more of it, the first calls fill a power of two and
    the rest follows. Larger calls have to come first.
    """
    total, size = sum(rows), power_of_two(sum(rows))
    if total < FEWEST_ROWS_CUT or total > size * 3 // 4:
        return [len(rows)]
    first = next(n for n in range(len(rows) + 1) if sum(rows[:n]) >= size // 2)
    return [first, len(rows) - first]


def power_of_two(rows: int) -> int:
    """Return the smallest power of two that is not below ``rows``."""
    return 1 << (rows - 1).bit_length()


class _Answers:
    """Run the network calls of halted pipelines, with the shortcuts of their profile."""

    def __init__(self, denoiser: torch.nn.Module, pictures: Sequence[Denoising], shortcuts: Shortcuts) -> None:
        self._denoiser = denoiser
        self._pictures = pictures
        self._shortcuts = shortcuts

    def __call__(self, halted: Mapping[int, Call]) -> dict[int, Any]:
        """Return the network's output for each call."""
        halved = [n for n in halted if self._unguided(self._pictures[n])]
        calls = {n: self._with_guidance(n, call) for n, call in halted.items()}
        calls |= {n: calls[n].later_half() for n in halved}
        alike: dict[Any, list[int]] = defaultdict(list)
        for n, call in calls.items():
            alike[self._leaves_out(n, call), call.kind()].append(n)
        outputs: dict[int, Any] = {}
        for numbers in alike.values():
            numbers.sort(key=lambda n: -calls[n].rows)
            start = 0
            for count in cuts([calls[n].rows for n in numbers]):
                outputs |= self._together({n: calls[n] for n in numbers[start : start + count]})
                start += count
        for n, output in outputs.items():
            outputs[n] = self._advanced(self._pictures[n], output, halted[n].network, halved=n in halved)
        return outputs

    def _unguided(self, picture: Denoising) -> bool:
        """Return True if this step leaves out the rows without the prompt."""
        return picture.guided and picture.done % self._shortcuts.guidance_every > 0

    def _with_guidance(self, n: int, call: Call) -> Call:
        """Add the embedding of the guidance scale, which some pipelines leave out, to a call of the U-Net."""
        guidance = self._pictures[n].guidance
        if guidance is None or call.network is not self._denoiser:
            return call
        sample = next(iter(call.arguments.values()))
        return replace(call, arguments={**call.arguments, GUIDANCE: guidance.to(sample.device, sample.dtype)})

    def _advanced(self, picture: Denoising, output: Any, network: torch.nn.Module, *, halved: bool) -> Any:
        """Count the step, and return the output as the pipeline expects it, with the rows that were left out."""
        if network is not self._denoiser:
            return _doubled(output) if halved else output
        picture.done += 1
        if not halved:
            if picture.guided and self._shortcuts.guidance_every > 1:
                without, with_prompt = output[0].chunk(2)
                picture.difference = with_prompt - without
            return output
        (with_prompt,) = output
        return (torch.cat([with_prompt - picture.difference, with_prompt]),)

    def _leaves_out(self, n: int, call: Call) -> bool:
        picture = self._pictures[n]
        if call.network is not self._denoiser or picture.done % self._shortcuts.whole_unet_every == 0:
            return False
        return picture.feature is not None and len(picture.feature) >= call.rows

    def _together(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        """Make one call for pictures of one kind, with a size that is a power of two or the recorded one."""
        pictures = [self._pictures[n] for n in calls]
        size = power_of_two(sum(call.rows for call in calls.values()))
        for picture in pictures:
            size = max(size, next(picture.recorded, size)) if picture.recorded else size
        for picture in pictures:
            picture.sizes.append(size)
        leaves_out = self._leaves_out(*next(iter(calls.items())))
        return dict(zip(calls, self._made(list(calls.values()), pictures, size, leaves_out=leaves_out), strict=True))

    def _made(self, calls: Sequence[Call], pictures: Sequence[Denoising], size: int, *, leaves_out: bool) -> list[Any]:
        if calls[0].network is not self._denoiser or self._shortcuts.whole_unet_every == 1:
            return make_as_one(calls, size)
        rows = [call.rows for call in calls]
        if leaves_out:
            features = [_last(picture.feature, count) for picture, count in zip(pictures, rows, strict=True)]
            with shallow(self._denoiser, join(features, size)):
                return make_as_one(calls, size)
        with kept_feature(self._denoiser) as kept:
            made = make_as_one(calls, size)
        for picture, feature in zip(pictures, split(kept[0], rows, size), strict=True):
            picture.feature = feature
        return made


def _denoise_alone(
    weights: Weights, settings: PassSettings, member: Member, scheduler: Any, *, offload_to: torch.device | None = None
) -> Latents:
    """Denoise one member, whose pipeline may run in lockstep with others; call it inside :func:`patched`."""
    pipe = assemble(weights, scheduler)
    arguments = call_arguments(weights, settings, [member]) | _own_scales(weights, settings, member)
    with offloaded(pipe, offload_to):
        values = pipe(**arguments).images
    return latents_of(pipe, values, weights, settings)


def _own_scales(weights: Weights, settings: PassSettings, member: Member) -> dict[str, Any]:
    """Return the scales in the form that a pipeline takes for one picture."""
    own: dict[str, Any] = {}
    if weights.row.text == "flux":
        own["guidance_scale"] = member.request.guidance_scale
    if weights.cell.max_controlnets:
        scales = [use.controlnet_conditioning_scale for use in member.request.controlnets]
        own["controlnet_conditioning_scale"] = scales if len(settings.controlnets) > 1 else scales[0]
    return own


def _begun(weights: Weights, member: Member) -> Denoising:
    settings = settings_of(member, weights)
    width = weights.guidance_embedding_dim
    return Denoising(
        settings=settings,
        guided=member.negative is not None,
        scheduler=scheduler_of(settings, weights),
        guidance=None if width is None else guidance_embeddings([member.request.guidance_scale], width),
        recorded=chain.from_iterable(repeat(rows, times) for rows, times in member.calls) if member.calls else None,
    )


def _last(feature: torch.Tensor | None, rows: int) -> torch.Tensor:
    """Return the last rows of a feature: those with the prompt remain when guidance is left out."""
    assert feature is not None
    return feature[-rows:]


def _doubled(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)([_doubled(each) for each in output])
    return torch.cat([output, output]) if torch.is_tensor(output) else output


def _pairs(sizes: Sequence[int]) -> Calls:
    return [[rows, len(list(same))] for rows, same in groupby(sizes)]
