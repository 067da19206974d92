"""Runs with image prompts: their cases, their pictures, and what diffusers' pipeline is told for them.

The adapters are the small ones of `export/tiny_adapters.py`, loaded with `load_ip_adapter`. What the pipeline has no
argument for is done around it: scales that change from step to step, and guidance that comes and goes, before each
call of the UNet; a negative picture with embeddings whose negative half is what the encoder sees in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor, nn

from export.tiny_adapters import ENCODER, FILES

FOLDER = "pictures"
"""Where the pictures lie, beside the cases."""
PICTURES = {"sailor": (60, 60), "castle": (90, 52), "harbour": (37, 61), "gull": (20, 24)}
"""Sizes, width first: larger and smaller than what encoders see, and of other shapes."""
MASKS = {
    "left": ((96, 64), lambda x, _: x < 0.4),
    "right": ((96, 64), lambda x, _: x >= 0.5),
    "disc": ((48, 32), lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.09),
    "corner": ((128, 128), lambda x, y: x + y < 0.9),
}
"""Sizes, and where in 0..1 they are white."""
NAMED = {
    "style": {"up": {"block_0": [0.0, 1.0, 0.0]}},
    "layout": {"down": {"block_2": [0.0, 1.0]}},
    "style+layout": {"up": {"block_0": [0.0, 1.0, 0.0]}, "down": {"block_2": [0.0, 1.0]}},
}
"""InstantStyle's names, in diffusers' words."""


def draw(name: str) -> Image.Image:
    """A picture, or a mask, by its name."""
    if name in MASKS:
        (width, height), inside = MASKS[name]
        y, x = np.mgrid[:height, :width]
        return Image.fromarray(np.where(inside(x / width, y / height), 255, 0).astype(np.uint8), "L")
    width, height = PICTURES[name]
    random = np.random.default_rng(list(name.encode()))
    y, x = np.mgrid[:height, :width][..., None] / np.array([height, width]).reshape(2, 1, 1, 1)
    waves = sum(np.sin(random.uniform(-9, 9, 3) * x + random.uniform(-9, 9, 3) * y) for _ in range(4))
    shape = ((x - random.uniform(0.3, 0.7)) ** 2 + (y - random.uniform(0.3, 0.7)) ** 2 < 0.06) * random.uniform(
        -2, 2, 3
    )
    levels = 127 + 45 * (waves + shape) + random.normal(0, 8, (height, width, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def write_pictures(cases: list[dict], out: Path) -> None:
    """Writes the pictures that requests name, into their folder in `out`."""
    prompts = [prompt for request in cases for prompt in request.get("image-prompts", [])]
    files = {file for prompt in prompts for file in _files(prompt)}
    (out / FOLDER).mkdir(exist_ok=True)
    for file in sorted(files):
        draw(Path(file).stem).save(out / file)


def _files(prompt: dict) -> list[str]:
    return [*prompt["pictures"], *prompt.get("masks", []), *([prompt["negative"]] if "negative" in prompt else [])]


def _prompt(adapter: str, *pictures: str, masks: tuple[str, ...] = (), **fields: object) -> dict:
    """One entry of `image-prompts`; pictures by their names."""
    name = f"ip-adapter-{adapter}" if adapter else "ip-adapter"
    prompt = {"adapter": name, "pictures": [_file(picture) for picture in pictures], **fields}
    if masks:
        prompt["masks"] = [_file(mask) for mask in masks]
    if "negative" in fields:
        prompt["negative"] = _file(fields["negative"])
    return prompt


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.png"


def cases() -> Iterator[tuple[str, str, dict]]:
    """Name, model, and fields of the request, of every case."""
    for model in ("alpha", "beta"):
        yield from _plain(model)
    yield from _several()
    yield from _scaled()
    yield from _guided()


def _case(name: str, *prompts: dict, model: str = "alpha", **fields: object) -> tuple[str, str, dict]:
    return f"{model}-image-{name}", model, {"steps": 10, "guidance": 5.0, "image_prompts": list(prompts), **fields}


def _plain(model: str) -> Iterator[tuple[str, str, dict]]:
    yield _case("base", _prompt("", "sailor"), model=model)
    yield _case("plus", _prompt("plus", "castle", scale=0.7), model=model)
    yield _case("full", _prompt("full", "harbour"), model=model)
    yield _case("batch-2", _prompt("plus", "sailor"), model=model, batch=2, negative="blurred")
    yield _case("no-guidance", _prompt("plus", "sailor"), model=model, guidance=1.0)
    areas = _prompt("plus", "sailor", "castle", masks=("left", "right"), scale=0.9)
    yield _case("masks", areas, model=model, scheduler="dpmpp-2m")
    blocks = {"down": {"block_1": 0.4}, "mid": 0.5, "up": {"block_0": 0.8}}
    yield _case("blocks", _prompt("", "gull", scale=blocks), model=model)


def _several() -> Iterator[tuple[str, str, dict]]:
    two = (_prompt("plus", "castle", scale=0.95), _prompt("plus-face", "sailor", scale=0.3))
    told = {"negative": "blurred, cropped", "refiner": "alpha-refiner", "refine_at": 0.8}
    yield _case("two", *two, **told)
    yield _case("two-batch-2", *two, batch=2, scheduler="euler-ancestral", **told)
    three = (_prompt("", "gull", scale=0.4), _prompt("plus-face", "sailor", scale=0.5), _prompt("full", "castle"))
    yield _case("three-kinds", *three)
    yield _case("several-pictures", _prompt("plus", "castle", "sailor", "harbour", scale=0.8))
    yield _case("several-pictures-base", _prompt("", "castle", "sailor"), _prompt("full", "gull", "harbour"))
    yield _case("same-adapter-twice", _prompt("plus", "castle", scale=0.6), _prompt("plus", "gull", scale=0.9))
    areas = _prompt("", "sailor", "castle", masks=("disc", "right"))
    yield _case("masks-of-one-of-two", areas, _prompt("plus", "gull", scale=0.5), batch=2)
    yield _case("masks-of-two", areas, _prompt("full", "gull", masks=("left",), scale=0.5), guidance_runs="split")
    tall = {"width": 128, "height": 128, "negative": "x"}
    yield _case("mask-square", _prompt("plus", "harbour", masks=("corner",)), **tall)


def _scaled() -> Iterator[tuple[str, str, dict]]:
    for name in NAMED:
        yield _case(name, _prompt("plus", "castle", scale=name))
    both = (_prompt("plus", "castle", scale="layout"), _prompt("plus-face", "sailor", scale="style"))
    yield _case("style-and-layout-of-two", *both)
    each = {"down": {"block_1": [0.3, 0.6], "block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.2, 0.4], "block_1": 0.5}}
    yield _case("blocks-each", _prompt("plus", "castle", scale=each))
    yield _case("blocks-sides", _prompt("", "castle", scale={"down": 0.9, "up": 0.2}), _prompt("full", "gull"))
    yield _case("blocks-mid", _prompt("full", "harbour", scale={"mid": 1.0}))
    yield _case("blocks-masks", _prompt("plus", "gull", "castle", masks=("left", "disc"), scale=each))
    yield _case("pushed-away", _prompt("plus", "castle", scale=-0.5))
    yield _case("odd-latents", _prompt("plus", "castle"), width=104, height=72)
    yield _case("stretched", _prompt("plus", "castle", crop="stretch"), _prompt("", "harbour", crop="stretch"))


def _guided() -> Iterator[tuple[str, str, dict]]:
    """What diffusers has no argument for, on schedulers with and without memory; and guidance in two runs."""
    yield _case("two-runs", _prompt("full", "harbour"), guidance_runs="split", negative="x")
    for scheduler in ("euler", "dpmpp-2m"):
        turns = (_prompt("plus", "castle", steps=[0.0, 0.4]), _prompt("", "sailor", steps=[0.25, 1.0], scale=0.8))
        yield _case(f"{scheduler}-steps", *turns, scheduler=scheduler)
        late = _prompt("full", "sailor", "gull", masks=("left", "right"), steps=[0.25, 0.6])
        yield _case(f"{scheduler}-steps-late", late, scheduler=scheduler, batch=2)
        switched = {"guidance": 5.0, "guidance_interval": "0.5,6.5", "negative": "blurred", "scheduler": scheduler}
        yield _case(f"{scheduler}-interval", _prompt("plus", "castle"), **switched)
    for adapter in ("", "plus", "full"):
        seen = _prompt(adapter, "sailor", negative="castle")
        yield _case(f"negative-{adapter or 'base'}", seen, _prompt("plus-face", "gull", scale=0.5), negative="x")
    seen = _prompt("plus", "sailor", "castle", negative="gull")
    yield _case("negative-several-pictures", seen, prompt_syntax="a1111", prompt="a (castle:1.3)")
    seen = _prompt("plus", "sailor", "castle", masks=("left", "right"), negative="harbour")
    yield _case("negative-masks", seen)


def demo_cases() -> Iterator[tuple[str, str, dict]]:
    """The run whose numbers lie in the repository."""
    fields = {"width": 128, "height": 128, "steps": 6, "negative": "blurred"}
    refined = {"refiner": "demo-refiner", "refine_at": 0.7}
    style = _prompt("plus", "castle", scale=0.95)
    yield _case(
        "prompts", style, _prompt("", "sailor", masks=("corner",), scale=0.6), model="demo", **fields, **refined
    )


@contextmanager
def loaded(
    pipeline: StableDiffusionXLPipeline, models: Path, request: dict, step: Callable[[], int]
) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """The pipeline with the request's adapters: arguments of its call, and what the encoder sees in the pictures.

    `step` says which step is being made. Afterwards the pipeline is as it was.
    """
    prompts = request.get("image-prompts", [])
    if not prompts:
        yield {}, {}
        return
    files = [Path(FILES[prompt["adapter"]]) for prompt in prompts]
    folder = models / f"{request['model']}-adapters"
    names = [file.name for file in files]
    pipeline.load_ip_adapter(str(folder), str(files[0].parent), names, image_encoder_folder=ENCODER)
    hook = pipeline.unet.register_forward_pre_hook(_Told(pipeline, request, step), with_kwargs=True)
    try:
        yield _arguments(pipeline, request), _seen(pipeline, prompts)
    finally:
        hook.remove()
        pipeline.unload_ip_adapter()


class _Told:
    """Called before the UNet: sets the scales of the step, and leaves out the negative half where guidance is off."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, request: dict, step: Callable[[], int]) -> None:
        self.pipeline, self.request, self.step = pipeline, request, step
        self.both = None
        if "guidance-interval" in request:
            self.both = _embeds(pipeline, request, True, request.get("batch", 1))

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prompts, share = self.request["image-prompts"], self.step() / self.request["steps"]
        self.pipeline.set_ip_adapter_scale([_scale(prompt, share) for prompt in prompts])
        if self.both is None:
            return args, kwargs
        rows = len(args[0])
        embeds = [embeds[-rows:] for embeds in self.both]
        return args, {**kwargs, "added_cond_kwargs": {**kwargs["added_cond_kwargs"], "image_embeds": embeds}}


def _scale(prompt: dict, share: float) -> float | dict:
    """The scale of a prompt when a share of the steps has been made."""
    start, end = prompt.get("steps", (0.0, 1.0))
    scale = prompt.get("scale", 1.0)
    scale = NAMED[scale] if isinstance(scale, str) else scale
    return scale if start <= share < end else 0.0


def _arguments(pipeline: StableDiffusionXLPipeline, request: dict) -> dict:
    prompts = request["image-prompts"]
    given: dict[str, object] = {"ip_adapter_image": _pictures(pipeline, prompts)}
    if any("negative" in prompt for prompt in prompts):
        given = {"ip_adapter_image_embeds": _embeds(pipeline, request, request["guidance"] > 1, 1)}
    if any("masks" in prompt for prompt in prompts):
        masks = [_masks(prompt, request) if "masks" in prompt else None for prompt in prompts]
        given["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    return given


def _pictures(pipeline: StableDiffusionXLPipeline, prompts: list[dict]) -> list[list[Image.Image]]:
    return [[_picture(pipeline, file, prompt) for file in prompt["pictures"]] for prompt in prompts]


def _picture(pipeline: StableDiffusionXLPipeline, file: str, prompt: dict) -> Image.Image:
    picture = draw(Path(file).stem)
    if prompt.get("crop") == "stretch":
        return picture.resize((pipeline.image_encoder.config.image_size,) * 2, Image.Resampling.BICUBIC)
    return picture


def _masks(prompt: dict, request: dict) -> Tensor:
    """`[1, pictures, height, width]` as the attention processors want them."""
    masks = [draw(Path(file).stem) for file in prompt["masks"]]
    made = IPAdapterMaskProcessor().preprocess(masks, height=request["height"], width=request["width"])
    return made.reshape(1, len(masks), request["height"], request["width"])


@torch.no_grad()
def _embeds(pipeline: StableDiffusionXLPipeline, request: dict, guided: bool, batch: int) -> list[Tensor]:
    """What the pipeline makes of the pictures by itself, negative half first; but for negative pictures."""
    prompts = request["image-prompts"]
    embeds = pipeline.prepare_ip_adapter_image_embeds(_pictures(pipeline, prompts), None, "cpu", batch, guided)
    layers = pipeline.unet.encoder_hid_proj.image_projection_layers
    for prompt, layer, mine in zip(prompts, layers, embeds, strict=True):
        if guided and "negative" in prompt:
            picture = _picture(pipeline, prompt["negative"], prompt)
            mine[:batch] = pipeline.encode_image([picture], "cpu", 1, not isinstance(layer, ImageProjection))[0]
    return embeds


@torch.no_grad()
def _seen(pipeline: StableDiffusionXLPipeline, prompts: list[dict]) -> dict[str, Tensor]:
    """The encoder's two outputs for every picture of every prompt, its negative one last."""
    pictures = [
        _picture(pipeline, file, prompt)
        for prompt in prompts
        for file in (*prompt["pictures"], *([prompt["negative"]] if "negative" in prompt else []))
    ]
    return {
        "image_embeds": pipeline.encode_image(pictures, "cpu", 1, False)[0],
        "hidden_states": pipeline.encode_image(pictures, "cpu", 1, True)[0],
    }
