"""torch's half of `full_size.py`: diffusers' networks with their weights mapped from the checkpoint."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from checkpoint import PROMPT, SEED, Checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

TOKENS = 77


def run(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """Times both networks, or paints one step; prints the result as the last line."""
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        print(json.dumps(networks(args, checkpoint) if args.torch == "networks" else latents(args, checkpoint)))
    return 0


def networks(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Seconds of UNet forwards and VAE decodings, one after the other, each after one to warm up."""
    torch.manual_seed(0)
    unet = mapped(diffusers.UNet2DConditionModel, checkpoint.files("unet"))
    facts = checkpoint.entry["unet"]
    scale = checkpoint.entry["vae"]["scale"]
    side = args.size // scale
    inputs = {
        "sample": torch.randn(1, facts["in_channels"], side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, TOKENS, facts["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, facts["pooled_dim"]),
            "time_ids": torch.full((1, facts["time_ids"]), float(args.size)),
        },
    }
    seconds = timed(lambda: unet(**inputs), args.forwards)
    # Its pages are free for the decoder's run.
    unet = None
    vae = mapped(diffusers.AutoencoderKL, checkpoint.files("vae"))
    latent = torch.randn(1, checkpoint.entry["vae"]["latent_channels"], side, side)
    return {"unet": seconds, "vae": timed(lambda: vae.decode(latent), args.forwards)}


def timed(forward: Callable[[], object], count: int) -> list[float]:
    """Seconds of `count` runs, after one to warm up."""
    forward()
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        forward()
        seconds.append(time.perf_counter() - started)
    return seconds


def mapped(kind: type, files: list[Path]) -> nn.Module:
    """A network of diffusers whose weights are the files' pages where they are f32, and f32 copies elsewhere."""
    config = kind.load_config(files[0].parent)
    with torch.device("meta"):
        net = kind.from_config(config)
    return filled(net, files)


def filled(net: nn.Module, files: list[Path]) -> nn.Module:
    """`net` with the weights of `files`; it may have nothing else on the device `meta`."""
    state = {name: tensor for path in files for name, tensor in load_file(path).items()}
    net.load_state_dict(state, assign=True)
    return net.float().eval().requires_grad_(False)


def latents(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, str]:
    """Final latents of diffusers' pipeline after one step, written to `--out`."""
    root = checkpoint.root()
    parts: dict[str, object] = {"unet": mapped(diffusers.UNet2DConditionModel, checkpoint.files("unet"))}
    # The pipeline asks it for its scale; nothing is decoded.
    parts["vae"] = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(root / "vae"))
    for text, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        parts[text] = parts[tokenizer] = None
        if (root / text).is_dir():
            # Its position ids are made, not stored, so it cannot be on `meta`; it is small enough to copy.
            second = text == "text_encoder_2"
            kind = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
            parts[text] = kind.from_pretrained(root / text, dtype=torch.float32).eval()
            parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(root / tokenizer)
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_pretrained(root / "scheduler")
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    final = pipeline(
        PROMPT,
        height=args.size,
        width=args.size,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    save_file({"latents": final.contiguous()}, args.out)
    return {"latents": str(args.out)}
