"""The truncated set on disk: real images diffused to step T', as a data set in the Hub's layout.

Training draws x_T' on the fly and does not need these files. They are for other programs, and for inspecting the
training data of priors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import require
from ..files import check_folder, new_folder, write_json
from ..schedules import truncated_samples
from . import ResidentImages, StreamedImages

CHUNK = 1000
"""Number of images in memory at once."""
SHARD_SIZE = 10_000


def export_truncated_set(
    images: ResidentImages | StreamedImages,
    scheduler: Any,
    folder: str | Path,
    *,
    num_epochs: int = 1,
    seed: int = 0,
) -> Path:
    """Write x_T' of every image as parquet files that `datasets.load_dataset(folder)` opens.

    Each row has `sample` (float16 [C, H, W]), the `index` of its image, the `epoch` of its noise, and the `label` where
    there is one: the same x_T' as `truncated_samples` draws in training. A thousand images are in memory at once. The
    folder is written under a temporary name and then renamed.

    Args:
        images: a split of a data set.
        scheduler: a truncated scheduler; its last timestep is the noise level.
        folder: a new folder.
        num_epochs: number of independent noises per image.
        seed: random seed of the noise.

    Raises:
        InputError: the folder exists.
    """
    import datasets

    folder = check_folder(folder)
    require(not os.path.lexists(folder), "output", "be a new folder", str(folder))
    require(seed >= 0, "seed", "be at least 0", seed)
    require(num_epochs >= 1, "num_epochs", "be at least 1", num_epochs)
    columns = {
        "sample": datasets.Array3D(images.image_shape, "float16"),
        "index": datasets.Value("int64"),
        "epoch": datasets.Value("int64"),
    }
    if images.labels is not None:
        columns["label"] = datasets.Value("int64")

    split = images.split.split()[0]
    rows = [(epoch, index) for epoch in range(num_epochs) for index in range(0, len(images), SHARD_SIZE)]
    settings = {"dataset": images.name, "split": images.split, "seed": seed, "num_epochs": num_epochs}
    settings |= {"truncation_timestep": scheduler.config.num_train_timesteps, "fingerprint": images.fingerprint}
    with new_folder(folder) as partial:
        for shard, (epoch, first) in enumerate(rows):
            indices = torch.arange(first, min(first + SHARD_SIZE, len(images)))
            table = datasets.Dataset.from_generator(
                _rows,
                features=datasets.Features(columns),
                gen_kwargs={"images": images, "indices": indices, "scheduler": scheduler, "epoch": epoch, "seed": seed},
                cache_dir=str(partial / "cache"),
                split=split,
            )
            table.to_parquet(str(partial / "data" / f"{split}-{shard:05d}-of-{len(rows):05d}.parquet"))
        shutil.rmtree(partial / "cache")
        write_json(partial / "truncated_set.json", settings)
        scheduler.save_pretrained(partial / "scheduler")
    return folder


def _rows(
    images: ResidentImages | StreamedImages, indices: torch.Tensor, scheduler: Any, epoch: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One dictionary for each image, diffused in chunks."""
    for chunk, clean in images.stream(indices.split(CHUNK)):
        samples = truncated_samples(clean, chunk, scheduler, epoch=epoch, seed=seed).half().cpu().numpy()
        for sample, index in zip(samples, chunk.tolist(), strict=True):
            row = {"sample": sample, "index": index, "epoch": epoch}
            yield row if images.labels is None else row | {"label": int(images.labels[index])}
