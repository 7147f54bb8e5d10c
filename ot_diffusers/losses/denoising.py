"""Losses of denoisers, as functions of tensors: the denoising loss and the optimal transport loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, require
from ..images import to_unit_range
from ..models.feature_extractor import FeatureExtractor
from ..transport import sinkhorn_divergence


def denoising_loss(model_output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error between the model's prediction and its target, both [B, C, H, W]; 0-d float32.

    Reference: [Ho2020, eq. 14] for ε.
    """
    return torch.nn.functional.mse_loss(model_output.float(), target.float())


def squash_to_image(pred_original_sample: Tensor, squash: str) -> Tensor:
    """x̂0, any range, mapped to [-1, 1] by `"clamp"` or by the original study's `"tanh"`."""
    match squash:
        case "clamp":
            return pred_original_sample.clamp(-1, 1)
        case "tanh":
            return pred_original_sample.tanh()
    raise InputError(f"`squash` must be clamp or tanh, got {squash!r}")


def image_features(feature_extractor: FeatureExtractor, images: Tensor, squash: str = "clamp") -> Tensor:
    """Raw float32 features [B, D] of images or predictions, computed outside autocast; gradients flow to the images."""
    with torch.autocast(device_type=images.device.type, enabled=False):
        return feature_extractor(to_unit_range(squash_to_image(images.float(), squash)), return_dict=False)[0]


def ot_loss(
    features: Tensor,
    reference_features: Tensor,
    *,
    blur: float,
    scaling: float = 0.7,
    sample_weights: Tensor | None = None,
    backend: str = "native",
    num_iterations: int | None = None,
) -> Tensor:
    """Sinkhorn divergence between the features of x̂0 and those of real images, up to a constant.

    With `sample_weights` w in (0, 1] the batch enters as the weighted cloud Σ w_i δ(φ_i) / Σ w, and the divergence is
    multiplied by the mean of w, so that every image contributes to the gradient in proportion to its weight.

    Args:
        features: [B, D], of the predicted clean images; gradient flows.
        reference_features: [M, D], of real images that are not in the batch; no gradient.
        blur: length in the units of the features.
        scaling: ratio of successive blurs during annealing.
        sample_weights: [B], positive; uniform if None.
        backend: see `sinkhorn_divergence`; all backends but the native one include the constant.
        num_iterations: fixed number of Sinkhorn iterations, without host–device synchronisation; None iterates to
            convergence.

    Returns:
        0-d tensor. The native backend leaves out the constant ½ OT(reference, reference), which has no gradient.

    Example:
        >>> features = torch.zeros(4, 2, requires_grad=True)
        >>> ot_loss(features, torch.ones(8, 2), blur=0.5).backward()
        >>> features.grad[0]  # each image carries a quarter of the mass
        tensor([-0.2500, -0.2500])
    """
    require(len(reference_features) >= 2, "reference_features", "hold at least 2 rows", tuple(reference_features.shape))
    weights = None if sample_weights is None else sample_weights / sample_weights.sum()
    divergence = sinkhorn_divergence(
        features,
        reference_features,
        blur=blur,
        scaling=scaling,
        x_weights=weights,
        y_self_cost=0.0 if backend == "native" else None,
        backend=backend,
        num_iterations=num_iterations,
    )
    return divergence if sample_weights is None else sample_weights.mean() * divergence


def disjoint_reference_indices(
    num_samples: int, batch_indices: Tensor, num_references: int, generator: torch.Generator
) -> Tensor:
    """Uniformly drawn indices of `num_references` images that are not in the batch, on the generator's device.

    They are drawn without replacement, or with replacement if too few images are left. `batch_indices` must be
    distinct.

    Raises:
        InputError: the batch covers the whole data set.

    Example:
        >>> batch = torch.arange(6)
        >>> sorted(disjoint_reference_indices(10, batch, 4, torch.Generator()).tolist())
        [6, 7, 8, 9]
    """
    scores = torch.rand(num_samples, generator=generator, device=generator.device)
    scores[batch_indices.to(generator.device, non_blocking=True)] = -1
    available = num_samples - len(batch_indices)
    require(available > 0, "train_batch_size", f"leave references in a data set of {num_samples}", len(batch_indices))
    if available >= num_references:
        return scores.topk(num_references).indices
    outside_batch = scores.topk(available).indices
    return outside_batch[torch.randint(available, (num_references,), generator=generator, device=generator.device)]
