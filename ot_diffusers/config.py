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
import math
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import InputError, TrainingError, require, shown, surroundings
from .files import expand_home
from .signals import end_with_launcher, stop_on_signals

C = TypeVar("C")

# diffusers' names of what needs no further options.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
PRECISIONS = ("no", "fp16", "bf16")
SILENCE_SECONDS = 10.0
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


LARGEST = 10**9
"""Of a whole number: more images, updates or channels no machine holds. A random seed may be any."""


def option(default: Any, help: str) -> Any:
    """A dataclass field with its line of `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """A configuration. In every text, `~` at the beginning of a path is the home folder."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, str):
                setattr(self, entry.name, expand_home(value))
            elif isinstance(value, tuple):
                setattr(self, entry.name, tuple(expand_home(v) if isinstance(v, str) else v for v in value))


@dataclass
class TrainingConfig(Options):
    """What every training script takes."""

    output_dir: str = option(
        "runs/run", "folder of the run: model, checkpoints, samples, metrics.jsonl, TensorBoard logs"
    )
    dataset: str = option("digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder")
    image_column: str | None = option(None, "column of the images; None is image, or the only one there is")
    label_column: str | None = option(
        None, "column of the class labels; None is label, or the class folders of pictures"
    )
    image_size: int | None = option(None, "resize and crop to this many pixels; None keeps the data's size")
    channels: int | None = option(None, "1 (grey) or 3 (RGB); None keeps the data's own")
    num_workers: int = option(0, "decoding processes for data too large to be held decoded")
    seed: int = option(0, "of the initial weights, the data order and the noise")
    train_batch_size: int = option(128, "images per process and forward pass")
    gradient_accumulation_steps: int | None = option(None, "forward passes per update; none is the launcher's, or 1")
    num_train_epochs: int = option(35, "passes over the training data")
    max_train_steps: int | None = option(None, "updates; overrides num_train_epochs")
    max_train_seconds: float | None = option(None, "stop cleanly, with a checkpoint, after this long")
    learning_rate: float = option(2e-4, "peak learning rate")
    lr_scheduler: str = option("constant", "diffusers' names: constant, cosine, constant_with_warmup, …")
    lr_warmup_steps: int = option(0, "updates until the peak learning rate")
    adam_beta1: float = option(0.9, "Adam's β1")
    adam_beta2: float = option(0.999, "Adam's β2")
    adam_weight_decay: float = option(0.0, "decoupled weight decay; 0 is plain Adam")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this")
    max_skipped_updates: int = option(0, "leave out so many updates at most whose gradient is not finite; 0 stops")
    mixed_precision: str | None = option(None, "no, fp16 or bf16; none is the launcher's, or no")
    report_to: str = option(
        "auto", "tracker by accelerate's name: tensorboard, wandb, …; auto: tensorboard where it is installed; or none"
    )
    logging_steps: int = option(20, "updates between records")
    checkpointing_steps: int | None = option(None, "updates between checkpoints; None is once an epoch")
    checkpoints_total_limit: int = option(2, "keep this many checkpoints")
    resume_from_checkpoint: str | None = option(
        "latest", "latest, the folder of a checkpoint, or none to refuse a used folder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "train_batch_size",
            "num_train_epochs",
            "logging_steps",
            "checkpoints_total_limit",
        ):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("seed", "num_workers", "lr_warmup_steps", "adam_weight_decay", "max_skipped_updates"):
            require(getattr(self, name) >= 0, name, "not be negative", getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "lie in [0, 1)", getattr(self, name))
        known = self.lr_scheduler in LR_SCHEDULERS
        require(known, "lr_scheduler", f"be one of {', '.join(LR_SCHEDULERS)}", self.lr_scheduler)
        for name in ("gradient_accumulation_steps", "max_train_steps", "checkpointing_steps", "image_size"):
            require(
                getattr(self, name) is None or getattr(self, name) >= 1,
                name,
                "be at least 1 or none",
                getattr(self, name),
            )
        require(
            self.max_train_seconds is None or self.max_train_seconds > 0,
            "max_train_seconds",
            "be positive or none",
            self.max_train_seconds,
        )
        require(self.learning_rate > 0, "learning_rate", "be positive", self.learning_rate)
        require(self.max_grad_norm > 0, "max_grad_norm", "be positive", self.max_grad_norm)
        known = self.mixed_precision in (None, *PRECISIONS)
        require(known, "mixed_precision", "be no, fp16 or bf16", self.mixed_precision)
        require(self.channels in (None, 1, 3), "channels", "be 1, 3 or none", self.channels)

    @property
    def compares_distributions(self) -> bool:
        """Whether a loss depends on all images of a forward pass together, and not on each by itself."""
        return False


@dataclass
class FeaturesConfig(TrainingConfig):
    """train/train_features.py"""

    output_dir: str = option("runs/features", "folder of the run: the network and its reference bank")
    architecture: str = option("conv", "conv (the source's network) or residual (the independent evaluator)")
    block_out_channels: tuple[int, ...] = option((32, 64), "channels of each stage")
    layers_per_block: int = option(1, "residual: blocks of each stage")
    norm_type: str = option("group_norm", "residual: group_norm, or batch_norm (over a process' batch)")
    feature_dim: int = option(128, "width of the penultimate layer")
    optimizer: str = option("adamw", "adamw, or sgd with Nesterov momentum; neither decays biases and norms")
    sgd_momentum: float = option(0.9, "sgd: Nesterov's momentum")
    sgd_weight_decay: float = option(5e-4, "sgd: weight decay, as a gradient")
    label_smoothing: float = option(0.0, "share of each label spread over all classes")
    num_train_epochs: int = option(10, "passes over the training data")
    learning_rate: float = option(1e-3, "peak learning rate")
    lr_scheduler: str = option("cosine", "diffusers' names; with lr_warmup_steps, cosine and linear are one cycle")
    num_reference_samples: int = option(2000, "rows of the reference bank, from the training split")
    random_flip: bool = option(False, "flip half of the images left to right")
    crop_padding: int = option(0, "move images by up to this many pixels, borders mirrored")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("architecture", ("conv", "residual")),
            ("norm_type", ("group_norm", "batch_norm")),
            ("optimizer", ("adamw", "sgd")),
        ):
            require(getattr(self, name) in choices, name, f"be {' or '.join(choices)}", getattr(self, name))
        require(0 < self.sgd_momentum < 1, "sgd_momentum", "lie strictly between 0 and 1", self.sgd_momentum)
        require(self.sgd_weight_decay >= 0, "sgd_weight_decay", "not be negative", self.sgd_weight_decay)
        require(0 <= self.label_smoothing < 1, "label_smoothing", "lie in [0, 1)", self.label_smoothing)
        require(
            self.architecture != "conv" or len(self.block_out_channels) == 2,
            "block_out_channels",
            "hold two widths for conv",
            self.block_out_channels,
        )
        require(self.num_reference_samples >= 2, "num_reference_samples", "be at least 2", self.num_reference_samples)
        for name in ("feature_dim", "layers_per_block"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        require(self.crop_padding >= 0, "crop_padding", "not be negative", self.crop_padding)
        unit = 8 if self.architecture == "residual" else 1  # groups of the residual network's normalisation
        fits = all(width >= 1 and width % unit == 0 for width in self.block_out_channels)
        require(
            fits and len(self.block_out_channels) > 0,
            "block_out_channels",
            f"be multiples of {unit}",
            self.block_out_channels,
        )


@dataclass
class DiffusionConfig(TrainingConfig):
    """What every script takes that trains a denoiser."""

    num_train_timesteps: int = option(1000, "T, length of the noising chain")
    timestep_sampler: str = option("uniform", "uniform, or quadratic (t = T·u², more of the late, clean steps)")
    max_timestep: int | None = option(None, "train on t < max_timestep only (for truncated chains)")
    noise_coupling: str = option(
        "none", "none, or assignment: assign a batch's noise to its images by optimal transport"
    )
    ema_decay: float = option(0.999, "upper bound of the averaging of weights; it starts lower on short runs")
    num_validation_samples: int = option(1000, "validation images per epoch")
    num_inference_steps: int = option(50, "DDIM steps of the sample grids")
    sample_epochs: int = option(5, "epochs between sample grids")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.timestep_sampler in ("uniform", "quadratic"),
            "timestep_sampler",
            "be uniform or quadratic",
            self.timestep_sampler,
        )
        couplings = ("none", "assignment")
        known = self.noise_coupling in couplings
        require(known, "noise_coupling", f"be one of {', '.join(couplings)}", self.noise_coupling)
        for name in ("num_train_timesteps", "num_validation_samples", "sample_epochs"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        in_chain = 1 <= self.num_inference_steps <= self.num_train_timesteps
        require(in_chain, "num_inference_steps", f"lie in 1 … {self.num_train_timesteps}", self.num_inference_steps)
        in_chain = self.max_timestep is None or 1 <= self.max_timestep <= self.num_train_timesteps
        require(in_chain, "max_timestep", f"lie in 1 … {self.num_train_timesteps}", self.max_timestep)
        require(0 <= self.ema_decay < 1, "ema_decay", "lie in [0, 1)", self.ema_decay)

    @property
    def compares_distributions(self) -> bool:
        """Whether noise is assigned within the batch."""
        return self.noise_coupling == "assignment"


@dataclass
class BaselineConfig(DiffusionConfig):
    """train/train_baseline.py"""

    output_dir: str = option("runs/baseline", "folder of the run: a diffusers pipeline and all that belongs to it")
    block_out_channels: tuple[int, ...] = option((64, 128, 256), "UNet channels of each resolution")
    layers_per_block: int = option(2, "UNet residual blocks per resolution")
    attention_levels: tuple[int, ...] = option((2,), "resolutions with self-attention, counted from 0, the finest")
    norm_num_groups: int = option(32, "groups of the UNet's group normalisation")
    dropout: float = option(0.0, "UNet dropout")
    beta_schedule: str = option("linear", "diffusers' names: linear, squaredcos_cap_v2, …")
    prediction_type: str = option("epsilon", "epsilon, v_prediction or sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.prediction_type in ("epsilon", "v_prediction", "sample"),
            "prediction_type",
            "be epsilon, v_prediction or sample",
            self.prediction_type,
        )
        for name in ("layers_per_block", "norm_num_groups"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        known = self.beta_schedule in BETA_SCHEDULES
        require(known, "beta_schedule", f"be one of {', '.join(BETA_SCHEDULES)}", self.beta_schedule)
        require(0 <= self.dropout < 1, "dropout", "lie in [0, 1)", self.dropout)
        fits = all(width >= 1 and width % self.norm_num_groups == 0 for width in self.block_out_channels)
        require(
            fits and len(self.block_out_channels) > 0,
            "block_out_channels",
            f"be multiples of norm_num_groups ({self.norm_num_groups})",
            self.block_out_channels,
        )


OT_BACKENDS = ("native", "geomloss", "flash-sinkhorn")


@dataclass
class OTConfig(BaselineConfig):
    """train/train_ot.py"""

    output_dir: str = option("runs/ot", "folder of the run: an OT-guided pipeline and all that belongs to it")
    feature_extractor: str = option("runs/features", "folder or Hub id of a feature network trained on the same data")
    ot_weight: float = option(0.03, "λ, weight of the transport term; 0 trains the baseline")
    num_reference_samples: int = option(2000, "real images the batch is compared with, none of them in the batch")
    blur: float = option(0.3, "blur of the Sinkhorn divergence, a length in feature space")
    scaling: float = option(0.7, "ratio of successive blurs in the solver")
    normalize_features: bool = option(True, "divide features by their median distance; the source takes them raw")
    squash: str = option(
        "clamp", "how x̂0 is brought into [-1, 1]: clamp, or tanh as in the source (then also for the references)"
    )
    snr_weighting: bool = option(
        True, "weight each image by min(SNR, 5)/5: x̂0 of a very noisy image is no sample of the data"
    )
    ot_backend: str = option("native", "native, geomloss as in the source, or flash-sinkhorn (CUDA, installed apart)")
    ot_iterations: int | None = option(
        None, "steps of the native solver, set in advance so that a GPU never waits: 20 do at this blur; none converges"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ot_weight >= 0, "ot_weight", "be at least 0", self.ot_weight)
        require(self.blur > 0, "blur", "be a positive length", self.blur)
        require(0 < self.scaling < 1, "scaling", "lie strictly between 0 and 1", self.scaling)
        require(
            self.num_reference_samples >= 2,
            "num_reference_samples",
            "be at least 2 (a distribution, not a point)",
            self.num_reference_samples,
        )
        require(self.squash in ("clamp", "tanh"), "squash", "be clamp or tanh", self.squash)
        require(self.ot_backend in OT_BACKENDS, "ot_backend", f"be one of {', '.join(OT_BACKENDS)}", self.ot_backend)
        iterations = self.ot_iterations
        require(iterations is None or iterations >= 1, "ot_iterations", "be at least 1 or none", iterations)
        fits = iterations is None or self.ot_backend == "native"
        require(fits, "ot_iterations", f"be none with ot_backend={self.ot_backend}", iterations)

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss has a transport term, or noise is assigned within the batch."""
        return self.ot_weight > 0 or super().compares_distributions


TRANSPORT_TERMS = ("pixel", "patch", "feature", "sinkhorn")


@dataclass
class PriorConfig(TrainingConfig):
    """train/train_prior.py"""

    output_dir: str = option("runs/prior", "folder of the run: a truncated pipeline and all that belongs to it")
    denoiser: str = option("runs/baseline", "folder or Hub id of a trained pipeline; its UNet walks the last steps")
    prior: str = option("ot", "gaussian (closed form), vae, gan or ot")
    prediction_type: str = option("sample", "sample: clean images, then diffused; noisy_sample: noisy ones at once")
    truncation_timestep: int = option(10, "T', length of the truncated chain")
    latent_dim: int = option(1024, "width of the generator's latents")
    block_out_channels: tuple[int, ...] = option((512, 256, 128, 64), "channels of the maps, smallest first")
    num_train_epochs: int = option(32, "passes over the training data")
    adam_beta1: float = option(0.5, "Adam's β1")
    ema_decay: float = option(0.999, "upper bound of the averaging of weights; it starts lower on short runs")
    num_inference_steps: int | None = option(None, "reverse steps of the sample grids; none is T'")
    sample_epochs: int = option(5, "epochs between sample grids")
    class_wise: bool = option(False, "gaussian: one for each class label")
    beta: float = option(1.0, "vae: weight of the divergence")
    latent_components: int = option(10, "vae: Gaussians fitted to the codes of the data for sampling; 0 keeps N(0, I)")
    discriminator_learning_rate: float | None = option(None, "gan: the discriminator's own; none is learning_rate")
    spectral_norm: bool = option(True, "gan: bound each layer of the discriminator")
    r1_weight: float = option(1.0, "gan: weight of the R1 penalty; 0 for none")
    r1_interval: int = option(4, "gan: updates between penalties, each that many times as heavy")
    ot_objective: str = option("sinkhorn", "ot: pixel, patch, feature, sinkhorn, joined by +")
    ot_weights: tuple[float, ...] = option((), "ot: weights of these terms, in their order; none is 1 each")
    feature_extractor: str | None = option(None, "ot: run of train_features.py; none takes the denoiser's features")
    num_reference_samples: int | None = option(None, "ot: images on both sides of sinkhorn's field; none is the batch")
    num_projections: int = option(256, "ot: random directions of each sliced term")
    patch_sizes: tuple[int, ...] = option((3, 7), "ot: widths of the patches")
    blur: float = option(0.3, "ot: blur of the Sinkhorn divergence; features have median distance 1")
    scaling: float = option(0.5, "ot: ratio of successive blurs in the solver")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("prior", ("gaussian", "vae", "gan", "ot")),
            ("prediction_type", ("sample", "noisy_sample")),
        ):
            value = getattr(self, name)
            require(value in choices, name, f"be one of {', '.join(choices)}", value)
        for name in ("truncation_timestep", "latent_dim", "r1_interval", "num_projections", "sample_epochs"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        closed_form = self.prior == "gaussian"
        require(closed_form or not self.class_wise, "class_wise", "be false but for prior=gaussian", self.class_wise)
        fits = not closed_form or self.prediction_type == "sample"
        require(fits, "prediction_type", "be sample for prior=gaussian, which makes clean images", self.prediction_type)
        require(0 <= self.ema_decay < 1, "ema_decay", "lie in [0, 1)", self.ema_decay)
        require(self.beta >= 0, "beta", "be at least 0", self.beta)
        require(self.latent_components >= 0, "latent_components", "be at least 0", self.latent_components)
        own_rate = self.discriminator_learning_rate
        require(own_rate is None or own_rate > 0, "discriminator_learning_rate", "be positive or none", own_rate)
        references = self.num_reference_samples
        require(references is None or references >= 2, "num_reference_samples", "be at least 2 or none", references)
        require(self.r1_weight >= 0, "r1_weight", "be at least 0", self.r1_weight)
        terms = self.ot_objective.split("+")
        known = set(terms) <= set(TRANSPORT_TERMS) and len(set(terms)) == len(terms)
        require(known, "ot_objective", f"join some of {', '.join(TRANSPORT_TERMS)} by +", self.ot_objective)
        weights = self.ot_weights
        matched = len(weights) in (0, len(terms)) and all(weight > 0 for weight in weights)
        require(matched, "ot_weights", f"be none or a positive number for each of {', '.join(terms)}", weights)
        require(self.blur > 0, "blur", "be a positive length", self.blur)
        require(0 < self.scaling < 1, "scaling", "lie strictly between 0 and 1", self.scaling)

    @property
    def compares_distributions(self) -> bool:
        """Whether the prior's training matches distributions, of images or of codes."""
        return self.prior in ("vae", "ot")


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
    known = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
            raise InputError(f"unknown configuration key {key!r}; {hint}")
    return config_class(**{key: _coerce(key, value, field_types[key]) for key, value in values.items()})


def describe(config_class: type) -> str:
    """The options of a script with their defaults, one a line: the body of its `--help`."""
    lines = [
        f"  {field.name}={_show(field.default):<14} {field.metadata['help']}"
        for field in dataclasses.fields(config_class)
    ]
    return "\n".join(lines)


def run_script(main: Callable[[C], None], config_class: type[C], launch_line: str) -> None:
    """Run `main` with the configuration from the command line, so that it ends well, or with one line on stderr.

    The exit status is 0 also after SIGTERM or SIGINT, which end the run with a checkpoint; 2 for bad input; 1 where the
    run broke, or its surroundings did: disk, memory, another process.
    """
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(f"{launch_line}\n\noptions, as key=value:\n{describe(config_class)}\n")
        return
    end_with_launcher()
    try:
        with stop_on_signals():
            main(load_config(config_class, arguments))
        return
    except InputError as error:
        line, status = str(error), 2
    except TrainingError as error:
        line, status = str(error), 1
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except Exception as error:
        reason = surroundings(error)
        if reason is None:
            raise
        line, status = f"{reason}; the same command goes on from the last checkpoint", 1
    # The exception is gone, and with it the loop's progress bar: the line stands alone.
    if int(os.environ.get("RANK", 0)) > 0:
        # The launcher ends the other processes when one has left. One that is still there has more to say than the
        # first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENCE_SECONDS)
    sys.stderr.write(f"error: {line}\n")
    sys.exit(status)


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
    """The value of `key=text`: as it stands for an option that is text, otherwise as YAML would read it."""
    if text == "":
        return None
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


def _show(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
