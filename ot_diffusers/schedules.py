"""Noise levels, and the algebra between x̂0 and what a denoiser predicts, for the schedulers of diffusers.

A denoiser receives z = α x0 + σ ε, and its prediction is linear in x0 and ε (DDIM, arXiv 2010.02502; progressive
distillation, arXiv 2202.00512; flow matching, arXiv 2210.02747):

    variance-preserving      α² + σ² = 1      ε, x0, or v = α ε − σ x0
    flow matching            α = 1 − σ        ε − x0

Euler and Heun schedulers keep x = x0 + (σ/α) ε, which is z before their `scale_model_input`. EDM schedulers do so as
well, and scale z and the prediction by the standard deviation of the data (arXiv 2206.00364, table 1).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError, require, require_integer
from .images import require_model_range
from .seeds import keyed_normal

STOCHASTIC = ("DDPM", "Ancestral", "SDE", "LCM", "TCD")
"""Parts of the names of diffusers' schedulers that add noise in every step."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Scheduler(Protocol):
    """Interface of diffusers schedulers. Variance-preserving ones have these attributes, solvers `sigmas` as well."""

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def config(self) -> Any:
        """Its options, including `num_train_timesteps` and `prediction_type`."""

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """Prepare a chain of a given number of steps."""

    def step(self, *arguments: Any, **options: Any) -> Any:
        """One step from x_t and a model output to x_{t−1}, the `prev_sample` of the output."""

    def register_to_config(self, **options: Any) -> None:
        """Add options to the configuration."""

    @classmethod
    def from_config(cls, *arguments: Any, **options: Any) -> Any:
        """A scheduler with these options."""


S = TypeVar("S", bound=Scheduler)


def set_timesteps(
    scheduler: Scheduler, num_inference_steps: int, device: torch.device | str | None = None
) -> list[int]:
    """Prepare `scheduler` for a chain and return its timesteps, one for each call of the denoiser.

    The chain is that of diffusers, except for three corrections. The surplus timestep −1 of some trailing spacings (61
    of 1,000 steps, 13 of 15) is dropped. A solver that would visit one noise level twice (1,000 of 1,000 steps in
    DPM-Solver++ or UniPC), which is a division by zero, performs one step fewer. The steps of a flow-matching scheduler
    are equal, σ = 1, (n − 1)/n, …, 1/n, as if these `sigmas` were given; diffusers spends the last of n steps between
    σ = .001 and 0. A solver that calls the denoiser more than once per step has more timesteps than steps (PNDM and
    Heun: 19 for 10 steps).

    Args:
        scheduler: a diffusers scheduler; its state is changed.
        num_inference_steps: 1 … `num_train_timesteps`.
        device: device of `scheduler.timesteps`.

    Raises:
        InputError: a number of steps for which this scheduler has no chain, or a scheduler whose timesteps do not
            decrease.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> set_timesteps(DDIMScheduler(num_train_timesteps=15, timestep_spacing="trailing"), 13)[-3:]
        [2, 1, 0]
    """
    name, length = type(scheduler).__name__, scheduler.config.num_train_timesteps
    require_integer("num_inference_steps", num_inference_steps, at_least=1)
    require(num_inference_steps <= length, "num_inference_steps", f"be from 1 to {length}", num_inference_steps)
    try:
        _set_timesteps(scheduler, num_inference_steps, device)
        timesteps = scheduler.timesteps.tolist()
    except (ArithmeticError, IndexError, ValueError):  # LCM allows at most 50 steps, PNDM at least 4
        timesteps = []
    exists = bool(timesteps) and (timesteps[0] < length or matches_flow(scheduler))
    require(exists, "num_inference_steps", f"be a number of steps that {name} allows", num_inference_steps)
    decreases = all(later <= earlier for earlier, later in pairwise(timesteps))
    require(decreases, "scheduler", "have decreasing timesteps", name)
    if _has_betas(scheduler) and timesteps[-1] < 0:
        _drop_surplus(scheduler, num_inference_steps, sum(timestep >= 0 for timestep in timesteps))
    sigmas = getattr(scheduler, "sigmas", None)
    once = getattr(scheduler, "order", 1) == 1
    if once and sigmas is not None and bool((sigmas[1:-1] == sigmas[:-2]).any()):
        return set_timesteps(scheduler, num_inference_steps - 1, device)
    return scheduler.timesteps.tolist()


def preserves_variance(scheduler: Scheduler) -> bool:
    """Whether x_t = α_t x0 + σ_t ε with α_t² + σ_t² = 1 and x_T ~ N(0, I)."""
    return _has_betas(scheduler) and float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0


def matches_flow(scheduler: Scheduler) -> bool:
    """Whether x_t = (1 − σ_t) x0 + σ_t ε: a flow-matching scheduler, or a solver with `use_flow_sigmas`."""
    return type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)


def is_known(scheduler: Scheduler) -> bool:
    """Whether the noise levels of the scheduler's chain are known here, see `alpha_sigma`."""
    between = getattr(scheduler, "sigmas_interpol", None) is not None or "KDPM2" in type(scheduler).__name__
    return not between and (_has_betas(scheduler) or matches_flow(scheduler) or _preconditions(scheduler))


def prediction_type_of(scheduler: Scheduler) -> str:
    """What the denoiser of this scheduler predicts: one of `PREDICTION_TYPES`."""
    return str(scheduler.config.get("prediction_type", "flow_prediction" if matches_flow(scheduler) else "epsilon"))


def reversible_steps(scheduler: Scheduler, timesteps: Sequence[float]) -> set[int]:
    """Indices of the steps of a chain at which the model output and x̂0 determine each other.

    An ε prediction does not determine x̂0 where α = 0, at the start of a schedule with zero terminal SNR. Where σ = 0,
    x_t is already the image.
    """
    return {
        step
        for step, timestep in enumerate(timesteps)
        if 0 < abs(float(prediction_coefficients(scheduler, timestep, step)[1])) < math.inf
    }


def record_coupling(scheduler: S, noise_coupling: str) -> None:
    """Write into the scheduler's configuration how noise and images were paired in training.

    The entry `_noise_coupling` stays through `from_config` to any other scheduler, `save_pretrained` and
    `from_pretrained`; diffusers ignores it.
    """
    scheduler.register_to_config(_noise_coupling=noise_coupling)


def record_calls(scheduler: S, num_inference_steps: int) -> None:
    """Write into the scheduler's configuration, as `_num_inference_steps`, how many calls its denoiser is tuned for."""
    scheduler.register_to_config(_num_inference_steps=num_inference_steps)


def unrecorded(scheduler: Scheduler) -> dict[str, Any]:
    """The configuration of a scheduler without the entries of `record_coupling` and `record_calls`: they do not hold
    after further training."""
    records = ("_noise_coupling", "_num_inference_steps")
    return {name: value for name, value in scheduler.config.items() if name not in records}


def require_independent(scheduler: Scheduler, argument: str, requirement: str, value: object) -> None:
    """Refuse what only a denoiser of independent pairs allows: with coupled pairs, or after tuning for a few calls, its
    output is not the score of the noised data, and x_t is not α_t x0 + σ_t ε with fresh noise.

    Raises:
        InputError: the scheduler is one of a coupled or tuned denoiser.
    """
    coupling, tuned = (scheduler.config.get(name) for name in ("_noise_coupling", "_num_inference_steps"))
    trained = f"was trained with noise_coupling={coupling}" if tuned is None else f"was tuned for {tuned} calls"
    independent = tuned is None and coupling in (None, "independent")
    require(independent, argument, f"{requirement}: this denoiser {trained}", value)


def check_deterministic(scheduler: Scheduler, eta: float = 0.0) -> None:
    """Refuse to add noise during the chain of a denoiser that was trained with coupled pairs.

    Raises:
        InputError: naming `eta` or the scheduler.
    """
    if eta > 0:
        require_independent(scheduler, "eta", "be 0", eta)
    name, algorithm = type(scheduler).__name__, str(scheduler.config.get("algorithm_type", ""))
    noisy = scheduler.config.get("stochastic_sampling", False) or algorithm.startswith("sde")
    if noisy or any(part in name for part in STOCHASTIC):
        require_independent(scheduler, "scheduler", "be deterministic, such as DDIMScheduler", name)


def alpha_sigma(
    scheduler: Scheduler, timestep: Tensor | float, step_index: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Signal and noise level (α, σ) of what the denoiser receives at `timestep`, as `scheduler` itself uses them.

    Solvers (DPM-Solver++, UniPC, Euler, Heun) place their noise levels on a grid that need not coincide with
    `alphas_cumprod` at the rounded timestep (Karras sigmas, for example). During sampling, pass `step_index` to read
    that grid; EDM schedulers have no other.

    Args:
        scheduler: a diffusers scheduler.
        timestep: timestep(s), integers in 0 … `num_train_timesteps` − 1, or 0 … `num_train_timesteps` for flow
            matching; any shape.
        step_index: index in the solver's grid, of the shape of `timestep`.

    Returns:
        α and σ, float32, of the shape of `timestep`, on its device if it is a tensor, otherwise on the CPU. Of EDM
        schedulers they are those of images in units of `sigma_data`.

    Raises:
        InputError: a scheduler of another kind.
    """
    known = is_known(scheduler) and (step_index is not None or not _preconditions(scheduler))
    require(known, "scheduler", "have known noise levels (`alphas_cumprod` or flow)", type(scheduler).__name__)
    sigmas = getattr(scheduler, "sigmas", None)
    grid = None if step_index is None or sigmas is None else sigmas[step_index].float()
    if matches_flow(scheduler):
        times = torch.as_tensor(timestep, dtype=torch.float32)
        sigma = times / scheduler.config.num_train_timesteps if grid is None else grid
        return 1 - sigma, sigma
    if grid is not None:
        ratio = grid / scheduler.config.get("sigma_data", 1.0)
        alpha = torch.rsqrt(1 + ratio**2)
        return alpha, ratio * alpha
    indices = torch.as_tensor(timestep, dtype=torch.long)
    to_device = indices.device.type != "cpu"  # a copy to the host must be synchronous
    alphas_cumprod = scheduler.alphas_cumprod.to(indices.device, torch.float32, non_blocking=to_device)[indices]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def prediction_coefficients(scheduler: Scheduler, timestep: float, step_index: int) -> tuple[Tensor, Tensor]:
    """(a, b) of x̂0 = a z + b · model output in this step of the scheduler's chain, where z is what the denoiser
    receives: `scheduler.scale_model_input(x_t)`, or x_t itself. Both are 0-d tensors on the CPU."""
    alpha, sigma = alpha_sigma(scheduler, timestep, step_index)
    if _preconditions(scheduler):
        # EDM's network predicts −v, or v, of images in units of `sigma_data`.
        unit = scheduler.config.sigma_data
        sign = 1.0 if scheduler.config.prediction_type == "epsilon" else -1.0
        return unit * alpha, sign * unit * sigma
    return _coefficients(alpha, sigma, prediction_type_of(scheduler))


def to_original_sample(
    model_output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """x̂0 from the model's prediction at x_t.

    Args:
        model_output: the model's prediction, [B, C, H, W].
        sample: x_t = α x0 + σ ε, [B, C, H, W].
        alpha, sigma: signal and noise level, scalar or [B].
        prediction_type: `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"`.

    Example:
        >>> x0, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
        >>> found = to_original_sample(noise, alpha * x0 + sigma * noise, alpha, sigma, "epsilon")
        >>> torch.allclose(found, x0, atol=1e-6)
        True
    """
    a, b = (_like(factor, sample) for factor in _coefficients(alpha, sigma, prediction_type))
    return a * sample + b * model_output


def from_original_sample(
    pred_original_sample: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """The model output that corresponds to `pred_original_sample` at x_t: the inverse of `to_original_sample`."""
    a, b = (_like(factor, sample) for factor in _coefficients(alpha, sigma, prediction_type))
    return (pred_original_sample - a * sample) / b


def _coefficients(alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(a, b) of x̂0 = a x_t + b · prediction; b is infinite where the prediction does not determine x̂0."""
    match prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "v_prediction":
            return alpha, -sigma
        case "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case "flow_prediction":
            return torch.ones_like(alpha), -sigma
    raise InputError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def training_target(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Target of the model: ε, v = α ε − σ x0, x0, or ε − x0; [B, C, H, W]. `alpha` and `sigma` are scalars or [B]."""
    alpha, sigma = _like(alpha, clean), _like(sigma, clean)
    match prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha * noise - sigma * clean
        case "sample":
            return clean
        case "flow_prediction":
            return noise - clean
    raise InputError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def diffused(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = α x0 + σ ε, [B, C, H, W]. `alpha` and `sigma` are scalars or [B]."""
    return _like(alpha, clean) * clean + _like(sigma, clean) * noise.to(clean)


def min_snr_weight(alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, γ)/γ in (0, 1], SNR = α²/σ²: near 1 where x̂0 is a clear image, near 0 where it is a blurred mean.

    Reference: [Hang2023].
    """
    return (alpha**2 / sigma**2).clamp(max=gamma) / gamma


@dataclass(frozen=True)
class Step:
    """One call of the denoiser, from z = α x0 + σ ε to the next level.

    Attributes:
        time: what the denoiser is given.
        alpha, sigma: level of z.
        a, b: x̂0 = a z + b · output.
        next_alpha, next_sigma: level of the result.
    """

    time: float
    alpha: float
    sigma: float
    a: float
    b: float
    next_alpha: float
    next_sigma: float


@dataclass(frozen=True)
class Chain:
    """The deterministic chain of a pipeline, with gradients: from noise to finished images in a few calls.

    Attributes:
        steps: the calls of the denoiser, in their order.
        clip_range: bound of |x̂0| in every step; None for no bound.
    """

    steps: tuple[Step, ...]
    clip_range: float | None = None

    @classmethod
    def of(cls, scheduler: Scheduler, num_inference_steps: int) -> Chain:
        """The chain of a scheduler: DDIM, or flow matching by Euler's method. Its state is changed."""
        times = [float(time) for time in set_timesteps(scheduler, num_inference_steps)]
        levels = [tuple(map(float, alpha_sigma(scheduler, time, index))) for index, time in enumerate(times)]
        steps = [
            Step(time, *level, *map(float, prediction_coefficients(scheduler, time, index)), *following)
            for index, (time, level, following) in enumerate(zip(times, levels, [*levels[1:], (1.0, 0.0)], strict=True))
        ]
        clips = scheduler.config.get("clip_sample", False)
        return cls(tuple(steps), scheduler.config.get("clip_sample_range", 1.0) if clips else None)

    def __call__(self, unet: nn.Module, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Finished images in [-1, 1], [B, C, H, W], of standard normal noise, and of these classes, int64 [B], for a
        denoiser with classes. The gradient flows through every call, but not where the last one leaves the range."""
        z = noise
        for step in self.steps:
            output = unet(z, torch.tensor(step.time, device=z.device), class_labels).sample
            clean = step.a * z + step.b * output
            rest = (z - step.alpha * clean) / step.sigma
            if self.clip_range is not None:
                clean = clean.clamp(-self.clip_range, self.clip_range)
            z = step.next_alpha * clean + step.next_sigma * rest
        return z.clamp(-1, 1)


def truncated_scheduler(scheduler: S, truncation_timestep: int) -> S:
    """A scheduler of the same class for the last `truncation_timestep` steps of the reverse chain only.

    It keeps the first T' betas, so that ᾱ_0 … ᾱ_{T'−1} are bitwise equal to those of the full schedule, also after
    `save_pretrained` and `from_pretrained`. Its spacing is `"trailing"`: sampling starts at T'−1, the noise level of
    the truncated set, for any number of steps. Choose a number of steps that divides T'; otherwise `DDIMScheduler`
    rounds the ratio down.

    Args:
        scheduler: a variance-preserving diffusers scheduler with `betas` (DDIM, DDPM, DPM-Solver++, UniPC, …).
        truncation_timestep: T' in 1 … `num_train_timesteps`. T' = T leaves the configuration unchanged.

    Raises:
        InputError: T' out of range, or a schedule that is not defined by betas.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = truncated_scheduler(DDIMScheduler(num_train_timesteps=1000), 10)
        >>> scheduler.set_timesteps(5)
        >>> scheduler.timesteps.tolist()
        [9, 7, 5, 3, 1]

    Reference: [Zheng2022], [Lyu2022].
    """
    require(_has_betas(scheduler), "scheduler", "have betas that can be truncated", type(scheduler).__name__)
    require_independent(scheduler, "scheduler", "not be truncated", type(scheduler).__name__)
    num_train_timesteps = scheduler.config.num_train_timesteps
    valid = isinstance(truncation_timestep, int) and 1 <= truncation_timestep <= num_train_timesteps
    require(valid, "truncation_timestep", f"be an integer from 1 to {num_train_timesteps}", truncation_timestep)
    if truncation_timestep == num_train_timesteps:
        return type(scheduler).from_config(scheduler.config)

    overrides: dict[str, Any] = {
        "num_train_timesteps": truncation_timestep,
        "trained_betas": scheduler.betas[:truncation_timestep].tolist(),  # float32 → Python float → float32 is exact
        "timestep_spacing": "trailing",
    }
    # These betas are already rescaled, and the zero terminal SNR belongs to step T, which is truncated.
    if "rescale_betas_zero_snr" in scheduler.config:
        overrides["rescale_betas_zero_snr"] = False
    # Interpolation between noise levels (Karras and others) is undefined on the single level of T' = 1.
    if truncation_timestep == 1:
        overrides |= dict.fromkeys(_SIGMA_SPACINGS & scheduler.config.keys(), False)
    truncated = type(scheduler).from_config(scheduler.config, **overrides)
    same_prefix = torch.equal(truncated.alphas_cumprod, scheduler.alphas_cumprod[:truncation_timestep])
    require(same_prefix, "scheduler", "have betas that can be truncated", type(scheduler).__name__)
    return truncated


def truncated_samples(
    images: Tensor, indices: Tensor, scheduler: Scheduler, *, epoch: int = 0, seed: int = 0
) -> Tensor:
    """Real images diffused to the last step of `scheduler`: x_T' = α x0 + σ ε, with one noise per (seed, epoch, image).

    The noise of an image does not depend on the batch or the number of processes; between devices it differs by
    rounding only. With a fixed epoch this set is the oracle prior.

    Args:
        images: x0 in [-1, 1], [B, C, H, W].
        indices: position of each image in its data set, [B] integers.
        scheduler: a truncated scheduler; its last timestep is the noise level.
        epoch: every epoch has new noise.
        seed: random seed.

    Returns:
        x_T', [B, C, H, W], in the dtype and on the device of `images`.
    """
    require(seed >= 0, "seed", "be at least 0", seed)
    is_matched = indices.shape == images.shape[:1]
    require(is_matched, "indices", f"hold one index for each of the {len(images)} images", tuple(indices.shape))
    if images.device.type == "cpu":
        require_model_range(images)
    # Apple's GPUs lack float64.
    device = "cpu" if images.device.type == "mps" else images.device
    noise = keyed_normal((seed, "truncated", epoch), indices.to(device), images.shape[1:])
    alpha, sigma = alpha_sigma(scheduler, scheduler.config.num_train_timesteps - 1)
    return diffused(images, noise, alpha, sigma)


_SIGMA_SPACINGS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"}


def _set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device | str | None) -> None:
    """`scheduler.set_timesteps`, with equal steps of a flow-matching scheduler."""
    options: dict[str, Any] = {}
    if type(scheduler).__name__.startswith("FlowMatch"):
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            options["sigmas"] = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        else:  # Heun's steps run from sigma_max to sigma_min
            scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / num_inference_steps
    scheduler.set_timesteps(num_inference_steps, device=device, **options)


def _preconditions(scheduler: Scheduler) -> bool:
    """Whether the scheduler scales images and predictions as EDM does."""
    return hasattr(scheduler, "precondition_outputs")


def _drop_surplus(scheduler: Any, num_inference_steps: int, count: int) -> None:
    """Keep the first `count` timesteps, and the final noise level of the chain."""
    scheduler.timesteps = scheduler.timesteps[:count]
    scheduler.num_inference_steps = num_inference_steps
    if getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = torch.cat([scheduler.sigmas[:count], scheduler.sigmas[-1:]])


def _has_betas(scheduler: Scheduler) -> bool:
    """Whether the noise levels are defined by betas, not by a flow-matching grid."""
    has_betas = getattr(scheduler, "betas", None) is not None and hasattr(scheduler, "alphas_cumprod")
    return has_betas and not matches_flow(scheduler)


def _like(level: Tensor, images: Tensor) -> Tensor:
    """`level` in the dtype of `images`; a [B] vector is moved to their device and viewed as [B, 1, 1, 1]. A 0-d tensor
    may stay on the CPU, because copying it would synchronise with the device."""
    if level.ndim == 0:
        return level.to(images.dtype)
    return level.to(device=images.device, dtype=images.dtype).view(-1, *[1] * (images.ndim - 1))
