"""Train the demo's checkpoints, one stage or all of them."""

import argparse
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from sdpipeline.demo.corpus import SIDE, UPSCALED_SIDE, Corpus, load_pictures, save_corpus
from sdpipeline.demo.latents import SHAPES_LATENT, UPSCALE_LATENT
from sdpipeline.demo.networks import (
    UPSCALE_SCALING,
    build_autoencoder,
    build_controlnet,
    build_upscale_autoencoder,
    build_upscale_unet,
    rescale_latents,
    warm_start,
)
from sdpipeline.demo.tokens import build_tokenizer
from sdpipeline.demo.train.assemble import assemble
from sdpipeline.demo.train.autoencoder import train_autoencoder
from sdpipeline.demo.train.controlnet import train_controlnet
from sdpipeline.demo.train.loop import Budget, Run
from sdpipeline.demo.train.recipe import CPU_RECIPE, GPU_RECIPE, STAGES, Recipe
from sdpipeline.demo.train.text_to_latents import TextToLatents, load_weights, train_unet, train_words
from sdpipeline.demo.train.upscale import train_upscale_unet


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    training = Training(
        run=Run(directory=options.out, device=device, seed=options.seed, resume=options.resume),
        recipe=CPU_RECIPE if device.type == "cpu" else GPU_RECIPE,
        warm=options.warm,
        seconds=options.seconds,
        steps=options.steps,
    )
    for stage in STAGES if "all" in options.stages else options.stages:
        training.train(stage)


@dataclass(frozen=True, kw_only=True)
class Training:
    """All stages over one directory; each saves its networks there for later ones."""

    run: Run
    recipe: Recipe
    warm: Path | None = None
    """Checkpoints to start from: a directory that holds `shapes`, `shapes-canny`, …"""
    seconds: float | None = None
    steps: int | None = None

    def train(self, stage: str) -> list[float]:
        """Run one stage; return its losses, none for `assemble`."""
        torch.manual_seed(self.run.seed)  # for the initial weights
        return {
            "autoencoder": self._autoencoder,
            "words": self._words,
            "unet": self._unet,
            "controlnet": self._controlnet,
            "upscale": self._upscale,
            "assemble": self._assemble,
        }[stage]()

    def _autoencoder(self) -> list[float]:
        """Train the autoencoder from pixels to designed latents and back."""
        autoencoder = build_autoencoder()
        self._warm_start(autoencoder, "shapes/vae")
        small = torch.cat([_shrunk(part) for part in self._pictures.split(128)])
        losses = train_autoencoder(
            autoencoder, small, SHAPES_LATENT, stage="autoencoder", latent_noise=0.15, **self._fitting("autoencoder")
        )
        autoencoder.save_pretrained(self.run.network_dir("autoencoder"))
        return losses

    def _words(self) -> list[float]:
        """Train the text encoder on captions alone, as its start."""
        networks = TextToLatents.build(build_tokenizer())
        self._warm_start(networks.text_encoder, "shapes/text_encoder")
        self._warm_start(networks.unet, "shapes/unet")
        losses = train_words(networks, self._corpus, **self._fitting("words"))
        networks.save(self.run)
        return losses

    def _unet(self) -> list[float]:
        """Train text encoder and U-Net."""
        networks = TextToLatents.load(self.run)
        decay = self.recipe.unet_ema_decay
        losses = train_unet(networks, self._corpus, ema_decay=decay, **self._fitting("unet"))
        networks.save(self.run)
        return losses

    def _controlnet(self) -> list[float]:
        """Train the edge ControlNet."""
        networks = TextToLatents.load(self.run)
        controlnet = build_controlnet(networks.unet)
        self._warm_start(controlnet, "shapes-canny")
        losses = train_controlnet(controlnet, networks, self._corpus, **self._fitting("controlnet"))
        controlnet.save_pretrained(self.run.network_dir("controlnet"))
        return losses

    def _upscale(self) -> list[float]:
        """Train the upscaler's autoencoder, then its U-Net; return the losses of the U-Net."""
        autoencoder, unet = build_upscale_autoencoder(), build_upscale_unet()
        autoencoder.register_to_config(scaling_factor=UPSCALE_SCALING)
        self._warm_start(autoencoder, "shapes-upscale/vae")
        rescale_latents(autoencoder, 1.0)
        self._warm_start(unet, "shapes-upscale/unet")
        stage = "upscale_autoencoder"
        train_autoencoder(
            autoencoder, self._pictures, UPSCALE_LATENT, stage=stage, latent_noise=0.05, **self._fitting(stage)
        )
        autoencoder.save_pretrained(self.run.network_dir(stage))
        shapes_autoencoder = AutoencoderKL.from_pretrained(self.run.network_dir("autoencoder"))
        losses = train_upscale_unet(unet, shapes_autoencoder, self._pictures, **self._fitting("upscale"))
        unet.save_pretrained(self.run.network_dir("upscale_unet"))
        return losses

    def _assemble(self) -> list[float]:
        """Write the three checkpoint directories."""
        assemble(self.run)
        return []

    @cached_property
    def _corpus(self) -> Corpus:
        path = self.run.directory / "corpus.npz"
        if not path.exists():
            save_corpus(
                path,
                scenes=self.recipe.scenes,
                kinds=self.recipe.kinds,
                seed=self.run.seed,
                workers=_cores(),
            )
        return Corpus.load(path, self.run.device)

    @cached_property
    def _pictures(self) -> Tensor:
        return load_pictures(
            self.run.directory / "pictures.npy",
            pictures=self.recipe.pictures,
            seed=self.run.seed + 1,
            workers=_cores(),
            device=self.run.device,
        )

    def _fitting(self, stage: str) -> "Fitting":
        seconds = self.recipe.seconds[stage] if self.seconds is None else self.seconds
        budget = Budget(seconds=seconds, steps=self.steps)
        return {"run": self.run, "budget": budget, "batch": self.recipe.batch[stage]}

    def _warm_start(self, network: nn.Module, name: str) -> None:
        if self.warm is not None and (self.warm / name).is_dir():
            copied = warm_start(network, load_weights(self.warm / name))
            print(f"{name}: {copied} of {len(network.state_dict())} tensors from {self.warm}")


class Fitting(TypedDict):
    """Arguments that all stages share."""

    run: Run
    budget: Budget
    batch: int


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdpipeline.demo.train", description=__doc__)
    parser.add_argument(
        "stages", nargs="+", choices=("all", *STAGES), metavar="STAGE", help=f"all, or {', '.join(STAGES)}"
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-training"), metavar="DIR")
    parser.add_argument("--warm", type=Path, metavar="DIR", help="start from the checkpoints in DIR")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted stage stopped")
    parser.add_argument("--seconds", type=float, help="per stage, instead of the recipe's")
    parser.add_argument("--steps", type=int, help="per stage, instead of seconds: the same on every machine")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _shrunk(pictures: Tensor) -> Tensor:
    return functional.avg_pool2d(pictures.float(), UPSCALED_SIDE // SIDE).round().to(torch.uint8)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
