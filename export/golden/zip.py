"""ZipLoRA in closed form: a content and a style LoRA for the tiny model, and their mergers.

The LoRAs are planted: random, of rank 3, with columns of very different weight, as trained ones have. Their layers'
inputs are recorded with torch while each paints from its prompt, as `tronie lora zip` does, and solved by
`export/zip_closed.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export import zip as ziplora
from export import zip_closed
from export.zip_lora import BOTH, CONTENT, STYLE, Zip

MODEL = Path(__file__).resolve().parents[2] / "tests" / "models" / "tiny"
RANK = 3
STRENGTH = 0.6
SEEDS = {CONTENT: 101, STYLE: 102}
PROMPTS = {CONTENT: "a photo of a small dog in a bucket", STYLE: "waves, an ink painting"}
STEPS = 4
SIZE = 128
# A network's layers beside attention that one of the LoRAs changes too, or both.
OTHERS = {
    CONTENT: ("mid_block.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1"),
    STYLE: ("mid_block.attentions.0.proj_in", "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"),
}
TEXT = {CONTENT: ("text_model.encoder.layers.0.self_attn.q_proj",), STYLE: ()}


def _factors(layer: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    outputs, inputs, *kernel = layer.weight.shape
    columns = torch.randn(inputs, generator=generator).exp()
    columns = columns / columns.square().mean().sqrt() / inputs**0.5
    down = torch.randn(RANK, inputs, generator=generator) * columns
    up = torch.randn(outputs, RANK, generator=generator) * STRENGTH / RANK**0.5
    if kernel:
        down = down[..., None, None].expand(RANK, inputs, *kernel) / kernel[0]
        up = up[..., None, None]
    return down.contiguous(), up.contiguous()


def _modules(model: Path, side: str) -> Iterator[tuple[str, nn.Module]]:
    pipeline = ziplora.open_model(str(model), "f32", "cpu")
    for name, layer in pipeline.unet.named_modules():
        attention = isinstance(layer, nn.Linear) and (".attn1." in name or ".attn2." in name)
        if attention or name in OTHERS[side]:
            yield f"unet.{name}", layer
    for name in TEXT[side]:
        layer = dict(pipeline.text_encoder.named_modules())
        # Releases of transformers differ in the outer module.
        yield f"text_encoder.{name}", layer.get(name) or layer[name.removeprefix("text_model.")]


def plant(model: Path, out: Path) -> dict[str, Path]:
    """Writes a content and a style LoRA for a checkpoint's attention layers and some others; their files by side."""
    files = {}
    for side in BOTH:
        generator = torch.Generator().manual_seed(SEEDS[side])
        tensors = {}
        for name, layer in _modules(model, side):
            down, up = _factors(layer, generator)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        files[side] = out / f"{side}.safetensors"
        save_file(tensors, files[side])
    return files


class _Seen:
    """The second moments of what flows into a UNet's layers in the rows of the prompt, while they run."""

    def __init__(self, zipped: Zip) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.rows: dict[str, int] = {}
        unet = zipped.pipeline.unet
        self.hooks = [unet.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in zipped.mergers]

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # The negative prompt's rows are first.
            rows = inputs[0].chunk(2)[1].flatten(0, -2).double().numpy()
            self.sums[name] = self.sums.get(name, 0.0) + rows.T @ rows
            self.rows[name] = self.rows.get(name, 0) + len(rows)

        return hook

    def moments(self) -> dict[str, np.ndarray]:
        for hook in self.hooks:
            hook.remove()
        return {name: total / self.rows[name] for name, total in self.sums.items()}


def record(zipped: Zip, side: str) -> dict[str, np.ndarray]:
    """Second moments `[in, in]` by layer, of a picture that a side's LoRA paints."""
    seen = _Seen(zipped)
    zipped.pipeline.set_progress_bar_config(disable=True)
    with zipped.only(side), torch.no_grad():
        zipped.pipeline(
            PROMPTS[side],
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return seen.moments()


def solved(zipped: Zip) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Mergers and second moments by layer, content first."""
    seen = [record(zipped, side) for side in BOTH]
    moments = {name: (seen[0][name], seen[1][name]) for name in zipped.mergers}
    mergers = {}
    for name, pair in moments.items():
        updates = [zipped.update(name, side).double().numpy() for side in BOTH]
        mergers[name] = zip_closed.solve(*updates, *pair)
    return mergers, moments


def write(out: Path) -> list[Path]:
    """Write ``content.safetensors``, ``style.safetensors`` and ``closed.safetensors``."""
    files = plant(MODEL, out)
    zipped = Zip(ziplora.open_model(str(MODEL), "f32", "cpu"), files[CONTENT], files[STYLE])
    mergers, moments = solved(zipped)
    tensors = {}
    for name, (content, style) in mergers.items():
        tensors[f"{name}.m_c"], tensors[f"{name}.m_s"] = torch.from_numpy(content), torch.from_numpy(style)
    for name in list(mergers)[::9]:
        tensors[f"{name}.C_c"], tensors[f"{name}.C_s"] = (torch.from_numpy(m) for m in moments[name])
    about = {
        "made_by": "python -m export.golden zip",
        "versions": json.dumps({"torch": torch.__version__, "diffusers": diffusers.__version__}),
        "request": json.dumps({"prompts": PROMPTS, "steps": STEPS, "size": SIZE, "guidance": 5.0, "seed": 0}),
    }
    path = out / "closed.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, about)
    return [*files.values(), path]
