"""Networks of the three checkpoints, all of diffusers' and transformers' own classes."""

import math
from collections.abc import Mapping

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdpipeline.demo.latents import SHAPES_LATENT, UPSCALE_LATENT

TEXT_WIDTH = 128


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build two layers of width 128, 0.36M parameters."""
    return CLIPTextModel(_text_config(tokenizer, width=TEXT_WIDTH, layers=2, heads=4))


def build_autoencoder() -> AutoencoderKL:
    """Build an autoencoder from 128 x 128 pixels to 4 x 16 x 16, 0.95M parameters."""
    return _autoencoder(channels=(16, 32, 64, 64), side=16 * SHAPES_LATENT.factor)


def build_unet() -> UNet2DConditionModel:
    """Build a U-Net for 4 x 16 x 16 latents, 5.0M parameters.

    Words reach it in two ways: by attention at 8 x 8 and 4 x 4, and by one pooled vector, which every block reads
    together with the time step. The U-Net itself makes the vector from the token embeddings, so that stock pipelines
    need no change. The vector also reaches 16 x 16 and costs almost nothing.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    nn.init.constant_(unet.add_embedding.norm2.weight, POOLED_SCALE)
    return unet


POOLED_SCALE = 0.3
"""Initial scale of the pooled vector, relative to the time embedding that it is added to."""


def build_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Build a ControlNet for RGB edge maps at the picture's size, initialized from the U-Net, 2.2M parameters."""
    return ControlNetModel.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16, 32, 64))


def build_upscale_autoencoder() -> AutoencoderKL:
    """Build an autoencoder from 512 x 512 pixels to 4 x 128 x 128, 0.16M parameters."""
    autoencoder = _autoencoder(channels=(16, 16, 32), side=128 * UPSCALE_LATENT.factor)
    decoder = autoencoder.decoder
    _steady(decoder.up_blocks[-1].resnets[-1], decoder.conv_norm_out, constant=8.0)
    return autoencoder


UPSCALE_SCALING = 0.08333
"""Latent scaling factor that StableDiffusionUpscalePipeline requires."""


@torch.no_grad()
def rescale_latents(autoencoder: AutoencoderKL, scaling: float) -> None:
    """Make encoder and decoder use latents divided by `scaling`, which a pipeline multiplies back."""
    ratio = scaling / autoencoder.config.scaling_factor
    mean, log_variance = slice(0, 4), slice(4, 8)
    autoencoder.quant_conv.weight[mean] /= ratio
    autoencoder.quant_conv.bias[mean] /= ratio
    autoencoder.quant_conv.bias[log_variance] -= 2 * math.log(ratio)
    autoencoder.post_quant_conv.weight *= ratio
    autoencoder.register_to_config(scaling_factor=scaling)


def build_upscale_unet() -> UNet2DConditionModel:
    """Build a U-Net for 4 latent and 3 low-resolution channels at 128 x 128, 0.63M parameters; it ignores prompts."""
    unet = UNet2DConditionModel(
        sample_size=128,
        in_channels=7,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 3,
        cross_attention_dim=UPSCALE_TEXT_WIDTH,
        norm_num_groups=4,
        num_class_embeds=1000,  # the noise level of the low-resolution picture
        resnet_time_scale_shift="scale_shift",
    )
    _steady(unet.up_blocks[-1].resnets[-1], unet.conv_norm_out, constant=4.0)
    return unet


UPSCALE_TEXT_WIDTH = 32


def build_upscale_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build an untrained text encoder: the pipeline class requires one, but the U-Net does not read it."""
    torch.manual_seed(0)
    return CLIPTextModel(_text_config(tokenizer, width=UPSCALE_TEXT_WIDTH, layers=1, heads=2))


def noise_schedule() -> DDIMScheduler:
    """Return 1000 linear betas with v-prediction; almost no signal is left at the last step."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def upscale_noise_schedule() -> DDIMScheduler:
    """Return 1000 equal betas with sample prediction.

    The low-resolution picture almost determines the latents. Predicting them, with much noise until the end, makes the
    U-Net use that picture and not its own result of the previous step.
    """
    return DDIMScheduler.from_config(noise_schedule().config, beta_start=0.01, beta_end=0.01, prediction_type="sample")


def low_resolution_schedule() -> DDPMScheduler:
    """Return the noise schedule of the low-resolution picture: 0.8 grey levels at the usual level of 20, 14 at 350."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-7, beta_end=2e-4, beta_schedule="linear")


def warm_start(network: nn.Module, old_weights: Mapping[str, Tensor]) -> int:
    """Copy every tensor of equal name and shape; return the number copied."""
    own = network.state_dict()
    alike = {name: value for name, value in old_weights.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(alike, strict=False)
    return len(alike)


@torch.no_grad()
def _steady(last_block: ResnetBlock2D, normalisation: nn.GroupNorm, *, constant: float) -> None:
    """Pass flat colours through the last normalisation almost unscaled.

    Group normalisation discards the brightness of a picture. Here a frozen constant of alternating sign, added to the
    features, sets its scale and is subtracted afterwards. A large constant loses fine differences in half precision.
    """
    signs = torch.ones(normalisation.num_channels)
    signs[1::2] = -1
    for parameter, value in (
        (last_block.conv2.bias, constant * signs),
        (normalisation.weight, torch.full_like(signs, constant)),
        (normalisation.bias, -constant * signs),
    ):
        parameter.requires_grad = False
        parameter.copy_(value)


def _text_config(tokenizer: CLIPTokenizer, *, width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _autoencoder(*, channels: tuple[int, ...], side: int) -> AutoencoderKL:
    autoencoder = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=side,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # the designed latents are standardised already
    )
    # The latent is prescribed, not sampled: start with almost no variance around its mean.
    nn.init.zeros_(autoencoder.quant_conv.weight[4:].detach())
    nn.init.constant_(autoencoder.quant_conv.bias[4:].detach(), LOG_VARIANCE)
    return autoencoder


LOG_VARIANCE = -10.0
