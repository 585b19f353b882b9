"""Stage 4: train the edge ControlNet, with frozen text encoder and U-Net."""

import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from sdpipeline.demo.corpus import WORDINGS, Corpus
from sdpipeline.demo.networks import noise_schedule
from sdpipeline.demo.train.loop import Budget, Pace, Run, fit
from sdpipeline.demo.train.text_to_latents import TextToLatents, diffuse, velocity_loss


def train_controlnet(
    controlnet: ControlNetModel,
    networks: TextToLatents,
    corpus: Corpus,
    *,
    run: Run,
    budget: Budget,
    batch: int,
) -> list[float]:
    """Train with half of the captions silent about the layout, so that the edges have to supply it."""
    signal = noise_schedule().alphas_cumprod.to(run.device)
    networks.to(run.device).eval().requires_grad_(False)
    if run.device.type == "cpu":
        networks.attend_plainly()
        controlnet.set_attn_processor(AttnProcessor())

    def loss(_progress: float) -> Tensor:
        chosen = torch.randint(len(corpus), (batch,), device=run.device)
        latents = corpus.latents[chosen].float()
        edge_maps = corpus.edge_maps(chosen)
        # Slightly more high-noise timesteps, which decide the layout.
        timesteps = (torch.rand(batch, device=run.device).pow(0.75) * 1000).long().clamp(max=999)
        noised, velocity = diffuse(latents, signal[timesteps])
        with torch.no_grad():
            embeddings = networks.text_encoder(_mostly_silent(corpus, chosen))[0]
        down, middle = controlnet(noised, timesteps, embeddings, controlnet_cond=edge_maps, return_dict=False)
        predicted = networks.unet(
            noised,
            timesteps,
            embeddings,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample.float()
        return velocity_loss(predicted, velocity, latents)

    return fit(
        controlnet, loss, stage="controlnet", run=run, budget=budget, pace=Pace(learning_rate=8e-4, ema_decay=0.995)
    )


def _mostly_silent(corpus: Corpus, chosen: Tensor) -> Tensor:
    wording = torch.randint(WORDINGS - 1, chosen.shape, device=chosen.device)
    silent = torch.rand(chosen.shape, device=chosen.device) < 0.5
    return corpus.tokens[chosen, torch.where(silent, WORDINGS - 1, wording)].long()
