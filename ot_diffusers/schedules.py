"""Noise levels, and the algebra between ε, x0 and v predictions, for every variance-preserving diffusers scheduler.

Symbols (as in DDIM, arXiv 2010.02502, and progressive distillation, arXiv 2202.00512):

    x_t = α_t x0 + σ_t ε,   α_t = √ᾱ_t,   σ_t = √(1 − ᾱ_t),   v_t = α_t ε − σ_t x0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError, require
from .images import require_model_range
from .seeds import keyed_normal

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def alpha_sigma(scheduler: Any, timestep: Tensor | int, step_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Signal and noise level (α_t, σ_t) that `scheduler` itself uses at `timestep`.

    Multistep solvers (DPM-Solver++, UniPC) place their noise levels on a grid of sigmas σ_t/α_t that need not coincide
    with `alphas_cumprod` at the rounded timestep (Karras sigmas, for example). During sampling give `step_index`, and
    that grid is read.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod`.
        timestep: integer timestep(s), 0 … `num_train_timesteps` − 1; any shape.
        step_index: position in the solver's own grid.

    Returns:
        α_t and σ_t, float32, of the shape of `timestep`, on the CPU unless `timestep` is a tensor elsewhere.
    """
    require(hasattr(scheduler, "alphas_cumprod"), "scheduler", "have `alphas_cumprod`", type(scheduler).__name__)
    if step_index is not None and getattr(scheduler, "sigmas", None) is not None:
        ratio = scheduler.sigmas[step_index].float()
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


def truncated_scheduler(scheduler: Any, truncation_timestep: int) -> Any:
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


def truncated_samples(images: Tensor, indices: Tensor, scheduler: Any, *, epoch: int = 0, seed: int = 0) -> Tensor:
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


def _has_betas(scheduler: Any) -> bool:
    """Whether the noise levels are those of betas, not of a flow-matching grid."""
    has_betas = getattr(scheduler, "betas", None) is not None and hasattr(scheduler, "alphas_cumprod")
    return has_betas and not scheduler.config.get("use_flow_sigmas", False)


def _like(level: Tensor, images: Tensor) -> Tensor:
    """`level` in the dtype of `images`; a [B] vector on their device, viewed as [B, 1, 1, 1]. A number may stay on the
    CPU: a copy would be a wait for the device."""
    if level.ndim == 0:
        return level.to(images.dtype)
    return level.to(device=images.device, dtype=images.dtype).view(-1, *[1] * (images.ndim - 1))
