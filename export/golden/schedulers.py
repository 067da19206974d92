"""Whole runs of diffusers' schedulers with a made-up network: timesteps, sigmas and the latents of every step."""

import inspect
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import scipy
import torch
import torchsde
from diffusers import SchedulerMixin
from diffusers.schedulers import AysSchedules
from safetensors.numpy import save_file

from .scheduler_classes import CLASSES, CURVE_FLAGS, SMALL_TABLE, ZERO_SNR, Scheduler

SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""``scheduler/scheduler_config.json`` of SDXL base 1.0."""

CONFIGS: dict[str, dict[str, Any]] = {"sdxl": SDXL, "bare": {}, "tests": {"num_train_timesteps": 1100}}
"""SDXL's own, each class's defaults, and what diffusers' own Euler tests use."""

SHAPE = (1, 4, 1, 2)
BATCH = (2, 4, 3, 2)
NOISE_SEED = 7
"""Of the generator that steps draw from, and of the Brownian tree."""
TOLERANCES = {
    "plain": {"timestep": 1e-3, "sigma_relative": 2e-7, "latents_of_scale": 2e-5},
    "zero_snr": {"timestep": 1e-3, "sigma_relative": 2e-6, "latents_of_scale": 2e-5},
    "brownian": {"timestep": 1e-3, "sigma_relative": 2e-7, "latents_of_scale": 1e-3},
    "single": {"timestep": 1e-3, "sigma_relative": 2e-6, "latents_of_scale": 2e-5},
    "ancestral": {"timestep": 1e-2, "sigma_relative": 2e-7, "latents_of_scale": 2e-5},
}
"""Fractional timesteps are compared with a tolerance, whole ones exactly; latents relative to the largest value of the
step, or 1. Rescaling to zero terminal SNR subtracts almost equal square roots, in which MKL rounds one unit off now and
then. A Brownian tree is asked at sigmas rounded to
their sixth decimal, which the last digit of an f32 decides. edm-dpmpp-2m computes its levels in f32. The level between
two levels of dpm2-ancestral is a root of a difference of squares, in f32, which moves its timestep by a hundredth where
two steps span the whole range."""


@dataclass(frozen=True)
class Case:
    """One run. ``asked`` is what a request says, in the engine's words; what it leaves out is the configuration's."""

    scheduler: str
    config: str
    steps: int
    asked: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    begin: int = 0
    shape: tuple[int, ...] = SHAPE

    def name(self) -> str:
        """A name that is unique among the cases of one scheduler."""
        parts = [self.config, str(self.steps)]
        for settings in (self.asked, self.overrides):
            for key, value in settings.items():
                parts.append(f"{key}={'list' if isinstance(value, list) else value}")
        parts += [f"from{self.begin}"] if self.begin else []
        parts += ["batch"] if self.shape != SHAPE else []
        return "-".join(parts)

    def settings(self) -> dict[str, Any]:
        """The configuration as diffusers gets it."""
        kind = CLASSES[self.scheduler]
        settings = CONFIGS[self.config] | kind.fixed | self.overrides
        if spacing := self.asked.get("spacing"):
            settings |= {"timestep_spacing": spacing}
        if (curve := self.asked.get("sigmas")) and curve != "ays":
            if "sigma_schedule" in inspect.signature(kind.cls.__init__).parameters:
                settings |= {"sigma_schedule": curve}
            else:
                settings |= {flag: name == curve for name, flag in CURVE_FLAGS.items()}
        if self.scheduler == "dpmpp-sde":
            settings |= {"noise_sampler_seed": NOISE_SEED}
        return settings

    def quirky(self) -> bool:
        """Whether diffusers does what the engine only does when told to."""
        kind = CLASSES[self.scheduler]
        settings = self.settings()
        default = inspect.signature(kind.cls.__init__).parameters.get("timestep_spacing")
        spacing = settings.get("timestep_spacing", default and default.default)
        train_steps = settings.get("num_train_timesteps", 1000)
        uneven = spacing == "linspace" or (spacing == "trailing" and train_steps % self.steps)
        cut = kind.truncates and any(settings.get(CURVE_FLAGS[curve]) for curve in ("exponential", "beta"))
        sde = settings.get("algorithm_type") == "sde-dpmsolver++" and settings.get("solver_order") == 3
        velocity = kind.calls == "plms" and settings.get("prediction_type") == "v_prediction"
        runge_kutta = kind.calls == "plms" and not settings.get("skip_prk_steps", False)
        return bool((kind.strides and uneven) or cut or sde or velocity or runge_kutta)


def grid_cases(scheduler: str) -> Iterator[Case]:
    """Every combination of what a request can choose."""
    kind = CLASSES[scheduler]
    for config, spacing, curve, prediction in itertools.product(
        ["sdxl", "bare"], kind.spacings, kind.curves, kind.predictions
    ):
        asked = {name: value for name, value in (("spacing", spacing), ("sigmas", curve)) if value is not None}
        if kind.curves == ("normal",):
            asked.pop("sigmas")
        # The bare configuration differs in betas and offset only, predictions in one conversion: a thinner grid does.
        if config == "bare":
            steps = kind.steps[::3] if prediction == "epsilon" else ()
        else:
            steps = kind.steps if prediction == "epsilon" else kind.steps[2:6:2]
        for count in steps:
            if runs(scheduler, config, curve, count):
                yield Case(scheduler, config, count, asked, {"prediction_type": prediction})


def runs(scheduler: str, config: str, curve: str | None, steps: int) -> bool:
    """Whether the class itself can.

    PNDM's start by Runge and Kutta, which SDXL's configuration skips, takes four steps. A single step of EDM's
    exponential curve is at its lowest level instead of its highest.
    """
    if scheduler.startswith("edm") and curve == "exponential":
        return steps > 1
    return scheduler != "pndm" or config == "sdxl" or steps >= 4


def option_cases(scheduler: str) -> Iterator[Case]:
    """Single options away from the default, where the class reads them."""
    kind = CLASSES[scheduler]
    shared: list[dict[str, Any]] = [{}]
    if not scheduler.startswith("edm"):
        shared += [{"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "linear"}, small_table(scheduler)]
    if kind.zero_snr:
        shared.append(ZERO_SNR)
    for overrides in [*shared, *kind.own]:
        small = overrides.get("num_train_timesteps") == 20
        for steps in (3, 8) if small else (3, 14, 15, 25):
            yield Case(scheduler, "sdxl", steps, overrides=overrides)
    for steps in (5, 48):
        yield Case(scheduler, "tests", steps)
        if "trailing" in kind.spacings:
            yield Case(scheduler, "tests", steps, {"spacing": "trailing"})


def small_table(scheduler: str) -> dict[str, Any]:
    """Twenty training timesteps; distilled models need to know that there are no more."""
    distilled = scheduler in ("lcm", "tcd")
    return SMALL_TABLE | ({"original_inference_steps": 10} if distilled else {})


def list_cases(scheduler: str) -> Iterator[Case]:
    """Lists of one's own, the schedule of Align Your Steps, shares of noise, batches."""
    kind = CLASSES[scheduler]
    if kind.timesteps is not None:
        yield Case(scheduler, "sdxl", len(kind.timesteps), {"timesteps_list": list(kind.timesteps)})
    if scheduler == "euler":
        sigmas = AysSchedules["StableDiffusionXLSigmas"]
        yield Case(scheduler, "sdxl", len(sigmas) - 1, {"sigmas": "ays"})
        yield Case(scheduler, "sdxl", 4, {"sigmas_list": [14.0, 5.5, 1.25, 0.3, 0.05]})
        # SDXL-Lightning's, its one step with a prediction of the picture.
        yield Case(scheduler, "sdxl", 8, {"spacing": "trailing"})
        yield Case(scheduler, "sdxl", 1, {"spacing": "trailing"}, overrides={"prediction_type": "sample"})
    for eta, steps in itertools.product(kind.etas, (4, 25)):
        yield Case(scheduler, "sdxl", steps, {"eta": eta})
    yield Case(scheduler, "sdxl", 6, shape=BATCH)


def begin_cases(scheduler: str) -> Iterator[Case]:
    """Runs that start in the middle from noised latents, as image-to-image does."""
    kind = CLASSES[scheduler]
    if not kind.begins:
        return
    for begin, spacing in itertools.product((1, 8), kind.spacings):
        yield Case(scheduler, "sdxl", 12, {"spacing": spacing} if spacing else {}, begin=begin)
    if "solver_order" in inspect.signature(kind.cls.__init__).parameters:
        yield Case(scheduler, "sdxl", 20, overrides={"solver_order": 3}, begin=9)


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A bounded, non-linear stand-in that needs no weights: the same few f32 operations in both languages."""
    weight = 0.5 + timestep / 2000.0
    return x * weight / (1.0 + x.abs())


def fixed(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A small latent of unit scale."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


class Wide(torch.Tensor):
    """Latents in f64 that stay so where a class narrows them to f32.

    Runs of zero terminal SNR start at sigma 4096, from where an f32 step to sigma 8 loses 5e-5 of the latents.
    """

    def to(self, *args: object, **kwargs: object) -> torch.Tensor:
        """As torch's, but for f32."""
        return self if args == (torch.float32,) else super().to(*args, **kwargs)


def calls_of(kind: Scheduler, settings: dict[str, Any], steps: int) -> list[int]:
    """Model calls of every step."""
    if kind.calls == "two":
        return [2] * (steps - 1) + [1]
    if kind.calls == "plms" and not settings.get("skip_prk_steps", False):
        return [4] * 3 + [1] * (steps - 3)
    if kind.calls == "plms" and steps > 1:
        return [2] + [1] * (steps - 1)
    return [1] * steps


def is_wide(settings: dict[str, Any]) -> bool:
    """Whether the class runs with f64 latents and levels."""
    return settings.get("rescale_betas_zero_snr", False)


def prepared(case: Case, settings: dict[str, Any]) -> SchedulerMixin:
    """The scheduler with its timesteps set."""
    scheduler = CLASSES[case.scheduler].cls.from_config(settings)
    if case.asked.get("sigmas") == "ays":
        scheduler.set_timesteps(sigmas=AysSchedules["StableDiffusionXLSigmas"])
    elif sigmas := case.asked.get("sigmas_list"):
        scheduler.set_timesteps(sigmas=sigmas)
    elif timesteps := case.asked.get("timesteps_list"):
        scheduler.set_timesteps(timesteps=timesteps)
    else:
        scheduler.set_timesteps(case.steps)
    if hasattr(scheduler, "sigmas") and (CLASSES[case.scheduler].widened or is_wide(settings)):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def run(case: Case) -> dict[str, np.ndarray]:
    """Run one case in diffusers; the first of the latents is the initial one."""
    kind, settings = CLASSES[case.scheduler], case.settings()
    scheduler = prepared(case, settings)
    calls = calls_of(kind, settings, case.steps)
    begin = sum(calls[: case.begin])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    noise = fixed(1, case.shape)
    x = noise * scheduler.init_noise_sigma
    if case.begin:
        x = scheduler.add_noise(fixed(2, case.shape), noise, scheduler.timesteps[begin : begin + 1])
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": case.asked["eta"]} if "eta" in case.asked else {}
    if "generator" in known:
        extra["generator"] = torch.Generator("cpu").manual_seed(NOISE_SEED)
    if is_wide(settings):
        x = x.double().as_subclass(Wide)
    latents, timesteps = [x], iter(scheduler.timesteps[begin:])
    for count in calls[case.begin :]:
        for timestep in itertools.islice(timesteps, count):
            scaled = scheduler.scale_model_input(x, timestep).as_subclass(torch.Tensor)
            output = network(scaled.float(), float(timestep))
            x = scheduler.step(output, timestep, x, **extra).prev_sample
        latents.append(x)
    if next(timesteps, None) is not None:
        raise ValueError(f"{case.scheduler} {case.name()}: diffusers makes more calls than expected")
    values = {
        "calls": scheduler.timesteps[begin:].numpy().astype(np.float32),
        "init_noise_sigma": np.array([float(scheduler.init_noise_sigma)], np.float32),
        "latents": torch.cat(latents).as_subclass(torch.Tensor).float().numpy().reshape(len(latents), -1),
    }
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.numpy().astype(np.float32)
        if kind.calls == "two":
            # Every level but the first stands there twice.
            sigmas = np.concatenate([sigmas[:1], sigmas[1::2]])
        # A log-linear curve comes with a zero too many, which no step reaches.
        values["sigmas"] = sigmas[: case.steps + 1]
    return values


def write_one(scheduler: str, path: Path) -> None:
    """Write all cases of one scheduler: three or four tensors each, settings in the file's metadata."""
    tensors: dict[str, np.ndarray] = {}
    described = []
    makers = (grid_cases, option_cases, list_cases, begin_cases)
    for case in itertools.chain.from_iterable(maker(scheduler) for maker in makers):
        values = run(case)
        if not all(np.isfinite(value).all() for value in values.values()):
            raise ValueError(f"{scheduler} {case.name()}: diffusers itself produces non-finite numbers")
        key = str(len(described))
        tensors |= {f"{key}/{name}": np.ascontiguousarray(value) for name, value in values.items()}
        asked = case.asked | {"steps": case.steps, "diffusers_quirks": case.quirky()}
        described.append({"name": case.name(), **asdict(case), "asked": asked})
    versions = {module.__name__: module.__version__ for module in (diffusers, torch, np, scipy, torchsde)}
    document = {
        "made_by": "python -m export.golden schedulers",
        "versions": versions,
        "tolerances": TOLERANCES,
        "configs": CONFIGS,
        "fixed": CLASSES[scheduler].fixed,
        "cases": described,
    }
    # One metadata key: several would be stored in no fixed order.
    save_file(tensors, path, metadata={"golden": json.dumps(document, separators=(",", ":"))})


def write(out: Path) -> list[Path]:
    """Write ``scheduler-<name>.safetensors`` for every scheduler."""
    paths = []
    for scheduler in CLASSES:
        path = out / f"scheduler-{scheduler}.safetensors"
        write_one(scheduler, path)
        paths.append(path)
    return paths
