"""Checks of finished samples during training, on validation images; and the state that is kept in the end."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..cache import read_verified, save_aside
from ..config import FewStepConfig
from ..data import evenly_spaced
from ..errors import require
from ..evaluation import metrics
from ..evaluation.pixels import patch_sliced_wasserstein
from ..features import labels_of
from ..losses.priors import with_labels
from ..schedules import Chain
from ..seeds import keyed_generator
from .batches import Images
from .checkpoints import TrainingState
from .few_step import ComparedLevels, finished_loss
from .folder import check_claim
from .records import Record, averaged_weights

logger = logging.getLogger(__name__)

BEST, RECORD = "best.safetensors", "record"
"""File of the kept state in the folder of a run, and the tensor in it that holds its measures."""
MAX_COMPARED = 2000
"""Training images, evenly spaced, that recall and memorisation are measured against."""

TOLERATED = 1.05
"""Divergence of a kept state relative to the lowest one, at most."""
FEWEST_MODES, NEAREST, LEAST_RANK, FARTHEST_PATCHES = 0.8, 0.9, 0.6, 10.0
"""Bounds: recall and effective rank relative to those of real images, the memorisation ratio, and the distance of
patches relative to that of real images."""


@dataclass
class SampleChecks:
    """The averaged weights' finished images beside validation images, and the best state so far.

    The kept state is the last one within all bounds whose divergence from the validation images is at most 5% above the
    lowest, since the divergence from few images is noisy; of states outside the bounds where none is within. Test
    images play no part.

    Of a denoiser with classes, images are made in the classes of the validation images, and the divergence is that of
    the joint law of image and label, so that images of a wrong class count.

    Attributes:
        chain: chain of the finished images.
        levels: what they are compared in; recall, memorisation and rank are those of its deepest features.
        train, validation: images of these splits, [N, C, H, W] in [-1, 1].
        bounds: smallest and largest allowed value of each measure.
        best: update and measures of the kept state.
        warned: measures outside their bounds at the last check.
        labels: of the validation images, [N], for a denoiser with classes; both halves have the same.
    """

    config: FewStepConfig
    chain: Chain
    levels: ComparedLevels
    train: Tensor
    validation: Tensor
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    labels: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        config: FewStepConfig,
        chain: Chain,
        levels: ComparedLevels,
        images: Images,
        validation: Images,
        *,
        has_classes: bool = False,
    ) -> SampleChecks:
        """The checks against these splits; an earlier kept state in the folder of the run counts.

        Raises:
            InputError: for a denoiser with classes, validation images without labels or without two of any class.
        """
        count = config.num_validation_samples
        train = images.fetch(evenly_spaced(images, MAX_COMPARED))
        rows, labels = evenly_spaced(validation, count), None
        if has_classes:
            rows = rows[halved_by_class(labels_of(validation)[rows])]
            require(len(rows) > 0, "num_validation_samples", "give two validation images of some class", count)
            labels = labels_of(validation)[rows]
        checks = cls(config, chain, levels, train, validation.fetch(rows), labels=labels)
        real = checks.measured(images.fetch(evenly_spaced(images, count)))
        checks.bounds = {
            "recall": (FEWEST_MODES * real["recall"], float("inf")),
            "nearest_distance_ratio": (NEAREST, float("inf")),
            "effective_rank": (LEAST_RANK * real["effective_rank"], float("inf")),
            "patch_sliced_wasserstein": (0.0, FARTHEST_PATCHES * max(real["patch_sliced_wasserstein"], 1e-4)),
        }
        kept = read_verified(Path(config.output_dir) / BEST)
        checks.best = {} if kept is None else json.loads(bytes(kept[RECORD].tolist()))
        return checks

    @torch.no_grad()
    def divergence(self, images: Tensor) -> float:
        """Sinkhorn divergence of images in [-1, 1] from the validation images, in the classes that they were asked for;
        the second half of the images makes the self-term."""
        held_out, labels = self._real_levels[1], self._asked_labels(len(images))
        generated, half = with_labels(self._levels(images), labels), len(images) // 2
        options: dict[str, Any] = {"objective": "sinkhorn", "blur": self.config.blur, "scaling": self.config.scaling}
        first, second = ([level[part] for level in generated] for part in (slice(half), slice(half, None)))
        reference = with_labels(held_out, None if labels is None else labels[: len(self.validation)])
        return float(finished_loss(first, reference, second, self.levels.weights, **options))

    @torch.no_grad()
    def measured(self, images: Tensor) -> dict[str, float]:
        """Recall, precision, memorisation ratio, effective rank and patch distance of images in [-1, 1]."""
        generated, (train, held_out) = self._levels(images), self._real_levels
        deepest = self.levels.deepest
        found, known, new = (part[deepest].cpu() for part in (generated, train, held_out))
        quality = metrics.precision_recall(found, new)
        return {
            "precision": quality.precision,
            "recall": quality.recall,
            "nearest_distance_ratio": metrics.nearest_distance_ratio(found, known, new),
            "effective_rank": metrics.effective_rank(found),
            "patch_sliced_wasserstein": patch_sliced_wasserstein(
                images.cpu(), self.validation.cpu(), patch_size=min(7, *images.shape[2:])
            ),
        }

    @torch.no_grad()
    def check(self, state: TrainingState, record: Record, accelerator: Accelerator) -> None:
        """Measure the averaged weights; keep them if they are the best so far, and warn of what leaves its bounds."""
        if accelerator.is_main_process:
            with averaged_weights(state):
                unet = accelerator.unwrap_model(state.model, keep_torch_compile=False)
                samples = self._samples(unet)
                values = {"divergence": self.divergence(samples), **self.measured(samples)}
                outside = [name for name, (low, high) in self.bounds.items() if not low <= values[name] <= high]
                self._warn(values, outside)
                entry = {"update": state.update, "within_bounds": not outside, **values}
                if replaces(entry, self.best):
                    same = bool(self.best) and self.best["within_bounds"] == entry["within_bounds"]
                    lowest = min(entry["divergence"], self.best["lowest"]) if same else entry["divergence"]
                    self.best = entry | {"lowest": lowest}
                    self._keep(unet)
        else:
            values = {}
        accelerator.wait_for_everyone()
        record.end_epoch(**{f"validation_{name}": value for name, value in values.items()})

    def load_best(self, unet: nn.Module) -> None:
        """Put the kept weights into the network."""
        kept = read_verified(Path(self.config.output_dir) / BEST)
        if kept is not None:
            unet.load_state_dict({name: tensor for name, tensor in kept.items() if name != RECORD})

    @cached_property
    def _real_levels(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Levels of the training and of the validation images, which stay."""
        return self._levels(self.train), self._levels(self.validation)

    def _levels(self, images: Tensor) -> tuple[Tensor, ...]:
        parts = [self.levels(part.to(self.levels.device)) for part in images.split(self.config.train_batch_size)]
        return tuple(torch.cat(level) for level in zip(*parts, strict=True))

    def _asked_labels(self, count: int) -> Tensor | None:
        """The classes of so many images: those of the validation images, again and again."""
        if self.labels is None:
            return None
        return self.labels[torch.arange(count) % len(self.labels)].to(self.levels.device)

    def _samples(self, unet: nn.Module) -> Tensor:
        count, shape = self.config.num_validation_samples, self.validation.shape[1:]
        if self.labels is not None:  # whole repetitions, for equal shares of each class
            count = max(1, count // len(self.labels)) * len(self.labels)
        noise = torch.randn((count, *shape), generator=keyed_generator("cpu", self.config.seed, "checks"))
        asked = self._asked_labels(count)
        return torch.cat(
            [
                self.chain(unet, noise[part].to(self.levels.device), asked if asked is None else asked[part]).cpu()
                for part in torch.arange(count).split(self.config.train_batch_size)
            ]
        )

    def _keep(self, unet: nn.Module) -> None:
        check_claim(self.config)
        record = torch.tensor(list(json.dumps(self.best).encode()), dtype=torch.uint8)
        save_aside({RECORD: record, **unet.state_dict()}, Path(self.config.output_dir) / BEST)

    def _warn(self, values: dict[str, float], outside: list[str]) -> None:
        for name in outside:
            if name not in self.warned:
                low, high = self.bounds[name]
                bound = f"below {low:.3g}" if values[name] < low else f"above {high:.3g}"
                logger.warning("the samples' %s of %.3g is %s", name.replace("_", " "), values[name], bound)
        self.warned = set(outside)


def halved_by_class(labels: Tensor) -> Tensor:
    """Rows of `labels`, [N], in two halves that hold each class equally often; the last image of an odd number is left
    out.

    Example:
        >>> halved_by_class(torch.tensor([1, 0, 1, 1, 0]))
        tensor([1, 0, 4, 2])
    """
    first, second = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        half = len(rows) // 2
        first.append(rows[:half])
        second.append(rows[half : 2 * half])
    return torch.cat(first + second)


def replaces(entry: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a later state is kept in place of the kept one, if there is one; see `SampleChecks`.

    Example:
        >>> kept = {"within_bounds": True, "divergence": 0.100, "lowest": 0.100}
        >>> replaces({"within_bounds": True, "divergence": 0.104}, kept)
        True
        >>> replaces({"within_bounds": False, "divergence": 0.050}, kept)
        False
    """
    if not best or entry["within_bounds"] != best["within_bounds"]:
        return not best or entry["within_bounds"]
    return entry["divergence"] <= TOLERATED * best["lowest"]
