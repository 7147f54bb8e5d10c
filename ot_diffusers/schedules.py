"""Noise levels, and the algebra between ε, x0 and v predictions, for every variance-preserving diffusers scheduler.

Symbols (as in DDIM, arXiv 2010.02502, and progressive distillation, arXiv 2202.00512):

    x_t = α_t x0 + σ_t ε,   α_t = √ᾱ_t,   σ_t = √(1 − ᾱ_t),   v_t = α_t ε − σ_t x0
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .errors import InputError, require, require_integer
from .images import require_model_range
from .seeds import keyed_normal

STOCHASTIC = ("DDPM", "Ancestral", "SDE", "LCM", "TCD")
"""Parts of the names of diffusers' schedulers that add noise in every step."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Scheduler(Protocol):
    """What is asked of a diffusers scheduler; each variance-preserving one fits, and a solver also has `sigmas`."""

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def config(self) -> Any:
        """Its options, among them `num_train_timesteps` and `prediction_type`."""

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """Prepare a chain of so many steps."""

    def step(self, *arguments: Any, **options: Any) -> Any:
        """x_t and a model output to x_{t−1}, the `prev_sample` of what is returned."""

    def register_to_config(self, **options: Any) -> None:
        """Add options to the configuration."""

    @classmethod
    def from_config(cls, *arguments: Any, **options: Any) -> Any:
        """A scheduler with these options."""


S = TypeVar("S", bound=Scheduler)


def set_timesteps(
    scheduler: Scheduler, num_inference_steps: int, device: torch.device | str | None = None
) -> list[int]:
    """Prepare `scheduler` for a chain, and say which chain it is: one timestep for each call of the denoiser.

    It is diffusers' own chain wherever that is a proper one. Two faults of its roundings are mended: the surplus
    timestep −1 of some trailing spacings (61 of 1,000 steps, 13 of 15) is dropped, and a solver that would pass one
    noise level twice (1,000 of 1,000 steps in DPM-Solver++ or UniPC), which is a division by zero, takes a step less.
    A solver that calls the denoiser more than once in a step has more timesteps than steps (PNDM: 19 for 10 steps).

    Args:
        scheduler: a diffusers scheduler; its state is changed.
        num_inference_steps: 1 … `num_train_timesteps`.
        device: of `scheduler.timesteps`.

    Raises:
        InputError: a number of steps that this scheduler has no chain for, or a scheduler whose chain does not fall.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> set_timesteps(DDIMScheduler(num_train_timesteps=15, timestep_spacing="trailing"), 13)[-3:]
        [2, 1, 0]
    """
    name, length = type(scheduler).__name__, scheduler.config.num_train_timesteps
    require_integer("num_inference_steps", num_inference_steps, at_least=1)
    require(num_inference_steps <= length, "num_inference_steps", f"be from 1 to {length}", num_inference_steps)
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = scheduler.timesteps.tolist()
    except (ArithmeticError, IndexError, ValueError):  # LCM takes 50 steps at most, PNDM 4 at least
        timesteps = []
    exists = bool(timesteps) and timesteps[0] < length
    require(exists, "num_inference_steps", f"be a number of steps that {name} can take", num_inference_steps)
    falling = all(later <= earlier for earlier, later in pairwise(timesteps))
    require(falling, "scheduler", "walk from noise to images", name)
    if timesteps[-1] < 0:
        _drop_surplus(scheduler, num_inference_steps, sum(timestep >= 0 for timestep in timesteps))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and bool((sigmas[1:-1] == sigmas[:-2]).any()):
        return set_timesteps(scheduler, num_inference_steps - 1, device)
    return scheduler.timesteps.tolist()


def preserves_variance(scheduler: Scheduler) -> bool:
    """Whether x_t = α_t x0 + σ_t ε and x_T ~ N(0, I); Euler, Heun and flow schedulers scale otherwise."""
    return _has_betas(scheduler) and float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0


def reversible_steps(scheduler: Scheduler, timesteps: Sequence[int]) -> set[int]:
    """The steps of a chain at which the model output and x̂0 determine each other, by their positions.

    An ε prediction says nothing of x̂0 where α = 0, the start of a schedule with zero terminal SNR; and where σ = 0 the
    image is there already.
    """
    levels = alpha_sigma(scheduler, torch.tensor(timesteps), torch.arange(len(timesteps)))
    alpha, sigma = (level.tolist() for level in levels)
    divisors = {"epsilon": (alpha, sigma), "v_prediction": (sigma,)}.get(scheduler.config.prediction_type, ())
    return {step for step in range(len(timesteps)) if all(divisor[step] > 0 for divisor in divisors)}


def record_coupling(scheduler: S, noise_coupling: str) -> None:
    """Write into the scheduler's configuration how noise and images were paired in training.

    The entry `_noise_coupling` stays through `from_config` to any other scheduler, `save_pretrained` and
    `from_pretrained`; diffusers ignores it.
    """
    scheduler.register_to_config(_noise_coupling=noise_coupling)


def require_independent(scheduler: Scheduler, argument: str, requirement: str, value: object) -> None:
    """Refuse what only a denoiser of independent pairs allows: with coupled pairs its output is not the score of the
    noised data, and x_t is not α_t x0 + σ_t ε with fresh noise.

    Raises:
        InputError: the scheduler is one of a coupled denoiser.
    """
    coupling = scheduler.config.get("_noise_coupling")
    reason = f"{requirement}: this denoiser was trained with noise_coupling={coupling}"
    require(coupling in (None, "independent"), argument, reason, value)


def check_deterministic(scheduler: Scheduler, eta: float = 0.0) -> None:
    """Refuse to add noise during the chain of a denoiser that was trained with coupled pairs.

    Raises:
        InputError: naming `eta` or the scheduler.
    """
    if eta > 0:
        require_independent(scheduler, "eta", "be 0", eta)
    name, algorithm = type(scheduler).__name__, str(scheduler.config.get("algorithm_type", ""))
    if algorithm.startswith("sde") or any(part in name for part in STOCHASTIC):
        require_independent(scheduler, "scheduler", "be deterministic, such as DDIMScheduler", name)


def alpha_sigma(
    scheduler: Scheduler, timestep: Tensor | int, step_index: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Signal and noise level (α_t, σ_t) that `scheduler` itself uses at `timestep`.

    Multistep solvers (DPM-Solver++, UniPC) place their noise levels on a grid of sigmas σ_t/α_t that need not coincide
    with `alphas_cumprod` at the rounded timestep (Karras sigmas, for example). During sampling give `step_index`, and
    that grid is read.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod`.
        timestep: integer timestep(s), 0 … `num_train_timesteps` − 1; any shape.
        step_index: position in the solver's own grid, of the shape of `timestep`.

    Returns:
        α_t and σ_t, float32, of the shape of `timestep`, on the CPU unless `timestep` is a tensor elsewhere.
    """
    require(hasattr(scheduler, "alphas_cumprod"), "scheduler", "have `alphas_cumprod`", type(scheduler).__name__)
    sigmas = getattr(scheduler, "sigmas", None)
    if step_index is not None and sigmas is not None:
        ratio = sigmas[step_index].float()
        alpha = torch.rsqrt(1 + ratio**2)
        return alpha, ratio * alpha
    device = timestep.device if isinstance(timestep, Tensor) else torch.device("cpu")
    to_device = device.type != "cpu"  # a copy to the host has to be waited for
    alphas_cumprod = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32, non_blocking=to_device)[timestep]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def to_original_sample(
    model_output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """x̂0 from what the model predicts at x_t.

    Args:
        model_output: the model's prediction, [B, C, H, W].
        sample: x_t, [B, C, H, W].
        alpha, sigma: noise level, scalar or [B].
        prediction_type: `"epsilon"`, `"v_prediction"` or `"sample"`.

    Example:
        >>> x0, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
        >>> to_original_sample(noise, alpha * x0 + sigma * noise, alpha, sigma, "epsilon").abs().max().item()
        0.0
    """
    alpha, sigma = _like(alpha, sample), _like(sigma, sample)
    match prediction_type:
        case "epsilon":
            return (sample - sigma * model_output) / alpha
        case "v_prediction":
            return alpha * sample - sigma * model_output
        case "sample":
            return model_output
    raise InputError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def from_original_sample(
    pred_original_sample: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """The model output that stands for `pred_original_sample` at x_t: the inverse of `to_original_sample`."""
    alpha, sigma = _like(alpha, sample), _like(sigma, sample)
    match prediction_type:
        case "epsilon":
            return (sample - alpha * pred_original_sample) / sigma
        case "v_prediction":
            return (alpha * sample - pred_original_sample) / sigma
        case "sample":
            return pred_original_sample
    raise InputError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def training_target(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """What the model learns: ε, v = α ε − σ x0, or x0; [B, C, H, W]. `alpha` and `sigma` are scalars or [B]."""
    alpha, sigma = _like(alpha, clean), _like(sigma, clean)
    match prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha * noise - sigma * clean
        case "sample":
            return clean
    raise InputError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def min_snr_weight(alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, γ)/γ in (0, 1], SNR = α²/σ²: near 1 where x̂0 is an image, near 0 where it is a conditional mean.

    Reference: [Hang2023].
    """
    return (alpha**2 / sigma**2).clamp(max=gamma) / gamma


def truncated_scheduler(scheduler: S, truncation_timestep: int) -> S:
    """A scheduler of the same class for the last `truncation_timestep` steps of the reverse chain only.

    It keeps the first T' betas, so ᾱ_0 … ᾱ_{T'−1} are those of the full schedule bit for bit, also after
    `save_pretrained` and `from_pretrained`. Its spacing is `"trailing"`: sampling starts at T'−1, the noise level of
    the truncated set, whatever the number of steps. Choose a number of steps that divides T': `DDIMScheduler` steps by
    the rounded-down ratio otherwise.

    Args:
        scheduler: a variance-preserving diffusers scheduler with `betas` (DDIM, DDPM, DPM-Solver++, UniPC, …).
        truncation_timestep: T' in 1 … `num_train_timesteps`. With T' = T the configuration is left as it is.

    Raises:
        InputError: T' out of range, or a schedule that is not made of betas.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = truncated_scheduler(DDIMScheduler(num_train_timesteps=1000), 10)
        >>> scheduler.set_timesteps(5)
        >>> scheduler.timesteps.tolist()
        [9, 7, 5, 3, 1]

    Reference: [Zheng2022], [Lyu2022].
    """
    require(_has_betas(scheduler), "scheduler", "have betas that can be cut", type(scheduler).__name__)
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
    # The betas above are rescaled already: the zero terminal SNR belongs to step T, which is cut off.
    if "rescale_betas_zero_snr" in scheduler.config:
        overrides["rescale_betas_zero_snr"] = False
    # Interpolation between noise levels (Karras and others) is undefined on the single level of T' = 1.
    if truncation_timestep == 1:
        overrides |= dict.fromkeys(_SIGMA_SPACINGS & scheduler.config.keys(), False)
    truncated = type(scheduler).from_config(scheduler.config, **overrides)
    same_prefix = torch.equal(truncated.alphas_cumprod, scheduler.alphas_cumprod[:truncation_timestep])
    require(same_prefix, "scheduler", "have betas that can be cut", type(scheduler).__name__)
    return truncated


def truncated_samples(
    images: Tensor, indices: Tensor, scheduler: Scheduler, *, epoch: int = 0, seed: int = 0
) -> Tensor:
    """Real images diffused to the last step of `scheduler`: x_T' = α x0 + σ ε, one noise per (seed, epoch, image).

    An image gets the same noise in any batch and on any number of processes; another device differs by rounding only.
    With a fixed epoch the set is the oracle prior.

    Args:
        images: x0 in [-1, 1], [B, C, H, W].
        indices: position of each image in its data set, [B] integers.
        scheduler: a truncated scheduler; its last timestep is the noise level.
        epoch: a new epoch draws new noise.
        seed: seed of the run.

    Returns:
        x_T', [B, C, H, W], like `images`.
    """
    require(seed >= 0, "seed", "be at least 0", seed)
    matched = indices.shape == images.shape[:1]
    require(matched, "indices", f"hold one index for each of the {len(images)} images", tuple(indices.shape))
    if images.device.type == "cpu":
        require_model_range(images)
    # Apple's GPUs lack float64.
    device = "cpu" if images.device.type == "mps" else images.device
    noise = keyed_normal((seed, "truncated", epoch), indices.to(device), images.shape[1:])
    alpha, sigma = alpha_sigma(scheduler, scheduler.config.num_train_timesteps - 1)
    return _like(alpha, images) * images + _like(sigma, images) * noise.to(images)


_SIGMA_SPACINGS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"}


def _drop_surplus(scheduler: Any, num_inference_steps: int, count: int) -> None:
    """Keep the first `count` timesteps, and the noise level that the chain ends at."""
    scheduler.timesteps = scheduler.timesteps[:count]
    scheduler.num_inference_steps = num_inference_steps
    if getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = torch.cat([scheduler.sigmas[:count], scheduler.sigmas[-1:]])


def _has_betas(scheduler: Scheduler) -> bool:
    """Whether the noise levels are those of betas, not of a flow-matching grid."""
    has_betas = getattr(scheduler, "betas", None) is not None and hasattr(scheduler, "alphas_cumprod")
    return has_betas and not scheduler.config.get("use_flow_sigmas", False)


def _like(level: Tensor, images: Tensor) -> Tensor:
    """`level` in the dtype of `images`; a [B] vector on their device, viewed as [B, 1, 1, 1]. A number may stay on the
    CPU: a copy would be a wait for the device."""
    if level.ndim == 0:
        return level.to(images.dtype)
    return level.to(device=images.device, dtype=images.dtype).view(-1, *[1] * (images.ndim - 1))
