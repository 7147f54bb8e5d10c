"""Configuration of the training scripts: dataclasses here, YAML that holds only what differs, `key=value` on the
command line.

    accelerate launch train/train_ot.py --config configs/mnist/ot.yaml dataset=path/to/mnist max_train_steps=50

Later sources win: defaults, then the YAML file, then the overrides. An unknown key is an error that names the nearest
known one.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import math
import os
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml

from .errors import InputError, require, shown
from .files import expand_home

if TYPE_CHECKING:
    from typing import Self

C = TypeVar("C")

# diffusers' names of what needs no further options.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
PRECISIONS = ("no", "fp16", "bf16")
HELP_COLUMN, NO_BREAK = 36, "\N{NO-BREAK SPACE}"
FLOW = "flow_prediction"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", FLOW)
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
OT_BACKENDS = ("native", "geomloss", "flash-sinkhorn")
NOISE_COUPLINGS = ("independent", "assignment", "semidiscrete")
TRANSPORT_TERMS = ("pixel", "patch", "feature", "sinkhorn")

LARGEST = 10**9
"""Upper bound of every whole number but the random seed: no machine holds more images, training steps or channels."""

GROUPS = (
    "data set",
    "training run",
    "optimiser",
    "network",
    "diffusion",
    "prior",
    "prior=vae",
    "prior=gan",
    "transport",
    "few-step tuning",
    "records and checkpoints",
)
"""Groups of options in the order of `--help`. The metadata of a field hold the name of its group."""
OTHER = "other options"


class Range(NamedTuple):
    """The values that an option may have, besides none where its type allows that; in a list, the values of every item.
    `must` replaces the requirement in error messages where the bounds alone would not explain it."""

    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    must: str = ""

    def holds(self, value: Any) -> bool:
        """Whether a value, or every item of a list, is one of the choices or within the bounds. A NaN never is."""
        if isinstance(value, tuple):
            return all(map(self.holds, value))
        if self.choices:
            return value in self.choices
        enough = self.minimum is None or value >= self.minimum
        return enough and (self.above is None or value > self.above) and (self.below is None or value < self.below)

    def requirement(self, optional: bool) -> str:
        """The requirement for `require`."""
        if self.must:
            return self.must
        if self.choices:
            names = [*map(str, self.choices), *(["none"] if optional else [])]
            return f"be {', '.join(names[:-1])} or {names[-1]}" if len(names) < 4 else f"be one of {', '.join(names)}"
        if self.below is not None:
            return f"lie in {self}" if self.above is None else f"lie strictly between {self.above} and {self.below}"
        above = f"be above {self.above}" if self.above else "be positive"
        return (above if self.minimum is None else f"be at least {self.minimum}") + (" or none" if optional else "")

    def __str__(self) -> str:
        """As `--help` shows it."""
        if self.choices:
            return f"{{{', '.join(map(str, self.choices))}}}"
        if self.below is not None:
            return f"({self.above}, {self.below})" if self.minimum is None else f"[{self.minimum}, {self.below})"
        return f"(> {self.above})" if self.minimum is None else f"(≥ {self.minimum})"


def option(default: Any, help: str, group: str = OTHER, **bounds: Any) -> Any:
    """A dataclass field with its text and its group in `--help`, and the bounds of its `Range`, which are checked."""
    allowed = Range(**bounds) if bounds else None
    return field(default=default, metadata={"help": help, "group": group, "range": allowed})


def option_of(group: str) -> Callable[..., Any]:
    """`option` for the fields of one group."""
    return functools.partial(option, group=group)


(
    data_option,
    run_option,
    optimizer_option,
    network_option,
    diffusion_option,
    prior_option,
    vae_option,
    gan_option,
    transport_option,
    tuning_option,
    record_option,
) = map(option_of, GROUPS)


PREDICTION_HELP = (
    "what the UNet predicts: the noise, the velocity or the clean image of DDIM, or the velocity of flow matching"
)
COUPLING_HELP = (
    "how noise and images are paired: independent: at random; semidiscrete: by optimal transport between noise and "
    "the whole data set; assignment: by optimal transport within coupling_batch_size images"
)
SPACING_HELP = (
    "timesteps of short chains, by its name in diffusers; trailing begins at pure noise, as chains of a few "
    "steps should"
)


@dataclass
class Options:
    """A configuration. In every text, `~` at the beginning of a path is the home folder.

    Raises:
        InputError: a value out of its range.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Remember which options are given."""
        config = super().__new__(cls)
        names = [entry.name for entry in dataclasses.fields(cls)]
        config.__dict__["_given"] = frozenset([*names[: len(arguments)], *options])
        return config

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that were given, whether or not their values are the defaults."""
        return self.__dict__["_given"]

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, str):
                setattr(self, entry.name, expand_home(value))
            elif isinstance(value, tuple):
                setattr(self, entry.name, tuple(expand_home(v) if isinstance(v, str) else v for v in value))
            allowed, optional = entry.metadata.get("range"), "None" in str(entry.type)
            if allowed is not None and not (optional and value is None):
                require(allowed.holds(value), entry.name, allowed.requirement(optional), value)


@dataclass
class TrainingConfig(Options):
    """Options of every training script."""

    output_dir: str = run_option(
        "runs/run", "folder of the run: model, checkpoints, samples, metrics.jsonl and TensorBoard logs"
    )
    dataset: str = data_option(
        "digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or a folder of images"
    )
    dataset_config_name: str | None = data_option(
        None, "configuration of the data set, as in datasets.load_dataset(dataset, dataset_config_name)"
    )
    dataset_revision: str | None = data_option(
        None, "branch, tag or commit of a data set on the Hub; none: its main branch"
    )
    data_dir: str | None = data_option(None, "folder within the data set that holds the images; none: all of it")
    image_column: str | None = data_option(
        None, "column that holds the images; none: image, or the only column of images"
    )
    label_column: str | None = data_option(
        None, "column that holds the class labels; none: label, or the class folders"
    )
    image_size: int | None = data_option(None, "resize and crop images to this many pixels; none: as stored", minimum=1)
    channels: int | None = data_option(None, "convert images to grey (1) or RGB (3); none: as stored", choices=(1, 3))
    random_flip: bool = data_option(False, "mirror half of the training images left to right, chosen at random")
    crop_padding: int = data_option(
        0, "shift training images at random by up to this many pixels, with mirrored borders", minimum=0
    )
    num_workers: int = data_option(
        0, "processes that decode images of a data set that does not fit in memory", minimum=0
    )
    seed: int = run_option(
        0, "random seed for initial weights, data order and noise", minimum=0, must="not be negative"
    )
    train_batch_size: int = run_option(128, "images per process and forward pass", minimum=1)
    gradient_accumulation_steps: int | None = run_option(
        None, "forward passes per training step; none: the launcher's value, or 1", minimum=1
    )
    num_train_epochs: int = run_option(35, "passes over the training data", minimum=1)
    max_train_steps: int | None = run_option(None, "training steps; none: as many as num_train_epochs takes", minimum=1)
    max_train_seconds: float | None = run_option(
        None, "seconds after which training stops with a checkpoint; none: no limit", above=0
    )
    learning_rate: float = optimizer_option(2e-4, "peak learning rate", above=0)
    lr_scheduler: str = optimizer_option(
        "constant", "learning-rate schedule, by its name in diffusers", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = optimizer_option(0, "training steps until the peak learning rate", minimum=0)
    adam_beta1: float = optimizer_option(0.9, "β1 of Adam: decay of the mean of gradients", minimum=0, below=1)
    adam_beta2: float = optimizer_option(
        0.999, "β2 of Adam: decay of the mean of squared gradients", minimum=0, below=1
    )
    adam_weight_decay: float = optimizer_option(0.0, "decoupled weight decay; 0: plain Adam", minimum=0)
    max_grad_norm: float = optimizer_option(1.0, "clip the gradient to this norm", above=0)
    max_skipped_updates: int = optimizer_option(
        0, "skip at most this many training steps with non-finite gradients; 0: stop at the first", minimum=0
    )
    mixed_precision: str | None = run_option(
        None,
        "precision of forward and backward passes; none: the launcher's, or no",
        choices=PRECISIONS,
        must="be no, fp16 or bf16",
    )
    report_to: str = record_option(
        "auto",
        "experiment tracker, by its name in accelerate; auto: tensorboard if it is installed; none: no tracker",
    )
    tracker_project_name: str = record_option("ot_diffusers", "project of the tracker, for TensorBoard logs/PROJECT")
    run_name: str | None = record_option(
        None, "name of the run in the tracker, for TensorBoard logs/PROJECT/NAME; none: the tracker's choice"
    )
    logging_steps: int = record_option(20, "training steps between two records of the losses", minimum=1)
    checkpointing_steps: int | None = record_option(
        None, "training steps between two checkpoints; none: one epoch", minimum=1
    )
    checkpoints_total_limit: int = record_option(2, "number of checkpoints that are kept", minimum=1)
    resume_from_checkpoint: str | None = run_option(
        "latest", "latest, the folder of a checkpoint, or none: refuse a folder that is in use"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tracker_project_name", "run_name"):
            value = getattr(self, name)
            fits = value is None or (value not in (".", "..") and not set(value) & set("/\\"))
            require(fits, name, "be a name, not a path", value)

    @property
    def compares_distributions(self) -> bool:
        """Whether a loss depends on all images of a forward pass together, and not on each by itself."""
        return False


@dataclass
class FeaturesConfig(TrainingConfig):
    """train/train_features.py"""

    output_dir: str = run_option("runs/features", "folder of the run: the network and its reference set")
    architecture: str = network_option(
        "conv",
        "conv: two convolutions, as in the original study; residual: stronger, for evaluation",
        choices=("conv", "residual"),
    )
    block_out_channels: tuple[int, ...] = network_option((32, 64), "channels of each stage; conv has two stages")
    layers_per_block: int = network_option(1, "residual: blocks in each stage", minimum=1)
    norm_type: str = network_option(
        "group_norm",
        "residual: normalisation; batch_norm takes its statistics from the batch of one process",
        choices=("group_norm", "batch_norm"),
    )
    feature_dim: int = network_option(128, "number of features: width of the penultimate layer", minimum=1)
    optimizer: str = optimizer_option(
        "adamw", "AdamW, or SGD with Nesterov momentum; both leave biases and norms undecayed", choices=("adamw", "sgd")
    )
    sgd_momentum: float = optimizer_option(0.9, "sgd: Nesterov momentum", above=0, below=1)
    sgd_weight_decay: float = optimizer_option(5e-4, "sgd: weight decay, added to the gradient", minimum=0)
    label_smoothing: float = optimizer_option(
        0.0, "fraction of each label that is spread over all classes", minimum=0, below=1
    )
    num_train_epochs: int = run_option(10, "passes over the training data", minimum=1)
    learning_rate: float = optimizer_option(1e-3, "peak learning rate", above=0)
    lr_scheduler: str = optimizer_option(
        "cosine", "learning-rate schedule, by its name in diffusers", choices=LR_SCHEDULERS
    )
    num_reference_samples: int = network_option(2000, "number of training images in the reference set", minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.block_out_channels
        fits = self.architecture != "conv" or len(widths) == 2
        require(fits, "block_out_channels", "hold two widths for conv", widths)
        unit = 8 if self.architecture == "residual" else 1  # groups of the residual network's normalisation
        require(_multiples(widths, unit), "block_out_channels", f"be multiples of {unit}", widths)


@dataclass
class DiffusionConfig(TrainingConfig):
    """Options of the scripts that train a denoiser."""

    num_train_timesteps: int = diffusion_option(1000, "T: number of timesteps of the noising chain", minimum=1)
    prediction_type: str = diffusion_option("epsilon", PREDICTION_HELP, choices=PREDICTION_TYPES)
    timestep_sampler: str = diffusion_option(
        "uniform",
        "distribution of timesteps in training; quadratic (t = T·u²) and log_uniform (t = T^u) favour low noise, "
        "logit_normal (t = T·sigmoid(z), z normal) the middle",
        choices=("uniform", "quadratic", "log_uniform", "logit_normal"),
    )
    max_timestep: int | None = diffusion_option(
        None, "train on t < max_timestep only, for truncated chains; none: on all", minimum=1
    )
    noise_coupling: str = diffusion_option("independent", COUPLING_HELP, choices=NOISE_COUPLINGS)
    coupling_batch_size: int = diffusion_option(
        512,
        "assignment: number of images that are paired at a time; those of several training steps where they have fewer",
        minimum=1,
    )
    coupling: str | None = diffusion_option(
        None, "semidiscrete: folder of a saved coupling of these images, or of a run with one; none solves for one"
    )
    coupling_tolerance: float = diffusion_option(
        0.02, "semidiscrete: χ² of the images' probabilities at which the solver stops; 0 is uniform", above=0
    )
    coupling_max_seconds: float | None = diffusion_option(
        None, "semidiscrete: time limit of the solver in seconds; none: until the tolerance is reached", above=0
    )
    class_conditional: bool = diffusion_option(
        False, "let the denoiser know the class of each image, so that samples of a chosen class can be drawn"
    )
    class_dropout: float = diffusion_option(
        0.1,
        "class_conditional: fraction of a batch without its label, for guidance by class; 0: none",
        minimum=0,
        below=1,
    )
    couple_across_classes: bool = diffusion_option(
        False,
        "class_conditional: pair noise with images whatever their class, for comparison; the noise then tells the "
        "class, and samples are often of another one; false: pair them within each class",
    )
    ema_decay: float = optimizer_option(
        0.999, "decay of the averaged weights; it begins lower and rises to this", minimum=0, below=1
    )
    num_validation_samples: int = record_option(1000, "number of validation images per epoch", minimum=1)
    num_inference_steps: int = record_option(50, "denoising steps of the sample grids", minimum=1)
    sample_epochs: int = record_option(5, "epochs between two sample grids", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.num_train_timesteps
        for name in ("num_inference_steps", "max_timestep"):
            value = getattr(self, name)
            require(value is None or value <= length, name, f"lie in 1 … {length}", value)
        whole = self.prediction_type != FLOW or self.max_timestep is None
        require(whole, "max_timestep", f"be none for prediction_type={FLOW}", self.max_timestep)
        coupled = self.noise_coupling == "semidiscrete"
        unused = not coupled and self.coupling is not None
        require(not unused, "coupling", "be none without noise_coupling=semidiscrete", self.coupling)
        apart = (self.class_conditional and self.noise_coupling != "independent") or not self.couple_across_classes
        requirement = "be false without class_conditional=true and a noise coupling"
        require(apart, "couple_across_classes", requirement, self.couple_across_classes)
        moved = coupled and self.crop_padding > 0
        require(not moved, "crop_padding", "be 0 with noise_coupling=semidiscrete", self.crop_padding)
        cut = self.noise_coupling != "independent" and self.max_timestep is not None
        require(
            not cut,
            "max_timestep",
            "be none with a noise coupling: a truncated chain begins with fresh noise, which the coupling excludes",
            self.max_timestep,
        )


@dataclass
class BaselineConfig(DiffusionConfig):
    """train/train_baseline.py"""

    output_dir: str = run_option(
        "runs/baseline", "folder of the run: a diffusers pipeline, checkpoints, samples and records"
    )
    pretrained: str | None = network_option(
        None,
        "folder or Hub id of a pipeline to start from, with its network, prediction, noise schedule, classes and size "
        "of images, which need not be given then; none: new weights",
    )
    block_out_channels: tuple[int, ...] = network_option(
        (64, 128, 256), "channels of the UNet at each resolution, the finest first"
    )
    layers_per_block: int = network_option(2, "residual blocks of the UNet at each resolution", minimum=1)
    attention_levels: tuple[int, ...] = network_option((2,), "resolutions with self-attention; 0 is the finest")
    norm_num_groups: int = network_option(32, "groups of the UNet's group normalisation", minimum=1)
    dropout: float = network_option(0.0, "dropout of the UNet", minimum=0, below=1)
    beta_schedule: str = diffusion_option("linear", "noise schedule, by its name in diffusers", choices=BETA_SCHEDULES)
    timestep_spacing: str = diffusion_option("leading", SPACING_HELP, choices=TIMESTEP_SPACINGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths, groups = self.block_out_channels, self.norm_num_groups
        fits = _multiples(widths, groups)
        require(fits, "block_out_channels", f"be multiples of norm_num_groups ({groups})", widths)


@dataclass
class OTConfig(BaselineConfig):
    """train/train_ot.py"""

    output_dir: str = run_option(
        "runs/ot", "folder of the run: an OT-guided pipeline, checkpoints, samples and records"
    )
    feature_extractor: str = transport_option(
        "runs/features", "folder or Hub id of a feature network that was trained on the same data"
    )
    prediction_type: str = diffusion_option(FLOW, PREDICTION_HELP, choices=PREDICTION_TYPES)
    timestep_spacing: str = diffusion_option("trailing", SPACING_HELP, choices=TIMESTEP_SPACINGS)
    noise_coupling: str = diffusion_option("semidiscrete", COUPLING_HELP, choices=NOISE_COUPLINGS)
    ot_weight: float = transport_option(
        0.0, "λ: weight of the transport term between features of x̂0 and of real images; 0: no such term", minimum=0
    )
    num_reference_samples: int = transport_option(
        2000,
        "number of real images that a batch is compared with; none of them is in the batch",
        minimum=2,
        must="be at least 2 (a distribution, not a point)",
    )
    blur: float = transport_option(
        0.3, "blur of the Sinkhorn divergence: a distance between features", above=0, must="be a positive length"
    )
    scaling: float = transport_option(0.7, "ratio of successive blurs in the solver", above=0, below=1)
    normalize_features: bool = transport_option(
        True, "divide features by their median distance; false: raw, as in the original study"
    )
    squash: str = transport_option(
        "clamp",
        "how x̂0 is brought into [-1, 1]; tanh: as in the original study, also for the references",
        choices=("clamp", "tanh"),
    )
    snr_weighting: bool = transport_option(True, "weight images by their clipped signal-to-noise ratio, min(SNR, 5)/5")
    ot_backend: str = transport_option(
        "native",
        "Sinkhorn solver; geomloss: as in the original study; flash-sinkhorn: for CUDA, installed separately",
        choices=OT_BACKENDS,
        must=f"be one of {', '.join(OT_BACKENDS)}",
    )
    ot_iterations: int | None = transport_option(
        None,
        "native: fixed number of Sinkhorn iterations; 20 suffice at the default blur; none: run to convergence",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.ot_iterations is None or self.ot_backend == "native"
        require(fits, "ot_iterations", f"be none with ot_backend={self.ot_backend}", self.ot_iterations)

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss has a transport term."""
        return self.ot_weight > 0


@dataclass
class PriorConfig(TrainingConfig):
    """train/train_prior.py"""

    output_dir: str = run_option(
        "runs/prior", "folder of the run: a truncated pipeline, checkpoints, samples and records"
    )
    denoiser: str = prior_option(
        "runs/baseline", "folder or Hub id of a trained pipeline, whose UNet runs the last steps"
    )
    prior: str = prior_option(
        "ot",
        "kind of prior: gaussian is a closed form and few_step a network that is tuned already, the others are trained",
        choices=("gaussian", "few_step", "vae", "gan", "ot"),
    )
    pretrained: str | None = prior_option(
        None, "few_step: folder or Hub id of the tuned pipeline whose finished images start the chain"
    )
    prediction_type: str = prior_option(
        "sample",
        "sample: the generator makes clean images, which are then diffused to T'; noisy_sample: it makes x_T' at once",
        choices=("sample", "noisy_sample"),
    )
    truncation_timestep: int = prior_option(10, "T': number of steps of the truncated chain", minimum=1)
    latent_dim: int = network_option(1024, "width of the generator's latents", minimum=1)
    block_out_channels: tuple[int, ...] = network_option(
        (512, 256, 128, 64), "channels of the generator at each resolution, the coarsest first"
    )
    num_train_epochs: int = run_option(32, "passes over the training data", minimum=1)
    adam_beta1: float = optimizer_option(0.5, "β1 of Adam: decay of the mean of gradients", minimum=0, below=1)
    ema_decay: float = optimizer_option(
        0.999, "decay of the averaged weights; it begins lower and rises to this", minimum=0, below=1
    )
    num_inference_steps: int | None = record_option(None, "denoising steps of the sample grids; none: T'", minimum=1)
    sample_epochs: int = record_option(5, "epochs between two sample grids", minimum=1)
    class_conditional: bool = prior_option(
        False,
        "let the prior know the class of each image, so that samples of a chosen class can be drawn; gaussian: one "
        "Gaussian for each class",
    )
    beta: float = vae_option(1.0, "weight of the Kullback–Leibler divergence", minimum=0)
    latent_components: int = vae_option(
        10,
        "Gaussians in the mixture that is fitted to the latents of the data, divided between the classes of "
        "class_conditional; 0: N(0, I)",
        minimum=0,
    )
    discriminator_learning_rate: float | None = gan_option(
        None, "peak learning rate of the discriminator; none: learning_rate", above=0
    )
    spectral_norm: bool = gan_option(True, "bound the spectral norm of each layer of the discriminator")
    r1_weight: float = gan_option(1.0, "weight of the R1 penalty; 0: no penalty", minimum=0)
    r1_interval: int = gan_option(4, "training steps between two R1 penalties; each counts that many times", minimum=1)
    ot_objective: str = transport_option("sinkhorn", f"terms of the loss, joined by +: {', '.join(TRANSPORT_TERMS)}")
    ot_weights: tuple[float, ...] = transport_option(
        (), "weights of the terms of ot_objective, in their order; empty: 1 each"
    )
    ot_warmup_steps: int = transport_option(
        0, "first training steps, which learn the closed-form transport map to the Gaussian of the data", minimum=0
    )
    feature_extractor: str | None = transport_option(
        None, "run of train_features.py whose features are compared; none: the denoiser's features"
    )
    num_reference_samples: int | None = transport_option(
        None, "images on each side of the sinkhorn term; none: the batch", minimum=2
    )
    num_projections: int = transport_option(256, "random directions of each sliced term", minimum=1)
    patch_sizes: tuple[int, ...] = transport_option((3, 7), "widths of the compared patches in pixels", minimum=1)
    patch_stride: int | None = transport_option(
        None, "pixels between two compared patches, from a random offset; none: half a patch", minimum=1
    )
    blur: float = transport_option(
        0.3, "blur of the Sinkhorn divergence; features have median distance 1", above=0, must="be a positive length"
    )
    scaling: float = transport_option(0.5, "ratio of successive blurs in the solver", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        closed_form, tuned = self.prior == "gaussian", self.prior == "few_step"
        named = tuned == (self.pretrained is not None)
        require(named, "pretrained", "be the tuned pipeline for prior=few_step, and none for others", self.pretrained)
        fits = not (closed_form or tuned) or self.prediction_type == "sample"
        clean = f"be sample for prior={self.prior}, which makes clean images"
        require(fits, "prediction_type", clean, self.prediction_type)
        warm = self.ot_warmup_steps
        require(
            self.prediction_type == "sample" or not warm,
            "ot_warmup_steps",
            "be 0 for prediction_type=noisy_sample",
            warm,
        )
        terms = self.ot_objective.split("+")
        valid = set(terms) <= set(TRANSPORT_TERMS) and len(set(terms)) == len(terms)
        require(valid, "ot_objective", f"join some of {', '.join(TRANSPORT_TERMS)} by +", self.ot_objective)
        matched = len(self.ot_weights) in (0, len(terms)) and all(weight > 0 for weight in self.ot_weights)
        require(matched, "ot_weights", f"be none or a positive number for each of {', '.join(terms)}", self.ot_weights)

    @property
    def compares_distributions(self) -> bool:
        """Whether the prior's training matches distributions, of images or of codes."""
        return self.prior in ("vae", "ot")


@dataclass
class FewStepConfig(TrainingConfig):
    """train/train_few_step.py"""

    output_dir: str = run_option("runs/few_step", "folder of the run: a pipeline, checkpoints, samples and records")
    pretrained: str = tuning_option("runs/ot", "folder or Hub id of the pipeline whose denoiser is tuned")
    num_inference_steps: int = tuning_option(
        1, "calls of the denoiser for an image, which is compared when it is finished", minimum=1
    )
    feature_extractor: str | None = tuning_option(
        None,
        "run of train_features.py, or a saved backbone, whose levels compare images; none: the denoiser's levels",
    )
    shallow_weight: float = tuning_option(
        0.2, "weight of each level of features but the deepest, which has weight 1", minimum=0
    )
    pixel_weight: float = tuning_option(0.2, "weight of the pixels beside the deepest level of features", minimum=0)
    objective: str = tuning_option(
        "sinkhorn",
        "distance between finished and real images; mmd: a kernel discrepancy; frechet: between Gaussian fits; "
        "drifting: to where a field of attraction and repulsion leads",
        choices=("sinkhorn", "mmd", "frechet", "drifting"),
    )
    blur: float = tuning_option(
        0.1, "blur of the Sinkhorn divergence; levels have median distance 1", above=0, must="be a positive length"
    )
    scaling: float = tuning_option(0.5, "ratio of successive blurs in the solver", above=0, below=1)
    num_reference_samples: int | None = tuning_option(
        None, "real images of each training step, new ones every time; none: as many as are generated", minimum=2
    )
    anchor_weight: float = tuning_option(
        0.0, "weight of the squared distance to the images of the network before tuning", minimum=0
    )
    train_batch_size: int = run_option(
        256,
        "images per process and forward pass; gradient_accumulation_steps passes are compared together",
        minimum=1,
    )
    max_train_steps: int | None = run_option(300, "training steps; none: as many as num_train_epochs takes", minimum=1)
    learning_rate: float = optimizer_option(3e-4, "peak learning rate", above=0)
    lr_scheduler: str = optimizer_option(
        "cosine", "learning-rate schedule, by its name in diffusers", choices=LR_SCHEDULERS
    )
    ema_decay: float = optimizer_option(
        0.98, "decay of the averaged weights; it begins lower and rises to this", minimum=0, below=1
    )
    validation_steps: int = record_option(
        50, "training steps between two checks of the samples against validation images", minimum=1
    )
    num_validation_samples: int = record_option(500, "generated images of each check", minimum=16)


def load_config(config_class: type[C], arguments: Sequence[str]) -> C:
    """The configuration that command-line arguments describe: `--config FILE` and `key=value` in any order.

    Raises:
        InputError: unknown key, value of the wrong type or range, missing or malformed file.

    Example:
        >>> load_config(OTConfig, ["ot_weight=1e-3", "dataset=mnist"]).ot_weight
        0.001
        >>> load_config(OTConfig, ["ot_wieght=1"])
        Traceback (most recent call last):
        ...
        ot_diffusers.errors.InputError: unknown configuration key 'ot_wieght'; did you mean 'ot_weight'?
    """
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--config":
            require(bool(remaining), "--config", "be followed by a YAML file", None)
            values.update(_read_yaml(remaining.pop(0)))
        elif argument.startswith("--config="):
            values.update(_read_yaml(argument.removeprefix("--config=")))
        else:
            key, equals, value = argument.removeprefix("--").partition("=")
            if not equals:
                raise InputError(_not_an_override(config_class, key, argument, remaining))
            overrides[key] = _read_value(value, typing.get_type_hints(config_class).get(key))
    return make_config(config_class, values | overrides)


def _not_an_override(config_class: Any, key: str, argument: str, following: Sequence[str]) -> str:
    """What to write in place of `--key value` and `--key`."""
    name = key.replace("-", "_")
    line = f"arguments are `--config FILE` and `key=value`, got {shown(argument)}"
    if argument == key or name not in typing.get_type_hints(config_class):
        return line
    value = following[0] if following and not following[0].startswith("--") else "…"
    return f"{line}; write {name}={value}"


def make_config(config_class: type[C], values: dict[str, Any]) -> C:
    """A configuration from plain values, each coerced to the type of its field."""
    field_types = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(names)}"
            raise InputError(f"unknown configuration key {key!r}; {hint}")
    return config_class(**{key: _coerce(key, value, field_types[key]) for key, value in values.items()})


def options_by_group(config_class: type) -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields of a configuration by group, groups in the order of `GROUPS` and others after them.

    Example:
        >>> [entry.name for entry in options_by_group(OTConfig)["diffusion"]][:2]
        ['num_train_timesteps', 'prediction_type']
    """
    entries = dataclasses.fields(config_class)
    present = dict.fromkeys(entry.metadata.get("group", OTHER) for entry in entries)
    order = sorted(present, key=lambda group: GROUPS.index(group) if group in GROUPS else len(GROUPS))
    return {group: [entry for entry in entries if entry.metadata.get("group", OTHER) == group] for group in order}


def describe(config_class: type) -> str:
    """The options of a configuration by group, with their defaults and ranges, as `--help` lists them."""
    return "\n\n".join(
        "\n".join([f"{group}:", *map(_described, entries)]) for group, entries in options_by_group(config_class).items()
    )


def _described(entry: dataclasses.Field[Any]) -> str:
    """The lines of one option. As in argparse, the text begins on a line of its own where the name is too long."""
    text, allowed = entry.metadata["help"], entry.metadata.get("range")
    if allowed is not None:
        text += f" {allowed}" if allowed.choices else " " + f"{allowed}".replace(" ", NO_BREAK)
    start, indent = f"  {entry.name}={_show(entry)}", " " * HELP_COLUMN
    wrapper = textwrap.TextWrapper(80, indent, indent, break_long_words=False, break_on_hyphens=False)
    lines = wrapper.fill(text).replace(NO_BREAK, " ")
    return f"{start}\n{lines}" if len(start) > HELP_COLUMN - 2 else start.ljust(HELP_COLUMN) + lines[HELP_COLUMN:]


def _read_yaml(path: str) -> dict[str, Any]:
    file = expand_home(path)
    require(os.path.isfile(file), "--config", "be an existing YAML file", path)
    try:
        values = _Loader(Path(file).read_text(encoding="utf-8")).get_single_data() or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise InputError(f"`--config` must be valid YAML, got {path!r}: {' '.join(str(error).split())}") from error
    require(isinstance(values, dict), "--config", "hold `key: value` lines", path)
    return values


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no key may be given twice: which of the two is meant, nobody can know."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen |= {name} if name is not None else set()
        return super().construct_mapping(node, deep)


def _read_value(text: str, kind: Any) -> Any:
    """The value of `key=text`: as it stands for an option that is text, otherwise as YAML would read it. Nothing is an
    empty list, or none."""
    if text == "":
        return () if typing.get_origin(kind) is tuple else None
    if typing.get_origin(kind) is not dict and str in (typing.get_args(kind) or (kind,)):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # no number, truth value or list: refused with the type it should have


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`. YAML reads 1e-4 as text and 1 as an int, so numbers are converted rather than compared."""
    if kind is Any:
        return value
    arms = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in arms):
        require(type(None) in arms, key, f"be {_name(arms)}", value)
        return None
    target = next(arm for arm in arms if arm is not type(None))
    try:
        if target is bool:
            require(isinstance(value, bool), key, "be true or false", value)
            return value
        if target is int:
            whole = not isinstance(value, bool) and (not isinstance(value, float) or value.is_integer())
            require(whole, key, "be a whole number", value)
            number = int(value)
            require(key == "seed" or abs(number) <= LARGEST, key, f"be a whole number up to {LARGEST:,}", value)
            return number
        if target is float:
            require(not isinstance(value, bool), key, "be a number", value)
            real = float(value)
            require(math.isfinite(real), key, "be finite", value)
            return real
        if typing.get_origin(target) is dict:
            require(isinstance(value, dict), key, "hold `name: value` lines", value)
            kind = typing.get_args(target)[1]
            return {str(name): _coerce(f"{key}.{name}", item, kind) for name, item in value.items()}
        if isinstance(target, type) and dataclasses.is_dataclass(target):
            require(isinstance(value, dict), key, "hold `name: value` lines", value)
            return make_config(target, value)
        if typing.get_origin(target) is tuple:
            items = (
                value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
            )
            return tuple(_coerce(key, item, typing.get_args(target)[0]) for item in items)
        # YAML 1.1 reads a bare `no` as False, and dates and numbers as such.
        plain = isinstance(value, (str, int, float, datetime.date)) and value is not True
        require(plain, key, f"be {_name(arms)}, in quotes where YAML reads something else", value)
        return "no" if value is False else str(value)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`{key}` must be {_name(arms)}, got {shown(value)}") from error


def _name(arms: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    return " or ".join(names.get(arm, "a list of whole numbers") for arm in arms)


def _multiples(widths: Sequence[int], unit: int) -> bool:
    return len(widths) > 0 and all(width >= 1 and width % unit == 0 for width in widths)


def _show(entry: dataclasses.Field[Any]) -> str:
    """The default of an option as a user would write it."""
    return written(entry.default if entry.default_factory is dataclasses.MISSING else ())


def written(value: Any) -> str:
    """The value of an option as a user would write it.

    Example:
        >>> written((32, 64)), written(True), written(None)
        ('32,64', 'true', 'none')
    """
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
