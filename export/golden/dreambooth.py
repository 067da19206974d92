"""What the two common DreamBooth scripts save: diffusers' `train_dreambooth_lora_sdxl.py`, and kohya's sd-scripts.

Diffusers' script ends in the calls made here. sd-scripts is on no package registry: its file is written here anew, in
the layout of `LoRANetwork.save_weights` of its `networks/lora.py` (state dict in one type, alphas included; hashes of
the training's metadata and tensors) with the metadata of its `train_network.py` and `sai_model_spec.py`, all text.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save, save_file
from torch import Tensor, nn

INSTANCE, CLASS, PICTURES, REPEATS = "sks tronie", "tronie", 4, 10
"""The words of the training, and its pictures."""
LAYERS = {"unet": ["to_k", "to_q", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
"""What diffusers' script trains; both text encoders alike."""


def save_diffusers(networks: dict[str, nn.Module], rank: int, seed: int, folder: Path, name: str) -> None:
    """Adds the script's adapters to networks, as if trained, and writes the file as the script does at its end."""
    random = torch.Generator().manual_seed(seed)
    layers = {}
    for component, net in networks.items():
        targets = LAYERS["unet" if component == "unet" else "text_encoder"]
        net.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=list(targets)
            )
        )
        for parameter_name, parameter in net.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
        layers[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(net))
    told = _collate_lora_metadata(networks)
    StableDiffusionXLPipeline.save_lora_weights(save_directory=folder, weight_name=name, **layers, **told)


def save_sd_scripts(tensors: dict[str, Tensor], rank: int, alpha: float | None, path: Path) -> None:
    """Writes a network of `networks.lora` in f16, which is `--save_precision fp16`."""
    half = {name: tensor.detach().clone().half().contiguous() for name, tensor in tensors.items()}
    metadata = _metadata(path.stem, rank, alpha)
    # What other programs know the file by: hashes that its title and date do not change.
    training = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    content = save(half, training)
    header = int.from_bytes(content[:8], "little")
    metadata["sshs_model_hash"] = hashlib.sha256(content[8 + header :]).hexdigest()
    metadata["sshs_legacy_hash"] = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    save_file(half, path, metadata)


def _metadata(name: str, rank: int, alpha: float | None) -> dict[str, str]:
    trained = {f"{REPEATS}_{INSTANCE}": {"n_repeats": REPEATS, "img_count": PICTURES}}
    regular = {f"1_{CLASS}": {"n_repeats": 1, "img_count": 2 * PICTURES}}
    tags = {
        f"{REPEATS}_{INSTANCE}": {INSTANCE: PICTURES, "a sailor": 3, "oil on panel": 2},
        f"1_{CLASS}": {CLASS: 2 * PICTURES},
    }
    return {
        "ss_output_name": name,
        "ss_session_id": "1234567890",
        "ss_training_started_at": "1700000000.0",
        "ss_training_finished_at": "1700000600.0",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank if alpha is None else alpha)),
        "ss_network_dropout": "None",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "5e-05",
        "ss_lr_scheduler": "constant",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_max_train_steps": "40",
        "ss_steps": "40",
        "ss_num_epochs": "1",
        "ss_epoch": "1",
        "ss_num_train_images": str(REPEATS * PICTURES),
        "ss_num_reg_images": str(2 * PICTURES),
        "ss_prior_loss_weight": "1.0",
        "ss_mixed_precision": "fp16",
        "ss_resolution": "(1024, 1024)",
        "ss_seed": "7",
        "ss_clip_skip": "None",
        "ss_dataset_dirs": json.dumps(trained),
        "ss_reg_dataset_dirs": json.dumps(regular),
        "ss_tag_frequency": json.dumps(tags),
        "ss_bucket_info": "null",
        "ss_training_comment": "None",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2023-11-14T22:13:20",
    }
