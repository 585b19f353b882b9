"""Pydantic models of one stage: its input pictures, ControlNets, adapters, output and quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from sdpipeline.campaigns.parameters import Parameters
from sdpipeline.campaigns.seeds import Seeds
from sdpipeline.campaigns.spec_part import Name, Number, Scalar, SpecPart
from sdpipeline.campaigns.yaml_source import KeyPath
from sdpipeline.domain import Profile, PromptSyntax, Reproducibility, Task


class ImageSpec(SpecPart):
    """A picture from an earlier stage, from a file next to the campaign, or from a bucket."""

    stage: str | None = None
    """Id of an earlier stage; its picture of the same row, combination and seed is used."""
    file: str | None = None
    """A picture next to this file; a template."""
    url: str | None = None
    """A picture in a bucket, as in `s3://bucket/key`; a template."""


class ControlNetSpec(SpecPart):
    """One ControlNet and its conditioning picture."""

    checkpoint: str
    """Alias of a ControlNet."""
    image: ImageSpec
    """The conditioning picture."""
    annotator: str = "none"
    """Annotator that turns the picture into a control map; `none` uses the picture as the map."""
    annotator_parameters: dict[str, Scalar] = Field(default_factory=dict)
    """The annotator's own parameters."""
    annotator_checkpoint: str | None = None
    """Alias of the weights of a learned annotator."""
    control_mode: int | str | None = None
    """Kind of the control map, by name or number; needed by a union ControlNet, and refused by others."""
    controlnet_conditioning_scale: Number = 1.0
    """How strongly the ControlNet steers."""
    control_guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the steps after which the ControlNet starts."""
    control_guidance_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the steps after which the ControlNet stops."""


class LoraSpec(SpecPart):
    """A LoRA and its weight."""

    checkpoint: str
    """Alias of a LoRA."""
    weight: Number = 1.0
    """Strength of the adapter."""


class TextualInversionSpec(SpecPart):
    """A textual inversion: a learned word that prompts write as ``<alias>``."""

    checkpoint: str
    """Alias of a textual inversion; prompts write `<alias>`."""


class IPAdapterSpec(SpecPart):
    """An IP-Adapter, its reference picture and its weight."""

    checkpoint: str
    """Alias of an IP-Adapter."""
    image: ImageSpec
    """The reference picture, of any size."""
    weight: Number = 1.0
    """Strength of the adapter."""


AdapterSpec = LoraSpec | TextualInversionSpec | IPAdapterSpec


class OutputSpec(SpecPart):
    """Encoding of pictures."""

    format: Literal["png", "jpeg", "webp"] = "png"
    """File format; png is lossless."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Quality of a jpeg or webp."""
    metadata: Literal["embedded+sidecar"] = "embedded+sidecar"
    """Places where a picture's provenance record is kept."""


class Quality(SpecPart):
    """Minimum quality scores; black, flat or non-finite pictures are always refused, without a threshold."""

    min_sharpness: Annotated[float, Field(ge=0)] | None = None
    """Minimum sharpness."""
    min_edge_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Minimum share of the control map's edges that the picture reproduces."""


class Stage(Parameters):
    """One step of the chain: one picture per row, variable combination and seed."""

    id: Name
    """Name that later stages refer to."""
    task: Annotated[Task, Field(strict=False)]
    checkpoint: str | None = None
    """Alias of this stage's weights; default the campaign's."""
    prompt: str = ""
    """The prompt; a template. Values from a table are data, never templates."""
    seed: Literal["same"] | None = None
    """`same` uses the root seed instead of one derived for this stage."""
    seeds: Seeds | None = None
    """This stage's own noise seeds: one picture for each."""
    image: ImageSpec | None = None
    """The input picture, to edit or to upscale."""
    mask_image: ImageSpec | None = None
    """Inpainting mask: white areas are repainted."""
    controlnets: list[ControlNetSpec] = Field(default_factory=list)
    """ControlNets that steer this stage together."""
    loras: list[LoraSpec] = Field(default_factory=list)
    """LoRAs applied together."""
    textual_inversions: list[TextualInversionSpec] = Field(default_factory=list)
    """Textual inversions that prompts may use."""
    ip_adapters: list[IPAdapterSpec] = Field(default_factory=list)
    """IP-Adapters with their reference pictures."""
    vae: str | None = None
    """Alias of an autoencoder that replaces the checkpoint's own for decoding."""
    reproducibility: Reproducibility | None = None
    """How exactly this stage's pictures must be reproducible; default the campaign's."""
    profile: Profile | None = None
    """Speed profile of this stage; default the campaign's."""
    prompt_syntax: PromptSyntax | None = None
    """Syntax of this stage's prompts; default the campaign's."""
    output: OutputSpec | None = None
    """Encoding of this stage's pictures; default the campaign's."""
    quality: Quality | None = None
    """Minimum quality scores of this stage; default the campaign's."""

    def images(self) -> list[tuple[KeyPath, ImageSpec]]:
        """Return every picture the stage consumes, with its place inside the stage."""
        named: list[tuple[KeyPath, ImageSpec | None]] = [(("image",), self.image), (("mask_image",), self.mask_image)]
        named += [(("controlnets", n, "image"), use.image) for n, use in enumerate(self.controlnets)]
        named += [(("ip_adapters", n, "image"), use.image) for n, use in enumerate(self.ip_adapters)]
        return [(place, image) for place, image in named if image is not None]

    def sized_images(self) -> list[KeyPath]:
        """Return the places of pictures that must have the stage's size; an IP-Adapter takes any size."""
        return [place for place, _ in self.images() if place[0] != "ip_adapters"]

    def adapters(self) -> list[tuple[KeyPath, AdapterSpec]]:
        """Return every adapter of the stage, with its place inside the stage."""
        adapters: dict[str, Sequence[AdapterSpec]] = {
            "loras": self.loras,
            "textual_inversions": self.textual_inversions,
            "ip_adapters": self.ip_adapters,
        }
        return [((key, n), use) for key, uses in adapters.items() for n, use in enumerate(uses)]

    def aliases(self) -> list[str]:
        """Return every checkpoint the stage names itself."""
        own = [self.checkpoint, self.vae, *(use.checkpoint for use in self.controlnets)]
        own += [use.checkpoint for _, use in self.adapters()]
        return [alias for alias in [*own, *(use.annotator_checkpoint for use in self.controlnets)] if alias]

    def parents(self) -> list[str]:
        """Return the stages whose pictures this stage consumes, each once."""
        return list(dict.fromkeys(image.stage for _, image in self.images() if image.stage))
