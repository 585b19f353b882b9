"""Engine on diffusers: batches of mixed requests, with every failure confined to its own request."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sdpipeline.domain import CheckpointRef, ControlNetInput, GenerationRequest, Json, Profile
from sdpipeline.engine import Batch, GeneratedImage, GenerationFailure, Pixels, PreparedRequest, safety
from sdpipeline.engine.annotators import known_annotator
from sdpipeline.engine.checkpoints import CheckpointFiles, read_ahead
from sdpipeline.engine.diffusers import patches
from sdpipeline.engine.diffusers.adapters import AdapterState, adapter_set, reference, refuse_unused, words
from sdpipeline.engine.diffusers.batch import Member, PassSettings, Reference, Weights, settings_of
from sdpipeline.engine.diffusers.decoding import Decoded, decode_checked
from sdpipeline.engine.diffusers.determinism import allow_exactness, exactly
from sdpipeline.engine.diffusers.foreign_errors import checkpoint_errors
from sdpipeline.engine.diffusers.loading import Form, Loaded, Variant
from sdpipeline.engine.diffusers.model_cache import ModelCache, TextEncoders, release
from sdpipeline.engine.diffusers.oom_fallback import FallbackLevel, OomFallback, Result
from sdpipeline.engine.diffusers.pipeline_call import denoise, latent_statistics, scheduler_of
from sdpipeline.engine.diffusers.preprocessing import annotator_parameters, given, pictures
from sdpipeline.engine.diffusers.record_details import details
from sdpipeline.engine.diffusers.request_validation import check
from sdpipeline.engine.diffusers.schedulers import recorded_scheduler
from sdpipeline.engine.diffusers.text import Embedding, EmbeddingCache, PromptEncoder
from sdpipeline.engine.families import FAMILIES, family
from sdpipeline.engine.gan import upscale
from sdpipeline.engine.model_annotators import annotate_with
from sdpipeline.engine.pixels import paste_back
from sdpipeline.engine.record import Setting, library_versions, ran
from sdpipeline.engine.union_controlnets import uses_union
from sdpipeline.engine.weighted_prompts import read
from sdpipeline.errors import BadPictureError, CheckpointError, DeviceExhaustedError, RequestRefusedError, SdpError

if TYPE_CHECKING:
    from sdpipeline.engine.stepwise import Stepwise

PROMPT_CACHE_BYTES = 256 * 2**20
ZEROS = "force_zeros_for_empty_prompt"
"""Configuration key of SDXL checkpoints for which no negative prompt differs from an empty one."""


class DiffusersEngine:
    """:class:`sdpipeline.engine.Engine` on one device. Call it from one thread only.

    ``shortcuts`` denoise pictures of other profiles than ``exact``; by default they are imported for the first one.
    """

    def __init__(
        self,
        *,
        device: str,
        dtype: str | None,
        locate: Callable[[CheckpointRef], CheckpointFiles],
        resident_bytes: int | None = None,
        shortcuts: Stepwise | None = None,
        text_encoders: TextEncoders | None = None,
    ) -> None:
        patches.check()
        allow_exactness()
        self._device = torch.device(device)
        self._dtype = dtype
        self._shortcuts = shortcuts
        self._libraries = library_versions()
        self._prompts = EmbeddingCache(PROMPT_CACHE_BYTES)
        self._adapters = AdapterState()
        self._text_encoders = text_encoders or TextEncoders()
        self.residency = ModelCache(
            device=self._device,
            dtype=self._dtype_of,
            locate=locate,
            budget_bytes=resident_bytes,
            text_encoders=self._text_encoders,
        )
        self._oom_fallback = OomFallback(
            forward=self._forward, free=lambda: release(self._device), free_more=self.residency.free_encoders
        )

    def generate(self, batch: Batch) -> Sequence[Result]:
        """Return one result per request, in order; see :class:`sdpipeline.engine.Engine`."""
        results: dict[int, Result] = {}
        groups: dict[PassSettings, list[Member]] = defaultdict(list)
        broken: dict[str, SdpError] = {}
        for index, prepared in enumerate(batch.requests):
            try:
                with exactly(wanted=prepared.request.exact):
                    weights = self._checked_weights(prepared, broken)
                    if weights.row.text == "none":
                        results[index] = self._upscaled(prepared, weights)
                        continue
                    member = self._member(index, prepared, weights)
                    settings = settings_of(member, weights)
                    scheduler_of(settings, weights)  # raises if it cannot be created; each pass creates its own
            except SdpError as error:
                results[index] = GenerationFailure(error=error)
            else:
                shortcuts = self._shortcuts_of(settings.profile)
                groups[shortcuts.shared(settings) if shortcuts else settings].append(member)
        self.residency.prompts_encoded()
        # Requests of one batch key make one group, unless their prompts differ in length by a whole chunk.
        for settings, members in groups.items():
            with exactly(wanted=settings.exact):
                for member, result in self._oom_fallback.run(settings, members, batch.bucket):
                    results[member.index] = result
        return [results[index] for index in range(len(batch.requests))]

    def prefetch_weights(self, ref: CheckpointRef) -> None:
        """Have the operating system read a checkpoint's files ahead of their load."""
        with suppress(CheckpointError):  # loading them reports what is wrong
            read_ahead(self.residency.files(ref))

    def flagged(self, checker: CheckpointRef, pictures: Sequence[Pixels]) -> Sequence[bool]:
        """See :class:`sdpipeline.engine.Engine`. The checker runs in float32, for which its thresholds were set."""
        try:
            with checkpoint_errors(f"safety checker {checker.alias!r} does not check the picture"):
                return safety.flagged(self.residency.get(checker, exact=True), pictures)
        except torch.OutOfMemoryError:
            pass
        release(self._device)
        raise DeviceExhaustedError(f"out of memory while safety checker {checker.alias!r} checked pictures")

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
            "speedups": self._shortcuts.speedups() if self._shortcuts else {},
            "text_encoders": {"offload": self._text_encoders.offload},
            "libraries": self._libraries | dict(self._shortcuts.libraries() if self._shortcuts else {}),
        }

    def _shortcuts_of(self, profile: Profile) -> Stepwise | None:
        """Return the shortcuts of a profile; ``None`` for ``exact``, which needs none of that code."""
        if profile == "exact":
            return None
        if self._shortcuts is None:
            from sdpipeline.engine.stepwise import Stepwise

            self._shortcuts = Stepwise()
        return self._shortcuts

    def _dtype_of(self, files: CheckpointFiles) -> torch.dtype:
        if self._dtype:
            return getattr(torch, self._dtype)  # type: ignore[no-any-return]
        row = FAMILIES.get(files.family)
        return getattr(torch, row.cuda_dtype if row and self._device.type == "cuda" else "float32")  # type: ignore[no-any-return]

    def _checked_weights(self, prepared: PreparedRequest, broken: dict[str, SdpError]) -> Weights:
        """Return the request's weights, or raise the error of the request or of a checkpoint.

        ``broken`` holds errors of bad checkpoints, so that none is loaded twice.
        """
        request = prepared.request
        check(request, self.residency.files, recorded=prepared.recorded is not None)
        return self._weights(request, broken)

    def _member(self, index: int, prepared: PreparedRequest, weights: Weights) -> Member:
        """Prepare a request to run, or raise the error of its pictures or prompts."""
        request = prepared.request
        seen = pictures(prepared, weights.cell, lambda use, pixels: self._control_map(request, use, pixels))
        with checkpoint_errors(f"checkpoint {request.checkpoint.alias!r} does not encode the prompt"):
            prompt, negative = self._embeddings(request, weights)
        references = tuple(
            _reference(loaded, given(prepared, f"ip_adapters.{n}")) for n, (loaded, _) in enumerate(weights.ip_adapters)
        )
        return Member(
            index=index,
            request=request,
            pictures=seen,
            prompt=prompt,
            negative=negative,
            references=references,
            calls=prepared.calls,
            scheduler_config=recorded_scheduler(prepared.recorded),
            latent_statistics=prepared.recorded is None or "latent_statistics" in prepared.recorded,
        )

    def _upscaled(self, prepared: PreparedRequest, weights: Weights) -> Result:
        """Upscale a picture with a GAN, alone, because its tiles fill the device."""
        request, files = prepared.request, weights.base.files
        image = pictures(prepared, weights.cell, _no_annotator).image
        assert image is not None
        network = weights.base.parts["upscaler"]
        free = partial(release, self._device)
        with checkpoint_errors(f"checkpoint {files.alias!r} does not enlarge the picture"):
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
                return self.residency.get(ref, keep=keep, exact=request.exact, variant=self._variant(request, ref))
            except (CheckpointError, DeviceExhaustedError) as error:
                if broken is not None:
                    broken[ref.digest] = error
                raise

        base = get(request.checkpoint)
        row = family(base.files.family)
        controlnets = [self.residency.files(use.checkpoint) for use in request.controlnets]
        cell = row.cell(request.task, controlnets=len(controlnets), union=uses_union(controlnets))
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

    def _variant(self, request: GenerationRequest, ref: CheckpointRef) -> Variant | None:
        """Return the variant of this checkpoint's denoiser that the request runs on; ``None`` for the plain one."""
        shortcuts = self._shortcuts_of(request.profile)
        return shortcuts.variant if shortcuts and ref == request.checkpoint else None

    def _forms(self, request: GenerationRequest) -> set[Form]:
        """Return the cache keys of the checkpoints that this request needs in memory together."""
        base = self._variant(request, request.checkpoint)
        plain: set[Form] = {(ref.digest, None) for ref in request.checkpoints() if ref != request.checkpoint}
        return plain | {(request.checkpoint.digest, base.name if base else None)}

    def _control_map(self, request: GenerationRequest, use: ControlNetInput, pixels: Pixels) -> Pixels:
        """Draw the control map of an annotator with weights."""
        learned = known_annotator(use.annotator).learned
        assert learned is not None
        assert use.annotator_checkpoint is not None
        loaded = self.residency.get(use.annotator_checkpoint, keep=self._forms(request), exact=request.exact)
        with checkpoint_errors(f"annotator {use.annotator_checkpoint.alias!r} draws no control map"):
            return annotate_with(loaded, learned, pixels, annotator_parameters(use))

    def _embeddings(self, request: GenerationRequest, weights: Weights) -> tuple[Embedding, Embedding | None]:
        """Return the embeddings of prompt and negative prompt, of equal length; the second only if guidance is on."""
        keep = self._forms(request)
        inversions = [
            self.residency.get(use.checkpoint, keep=keep, exact=request.exact) for use in request.textual_inversions
        ]
        texts = (request.prompt, request.negative_prompt)
        refuse_unused(inversions, *(read(text, request.prompt_syntax).text for text in texts))
        encoder = PromptEncoder(
            kind=weights.row.text,
            parts=weights.base.parts,
            words=words(inversions, weights.base.parts),
            syntax=request.prompt_syntax,
        )
        embedded = weights.guidance_embedding_dim is not None
        guided = weights.row.negative_prompt and request.guidance_scale > 1 and not embedded
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
        loras = adapter_set(weights).loras
        dtype = weights.base.dtype
        key = (
            request.checkpoint.digest,
            dtype,
            loras,
            inversions,
            text,
            request.prompt_syntax,
            length,
            request.clip_skip,
        )
        held = self._prompts.get(key)
        if held is None:
            self._adapters.apply(weights)
            self.residency.reload_encoders(weights.base, keep=self._forms(request))
            held = encoder.encode(text, length=length, clip_skip=request.clip_skip)
            self._prompts[key] = held
        return held

    def _forward(self, settings: PassSettings, members: Sequence[Member], level: FallbackLevel) -> list[Result]:
        """Run one forward pass and decode its latents."""
        weights = self._weights(members[0].request)
        self._adapters.apply(weights)
        shortcuts = self._shortcuts_of(settings.profile)
        run = shortcuts.denoise if shortcuts else denoise
        with self._saving_memory(weights, level) as offload_to, self._speedups(weights, settings):
            denoised = run(weights, settings, members, level.bucket, offload_to=offload_to)
            weights.autoencoder.to(self._device)
            decoded = [picture for batch in denoised.batches for picture in decode_checked(weights, settings, batch)]
        return [
            self._result(
                member,
                picture,
                self._setting(
                    weights,
                    latents.scheduler,
                    latents.values.dtype,
                    bucket=denoised.decode_batch,
                    profile=settings.profile,
                ),
                details(member, settings_of(member, weights), latents) | _latent_statistics(weights, settings),
                slot=n % denoised.decode_batch,
                level=level,
            )
            for n, (member, latents, picture) in enumerate(zip(members, denoised.latents, decoded, strict=False))
        ]

    def _speedups(self, weights: Weights, settings: PassSettings) -> AbstractContextManager[None]:
        """Apply the shortcuts' speedups to a pass, or suspend them for an exact one."""
        if shortcuts := self._shortcuts_of(settings.profile):
            return shortcuts.applied(weights)
        return self._shortcuts.suspended(weights) if self._shortcuts else nullcontext()

    @contextmanager
    def _saving_memory(self, weights: Weights, level: FallbackLevel) -> Iterator[torch.device | None]:
        """Apply the memory savings of this level to one pass; yield the device to offload to."""
        if level.offload:
            self.residency.drop(keep={loaded.form for loaded in weights.loaded()})
            self.residency.offload_encoders()
        if level.tiling:
            weights.autoencoder.enable_tiling()
        try:
            yield self._device if level.offload and self._device.type == "cuda" else None
        finally:
            if level.tiling:
                weights.autoencoder.disable_tiling()
            for network in weights.networks():
                network.to(self._device)

    def _result(
        self, member: Member, picture: Decoded, setting: Setting, details: Json, *, slot: int, level: FallbackLevel
    ) -> Result:
        request, seen = member.request, member.pictures
        if picture.pixels is None:
            return GenerationFailure(error=BadPictureError(f"the engine's picture is refused: {picture.fault}"))
        pixels = picture.pixels
        if seen.image is not None and seen.mask_image is not None:
            pixels = paste_back(pixels, seen.image, seen.mask_image)
            details["unmasked_pixels"] = "pasted back from the input"
        fallbacks = [*level.fallbacks(), *picture.fallbacks]
        record = ran(request, setting, slot=slot, fallbacks=fallbacks, details=details)
        return GeneratedImage(pixels=pixels, ran=record, control_maps=seen.control_maps)

    def _setting(
        self,
        weights: Weights,
        scheduler: Json,
        dtype: torch.dtype,
        *,
        bucket: int,
        profile: Profile = "exact",
    ) -> Setting:
        shortcuts = self._shortcuts_of(profile)
        return Setting(
            engine="diffusers",
            family=weights.row.name,
            pipeline=weights.cell.pipeline,
            scheduler=scheduler,
            device=self._device.type,
            dtype=str(dtype).removeprefix("torch."),
            bucket=bucket,
            shortcuts=shortcuts.document(profile) if shortcuts else {},
            libraries=self._libraries | dict(shortcuts.libraries() if shortcuts else {}),
        )


def _reference(loaded: Loaded, pixels: Pixels) -> Reference:
    with checkpoint_errors(f"IP-Adapter {loaded.files.alias!r} does not encode its picture"):
        return reference(loaded, pixels)


def _latent_statistics(weights: Weights, settings: PassSettings) -> Json:
    """Return the record's field for the statistics with which the latents were decoded, if there were any."""
    statistics = latent_statistics(weights.autoencoder, wanted=settings.latent_statistics)
    return {"latent_statistics": dict(zip(("mean", "std"), statistics, strict=True))} if statistics else {}


def _no_annotator(use: ControlNetInput, _: Pixels) -> Pixels:
    raise RequestRefusedError(f"controlnets: annotator {use.annotator!r} has nothing to steer here")
