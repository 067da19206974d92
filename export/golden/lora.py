"""LoRA files as PEFT, diffusers and LyCORIS write them, and the weights that they make of `tests/models/tiny`.

Every case is two files: what a user would have, and `<case>.merged.safetensors` with the changed tensors and, in its
metadata, which files at which scales made them (`uses`).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import peft
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from lycoris.kohya import LycorisNetworkKohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

MODEL = Path("tests/models/tiny")

_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LINEAR = [
    f"{_BLOCK}.attn1.to_out.0",
    f"{_BLOCK}.attn2.to_k",
    f"{_BLOCK}.ff.net.2",
    "down_blocks.1.attentions.1.proj_in",
]
CONVOLUTIONS = [
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
]
OTHERS = ["down_blocks.1.resnets.0.time_emb_proj", "conv_out", "add_embedding.linear_2"]

SGM = {
    f"{_BLOCK}.attn1.to_out.0": "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
    f"{_BLOCK}.attn2.to_k": "input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "mid_block.attentions.0.proj_out": "middle_block_1_proj_out",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": "output_blocks_1_1_transformer_blocks_0_ff_net_2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
}
"""What kohya calls modules of this UNet, spelt out because its way is what is tested."""

Uses = list[tuple[str, float]]
Tensors = dict[str, torch.Tensor]


def pipeline() -> StableDiffusionXLPipeline:
    """The tiny model in f32."""
    return StableDiffusionXLPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)


def components(pipe: StableDiffusionXLPipeline) -> dict[str, torch.nn.Module]:
    """What a LoRA may change."""
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}


def weights(pipe: StableDiffusionXLPipeline) -> Tensors:
    """All weights, named as the checkpoint's files do after the component's name."""
    tensors = {}
    for component, module in components(pipe).items():
        for name, tensor in module.state_dict().items():
            if "lora_" not in name:
                tensors[f"{component}.{name.replace('.base_layer', '')}"] = tensor.detach().clone()
    return tensors


def changed(before: Tensors, after: Tensors) -> Tensors:
    """The tensors that differ."""
    return {name: tensor.contiguous() for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def keep(folder: Path, case: str, uses: Uses, tensors: Tensors) -> Path:
    """Write what a case makes of the model."""
    if not tensors:
        raise ValueError(f"{case} changes nothing")
    path = folder / f"{case}.merged.safetensors"
    versions = {"diffusers": diffusers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    save_file(tensors, path, {"uses": json.dumps(uses), **versions})
    return path


def fused(folder: Path, uses: Uses) -> Tensors:
    """What diffusers makes of the model with some files at some scales."""
    pipe = pipeline()
    before = weights(pipe)
    names = [f"adapter{k}" for k in range(len(uses))]
    for name, (file, _) in zip(names, uses, strict=True):
        pipe.load_lora_weights(folder, weight_name=file, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in uses])
    pipe.fuse_lora(adapter_names=names)
    return changed(before, weights(pipe))


def _fill(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def _adapted(unet: LoraConfig, text: LoraConfig | None, seed: int) -> StableDiffusionXLPipeline:
    pipe = pipeline()
    pipe.unet.add_adapter(unet)
    _fill(pipe.unet, seed)
    if text is not None:
        for k, encoder in enumerate((pipe.text_encoder, pipe.text_encoder_2)):
            encoder.add_adapter(text)
            _fill(encoder, seed + 1 + k)
    return pipe


def _save(folder: Path, case: str, pipe: StableDiffusionXLPipeline, *, metadata: bool) -> str:
    file = f"{case}.safetensors"
    adapted = {name: part for name, part in components(pipe).items() if getattr(part, "peft_config", None)}
    told = _collate_lora_metadata(adapted) if metadata else {}
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in adapted.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, weight_name=file, **layers, **told)
    return file


def peft_cases(folder: Path) -> Iterator[Path]:
    """Files that `save_lora_weights` of diffusers writes after training with PEFT, as DreamBooth's script does."""
    text = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj", "out_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    plain = LoraConfig(r=3, lora_alpha=3, target_modules=LINEAR)
    kinds = {
        "peft-plain": (plain, text, False),
        "peft-metadata": (
            LoraConfig(
                r=2,
                lora_alpha=3,
                target_modules=LINEAR + CONVOLUTIONS + OTHERS,
                rank_pattern={f"{_BLOCK}.attn2.to_k": 4},
                alpha_pattern={"conv1": 1, f"{_BLOCK}.attn2.to_k": 5},
            ),
            LoraConfig(
                r=2,
                lora_alpha=5,
                target_modules=["fc1", "k_proj", "out_proj"],
                layers_to_transform=[0],
                layers_pattern="layers",
            ),
            True,
        ),
        "peft-rslora": (LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LINEAR), None, True),
        "peft-dora": (LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=LINEAR + CONVOLUTIONS), None, True),
        "peft-bias": (LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=[LINEAR[0], LINEAR[2]]), None, True),
    }
    for seed, (case, (unet, encoders, metadata)) in enumerate(kinds.items()):
        file = _save(folder, case, _adapted(unet, encoders, 10 * seed), metadata=metadata)
        yield folder / file
        scale = 1.0 if case == "peft-dora" else 0.7
        yield keep(folder, case, [(file, scale)], fused(folder, [(file, scale)]))


def bare_case(folder: Path) -> Iterator[Path]:
    """A UNet's adapter saved by itself, whose names have no component."""
    pipe = _adapted(LoraConfig(r=2, lora_alpha=4, target_modules=LINEAR + CONVOLUTIONS), None, 71)
    file = "peft-bare.safetensors"
    pipe.unet.save_lora_adapter(folder, weight_name=file)
    pipe = pipeline()
    before = weights(pipe)
    pipe.unet.load_lora_adapter(folder, weight_name=file, prefix=None)
    pipe.unet.fuse_lora()
    yield folder / file
    yield keep(folder, "peft-bare", [(file, 1.0)], changed(before, weights(pipe)))


def old_cases(folder: Path) -> Iterator[Path]:
    """Names that diffusers had before it used PEFT."""
    tensors = load_file(folder / "peft-plain.safetensors")
    names = {
        ".lora_A.": ".lora.down.",
        ".lora_B.": ".lora.up.",
    }
    processors = {".to_k.lora.": ".processor.to_k_lora.", ".to_out.0.lora.": ".processor.to_out_lora."}
    encoders = {".q_proj.lora.": ".to_q_lora.", ".out_proj.lora.": ".out_proj.lora_linear_layer."}
    old = {}
    for name, tensor in tensors.items():
        table = names | (processors if name.startswith("unet.") else encoders)
        for new, spelling in table.items():
            name = name.replace(new, spelling)
        old[name] = tensor
    file = "diffusers-old.safetensors"
    save_file(old, folder / file)
    yield folder / file
    yield keep(folder, "diffusers-old", [(file, 0.7)], load_file(folder / "peft-plain.merged.safetensors"))


def kohya_cases(folder: Path) -> Iterator[Path]:
    """Kohya's names: from diffusers' converter, and with the original blocks, ranks and alphas of their own."""
    tensors = load_file(folder / "peft-metadata.safetensors")
    # diffusers cannot read kohya's name of this one.
    converted = convert_state_dict_to_kohya({name: t for name, t in tensors.items() if "add_embedding" not in name})
    names = {name.split(".")[0] for name in converted}
    alphas = {f"{name}.alpha": torch.tensor(1.5) for name in names}
    save_file(
        {name: tensor.contiguous() for name, tensor in (converted | alphas).items()},
        folder / "kohya-diffusers-blocks.safetensors",
        {"ss_base_model_version": "sdxl_base_v1-0", "ss_dataset_dirs": json.dumps({"10_sks tronie": {"img_count": 4}})},
    )
    generator = torch.Generator().manual_seed(3)
    unet = weights(pipeline())
    file = {}
    for k, (module, name) in enumerate(SGM.items()):
        out, inputs, *kernel = unet[f"unet.{module}.weight"].shape
        rank, ones = 1 + k % 4, [1] * len(kernel)
        file[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, inputs, *kernel, generator=generator).half()
        file[f"lora_unet_{name}.lora_up.weight"] = 0.1 * torch.randn(out, rank, *ones, generator=generator).half()
        # The same for all: diffusers loses those of attention layers where they differ.
        file[f"lora_unet_{name}.alpha"] = torch.tensor(1.5).half()
    save_file(file, folder / "kohya-original-blocks.safetensors")
    for case in ("kohya-diffusers-blocks", "kohya-original-blocks"):
        uses = [(f"{case}.safetensors", -0.6)]
        yield folder / uses[0][0]
        yield keep(folder, case, uses, fused(folder, uses))
    several = [
        ("kohya-original-blocks.safetensors", 0.8),
        ("peft-plain.safetensors", 1.1),
        ("peft-bias.safetensors", -0.4),
    ]
    yield keep(folder, "several", several, fused(folder, several))


LYCORIS = {
    "lycoris-locon": ("locon", {}),
    "lycoris-tucker": ("locon", {"use_tucker": True}),
    "lycoris-loha": ("loha", {}),
    "lycoris-loha-tucker": ("loha", {"use_tucker": True}),
    "lycoris-lokr": ("lokr", {"factor": 2}),
    "lycoris-lokr-conv": ("lokr", {"factor": 4, "conv_lora_dim": 1}),
    "lycoris-lokr-both": (
        "lokr",
        {"factor": 4, "decompose_both": True, "use_tucker": True, "lora_dim": 1, "conv_lora_dim": 1},
    ),
    "lycoris-lokr-full": ("lokr", {"factor": 2, "full_matrix": True}),
    "lycoris-dora": ("locon", {"weight_decompose": True}),
    "lycoris-dora-input": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "lycoris-dora-loha": ("loha", {"weight_decompose": True}),
    "lycoris-full": ("full", {"train_norm": True}),
}
"""Algorithm and options of each case."""


def _network(pipe: StableDiffusionXLPipeline, algorithm: str, options: dict) -> LycorisNetworkKohya:
    modules = [LINEAR[1], LINEAR[3], CONVOLUTIONS[0], CONVOLUTIONS[2], "down_blocks.0.resnets.0.norm1"]
    LycorisNetworkKohya.apply_preset(
        {
            "enable_conv": True,
            "unet_target_module": [],
            "unet_target_name": modules,
            "text_encoder_target_module": [],
            "text_encoder_target_name": [
                "encoder.layers.0.self_attn.v_proj",
                "text_model.encoder.layers.0.self_attn.v_proj",
            ],
        }
    )
    network = LycorisNetworkKohya(
        [pipe.text_encoder, pipe.text_encoder_2],
        pipe.unet,
        alpha=3,
        conv_alpha=1,
        network_module=algorithm,
        warn_on_unmatched=False,
        **({"lora_dim": 2, "conv_lora_dim": 2} | options),
    )
    generator = torch.Generator().manual_seed(5)
    for layer in network.text_encoder_loras + network.unet_loras:
        for name, parameter in layer.named_parameters():
            if "dora_scale" in name:
                parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            else:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return network


def _merged(layer: torch.nn.Module, scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight and bias as LyCORIS's forward has them, at the strength that ARCHITECTURE.md defines."""
    original = layer.org_module[0]
    if layer.name in ("full", "norm"):
        return layer.make_weight(scale)
    base = original.weight
    delta = layer.make_weight() * layer.scale if layer.name == "locon" else layer.get_weight(layer.shape)
    if layer.wd:
        return base + scale * (layer.apply_weight_decompose(base + delta) - base), None
    return base + scale * delta, None


@torch.no_grad()
def lycoris_cases(folder: Path) -> Iterator[Path]:
    """Files that LyCORIS writes inside kohya's trainer."""
    for case, (algorithm, options) in LYCORIS.items():
        pipe = pipeline()
        before = weights(pipe)
        network = _network(pipe, algorithm, options)
        file = f"{case}.safetensors"
        told = {"ss_network_module": "lycoris.kohya"}
        network.apply_to([pipe.text_encoder, pipe.text_encoder_2], pipe.unet, True, True)
        network.save_weights(str(folder / file), None, told)
        network.restore()
        after = dict(before)
        names = {id(m): f"{c}.{n}" for c, part in components(pipe).items() for n, m in part.named_modules()}
        for layer in network.text_encoder_loras + network.unet_loras:
            name = names[id(layer.org_module[0])]
            weight, bias = _merged(layer, 0.7)
            after[f"{name}.weight"] = weight.detach().clone()
            if bias is not None:
                after[f"{name}.bias"] = bias.detach().clone()
        yield folder / file
        yield keep(folder, case, [(file, 0.7)], changed(before, after))


CASES: list[Callable[[Path], Iterator[Path]]] = [peft_cases, bare_case, old_cases, kohya_cases, lycoris_cases]


def write(out: Path) -> list[Path]:
    """Write all cases into the folder `lora`."""
    folder = out / "lora"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    return [path for case in CASES for path in case(folder)]
