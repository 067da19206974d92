"""diffusers' scheduler classes: which settings each one reads, and where the engine is meant to differ."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)

Overrides = dict[str, Any]

SPACINGS = ("leading", "trailing", "linspace")
CURVES = ("normal", "karras", "exponential", "beta")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SMALL_TABLE: Overrides = {
    "num_train_timesteps": 20,
    "trained_betas": np.linspace(0.001, 0.4, 20).round(6).tolist(),
    "steps_offset": 0,
}
ZERO_SNR: Overrides = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
CURVE_FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}


@dataclass(frozen=True)
class Scheduler:
    """One scheduler of the engine and the class it follows."""

    cls: type[SchedulerMixin]
    spacings: tuple[str | None, ...] = SPACINGS
    """What a request may ask for; None where the class has one spacing only."""
    curves: tuple[str | None, ...] = CURVES
    predictions: tuple[str, ...] = PREDICTIONS
    zero_snr: bool = False
    begins: bool = True
    """Whether runs that begin in the middle are what they should be."""
    fixed: Overrides = field(default_factory=dict)
    """Settings that make the class this scheduler."""
    own: tuple[Overrides, ...] = ()
    """Single settings away from the default."""
    steps: tuple[int, ...] = (1, 2, 4, 10, 20, 30, 50)
    timesteps: tuple[int, ...] | None = None
    """A list of timesteps, where the class takes one."""
    etas: tuple[float, ...] = ()
    calls: str = "one"
    """Model calls of a step: one, two (but one to zero) or plms."""
    truncates: bool = False
    """Whether timesteps of exponential and beta curves are cut off instead of rounded."""
    widened: bool = False
    """Whether its sigmas are widened to f64 before it runs: f32 coefficients lose digits by cancellation, and f32
    logarithms ask a Brownian tree at neighbouring places."""
    strides: bool = False
    """Whether a step arrives a fixed stride below its timestep, whatever the next one is."""


AYS_TIMESTEPS = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)
KARRAS_COSINE: Overrides = {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}
TO_SIGMA_MIN: Overrides = {"final_sigmas_type": "sigma_min"}
CLIPPED: tuple[Overrides, ...] = (
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.5, "prediction_type": "sample"},
)
MULTISTEP: tuple[Overrides, ...] = (
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_order": 3, "use_karras_sigmas": True},
    {"solver_order": 3, "lower_order_final": False, **TO_SIGMA_MIN},
    {"lower_order_final": False, **TO_SIGMA_MIN},
    {"solver_type": "heun"},
    {"solver_type": "heun", **TO_SIGMA_MIN},
    {"solver_type": "logrho"},
    {"solver_type": "bh2"},
    {"euler_at_final": True, **TO_SIGMA_MIN},
    KARRAS_COSINE,
)
SDE: Overrides = {"algorithm_type": "sde-dpmsolver++"}
EDM_CURVES = ("karras", "exponential")
EDM_PREDICTIONS = ("epsilon", "v_prediction")

CLASSES: dict[str, Scheduler] = {
    "euler": Scheduler(
        EulerDiscreteScheduler,
        zero_snr=True,
        timesteps=AYS_TIMESTEPS,
        own=(
            TO_SIGMA_MIN,
            {"interpolation_type": "log_linear"},
            {"interpolation_type": "log_linear", "use_karras_sigmas": True},
            {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
            KARRAS_COSINE,
            ZERO_SNR | {"timestep_spacing": "leading"},
        ),
    ),
    "euler-ancestral": Scheduler(
        EulerAncestralDiscreteScheduler,
        curves=("normal",),
        predictions=("epsilon", "v_prediction"),
        zero_snr=True,
        own=({"use_karras_sigmas": True},),
    ),
    "heun": Scheduler(
        HeunDiscreteScheduler,
        calls="two",
        timesteps=AYS_TIMESTEPS,
        own=(*CLIPPED, KARRAS_COSINE),
    ),
    "ddim": Scheduler(
        DDIMScheduler,
        curves=("normal",),
        zero_snr=True,
        etas=(0.4, 1.0),
        strides=True,
        own=(*CLIPPED, {"set_alpha_to_one": True}, {"set_alpha_to_one": False, "steps_offset": 0}),
    ),
    "ddpm": Scheduler(
        DDPMScheduler,
        curves=("normal",),
        zero_snr=True,
        timesteps=AYS_TIMESTEPS,
        own=(*CLIPPED, {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"}),
    ),
    "dpmpp-2m": Scheduler(
        DPMSolverMultistepScheduler,
        zero_snr=True,
        timesteps=AYS_TIMESTEPS,
        own=(*MULTISTEP, {"use_lu_lambdas": True}),
        truncates=True,
    ),
    "dpmpp-2m-sde": Scheduler(
        DPMSolverMultistepScheduler,
        fixed=SDE,
        zero_snr=True,
        timesteps=AYS_TIMESTEPS,
        own=MULTISTEP,
        truncates=True,
    ),
    "dpmpp-sde": Scheduler(
        DPMSolverSDEScheduler,
        widened=True,
        predictions=("epsilon", "v_prediction"),
        calls="two",
        own=(KARRAS_COSINE,),
    ),
    "dpmpp-singlestep": Scheduler(
        DPMSolverSinglestepScheduler,
        spacings=(None,),
        timesteps=AYS_TIMESTEPS,
        own=(
            {"solver_order": 1},
            {"solver_order": 3},
            {"solver_order": 3, "solver_type": "heun"},
            {"solver_type": "heun"},
            {"solver_order": 3, "solver_type": "heun", **TO_SIGMA_MIN},
            {"lower_order_final": True},
            {"lower_order_final": True, **TO_SIGMA_MIN},
            TO_SIGMA_MIN,
            SDE,
            SDE | {"solver_order": 3},
            SDE | {"solver_order": 3, "solver_type": "heun"},
            SDE | {"solver_type": "heun"},
        ),
        truncates=True,
    ),
    "dpm2": Scheduler(
        KDPM2DiscreteScheduler, predictions=("epsilon", "v_prediction"), calls="two", own=(KARRAS_COSINE,)
    ),
    "dpm2-ancestral": Scheduler(
        KDPM2AncestralDiscreteScheduler, predictions=("epsilon", "v_prediction"), calls="two", own=(KARRAS_COSINE,)
    ),
    "lms": Scheduler(LMSDiscreteScheduler, begins=False, own=(KARRAS_COSINE,)),
    "pndm": Scheduler(
        PNDMScheduler,
        curves=("normal",),
        predictions=("epsilon", "v_prediction"),
        begins=False,
        calls="plms",
        strides=True,
        own=({"set_alpha_to_one": True},),
    ),
    "unipc": Scheduler(
        UniPCMultistepScheduler,
        zero_snr=True,
        own=(
            {"solver_order": 1},
            {"solver_order": 3},
            {"solver_order": 3, "use_karras_sigmas": True},
            {"solver_order": 3, "lower_order_final": False, **TO_SIGMA_MIN},
            {"solver_type": "bh1", **TO_SIGMA_MIN},
            {"solver_type": "bh1", "solver_order": 3, **TO_SIGMA_MIN},
            {"solver_type": "midpoint"},
            {"disable_corrector": [0, 1]},
            {"use_karras_sigmas": True, **TO_SIGMA_MIN},
            {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
            KARRAS_COSINE,
        ),
        truncates=True,
    ),
    "deis": Scheduler(
        DEISMultistepScheduler,
        widened=True,
        own=(
            {"solver_order": 1},
            {"solver_order": 3},
            {"solver_order": 3, "lower_order_final": False},
            {"solver_type": "bh1"},
            KARRAS_COSINE,
        ),
        truncates=True,
    ),
    "lcm": Scheduler(
        LCMScheduler,
        spacings=(None,),
        curves=("normal",),
        zero_snr=True,
        steps=(1, 2, 4, 7, 8, 20, 50),
        timesteps=(999, 759, 499, 259),
        own=(*CLIPPED, {"original_inference_steps": 100}, {"timestep_scaling": 3.0}),
    ),
    "tcd": Scheduler(
        TCDScheduler,
        spacings=(None,),
        curves=("normal",),
        zero_snr=True,
        etas=(0.0, 0.7, 1.0),
        steps=(1, 2, 4, 7, 8, 20, 50),
        timesteps=(999, 759, 499, 259),
        own=({"original_inference_steps": 100},),
    ),
    "sa-solver": Scheduler(
        SASolverScheduler,
        widened=True,
        own=(
            {"predictor_order": 1, "corrector_order": 1},
            {"predictor_order": 3, "corrector_order": 3},
            {"predictor_order": 3, "corrector_order": 1},
            {"predictor_order": 1, "corrector_order": 3},
            {"predictor_order": 3, "corrector_order": 4},
            {"lower_order_final": False},
            KARRAS_COSINE,
        ),
        truncates=True,
    ),
    "edm-euler": Scheduler(
        EDMEulerScheduler,
        spacings=(None,),
        curves=EDM_CURVES,
        predictions=EDM_PREDICTIONS,
        own=(TO_SIGMA_MIN, {"rho": 3.0}, {"sigma_max": 120.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}),
    ),
    "edm-dpmpp-2m": Scheduler(
        EDMDPMSolverMultistepScheduler,
        spacings=(None,),
        curves=EDM_CURVES,
        predictions=EDM_PREDICTIONS,
        own=(
            TO_SIGMA_MIN,
            {"solver_order": 1},
            {"solver_order": 3},
            {"solver_type": "heun"},
            {"euler_at_final": True, **TO_SIGMA_MIN},
            {"lower_order_final": False},
            SDE,
        ),
    ),
}
"""By the engine's names."""
