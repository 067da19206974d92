"""Whole runs of diffusers' schedulers with a made-up network: timesteps, sigmas and the latents of every step."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin
from safetensors.numpy import save_file

CLASSES: dict[str, type[SchedulerMixin]] = {
    "euler": EulerDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
}

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

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
STEPS = [1, 2, 4, 10, 20, 30, 50]
SHAPE = (1, 4, 1, 2)
TOLERANCES = {
    "plain": {"timestep": 1e-3, "sigma_relative": 2e-7, "latents_of_scale": 2e-5},
    "zero_snr": {"timestep": 1e-3, "sigma_relative": 2e-6, "latents_of_scale": 5e-5},
}
"""Fractional timesteps are compared with a tolerance, whole ones exactly; latents relative to the largest value of the
step, or 1. Rescaling to zero terminal SNR subtracts almost equal square roots, in which MKL rounds one unit off now and
then, and starts at sigma 4096, where diffusers' own f32 rounding shows."""


@dataclass(frozen=True)
class Case:
    """One run. ``spacing`` and ``sigmas`` are what a request overrides; None leaves them to the configuration."""

    scheduler: str
    config: str
    steps: int
    spacing: str | None = None
    sigmas: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    begin: int = 0

    def name(self) -> str:
        """A name that is unique among the cases of one scheduler."""
        parts = [self.config, str(self.steps), self.spacing, self.sigmas]
        parts += [f"{key}={value if not isinstance(value, list) else 'list'}" for key, value in self.overrides.items()]
        parts += [f"from{self.begin}"] if self.begin else []
        return "-".join(part for part in parts if part)

    def settings(self) -> dict[str, Any]:
        """The configuration as diffusers gets it."""
        settings = CONFIGS[self.config] | self.overrides
        if self.spacing is not None:
            settings |= {"timestep_spacing": self.spacing}
        if self.sigmas is not None:
            settings |= {"use_karras_sigmas": self.sigmas == "karras"}
        return settings


def grid_cases(scheduler: str) -> Iterator[Case]:
    """Every combination of what a request can choose."""
    curves = ["normal", "karras"] if scheduler != "ddim" else ["normal"]
    for config, spacing, curve, prediction, steps in itertools.product(
        ["sdxl", "bare"], SPACINGS, curves, PREDICTIONS, STEPS
    ):
        # The bare configuration differs in betas and offset only, so a thinner grid does.
        if config == "bare" and (steps not in (1, 4, 10, 20) or prediction == "sample"):
            continue
        yield Case(scheduler, config, steps, spacing, curve, {"prediction_type": prediction})


def option_cases(scheduler: str) -> Iterator[Case]:
    """Single options away from the default, where the class reads them."""
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    shared: list[dict[str, Any]] = [
        {},
        zero_snr,
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear"},
        {"num_train_timesteps": 20, "trained_betas": np.linspace(0.001, 0.4, 20).round(6).tolist(), "steps_offset": 0},
    ]
    own: dict[str, list[dict[str, Any]]] = {
        "euler": [
            {"final_sigmas_type": "sigma_min"},
            {"interpolation_type": "log_linear"},
            {"interpolation_type": "log_linear", "use_karras_sigmas": True},
            {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
            {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
            zero_snr | {"timestep_spacing": "leading"},
        ],
        "ddim": [
            {"set_alpha_to_one": True},
            {"clip_sample": True},
            {"clip_sample": True, "clip_sample_range": 0.5, "prediction_type": "sample"},
            {"set_alpha_to_one": False, "steps_offset": 0},
        ],
        "dpmpp-2m": [
            {"solver_order": 1},
            {"solver_order": 3},
            {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"solver_order": 3, "use_karras_sigmas": True},
            {"solver_type": "heun"},
            {"solver_type": "heun", "final_sigmas_type": "sigma_min"},
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
            {"solver_type": "logrho"},
            {"solver_type": "bh2"},
            {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        ],
    }
    for overrides in shared + own[scheduler]:
        small = overrides.get("num_train_timesteps") == 20
        for steps in (3, 8) if small else (3, 14, 15, 25):
            yield Case(scheduler, "sdxl", steps, overrides=overrides)
    for steps in (5, 48):
        yield Case(scheduler, "tests", steps)
        yield Case(scheduler, "tests", steps, "trailing")


def begin_cases(scheduler: str) -> Iterator[Case]:
    """Runs that start in the middle from noised latents, as image-to-image does."""
    for begin, spacing in itertools.product((1, 8), SPACINGS):
        yield Case(scheduler, "sdxl", 12, spacing, begin=begin)
    if scheduler == "dpmpp-2m":
        yield Case(scheduler, "sdxl", 20, overrides={"solver_order": 3}, begin=9)


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A bounded, non-linear stand-in that needs no weights: the same few f32 operations in both languages."""
    weight = 0.5 + timestep / 2000.0
    return x * weight / (1.0 + x.abs())


def fixed(seed: int) -> torch.Tensor:
    """A small latent of unit scale."""
    return torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(seed))


def run(case: Case) -> dict[str, np.ndarray]:
    """Run one case in diffusers; the first of the latents is the initial one."""
    scheduler = CLASSES[case.scheduler].from_config(case.settings())
    scheduler.set_timesteps(case.steps)
    noise = fixed(1)
    if case.begin:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(case.begin)
        x = scheduler.add_noise(fixed(2), noise, scheduler.timesteps[case.begin : case.begin + 1])
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        x = noise * scheduler.init_noise_sigma
    latents = [x]
    for timestep in scheduler.timesteps[case.begin :]:
        output = network(scheduler.scale_model_input(x, timestep), float(timestep))
        x = scheduler.step(output, timestep, x).prev_sample
        latents.append(x)
    values = {
        "timesteps": scheduler.timesteps.numpy().astype(np.float32),
        "init_noise_sigma": np.array([float(scheduler.init_noise_sigma)], np.float32),
        "latents": torch.cat(latents).numpy().reshape(len(latents), -1),
    }
    if hasattr(scheduler, "sigmas"):
        # A log-linear curve comes with a zero too many, which no step reaches.
        values["sigmas"] = scheduler.sigmas.numpy()[: len(scheduler.timesteps) + 1]
    return values


def write_one(scheduler: str, path: Path) -> None:
    """Write all cases of one scheduler: four tensors each, settings in the file's metadata."""
    tensors: dict[str, np.ndarray] = {"noise": fixed(1).numpy(), "clean": fixed(2).numpy()}
    described = []
    for case in itertools.chain(grid_cases(scheduler), option_cases(scheduler), begin_cases(scheduler)):
        values = run(case)
        if not all(np.isfinite(value).all() for value in values.values()):
            raise ValueError(f"{scheduler} {case.name()}: diffusers itself produces non-finite numbers")
        key = str(len(described))
        tensors |= {f"{key}/{name}": np.ascontiguousarray(value) for name, value in values.items()}
        described.append({"name": case.name(), **asdict(case)})
    document = {
        "made_by": "python -m export.golden schedulers",
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "tolerances": TOLERANCES,
        "configs": CONFIGS,
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
