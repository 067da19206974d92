"""Small LoRA files, good and bad, from which the fuzzer in `fuzz/` starts."""

import json
from pathlib import Path

import torch
from safetensors.torch import save

KOHYA = "lora_unet_middle_block_1_proj_in"
PEFT = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def _files() -> dict[str, tuple[dict[str, list[int]], dict[str, str]]]:
    """Shapes of the tensors, and metadata, of each file. The model's modules have 4 by 4 values."""
    pair = {"lora_down.weight": [2, 4], "lora_up.weight": [4, 2], "alpha": []}
    products = {f"hada_w{k}_{side}": shape for k in (1, 2) for side, shape in (("a", [4, 1]), ("b", [1, 4]))}
    tucker = {"lora_down.weight": [1, 4, 1, 1], "lora_mid.weight": [1, 1, 1, 1], "lora_up.weight": [4, 1, 1, 1]}
    config = {"unet.r": 1, "unet.lora_alpha": 2, "unet.rank_pattern": {"to_k": 1}, "unet.use_rslora": True}
    peft = {"lora_A.weight": [1, 4], "lora_B.weight": [4, 1]}
    frequency = json.dumps({"1_sks": {"sks": 3, "hat": 1}})

    def of(module: str, parts: dict[str, list[int]]) -> dict[str, list[int]]:
        return {f"{module}.{name}": shape for name, shape in parts.items()}

    return {
        "kohya": (of(KOHYA, pair), {"ss_tag_frequency": frequency}),
        "kohya-dora": (of(KOHYA, pair | {"dora_scale": [1, 4]}), {}),
        "peft": (of(PEFT, peft), {"lora_adapter_metadata": json.dumps(config)}),
        "peft-dora": (of(PEFT, peft | {"lora_magnitude_vector": [4]}), {}),
        "old": ({f"{PEFT[:-5]}.processor.to_k_lora.{k}.weight": s for k, s in (("down", [1, 4]), ("up", [4, 1]))}, {}),
        "tucker": (of("lora_unet_conv_in", tucker), {}),
        "loha": (of("lora_unet_conv_in", products | {"alpha": []}), {}),
        "lokr": (of(KOHYA, {"lokr_w1_a": [2, 1], "lokr_w1_b": [1, 2], "lokr_w2": [2, 2], "alpha": [1]}), {}),
        "full": (of("lora_unet_down_blocks_0_resnets_0_conv1", {"diff": [4, 4], "diff_b": [4]}), {}),
        "half-a-pair": (of(KOHYA, {"lora_down.weight": [2, 4]}), {}),
        "another-rank": (of(KOHYA, pair | {"lora_up.weight": [4, 3]}), {}),
        "flux": (of("lora_unet_double_blocks_0_img_mod_lin", pair), {}),
    }


def write(out: Path) -> list[Path]:
    """Write the files into the folder itself."""
    paths = []
    for name, (shapes, metadata) in _files().items():
        path = out / name
        path.write_bytes(save({tensor: torch.full(shape, 0.5) for tensor, shape in shapes.items()}, metadata or None))
        paths.append(path)
    return paths
