"""Samplers by the names that the WebUI gives them, so that a setting means the same here and there.

A diffusers scheduler mixes two things in one configuration: what the checkpoint was trained with (betas, prediction
type) and how one likes to sample. Only the first is taken from the checkpoint; the second comes from the table below,
whatever scheduler somebody happened to save beside the weights.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdlora.errors import ConfigError

_DPM = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero", "timestep_spacing": "linspace"}
_ODE = {**_DPM, "algorithm_type": "dpmsolver++"}
_SDE = {**_DPM, "algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1}

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler a": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "Euler Karras": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace", **_KARRAS}),
    "Heun": ("HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "Heun Karras": ("HeunDiscreteScheduler", {"timestep_spacing": "linspace", **_KARRAS}),
    "DPM2": ("KDPM2DiscreteScheduler", {"timestep_spacing": "linspace"}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"timestep_spacing": "linspace", **_KARRAS}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "linspace", **_KARRAS}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _ODE),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**_ODE, **_KARRAS}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}),
    "DDIM": ("DDIMScheduler", {**_LEADING, "clip_sample": False, "set_alpha_to_one": False}),
    "DDPM": ("DDPMScheduler", {**_LEADING, "clip_sample": False}),
    "PLMS": ("PNDMScheduler", {**_LEADING, "skip_prk_steps": True, "set_alpha_to_one": False}),
    # Not bh1, which the WebUI starts with: with a last sigma of zero, as here, it divides by infinity.
    "UniPC": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2", "timestep_spacing": "linspace"}),
}
"""WebUI name -> diffusers class and the settings that make it that sampler.

Source: diffusers' documentation, "Schedulers", table of A1111 names; the WebUI's `sd_samplers_kdiffusion.py`.
"""

_NEEDS = {"LMS": "scipy", "LMS Karras": "scipy", "DPM++ SDE": "torchsde", "DPM++ SDE Karras": "torchsde"}
"""Samplers of the WebUI that are left out because their diffusers class needs a further package."""

_KOHYA = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "k_euler": "Euler",
    "euler_a": "Euler a",
    "k_euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "k_dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "k_dpm_2_a": "DPM2 a",
    "dpmsolver++": "DPM++ 2M",
    "lms": "LMS",
    "k_lms": "LMS",
}
"""How sd-scripts spells samplers in its prompt files."""


def sampler_name(name: str) -> str:
    """Returns a sampler's name as it stands in `SAMPLERS`; case and sd-scripts' spellings are forgiven.

    Raises:
        ConfigError: for a sampler that is not known, with the nearest one that is.
    """
    wanted = " ".join(name.split()).lower()
    wanted = _KOHYA.get(wanted, wanted).lower()
    by_lower = {known.lower(): known for known in SAMPLERS}
    if wanted in by_lower:
        return by_lower[wanted]
    for missing, package in _NEEDS.items():
        if wanted == missing.lower():
            nearest = "DPM++ 2M SDE" if missing.startswith("DPM++") else "DPM++ 2M"
            raise ConfigError(f"sampler {missing} is left out here, it needs the package {package}; try {nearest}")
    near = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.5)
    hint = f"did you mean {by_lower[near[0]]}? " if near else ""
    raise ConfigError(f"unknown sampler {name!r}; {hint}known: {', '.join(SAMPLERS)}")


def split_schedule(name: str) -> tuple[str, str]:
    """Splits a sampler's name as the WebUI's PNG texts do: sampler, and schedule type "Karras" or "Uniform".

    The schedule is never left to the WebUI's "Automatic", which picks Karras for some samplers.
    """
    plain = name.removesuffix(" Karras")
    return plain, "Karras" if plain != name else "Uniform"


def make_scheduler(name: str, scheduler_config: Mapping[str, Any]) -> Any:
    """Builds the diffusers scheduler of a sampler for a checkpoint.

    Args:
        name: a sampler, see `sampler_name`.
        scheduler_config: the checkpoint's scheduler configuration; its betas and its `prediction_type` are kept, and
            "trailing" spacing is too, for such checkpoints must begin at the very last timestep.

    Raises:
        ConfigError: for a sampler that is not known.
    """
    import diffusers

    class_name, settings = SAMPLERS[sampler_name(name)]
    cls = getattr(diffusers, class_name)
    takes = inspect.signature(cls).parameters
    config: dict[str, Any] = {
        "num_train_timesteps": scheduler_config.get("num_train_timesteps", 1000),
        "beta_start": scheduler_config.get("beta_start", 0.0001),
        "beta_end": scheduler_config.get("beta_end", 0.02),
        "beta_schedule": scheduler_config.get("beta_schedule", "linear"),
        "trained_betas": scheduler_config.get("trained_betas"),
        "prediction_type": scheduler_config.get("prediction_type", "epsilon"),
        **settings,
    }
    if "steps_offset" in takes:
        config["steps_offset"] = 1
    zero_snr = bool(scheduler_config.get("rescale_betas_zero_snr"))
    if zero_snr and "rescale_betas_zero_snr" in takes:
        config["rescale_betas_zero_snr"] = True
    elif zero_snr:
        config["trained_betas"] = _nearly_zero_snr_betas(scheduler_config)
    if zero_snr or scheduler_config.get("timestep_spacing") == "trailing":
        config["timestep_spacing"] = "trailing"
    with _numpy_silent():
        scheduler = cls.from_config(config)
    _begin_at_the_first_step(scheduler)
    return scheduler


def _begin_at_the_first_step(scheduler: Any) -> None:
    # diffusers looks the first step up by its timestep and, where two steps round to the same one, takes the second
    # and runs off the end. Drawing from noise always begins at step 0, so it is told so.
    set_timesteps = scheduler.set_timesteps

    def set_timesteps_and_begin(*args: Any, **kwargs: Any) -> None:
        with _numpy_silent():
            set_timesteps(*args, **kwargs)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps_and_begin


@contextmanager
def _numpy_silent() -> Iterator[None]:
    # Several schedulers hand tensors to numpy in ways that numpy 2 deprecates; only these two warnings are kept off.
    with warnings.catch_warnings():
        for message in ("__array__ implementation doesn't accept a copy", "__array_wrap__ must accept context"):
            warnings.filterwarnings("ignore", message, category=DeprecationWarning)
        yield


def _nearly_zero_snr_betas(scheduler_config: Mapping[str, Any]) -> list[float]:
    """Returns the rescaled betas for schedulers that cannot rescale them.

    At the last timestep the signal is not zero but 2**-24, so that sigma stays finite; diffusers' own schedulers do
    the same.
    """
    from sdlora.diffusion.schedule import Schedule

    alpha_bar = Schedule.from_config(scheduler_config).alphas_cumprod.double()
    alpha_bar[-1] = 2**-24
    before = alpha_bar.roll(1)
    before[0] = 1
    return (1 - alpha_bar / before).tolist()
