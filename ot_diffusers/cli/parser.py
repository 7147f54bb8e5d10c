"""The parser of all commands. Their modules import nothing heavy before they run, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..config import describe
from ..errors import InputError
from ..launch import SCRIPTS
from .images import run_evaluate, run_sample
from .publishing import run_card, run_completion, run_info, run_push, run_report
from .studies import run_compare, run_demo, run_stress, run_track, run_train, run_truncated_set, run_truncation

EVALUATOR_HELP = "network that no loss has seen: folder, Hub id, or a name such as inception-v3-compat"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports errors like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="ot-diffusers", description="Optimal transport in diffusion models.", allow_abbrev=False)
    parser.set_defaults(takes_overrides=False)
    commands = parser.add_subparsers(title="commands", dest="name", metavar="COMMAND", required=True)
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
    demo.add_argument("--output", default="runs/demo", help="folder for everything, report.html among it (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the models and of the starting noise (%(default)s)")
    demo.set_defaults(command=run_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="run a training script, on one process or several", allow_abbrev=False)
    scripts = train.add_subparsers(title="scripts", dest="script", metavar="SCRIPT", required=True)
    for name, (file, config_class) in SCRIPTS.items():
        script = scripts.add_parser(
            name,
            help=file,
            usage=f"ot-diffusers train {name} [--config FILE] [key=value ...]",
            epilog=f"keys and their defaults:\n{describe(config_class)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        script.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as mnist/ot.yaml")
        script.add_argument("--accelerate-config", metavar="FILE", help="file of `accelerate config`")
        script.add_argument("--num-processes", type=int, default=1, help="on this machine (%(default)s)")
        script.set_defaults(command=run_train, takes_overrides=True)


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser("sample", help="write images and a grid from a saved pipeline", allow_abbrev=False)
    sample.add_argument("pipeline", help="folder or Hub id of a saved pipeline")
    sample.add_argument("--num-images", type=int, default=64, help="how many (%(default)s)")
    sample.add_argument("--output", default="runs/samples", help="folder for 00000.png … and grid.png (%(default)s)")
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
    evaluate.add_argument("--num-samples", type=int, help="how many images; default: as many as there are test images")
    evaluate.add_argument("--output", metavar="FILE", help="write results.json here")
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
        allow_abbrev=False,
    )
    compare.add_argument("arms", nargs="*", metavar="ARM", help="saved pipelines, or names of arms in the YAML file")
    compare.add_argument("--config", metavar="FILE", help="YAML file of arms, or a preset such as digits/compare.yaml")
    compare.add_argument("--dataset", help="real images: digits, mnist, cifar10, a Hub id or a folder")
    compare.add_argument("--evaluator", help=f"{EVALUATOR_HELP}; or a preset to train once")
    compare.add_argument("--seeds", help="how many seeds (5)")
    compare.add_argument("--num-samples", help="images of each arm and seed; default: as many as there are test images")
    compare.add_argument("--num-inference-steps", type=int, help="denoising steps; default: each pipeline's own")
    compare.add_argument("--output", help="folder for everything, report.html among it (runs/comparison)")
    compare.add_argument("--max-seconds", type=float, help="stop cleanly after this long; the same command goes on")
    compare.set_defaults(command=run_compare, takes_overrides=True)


def _add_track(commands: Any) -> None:
    track = commands.add_parser("track", help="distances to real images along training runs", allow_abbrev=False)
    track.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folder of a train_baseline.py or train_ot.py run")
    track.add_argument("--dataset", required=True, help="real images: digits, mnist, cifar10, a Hub id or a folder")
    track.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    track.add_argument("--num-samples", type=int, help="images of each checkpoint; default: as the smaller real split")
    track.add_argument(
        "--output", default="runs/tracking", help="folder for report.html and tracking.json (%(default)s)"
    )
    _add_data_options(track)
    _add_sampling_options(track)
    track.set_defaults(command=run_track)


def _add_stress(commands: Any) -> None:
    stress = commands.add_parser("stress", help="do the metrics see what they should?", allow_abbrev=False)
    stress.add_argument("--dataset", required=True, help="real images with labels: digits, mnist, cifar10, a Hub id, …")
    stress.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    stress.add_argument("--num-samples", type=int, default=1000, help="images damaged, at most (%(default)s)")
    stress.add_argument("--repeats", type=int, default=3, help="draws of each damage, for intervals (%(default)s)")
    stress.add_argument(
        "--output", default="runs/stress", help="folder for report.html, stress.json, pictures (%(default)s)"
    )
    stress.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    stress.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: a GPU if there is one")
    _add_data_options(stress)
    stress.set_defaults(command=run_stress)


def _add_truncation(commands: Any) -> None:
    truncation = commands.add_parser(
        "truncation",
        help="train, sample and compare the priors of the truncated chain",
        usage="ot-diffusers truncation [--config FILE] [key=value ...]",
        allow_abbrev=False,
    )
    truncation.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as digits/truncation.yaml")
    truncation.set_defaults(command=run_truncation, takes_overrides=True)


def _add_truncated_set(commands: Any) -> None:
    export = commands.add_parser(
        "truncated-set", help="write real images diffused to step T' as a data set", allow_abbrev=False
    )
    export.add_argument("--dataset", required=True, help="digits, mnist, cifar10, a Hub id or a folder")
    export.add_argument("--split", default="train", help="train, validation or test (%(default)s)")
    export.add_argument("--truncation-timestep", type=int, default=10, help="T' (%(default)s)")
    export.add_argument("--denoiser", help="pipeline whose noise levels to take; default: T = 1000, linear betas")
    export.add_argument("--num-epochs", type=int, default=1, help="independent noises of each image (%(default)s)")
    export.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    export.add_argument("--output", required=True, help="new folder")
    _add_data_options(export)
    export.set_defaults(command=run_truncated_set)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="results.json as a table and an HTML file", allow_abbrev=False)
    report.add_argument("results", help="results.json, or the folder of a demo, study or comparison that holds it")
    report.add_argument("--output", metavar="FILE", help="HTML file; default: report.html beside the results")
    report.add_argument("--json", action="store_true", help="print the results and write nothing")
    report.set_defaults(command=run_report)


def _add_card(commands: Any) -> None:
    card = commands.add_parser("card", help="write a run as the folder that goes to the Hub", allow_abbrev=False)
    card.add_argument("run", help="folder of a training run, or any saved pipeline")
    card.add_argument("--output", required=True, help="new folder")
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
    options.add_argument("--num-images", type=int, default=64, help="pictures on the card, 0 for none (%(default)s)")
    options.add_argument("--num-inference-steps", type=int, help="their denoising steps; default: the pipeline's own")


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
    completion.set_defaults(command=run_completion)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("sampling")
    options.add_argument("--features", help="run of train_features.py; guides any pipeline by its network and bank")
    options.add_argument("--num-inference-steps", type=int, help="denoising steps; default: the pipeline's own")
    options.add_argument("--guidance-scale", type=float, help="strength of the guidance, 0 for none")
    options.add_argument("--num-guidance-steps", type=int, help="how many steps are guided")
    options.add_argument("--guidance-start-step", type=int, help="first guided step, from 0")
    options.add_argument("--seed-recipe", action="store_true", help="the source study's guidance; other options win")
    options.add_argument("--seed", type=int, default=0, help="of the starting noise (%(default)s)")
    options.add_argument("--batch-size", type=int, help="images at once; default: what the memory holds, up to 1,000")
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
        "--dtype", default="float32", help="of the networks' products: float32, bfloat16 or float16 (%(default)s)"
    )
    options.add_argument("--channels-last", action="store_true", help="memory layout that many GPUs prefer")
    options.add_argument("--compile", action="store_true", help="torch.compile the denoiser: minutes once, then faster")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="allow an output that exists")
