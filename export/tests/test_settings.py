"""Settings that SDXL itself does not use but its relatives do, against torch."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
from diffusers.models.attention_processor import Attention
from export import build, initial, sdxl, verify
from export.models import unet
from export.source import Folder

UNUSUAL = {
    "several": {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "attention_head_dim": [2, 4],
        "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True,
        "time_embedding_act_fn": "silu",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "gelu",
        "conv_in_kernel": 5,
    },
    "layers": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": [1, 2],
        "attention_head_dim": 2,
        "transformer_layers_per_block": [[1], [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], [1, 1]],
        "mid_block_scale_factor": 2.0,
        "upcast_attention": True,
    },
}


def _with_unet(folder: Path, settings: dict) -> sdxl.Checkpoint:
    """Gives the checkpoint another UNet of the same interfaces."""
    old = json.loads((folder / "unet/config.json").read_text())
    keys = ("cross_attention_dim", "projection_class_embeddings_input_dim", "addition_time_embed_dim")
    kept = {key: old[key] for key in (*keys, "addition_embed_type", "sample_size", "norm_num_groups")}
    net = diffusers.UNet2DConditionModel(**kept, **settings)
    initial.initialise(net)
    for path in (folder / "unet").iterdir():
        path.unlink()
    net.save_pretrained(folder / "unet")
    return sdxl.read(Folder(folder))


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_settings_equal_torch(copy: Path, name: str) -> None:
    checkpoint = _with_unet(copy, UNUSUAL[name])
    graphs = [graph for graph in checkpoint.graphs() if graph.weights == "unet"]
    assert verify.check(checkpoint, build.all_of(checkpoint, ["fused"], graphs))


def test_heads_named_in_the_old_way_are_understood(copy: Path) -> None:
    path = copy / "unet/config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "num_attention_heads": config["attention_head_dim"], "attention_head_dim": 8})
    )
    built = unet.build(sdxl.read(Folder(copy)).unet_config)
    heads = [module.heads for module in built.modules() if isinstance(module, Attention)]
    assert heads == [module.heads for module in unet.build(config).modules() if isinstance(module, Attention)]
    assert len(set(heads)) > 1
