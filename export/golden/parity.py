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
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from export import add_adapter, run, tiny, tiny_adapters
from export.golden import image_prompts, lightning, lora_runs, prompts
from export.golden.cases import DRAWN, SCHEDULERS, Case, cases, tiny_cases

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = ("alpha", "alpha-refiner", "beta", "gamma")
ADAPTED = ("alpha", "beta")
"""Those that have adapters."""


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
        clip_skip=request.get("clip-skip"),
    )
    recorder.put("hidden", torch.cat([negative, positive]) if guided else positive)
    recorder.put("pooled", torch.cat([negative_pooled, pooled]) if guided else pooled)


def _scales(pipeline: diffusers.DiffusionPipeline, request: dict) -> list[float]:
    """The guidance scale of every step; 1 where there is none."""
    steps = request["steps"]
    listed = request.get("guidance-list", [request.get("guidance")])
    places = np.linspace(0, len(listed) - 1, steps)
    scales = np.interp(places, np.arange(len(listed)), listed)
    if "guidance-interval" in request:
        low, high = (float(end) for end in request["guidance-interval"].split(","))
        pipeline.scheduler.set_timesteps(steps)
        sigmas = pipeline.scheduler.sigmas.numpy()[:steps]
        scales = np.where((low < sigmas) & (sigmas <= high), scales, 1.0)
    return scales.tolist()


def _told(pipeline: diffusers.DiffusionPipeline, case: Case, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings and pooled embedding of a step, negative first."""
    request = case.request
    prompt = next((text for until, text in case.schedule if step < until), request["prompt"])
    texts = [[prompt, request.get("prompt-2", prompt)][: _encoders(pipeline)]]
    if "negative" in request:
        texts.insert(0, [request["negative"], request.get("negative-2", request["negative"])][: _encoders(pipeline)])
    made = prompts.embed(
        pipeline, texts, request.get("prompt-syntax", "plain"), [request.get("clip-skip", 0)] * len(texts)
    )
    if "negative" not in request:
        made.insert(0, tuple(torch.zeros_like(part) for part in made[0]))
    return made


def _encoders(pipeline: diffusers.DiffusionPipeline) -> int:
    return sum(t is not None for t in (pipeline.tokenizer, pipeline.tokenizer_2))


def _tell(recorder: _Recorder, pipeline: diffusers.DiffusionPipeline, case: Case) -> dict:
    """Arguments that make the pipeline take its embeddings and guidance from here, step by step."""
    scales = _scales(pipeline, case.request)
    told = [_told(pipeline, case, step) for step in range(case.request["steps"])]
    (negative, negative_pooled), (positive, pooled) = told[0]
    guided = _guided_first(case.request)
    recorder.put("hidden", torch.cat([negative, positive]) if guided else positive)
    recorder.put("pooled", torch.cat([negative_pooled, pooled]) if guided else pooled)

    def next_step(pipe: diffusers.DiffusionPipeline, step: int, _: object, tensors: dict) -> dict:
        if step + 1 == len(told):
            return {}
        pipe._guidance_scale = scales[step + 1]
        branches = told[step + 1] if scales[step + 1] > 1 else told[step + 1][1:]
        ids = tensors["add_time_ids"][:1]
        return {
            "prompt_embeds": torch.cat([hidden for hidden, _ in branches]),
            "add_text_embeds": torch.cat([pooled for _, pooled in branches]),
            "add_time_ids": ids.repeat(len(branches), 1),
        }

    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": scales[0],
        "callback_on_step_end": next_step,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"],
    }


def _guided_first(request: dict) -> bool:
    return request.get("guidance-list", [request.get("guidance")])[0] > 1


def _is_told(request: dict) -> bool:
    """Whether diffusers cannot do it by itself."""
    ours = ("prompt-syntax", "guidance-list", "guidance-interval")
    skips = "clip-skip" in request and "diffusers-quirks" not in request
    return (
        skips
        or any(key in request for key in ours)
        or (len(request["prompt"]) > 300 and request.get("long-prompts") != "cut")
    )


def _generators(seed: int | list[int]) -> torch.Generator | list[torch.Generator]:
    if isinstance(seed, list):
        return [torch.Generator("cpu").manual_seed(each) for each in seed]
    return torch.Generator("cpu").manual_seed(seed)


@torch.no_grad()
def reference(models: Path, case: Case, beside: Path) -> dict[str, torch.Tensor]:
    """What diffusers makes of a request on the checkpoints in a folder; its LoRAs are in the folder `beside`."""
    recorder = _Recorder()
    base = _load(StableDiffusionXLPipeline, models / case.request["model"], case.request)
    recorder.watch(base)
    with lora_runs.loaded(base, beside, case.request, fused=case.name.endswith("-fused")):
        _paint(recorder, base, models, case)
    return recorder.tensors


def _paint(recorder: _Recorder, base: StableDiffusionXLPipeline, models: Path, case: Case) -> None:
    """Runs the base pipeline, and the refiner's where there is one."""
    request = case.request
    common = {
        "negative_prompt": request.get("negative"),
        "negative_prompt_2": request.get("negative-2"),
        "prompt_2": request.get("prompt-2"),
        "num_inference_steps": request["steps"],
        "guidance_scale": request.get("guidance"),
        "guidance_rescale": request.get("guidance-rescale", 0.0),
        "num_images_per_prompt": request.get("batch", 1),
        "generator": _generators(request["seed"]),
        **_micro_conditioning(request),
    }
    if _is_told(request):
        for name in ("negative_prompt", "negative_prompt_2", "prompt_2"):
            del common[name]
        common |= _tell(recorder, base, case)
    else:
        _texts(recorder, base, request)
        common["clip_skip"] = request.get("clip-skip")
    if request.get("noise") == "cpu-f16":
        shape = (1, 4, request["height"] // 8, request["width"] // 8)
        common["latents"] = torch.randn(shape, generator=common["generator"], dtype=torch.float16).float()
    refiner, at = request.get("refiner"), request.get("refine-at", 0.8)
    with image_prompts.loaded(base, models, request, lambda: recorder.step) as (told, seen):
        for name, tensor in seen.items():
            recorder.put(name, tensor)
        output = base(
            None if _is_told(request) else request["prompt"],
            width=request["width"],
            height=request["height"],
            denoising_end=at if refiner else None,
            output_type="latent" if refiner else "np",
            **told,
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


def _write_case(case: Case, folders: Path, catalogue: str, out: Path) -> Path:
    torch.set_num_threads(1)
    tensors = reference(folders, case, out)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    path = out / f"{case.name}.safetensors"
    metadata = {"request": json.dumps(case.request), "catalogue": catalogue, "versions": json.dumps(versions)}
    save_file(tensors, path, metadata)
    return path


def _write_inputs(requests: list[dict], models: Path, out: Path) -> None:
    """Writes the pictures and LoRAs that requests name, beside the cases."""
    image_prompts.write_pictures(requests, out)
    opened = functools.partial(_open, StableDiffusionXLPipeline)
    lora_runs.write_files(models, lora_runs.used(requests), out, lambda folder: opened(folder)[0])


def write(out: Path) -> Iterator[Path]:
    """Makes the tiny checkpoints, exports them with this exporter and records every case on them."""
    models = out / "models"
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in CHECKPOINTS:
            tiny.write(name, models / name)
        for name in ADAPTED:
            tiny.write(f"{name}-adapters", models / f"{name}-adapters")
        lightning.write(models)
        _write_inputs([case.request for case in cases()], models, out)
        written = [pool.submit(_write_case, case, models, "models/models.yaml", out) for case in cases()]
        for name in CHECKPOINTS:
            export(models / name, name, models)
        for name in ADAPTED:
            export_adapters(models / f"{name}-adapters", name, models)
        lightning.enter(models)
        for future in as_completed(written):
            yield future.result()


def write_tiny(out: Path) -> Iterator[Path]:
    """Records the tiny model's cases, for the repository."""
    _write_inputs([case.request for case in tiny_cases()], REPOSITORY / "tests" / "models", out)
    for case in tiny_cases():
        yield _write_case(case, REPOSITORY / "tests" / "models", "../../models/models.yaml", out)


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


def export_adapters(folder: Path, model: str, out: Path) -> None:
    """Exports the adapters of a folder, and the encoder beside them, as the command line does."""
    for name, file in tiny_adapters.FILES.items():
        arguments = argparse.Namespace(
            source=str(folder / file),
            model=model,
            name=name,
            image_encoder=None if name == "ip-adapter-faceid" else str(folder / tiny_adapters.ENCODER),
            image_encoder_name="image_encoder",
            lora_out=None,
            revision=None,
            verify=False,
            out=out,
            dialect="all",
        )
        if add_adapter.run(arguments) != 0:
            raise RuntimeError(f"export of {name} for {model} failed")
