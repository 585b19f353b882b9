"""Stages 2 and 3: train the text encoder on captions, then text encoder and U-Net together, on designed latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from sdpipeline.demo.captions import FACETS, UNSAID
from sdpipeline.demo.corpus import WORDINGS, Corpus
from sdpipeline.demo.networks import POOLED_SCALE, build_text_encoder, build_unet, noise_schedule
from sdpipeline.demo.train.loop import Budget, Pace, Run, fit


class TextToLatents(nn.Module):
    """Text encoder, U-Net, and the readers of its pooled vector, which only training needs."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        width = unet.add_embedding.norm2.normalized_shape[0]
        self.readers = nn.ModuleList(nn.Linear(width, len(values)) for values in FACETS.values())

    @classmethod
    def build(cls, tokenizer: CLIPTokenizer) -> Self:
        """Build untrained networks."""
        return cls(build_text_encoder(tokenizer), build_unet())

    def attend_plainly(self) -> None:
        """Use attention as two matrix products: torch's fused CPU kernel takes several times as long backwards."""
        self.text_encoder.set_attn_implementation("eager")
        self.unet.set_attn_processor(AttnProcessor())

    @classmethod
    def load(cls, run: Run) -> Self:
        """Load the networks of the previous stage."""
        text_encoder = CLIPTextModel.from_pretrained(run.network_dir("text_encoder"))
        loaded = cls(text_encoder, UNet2DConditionModel.from_pretrained(run.network_dir("unet")))
        loaded.readers.load_state_dict(load_file(_readers_file(run)))
        return loaded

    def save(self, run: Run) -> None:
        """Save the networks for the next stage."""
        self.text_encoder.save_pretrained(run.network_dir("text_encoder"))
        self.unet.save_pretrained(run.network_dir("unet"))
        save_file(self.readers.state_dict(), _readers_file(run))

    def reading_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the caption's facets as read from the pooled vector, summed over facets."""
        pooled = self.unet.add_embedding(embeddings) / POOLED_SCALE
        losses = [
            # A mean over no labels would be undefined, so at least one counts as zero.
            functional.cross_entropy(reader(pooled).float(), label, ignore_index=UNSAID, reduction="sum")
            / (label != UNSAID).sum().clamp(min=1)
            for reader, label in zip(self.readers, labels.long().unbind(1), strict=True)
        ]
        return torch.stack(losses).sum()


def train_words(networks: TextToLatents, corpus: Corpus, *, run: Run, budget: Budget, batch: int) -> list[float]:
    """Train text encoder and pooling to read captions, before any picture is involved."""
    if run.device.type == "cpu":
        networks.attend_plainly()

    def loss(_progress: float) -> Tensor:
        chosen = torch.randint(len(corpus), (batch,), device=run.device)
        tokens, labels = _wordings(corpus, chosen)
        return networks.reading_loss(networks.text_encoder(tokens)[0], labels)

    pooling = networks.unet.add_embedding
    trained = [*networks.text_encoder.parameters(), *pooling.parameters(), *networks.readers.parameters()]
    return fit(networks, loss, stage="words", run=run, budget=budget, pace=Pace(learning_rate=1e-3), parameters=trained)


def train_unet(
    networks: TextToLatents, corpus: Corpus, *, run: Run, budget: Budget, batch: int, ema_decay: float
) -> list[float]:
    """Train all networks together: predict the velocity of noised latents from the caption."""
    signal = noise_schedule().alphas_cumprod.to(run.device)
    if run.device.type == "cpu":
        networks.attend_plainly()

    def loss(_progress: float) -> Tensor:
        chosen = torch.randint(len(corpus), (batch,), device=run.device)
        tokens, labels = _wordings(corpus, chosen)
        latents = corpus.latents[chosen].float()
        timesteps = _timesteps(batch, run.device)
        noised, velocity = diffuse(latents, signal[timesteps])
        embeddings = networks.text_encoder(tokens)[0]
        predicted = networks.unet(noised, timesteps, embeddings).sample.float()
        error = velocity_loss(predicted, velocity, latents)
        return error + 0.02 * networks.reading_loss(embeddings, labels)

    return fit(networks, loss, stage="unet", run=run, budget=budget, pace=Pace(learning_rate=1e-3, ema_decay=ema_decay))


def diffuse(latents: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Return noised latents and their velocity (Salimans & Ho 2022), at `signal` = alphas_cumprod."""
    kept, added = (share.sqrt().view(-1, 1, 1, 1) for share in (signal, 1 - signal))
    noise = torch.randn_like(latents)
    return kept * latents + added * noise, kept * noise - added * latents


def velocity_loss(predicted: Tensor, velocity: Tensor, latents: Tensor) -> Tensor:
    """Return the squared error, with objects and their rims weighted four times: most of a scene is ground."""
    weight = 1 + 3 * near_objects(latents)
    return ((predicted - velocity).square() * weight).mean() / weight.mean()


def near_objects(latents: Tensor) -> Tensor:
    """Return (batch, 1, h, w): 1 in cells that differ from the scene's usual cell, and in their neighbours."""
    usual = latents.flatten(2).median(-1).values[:, :, None, None]
    different = ((latents - usual).abs().amax(1, keepdim=True) > 0.4).float()
    return functional.max_pool2d(different, 3, stride=1, padding=1)


def load_weights(directory: Path) -> Mapping[str, Tensor]:
    """Load the only safetensors file in a network's directory, as float32."""
    (file,) = directory.glob("*.safetensors")
    return {name: value.float() for name, value in load_file(file).items()}


def _readers_file(run: Run) -> Path:
    return run.network_dir("readers.safetensors")


def _wordings(corpus: Corpus, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and labels of one wording each, never the last one, which omits the layout."""
    wording = torch.randint(WORDINGS - 1, chosen.shape, device=chosen.device)
    return corpus.tokens[chosen, wording].long(), corpus.labels[chosen, wording]


def _timesteps(batch: int, device: torch.device) -> Tensor:
    """Sample mostly from the middle, which decides the shapes; three in ten from anywhere."""
    anywhere, middle = torch.rand(batch, device=device), torch.randn(batch, device=device).sigmoid()
    share = torch.where(torch.rand(batch, device=device) < 0.3, anywhere, middle)
    return (share * 1000).long().clamp(max=999)
