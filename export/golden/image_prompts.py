"""Runs with image prompts: their cases, their pictures, and what diffusers' pipeline is told for them.

The adapters are the small ones of `export/tiny_adapters.py`, loaded with `load_ip_adapter`. What the pipeline has no
argument for is done around it: scales that change from step to step, guidance that comes and goes, and the faces that
FaceID-PlusV2 sees beside identities, before each call of the UNet; a negative picture, and bars around a picture, with
embeddings.
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
from safetensors.torch import save_file
from torch import Tensor, nn

from export.golden.pictures import padded
from export.tiny_adapters import ENCODER, FILES, IDENTITY

FOLDER = "pictures"
"""Where the pictures lie, beside the cases."""
PICTURES = {"sailor": (60, 60), "castle": (90, 52), "harbour": (37, 61), "gull": (20, 24)}
"""Sizes, width first: larger and smaller than what encoders see, and of other shapes."""
IDENTITIES = {"anna": ".safetensors", "bela": ".npy", "carl": ".safetensors"}
"""Identities of faces, and what they are kept in."""
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


def identity(name: str) -> Tensor:
    """What stands for ArcFace's embedding of a face, of length 1: `[IDENTITY]`."""
    values = np.random.default_rng(list(name.encode())).normal(size=IDENTITY)
    return torch.from_numpy((values / np.linalg.norm(values)).astype(np.float32))


def write_pictures(cases: list[dict], out: Path) -> None:
    """Writes the pictures and identities that requests name, into their folder in `out`."""
    prompts = [prompt for request in cases for prompt in request.get("image-prompts", [])]
    files = {file for prompt in prompts for file in _files(prompt)}
    (out / FOLDER).mkdir(exist_ok=True)
    for file in sorted(files):
        path = out / file
        if path.suffix == ".npy":
            np.save(path, identity(path.stem).numpy())
        elif path.suffix == ".safetensors":
            save_file({"id_embeds": identity(path.stem)[None]}, path)
        else:
            draw(path.stem).save(path)


def _files(prompt: dict) -> list[str]:
    single = [prompt[key] for key in ("negative", "negative-face") if key in prompt]
    return [*prompt["pictures"], *prompt.get("faces", []), *prompt.get("masks", []), *single]


def _seen_files(prompt: dict) -> list[str]:
    """The pictures that the image encoder sees, the negative one last."""
    if prompt["adapter"] == "ip-adapter-faceid":
        return []
    shown, other = ("faces", "negative-face") if "faces" in prompt else ("pictures", "negative")
    return [*prompt[shown], *([prompt[other]] if other in prompt else [])]


def _prompt(adapter: str, *pictures: str, masks: tuple[str, ...] = (), **fields: object) -> dict:
    """One entry of `image-prompts`; pictures and identities by their names."""
    name = f"ip-adapter-{adapter}" if adapter else "ip-adapter"
    fields = {key.replace("_", "-"): value for key, value in fields.items()}
    prompt = {"adapter": name, "pictures": [_file(picture) for picture in pictures], **fields}
    if masks:
        prompt["masks"] = [_file(mask) for mask in masks]
    if "faces" in fields:
        prompt["faces"] = [_file(face) for face in fields["faces"]]
    for key in ("negative", "negative-face"):
        if key in fields:
            prompt[key] = _file(fields[key])
    return prompt


def _file(name: str) -> str:
    return f"{FOLDER}/{name}{IDENTITIES.get(name, '.png')}"


def cases() -> Iterator[tuple[str, str, dict]]:
    """Name, model, and fields of the request, of every case."""
    for model in ("alpha", "beta"):
        yield from _plain(model)
    yield from _several()
    yield from _scaled()
    yield from _guided()
    yield from _faces()


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
    yield _case("padded", _prompt("plus", "castle", crop="pad"), _prompt("", "harbour", crop="pad", negative="gull"))
    areas = _prompt("plus", "sailor", "castle", masks=("left", "right"), scale=[0.9, 0.3])
    yield _case("scales-of-masks", areas, _prompt("", "gull", masks=("disc",), scale=0.5))


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


def _faces() -> Iterator[tuple[str, str, dict]]:
    """Identities of faces, alone, beside pictures, and with what is seen of the faces."""
    for model in ("alpha", "beta"):
        yield _case("faceid", _prompt("faceid", "anna", scale=0.8), model=model)
        seen = _prompt("faceid-plusv2", "anna", faces=["sailor"], scale=0.8)
        yield _case("faceid-plusv2", seen, model=model, negative="blurred")
    yield _case("faceid-batch-2", _prompt("faceid", "anna", "bela"), batch=2, scheduler="dpmpp-2m")
    seen = _prompt("faceid-plusv2", "bela", "carl", faces=["sailor", "gull"], shortcut=0.4, crop="stretch")
    yield _case("faceid-plusv2-batch-2", seen, batch=2, guidance_runs="split")
    yield _case("faceid-no-guidance", _prompt("faceid", "bela"), seen, guidance=1.0)
    areas = {"masks": ("left", "right"), "scale": [0.9, 0.5]}
    yield _case("faceid-masks", _prompt("faceid", "anna", "bela", **areas), _prompt("plus", "castle", scale=0.4))
    seen = _prompt("faceid-plusv2", "anna", "bela", faces=["gull", "sailor"], masks=("disc", "right"))
    yield _case("faceid-plusv2-masks", seen, _prompt("faceid", "carl", scale={"mid": 0.6}), _prompt("", "castle"))
    first = _prompt("faceid-plusv2", "anna", faces=["sailor"], steps=[0.0, 0.5], shortcut=2.0)
    second = _prompt("faceid-plusv2", "anna", faces=["sailor"], steps=[0.3, 1.0], shortcut=0.0, scale="style")
    yield _case("faceid-steps", first, second, _prompt("faceid", "bela", steps=[0.2, 0.8], scale=0.5))
    switched = {"guidance": 5.0, "guidance_interval": "0.5,6.5", "negative": "blurred", "scheduler": "dpmpp-2m"}
    yield _case("faceid-interval", first, _prompt("faceid", "carl", scale=0.5), **switched)
    other = _prompt("faceid-plusv2", "anna", faces=["sailor"], negative="carl", negative_face="gull")
    yield _case("faceid-negative", other, _prompt("faceid", "bela", negative="anna"), negative="x", batch=2)


def tiny_cases() -> Iterator[tuple[str, str, dict]]:
    """The run whose numbers lie in the repository."""
    fields = {"width": 128, "height": 128, "steps": 6, "negative": "blurred"}
    refined = {"refiner": "tiny-refiner", "refine_at": 0.7}
    style = _prompt("plus", "castle", scale=0.95)
    yield _case(
        "prompts", style, _prompt("", "sailor", masks=("corner",), scale=0.6), model="tiny", **fields, **refined
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
    folders = [str(models / f"{request['model']}-adapters")] * len(files)
    inside, names = [str(file.parent) for file in files], [file.name for file in files]
    pipeline.load_ip_adapter(folders, inside, names, image_encoder_folder=ENCODER)
    for prompt, layer in zip(prompts, pipeline.unet.encoder_hid_proj.image_projection_layers, strict=True):
        if "faces" in prompt:
            layer.shortcut, layer.shortcut_scale = True, prompt.get("shortcut", 1.0)
    hook = pipeline.unet.register_forward_pre_hook(_Told(pipeline, request, step), with_kwargs=True)
    try:
        yield _arguments(pipeline, request), _seen(pipeline, prompts)
    finally:
        hook.remove()
        pipeline.unload_ip_adapter()


class _Told:
    """Called before the UNet: sets scales and faces of the step, and leaves out the negative half without guidance."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, request: dict, step: Callable[[], int]) -> None:
        self.pipeline, self.request, self.step = pipeline, request, step
        self.both = None
        if "guidance-interval" in request:
            self.both = self._repeated(_embeds(pipeline, request, True))
        layers = pipeline.unet.encoder_hid_proj.image_projection_layers
        shown = [(layer, prompt) for layer, prompt in zip(layers, request["image-prompts"], strict=True)]
        shown = [(layer, prompt) for layer, prompt in shown if "faces" in prompt]
        self.layers = [layer for layer, _ in shown]
        self.faces = self._repeated([_looked_at(pipeline, prompt, True, hidden=True) for _, prompt in shown])

    def _repeated(self, halves: list[Tensor]) -> list[Tensor]:
        """For every picture of the batch, the negative half first."""
        batch = self.request.get("batch", 1)
        return [half.repeat_interleave(batch, dim=0) for half in halves]

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prompts, share = self.request["image-prompts"], self.step() / self.request["steps"]
        self.pipeline.set_ip_adapter_scale([_scale(prompt, share) for prompt in prompts])
        rows = len(args[0])
        for layer, faces in zip(self.layers, self.faces, strict=True):
            layer.clip_embeds = faces[-rows:]
        if self.both is None:
            return args, kwargs
        embeds = [embeds[-rows:] for embeds in self.both]
        return args, {**kwargs, "added_cond_kwargs": {**kwargs["added_cond_kwargs"], "image_embeds": embeds}}


def _scale(prompt: dict, share: float) -> float | list | dict:
    """The scale of a prompt when a share of the steps has been made."""
    start, end = prompt.get("steps", (0.0, 1.0))
    scale = prompt.get("scale", 1.0)
    scale = NAMED[scale] if isinstance(scale, str) else scale
    return scale if start <= share < end else 0.0


def _arguments(pipeline: StableDiffusionXLPipeline, request: dict) -> dict:
    prompts = request["image-prompts"]
    if any(_needs_embeds(prompt) for prompt in prompts):
        given: dict[str, object] = {"ip_adapter_image_embeds": _embeds(pipeline, request, request["guidance"] > 1)}
    else:
        pictures = [[_picture(pipeline, file, prompt) for file in prompt["pictures"]] for prompt in prompts]
        given = {"ip_adapter_image": pictures}
    if any("masks" in prompt for prompt in prompts):
        masks = [_masks(prompt, request) if "masks" in prompt else None for prompt in prompts]
        given["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    return given


def _needs_embeds(prompt: dict) -> bool:
    """Whether the pipeline has no argument for it: what is not a picture, and a picture with bars."""
    return "negative" in prompt or "faceid" in prompt["adapter"] or prompt.get("crop") == "pad"


def _picture(pipeline: StableDiffusionXLPipeline, file: str, prompt: dict) -> Image.Image | Tensor:
    """A picture, or `[1, 3, size, size]` where its pixels are not what the pipeline would make of it."""
    picture = draw(Path(file).stem)
    if prompt.get("crop") == "pad":
        normal = pipeline.feature_extractor
        size = pipeline.image_encoder.config.image_size
        rule = {"size": size, "mean": normal.image_mean, "std": normal.image_std}
        return torch.from_numpy(padded(picture, rule))[None]
    if prompt.get("crop") == "stretch":
        return picture.resize((pipeline.image_encoder.config.image_size,) * 2, Image.Resampling.BICUBIC)
    return picture


def _masks(prompt: dict, request: dict) -> Tensor:
    """`[1, pictures, height, width]` as the attention processors want them."""
    masks = [draw(Path(file).stem) for file in prompt["masks"]]
    made = IPAdapterMaskProcessor().preprocess(masks, height=request["height"], width=request["width"])
    return made.reshape(1, len(masks), request["height"], request["width"])


def _embeds(pipeline: StableDiffusionXLPipeline, request: dict, guided: bool) -> list[Tensor]:
    """What every adapter is shown, `[1 or 2, pictures, …]`, the negative half first."""
    prompts, layers = request["image-prompts"], pipeline.unet.encoder_hid_proj.image_projection_layers
    return [
        _identities(prompt, guided)
        if "faceid" in prompt["adapter"]
        else _looked_at(pipeline, prompt, guided, hidden=not isinstance(layer, ImageProjection))
        for prompt, layer in zip(prompts, layers, strict=True)
    ]


def _identities(prompt: dict, guided: bool) -> Tensor:
    """Those of a prompt, after zeros or its negative one."""
    told = torch.stack([identity(Path(file).stem) for file in prompt["pictures"]])[None]
    other = identity(Path(prompt["negative"]).stem).expand_as(told) if "negative" in prompt else torch.zeros_like(told)
    return torch.cat([other, told]) if guided else told


@torch.no_grad()
def _looked_at(pipeline: StableDiffusionXLPipeline, prompt: dict, guided: bool, *, hidden: bool) -> Tensor:
    """What the encoder sees in the pictures of a prompt, after nothing or its negative one."""
    shown, other = ("faces", "negative-face") if "faces" in prompt else ("pictures", "negative")
    told, nothing = zip(*(_encoded(pipeline, file, prompt, hidden) for file in prompt[shown]), strict=True)
    if other in prompt:
        nothing = [_encoded(pipeline, prompt[other], prompt, hidden)[0]] * len(told)
    told, nothing = torch.cat(told)[None], torch.cat(nothing)[None]
    return torch.cat([nothing, told]) if guided else told


def _encoded(pipeline: StableDiffusionXLPipeline, file: str, prompt: dict, hidden: bool) -> tuple[Tensor, Tensor]:
    """One picture and the unconditional one, as the pipeline encodes them."""
    return pipeline.encode_image(_picture(pipeline, file, prompt), "cpu", 1, hidden)


@torch.no_grad()
def _seen(pipeline: StableDiffusionXLPipeline, prompts: list[dict]) -> dict[str, Tensor]:
    """The encoder's two outputs for every picture that it sees."""
    files = [(file, prompt) for prompt in prompts for file in _seen_files(prompt)]
    if not files:
        return {}
    return {
        name: torch.cat([_encoded(pipeline, file, prompt, hidden)[0] for file, prompt in files])
        for name, hidden in (("image_embeds", False), ("hidden_states", True))
    }
