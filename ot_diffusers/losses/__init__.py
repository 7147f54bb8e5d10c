"""Losses as functions of tensors: those of denoisers here, those of priors in `ot_diffusers.losses.priors`."""

from .denoising import denoising_loss, disjoint_reference_indices, image_features, ot_loss, squash_to_image

__all__ = ["denoising_loss", "disjoint_reference_indices", "image_features", "ot_loss", "squash_to_image"]
