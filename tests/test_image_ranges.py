"""Every entry point rejects images of a wrong range, with one line that states the range and the conversion."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.evaluation import pixels
from ot_diffusers.images import require_model_range, to_model_range, to_uint8, to_unit_range
from ot_diffusers.models.prior import GaussianPrior
from ot_diffusers.models.reference_bank import ReferenceBank
from ot_diffusers.schedules import truncated_samples, truncated_scheduler

DOORS: dict[str, Callable[[Tensor], Any]] = {
    "prior": lambda images: GaussianPrior.from_images(images, 10),
    "bank": lambda images: ReferenceBank.from_features(torch.eye(len(images)), images=images),
    "chain": lambda images: truncated_samples(
        images, torch.arange(len(images)), truncated_scheduler(DDIMScheduler(), 10)
    ),
    "pixels": lambda images: pixels.speckle_share(images),
}
LEVELS = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WRONG = {
    "uint8": (LEVELS, "be floats in .* uint8|be a float tensor"),
    "int64": (LEVELS.long(), "be floats in|be a float tensor"),
    "0 … 255": (LEVELS.float(), r"lie in .* \(from 0 … 255: images / 127.5 - 1\), got 0 … 25"),
    "−2 … 2": (LEVELS / 63.75 - 2, r"lie in \[-1, 1\], got -2 … 1.98"),
    "NaN": (to_model_range(LEVELS) * torch.nan, "be finite"),
    "one infinity": (to_model_range(LEVELS) / (LEVELS.max() != LEVELS), "be finite"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_range_is_refused(door: str, kind: str) -> None:
    images, message = WRONG[kind]
    with pytest.raises(InputError, match=f"`images` must ({message})") as refused:
        DOORS[door](images)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 150


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_range_of_models_is_taken(door: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DOORS[door](to_model_range(LEVELS).to(dtype))


def test_images_that_are_all_bright_are_asked_about() -> None:
    bright = LEVELS / 255
    with pytest.warns(UserWarning, match="if they are in .0, 1., pass 2 . images - 1"):
        GaussianPrior.from_images(bright, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_model_range(bright[:3])  # a few images may all be bright
        require_model_range(1.003 * to_model_range(LEVELS))  # within rounding errors


def test_conversions_refuse_the_other_types() -> None:
    for convert in (to_unit_range, to_uint8):
        with pytest.raises(InputError, match=r"`images` must be floats in .* got torch.uint8"):
            convert(LEVELS)
    with pytest.raises(InputError, match=r"`images` must be uint8 .* got torch.float32"):
        to_model_range(LEVELS / 255)
