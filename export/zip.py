"""`python -m export zip`: learns ZipLoRA's mergers with the published objective, by gradients through the UNet.

Shah et al. 2023 (arXiv 2311.13600), equation 5, as github.com/mkshing/ziplora-pytorch implements it: the merged model
shall predict with the content LoRA's prompt what the content LoRA predicts, with the style's what the style LoRA does,
plus `similarity` times the mean |m_c m_s| of every layer. Pictures enter only as places where predictions are compared;
without any, each LoRA paints its own. `tronie lora zip` needs no gradients: it solves every layer by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import Tensor

from export.errors import ExportError
from export.zip_lora import BOTH, CONTENT, STYLE, Zip

_WEIGHT_DECAY = 1e-4
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Settings:
    """How mergers are learned. The paper takes 100 steps at a similarity of 0.01; ziplora-pytorch's lr is 5e-5."""

    steps: int = 100
    lr: float = 0.01
    similarity: float = 0.01
    seed: int = 0
    samples: int = 4
    sample_steps: int = 25
    guidance: float = 5.0
    size: int | None = None


class Side:
    """A LoRA's prompt and its pictures' latents `[n, channels, h, w]`, and what the networks are told of the prompt."""

    def __init__(self, zipped: Zip, side: str, prompt: str, latents: Tensor) -> None:
        self.name, self.latents = side, latents
        pipeline = zipped.pipeline
        self._told = {}
        for sides in ((), (side,), BOTH):
            with zipped.only(*sides), torch.no_grad():
                embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
                self._told[sides] = embeds, pooled
        scale = pipeline.vae_scale_factor
        height, width = (length * scale for length in latents.shape[2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=latents.device)
        self._ids = ids.to(next(iter(self._told.values()))[0].dtype)

    def predict(self, zipped: Zip, sides: tuple[str, ...], x: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's output with these LoRAs at a noised `x` `[1, channels, h, w]`, in f32."""
        embeds, pooled = self._told[sides]
        added = {"text_embeds": pooled, "time_ids": self._ids}
        with zipped.only(*sides):
            return zipped.pipeline.unet(
                x.to(embeds.dtype), timestep, embeds, added_cond_kwargs=added, return_dict=False
            )[0].float()


def sides(zipped: Zip, prompts: dict[str, str], folders: dict[str, Path | None], settings: Settings) -> list[Side]:
    """Both sides, their latents out of a folder of pictures or painted by the side's own LoRA."""
    result = []
    for side in BOTH:
        if not prompts[side].strip():
            raise ExportError(f"--prompt-{side}: is empty; say what the LoRA was trained to be called by")
        folder = folders[side]
        latents = _painted(zipped, side, prompts[side], settings) if folder is None else _encoded(zipped, folder)
        result.append(Side(zipped, side, prompts[side], latents))
    return result


def _painted(zipped: Zip, side: str, prompt: str, settings: Settings) -> Tensor:
    pipeline = zipped.pipeline
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for index in range(settings.samples):
        generator = torch.Generator().manual_seed(settings.seed + index)
        with zipped.only(side), torch.no_grad():
            output = pipeline(
                prompt,
                height=settings.size,
                width=settings.size,
                num_inference_steps=settings.sample_steps,
                guidance_scale=settings.guidance,
                generator=generator,
                output_type="latent",
            )
        made.append(output.images.float())
    return torch.cat(made)


def _encoded(zipped: Zip, folder: Path) -> Tensor:
    pipeline = zipped.pipeline
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        raise ExportError(f"{folder}: holds no picture ({', '.join(_PICTURES)})")
    vae, made = pipeline.vae, []
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    for file in files:
        with Image.open(file) as picture:
            pixels = pipeline.image_processor.preprocess(picture.convert("RGB"))
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
        if mean is not None:
            shape = (1, -1, 1, 1)
            latents = (latents - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)
        made.append(latents * vae.config.scaling_factor)
    if len({latents.shape for latents in made}) > 1:
        raise ExportError(f"{folder}: its pictures differ in size; bring them to one")
    return torch.cat(made)


def places(zipped: Zip, both: list[Side], seed: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Timesteps and the sides' latents, noised to it with the same noise, without end."""
    generator = torch.Generator().manual_seed(seed)
    training = diffusers.DDPMScheduler.from_config(zipped.pipeline.scheduler.config)
    device = both[0].latents.device
    while True:
        chosen = [side.latents[torch.randint(len(side.latents), (1,), generator=generator)] for side in both]
        timestep = torch.randint(training.config.num_train_timesteps, (1,), generator=generator)
        noise = torch.randn(chosen[0].shape, generator=generator)
        noised = [training.add_noise(x.cpu(), noise.expand_as(x), timestep).to(device) for x in chosen]
        yield timestep.to(device), noised


def learn(zipped: Zip, both: list[Side], settings: Settings, tell: Callable[[int, float], None]) -> None:
    """Moves the mergers of `zipped` down the published objective."""
    parameters = [merger for mergers in zipped.mergers.values() for merger in mergers]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=_WEIGHT_DECAY)
    for step, (timestep, noised) in zip(range(settings.steps), places(zipped, both, settings.seed), strict=False):
        total = 0.0
        optimizer.zero_grad()
        # One side's graph at a time is kept.
        for side, x in zip(both, noised, strict=True):
            with torch.no_grad():
                target = side.predict(zipped, (side.name,), x, timestep)
            loss = torch.nn.functional.mse_loss(side.predict(zipped, BOTH, x, timestep), target)
            loss.backward()
            total += loss.item()
        similarity = settings.similarity * zipped.similarity()
        similarity.backward()
        total += similarity.item()
        if not all(merger.grad.isfinite().all() for merger in parameters):
            raise ExportError(f"step {step + 1}: the gradient is not finite; lower --lr, or compute in f32")
        optimizer.step()
        tell(step, total)
        if settings.similarity > 0 and similarity.item() == 0.0:
            return


@torch.no_grad()
def lost(zipped: Zip, both: list[Side], seed: int, count: int) -> dict[str, float]:
    """How much of each LoRA's effect the merged model loses: |eps_m - eps_1|^2 / |eps_1 - eps_0|^2 over `count` places.

    `eps_1` has that LoRA alone and `eps_0` none; 0 is the LoRA itself, 1 an error as large as its effect.
    """
    over, under = dict.fromkeys(BOTH, 0.0), dict.fromkeys(BOTH, 0.0)
    for _, (timestep, noised) in zip(range(count), places(zipped, both, seed), strict=False):
        for side, x in zip(both, noised, strict=True):
            merged, single, base = (side.predict(zipped, which, x, timestep) for which in (BOTH, (side.name,), ()))
            over[side.name] += (merged - single).square().sum().item()
            under[side.name] += (single - base).square().sum().item()
    silent = [side for side in BOTH if under[side] == 0.0]
    if silent:
        raise ExportError(f"--{silent[0]}: the LoRA changes nothing with its prompt")
    return {side: over[side] / under[side] for side in BOTH}


def open_model(source: str, dtype: str, device: str) -> diffusers.StableDiffusionXLPipeline:
    """The SDXL pipeline of a folder in diffusers layout or of the hub, frozen."""
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    try:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(source, torch_dtype=kind)
    except (OSError, ValueError) as error:
        raise ExportError(f"--model {source}: is no SDXL model in diffusers layout: {error}") from error
    return pipeline.to(device)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    settings = Settings(
        *(getattr(args, name) for name in ("steps", "lr", "similarity", "seed", "samples", "sample_steps")),
        guidance=args.guidance,
        size=args.size,
    )
    zipped = Zip(open_model(args.model, args.dtype, args.device), args.content, args.style)
    if args.checkpointing:
        zipped.pipeline.unet.enable_gradient_checkpointing()
    prompts = {CONTENT: args.prompt_content or "", STYLE: args.prompt_style or ""}
    both = None
    if args.mergers is None or any(prompts.values()):
        both = sides(zipped, prompts, {CONTENT: args.images_content, STYLE: args.images_style}, settings)
        before = lost(zipped, both, settings.seed + 1, args.measure)
    if args.mergers is not None:
        zipped.load_mergers(args.mergers)
    else:
        learn(zipped, both, settings, lambda step, loss: print(f"step {step + 1}: loss {loss:.6f}"))
    if both is not None:
        after = lost(zipped, both, settings.seed + 1, args.measure)
        for side in BOTH:
            print(f"{side}: loses {after[side]:.4f} of its effect; added up plainly, {before[side]:.4f}")
    zipped.save(args.out)
    if args.save_mergers is not None:
        zipped.save_mergers(args.save_mergers)
    others = len(zipped.layers) - len(zipped.mergers)
    print(f"{args.out}: {len(zipped.mergers)} attention layers with mergers, {others} other layers added up")
    return 0
