"""The command line: `ot-diffusers demo | train | sample | evaluate | compare | report | push | info | …`.

Nothing heavy is imported before it is needed, so that `--help` answers at once. Bad input is one line on stderr and
exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .config import describe
from .errors import InputError, require
from .launch import SCRIPTS, run_command, training_command

SAMPLING_ARGUMENTS = ("num_inference_steps", "guidance_scale", "num_guidance_steps", "guidance_start_step")
"""Options that are passed on to the pipeline's call where they are given."""

EVALUATOR_HELP = "network that no loss has seen: folder, Hub id, or a name such as inception-v3-compat"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        arguments, unknown = make_parser().parse_known_args(argv)
        if unknown and arguments.command not in (run_train, run_compare, run_truncation):
            raise InputError(f"unknown argument {unknown[0]!r}; see `ot-diffusers {arguments.name} --help`")
        return arguments.command(arguments, unknown)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


# --- Arguments --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports errors like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="ot-diffusers", description="Optimal transport in diffusion models.", allow_abbrev=False)
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
        script.set_defaults(command=run_train)


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
    compare.set_defaults(command=run_compare)


def _add_track(commands: Any) -> None:
    track = commands.add_parser("track", help="distances to real images along training runs", allow_abbrev=False)
    track.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folder of a train_baseline.py or train_ot.py run")
    track.add_argument("--dataset", required=True, help="real images: digits, mnist, cifar10, a Hub id or a folder")
    track.add_argument("--evaluator", required=True, help=EVALUATOR_HELP)
    track.add_argument("--num-samples", type=int, help="images of each checkpoint; default: as the smaller real split")
    track.add_argument(
        "--output", default="runs/tracking", help="folder for report.html and tracking.json (%(default)s)"
    )
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
    stress.set_defaults(command=run_stress)


def _add_truncation(commands: Any) -> None:
    truncation = commands.add_parser(
        "truncation",
        help="train, sample and compare the priors of the truncated chain",
        usage="ot-diffusers truncation [--config FILE] [key=value ...]",
        allow_abbrev=False,
    )
    truncation.add_argument("--config", metavar="FILE", help="YAML file, or a preset such as digits/truncation.yaml")
    truncation.set_defaults(command=run_truncation)


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


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("speed")
    options.add_argument(
        "--dtype", default="float32", help="of the networks' products: float32, bfloat16 or float16 (%(default)s)"
    )
    options.add_argument("--channels-last", action="store_true", help="memory layout that many GPUs prefer")
    options.add_argument("--compile", action="store_true", help="torch.compile the denoiser: minutes once, then faster")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="allow an output that exists")


# --- Commands ---------------------------------------------------------------------------------------------------------


def run_demo(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Everything on digits."""
    _stop_on_sigterm()
    _prepare_libraries()
    from .demo import run_demo as run

    run(arguments.output, seed=arguments.seed)
    return 0


def run_train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check the configuration here, then hand over to the script; its exit status is ours."""
    command = training_command(
        arguments.script,
        overrides,
        config=arguments.config,
        num_processes=arguments.num_processes,
        accelerate_config=arguments.accelerate_config,
    )
    return run_command(command)


def run_compare(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """Arms over paired seeds; exit status 3 where the time was over before all seeds were done."""
    words = [*arguments.arms, *unknown]
    options = [word for word in words if word.startswith("-")]
    require(not options, "arms", "be pipelines, names or key=value", "".join(options[:1]))
    names = [word for word in words if "=" not in word or Path(word).exists()]
    given = {name: getattr(arguments, name) for name in ("dataset", "evaluator", "seeds", "num_samples")}
    given["output_dir"] = arguments.output
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    overrides += [word for word in words if word not in names]
    _stop_on_sigterm()
    _prepare_libraries()
    from .comparison import choose_arms, read_config, run_comparison

    config = read_config(arguments.config, overrides, arguments.num_inference_steps)
    results = run_comparison(choose_arms(config, names) if names else config, max_seconds=arguments.max_seconds)
    return 0 if results["complete"] else 3


def run_track(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Every checkpoint of the runs, in one report."""
    _prepare_libraries()
    from .evaluation.tracking import track_runs

    output = Path(arguments.output)
    track_runs(
        _named_folders(arguments.runs),
        output,
        dataset=arguments.dataset,
        evaluator=arguments.evaluator,
        num_samples=arguments.num_samples,
        features=arguments.features,
        call=_call_arguments(arguments),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=_device(arguments.device),
    )
    print(output / "report.html")
    return 0


def _named_folders(runs: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` as it says; a folder alone by its name, or by its whole path where two have one name."""
    pairs = [run.partition("=") if "=" in run and not Path(run).exists() else ("", "", run) for run in runs]
    names = [name or Path(folder).name for name, _, folder in pairs]
    if len(set(names)) < len(names):
        names = [name or folder for name, _, folder in pairs]
    require(len(set(names)) == len(names), "runs", "be different", list(runs))
    return {name: Path(folder) for name, (_, _, folder) in zip(names, pairs, strict=True)}


def run_stress(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Damaged real images under every metric."""
    _prepare_libraries()
    from .stress_study import run_stress_study

    run_stress_study(
        arguments.dataset,
        arguments.evaluator,
        Path(arguments.output),
        num_samples=arguments.num_samples,
        repeats=arguments.repeats,
        seed=arguments.seed,
        device=_device(arguments.device),
    )
    return 0


def run_truncated_set(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """x_T' of every image of a split, as parquet files."""
    _prepare_libraries()
    from diffusers import DDPMScheduler

    from .data import load_images
    from .sampling import load_pipeline
    from .schedules import truncated_scheduler
    from .truncated_set import export_truncated_set

    full = load_pipeline(arguments.denoiser).scheduler if arguments.denoiser else DDPMScheduler()
    scheduler = truncated_scheduler(full, arguments.truncation_timestep)
    images = load_images(arguments.dataset, arguments.split)
    options = {"num_epochs": arguments.num_epochs, "seed": arguments.seed}
    print(export_truncated_set(images, scheduler, arguments.output, **options))
    return 0


def run_truncation(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The study of priors."""
    _stop_on_sigterm()
    _prepare_libraries()
    from .config import load_config
    from .launch import preset_path
    from .truncation_study import TruncationConfig, run_study

    preset = ["--config", str(preset_path(arguments.config))] if arguments.config else []
    run_study(load_config(TruncationConfig, [*preset, *overrides]))
    return 0


def run_sample(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Images of a pipeline into a folder."""
    require(arguments.num_images >= 1, "num_images", "be at least 1", arguments.num_images)
    output = Path(arguments.output)
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    allowed = empty or (arguments.overwrite and output.is_dir())
    require(allowed, "output", "be a new or empty folder without --overwrite", arguments.output)
    _prepare_libraries()
    from .sampling import network_calls, save_images

    started = time.monotonic()
    pipeline, images = _sample(arguments, arguments.pipeline, arguments.num_images)
    seconds = round(time.monotonic() - started, 2)
    if _is_main_process():
        grid = save_images(images, output)
        cost = {"num_images": len(images), "nfe": network_calls(pipeline), "seconds": seconds}
        print(json.dumps({"output": str(output), "grid": str(grid), **cost}, indent=2) if arguments.json else grid)
    return 0


def run_evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Metrics of generated images against the test split, beside those of real images."""
    output = Path(arguments.output) if arguments.output else None
    free = output is None or not output.exists() or (arguments.overwrite and output.is_file())
    require(free, "output", "be a new file without --overwrite", arguments.output)
    requested = arguments.num_samples
    require(requested is None or requested >= 2, "num_samples", "be at least 2", requested)
    _prepare_libraries()
    results = _evaluate(arguments)
    if results is None:
        return 0
    text = json.dumps(results, indent=2, ensure_ascii=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.{os.getpid()}")
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.replace(output)
    from .evaluation.report import text_table

    print(text if arguments.json else text_table(results))
    return 0


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The contents of `results.json` for one arm; None in a process that helped to sample only."""
    from .evaluation.evaluate import evaluate_images, real_floor
    from .evaluation.extractors import evaluator_facts, load_evaluator, load_real_images
    from .evaluation.page import provenance
    from .experiment import sample_count

    evaluator = load_evaluator(arguments.evaluator).to(_device(arguments.device))
    train, test = (load_real_images(arguments.dataset, split, evaluator) for split in ("train", "test"))
    count = sample_count(arguments.num_samples, len(train), len(test))
    images, cost = _images_to_evaluate(arguments, count, train.image_shape[0])
    if not _is_main_process():
        return None

    reference, training = _describe(test, evaluator), _describe(train, evaluator)
    metrics = evaluate_images(images, reference=reference, extractor=evaluator, train=training)
    floor = real_floor(reference, training, len(images), extractor=evaluator)
    sampling = _call_arguments(arguments)
    return {
        "title": f"{arguments.images} against {arguments.dataset}",
        "dataset": arguments.dataset,
        "num_samples": len(images),
        "extractor": evaluator_facts(evaluator, reference.features.shape[1]),
        "arms": {Path(arguments.images).name: {"metrics": metrics, **cost}},
        "floor": {"metrics": floor},
        "provenance": provenance() | {"seed": arguments.seed, "dtype": arguments.dtype, "sampling": sampling},
    }


def _images_to_evaluate(arguments: argparse.Namespace, count: int, channels: int) -> tuple[Any, dict[str, Any]]:
    """uint8 images [N, C, H, W], read or sampled, and what sampling them cost."""
    from .sampling import network_calls, read_images

    folder = Path(arguments.images).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        images = read_images(folder, channels)
        enough = arguments.num_samples is None or count <= len(images)
        require(enough, "num_samples", f"be at most {len(images)}, the images in the folder", count)
        return images[:count], {}
    started = time.monotonic()
    pipeline, images = _sample(arguments, arguments.images, count)
    return images, {"nfe": network_calls(pipeline), "seconds": round(time.monotonic() - started, 2)}


def _describe(images: Any, evaluator: Any) -> Any:
    """All images of a split and their features."""
    from .data import pixels_of
    from .evaluation.evaluate import describe_images

    return describe_images(pixels_of(images), evaluator, cache=True)


def _sample(arguments: argparse.Namespace, pipeline: str, num_images: int) -> tuple[Any, Any]:
    """The loaded pipeline and its images."""
    from .sampling import accelerate_networks, load_pipeline, sample_images

    device = _device(arguments.device)
    loaded = load_pipeline(pipeline, arguments.features).to(device)
    accelerate_networks(loaded, channels_last=arguments.channels_last, compile=arguments.compile)
    options = {name: getattr(arguments, name) for name in ("batch_size", "seed", "dtype")}
    return loaded, sample_images(loaded, num_images, **options, **_call_arguments(arguments))


def run_report(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Results as a table and an HTML file."""
    _prepare_libraries()
    from .commands import report

    return _print(report(arguments))


def run_card(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """A run as a folder for the Hub."""
    _prepare_libraries()
    from .commands import card

    return _print(card(arguments))


def run_push(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """A run to the Hub."""
    _prepare_libraries()
    from .commands import push

    return _print(push(arguments))


def run_info(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """The parts of a pipeline."""
    _prepare_libraries()
    from .commands import info

    return _print(info(arguments))


def run_completion(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """A shell's completion script."""
    from .commands import completion

    return _print(completion(make_parser(), arguments.shell))


def _print(lines: Sequence[str]) -> int:
    for line in lines:
        print(line)
    return 0


def _call_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call: the recipe, if asked for, and what the user gave."""
    given = {name: getattr(arguments, name) for name in SAMPLING_ARGUMENTS if getattr(arguments, name) is not None}
    if not arguments.seed_recipe:
        return given
    from .pipelines.pipeline_ot_guided_ddim import SEED_GUIDANCE

    return SEED_GUIDANCE | given


def _is_main_process() -> bool:
    """Whether this process reports, where accelerate has launched several."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _device(name: str | None) -> Any:
    """The named device, or accelerate's choice for this process."""
    import torch
    from accelerate import PartialState

    if name is None:
        return PartialState().device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"`device` must be a device of this machine, such as cpu or cuda, got {name!r}") from error


def _stop_on_sigterm() -> None:
    """End like an interrupt: the scripts that were started are stopped too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _prepare_libraries() -> None:
    """Settings that must be made before the libraries underneath are imported, and no bars but our own."""
    # Waiting threads that spin take the core from whoever works.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from diffusers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
