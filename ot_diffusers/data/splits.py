"""The splits of a data set: their names, and deterministic partitions where a split is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import require

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split of each folder name in a folder of pictures."""
VALIDATION_NAMES = ("validation", "valid", "val")
TEST_FRACTION = 1 / 6
VALIDATION_FRACTION = 1 / 12


def take_split(tables: datasets.DatasetDict, dataset: str, split: str) -> tuple[datasets.Dataset, str]:
    """The images of `split`, and its name, with a note if the images were taken from the train split.

    Raises:
        InputError: there is no train split from which the images could be taken.
    """
    names = list(tables)
    train_name = names[0] if len(names) == 1 and names[0] not in ("test", *VALIDATION_NAMES) else "train"
    if split == "test" and "test" in tables:
        return tables["test"], "test"
    own_validation = next((name for name in VALIDATION_NAMES if name in tables), None)
    if split == "validation" and own_validation:
        return tables[own_validation], own_validation
    require(train_name in tables, "dataset", f"have a train split beside {', '.join(names)}", dataset)

    train, note = tables[train_name], ""
    if "test" not in tables:
        rest, test = _cut(len(train), round(len(train) * TEST_FRACTION))
        if split == "test":
            return train.select(test), f"test ({len(test)} of {len(train)} {train_name} images)"
        train, note = train.select(rest), " without test"
    if own_validation:
        return train, f"train{f' ({train_name}{note})' if note else ''}"
    rest, validation = _cut(len(train), validation_size(len(train)))
    chosen = {"train": rest, "validation": validation}[split]
    return train.select(chosen), f"{split} ({len(chosen)} of {len(train)} {train_name} images{note})"


def validation_size(num_samples: int) -> int:
    """Size of the validation split: 1/12, such as 5,000 of 60,000 images."""
    return round(num_samples * VALIDATION_FRACTION)


def _cut(num_samples: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the remaining and of the `size` chosen images, in order; they depend on both arguments alone."""
    permutation = np.random.default_rng(0).permutation(num_samples)
    return np.sort(permutation[size:]), np.sort(permutation[:size])


def stratified_cut(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_cut`, with the number of images of every class within one of its share of `size`."""
    permutation = np.random.default_rng(0).permutation(len(labels))
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        members = permutation[labels[permutation] == label]
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = permutation[np.argsort(quantile[permutation], kind="stable")]
    return np.sort(order[size:]), np.sort(order[:size])
