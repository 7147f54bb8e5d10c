"""What every part of the study needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data import ResidentImages, StreamedImages
from ..experiment import Announce, sample_count
from .config import TruncationConfig

Images = ResidentImages | StreamedImages


@dataclass
class Study:
    """What every part of a study needs.

    Attributes:
        config: of the study.
        output: its folder.
        train_images, test_images: the data.
        announce: takes the lines that tell how far it is.
        overrides: `key=value` for every training script.
    """

    config: TruncationConfig
    output: Path
    train_images: Images
    test_images: Images
    announce: Announce
    overrides: Sequence[str] = ()
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples = sample_count(self.config.num_samples, len(self.train_images), len(self.test_images))

    @property
    def priors(self) -> tuple[str, ...]:
        """The priors of the table; one Gaussian for each class needs classes."""
        labelled = self.train_images.labels is not None and self.train_images.label_problem is None
        return tuple(name for name in self.config.priors if labelled or name != "gaussian_classes")

    @property
    def guided(self) -> tuple[str, ...]:
        """Those of them that are guided, too."""
        return tuple(name for name in self.priors if name in self.config.guided)

    @property
    def denoiser(self) -> str:
        """The configuration's, or the run that this study trains."""
        return self.config.denoiser or str(self.output / "baseline")

    @property
    def feature_extractor(self) -> str:
        """The configuration's, or the run that this study trains."""
        return self.config.feature_extractor or str(self.output / "features")

    @property
    def evaluator(self) -> str:
        """The configuration's, or the run that this study trains."""
        return self.config.evaluator or str(self.output / "evaluator")
