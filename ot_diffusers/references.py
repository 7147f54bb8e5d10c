"""A guided pipeline from one that exists and the images that it should resemble, without training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor

from .data import ResidentImages, StreamedImages, load_images, to_model_range
from .data.decode import to_pixels, visible_picture
from .errors import InputError, require, require_integer
from .features import load_feature_extractor
from .guidance import check_takes
from .images import require_model_range
from .losses.denoising import image_features
from .models.denoiser_extractor import DenoiserFeatureExtractor
from .models.feature_extractor import FeatureExtractor
from .models.reference_bank import ReferenceBank
from .pipelines.guided import GuidedPipeline
from .transport import median_distance

logger = logging.get_logger(__name__)

P = TypeVar("P", bound=GuidedPipeline)

NUM_REFERENCES = 2000
FEW_REFERENCES = 64
"""Fewer references than this describe a distribution badly."""
BATCH = 100
"""Images in one pass of the feature network."""
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey image, as in Pillow."""
SUM_TOLERANCE = 1e-3

Images = str | os.PathLike[str] | ResidentImages | StreamedImages | Sequence[PIL.Image.Image] | Tensor
Weights = Mapping[str, float] | Sequence[float] | Tensor


@dataclass(frozen=True)
class References:
    """Images of one shape that a pipeline is guided towards, with what is known of them.

    Attributes:
        images: [N, C, H, W] in [-1, 1].
        rows: their places among the images that were given, int64 [N].
        total: number of images that were given.
        labels: classes, int64 [N]; None if they are not known.
        class_names: names of the classes by label.
        name: name of the data set.
    """

    images: Tensor
    rows: Tensor
    total: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str | None = None

    def take(self, rows: Tensor) -> References:
        """Some of them."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, images=self.images[rows], rows=self.rows[rows], labels=labels)


def with_references(
    pipeline: P,
    images: Images,
    *,
    network: FeatureExtractor | str | os.PathLike[str] | None = None,
    weights: Weights | None = None,
    labels: Sequence[int] | Tensor | None = None,
    num_references: int = NUM_REFERENCES,
    split: str = "train",
    **data_options: Any,
) -> P:
    """See `GuidedPipeline.with_references`."""
    shape = pipeline.image_shape
    chosen = chosen_network(pipeline, network)
    references = read_references(images, shape, num_references, labels=labels, split=split, **data_options)
    options: dict[str, Any] = {}
    masses = None if weights is None else masses_of(weights, references)
    if masses is not None:
        references, masses = references.take((masses > 0).nonzero()[:, 0]), masses[masses > 0]
    if len(references.rows) < FEW_REFERENCES:
        crowded = "samples crowd around so few, and can become worse than plain ones"
        logger.warning(f"{len(references.rows)} references are fewer than {FEW_REFERENCES}: {crowded}")
    if pipeline.classes is not None:
        references = renumbered(references, pipeline.classes.names)
        if references.labels is not None:  # labels are drawn in the proportions of the references
            each = torch.ones(len(references.labels)) if masses is None else masses
            shares = torch.zeros(len(pipeline.classes)).index_add(0, references.labels, each)
            options["class_frequencies"] = dict(enumerate((shares / shares.sum()).tolist()))
    bank = make_bank(chosen, references, masses)
    parts = {"feature_extractor": chosen, "reference_bank": bank.to(pipeline.device), "guidance_field": None}
    return type(pipeline).from_pipe(pipeline, **parts, **options)


def chosen_network(
    pipeline: GuidedPipeline, network: FeatureExtractor | str | os.PathLike[str] | None
) -> FeatureExtractor:
    """The network, loaded if it is a folder or Hub id; by default the features of the pipeline's own denoiser.

    Raises:
        InputError: a network for images of another size.
    """
    if network is None:
        require(pipeline.vae is None, "network", "be given for a latent model, whose denoiser sees no images", network)
        return DenoiserFeatureExtractor.from_denoiser(pipeline.unet, pipeline.scheduler)
    chosen = network if isinstance(network, FeatureExtractor) else load_feature_extractor(str(network))
    check_takes(chosen, pipeline.image_shape, "network")
    return chosen.to(pipeline.device)


def make_bank(network: FeatureExtractor, references: References, masses: Tensor | None) -> ReferenceBank:
    """The reference set of these images by this network."""
    with torch.no_grad():
        parts = references.images.split(BATCH)
        features = torch.cat([image_features(network, part.to(network.device)).cpu() for part in parts])
    classes: dict[str, Any] = {}
    if references.labels is not None:
        classes = {"labels": references.labels, "num_classes": len(references.class_names)}
    return ReferenceBank.from_features(
        features,
        feature_scale=median_distance(features),
        dataset=references.name,
        images=references.images,
        weights=masses,
        **classes,
    )


# --- Images -----------------------------------------------------------------------------------------------------------


def read_references(
    images: Images,
    shape: tuple[int, int, int],
    num_references: int = NUM_REFERENCES,
    *,
    labels: Sequence[int] | Tensor | None = None,
    split: str = "train",
    **data_options: Any,
) -> References:
    """At most `num_references` of the images, evenly spaced over all of them, in `shape`.

    Raises:
        InputError: images of another kind or range, fewer than two, or all alike.
    """
    require_integer("num_references", num_references, at_least=2)
    if isinstance(images, str | os.PathLike):
        size: dict[str, Any] = {"image_size": max(shape[1:]), "channels": shape[0]}
        images = load_images(os.fspath(images), split, **size, **data_options)
    else:
        named = next(iter(data_options), "")
        require(not data_options, named, "be left out for images that are loaded already", data_options.get(named))
    total = len(images)
    require(total >= 2, "images", "be at least 2", total)
    rows = torch.linspace(0, total - 1, min(num_references, total)).round().long()
    about: dict[str, Any] = {}
    if isinstance(images, ResidentImages | StreamedImages):
        require(labels is None, "labels", "be left out for a data set, which has its own", labels)
        read = images.fetch(rows).cpu()
        if images.labels is not None and images.label_problem is None:
            names = images.class_names or tuple(map(str, range(int(images.labels.max()) + 1)))
            about = {"labels": images.labels[rows], "class_names": names}
        about["name"] = images.name
    elif isinstance(images, Tensor):
        require(images.ndim == 4, "images", "have shape [N, C, H, W]", tuple(images.shape))
        require_model_range(images)
        read = images.detach()[rows.to(images.device)].float().cpu()
    else:
        read = torch.cat([pixels_of_picture(images[row], shape) for row in rows.tolist()])
    if labels is not None:
        known = torch.as_tensor(labels)
        fits = tuple(known.shape) == (total,) and not known.is_floating_point() and int(known.min()) >= 0
        require(fits, "labels", f"be {total} integers from 0", labels)
        about = {"labels": known.long().cpu()[rows], "class_names": tuple(map(str, range(int(known.max()) + 1)))}
    read = fitted(read, shape)
    alike = bool((read == read[:1]).all())
    require(not alike, "images", "differ from one another", f"{total} copies of one image")
    return References(read, rows, total, **about)


def pixels_of_picture(picture: Any, shape: tuple[int, int, int]) -> Tensor:
    """A picture of Pillow in [-1, 1], [1, C, S, S], scaled to the longer side S of `shape` and cropped.

    Raises:
        InputError: something else.
    """
    kinds = "be a folder, a Hub id, loaded images, a list of PIL images or a tensor [N, C, H, W] in [-1, 1]"
    require(isinstance(picture, PIL.Image.Image), "images", kinds, type(picture).__name__)
    pixels = to_pixels(visible_picture(picture), max(shape[1:]), shape[0])
    return to_model_range(torch.from_numpy(np.ascontiguousarray(pixels)))[None]


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] in another [C, H, W]: grey or coloured, cropped in the middle and scaled.

    Example:
        >>> fitted(torch.ones(2, 3, 10, 20), (1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """
    channels, *size = shape
    if images.shape[1] != channels:
        convertible = {images.shape[1], channels} == {1, 3}
        require(convertible, "images", f"have {channels} channels, or be grey or RGB", tuple(images.shape))
        if channels == 1:
            images = (images * images.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
        else:
            images = images.expand(-1, 3, -1, -1)
    if list(images.shape[2:]) != size:
        # As data sets are read, a square first; then the middle of it, if the images of the denoiser are no squares.
        square = centre(images, (min(images.shape[2:]),) * 2)
        images = centre(F.interpolate(square, (max(size),) * 2, mode="bilinear", antialias=True), size)
    return images.clamp(-1, 1)


def centre(images: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of images, [N, C, H, W], in a smaller height and width."""
    (top, left), (height, width) = ((now - side) // 2 for now, side in zip(images.shape[2:], size, strict=True)), size
    return images[..., top : top + height, left : left + width]


# --- Classes ----------------------------------------------------------------------------------------------------------


def renumbered(references: References, names: Sequence[str]) -> References:
    """The references with labels as a pipeline with the classes `names` numbers them; without labels, and with a
    warning, where it does not have their classes."""
    if references.labels is None:
        return references
    own = [references.class_names[label] for label in references.labels.tolist()]
    others = sorted(set(own) - set(names))
    if others:
        logger.warning(f"the references guide without regard to classes: the pipeline has no class {others[0]!r}")
        return replace(references, labels=None, class_names=())
    labels = torch.tensor([list(names).index(name) for name in own])
    return replace(references, labels=labels, class_names=tuple(names))


def masses_of(weights: Weights, references: References) -> Tensor:
    """The mass of each reference, [N], sum 1: given for each image, or by the shares of classes.

    Raises:
        InputError: see `class_shares`, or another number of weights.
    """
    if isinstance(weights, Mapping):
        shares = class_shares(weights, references.labels, references.class_names)
        assert references.labels is not None
        counts = references.labels.bincount(minlength=len(shares))
        return (shares / counts.clamp(min=1))[references.labels]
    values = torch.as_tensor(weights, dtype=torch.float32).detach().cpu()
    require(tuple(values.shape) == (references.total,), "weights", f"be {references.total} numbers", weights)
    valid = bool((values.isfinite() & (values >= 0)).all()) and float(values[references.rows].sum()) > 0
    require(valid, "weights", "be at least 0, and not all 0", weights)
    chosen = values[references.rows]
    return chosen / chosen.sum()


def class_shares(weights: Mapping[str, float], labels: Tensor | None, class_names: Sequence[str]) -> Tensor:
    """The share of each class, [C], sum 1, from those of some classes; the others keep their proportions in the rest.

    Example:
        >>> class_shares({"cat": 0.9}, torch.tensor([0, 1, 2, 2]), ("bird", "cat", "dog"))
        tensor([0.0333, 0.9000, 0.0667])

    Raises:
        InputError: images without classes, a class that they do not have, or shares that are not parts of 1.
    """
    if labels is None:
        raise InputError("`weights` must be a number for each image where their classes are not known, got shares")
    counts = labels.bincount(minlength=len(class_names)).float()
    shares, is_open = torch.zeros(len(class_names)), counts > 0
    for name, share in weights.items():
        require(name in class_names, "weights", f"name some of {', '.join(class_names)}", name)
        label = list(class_names).index(name)
        require(0 <= share <= 1, "weights", f"have a share from 0 to 1 for {name!r}", share)
        require(share == 0 or bool(counts[label] > 0), "weights", "be shares of classes that have images", name)
        shares[label], is_open[label] = share, False
    rest, others = 1 - float(shares.sum()), counts * is_open
    filled = abs(rest) < SUM_TOLERANCE or (rest > 0 and float(others.sum()) > 0)
    require(filled, "weights", "be shares whose sum is 1, or less where classes are left", dict(weights))
    return shares / shares.sum() if abs(rest) < SUM_TOLERANCE else shares + rest * others / others.sum()
