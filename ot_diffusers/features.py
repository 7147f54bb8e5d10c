"""Feature networks on whole data sets: loading them, running them once, caching their outputs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cache import remembered
from .config import FeaturesConfig
from .data import ResidentImages, StreamedImages, evenly_spaced, pixels_of
from .errors import InputError, require
from .files import local_or_hub
from .images import to_model_range
from .losses.denoising import image_features
from .models.backbone_extractor import PREPROCESSING, BackboneFeatureExtractor
from .models.denoiser_extractor import DenoiserFeatureExtractor
from .models.feature_extractor import ConvFeatureExtractor, FeatureExtractor, ResidualFeatureExtractor
from .models.reference_bank import ReferenceBank
from .transport import median_distance


def load_feature_extractor(path: str | Path) -> FeatureExtractor:
    """A feature network from a `train_features.py` run, or one saved on its own in a folder or under a Hub id.

    It can be a network of this package or a vision backbone of transformers.

    Raises:
        InputError: there is no feature network at `path`.
    """
    place = local_or_hub(path, "feature_extractor", "be a folder or Hub id of a feature network")
    inside = os.path.join(place, "feature_extractor")
    folder = inside if os.path.isdir(inside) else place
    try:
        config = FeatureExtractor.load_config(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`feature_extractor` must be a folder or Hub id of a feature network, got {str(path)!r}"
        ) from error
    if "model_type" in config:  # a backbone in the format of transformers
        return BackboneFeatureExtractor.from_transformers(folder)
    kinds = (BackboneFeatureExtractor, ConvFeatureExtractor, DenoiserFeatureExtractor, ResidualFeatureExtractor)
    for network in kinds:
        if network.__name__ == config.get("_class_name"):
            return _load_network(network, folder)
    given = f"{config.get('_class_name')!r} in {str(path)!r}"
    raise InputError(f"`feature_extractor` must be a feature network of this package or a vision backbone, got {given}")


def _load_network(kind: Any, folder: str) -> FeatureExtractor:
    try:
        return kind.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"`feature_extractor` must be complete, got {folder!r} ({reason})") from error


def load_reference_bank(path: str | Path) -> ReferenceBank:
    """The reference set of a `train_features.py` run, or of a published pipeline under its Hub id.

    Raises:
        InputError: there is no reference set at `path`.
    """
    place = local_or_hub(path, "features", "hold a network and its `reference_bank`")
    # With `subfolder` on a local folder, diffusers would load weights from its root instead.
    inside = {} if os.path.isdir(place) else {"subfolder": "reference_bank"}
    folder = place if inside else os.path.join(place, "reference_bank")
    try:
        return ReferenceBank.from_pretrained(folder, use_safetensors=True, **inside)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"`features` must hold a network and its `reference_bank`, got {str(path)!r}") from error


def labels_of(images: ResidentImages | StreamedImages) -> Tensor:
    """Class labels, int64 [N] on the CPU.

    Raises:
        InputError: the data set or some of its images have no labels, or all images have the same label.
    """
    if images.label_problem is not None:
        raise InputError(f"{images.label_problem} (data set {images.name!r}, {images.split})")
    if images.labels is None:
        raise InputError(f"`label_column` must name a column with class labels, got none for {images.name!r}")
    return images.labels


def class_counts(images: ResidentImages | StreamedImages) -> dict[str, int]:
    """Number of images of each class by its name, in the order of the labels; 0 for a class of other splits only.

    Raises:
        InputError: as `labels_of`.
    """
    names = images.class_names or ()
    counts = labels_of(images).bincount(minlength=len(names)).tolist()
    return dict(zip(names or map(str, range(len(counts))), counts, strict=True))


def make_feature_extractor(config: FeaturesConfig, images: ResidentImages | StreamedImages) -> FeatureExtractor:
    """A new, untrained feature network for labelled images; its parameters are still frozen."""
    num_classes = len(class_counts(images))
    channels, height, width = images.image_shape
    require(height == width, "image_size", "be given for images that are not square", images.image_shape)
    residual_options: dict[str, Any] = {}
    if config.architecture == "residual":
        residual_options = {"layers_per_block": config.layers_per_block, "norm_type": config.norm_type}
    network = {"conv": ConvFeatureExtractor, "residual": ResidualFeatureExtractor}[config.architecture]
    return network(
        sample_size=height,
        in_channels=channels,
        num_classes=num_classes,
        block_out_channels=config.block_out_channels,
        feature_dim=config.feature_dim,
        dataset=images.name,
        data_fingerprint=images.fingerprint,
        **residual_options,
    )


def make_feature_optimizer(config: FeaturesConfig, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; weight decay applies to matrices and kernels, not to biases and norms."""
    decay = config.sgd_weight_decay if config.optimizer == "sgd" else config.adam_weight_decay
    parameters = list(network.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.sgd_momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))


@torch.no_grad()
def classification_accuracy(
    network: FeatureExtractor, images: ResidentImages | StreamedImages, batch_size: int = 500
) -> float:
    """Fraction of images that the network classifies correctly in evaluation mode, in [0, 1]."""
    chunks = torch.arange(len(images)).split(batch_size)
    labels = labels_of(images)
    training = network.training
    network.eval()
    hits = sum(
        int((network.logits(batch.to(network.device)).argmax(1).cpu() == labels[rows]).sum())
        for rows, batch in images.stream(chunks)
    )
    network.train(training)
    return hits / len(images)


@torch.no_grad()
def extract_features(
    network: FeatureExtractor, images: ResidentImages | StreamedImages, *, squash: str = "clamp", batch_size: int = 500
) -> Tensor:
    """Raw features of every image in order, float32 [N, D] on the network's device."""
    batches = images.stream(torch.arange(len(images)).split(batch_size))
    return torch.cat([image_features(network, batch.to(network.device), squash) for _, batch in batches])


def cached_features(
    network: FeatureExtractor, images: ResidentImages | StreamedImages, *, squash: str = "clamp"
) -> Tensor:
    """As `extract_features`, but cached for every pair of network and data set.

    The key is a hash of the network's weights, the data's fingerprint and `squash`.
    """
    key = hashlib.sha256(f"{weights_fingerprint(network)} {images.fingerprint} {squash}".encode()).hexdigest()
    tensors = remembered("features", key, lambda: {"features": extract_features(network, images, squash=squash)})
    return tensors["features"].to(network.device)


def make_reference_bank(
    network: FeatureExtractor, images: ResidentImages | StreamedImages, num_samples: int
) -> ReferenceBank:
    """A reference set of `num_samples` evenly spaced images (all, if there are fewer), with the median distances
    between features and between thumbnails as its scales, and with labels where the images have them."""
    features = cached_features(network, images)
    rows = evenly_spaced(images, num_samples)
    classes: dict[str, Any] = {}
    if images.labels is not None and images.label_problem is None:
        classes = {"labels": images.labels[rows], "num_classes": len(class_counts(images))}
    return ReferenceBank.from_features(
        features[rows],
        feature_scale=median_distance(features),
        dataset=network.config.dataset,
        data_fingerprint=network.config.data_fingerprint,
        images=to_model_range(pixels_of(images, rows)),
        **classes,
    )


def weights_fingerprint(network: nn.Module) -> str:
    """SHA-256 of the class and the weights, and of a backbone's preprocessing: equal for equal networks, wherever they
    were loaded from."""
    digest = hashlib.sha256(type(network).__name__.encode())
    if isinstance(network, BackboneFeatureExtractor):
        digest.update(repr([list(network.config[name]) for name in PREPROCESSING]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_trained_on(
    network: FeatureExtractor, images: ResidentImages | StreamedImages, argument: str = "feature_extractor"
) -> None:
    """Raise `InputError` if the feature network given as `argument` has another image shape or other training data."""
    if isinstance(network, BackboneFeatureExtractor):
        return  # takes images of any size and was trained on general data
    config, shape = network.config, network.image_shape
    require(shape == images.image_shape, argument, f"take images of shape {images.image_shape}", shape)
    comparable = config.data_fingerprint is not None
    require(
        not comparable or config.data_fingerprint == images.fingerprint,
        argument,
        f"be trained on the training split of {images.name!r}",
        f"a network of {config.dataset!r}",
    )
