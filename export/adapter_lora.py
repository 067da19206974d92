"""The LoRA inside a FaceID adapter's file, written to a file of its own, which `--lora` of the engine reads.

Twin: `_load_ip_adapter_loras` of diffusers' `UNet2DConditionLoadersMixin`, which hands the same tensors under the same
names to `load_lora_weights`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from export.errors import ExportError
from export.source import File

_TENSOR = re.compile(r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def is_lora(tensor: str) -> bool:
    """Whether a tensor of an adapter's file belongs to a LoRA of the UNet."""
    return _TENSOR.fullmatch(tensor) is not None


def processors(attentions: list[dict]) -> Iterator[str]:
    """Names of a UNet's attentions in the order of `attn_processors`: that of the text at odd places."""
    for attention in attentions:
        for layer in range(attention["layers"]):
            for number in (1, 2):
                yield f"{attention['name']}.transformer_blocks.{layer}.attn{number}.processor"


def names(shapes: Mapping[str, tuple[int, ...]], attentions: list[dict]) -> dict[str, str]:
    """Tensor in the adapter's file -> its name in diffusers; refuses a LoRA that is not whole."""
    wanted = {
        f"ip_adapter.{number}.to_{side}_lora.{part}.weight": f"unet.{processor}.to_{side}_lora.{part}.weight"
        for number, processor in enumerate(processors(attentions))
        for side in ("q", "k", "v", "out")
        for part in ("down", "up")
    }
    found = {tensor for tensor in shapes if is_lora(tensor)}
    for tensor in sorted(found ^ wanted.keys()):
        have = "is missing" if tensor in wanted else "belongs to no attention of the UNet"
        raise ExportError(f"tensor {tensor} {have}; the LoRA inside was made for another model, or is not whole")
    return wanted


def check(out: Path) -> None:
    """Refuses a name that cannot be written."""
    if out.suffix != ".safetensors":
        raise ExportError(f"--lora-out {out}: does not end in .safetensors")
    if out.exists():
        raise ExportError(f"--lora-out {out}: exists; name a new file")


def write(file: File, named: Mapping[str, str], out: Path) -> None:
    """Writes the LoRA of an adapter's file, its numbers as they are."""
    # Loads ONNX Runtime, which recognising needs not.
    from export.verify import local

    part = out.with_suffix(".part")
    with safe_open(local(file), framework="pt") as adapter:
        save_file({name: adapter.get_tensor(tensor) for tensor, name in named.items()}, part, {"format": "pt"})
    part.replace(out)
