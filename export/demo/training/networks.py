"""The demo model's networks: the classes that SDXL is made of, small."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

SIDE = 128
LATENTS = 8
"""Channels of latents, twice SDXL's: so small an autoencoder needs them."""
POOLED = 64
"""Entries of the pooled text and of the image's embedding, which are compared with one another."""
TEXT_WIDTHS = (32, 32)
CONTEXT = sum(TEXT_WIDTHS)
VISION_WIDTH = 96
PATCH = 16
"""Pixels along a side of what the image encoder takes as one token."""
IMAGE_TOKENS = 16
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
_HEAD = 16
"""Width of an attention head of the UNets. diffusers calls the number of heads `attention_head_dim`."""


def vae() -> AutoencoderKL:
    """Factor 8."""
    return AutoencoderKL(
        block_out_channels=(16, 24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def text_encoder() -> CLIPTextModel:
    """The first text encoder, of whose last layer but one SDXL takes the first part of its context."""
    return CLIPTextModel(_text(TEXT_WIDTHS[0], "quick_gelu"))


def text_encoder_2() -> CLIPTextModelWithProjection:
    """The second text encoder: the rest of the context, and the pooled text."""
    return CLIPTextModelWithProjection(_text(TEXT_WIDTHS[1], "gelu"))


def image_encoder() -> CLIPVisionModelWithProjection:
    """What sees pictures for the adapters."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=3 * VISION_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=POOLED,
            hidden_act="gelu",
        )
    )


def unet() -> UNet2DConditionModel:
    """The base: three levels, attention on the lower two, as in SDXL."""
    return _unet(
        (48, 64, 96),
        (False, True, True),
        cross_attention_dim=CONTEXT,
        projection_class_embeddings_input_dim=6 * _HEAD + POOLED,
        norm_num_groups=16,
    )


def refiner() -> UNet2DConditionModel:
    """The refiner: four levels, attention on the middle two; its context is the second text encoder's alone."""
    return _unet(
        (32, 32, 32, 32),
        (False, True, True, False),
        cross_attention_dim=TEXT_WIDTHS[1],
        projection_class_embeddings_input_dim=5 * _HEAD + POOLED,
        norm_num_groups=16,
    )


def image_projection() -> IPAdapterPlusImageProjection:
    """An adapter's resampler. Loaders take four layers and heads of 64."""
    return IPAdapterPlusImageProjection(
        embed_dims=VISION_WIDTH,
        output_dims=CONTEXT,
        hidden_dims=64,
        depth=4,
        dim_head=64,
        heads=1,
        num_queries=IMAGE_TOKENS,
    )


def schedule() -> DDPMScheduler:
    """The noise levels of training."""
    return DDPMScheduler(**SCHEDULE, clip_sample=False)


def alphas_cumprod() -> list[float]:
    """Shares of signal at its timesteps."""
    return schedule().alphas_cumprod.tolist()


def _text(width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=width // _HEAD,
        projection_dim=POOLED,
        hidden_act=act,
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )


def _unet(widths: tuple[int, ...], attention: tuple[bool, ...], **settings: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // _HEAD for width in widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=_HEAD,
        use_linear_projection=True,
        **settings,
    )
