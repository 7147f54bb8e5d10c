"""The parser of all commands. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..config import LARGEST, describe
from ..errors import InputError, shown
from ..files import check_file, check_folder, expand_home
from ..launch.commands import SCRIPTS, presets_of
from .images import run_evaluate, run_sample
from .publishing import run_card, run_completion, run_info, run_push, run_report
from .studies import (
    run_compare,
    run_demo,
    run_guide,
    run_stress,
    run_track,
    run_train,
    run_truncated_set,
    run_truncation,
    study_options,
)

WIDTH, HELP_COLUMN = 80, 30
DATASET_HELP = "real images: digits, mnist, cifar10, a Hub id or a folder"
EVALUATOR_HELP = "evaluation network, not used in training or guidance: a folder, a Hub id, efficientnet-lite0 or \
inception-v3-compat"
DEVICE_HELP = "cpu, cuda, cuda:1, mps, … (default: a GPU if there is one)"
DEFAULT = "(default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports errors like everything else here, and in whose texts `~` is the home folder.

    Args:
        example: command line that `--help` shows, without the name of the program.
        keys: the `key=value` options as text, which are looked up only when `--help` shows them.
        arguments, options: as for `ArgumentParser`.
    """

    def __init__(self, *arguments: Any, example: str, keys: Callable[[], str] | None = None, **options: Any) -> None:
        options["description"] = textwrap.fill(options.get("description", ""), WIDTH)
        options["formatter_class"] = partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=HELP_COLUMN, width=WIDTH
        )
        super().__init__(*arguments, **options | {"allow_abbrev": False})
        self.example, self.keys = example, keys
        self.register("type", None, expand_home)

    def format_help(self) -> str:
        """argparse's help, then keys and example."""
        parts = [super().format_help(), self.keys() + "\n" if self.keys else ""]
        lines = textwrap.wrap(f"ot-diffusers {self.example}", WIDTH - 4, break_on_hyphens=False)
        parts.append("example:\n  " + " \\\n    ".join(lines) + "\n")
        return "\n".join(filter(None, parts))

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` in place of argparse's usage and exit."""
        option, _, problem = message.partition(": ")
        if problem.startswith("must "):  # from `whole` and `number`
            message = f"`{option.removeprefix('argument --').replace('-', '_')}` {problem}"
        raise InputError(message)


def whole(least: int, most: int | None = LARGEST) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`, or from `least` on."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {shown(text)}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {shown(value)}")
        return value

    return convert


def number(least: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number of at least `least`, or above it."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            bound = f"above {least}" if above else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"must be a finite number {bound}, got {shown(text)}")
        return value

    return convert


def shares(text: str) -> dict[str, float]:
    """The type of an option with shares of classes: `cat=.9,dog=.1`."""
    pairs = [part.rpartition("=") for part in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs) or len({name for name, *_ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(
            f"must be shares of different classes such as cat=.9,dog=.1, got {shown(text)}"
        )
    return {name: number(0)(value) for name, _, value in pairs}


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="ot-diffusers",
        description="Optimal transport for diffusion models: train, sample, evaluate and publish diffusers pipelines. "
        "`ot-diffusers COMMAND --help` describes a command.",
        example="demo",
    )
    parser.add_argument("--version", action="version", version=f"ot-diffusers {__version__}")
    parser.set_defaults(takes_overrides=False, check_output=None)
    commands = parser.add_subparsers(title="commands", dest="name", metavar="COMMAND", parser_class=Parser)
    _add_demo(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_guide(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_track(commands)
    _add_stress(commands)
    _add_truncation(commands)
    _add_truncated_set(commands)
    _add_report(commands)
    _add_card(commands)
    _add_push(commands)
    _add_info(commands)
    _add_completion(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train, sample and compare on handwritten digits, on the CPU",
        description="Train every kind of model on the embedded 8×8 digits, sample from each, and write one report. It "
        "takes a few minutes on two cores and needs no network.",
        example="demo --output runs/demo",
    )
    _add_output(demo, check_folder, default="runs/demo", help=f"folder of the results, with report.html {DEFAULT}")
    _add_seed(demo, "random seed for models and starting noise")
    demo.set_defaults(command=run_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="run a training script, in one process or several",
        description="Run a training script. `ot-diffusers train SCRIPT --help` lists its options and presets.",
        example="train baseline --config digits/baseline.yaml",
    )
    scripts = train.add_subparsers(title="scripts", dest="script", metavar="SCRIPT", required=True, parser_class=Parser)
    for name, (help, description) in TRAINING.items():
        file, config_class = SCRIPTS[name]
        script = scripts.add_parser(
            name,
            help=help,
            usage=f"ot-diffusers train {name} [--config FILE] [key=value ...]",
            description=f"{description} The script is {file}.",
            example=f"train {name} --config digits/{name.replace('prior', 'prior_ot')}.yaml max_train_steps=100",
            keys=partial(_script_keys, name, config_class),
        )
        script.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as mnist/ot.yaml")
        script.add_argument("--accelerate-config", metavar="FILE", help="file of `accelerate config`")
        script.add_argument(
            "--num-processes", type=whole(1), default=1, metavar="N", help=f"processes on this machine {DEFAULT}"
        )
        script.set_defaults(command=run_train, takes_overrides=True)


TRAINING = {
    "features": (
        "a feature network, for losses and guidance or for evaluation",
        "Train a feature network by classification and save it with the features of a reference set. Losses and "
        "guidance use one such network, evaluation another.",
    ),
    "baseline": (
        "a diffusion model without transport",
        "Train a diffusion model (DDPM) and save a diffusers pipeline.",
    ),
    "ot": (
        "a diffusion model with noise and images paired by optimal transport",
        "Train a diffusion model whose noise is paired with the whole data set by optimal transport, if asked with a "
        "transport term in the loss, and save a pipeline that can be guided.",
    ),
    "prior": (
        "a prior that starts the chain at step T'",
        "Train a prior for the start of a truncated chain and save it with a trained denoiser as a pipeline.",
    ),
    "few_step": (
        "a trained denoiser for a few calls",
        "Tune a trained denoiser for a few calls, by optimal transport between its finished samples and real images.",
    ),
}
"""Of each training script: what it trains, and its description."""


def _script_keys(name: str, config_class: type) -> str:
    return f"options, given as key=value with their defaults:\n\n{describe(config_class)}\n\n{_presets(name)}"


def _study_keys(name: str) -> str:
    return f"options, given as key=value with their defaults:\n\n{describe(study_options(name))}\n\n{_presets(name)}"


def _presets(command: str) -> str:
    return "\n".join(["presets for --config:", *(f"  {name}" for name in presets_of(command))])


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="write images and a grid from a saved pipeline",
        description="Sample images from a saved pipeline and write them as PNG files, with a grid of all.",
        example="sample runs/ot --num-images 36 --num-inference-steps 20 --output runs/ot-images",
    )
    sample.add_argument("pipeline", help="folder or Hub id of a saved pipeline")
    sample.add_argument(
        "--num-images", type=whole(1), metavar="N", help="number of images (default: 64, or that of several classes)"
    )
    _add_class_labels(sample)
    _add_output(
        sample, check_folder, default="runs/samples", help=f"folder of 00000.png, 00001.png, … and grid.png {DEFAULT}"
    )
    sample.add_argument(
        "--json", action="store_true", help="print folder, number of images, seconds and function evaluations as JSON"
    )
    _add_sampling_options(sample)
    _add_speed_options(sample)
    _add_overwrite(sample)
    sample.set_defaults(command=run_sample)


def _add_guide(commands: Any) -> None:
    guide = commands.add_parser(
        "guide",
        help="guide a pipeline that you have towards your pictures, without training",
        description="Build a reference set from pictures, sample plain and guided images from the same noise, compare "
        "both with held-out pictures, and save the guided pipeline with a report. Nothing is trained.",
        example="guide runs/baseline path/to/images --class-shares cat=.9,dog=.1 --output runs/guided",
    )
    guide.add_argument("pipeline", help="folder or Hub id of a saved pipeline")
    guide.add_argument("dataset", help="what the samples should resemble: digits, mnist, cifar10, a Hub id or a folder")
    guide.add_argument(
        "--network",
        metavar="RUN",
        help="feature network that guides: a folder, or a Hub id such as a vision backbone (default: the denoiser)",
    )
    guide.add_argument("--evaluator", help=f"{EVALUATOR_HELP} (default: one that does not guide, stated in the report)")
    guide.add_argument(
        "--class-shares",
        type=shares,
        metavar="A=X,B=Y,…",
        help="shares of classes by name; others keep their proportions in the rest (default: those of the data)",
    )
    guide.add_argument(
        "--num-images",
        type=whole(2),
        metavar="N",
        help="images of each kind (default: as many as test images, 64 to 1,000)",
    )
    guide.add_argument(
        "--num-references", type=whole(2), default=2000, metavar="N", help=f"use at most this many pictures {DEFAULT}"
    )
    guide.add_argument(
        "--field",
        type=whole(16),
        nargs="?",
        const=1000,
        metavar="N",
        help="record a guidance field of N samples, which guides images one at a time (1,000 without a number)",
    )
    _add_output(
        guide, check_folder, default="runs/guided", help=f"folder of report.html, results.json and pipeline {DEFAULT}"
    )
    guide.add_argument("--json", action="store_true", help="print the results as JSON in place of the table")
    options = guide.add_argument_group("sampling")
    options.add_argument(
        "--num-inference-steps", type=whole(1), metavar="N", help="denoising steps (default: the pipeline's own)"
    )
    options.add_argument(
        "--class-guidance-scale", type=number(0), metavar="X", help="strength of classifier-free guidance (default: 1)"
    )
    options.add_argument(
        "--guidance-scale",
        type=number(0, above=True),
        metavar="X",
        help="strength of the guidance (default: 1, or 2 with --class-shares)",
    )
    _add_seed(options, "random seed for the starting noise")
    options.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="images that are guided together (default: all, up to 1,000)"
    )
    options.add_argument("--device", help=DEVICE_HELP)
    _add_data_places(guide.add_argument_group("data set"))
    _add_overwrite(guide)
    guide.set_defaults(command=run_guide)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="compute metrics of a pipeline or of a folder of images",
        description="Compare generated images with the test split of a data set, by the features of an evaluation "
        "network. The real-vs-real score of each metric, from the training split, stands beside it.",
        example="evaluate runs/ot --dataset digits --evaluator runs/digits/evaluator",
    )
    evaluate.add_argument("images", help="folder or Hub id of a saved pipeline, or a folder of images")
    evaluate.add_argument("--dataset", required=True, help=DATASET_HELP)
    evaluate.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    evaluate.add_argument(
        "--num-samples", type=whole(2), metavar="N", help="number of images (default: that of test images)"
    )
    _add_class_labels(evaluate)
    _add_output(evaluate, check_file, metavar="FILE", help="also write the results to this JSON file")
    evaluate.add_argument("--json", action="store_true", help="print the results as JSON in place of the table")
    _add_data_options(evaluate)
    _add_sampling_options(evaluate)
    _add_speed_options(evaluate)
    _add_overwrite(evaluate)
    evaluate.set_defaults(command=run_evaluate)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare variants over several random seeds, with intervals",
        usage="ot-diffusers compare [options] [VARIANT ...] [key=value ...]",
        description="Compare saved pipelines, or the variants of a YAML file, which are trained first, over several "
        "random seeds. The report has means, intervals and paired differences.",
        example="compare runs/baseline runs/ot --dataset digits --evaluator runs/digits/evaluator --seeds 5",
        keys=partial(_study_keys, "compare"),
    )
    compare.add_argument(
        "variants", nargs="*", metavar="VARIANT", help="saved pipelines, or names of variants in the YAML file"
    )
    compare.add_argument(
        "--config", metavar="FILE", help="YAML file of variants, or a preset such as digits/compare.yaml"
    )
    compare.add_argument("--dataset", help=DATASET_HELP)
    compare.add_argument("--evaluator", help=f"{EVALUATOR_HELP}; or a preset to train first")
    compare.add_argument("--seeds", metavar="N", help="number of random seeds (default: 5)")
    compare.add_argument(
        "--num-samples", metavar="N", help="images per variant and random seed (default: as many as test images)"
    )
    compare.add_argument(
        "--num-inference-steps", type=whole(1), metavar="N", help="denoising steps (default: each pipeline's own)"
    )
    _add_output(compare, check_folder, help="folder of the results, with report.html (default: runs/comparison)")
    _add_max_seconds(compare)
    compare.set_defaults(command=run_compare, takes_overrides=True)


def _add_track(commands: Any) -> None:
    track = commands.add_parser(
        "track",
        help="compute distances to real images along training runs",
        description="Sample from every checkpoint of training runs and plot the distances to real images over the "
        "training steps.",
        example="track runs/baseline runs/ot --dataset digits --evaluator runs/digits/evaluator",
    )
    track.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="folder of a run of train_baseline.py or train_ot.py"
    )
    track.add_argument("--dataset", required=True, help=DATASET_HELP)
    track.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    track.add_argument(
        "--num-samples", type=whole(2), metavar="N", help="images per checkpoint (default: the smaller real split)"
    )
    _add_output(track, check_folder, default="runs/tracking", help=f"folder of report.html and tracking.json {DEFAULT}")
    _add_data_options(track)
    _add_sampling_options(track)
    track.set_defaults(command=run_track)


def _add_stress(commands: Any) -> None:
    stress = commands.add_parser(
        "stress",
        help="check how metrics respond to known damage",
        description="Damage real images in known ways, such as blur, noise or missing classes, and report how every "
        "metric responds. It shows what an evaluation network can see.",
        example="stress --dataset digits --evaluator runs/digits/evaluator",
    )
    stress.add_argument("--dataset", required=True, help=f"{DATASET_HELP}, with class labels")
    stress.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    stress.add_argument(
        "--num-samples", type=whole(2), default=1000, metavar="N", help=f"damage at most this many images {DEFAULT}"
    )
    stress.add_argument(
        "--repeats",
        type=whole(3),
        default=3,
        metavar="N",
        help=f"random draws of each damage, at least 3, for intervals {DEFAULT}",
    )
    _add_output(
        stress, check_folder, default="runs/stress", help=f"folder of report.html, stress.json and pictures {DEFAULT}"
    )
    _add_seed(stress, "random seed for the damage")
    stress.add_argument("--device", help=DEVICE_HELP)
    _add_data_options(stress)
    stress.set_defaults(command=run_stress)


def _add_truncation(commands: Any) -> None:
    truncation = commands.add_parser(
        "truncation",
        help="train and compare priors for truncated chains",
        usage="ot-diffusers truncation [options] [key=value ...]",
        description="Train the priors of a truncated chain, sample from each, and compare them with one another and "
        "with the full chain.",
        example="truncation --config digits/truncation.yaml",
        keys=partial(_study_keys, "truncation"),
    )
    truncation.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as digits/truncation.yaml")
    _add_max_seconds(truncation)
    truncation.set_defaults(command=run_truncation, takes_overrides=True)


def _add_truncated_set(commands: Any) -> None:
    export = commands.add_parser(
        "truncated-set",
        help="write real images diffused to step T' as a data set",
        description="Diffuse the images of a split to step T' and write them as parquet files, to train a prior "
        "elsewhere.",
        example="truncated-set --dataset digits --truncation-timestep 10 --output runs/digits-x10",
    )
    export.add_argument("--dataset", required=True, help=DATASET_HELP)
    export.add_argument("--split", default="train", help=f"train, validation or test {DEFAULT}")
    export.add_argument(
        "--truncation-timestep", type=whole(1), default=10, metavar="T'", help=f"number of noising steps {DEFAULT}"
    )
    export.add_argument(
        "--denoiser", metavar="PIPELINE", help="pipeline whose noise schedule is used (default: T = 1000, linear)"
    )
    export.add_argument(
        "--num-epochs", type=whole(1), default=1, metavar="N", help=f"independent draws of noise per image {DEFAULT}"
    )
    _add_seed(export, "random seed for the noise")
    _add_output(export, check_folder, required=True, help="new folder")
    _add_data_options(export)
    export.set_defaults(command=run_truncated_set)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="show results.json as a table and an HTML page",
        description="Print results.json as a table, and write it as one HTML page with the pictures beside it.",
        example="report runs/comparison",
    )
    report.add_argument("results", help="results.json, or the folder of a demo or study that holds it")
    _add_output(report, check_file, metavar="FILE", help="HTML file (default: report.html beside the results)")
    report.add_argument("--json", action="store_true", help="print the results as JSON and write nothing")
    report.set_defaults(command=run_report)


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="write a run as a folder that is ready for the Hub",
        description="Write the model of a run, its model card and sample images into a new folder. `push` uploads such "
        "a folder.",
        example="card runs/ot --output build/ot-card --results runs/comparison/results.json",
    )
    card.add_argument("run", help="folder of a training run, or any saved pipeline")
    _add_output(card, check_folder, required=True, help="new folder")
    card.add_argument("--repo", metavar="USER/NAME", help="Hub id in the card's example (default: the folder's name)")
    _add_card_options(card)
    card.set_defaults(command=run_card)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="upload a run and its card to the Hub",
        description="Upload the model of a run and its model card to the Hub, in one commit. Log in first, by "
        "`hf auth login` or the variable HF_TOKEN.",
        example="push runs/ot --repo USER/NAME --dry-run",
    )
    push.add_argument("run", help="folder of a training run, a saved pipeline, or a folder that `card` wrote")
    push.add_argument("--repo", metavar="USER/NAME", required=True, help="Hub repository; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repository as private")
    push.add_argument("--revision", metavar="BRANCH", help="branch of the commit (default: main)")
    push.add_argument("--message", help="message of the commit")
    push.add_argument("--dry-run", action="store_true", help="list the files that would be uploaded; stays offline")
    push.add_argument("--json", action="store_true", help="print JSON in place of the list of files")
    _add_card_options(push)
    push.set_defaults(command=run_push)


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("model card")
    options.add_argument("--features", metavar="RUN", help="run of train_features.py whose features guide the pipeline")
    options.add_argument(
        "--denoiser", metavar="RUN", help="run of the denoiser of a truncated chain, if the folder was moved"
    )
    options.add_argument("--results", metavar="FILE", help="results.json of an evaluation, study or demo")
    options.add_argument("--arm", metavar="NAME", help="variant in the results that is this pipeline")
    options.add_argument(
        "--beside",
        metavar="NAME",
        nargs="+",
        default=(),
        help="variants that the card shows beside it (default: the first one)",
    )
    options.add_argument("--hardware", metavar="TEXT", help='hardware of the recorded times, such as "two CPU cores"')
    options.add_argument(
        "--truncation-timestep", type=whole(1), metavar="N", help="another T' for a truncated chain (default: its own)"
    )
    options.add_argument("--dtype", default="float32", help=f"type of the stored weights: float32 or float16 {DEFAULT}")
    options.add_argument(
        "--num-images",
        type=whole(0),
        metavar="N",
        help="sample images on the card; 0: none (default: 36, or 16 of each class)",
    )
    options.add_argument(
        "--num-inference-steps",
        type=whole(1),
        metavar="N",
        help="denoising steps of the card (default: the pipeline's own)",
    )


def _add_info(commands: Any) -> None:
    info = commands.add_parser(
        "info",
        help="describe a saved pipeline",
        description="Print the class, parts, parameters, scheduler and origin of a saved pipeline.",
        example="info runs/ot",
    )
    info.add_argument("pipeline", help="folder or Hub id of a saved pipeline")
    info.add_argument("--json", action="store_true", help="print JSON in place of the table")
    info.set_defaults(command=run_info)


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        description='Print a script for a shell, which then completes commands and options. `eval "$(ot-diffusers '
        'completion bash)"` loads it.',
        example="completion bash",
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="shell that the script is for")
    completion.set_defaults(command=run_completion, make_parser=make_parser)


def _add_class_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class-labels",
        type=lambda text: text.split(","),
        metavar="A,B,…",
        help="classes of the images, by number or name, in turn (default: drawn by their frequencies)",
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("sampling")
    options.add_argument(
        "--features", metavar="RUN", help="run of train_features.py, whose network and reference set guide any pipeline"
    )
    options.add_argument(
        "--num-inference-steps", type=whole(1), metavar="N", help="denoising steps (default: the pipeline's own)"
    )
    options.add_argument(
        "--class-guidance-scale",
        type=number(0),
        metavar="X",
        help="strength of classifier-free guidance by class (default: 1, which is without)",
    )
    options.add_argument(
        "--guidance-scale", type=number(0), metavar="X", help="strength of the guidance, at least 0; 0: no guidance"
    )
    options.add_argument("--num-guidance-steps", type=whole(0), metavar="N", help="number of guided steps")
    options.add_argument(
        "--guidance-start-step", type=whole(0), metavar="N", help="first guided step; 0 is the first of the chain"
    )
    options.add_argument(
        "--seed-recipe", action="store_true", help="guidance of the original study; other options override it"
    )
    _add_seed(options, "random seed for the starting noise")
    options.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="images per batch (default: what fits in memory, up to 1,000)"
    )
    options.add_argument("--device", help=DEVICE_HELP)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("data set")
    _add_data_places(options)
    options.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="resize and crop images to this size (default: as stored)"
    )
    options.add_argument(
        "--channels", type=int, metavar="N", help="convert images to grey (1) or RGB (3) (default: as stored)"
    )


def _add_data_places(options: Any) -> None:
    options.add_argument(
        "--dataset-config-name", metavar="NAME", help="configuration of the data set, as in datasets.load_dataset"
    )
    options.add_argument(
        "--dataset-revision", metavar="NAME", help="branch, tag or commit of a data set on the Hub (default: main)"
    )
    options.add_argument(
        "--data-dir", metavar="FOLDER", help="folder within the data set that holds the images (default: all of it)"
    )
    options.add_argument(
        "--image-column", metavar="NAME", help="column that holds the images (default: image, or the only such column)"
    )
    options.add_argument(
        "--label-column", metavar="NAME", help="column that holds the labels (default: label, or the class folders)"
    )


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("speed")
    options.add_argument(
        "--dtype", help="type of matrix products: float32, bfloat16 or float16 (default: the launcher's, or float32)"
    )
    options.add_argument(
        "--channels-last", action="store_true", help="memory layout that is faster for convolutions on many GPUs"
    )
    options.add_argument(
        "--compile", action="store_true", help="compile the denoiser by torch.compile: minutes once, then faster"
    )


def _add_seed(parser: Any, help: str) -> None:
    parser.add_argument("--seed", type=whole(0, None), default=0, metavar="N", help=f"{help} {DEFAULT}")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that this command wrote there before, and no others"
    )


def _add_max_seconds(parser: argparse.ArgumentParser) -> None:
    """`--max-seconds` of a study, which can be run in several parts."""
    parser.add_argument(
        "--max-seconds",
        type=number(0, above=True),
        metavar="SECONDS",
        help="stop after this time, with exit status 3; everything is saved; rerun the same command to resume",
    )


def _add_output(parser: argparse.ArgumentParser, check: Callable[[str], Path], **options: Any) -> None:
    """`--output`, which is tried by `check` before the command begins."""
    parser.add_argument("--output", **{"metavar": "FOLDER"} | options)
    parser.set_defaults(check_output=check)
