"""The parser of all commands. Their modules import nothing heavy before they run, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..config import LARGEST, describe
from ..errors import InputError, shown
from ..files import check_file, check_folder, expand_home
from ..launch.commands import SCRIPTS, presets_of
from .images import run_evaluate, run_sample
from .publishing import run_card, run_completion, run_info, run_push, run_report
from .studies import run_compare, run_demo, run_stress, run_track, run_train, run_truncated_set, run_truncation

EVALUATOR_HELP = "network that no loss has seen: folder, Hub id, or a name such as inception-v3-compat"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports errors like everything else here, and in whose texts `~` is the home folder."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", None, expand_home)

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` in place of argparse's usage and exit."""
        option, _, problem = message.partition(": ")
        if problem.startswith("must "):  # from `whole` and `number`
            message = f"`{option.removeprefix('argument --').replace('-', '_')}` {problem}"
        raise InputError(message)


def whole(least: int, most: int | None = LARGEST) -> Callable[[str], int]:
    """The type of an option that is a whole number in that range; any number from `least` on without `most`."""

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
    """The type of an option that is a finite number: `least` or more, or above `least`."""

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


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="ot-diffusers", description="Optimal transport in diffusion models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ot-diffusers {__version__}")
    parser.set_defaults(takes_overrides=False, check_output=None)
    commands = parser.add_subparsers(title="commands", dest="name", metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_sample(commands)
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
        "demo", help="train, sample and compare on handwritten digits, on the CPU", allow_abbrev=False
    )
    _add_output(
        demo, check_folder, default="runs/demo", help="folder for everything, report.html among it (%(default)s)"
    )
    demo.add_argument(
        "--seed", type=whole(0, None), default=0, help="of the models and of the starting noise (%(default)s)"
    )
    demo.set_defaults(command=run_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="run a training script, on one process or several", allow_abbrev=False)
    scripts = train.add_subparsers(title="scripts", dest="script", metavar="SCRIPT", required=True)
    for name, (file, config_class) in SCRIPTS.items():
        script = scripts.add_parser(
            name,
            help=file,
            usage=f"ot-diffusers train {name} [--config FILE] [key=value ...]",
            epilog=f"keys and their defaults:\n{describe(config_class)}\n\n{_presets(name)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        script.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as mnist/ot.yaml")
        script.add_argument("--accelerate-config", metavar="FILE", help="file of `accelerate config`")
        script.add_argument("--num-processes", type=whole(1), default=1, help="on this machine (%(default)s)")
        script.set_defaults(command=run_train, takes_overrides=True)


def _presets(command: str) -> str:
    return "presets for --config:\n" + "\n".join(f"  {name}" for name in presets_of(command))


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser("sample", help="write images and a grid from a saved pipeline", allow_abbrev=False)
    sample.add_argument("pipeline", help="folder or Hub id of a saved pipeline")
    sample.add_argument("--num-images", type=whole(1), default=64, help="how many (%(default)s)")
    _add_output(sample, check_folder, default="runs/samples", help="folder for 00000.png … and grid.png (%(default)s)")
    sample.add_argument("--json", action="store_true", help="print folder, number, time and network calls as JSON")
    _add_sampling_options(sample)
    _add_speed_options(sample)
    _add_overwrite(sample)
    sample.set_defaults(command=run_sample)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="metrics of a pipeline or of an image folder", allow_abbrev=False)
    evaluate.add_argument("images", help="folder or Hub id of a saved pipeline, or a folder of images")
    evaluate.add_argument("--dataset", required=True, help="real images: digits, mnist, cifar10, a Hub id or a folder")
    evaluate.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    evaluate.add_argument(
        "--num-samples", type=whole(2), help="how many images; default: as many as there are test images"
    )
    _add_output(evaluate, check_file, metavar="FILE", help="write results.json here")
    evaluate.add_argument("--json", action="store_true", help="print results.json instead of the table")
    _add_data_options(evaluate)
    _add_sampling_options(evaluate)
    _add_speed_options(evaluate)
    _add_overwrite(evaluate)
    evaluate.set_defaults(command=run_evaluate)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="paired differences between arms over several seeds",
        usage="ot-diffusers compare [ARM ...] [--config FILE] [options] [key=value ...]",
        epilog=_presets("compare"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument("arms", nargs="*", metavar="ARM", help="saved pipelines, or names of arms in the YAML file")
    compare.add_argument("--config", metavar="FILE", help="YAML file of arms, or a preset such as digits/compare.yaml")
    compare.add_argument("--dataset", help="real images: digits, mnist, cifar10, a Hub id or a folder")
    compare.add_argument("--evaluator", help=f"{EVALUATOR_HELP}; or a preset to train once")
    compare.add_argument("--seeds", help="how many seeds (5)")
    compare.add_argument("--num-samples", help="images of each arm and seed; default: as many as there are test images")
    compare.add_argument("--num-inference-steps", type=whole(1), help="denoising steps; default: each pipeline's own")
    _add_output(compare, check_folder, help="folder for everything, report.html among it (runs/comparison)")
    _add_max_seconds(compare)
    compare.set_defaults(command=run_compare, takes_overrides=True)


def _add_track(commands: Any) -> None:
    track = commands.add_parser("track", help="distances to real images along training runs", allow_abbrev=False)
    track.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folder of a train_baseline.py or train_ot.py run")
    track.add_argument("--dataset", required=True, help="real images: digits, mnist, cifar10, a Hub id or a folder")
    track.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    track.add_argument(
        "--num-samples", type=whole(2), help="images of each checkpoint; default: as the smaller real split"
    )
    _add_output(
        track, check_folder, default="runs/tracking", help="folder for report.html and tracking.json (%(default)s)"
    )
    _add_data_options(track)
    _add_sampling_options(track)
    track.set_defaults(command=run_track)


def _add_stress(commands: Any) -> None:
    stress = commands.add_parser("stress", help="do the metrics see what they should?", allow_abbrev=False)
    stress.add_argument("--dataset", required=True, help="real images with labels: digits, mnist, cifar10, a Hub id, …")
    stress.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    stress.add_argument("--num-samples", type=whole(2), default=1000, help="images damaged, at most (%(default)s)")
    stress.add_argument(
        "--repeats",
        type=whole(3),
        default=3,
        help="draws of each damage, at least 3 for intervals (%(default)s)",
    )
    _add_output(
        stress, check_folder, default="runs/stress", help="folder for report.html, stress.json, pictures (%(default)s)"
    )
    stress.add_argument("--seed", type=whole(0, None), default=0, help="of the draws (%(default)s)")
    stress.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: a GPU if there is one")
    _add_data_options(stress)
    stress.set_defaults(command=run_stress)


def _add_truncation(commands: Any) -> None:
    truncation = commands.add_parser(
        "truncation",
        help="train, sample and compare the priors of the truncated chain",
        usage="ot-diffusers truncation [--config FILE] [--max-seconds SECONDS] [key=value ...]",
        epilog=_presets("truncation"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    truncation.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as digits/truncation.yaml")
    _add_max_seconds(truncation)
    truncation.set_defaults(command=run_truncation, takes_overrides=True)


def _add_truncated_set(commands: Any) -> None:
    export = commands.add_parser(
        "truncated-set", help="write real images diffused to step T' as a data set", allow_abbrev=False
    )
    export.add_argument("--dataset", required=True, help="digits, mnist, cifar10, a Hub id or a folder")
    export.add_argument("--split", default="train", help="train, validation or test (%(default)s)")
    export.add_argument("--truncation-timestep", type=whole(1), default=10, help="T' (%(default)s)")
    export.add_argument("--denoiser", help="pipeline whose noise levels to take; default: T = 1000, linear betas")
    export.add_argument("--num-epochs", type=whole(1), default=1, help="independent noises of each image (%(default)s)")
    export.add_argument("--seed", type=whole(0, None), default=0, help="of the noise (%(default)s)")
    _add_output(export, check_folder, required=True, help="new folder")
    _add_data_options(export)
    export.set_defaults(command=run_truncated_set)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="results.json as a table and an HTML file", allow_abbrev=False)
    report.add_argument("results", help="results.json, or the folder of a demo, study or comparison that holds it")
    _add_output(report, check_file, metavar="FILE", help="HTML file; default: report.html beside the results")
    report.add_argument("--json", action="store_true", help="print the results and write nothing")
    report.set_defaults(command=run_report)


def _add_card(commands: Any) -> None:
    card = commands.add_parser("card", help="write a run as the folder that goes to the Hub", allow_abbrev=False)
    card.add_argument("run", help="folder of a training run, or any saved pipeline")
    _add_output(card, check_folder, required=True, help="new folder")
    card.add_argument("--repo", metavar="USER/NAME", help="where it will be loaded from; default: the folder's name")
    _add_card_options(card)
    card.set_defaults(command=run_card)


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="push a run and its card to the Hub in one commit", allow_abbrev=False)
    push.add_argument("run", help="folder of a training run, a saved pipeline, or a folder that `card` wrote")
    push.add_argument("--repo", metavar="USER/NAME", required=True, help="repository, created where there is none")
    push.add_argument("--private", action="store_true", help="create it private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to; default: main")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="list what would go, without a connection")
    push.add_argument("--json", action="store_true", help="print JSON in place of the list")
    _add_card_options(push)
    push.set_defaults(command=run_push)


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("card")
    options.add_argument("--features", help="run of train_features.py that guides the pipeline")
    options.add_argument("--results", metavar="FILE", help="results.json of an evaluation, comparison or demo")
    options.add_argument("--arm", help="the arm of the results that is this pipeline")
    options.add_argument("--dtype", default="float32", help="of the stored weights: float32 or float16 (%(default)s)")
    options.add_argument(
        "--num-images", type=whole(0), default=64, help="pictures on the card, 0 for none (%(default)s)"
    )
    options.add_argument(
        "--num-inference-steps", type=whole(1), help="their denoising steps; default: the pipeline's own"
    )


def _add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="what a saved pipeline is made of", allow_abbrev=False)
    info.add_argument("pipeline", help="folder or Hub id of a saved pipeline")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=run_info)


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion", help="print a script that completes commands and options", allow_abbrev=False
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help='load it by: eval "$(… completion bash)"')
    completion.set_defaults(command=run_completion, make_parser=make_parser)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("sampling")
    options.add_argument("--features", help="run of train_features.py; guides any pipeline by its network and bank")
    options.add_argument("--num-inference-steps", type=whole(1), help="denoising steps; default: the pipeline's own")
    options.add_argument("--guidance-scale", type=number(0), help="strength of the guidance, 0 for none")
    options.add_argument("--num-guidance-steps", type=whole(0), help="how many steps are guided")
    options.add_argument("--guidance-start-step", type=whole(0), help="first guided step, from 0")
    options.add_argument("--seed-recipe", action="store_true", help="the original study's guidance; other options win")
    options.add_argument("--seed", type=whole(0, None), default=0, help="of the starting noise (%(default)s)")
    options.add_argument(
        "--batch-size", type=whole(1), help="images at once; default: what the memory holds, up to 1,000"
    )
    options.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: a GPU if there is one")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("data set")
    options.add_argument("--image-column", help="column of the images; default: image, or the only one there is")
    options.add_argument("--label-column", help="column of the class labels; default: label, or the class folders")
    options.add_argument("--image-size", type=int, help="resize and crop to this many pixels; default: as stored")
    options.add_argument("--channels", type=int, help="1 (grey) or 3 (RGB); default: as stored")


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("speed")
    options.add_argument(
        "--dtype", help="of the networks' products: float32, bfloat16 or float16; default: the launcher's, or float32"
    )
    options.add_argument("--channels-last", action="store_true", help="memory layout that many GPUs prefer")
    options.add_argument("--compile", action="store_true", help="torch.compile the denoiser: minutes once, then faster")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this command wrote there before, and nothing else"
    )


def _add_max_seconds(parser: argparse.ArgumentParser) -> None:
    """`--max-seconds` of a study, which is done in slices."""
    parser.add_argument(
        "--max-seconds", type=number(0, above=True), help="stop cleanly after this long; the same command goes on"
    )


def _add_output(parser: argparse.ArgumentParser, check: Callable[[str], Path], **options: Any) -> None:
    """`--output`, which is tried by `check` before the command begins."""
    parser.add_argument("--output", **options)
    parser.set_defaults(check_output=check)
