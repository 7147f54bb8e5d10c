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
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from .errors import InputError, require, shown
from .files import expand_home

C = TypeVar("C")

# diffusers' names of what needs no further options.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
PRECISIONS = ("no", "fp16", "bf16")
HELP_COLUMN, NO_BREAK = 36, "\N{NO-BREAK SPACE}"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
OT_BACKENDS = ("native", "geomloss", "flash-sinkhorn")
TRANSPORT_TERMS = ("pixel", "patch", "feature", "sinkhorn")

LARGEST = 10**9
"""Of a whole number: more images, updates or channels no machine holds. A random seed may be any."""


class Range(NamedTuple):
    """What an option may be, besides none where its type allows that; of a list, every item. `must` says it in the
    words of `require` where the bounds say too little."""

    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    must: str = ""

    def holds(self, value: Any) -> bool:
        """Whether a value, or every item of it, is one of the choices, or within the bounds, in which no NaN is."""
        if isinstance(value, tuple):
            return all(map(self.holds, value))
        if self.choices:
            return value in self.choices
        enough = self.minimum is None or value >= self.minimum
        return enough and (self.above is None or value > self.above) and (self.below is None or value < self.below)

    def requirement(self, optional: bool) -> str:
        """In the words of `require`."""
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
            return f"({', '.join(map(str, self.choices))})"
        if self.below is not None:
            return f"({self.above}, {self.below})" if self.minimum is None else f"[{self.minimum}, {self.below})"
        return f"(> {self.above})" if self.minimum is None else f"(≥ {self.minimum})"


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A dataclass field with its line of `--help`, and the bounds of its `Range`, which are checked and shown."""
    return field(default=default, metadata={"help": help, "range": Range(**bounds) if bounds else None})


@dataclass
class Options:
    """A configuration. In every text, `~` at the beginning of a path is the home folder.

    Raises:
        InputError: a value out of its range.
    """

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
    """What every training script takes."""

    output_dir: str = option("runs/run", "folder of model, checkpoints, samples, metrics.jsonl and TensorBoard logs")
    dataset: str = option("digits", "digits (embedded), mnist, cifar10, a Hub id, a local data set or an image folder")
    image_column: str | None = option(None, "column of the images; None is image, or the only one there is")
    label_column: str | None = option(None, "column of the class labels; None is label, or the class folders")
    image_size: int | None = option(None, "resize and crop to this many pixels; None keeps the data's size", minimum=1)
    channels: int | None = option(None, "grey or RGB; None keeps the data's own", choices=(1, 3))
    random_flip: bool = option(False, "flip half of the training images left to right")
    crop_padding: int = option(0, "move training images by up to this many pixels, borders mirrored", minimum=0)
    num_workers: int = option(0, "decoding processes for data too large to be held decoded", minimum=0)
    seed: int = option(0, "of the initial weights, the data order and the noise", minimum=0, must="not be negative")
    train_batch_size: int = option(128, "images per process and forward pass", minimum=1)
    gradient_accumulation_steps: int | None = option(
        None, "forward passes per update; none is the launcher's, or 1", minimum=1
    )
    num_train_epochs: int = option(35, "passes over the training data", minimum=1)
    max_train_steps: int | None = option(None, "updates; overrides num_train_epochs", minimum=1)
    max_train_seconds: float | None = option(None, "stop cleanly, with a checkpoint, after this long", above=0)
    learning_rate: float = option(2e-4, "peak learning rate", above=0)
    lr_scheduler: str = option("constant", "course of the learning rate, by diffusers' name", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(0, "updates until the peak learning rate", minimum=0)
    adam_beta1: float = option(0.9, "Adam's β1", minimum=0, below=1)
    adam_beta2: float = option(0.999, "Adam's β2", minimum=0, below=1)
    adam_weight_decay: float = option(0.0, "decoupled weight decay; 0 is plain Adam", minimum=0)
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this", above=0)
    max_skipped_updates: int = option(0, "updates left out at most, whose gradient is not finite; 0 stops", minimum=0)
    mixed_precision: str | None = option(None, "none is the launcher's", choices=PRECISIONS, must="be no, fp16 or bf16")
    report_to: str = option(
        "auto", "tracker by accelerate's name: tensorboard, wandb, …; auto: tensorboard where it is installed; or none"
    )
    logging_steps: int = option(20, "updates between records", minimum=1)
    checkpointing_steps: int | None = option(None, "updates between checkpoints; None is once an epoch", minimum=1)
    checkpoints_total_limit: int = option(2, "keep this many checkpoints", minimum=1)
    resume_from_checkpoint: str | None = option(
        "latest", "latest, the folder of a checkpoint, or none to refuse a used folder"
    )

    @property
    def compares_distributions(self) -> bool:
        """Whether a loss depends on all images of a forward pass together, and not on each by itself."""
        return False


@dataclass
class FeaturesConfig(TrainingConfig):
    """train/train_features.py"""

    output_dir: str = option("runs/features", "folder of the run: the network and its reference bank")
    architecture: str = option(
        "conv", "conv as in the original study, residual to evaluate with", choices=("conv", "residual")
    )
    block_out_channels: tuple[int, ...] = option((32, 64), "channels of each stage")
    layers_per_block: int = option(1, "residual: blocks of each stage", minimum=1)
    norm_type: str = option(
        "group_norm", "residual: batch_norm is over a process' batch", choices=("group_norm", "batch_norm")
    )
    feature_dim: int = option(128, "width of the penultimate layer", minimum=1)
    optimizer: str = option(
        "adamw", "sgd with Nesterov momentum; neither decays biases and norms", choices=("adamw", "sgd")
    )
    sgd_momentum: float = option(0.9, "sgd: Nesterov's momentum", above=0, below=1)
    sgd_weight_decay: float = option(5e-4, "sgd: weight decay, as a gradient", minimum=0)
    label_smoothing: float = option(0.0, "share of each label spread over all classes", minimum=0, below=1)
    num_train_epochs: int = option(10, "passes over the training data", minimum=1)
    learning_rate: float = option(1e-3, "peak learning rate", above=0)
    lr_scheduler: str = option("cosine", "with lr_warmup_steps, cosine and linear are one cycle", choices=LR_SCHEDULERS)
    num_reference_samples: int = option(2000, "rows of the reference bank, from the training split", minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.block_out_channels
        fits = self.architecture != "conv" or len(widths) == 2
        require(fits, "block_out_channels", "hold two widths for conv", widths)
        unit = 8 if self.architecture == "residual" else 1  # groups of the residual network's normalisation
        require(_multiples(widths, unit), "block_out_channels", f"be multiples of {unit}", widths)


@dataclass
class DiffusionConfig(TrainingConfig):
    """What every script takes that trains a denoiser."""

    num_train_timesteps: int = option(1000, "T, length of the noising chain", minimum=1)
    timestep_sampler: str = option(
        "uniform",
        "distribution of the timesteps; quadratic: t = T·u², log_uniform: t = T^u, both favour little noise",
        choices=("uniform", "quadratic", "log_uniform"),
    )
    max_timestep: int | None = option(None, "train on t < max_timestep only, for truncated chains", minimum=1)
    noise_coupling: str = option(
        "none",
        "assignment: assign a batch's noise to its images by optimal transport",
        choices=("none", "assignment"),
        must="be one of none, assignment",
    )
    ema_decay: float = option(0.999, "upper bound of the weights' averaging; lower on short runs", minimum=0, below=1)
    num_validation_samples: int = option(1000, "validation images per epoch", minimum=1)
    num_inference_steps: int = option(50, "DDIM steps of the sample grids", minimum=1)
    sample_epochs: int = option(5, "epochs between sample grids", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.num_train_timesteps
        for name in ("num_inference_steps", "max_timestep"):
            value = getattr(self, name)
            require(value is None or value <= length, name, f"lie in 1 … {length}", value)

    @property
    def compares_distributions(self) -> bool:
        """Whether noise is assigned within the batch."""
        return self.noise_coupling == "assignment"


@dataclass
class BaselineConfig(DiffusionConfig):
    """train/train_baseline.py"""

    output_dir: str = option("runs/baseline", "folder of the run: a diffusers pipeline and all that belongs to it")
    block_out_channels: tuple[int, ...] = option((64, 128, 256), "UNet channels of each resolution")
    layers_per_block: int = option(2, "UNet residual blocks per resolution", minimum=1)
    attention_levels: tuple[int, ...] = option((2,), "resolutions with self-attention, counted from 0, the finest")
    norm_num_groups: int = option(32, "groups of the UNet's group normalisation", minimum=1)
    dropout: float = option(0.0, "UNet dropout", minimum=0, below=1)
    beta_schedule: str = option("linear", "course of the noise, by diffusers' name", choices=BETA_SCHEDULES)
    prediction_type: str = option("epsilon", "what the UNet predicts", choices=PREDICTION_TYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths, groups = self.block_out_channels, self.norm_num_groups
        fits = _multiples(widths, groups)
        require(fits, "block_out_channels", f"be multiples of norm_num_groups ({groups})", widths)


@dataclass
class OTConfig(BaselineConfig):
    """train/train_ot.py"""

    output_dir: str = option("runs/ot", "folder of the run: an OT-guided pipeline and all that belongs to it")
    feature_extractor: str = option("runs/features", "folder or Hub id of a feature network trained on the same data")
    ot_weight: float = option(0.03, "λ, weight of the transport term; 0 trains the baseline", minimum=0)
    num_reference_samples: int = option(
        2000,
        "real images the batch is compared with, none of them in the batch",
        minimum=2,
        must="be at least 2 (a distribution, not a point)",
    )
    blur: float = option(0.3, "of the Sinkhorn divergence, in feature space", above=0, must="be a positive length")
    scaling: float = option(0.7, "ratio of successive blurs in the solver", above=0, below=1)
    normalize_features: bool = option(
        True, "divide features by their median distance; the original study takes them raw"
    )
    squash: str = option(
        "clamp",
        "how x̂0 is brought into [-1, 1]; tanh as in the original study, then also for the references",
        choices=("clamp", "tanh"),
    )
    snr_weighting: bool = option(True, "weight images by min(SNR, 5)/5: x̂0 of a noisy image is no sample of the data")
    ot_backend: str = option(
        "native",
        "geomloss as in the original study; flash-sinkhorn for CUDA, installed apart",
        choices=OT_BACKENDS,
        must=f"be one of {', '.join(OT_BACKENDS)}",
    )
    ot_iterations: int | None = option(
        None, "native: steps set in advance, so that a GPU never waits: 20 do at this blur; none converges", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.ot_iterations is None or self.ot_backend == "native"
        require(fits, "ot_iterations", f"be none with ot_backend={self.ot_backend}", self.ot_iterations)

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss has a transport term, or noise is assigned within the batch."""
        return self.ot_weight > 0 or super().compares_distributions


@dataclass
class PriorConfig(TrainingConfig):
    """train/train_prior.py"""

    output_dir: str = option("runs/prior", "folder of the run: a truncated pipeline and all that belongs to it")
    denoiser: str = option("runs/baseline", "folder or Hub id of a trained pipeline; its UNet walks the last steps")
    prior: str = option(
        "ot", "gaussian in closed form, the others are trained", choices=("gaussian", "vae", "gan", "ot")
    )
    prediction_type: str = option(
        "sample", "sample: clean, then diffused; noisy_sample: noisy at once", choices=("sample", "noisy_sample")
    )
    truncation_timestep: int = option(10, "T', length of the truncated chain", minimum=1)
    latent_dim: int = option(1024, "width of the generator's latents", minimum=1)
    block_out_channels: tuple[int, ...] = option((512, 256, 128, 64), "channels of the maps, smallest first")
    num_train_epochs: int = option(32, "passes over the training data", minimum=1)
    adam_beta1: float = option(0.5, "Adam's β1", minimum=0, below=1)
    ema_decay: float = option(0.999, "upper bound of the weights' averaging; lower on short runs", minimum=0, below=1)
    num_inference_steps: int | None = option(None, "reverse steps of the sample grids; none is T'")
    sample_epochs: int = option(5, "epochs between sample grids", minimum=1)
    class_wise: bool = option(False, "gaussian: one for each class label")
    beta: float = option(1.0, "vae: weight of the divergence", minimum=0)
    latent_components: int = option(10, "vae: Gaussians fitted to the codes of the data; 0 keeps N(0, I)", minimum=0)
    discriminator_learning_rate: float | None = option(None, "gan: its own; none is learning_rate", above=0)
    spectral_norm: bool = option(True, "gan: bound each layer of the discriminator")
    r1_weight: float = option(1.0, "gan: weight of the R1 penalty; 0 for none", minimum=0)
    r1_interval: int = option(4, "gan: updates between penalties, each that many times as heavy", minimum=1)
    ot_objective: str = option("sinkhorn", f"ot: {', '.join(TRANSPORT_TERMS)}, joined by +")
    ot_weights: tuple[float, ...] = option((), "ot: weights of these terms, in their order; none is 1 each")
    ot_warmup_steps: int = option(
        0, "ot: first updates, which learn the closed-form transport map to the Gaussian of the data", minimum=0
    )
    feature_extractor: str | None = option(None, "ot: run of train_features.py; none takes the denoiser's features")
    num_reference_samples: int | None = option(
        None, "ot: images on both sides of sinkhorn's field; none is the batch", minimum=2
    )
    num_projections: int = option(256, "ot: random directions of each sliced term", minimum=1)
    patch_sizes: tuple[int, ...] = option((3, 7), "ot: widths of the patches", minimum=1)
    patch_stride: int | None = option(
        None, "ot: pixels between compared patches, from a random one on; none is half a patch", minimum=1
    )
    blur: float = option(
        0.3, "ot: of the Sinkhorn divergence; features have median distance 1", above=0, must="be a positive length"
    )
    scaling: float = option(0.5, "ot: ratio of successive blurs in the solver", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        closed_form = self.prior == "gaussian"
        require(closed_form or not self.class_wise, "class_wise", "be false but for prior=gaussian", self.class_wise)
        fits = not closed_form or self.prediction_type == "sample"
        require(fits, "prediction_type", "be sample for prior=gaussian, which makes clean images", self.prediction_type)
        warm, clean = self.ot_warmup_steps, self.prediction_type == "sample"
        require(clean or not warm, "ot_warmup_steps", "be 0 for prediction_type=noisy_sample", warm)
        terms = self.ot_objective.split("+")
        valid = set(terms) <= set(TRANSPORT_TERMS) and len(set(terms)) == len(terms)
        require(valid, "ot_objective", f"join some of {', '.join(TRANSPORT_TERMS)} by +", self.ot_objective)
        matched = len(self.ot_weights) in (0, len(terms)) and all(weight > 0 for weight in self.ot_weights)
        require(matched, "ot_weights", f"be none or a positive number for each of {', '.join(terms)}", self.ot_weights)

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
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(names)}"
            raise InputError(f"unknown configuration key {key!r}; {hint}")
    return config_class(**{key: _coerce(key, value, field_types[key]) for key, value in values.items()})


def describe(config_class: type) -> str:
    """The options of a script with their defaults and what they may be: the body of its `--help`."""
    return "\n".join(map(_described, dataclasses.fields(config_class)))


def _described(entry: dataclasses.Field[Any]) -> str:
    text, allowed = entry.metadata["help"], entry.metadata.get("range")
    if allowed is not None:
        text += f" {allowed}" if allowed.choices else " " + f"{allowed}".replace(" ", NO_BREAK)
    start = f"  {entry.name}={_show(entry.default)}  ".ljust(HELP_COLUMN)
    wrapper = textwrap.TextWrapper(80, start, " " * HELP_COLUMN, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text).replace(NO_BREAK, " ")


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


def _show(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
