"""Whole runs of diffusers' SDXL pipelines, number by number, for the Rust test `tests/parity.rs`.

One safetensors file a case. Its metadata holds the request in tronie's own words and the catalogue to read; its tensors
what diffusers made of it on the CPU in f32: token ids, embeddings, initial latents, every guided network output and
every step's latents, and the pictures.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from export import run, tiny

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
REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = ("alpha", "alpha-refiner", "beta", "gamma")
LONG = "an oil painting of a very old sailor with a grey beard and a red woollen cap, " * 8


@dataclass(frozen=True)
class Case:
    """A request, under the names of tronie's request fields."""

    name: str
    request: dict = field(default_factory=dict)


def _case(name: str, model: str, prompt: str = "a portrait of an old sailor", **request: object) -> Case:
    fields = {key.replace("_", "-"): value for key, value in request.items()}
    if request.get("scheduler") == "ddim" and request.get("spacing", "leading") != "leading":
        fields["diffusers-quirks"] = True
    return Case(name, {"prompt": prompt, "model": model, "width": 96, "height": 64, "seed": 17, **fields})


def cases() -> Iterator[Case]:
    """Every run that is compared. All have 20 steps and guidance unless their name says what differs."""
    common = {"steps": 20, "guidance": 5.0}
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
        yield _case(f"{model}-long-prompt", model, LONG, negative="Ünïcödé, 日本 😀! " + LONG, **common)
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


def demo_cases() -> Iterator[Case]:
    """The few runs whose numbers lie in the repository, on its own demo model."""
    options = {"width": 128, "height": 128, "steps": 6, "guidance": 5.0}
    yield _case("demo-euler", "demo", **options)
    yield _case("demo-ddim-negative", "demo", scheduler="ddim", negative="blurred", **options)
    yield _case("demo-refined", "demo", scheduler="dpmpp-2m", refiner="demo-refiner", refine_at=0.7, batch=2, **options)


class _Recorder:
    """Collects the tensors of one case."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.step = 0

    def put(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.detach().clone().contiguous()

    def watch(self, pipeline: diffusers.DiffusionPipeline) -> None:
        """Records initial latents, and what goes into and comes out of every scheduler step."""
        prepare, step = type(pipeline).prepare_latents.__get__(pipeline), pipeline.scheduler.step

        def prepare_latents(*args: object, **kwargs: object) -> torch.Tensor:
            latents = prepare(*args, **kwargs)
            if self.step == 0:
                self.put("latents.0", latents)
            return latents

        # The pipelines look at the signature to find out whether a step takes their generator.
        @functools.wraps(step)
        def scheduler_step(output: torch.Tensor, timestep: torch.Tensor, *args: object, **kwargs: object) -> tuple:
            result = step(output, timestep, *args, **kwargs)
            self.put(f"timestep.{self.step}", torch.as_tensor(timestep, dtype=torch.float64).reshape(1))
            self.put(f"output.{self.step}", output)
            self.step += 1
            self.put(f"latents.{self.step}", result[0])
            return result

        pipeline.prepare_latents = prepare_latents
        pipeline.scheduler.step = scheduler_step


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(height), int(width)


def _micro_conditioning(request: dict) -> dict:
    sizes = ("original-size", "target-size", "negative-original-size", "negative-target-size")
    given = {key.replace("-", "_"): _size(request[key]) for key in sizes if key in request}
    for key, name in (("crop", "crops_coords_top_left"), ("negative-crop", "negative_crops_coords_top_left")):
        if key in request:
            given[name] = tuple(int(part) for part in request[key].split(","))
    return given


@functools.cache
def _open(cls: type, folder: Path) -> tuple[diffusers.DiffusionPipeline, dict]:
    """A pipeline and its own scheduler's config. Opened once: that takes longer than most runs."""
    pipeline = cls.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def _load(cls: type, folder: Path, request: dict) -> diffusers.DiffusionPipeline:
    pipeline, config = _open(cls, folder)
    changes = {}
    if "spacing" in request:
        changes["timestep_spacing"] = request["spacing"]
    if "sigmas" in request:
        changes["use_karras_sigmas"] = request["sigmas"] == "karras"
    name = request.get("scheduler", "euler")
    scheduler = (SCHEDULERS | DRAWN)[name]
    if name == "dpmpp-2m-sde":
        changes["algorithm_type"] = "sde-dpmsolver++"
    pipeline.scheduler = scheduler.from_config(config, **changes)
    tiling = request.get("vae-tiling", "off")
    pipeline.vae.use_tiling = tiling != "off"
    if tiling.isdigit():
        pipeline.vae.tile_sample_min_size = int(tiling)
        pipeline.vae.tile_latent_min_size = int(tiling) // pipeline.vae_scale_factor
    return pipeline


def _texts(recorder: _Recorder, pipeline: diffusers.DiffusionPipeline, request: dict) -> None:
    """Token ids and embeddings, negative first, as the base pipeline makes them."""
    prompts = [request["prompt"], request.get("prompt-2", request["prompt"])]
    tokenizers = [t for t in (pipeline.tokenizer, pipeline.tokenizer_2) if t is not None]
    for place, (tokenizer, prompt) in enumerate(zip(tokenizers, prompts, strict=False)):
        ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
        recorder.put(f"ids.{place}", torch.tensor(ids, dtype=torch.int64))
    guided = request["guidance"] > 1
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=request["prompt"],
        prompt_2=request.get("prompt-2"),
        negative_prompt=request.get("negative"),
        negative_prompt_2=request.get("negative-2"),
        do_classifier_free_guidance=guided,
        device="cpu",
    )
    recorder.put("hidden", torch.cat([negative, positive]) if guided else positive)
    recorder.put("pooled", torch.cat([negative_pooled, pooled]) if guided else pooled)


@torch.no_grad()
def reference(models: Path, request: dict) -> dict[str, torch.Tensor]:
    """What diffusers makes of a request on the checkpoints in a folder."""
    recorder = _Recorder()
    base = _load(StableDiffusionXLPipeline, models / request["model"], request)
    _texts(recorder, base, request)
    recorder.watch(base)
    common = {
        "negative_prompt": request.get("negative"),
        "negative_prompt_2": request.get("negative-2"),
        "prompt_2": request.get("prompt-2"),
        "num_inference_steps": request["steps"],
        "guidance_scale": request["guidance"],
        "guidance_rescale": request.get("guidance-rescale", 0.0),
        "num_images_per_prompt": request.get("batch", 1),
        "generator": torch.Generator("cpu").manual_seed(request["seed"]),
        **_micro_conditioning(request),
    }
    refiner, at = request.get("refiner"), request.get("refine-at", 0.8)
    output = base(
        request["prompt"],
        width=request["width"],
        height=request["height"],
        denoising_end=at if refiner else None,
        output_type="latent" if refiner else "np",
        **common,
    )
    if refiner:
        second = _load(StableDiffusionXLImg2ImgPipeline, models / refiner, request)
        recorder.watch(second)
        scores = {
            name.replace("-", "_"): request[name]
            for name in ("aesthetic-score", "negative-aesthetic-score")
            if name in request
        }
        output = second(
            request["prompt"], image=output.images, denoising_start=at, output_type="np", **scores, **common
        )
    pictures = (np.asarray(output.images) * 255).round().astype(np.uint8)
    recorder.put("pictures", torch.from_numpy(pictures))
    return recorder.tensors


def _write_case(case: Case, folders: Path, catalogue: str, out: Path) -> Path:
    torch.set_num_threads(1)
    tensors = reference(folders, case.request)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    path = out / f"{case.name}.safetensors"
    metadata = {"request": json.dumps(case.request), "catalogue": catalogue, "versions": json.dumps(versions)}
    save_file(tensors, path, metadata)
    return path


def write(out: Path) -> Iterator[Path]:
    """Makes the tiny checkpoints, exports them with this exporter and records every case on them."""
    models = out / "models"
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in CHECKPOINTS:
            tiny.write(name, models / name)
        written = [pool.submit(_write_case, case, models, "models/models.yaml", out) for case in cases()]
        for name in CHECKPOINTS:
            export(models / name, name, models)
        for future in as_completed(written):
            yield future.result()


def write_demo(out: Path) -> Iterator[Path]:
    """Records the demo model's cases, for the repository."""
    for case in demo_cases():
        yield _write_case(case, REPOSITORY / "models", "../../../models.yaml", out)


def export(source: Path, name: str, out: Path) -> None:
    """Exports one checkpoint as the command line does."""
    arguments = argparse.Namespace(
        command="model",
        source=str(source),
        name=name,
        out=out,
        dialect="all",
        verify=False,
        variant=None,
        revision=None,
        licence=None,
        steps=None,
        guidance=None,
    )
    if run.export(arguments) != 0:
        raise RuntimeError(f"export of {name} failed")
