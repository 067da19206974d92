"""Small random checkpoints of different shape in diffusers layout, to test and demonstrate with."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from export import tiny_adapters, tokens
from export.errors import ExportError
from export.initial import initialise
from export.tiny_adapters import ADAPTERS

_MERGES = 240
_TIME_DIM = 8


@dataclass(frozen=True)
class Text:
    """A text encoder's sizes; `projection` makes it the one with a pooled output."""

    width: int
    layers: int
    heads: int
    act: str
    projection: int | None = None
    eos: int | None = 2
    positions: int = 77
    half: bool = False


@dataclass(frozen=True)
class Tiny:
    """One checkpoint. `unet` and `vae` are passed to the diffusers classes."""

    seed: int
    encoders: dict[str, Text]
    unet: dict
    vae: dict
    refiner: bool = False
    half: bool = False
    shard: str | None = None
    scheduler: dict = field(default_factory=dict)


def _unet(widths: list[int], attention: list[bool], **settings: object) -> dict:
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention]
    up = ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)]
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, **settings}


def _vae(widths: list[int], **settings: object) -> dict:
    n = len(widths)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    return {"block_out_channels": widths, **kinds, **settings}


_ALPHA_VAE = _vae([8, 8, 16, 16], layers_per_block=1, norm_num_groups=4, sample_size=128, scaling_factor=0.13025)

_ALPHA = Tiny(
    seed=11,
    encoders={
        "text_encoder": Text(16, 3, 2, "quick_gelu"),
        "text_encoder_2": Text(24, 2, 3, "gelu", projection=20),
    },
    unet=_unet(
        [8, 16, 24],
        [False, True, True],
        attention_head_dim=[1, 2, 3],
        transformer_layers_per_block=[1, 2, 1],
        use_linear_projection=True,
        norm_num_groups=4,
        sample_size=16,
    ),
    vae=_ALPHA_VAE,
)

_REFINER = Tiny(
    seed=12,
    encoders={"text_encoder_2": Text(32, 3, 4, "gelu", projection=28)},
    unet=_unet(
        [8, 16, 16, 24],
        [False, True, True, False],
        attention_head_dim=[2, 4, 4, 6],
        transformer_layers_per_block=1,
        use_linear_projection=True,
        norm_num_groups=8,
        sample_size=16,
    ),
    vae=_ALPHA_VAE,
    refiner=True,
)

CHECKPOINTS: dict[str, Tiny] = {
    "alpha": _ALPHA,
    "alpha-refiner": _REFINER,
    "beta": Tiny(
        seed=21,
        encoders={
            "text_encoder": Text(20, 2, 5, "gelu", eos=None, positions=40),
            "text_encoder_2": Text(12, 3, 2, "quick_gelu", projection=36, eos=None, positions=40),
        },
        unet=_unet(
            [16, 24],
            [True, True],
            attention_head_dim=2,
            layers_per_block=1,
            use_linear_projection=False,
            norm_num_groups=8,
            sample_size=24,
            in_channels=6,
            out_channels=6,
        ),
        vae=_vae(
            [8, 16, 24],
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=6,
            sample_size=96,
            scaling_factor=0.5,
        ),
        scheduler={"timestep_spacing": "trailing"},
    ),
    "gamma": Tiny(
        seed=31,
        encoders={"text_encoder_2": Text(40, 3, 5, "gelu", projection=16, half=True)},
        unet=_unet(
            [8, 16, 24, 24],
            [False, True, True, False],
            attention_head_dim=[1, 2, 4, 2],
            transformer_layers_per_block=[1, 1, 2, 1],
            layers_per_block=1,
            use_linear_projection=True,
            norm_num_groups=2,
            sample_size=20,
        ),
        vae=_vae(
            [8, 16],
            layers_per_block=2,
            norm_num_groups=4,
            sample_size=40,
            use_quant_conv=False,
            latents_mean=[0.1, -0.2, 0.3, 0.05],
            latents_std=[1.1, 0.9, 1.2, 0.8],
        ),
        shard="150KB",
    ),
    "tiny": replace(_ALPHA, seed=41, half=True),
    "tiny-refiner": replace(_REFINER, seed=42, half=True),
}

_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    # Keys of other classes, which they take over from SDXL's file. Without `clip_sample`, DDIM would clip to -1..1.
    "clip_sample": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}


def write(name: str, out: Path) -> None:
    """Writes the checkpoint or the adapters `name` into the folder `out`, which must be empty or absent."""
    if name not in CHECKPOINTS and name not in ADAPTERS:
        raise ExportError(f"tiny checkpoint {name!r} is unknown; allowed: {', '.join((*CHECKPOINTS, *ADAPTERS))}")
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"--out {out}: exists and is not empty; name a new folder")
    try:
        if name in ADAPTERS:
            model = CHECKPOINTS[name.removesuffix("-adapters")]
            tiny_adapters.write(ADAPTERS[name], _denoiser(model), model.half, out)
        else:
            _write(CHECKPOINTS[name], out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1024:.0f} KiB")


def write_variant(name: str, seed: int, scheduler: dict, out: Path) -> None:
    """Writes the checkpoint `name` with other weights in its UNet and other keys in its scheduler's config."""
    write(name, out)
    model = CHECKPOINTS[name]
    torch.manual_seed(seed)
    _save(_denoiser(model), out / "unet", model.half, model.shard)
    _save_scheduler({**model.scheduler, **scheduler}, out / "scheduler")


def _write(tiny: Tiny, out: Path) -> None:
    torch.manual_seed(tiny.seed)
    merges = tokens.learn(_MERGES)
    index: dict[str, object] = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if tiny.refiner else "StableDiffusionXLPipeline"
    }
    for component, tokenizer, pad in (
        ("text_encoder", "tokenizer", tokens.END),
        ("text_encoder_2", "tokenizer_2", "!"),
    ):
        text = tiny.encoders.get(component)
        if text is None:
            index[component], index[tokenizer] = [None, None], [None, None]
            continue
        tokens.save(out / tokenizer, merges, pad, text.positions)
        net = _text_encoder(text, tokens.vocabulary(merges))
        _save(net, out / component, tiny.half or text.half)
        index[component], index[tokenizer] = ["transformers", type(net).__name__], ["transformers", "CLIPTokenizer"]
    _save(_denoiser(tiny), out / "unet", tiny.half, tiny.shard)
    autoencoder = diffusers.AutoencoderKL(**tiny.vae)
    initialise(autoencoder)
    _save(autoencoder, out / "vae", tiny.half)
    _save_scheduler(tiny.scheduler, out / "scheduler")
    index.update(
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        force_zeros_for_empty_prompt=not tiny.refiner,
    )
    if tiny.refiner:
        index["requires_aesthetics_score"] = True
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_scheduler(own: dict, folder: Path) -> None:
    config = {"_class_name": "EulerDiscreteScheduler", **_SCHEDULER, **own}
    folder.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _text_encoder(text: Text, vocabulary: dict[str, int]) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=text.width,
        intermediate_size=text.width * 3,
        projection_dim=text.projection or text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.positions,
        hidden_act=text.act,
        bos_token_id=0 if text.eos == 2 else vocabulary[tokens.START],
        eos_token_id=text.eos or vocabulary[tokens.END],
        pad_token_id=1,
    )
    net = (CLIPTextModelWithProjection if text.projection else CLIPTextModel)(config)
    initialise(net)
    return net


def _denoiser(tiny: Tiny) -> nn.Module:
    pooled = next(text.projection for text in tiny.encoders.values() if text.projection)
    net = diffusers.UNet2DConditionModel(
        **tiny.unet,
        cross_attention_dim=sum(text.width for text in tiny.encoders.values()),
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_DIM,
        projection_class_embeddings_input_dim=pooled + _TIME_DIM * (5 if tiny.refiner else 6),
    )
    initialise(net)
    return net


def _save(net: nn.Module, folder: Path, half: bool, shard: str | None = None) -> None:
    net = net.half() if half else net.float()
    net.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
