"""Class conditions: the classes that a pipeline knows, those that a call asks for, and guidance by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import InputError, require, shown
from ..models.prior import pick_component
from .call import Generators

CLASS_OPTIONS = ("id2label", "class_frequencies")
"""Entries of a pipeline's configuration that describe its classes; the first is that of diffusers' `DiTPipeline`."""
LISTED = 20
"""Names of classes that an error message lists."""

ClassLabels = int | str | Sequence[int | str] | Tensor


@dataclass(frozen=True)
class Classes:
    """The classes that a model knows, numbered from 0.

    Attributes:
        names: one for each of C classes.
        frequencies: of each class in the training data, by which labels are drawn.
        null_label: label of images whose class is not told, C; None for a denoiser that was trained with classes only.

    Example:
        >>> classes = Classes.from_counts({"cat": 30, "dog": 10})
        >>> classes.labels_of(["dog", 0], 2), classes.null_label
        (tensor([1, 0]), 2)
        >>> classes.labels_of("cow", 2)
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `class_labels` must be among cat, dog, got 'cow'
    """

    names: tuple[str, ...]
    frequencies: tuple[float, ...]
    null_label: int | None

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], *, has_null_label: bool = True) -> Classes:
        """The classes of a data set, by the number of images of each."""
        total = sum(counts.values())
        null_label = len(counts) if has_null_label else None
        return cls(tuple(counts), tuple(count / total for count in counts.values()), null_label)

    @classmethod
    def of(
        cls,
        size: int,
        id2label: Mapping[Any, str] | None,
        class_frequencies: Mapping[Any, float] | None,
        *,
        has_null_label: bool = False,
    ) -> Classes:
        """The classes of a pipeline's configuration, whose keys are strings in a file.

        Args:
            size: labels that the denoiser takes, with or without a null label behind those of the classes.
            id2label: label to name; by default classes are named by their numbers.
            class_frequencies: label to frequency; equal by default.
            has_null_label: whether the last of the labels is a null label where classes are named by their numbers.

        Raises:
            InputError: classes that are not those of the denoiser.
        """
        names = by_label("id2label", id2label or dict(enumerate(map(str, range(size - has_null_label)))), str)
        fits = sorted(names) == list(range(len(names))) and len(names) in (size, size - 1)
        require(fits, "id2label", f"number classes from 0, for a denoiser of {size} labels", len(names))
        shares = by_label("class_frequencies", class_frequencies or dict.fromkeys(names, 1.0), float)
        known = shares.keys() == names.keys() and min(shares.values()) >= 0 and sum(shares.values()) > 0
        require(known, "class_frequencies", f"hold a number for each of {len(names)} classes", shares)
        order = range(len(names))
        null_label = len(names) if size > len(names) else None
        return cls(tuple(names[label] for label in order), tuple(shares[label] for label in order), null_label)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Labels of the denoiser: those of the classes, and the null label where there is one."""
        return len(self) + (self.null_label is not None)

    @property
    def options(self) -> dict[str, dict[int, Any]]:
        """The entries of a pipeline's configuration, see `CLASS_OPTIONS`."""
        return dict(zip(CLASS_OPTIONS, (dict(enumerate(self.names)), dict(enumerate(self.frequencies))), strict=True))

    def labels_of(self, asked: ClassLabels, batch_size: int) -> Tensor:
        """The labels that a call asks for, int64 [B] on the CPU.

        Raises:
            InputError: another number of labels, a name that is unknown, or a label outside 0 … C − 1.
        """
        values = listed(asked)
        one_each = f"be one, or one for each of {batch_size} images"
        require(values is None or len(values) == batch_size, "class_labels", one_each, len(values or ()))
        return torch.tensor([self._label(value) for value in ([asked] * batch_size if values is None else values)])

    def _label(self, value: Any) -> int:
        value = value.item() if isinstance(value, Tensor) else value
        if isinstance(value, str):
            names = ", ".join(self.names[:LISTED]) + (", …" if len(self) > LISTED else "")
            require(value in self.names, "class_labels", f"be among {names}", value)
            return self.names.index(value)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        require(whole, "class_labels", "be integers or names of classes", value)
        require(0 <= value < len(self), "class_labels", f"lie in 0 … {len(self) - 1}", value)
        return int(value)

    def draw(self, batch_size: int, generator: Generators, device: torch.device | str) -> Tensor:
        """Labels by the frequencies of the classes, int64 [B]; with a generator for each image, each has its own."""
        normal = randn_tensor((batch_size, 1), generator=generator, device=torch.device(device))
        return pick_component(torch.tensor(self.frequencies, device=normal.device), normal)


def label_count(denoiser: Any) -> int | None:
    """Labels that a denoiser takes; None without classes. The last of a DiT is always a null label."""
    return denoiser.config["num_embeds_ada_norm"] + 1 if is_dit(denoiser) else denoiser.config.get("num_class_embeds")


def is_dit(denoiser: Any) -> bool:
    """Whether the denoiser has the classes of a `DiTTransformer2DModel`."""
    return denoiser.config.get("num_embeds_ada_norm") is not None


def by_label(name: str, entries: Mapping[Any, Any], kind: type[str] | type[float]) -> dict[int, Any]:
    """An entry of a configuration with integers as keys, which a JSON file holds as strings.

    Raises:
        InputError: another key or value.
    """
    try:
        return {int(label): kind(value) for label, value in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        kinds = "names" if kind is str else "numbers"
        raise InputError(f"`{name}` must have labels as keys and {kinds} as values, got {shown(entries)}") from error


def class_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The entries of a pipeline's configuration that describe its classes; none without classes. `DiTPipeline` has them
    in its `labels` alone: the label of each of several names of a class."""
    options = {name: pipeline.config[name] for name in CLASS_OPTIONS if pipeline.config.get(name) is not None}
    labels: dict[str, int] = {} if options else getattr(pipeline, "labels", {})
    if labels:
        names = {label: ", ".join(name for name in labels if labels[name] == label) for label in labels.values()}
        options["id2label"] = dict(sorted(names.items()))
    return options


def listed(class_labels: ClassLabels | None) -> Sequence[int | str] | None:
    """Labels of several images as a list; None for one label, or none."""
    values: Any = class_labels
    values = values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array
    return values if isinstance(values, Sequence) and not isinstance(values, str) else None


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is told of the images of a call.

    Attributes:
        labels: int64 [B].
        null_label: label of images whose class is not told, if there is one.
        scale: w of v = v_∅ + w (v_y − v_∅), where v is the output of the denoiser; 1 takes v_y alone.
    """

    labels: Tensor
    null_label: int | None
    scale: float

    @property
    def calls(self) -> int:
        """Function evaluations for each image in a call of the denoiser."""
        return 1 if self.scale == 1 else 2

    def output(self, unet: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        """The output of the denoiser, [B, C, H, W]; only guidance by class doubles its batch.

        Guidance leaves learned variances, in further channels, as they are with labels.

        Reference: [Ho2022].
        """
        labels, timestep = self.labels.to(sample.device), timestep.to(sample.device).expand(len(sample))
        if self.scale == 1:
            return unet(sample, timestep, class_labels=labels).sample
        both = torch.cat([labels, torch.full_like(labels, self.null_label)])  # type: ignore[arg-type]
        told, untold = unet(sample.repeat(2, 1, 1, 1), timestep.repeat(2), class_labels=both).sample.chunk(2)
        mean, rest = told[:, : sample.shape[1]], told[:, sample.shape[1] :]
        untold = untold[:, : sample.shape[1]]
        return torch.cat([untold + self.scale * (mean - untold), rest], dim=1)
