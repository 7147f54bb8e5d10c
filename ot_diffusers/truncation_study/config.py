"""What is studied, and the names of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Options, option
from ..errors import require

HEADLINE = (
    "frechet_distance",
    "recall_distance",
    "precision_distance",
    "precision",
    "recall",
    "nearest_distance_ratio",
    "patch_sliced_wasserstein",
)
METRICS = (*HEADLINE, "coverage")
COSTS = ("nfe", "seconds_per_1000", "parameters", "training_seconds")
LABELS = {"gaussian": "Gaussian", "gaussian_classes": "Gaussian, class-wise", "vae": "VAE", "gan": "GAN", "ot": "OT"}
LEARNED = ("gan", "ot", "vae")
"""In the order of training: on the CPU the first two side by side, so that their seconds are comparable."""
VANILLA = "vanilla, truncated"
ORACLE = "oracle"
DESCRIPTIONS = {
    VANILLA: "N(0, I) fed to the truncated chain.",
    "Gaussian": "One Gaussian with the moments of the training images, in closed form.",
    "Gaussian, class-wise": "One such Gaussian for each class.",
    "VAE": "Encoder and generator under the evidence bound; latents from a mixture fitted to the codes.",
    "GAN": "The generator against a discriminator of its widths.",
    "OT": "The generator by optimal transport alone, no adversary.",
    ORACLE: "Real training images, diffused: what a perfect prior would reach.",
}
GOAL_METRICS = {
    "frechet_distance": "Fréchet",
    "recall_distance": "recall distance",
    "patch_sliced_wasserstein": "patch SW",
}


@dataclass
class TruncationConfig(Options):
    """The study of priors."""

    output_dir: str = option("runs/truncation", "folder of the study")
    dataset: str = option("digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder")
    presets: str = option("digits", "folder of presets: baseline, evaluator, prior_gaussian, prior_vae, prior_gan, …")
    denoiser: str | None = option(None, "folder or Hub id of a trained pipeline; none trains the baseline preset")
    feature_extractor: str | None = option(None, "folder of a feature network for transport; none trains the preset")
    evaluator: str | None = option(None, "network no loss sees: of `ot-diffusers evaluate`; none trains the preset")
    priors: tuple[str, ...] = option(tuple(LABELS), "rows of the table beside noise and the oracle")
    truncation_timestep: int = option(10, "T' of the table")
    timesteps: tuple[int, ...] = option((10, 50, 100, 200, 300), "T' of the curves")
    learned_timesteps: tuple[int, ...] = option((), "those T' of the curves for which learned priors are trained anew")
    guided: tuple[str, ...] = option(
        (), "priors that are sampled with OT guidance as well; any adds the noise of a full chain"
    )
    goal_timestep: int | None = option(None, "T' of guided rows beside the table's own; none is no such rows")
    num_samples: int | None = option(None, "images of each row; none is as many as there are test images")
    full_steps: tuple[int, ...] = option((50, 1000), "reverse steps of the full chains")
    curve_steps: int = option(10, "reverse steps of each point of the curves, at most T'")
    batch_size: int | None = option(None, "images sampled at once; none is up to 1,000")
    guided_batch_size: int | None = option(None, "the same where guidance couples them")
    max_train_steps: int | None = option(None, "updates of each learned prior; none is the preset's")
    max_train_seconds: float | None = option(None, "time of each learned prior; none is what its updates take")
    seed: int = option(0, "of the models and of the starting noise")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("truncation_timestep", "curve_steps"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("timesteps", "full_steps"):
            values = getattr(self, name)
            require(all(value >= 1 for value in values), name, "hold numbers from 1", values)
        known = set(self.priors) <= set(LABELS)
        require(known, "priors", f"be among {', '.join(LABELS)}", ", ".join(self.priors))
        known = set(self.guided) <= set(self.priors)
        require(known, "guided", f"be among priors {', '.join(self.priors)}", ", ".join(self.guided))
        goal = self.goal_timestep
        require(goal is None or goal >= 1, "goal_timestep", "be at least 1 or none", goal)
        require(goal is None or bool(self.guided), "goal_timestep", "be none without guided priors", goal)
        known = set(self.learned_timesteps) <= set(self.timesteps)
        require(known, "learned_timesteps", f"be among timesteps {self.timesteps}", self.learned_timesteps)
        require(self.num_samples is None or self.num_samples >= 2, "num_samples", "be at least 2", self.num_samples)
        for name in ("batch_size", "guided_batch_size", "max_train_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "be at least 1 or none", value)
        seconds = self.max_train_seconds
        require(seconds is None or seconds > 0, "max_train_seconds", "be positive or none", seconds)
        require(self.seed >= 0, "seed", "be at least 0", self.seed)
