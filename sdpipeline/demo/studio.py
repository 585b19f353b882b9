"""Demo checkpoints in diffusers' stock pipelines, for evaluation and tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image

from sdpipeline.demo.manifest import CHECKPOINTS
from sdpipeline.demo.scenes import Picture
from sdpipeline.engine.quality import Mask


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Makes pictures with the shipped weights, in float32, with DPM-Solver++ and 20 steps."""

    checkpoints: Path = CHECKPOINTS
    device: str = "cpu"
    batch: int = 16
    num_inference_steps: int = 20
    guidance_scale: float = 4.0

    def draw(self, prompts: Sequence[str], *, seed: int) -> list[Picture]:
        """Generate from text."""
        return self._make(self._text, prompts, seed=seed)

    def follow(self, prompts: Sequence[str], edge_maps: Sequence[Mask], *, seed: int) -> list[Picture]:
        """Generate from text and edge maps."""
        images = [to_image(np.repeat(edges[..., None] * np.uint8(255), 3, 2)) for edges in edge_maps]
        return self._make(self._controlled, prompts, seed=seed, image=images)

    def change(
        self, prompts: Sequence[str], pictures: Sequence[Picture], *, strength: float, seed: int
    ) -> list[Picture]:
        """Generate from text and a picture (image to image)."""
        images = [to_image(picture) for picture in pictures]
        return self._make(self._img2img, prompts, seed=seed, image=images, strength=strength)

    def fill(
        self, prompts: Sequence[str], pictures: Sequence[Picture], holes: Sequence[Mask], *, seed: int
    ) -> list[Picture]:
        """Inpaint where `holes` is true."""
        images = [to_image(picture) for picture in pictures]
        masks = [Image.fromarray(hole.astype(np.uint8) * 255) for hole in holes]
        return self._make(self._inpaint, prompts, seed=seed, image=images, mask_image=masks, strength=1.0)

    def upscale(self, prompts: Sequence[str], pictures: Sequence[Picture], *, seed: int) -> list[Picture]:
        """Upscale by four, in four steps and without guidance: more steps change nothing."""
        images = [to_image(picture) for picture in pictures]
        return replace(self, num_inference_steps=4, guidance_scale=1.0)._make(
            self._upscaler, prompts, seed=seed, image=images
        )

    def round_trip(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Encode and decode with the autoencoder."""
        vae, processor = self._text.vae, self._text.image_processor
        pixels = processor.preprocess([to_image(picture) for picture in pictures]).to(self.device)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        return [to_picture(image) for image in processor.postprocess(decoded)]

    def _make(self, pipe: DiffusionPipeline, prompts: Sequence[str], *, seed: int, **inputs: Any) -> list[Picture]:
        """Make one picture per prompt, each from its own seed; lists among `inputs` are split with the prompts."""
        made: list[Picture] = []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            own = {name: value[part] if isinstance(value, list) else value for name, value in inputs.items()}
            texts = list(prompts[part])
            images = pipe(
                prompt=texts,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))],
                **own,
            ).images
            made += [to_picture(image) for image in images]
        return made

    @cached_property
    def _text(self) -> StableDiffusionPipeline:
        return self._prepared(StableDiffusionPipeline.from_pretrained(self.checkpoints / "shapes", **_LOADING))

    @cached_property
    def _controlled(self) -> StableDiffusionControlNetPipeline:
        controlnet = ControlNetModel.from_pretrained(self.checkpoints / "shapes-canny", **_SAFELY)
        return self._sharing(StableDiffusionControlNetPipeline, controlnet=controlnet)

    @cached_property
    def _img2img(self) -> StableDiffusionImg2ImgPipeline:
        return self._sharing(StableDiffusionImg2ImgPipeline)

    @cached_property
    def _inpaint(self) -> StableDiffusionInpaintPipeline:
        return self._sharing(StableDiffusionInpaintPipeline)

    @cached_property
    def _upscaler(self) -> StableDiffusionUpscalePipeline:
        directory = self.checkpoints / "shapes-upscale"
        return self._prepared(StableDiffusionUpscalePipeline.from_pretrained(directory, **_SAFELY))

    def _sharing(self, pipeline_class: type[DiffusionPipeline], **more: Any) -> Any:
        """Build a second pipeline over the same weights, with its own scheduler."""
        return self._prepared(pipeline_class(**self._text.components, **more, requires_safety_checker=False))

    def _prepared(self, pipe: Any) -> Any:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)


def to_image(picture: Picture) -> Image.Image:
    """Convert a picture for the pipelines."""
    return Image.fromarray(picture)


def to_picture(image: Image.Image) -> Picture:
    """Convert a pipeline's image for the measures."""
    return np.asarray(image.convert("RGB"), np.uint8)


_SAFELY: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
_LOADING: dict[str, Any] = _SAFELY | {"safety_checker": None}
