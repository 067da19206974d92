"""Runs with LoRAs: their cases, their files, and what diffusers' pipeline is told for them.

Files in PEFT's form come out of PEFT itself, and those of DreamBooth scripts out of `dreambooth.py`; kohya's names are
spelt here, from the tables of `sgm`, and read by the converter of diffusers, which refuses what it does not know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from export.golden import dreambooth

FOLDER = "loras"
"""Where the files lie, beside the cases."""
UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
TRANSFORMERS = r".*(attentions|transformer_blocks).*"
EVERYTHING = r".*"
# Where SDXL has attention: what names more blocks passes for a LoRA of Stable Diffusion 1.
SHARED_BLOCKS = r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\."
PROJECTIONS = r".*\.(q_proj|v_proj|out_proj|fc1)"


@dataclass(frozen=True)
class File:
    """A random LoRA. `modules` has a pattern for each component that it changes, `options` more for PEFT."""

    model: str
    form: str
    seed: int
    modules: dict[str, str]
    rank: int = 4
    alpha: float | None = None
    options: dict = field(default_factory=dict)


_ALL = {UNET: TRANSFORMERS, TEXT: PROJECTIONS, TEXT_2: PROJECTIONS}
_PEFT_ALL = {UNET: ATTENTION, TEXT: PROJECTIONS, TEXT_2: PROJECTIONS}
_EACH = {"rank_pattern": {"to_k": 2, "fc1": 5}, "alpha_pattern": {"to_k": 1, "to_out.0": 6}}

FILES: dict[str, File] = {
    "alpha-kohya": File("alpha", "kohya", 1, _ALL, alpha=2.0),
    "alpha-kohya-convolutions": File("alpha", "kohya", 2, {UNET: EVERYTHING}, rank=3, alpha=1.0),
    "alpha-kohya-no-alpha": File("alpha", "kohya", 3, {UNET: ATTENTION, TEXT_2: EVERYTHING}, rank=1),
    "alpha-peft": File("alpha", "peft", 4, _PEFT_ALL, alpha=8.0),
    "alpha-peft-each": File("alpha", "peft", 5, _PEFT_ALL, alpha=3.0, options=_EACH),
    "alpha-peft-rank-stabilised": File("alpha", "peft", 6, {UNET: ATTENTION}, alpha=2.0, options={"use_rslora": True}),
    "alpha-peft-dora": File("alpha", "peft", 7, {UNET: ATTENTION}, options={"use_dora": True}),
    "alpha-peft-convolutions": File("alpha", "peft", 8, {UNET: r".*(conv1|conv2|conv|conv_shortcut|proj_in)"}),
    "alpha-old": File("alpha", "old", 9, _PEFT_ALL),
    "alpha-text": File("alpha", "peft", 10, {TEXT: PROJECTIONS, TEXT_2: PROJECTIONS}, rank=2),
    "alpha-dreambooth": File("alpha", "dreambooth", 17, dict.fromkeys((UNET, TEXT, TEXT_2), "")),
    # Its projections around attention are convolutions.
    "beta-peft-projections": File(
        "beta", "peft", 18, {UNET: SHARED_BLOCKS + r".*(proj_in|proj_out|to_v)"}, rank=3, alpha=2.0
    ),
    "beta-kohya-projections": File(
        "beta", "kohya-diffusers", 19, {UNET: SHARED_BLOCKS + r".*(proj_in|proj_out|to_q)"}, rank=2, alpha=1.0
    ),
    "beta-peft-dora": File(
        "beta", "peft", 20, {UNET: SHARED_BLOCKS + r".*(proj_in|proj_out)"}, options={"use_dora": True}
    ),
    "gamma-kohya-diffusers": File("gamma", "kohya-diffusers", 13, {UNET: TRANSFORMERS, TEXT_2: PROJECTIONS}, alpha=1.0),
    "gamma-peft": File("gamma", "peft", 14, {UNET: ATTENTION, TEXT_2: PROJECTIONS}, rank=3, alpha=6.0),
    "tiny-kohya": File("tiny", "kohya", 15, {UNET: ATTENTION, TEXT: PROJECTIONS, TEXT_2: PROJECTIONS}, 2, 1.0),
    "tiny-peft": File("tiny", "peft", 16, {UNET: ATTENTION}, 1),
}
"""By name; the request calls them `loras/NAME.safetensors`."""


def write_files(models: Path, names: list[str], out: Path, opened: Callable[[Path], StableDiffusionXLPipeline]) -> None:
    """Writes the files with these names into their folder in `out`; `opened` gives the pipeline of a checkpoint."""
    (out / FOLDER).mkdir(exist_ok=True)
    for name in names:
        file = FILES[name]
        pipeline = opened(models / file.model)
        if file.form.startswith("kohya"):
            path = out / FOLDER / f"{name}.safetensors"
            dreambooth.save_sd_scripts(_kohya(pipeline, file), file.rank, file.alpha, path)
        elif file.form == "dreambooth":
            networks = {component: copy.deepcopy(getattr(pipeline, component)) for component in file.modules}
            dreambooth.save_diffusers(networks, file.rank, file.seed, out / FOLDER, f"{name}.safetensors")
        else:
            _save_peft(pipeline, file, out / FOLDER, f"{name}.safetensors")


def used(requests: list[dict]) -> list[str]:
    """The files that requests name, by their names here."""
    files = {lora["lora"] for request in requests for lora in request.get("loras", [])}
    return sorted(Path(file).stem for file in files)


def _wanted(net: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Linear layers and convolutions whose names fit a pattern."""
    found = {name: net for name, net in net.named_modules() if isinstance(net, nn.Linear | nn.Conv2d)}
    return {name: module for name, module in found.items() if re.fullmatch(pattern, name)}


def _kohya(pipeline: StableDiffusionXLPipeline, file: File) -> dict[str, Tensor]:
    """Tensors under the names of kohya's scripts and LyCORIS."""
    random = torch.Generator().manual_seed(file.seed)
    tensors = {}
    for component, pattern in file.modules.items():
        net = getattr(pipeline, component)
        for name, module in _wanted(net, pattern).items():
            key = _kohya_name(net, component, name, sgm=file.form == "kohya")
            outs, ins, *kernel = module.weight.shape
            ones = [1] * len(kernel)
            down = torch.randn([file.rank, ins, *kernel], generator=random) / module.weight[0].numel() ** 0.5
            up = torch.randn([outs, file.rank, *ones], generator=random) * 0.3
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            if file.alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(file.alpha)
    return tensors


def _kohya_name(net: nn.Module, component: str, name: str, sgm: bool) -> str:
    prefix = {UNET: "lora_unet_", TEXT: "lora_te1_", TEXT_2: "lora_te2_"}[component]
    if component == UNET:
        name = _sgm(name, net.config.layers_per_block) if sgm else name
    elif component == TEXT and not name.startswith("text_model."):
        # Newer transformers leave out the level that kohya's names have.
        name = f"text_model.{name}"
    return prefix + name.replace(".", "_")


_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _sgm(name: str, layers: int) -> str:
    """The name of a UNet's module in the original code; `layers` is the number of resnets in a down block."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, index, *inner = rest
        place = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
    else:
        block, kind, index, *inner = rest
        first, count = (1, layers + 1) if part == "down_blocks" else (0, layers + 1)
        place = f"{'input' if first else 'output'}_blocks.{first + count * int(block) + int(index)}"
        if kind == "downsamplers":
            return f"input_blocks.{first + count * int(block) + layers}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{count * int(block) + layers}.2.conv"
        place += ".1" if kind == "attentions" else ".0"
    if kind == "resnets":
        inner = [_RESNET[inner[0]]]
    return ".".join([place, *inner])


def _save_peft(pipeline: StableDiffusionXLPipeline, file: File, folder: Path, name: str) -> None:
    """Writes what PEFT makes of the modules, with its configuration; for the form `old` under the names before it."""
    given: dict[str, dict] = {}
    for component, pattern in file.modules.items():
        net = copy.deepcopy(getattr(pipeline, component))
        torch.manual_seed(file.seed)
        alpha = file.rank if file.alpha is None else file.alpha
        config = LoraConfig(
            r=file.rank,
            lora_alpha=alpha,
            target_modules=list(_wanted(net, pattern)),
            init_lora_weights=False,
            **file.options,
        )
        net.add_adapter(config)
        layers = get_peft_model_state_dict(net)
        if file.form == "old":
            layers = convert_state_dict_to_diffusers(layers)
        else:
            given[f"{component}_lora_adapter_metadata"] = net.peft_config["default"].to_dict()
        given[f"{component}_lora_layers"] = {key: tensor.contiguous() for key, tensor in layers.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, weight_name=name, **given)


def _lora(name: str, scale: float = 1.0, te: float | None = None) -> dict:
    """One entry of `loras`; the file by its name."""
    return {"lora": f"{FOLDER}/{name}.safetensors", "scale": scale, **({} if te is None else {"te-scale": te})}


def _case(name: str, *loras: dict, model: str = "alpha", **fields: object) -> tuple[str, str, dict]:
    return f"{model}-lora-{name}", model, {"steps": 10, "guidance": 5.0, "loras": list(loras), **fields}


def cases() -> Iterator[tuple[str, str, dict]]:
    """Name, model, and fields of the request, of every case."""
    for name, file in FILES.items():
        if file.model != "tiny":
            form = name.removeprefix(f"{file.model}-")
            # PEFT scales the product inside a DoRA's norm, tronie the whole change: the same at 1.
            scale = 1.0 if file.options.get("use_dora") else 0.8
            yield _case(form, _lora(name, scale), model=file.model)
    yield _case("negative-scale", _lora("alpha-kohya", -0.5), negative="blurred, cropped")
    yield _case("te-scale", _lora("alpha-peft", 1.0, te=0.3), batch=2, scheduler="euler-ancestral")
    yield _case("unet-only", _lora("alpha-kohya", 0.7, te=0.0), scheduler="dpmpp-2m")
    yield _case("text-only", _lora("alpha-peft-each", 0.0, te=0.9), clip_skip=1)
    yield _case("no-guidance", _lora("alpha-kohya-no-alpha", 1.3), guidance=1.0)
    two = (_lora("alpha-kohya", 0.7), _lora("alpha-peft", -0.4, te=0.5))
    yield _case("two", *two, negative="blurred", guidance_rescale=0.5)
    yield _case("same-twice", _lora("alpha-old", 0.3), _lora("alpha-old", 0.5))
    convolutions = _lora("alpha-kohya-convolutions", 0.6)
    yield _case("three", *two, convolutions, scheduler="dpmpp-2m", spacing="trailing")
    yield _case("fused", *two, convolutions, scheduler="ddim")
    yield _case("told", *two, prompt="a (portrait:1.3) of a sailor", prompt_syntax="a1111", negative="[x]")
    refined = {"refiner": "alpha-refiner", "refine_at": 0.7, "negative": "blurred"}
    yield _case("refined", *two, **refined)
    castle = {"adapter": "ip-adapter-plus", "pictures": ["pictures/castle.png"], "scale": 0.7}
    sailor = {"adapter": "ip-adapter", "pictures": ["pictures/sailor.png"], "scale": 0.5}
    sailor["masks"] = ["pictures/left.png"]
    yield _case("image", _lora("alpha-kohya", 0.8), image_prompts=[castle])
    yield _case("image-two-refined", *two, image_prompts=[castle, sailor], **refined)
    yield _case("two", _lora("gamma-kohya-diffusers", 0.6), _lora("gamma-peft", 0.5), model="gamma", negative="x")


def tiny_cases() -> Iterator[tuple[str, str, dict]]:
    """The run whose numbers lie in the repository."""
    fields = {"width": 128, "height": 128, "steps": 6, "negative": "blurred"}
    refined = {"refiner": "tiny-refiner", "refine_at": 0.7}
    loras = (_lora("tiny-kohya", 0.8, te=0.5), _lora("tiny-peft", 0.6))
    yield _case("two", *loras, model="tiny", **fields, **refined)


@contextmanager
def loaded(pipeline: StableDiffusionXLPipeline, folder: Path, request: dict, fused: bool) -> Iterator[None]:
    """The pipeline with the request's LoRAs, in its layers or `fused` into its weights. Afterwards it is as it was."""
    loras = request.get("loras", [])
    if not loras:
        yield
        return
    components = [name for name in (UNET, TEXT, TEXT_2) if getattr(pipeline, name) is not None]
    before = {name: copy.deepcopy(getattr(pipeline, name).state_dict()) for name in components}
    names = [f"lora-{place}" for place in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(folder), weight_name=lora["lora"], adapter_name=name)
        _check(components, pipeline, name, folder / lora["lora"])
    pipeline.set_adapters(names, [_scales(lora, components) for lora in loras])
    if fused:
        pipeline.fuse_lora(components, adapter_names=names)
    try:
        yield
    finally:
        if fused:
            pipeline.unfuse_lora(components)
        pipeline.unload_lora_weights()
        for name, state in before.items():
            getattr(pipeline, name).load_state_dict(state)


def _check(components: list[str], pipeline: StableDiffusionXLPipeline, adapter: str, file: Path) -> None:
    """Fails if a layer of an adapter has other numbers than the file: transformers reports them all as missing."""
    known = {tensor.float().numpy().tobytes() for tensor in load_file(file).values()}
    for component in components:
        for name, parameter in getattr(pipeline, component).named_parameters():
            if f".{adapter}." in name and parameter.detach().numpy().tobytes() not in known:
                raise RuntimeError(f"{component}.{name} is not what {file} holds")


def _scales(lora: dict, components: list[str]) -> dict[str, float]:
    te = lora.get("te-scale", lora["scale"])
    return {name: lora["scale"] if name == UNET else te for name in components}
