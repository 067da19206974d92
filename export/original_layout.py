"""Whole models in one file, in the layout of SDXL's authors: diffusers' names and shapes turned back into theirs."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.errors import ExportError
from export.graphs import hub_text_name

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# Beginnings of names in diffusers, and in the original.
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")

State = Mapping[str, Tensor]


def _begin(table: dict[str, str], name: str) -> str | None:
    """The name with its beginning replaced, if that is in the table."""
    found = next((old for old in table if name == old or name.startswith(f"{old}.")), None)
    return None if found is None else table[found] + name.removeprefix(found)


def unet(state: State) -> dict[str, Tensor]:
    """A UNet's tensors under their original names, without prefix."""
    blocks = [match for match in map(_BLOCK.fullmatch, state) if match]
    layers = 1 + max(int(m[4]) for m in blocks if m[1] == "down" and m[3] == "resnets")
    attentive = {int(m[2]) for m in blocks if m[1] == "up" and m[3] == "attentions"}

    def rename(name: str) -> str:
        match = _BLOCK.fullmatch(name)
        if match is None:
            new = _begin(_UNET, name)
            if new is None:
                raise ExportError(f"unet: tensor {name} has no name in the original layout")
            head, rest = re.fullmatch(r"(\w+\.\d+)\.(.+)", new).groups()
            is_resnet = name.startswith("mid_block.resnets")
            return f"{head}.{_begin(_RESNET, rest)}" if is_resnet else new
        side, block, kind, index, rest = match.groups()
        place = int(block) * (layers + 1) + int(index)
        last = int(block) * (layers + 1) + layers
        where, shift = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
        match kind:
            case "resnets":
                return f"{where}.{place + shift}.0.{_begin(_RESNET, rest)}"
            case "attentions":
                return f"{where}.{place + shift}.1.{rest}"
            case "downsamplers":
                return f"{where}.{last + shift}.0.op.{rest.removeprefix('conv.')}"
        return f"{where}.{last}.{2 if int(block) in attentive else 1}.{rest}"

    return {rename(name): tensor for name, tensor in state.items()}


def vae(state: State) -> dict[str, Tensor]:
    """A VAE's tensors under their original names, without prefix; attention as convolutions."""
    blocks = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    found = {}
    for name, tensor in state.items():
        side, _, rest = name.partition(".")
        new = _begin(_VAE, rest) or rest
        if match := _BLOCK.fullmatch(rest):
            at, kind, index, inner = int(match[2]), match[3], match[4], match[5]
            at = at if match[1] == "down" else blocks - 1 - at
            part = f"block.{index}" if kind == "resnets" else f"{match[1]}sample"
            new = f"{match[1]}.{at}.{part}.{inner}"
        new = new.replace("conv_shortcut", "nin_shortcut")
        is_linear = "attentions" in name and tensor.ndim == 2
        found[f"{side}.{new}"] = tensor[:, :, None, None] if is_linear else tensor
    return found


def clip(state: State) -> dict[str, Tensor]:
    """CLIP's text encoder, whose original names are those of transformers 4."""
    return {f"transformer.{hub_text_name(name)}": tensor for name, tensor in state.items()}


def open_clip(state: State) -> dict[str, Tensor]:
    """A text encoder as OpenCLIP has it: q, k and v in one, the projection a factor from the right."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if name == "text_projection.weight":
            found["model.text_projection"] = tensor.T.contiguous()
        elif match is None:
            found[f"model.{_begin(_OPEN_CLIP, name)}"] = tensor
        elif fused := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", match[2]):
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"model.transformer.resblocks.{match[1]}.attn.in_proj_{fused[1]}"] = torch.cat(parts)
        elif new := _begin(_OPEN_CLIP, match[2]):
            found[f"model.transformer.resblocks.{match[1]}.{new}"] = tensor
    found["model.logit_scale"] = torch.tensor(4.6052, device=next(iter(state.values())).device)
    return found


def whole(components: Mapping[str, State]) -> dict[str, Tensor]:
    """All components in one: `unet`, `vae`, `text_encoder` where there is one, `text_encoder_2`."""
    second = int("text_encoder" in components)
    makers: dict[str, tuple[str, Callable[[State], dict[str, Tensor]]]] = {
        "unet": ("model.diffusion_model", unet),
        "vae": ("first_stage_model", vae),
        "text_encoder": ("conditioner.embedders.0", clip),
        "text_encoder_2": (f"conditioner.embedders.{second}", open_clip),
    }
    found = {}
    for component, state in components.items():
        prefix, make = makers[component]
        found.update({f"{prefix}.{name}": tensor for name, tensor in make(state).items()})
    return found


def read(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every component's tensors of a checkpoint in diffusers layout."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ExportError(f"{folder}: no model_index.json; name a folder in diffusers layout")
    listed = json.loads(index.read_text(encoding="utf-8"))
    components = {}
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if listed.get(component, [None])[0] is None:
            continue
        files = sorted((folder / component).glob("*.safetensors"))
        if not files:
            raise ExportError(f"{folder / component}: no .safetensors file")
        state = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                state.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
        components[component] = state
    return components


def marks(folder: Path) -> dict[str, Tensor]:
    """What such files say of their training: marks for velocities and zero terminal SNR, how latents are normalised."""
    scheduler, autoencoder = (
        json.loads((folder / path).read_text(encoding="utf-8"))
        for path in ("scheduler/scheduler_config.json", "vae/config.json")
    )
    found = {}
    if scheduler.get("prediction_type") == "v_prediction":
        found["v_pred"] = torch.tensor([])
    if scheduler.get("rescale_betas_zero_snr"):
        found["ztsnr"] = torch.tensor([])
    for name, key in (("edm_mean", "latents_mean"), ("edm_std", "latents_std")):
        if (values := autoencoder.get(key)) is not None:
            found[name] = torch.tensor(values).reshape(1, -1, 1, 1)
    return found


def run(args: argparse.Namespace) -> None:
    """`python -m export original`."""
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ExportError(f"--dtype {args.dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    if args.out.exists():
        raise ExportError(f"--out {args.out}: exists; name a new file")
    tensors = whole(read(args.source)) | marks(args.source)
    if args.dtype is not None:
        tensors = {name: tensor.to(DTYPES[args.dtype]) for name, tensor in tensors.items()}
    part = args.out.with_name(f".{args.out.name}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"format": "pt"})
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {len(tensors)} tensors")
