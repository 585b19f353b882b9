"""Engine on diffusers: batches of mixed requests, with every failure confined to its own request."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch

from sdpipeline.domain import AdapterInput, CheckpointRef, ControlNetInput, GenerationRequest, Json, Profile
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, Pixels, PreparedRequest, safety
from sdpipeline.engine.annotators import known_annotator
from sdpipeline.engine.checkpoints import CheckpointFiles, read_ahead
from sdpipeline.engine.diffusers.adapters import AdapterState, adapter_set, reference, refuse_unused, words
from sdpipeline.engine.diffusers.decoding import Developed, develop
from sdpipeline.engine.diffusers.determinism import allow_exactness, exactly
from sdpipeline.engine.diffusers.model_cache import Form, Loaded, ModelCache, TextEncoders, release
from sdpipeline.engine.diffusers.oom_fallback import FallbackLevel, Ladder, Result
from sdpipeline.engine.diffusers.pipeline_call import Latents, Member, PassSettings, Weights, denoise, settings_of
from sdpipeline.engine.diffusers.preprocessing import adapters_of, annotator_parameters, check, given, pictures
from sdpipeline.engine.diffusers.text import Embedding, EmbeddingCache, PromptEncoder
from sdpipeline.engine.families import FAMILIES, family
from sdpipeline.engine.gan import upscale
from sdpipeline.engine.model_annotators import annotate_with
from sdpipeline.engine.pictures import paste_back
from sdpipeline.engine.record import Setting, library_versions, ran
from sdpipeline.engine.stepwise.compile import Speedups, Workshop
from sdpipeline.engine.stepwise.profiles import PROFILES, Shortcuts
from sdpipeline.engine.stepwise.quantization import Quantization, library_of
from sdpipeline.engine.stepwise.stepwise_denoising import denoise_stepwise
from sdpipeline.errors import BadPictureError, CheckpointError, DeviceExhaustedError, RequestRefusedError, SdpError

Item = TypeVar("Item")

PROMPT_CACHE_BYTES = 256 * 2**20
ZEROS = "force_zeros_for_empty_prompt"
"""Configuration key of SDXL checkpoints for which no negative prompt differs from an empty one."""


class DiffusersEngine:
    """:class:`sdpipeline.engine.Engine` on one device. Call it from one thread only."""

    def __init__(
        self,
        *,
        device: str,
        dtype: str | None,
        locate: Callable[[CheckpointRef], CheckpointFiles],
        resident_bytes: int | None = None,
        profiles: Mapping[Profile, Shortcuts] = PROFILES,
        speedups: Speedups | None = None,
        text_encoders: TextEncoders | None = None,
    ) -> None:
        allow_exactness()
        self._device = torch.device(device)
        self._dtype = dtype
        self._profiles = profiles
        self._speedups = speedups or Speedups()
        self._workshop = Workshop(self._speedups)
        self._libraries = library_versions()
        self._prompts = EmbeddingCache(PROMPT_CACHE_BYTES)
        self._wardrobe = AdapterState()
        self._text_encoders = text_encoders or TextEncoders()
        self.residency = ModelCache(
            device=self._device,
            dtype=self._dtype_of,
            locate=locate,
            budget_bytes=resident_bytes,
            text_encoders=self._text_encoders,
        )
        self._ladder = Ladder(
            forward=self._forward, free=lambda: release(self._device), spare=self.residency.spare_encoders
        )

    def generate(self, batch: Batch) -> Sequence[Result]:
        """Return one result per request, in order; see :class:`sdpipeline.engine.Engine`."""
        results: dict[int, Result] = {}
        groups: dict[PassSettings, list[Member]] = defaultdict(list)
        broken: dict[str, SdpError] = {}
        for index, prepared in enumerate(batch.requests):
            try:
                with exactly(wanted=prepared.request.exact):
                    weights = self._checked_weights(prepared.request, broken)
                    if weights.row.text == "none":
                        results[index] = self._upscaled(prepared, weights)
                        continue
                    member = self._member(index, prepared, weights)
            except SdpError as error:
                results[index] = GenerationFailure(error=error)
            else:
                settings = settings_of(member, weights)
                groups[settings.in_lockstep() if settings.stepwise else settings].append(member)
        self.residency.prompts_encoded()
        # Requests of one batch key make one group, unless their prompts differ in length by a whole chunk.
        for settings, members in groups.items():
            with exactly(wanted=settings.exact):
                for member, result in self._ladder.run(settings, members, batch.bucket):
                    results[member.index] = result
        return [results[index] for index in range(len(batch.requests))]

    def prefetch_weights(self, ref: CheckpointRef) -> None:
        """Have the operating system read a checkpoint's files ahead of their load."""
        with suppress(CheckpointError):  # loading them reports what is wrong
            read_ahead(self.residency.files(ref))

    def flagged(self, checker: CheckpointRef, pictures: Sequence[Pixels]) -> Sequence[bool]:
        """See :class:`sdpipeline.engine.Engine`. The checker runs in float32, for which its thresholds were set."""
        try:
            return safety.flagged(self.residency.get(checker, exact=True), pictures)
        except torch.OutOfMemoryError:
            pass
        release(self._device)
        raise DeviceExhaustedError(f"out of memory while safety checker {checker.alias!r} looked at pictures")

    def resident(self) -> frozenset[str]:
        """Return the digests of the checkpoints that are loaded now."""
        return self.residency.digests()

    def describe(self) -> dict[str, Any]:
        """Return device, dtype and library versions."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else platform.machine()
        return {
            "engine": "diffusers",
            "device": str(self._device),
            "device_name": name,
            "dtype": self._dtype or "by family",
            "speedups": self._speedups.document(),
            "text_encoders": {"offload": self._text_encoders.offload},
            "libraries": self._libraries | library_of(self._speedups.quantize),
        }

    def _dtype_of(self, files: CheckpointFiles) -> torch.dtype:
        if self._dtype:
            return getattr(torch, self._dtype)  # type: ignore[no-any-return]
        row = FAMILIES.get(files.family)
        return getattr(torch, row.cuda_dtype if row and self._device.type == "cuda" else "float32")  # type: ignore[no-any-return]

    def _checked_weights(self, request: GenerationRequest, broken: dict[str, SdpError]) -> Weights:
        """Return the request's weights, or raise the error of the request or of a checkpoint.

        ``broken`` holds errors of bad checkpoints, so that none is loaded twice.
        """
        check(request, self.residency.files)
        return self._weights(request, broken)

    def _member(self, index: int, prepared: PreparedRequest, weights: Weights) -> Member:
        """Prepare a request to run, or raise the error of its pictures or prompts."""
        request = prepared.request
        seen = pictures(prepared, weights.cell, lambda use, pixels: self._control_map(request, use, pixels))
        prompt, negative = self._embeddings(request, weights)
        references = tuple(
            reference(loaded, given(prepared, f"ip_adapters.{n}")) for n, (loaded, _) in enumerate(weights.ip_adapters)
        )
        return Member(
            index=index,
            request=request,
            pictures=seen,
            prompt=prompt,
            negative=negative,
            references=references,
            calls=prepared.calls,
        )

    def _upscaled(self, prepared: PreparedRequest, weights: Weights) -> Result:
        """Upscale a picture with a GAN, alone, because its tiles fill the device."""
        request, files = prepared.request, weights.base.files
        image = pictures(prepared, weights.cell, _no_annotator).image
        assert image is not None
        network = weights.base.parts["upscaler"]
        free = partial(release, self._device)
        pixels, fallbacks = upscale(network, image, files.scale, free=free, exact=request.exact)
        dtype = next(network.parameters()).dtype
        setting = self._setting(weights, {"name": "none"}, dtype, bucket=1)
        record = ran(request, setting, slot=0, fallbacks=fallbacks, details={"prompt": "not used"})
        return GeneratedImage(pixels=pixels, ran=record)

    def _weights(self, request: GenerationRequest, broken: dict[str, SdpError] | None = None) -> Weights:
        """Return the resident parts that this request runs on, loaded if necessary."""
        keep = self._forms(request)

        def get(ref: CheckpointRef) -> Loaded:
            if broken and ref.digest in broken:
                raise broken[ref.digest]
            try:
                return self.residency.get(ref, keep=keep, exact=request.exact, quantized=self._quantized(request, ref))
            except (CheckpointError, DeviceExhaustedError) as error:
                if broken is not None:
                    broken[ref.digest] = error
                raise

        base = get(request.checkpoint)
        row = family(base.files.family)
        cell = row.cell(request.task, controlnets=len(request.controlnets))
        assert cell is not None  # checked before
        return Weights(
            row=row,
            cell=cell,
            base=base,
            controlnets=tuple(get(use.checkpoint) for use in request.controlnets),
            vae=get(request.vae) if request.vae else None,
            loras=tuple((self.residency.files(use.checkpoint), use.weight) for use in request.loras),
            ip_adapters=tuple((get(use.checkpoint), use.weight) for use in request.ip_adapters),
        )

    def _quantized(self, request: GenerationRequest, ref: CheckpointRef) -> Quantization | None:
        """Return the quantization of this checkpoint's denoiser; ``None`` for an exact request."""
        return self._speedups.quantize if request.profile != "exact" and ref == request.checkpoint else None

    def _forms(self, request: GenerationRequest) -> set[Form]:
        """Return the cache keys of the checkpoints that this request needs in memory together."""
        return {(ref.digest, self._quantized(request, ref)) for ref in request.checkpoints()}

    def _control_map(self, request: GenerationRequest, use: ControlNetInput, pixels: Pixels) -> Pixels:
        """Draw the control map of an annotator with weights."""
        learned = known_annotator(use.annotator).learned
        assert learned is not None
        assert use.annotator_checkpoint is not None
        loaded = self.residency.get(use.annotator_checkpoint, keep=self._forms(request), exact=request.exact)
        return annotate_with(loaded, learned, pixels, annotator_parameters(use))

    def _embeddings(self, request: GenerationRequest, weights: Weights) -> tuple[Embedding, Embedding | None]:
        """Return the embeddings of prompt and negative prompt, of equal length; the second only if guidance is on."""
        keep = self._forms(request)
        inversions = [
            self.residency.get(use.checkpoint, keep=keep, exact=request.exact) for use in request.textual_inversions
        ]
        refuse_unused(inversions, request.prompt, request.negative_prompt)
        encoder = PromptEncoder(
            kind=weights.row.text, parts=weights.base.parts, words=words(inversions, weights.base.parts)
        )
        guided = weights.row.negative_prompt and request.guidance_scale > 1
        length = encoder.length(request.prompt, *[request.negative_prompt] * guided)
        prompt = self._embedding(encoder, request, weights, request.prompt, length)
        if not guided:
            return prompt, None
        if not request.negative_prompt and weights.row.text == "sdxl" and weights.base.options.get(ZEROS, True):
            return prompt, prompt.zeros()
        return prompt, self._embedding(encoder, request, weights, request.negative_prompt, length)

    def _embedding(
        self, encoder: PromptEncoder, request: GenerationRequest, weights: Weights, text: str, length: int
    ) -> Embedding:
        inversions = tuple(use.checkpoint for use in request.textual_inversions)
        worn = adapter_set(weights).loras
        dtype = weights.base.dtype
        key = (request.checkpoint.digest, dtype, worn, inversions, text, length, request.clip_skip)
        held = self._prompts.get(key)
        if held is None:
            self._wardrobe.dress(weights)
            self.residency.recall_encoders(weights.base, keep=self._forms(request))
            held = encoder.encode(text, length=length, clip_skip=request.clip_skip)
            self._prompts[key] = held
        return held

    def _forward(self, settings: PassSettings, members: Sequence[Member], rung: FallbackLevel) -> list[Result]:
        """Run one forward pass, padded with copies of its last member; stepwise unless the profile is ``exact``."""
        weights = self._weights(members[0].request)
        self._wardrobe.dress(weights)
        decoded_at_once = rung.bucket
        with (
            self._means(weights, rung) as offload_to,
            self._workshop.applied(weights, wanted=settings.stepwise),
        ):
            if settings.stepwise:
                denoised = denoise_stepwise(weights, members, self._profiles[settings.profile], offload_to=offload_to)
                decoded_at_once = min(rung.bucket, self._speedups.decode_batch or rung.bucket)
                batches = [_joined(part, decoded_at_once) for part in _parts(denoised, decoded_at_once)]
            else:
                whole = denoise(weights, settings, _padded(members, rung.bucket), offload_to=offload_to)
                denoised, batches = [whole] * len(members), [whole.values]
            weights.autoencoder.to(self._device)
            developed = [picture for batch in batches for picture in develop(weights, batch)]
        return [
            self._result(
                member,
                picture,
                self._setting(weights, latents.scheduler, latents.values.dtype, bucket=decoded_at_once),
                _details(member, settings_of(member, weights), latents),
                slot=n % decoded_at_once,
                rung=rung,
            )
            for n, (member, latents, picture) in enumerate(zip(members, denoised, developed, strict=False))
        ]

    @contextmanager
    def _means(self, weights: Weights, rung: FallbackLevel) -> Iterator[torch.device | None]:
        """Apply the memory savings of this level to one pass; yield the device to offload to."""
        if rung.offload:
            self.residency.drop(keep={loaded.form for loaded in weights.loaded()})
            self.residency.dismiss_encoders()
        if rung.tiling:
            weights.autoencoder.enable_tiling()
        try:
            yield self._device if rung.offload and self._device.type == "cuda" else None
        finally:
            if rung.tiling:
                weights.autoencoder.disable_tiling()
            for network in weights.networks():
                network.to(self._device)

    def _result(
        self, member: Member, picture: Developed, setting: Setting, details: Json, *, slot: int, rung: FallbackLevel
    ) -> Result:
        request, seen = member.request, member.pictures
        if picture.pixels is None:
            return GenerationFailure(error=BadPictureError(f"the engine's picture is refused: {picture.fault}"))
        pixels = picture.pixels
        if seen.image is not None and seen.mask_image is not None:
            pixels = paste_back(pixels, seen.image, seen.mask_image)
            details["unmasked_pixels"] = "pasted back from the input"
        fallbacks = [*rung.fallbacks(), *picture.fallbacks]
        record = ran(request, setting, slot=slot, fallbacks=fallbacks, details=details)
        if request.profile != "exact":
            record["profile"] |= self._speedups.document()
        return GeneratedImage(pixels=pixels, ran=record, control_maps=seen.control_maps)

    def _setting(self, weights: Weights, scheduler: Json, dtype: torch.dtype, *, bucket: int) -> Setting:
        return Setting(
            engine="diffusers",
            family=weights.row.name,
            pipeline=weights.cell.pipeline,
            scheduler=scheduler,
            device=self._device.type,
            dtype=str(dtype).removeprefix("torch."),
            bucket=bucket,
            libraries=self._libraries | library_of(weights.base.quantized),
        )


def _no_annotator(use: ControlNetInput, _: Pixels) -> Pixels:
    raise RequestRefusedError(f"controlnets: annotator {use.annotator!r} has nothing to steer here")


def _parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _joined(latents: Sequence[Latents], bucket: int) -> torch.Tensor:
    """Join latents of single pictures into one batch, padded with copies of the last."""
    return torch.cat(_padded([each.values for each in latents], bucket)).contiguous()


def _padded(items: Sequence[Item], bucket: int) -> list[Item]:
    return [*items, *[items[-1]] * (bucket - len(items))]


def _details(member: Member, settings: PassSettings, latents: Latents) -> Json:
    """Return the optional fields of the record, with the family's defaults for what the request left out."""
    request = member.request
    details: Json = {"prompt_tokens": settings.prompt_tokens}
    resolved = {
        "strength": settings.strength,
        "noise_level": settings.noise_level,
        "clip_skip": request.clip_skip,
        "resize": request.resize,
    }
    details |= {name: value for name, value in resolved.items() if value is not None}
    if latents.calls:
        details["calls"] = [list(pair) for pair in latents.calls]
    details |= {name: [_worn(use) for use in uses] for name, _, uses in adapters_of(request) if uses}
    if request.controlnets:
        details["controlnets"] = [_steered(use) for use in request.controlnets]
    return details


def _worn(use: AdapterInput) -> Json:
    return {"alias": use.checkpoint.alias, "digest": use.checkpoint.digest, "weight": use.weight}


def _steered(use: ControlNetInput) -> Json:
    steered: Json = {
        "alias": use.checkpoint.alias,
        "digest": use.checkpoint.digest,
        "annotator": use.annotator,
        "annotator_parameters": annotator_parameters(use),
        "controlnet_conditioning_scale": use.controlnet_conditioning_scale,
        "control_guidance_start": use.control_guidance_start,
        "control_guidance_end": use.control_guidance_end,
    }
    if use.annotator_checkpoint:
        steered["annotator_checkpoint"] = use.annotator_checkpoint.digest
    return steered
