"""The three value ranges of images, with all conversions and range checks of this package.

Stored images are uint8 in 0 … 255, diffusion models use [-1, 1], feature networks and saved pictures use [0, 1].
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, require

# Half the distance between two of the 256 grey levels in [-1, 1].
HALF_LEVEL = 1 / 255
# From this many images on, a set without dark pixels is suspicious.
SEVERAL = 8


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images 0 … 255, any shape, as float32 in [-1, 1]: x / 127.5 − 1.

    Example:
        >>> to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    require(
        images.dtype == torch.uint8, "images", "be uint8 in 0 … 255 (floats in [0, 1]: 2 * images - 1)", images.dtype
    )
    return images.to(torch.float32) / 127.5 - 1


def require_model_range(images: Tensor, argument: str = "images") -> None:
    """Raise `InputError` for images that are not floats in [-1, 1]; the message states their range and the conversion.

    Values of up to half a grey level outside the range are accepted as rounding errors. Several images without a value
    below 0 are most likely in [0, 1], but may just be bright, and give a warning. The values are read, which on a GPU
    is a host–device synchronisation.

    Example:
        >>> require_model_range(torch.tensor([-1.0, 0.5]))
        >>> require_model_range(torch.tensor([0.0, 255.0]))
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `images` must lie in [-1, 1] (from 0 … 255: images / 127.5 - 1), got 0 … 255
    """
    conversion = "ot_diffusers.images.to_model_range(images)"
    require(images.dtype != torch.uint8, argument, f"be floats in [-1, 1] (from uint8: {conversion})", images.dtype)
    require(images.is_floating_point(), argument, "be floats in [-1, 1]", images.dtype)
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    require(math.isfinite(low) and math.isfinite(high), argument, "be finite", "NaN or Inf")
    if low < -1 - HALF_LEVEL or high > 1 + HALF_LEVEL:
        hint = f" (from 0 … 255: {argument} / 127.5 - 1)" if low >= 0 and high <= 255 else ""
        raise InputError(f"`{argument}` must lie in [-1, 1]{hint}, got {low:.3g} … {high:.3g}")
    if low >= 0 and len(images) >= SEVERAL:
        warnings.warn(
            f"no value of `{argument}` is below 0: if they are in [0, 1], pass 2 * {argument} - 1", stacklevel=3
        )


def to_unit_range(images: Tensor) -> Tensor:
    """Float images from [-1, 1] to [0, 1], clamped. Gradients flow only where values are strictly inside the range.

    `clamp` alone would not do: its gradient at the bounds is 1 in torch 2.6 and 0 in torch 2.14.

    Example:
        >>> to_unit_range(torch.tensor([-1.0, 0.0, 1.5]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    _require_floats(images)
    unit = images / 2 + 0.5
    return torch.where((unit > 0) & (unit < 1), unit, unit.detach().clamp(0, 1))


def to_uint8(images: Tensor) -> Tensor:
    """Float images from [-1, 1] to uint8 0 … 255, rounded as in the output of diffusers' pipelines.

    The inverse of `to_model_range`: every one of the 256 values comes back.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.5, 1.0]))
        tensor([  0, 191, 255], dtype=torch.uint8)
    """
    _require_floats(images)
    return (to_unit_range(images.float()) * 255).round().to(torch.uint8)


def content_hash(shape: Sequence[int], chunks: Iterable[Tensor]) -> str:
    """SHA-256 over the shape [N, C, H, W] and the bytes of uint8 images on the CPU, which come in chunks."""
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    for chunk in chunks:
        digest.update(chunk.contiguous().numpy().data)
    return digest.hexdigest()


def _require_floats(images: Tensor) -> None:
    require(images.is_floating_point(), "images", "be floats in [-1, 1] (from uint8: to_model_range)", images.dtype)


def thumbnails(images: Tensor, size: int = 8) -> Tensor:
    """Float images [B, C, H, W], averaged to at most `size` × `size` pixels and multiplied by the side of a block.

    This preserves the distance between two images that are constant on each block; the distance between other images
    shrinks by the lost detail.

    Example:
        >>> thumbnails(torch.ones(1, 1, 16, 16))[0, 0, 0, :3]
        tensor([2., 2., 2.])
    """
    height, width = images.shape[2:]
    small = (min(height, size), min(width, size))
    side = math.sqrt(height * width / (small[0] * small[1]))
    return F.adaptive_avg_pool2d(images, small) * side


def random_crop_and_flip(images: Tensor, *, padding: int, flip: bool, draws: Tensor) -> Tensor:
    """Images shifted by up to `padding` pixels with reflected borders, and some of them flipped left to right.

    Args:
        images: [B, C, H, W], any range.
        padding: largest shift in either direction, less than H and W; 0 for none.
        flip: whether half of the images are flipped.
        draws: [B, 3], uniform random numbers in [0, 1) for the vertical shift, the horizontal shift and the flip.

    Example:
        >>> image = torch.arange(9.0).view(1, 1, 3, 3)
        >>> random_crop_and_flip(image, padding=0, flip=True, draws=torch.zeros(1, 3))[0, 0, 0]
        tensor([2., 1., 0.])
    """
    height, width = images.shape[2:]
    require(0 <= padding < min(height, width), "padding", f"be from 0 to {min(height, width) - 1}", padding)
    top, left = (draws[:, :2] * (2 * padding + 1)).long().to(images.device).unbind(dim=1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    if flip:
        mirrored = (draws[:, 2] < 0.5).to(images.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4, mode="reflect") if padding else images
    batch = torch.arange(len(images), device=images.device)
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
