"""The runs that are compared with diffusers' pipelines: requests, in tronie's own words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import diffusers

from export.golden import image_prompts, lightning, lora_runs

SCHEDULERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
}
DRAWN = {
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp-2m-sde": diffusers.DPMSolverMultistepScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "sa-solver": diffusers.SASolverScheduler,
}
"""Schedulers whose steps draw from the generator that the initial latents came from."""
SPACINGS = ("leading", "trailing", "linspace")
WEIGHTED = (
    "a ((portrait)) of an (old:1.35) [sailor], red cap BREAK "
    + "grey beard, (woollen (cap:0.7):1.2), deep lines \\(oil\\), " * 6
)
LONG = "an oil painting of a very old sailor with a grey beard and a red woollen cap, " * 8


@dataclass(frozen=True)
class Case:
    """A request, under the names of tronie's request fields."""

    name: str
    request: dict = field(default_factory=dict)
    schedule: tuple[tuple[int, str], ...] = ()
    """Texts of a scheduled prompt, each with the step that it ends at."""


def _case(
    name: str,
    model: str,
    prompt: str = "a portrait of an old sailor",
    schedule: tuple[tuple[int, str], ...] = (),
    **request: object,
) -> Case:
    fields = {key.replace("_", "-"): value for key, value in request.items()}
    if request.get("scheduler") == "ddim" and request.get("spacing", "leading") != "leading":
        fields["diffusers-quirks"] = True
    size = {"width": 96, "height": 64, "seed": 17}
    return Case(name, {"prompt": prompt, "model": model, **size, **fields}, schedule)


def cases() -> Iterator[Case]:
    """Every run that is compared. All have 20 steps and guidance unless their name says what differs."""
    common = {"steps": 20, "guidance": 5.0}
    a1111 = {"prompt_syntax": "a1111", **common}
    for model in ("alpha", "beta", "gamma"):
        for scheduler in SCHEDULERS:
            for spacing in SPACINGS:
                options = {"scheduler": scheduler, "spacing": spacing, **common}
                yield _case(f"{model}-{scheduler}-{spacing}", model, **options)
        for scheduler in ("euler", "dpmpp-2m"):
            yield _case(f"{model}-{scheduler}-karras", model, scheduler=scheduler, sigmas="karras", **common)
        yield _case(f"{model}-negative-empty", model, negative="", **common)
        yield _case(f"{model}-negative-text", model, negative="blurred, cropped", **common)
        yield _case(f"{model}-batch-2", model, batch=2, negative="blurred", **common)
        yield _case(f"{model}-no-guidance", model, steps=20, guidance=1.0)
        yield _case(f"{model}-rescale", model, guidance_rescale=0.7, **common)
        yield _case(
            f"{model}-long-prompt", model, LONG, negative="Ünïcödé, 日本 😀! " + LONG, long_prompts="cut", **common
        )
        yield _case(f"{model}-chunks", model, LONG, negative="blurred", prompt_2=LONG * 2, **common)
        yield _case(f"{model}-chunks-zeros", model, LONG, **common)
        yield _case(f"{model}-weights", model, WEIGHTED, negative="(blurred:1.4), [x]", **a1111)
        yield _case(f"{model}-prompt-2", model, prompt_2="a seagull", negative="a", negative_2="b 9", **common)
        yield _case(f"{model}-two-runs", model, guidance_runs="split", negative="x", **common)
        yield _case(f"{model}-seed-max", model, seed=2**64 - 1, steps=3, guidance=2.0)
    yield _case(
        "alpha-micro-conditioning",
        "alpha",
        original_size="640x480",
        crop="16,24",
        target_size="320x200",
        negative_original_size="100x90",
        negative_crop="3,4",
        negative_target_size="80x70",
        **common,
    )
    yield _case("alpha-odd-latents-160x123", "alpha", width=984, height=1280, steps=3, guidance=5.0)
    yield _case("beta-odd-latents", "beta", width=104, height=72, **common)
    for scheduler in DRAWN:
        yield _case(f"alpha-{scheduler}", "alpha", scheduler=scheduler, **common)
        yield _case(f"alpha-{scheduler}-batch-2", "alpha", scheduler=scheduler, batch=2, **common)
    yield from _segmented(common, a1111)
    for name, tiling in (("alpha-tiled-vae", "on"), ("alpha-tiled-vae-64px", "64")):
        yield _case(name, "alpha", width=384, height=264, vae_tiling=tiling, steps=3, guidance=5.0)
    refined = {"refiner": "alpha-refiner", **common}
    for at in (0.7, 0.8):
        for scheduler in SCHEDULERS:
            for spacing in SPACINGS:
                name = f"alpha-refined-{at}-{scheduler}-{spacing}"
                yield _case(name, "alpha", refine_at=at, scheduler=scheduler, spacing=spacing, **refined)
    yield _case("alpha-refined-batch-2-negative", "alpha", refine_at=0.8, batch=2, negative="blurred", **refined)
    yield _case(
        "alpha-refined-scores",
        "alpha",
        refine_at=0.8,
        aesthetic_score=7.5,
        negative_aesthetic_score=1.5,
        negative="",
        **refined,
    )
    yield _case("alpha-refined-odd-latents", "alpha", width=104, height=72, refine_at=0.8, **refined)
    for name, model, fields in (*image_prompts.cases(), *lora_runs.cases(), *lightning.cases()):
        yield _case(name, model, **fields)


def _segmented(common: dict, a1111: dict) -> Iterator[Case]:
    """Runs that are told something else from step to step, on schedulers with and without memory."""
    switch = ((8, "a (castle:1.2) at night"), (20, "a harbour at night"))
    turns = tuple((step + 1, ("a cat, oil", "a dog, oil")[step % 2]) for step in range(20))
    for scheduler in ("euler", "dpmpp-2m"):
        on = {"scheduler": scheduler}
        text = "a [(castle:1.2):harbour:0.4] at night"
        yield _case(f"alpha-{scheduler}-schedule", "alpha", text, switch, negative="x", **on, **a1111)
        yield _case(f"alpha-{scheduler}-turns", "alpha", "a [cat|dog], oil", turns, **on, **a1111)
        steady = {"steps": 20, "negative": "blurred", **on}
        yield _case(f"alpha-{scheduler}-interval", "alpha", guidance=5.0, guidance_interval="0.5,6.5", **steady)
        yield _case(f"alpha-{scheduler}-ramp", "alpha", guidance_list=[9.0, 2.0], **steady)
        each = [0.0, *(1.5 + step / 4 for step in range(18)), 1.0]
        yield _case(f"alpha-{scheduler}-list", "alpha", guidance_list=each, **steady)
        yield _case(f"alpha-{scheduler}-seeds", "alpha", batch=2, seed=[17, 5], **on, **common)
    yield _case("alpha-ancestral-seeds", "alpha", batch=3, seed=[1, 2, 3], scheduler="euler-ancestral", **common)
    skipped = {"clip_skip": 1, "negative": "blurred", **common}
    yield _case("alpha-clip-skip-quirk", "alpha", diffusers_quirks=True, **skipped)
    for model in ("alpha", "beta", "gamma"):
        yield _case(f"{model}-clip-skip", model, **skipped)
    yield _case("alpha-noise-f16", "alpha", noise="cpu-f16", **common)


def tiny_cases() -> Iterator[Case]:
    """The few runs whose numbers lie in the repository, on its own tiny model."""
    options = {"width": 128, "height": 128, "steps": 6, "guidance": 5.0}
    yield _case("tiny-euler", "tiny", **options)
    switch = ((3, "a (castle:1.3) at night"), (6, "a harbour at night"))
    told = {"prompt_syntax": "a1111", "negative": "blurred", "guidance_interval": "0.3,9", **options}
    yield _case("tiny-told", "tiny", "a [(castle:1.3):harbour:3] at night", switch, scheduler="dpmpp-2m", **told)
    yield _case("tiny-ddim-negative", "tiny", scheduler="ddim", negative="blurred", **options)
    yield _case("tiny-refined", "tiny", scheduler="dpmpp-2m", refiner="tiny-refiner", refine_at=0.7, batch=2, **options)
    for name, model, fields in (*image_prompts.tiny_cases(), *lora_runs.tiny_cases()):
        yield _case(name, model, **fields)
