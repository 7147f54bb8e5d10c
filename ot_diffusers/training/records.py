"""Run logging: progress, losses, validation, sample grids, results, and the commands that come next."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from torch import Tensor
from tqdm.auto import tqdm

from ..config import DiffusionConfig, FeaturesConfig, OTConfig, TrainingConfig
from ..data import DATA_OPTIONS, HUB_IDS
from ..features import labels_of
from ..launch import preset_path, signals
from ..losses.denoising import denoising_loss
from ..models.semidiscrete_coupling import SemidiscreteCoupling
from ..pipelines.classes import Classes
from ..schedules import Scheduler
from ..seeds import keyed_generator, seeded_generator
from .averages import effective_rank
from .batches import Images, Schedule, draw_noise, noised_batch
from .checkpoints import TrainingState
from .coupling import coupled_images
from .files import write_json, write_text
from .folder import TENSORBOARD, check_claim
from .models import make_pipeline
from .processes import CONTINUE, OUT_OF_TIME, SIGNALLED, Agreement

logger = logging.getLogger(__name__)

COLLAPSED_RANK = 0.1
"""A warning is due where the effective rank of generated images is below this fraction of that of real images."""

SECONDS_BETWEEN_LINES = 30.0
GRID_COLUMNS, GRID_CLASSES = 6, 10


class Progress:
    """How far a run is: a bar on a terminal; a line every half minute where the output goes to a file."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.done, self.losses = total, done, ""
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (shown and on_terminal),
            desc="training",
            unit="step",
            mininterval=1.0,
        )
        self._in_lines = shown and not on_terminal
        self._first, self._started = done, time.monotonic()
        self._next_line = self._started + SECONDS_BETWEEN_LINES

    def update(self) -> None:
        """One training step more."""
        self.done += 1
        self._bar.update()
        if self._in_lines and time.monotonic() >= self._next_line:
            self._write_line()

    def show(self, losses: Mapping[str, float]) -> None:
        """The means of the last epoch. A loss of a single term is shown once."""
        terms = {name: value for name, value in losses.items() if name == "loss" or value != losses.get("loss")}
        self.losses = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        self._bar.set_postfix_str(self.losses)

    def close(self) -> None:
        """Leave the last state behind, on a line of its own."""
        if self._in_lines and self.done > self._first:
            self._write_line()
        self._in_lines = False
        self._bar.close()

    def _write_line(self) -> None:
        seconds = time.monotonic() - self._started
        left = seconds / (self.done - self._first) * (self.total - self.done)
        line = f"training step {self.done:,} of {self.total:,}, {tqdm.format_interval(seconds)} since the start"
        line += f", about {tqdm.format_interval(left)} left" if left else ""
        sys.stderr.write(f"{line}{'; ' if self.losses else ''}{self.losses}\n")
        sys.stderr.flush()
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES


class Record:
    """Losses of a run: means over `logging_steps` to the trackers, means over an epoch to `metrics.jsonl`; and whether
    the run should stop early."""

    def __init__(
        self, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, state: TrainingState
    ) -> None:
        self.config, self.schedule, self.accelerator, self.state = config, schedule, accelerator, state
        self.file = Path(config.output_dir) / "metrics.jsonl"
        self._agreement = Agreement(accelerator)
        self._warned = False
        self._keep_until(state.update)
        self._reopen_results()
        done = f", {state.update:,} of them done" if state.update else ""
        accelerator.print(
            f"training: {schedule.num_updates:,} steps of {schedule.global_batch_size:,} images{done}", flush=True
        )
        self.progress = Progress(schedule.num_updates, state.update, accelerator.is_main_process)
        signals.request.heeded = True

    def add(self, **values: Tensor) -> None:
        """Losses of one forward pass, 0-d tensors.

        Raises:
            TrainingError: at a record, where one of its values is not finite.
        """
        state, ends_update = self.state, self.accelerator.sync_gradients
        if ends_update and state.update_was_skipped:
            state.averages.forget(state.update)
        else:
            state.averages.add(state.update if ends_update else state.update + 1, values)
            if ends_update and state.gradient_norm is not None and self.accelerator.scaler is None:
                state.averages.add(state.update, {"gradient_norm": state.gradient_norm})
        if ends_update:
            self.progress.update()
            if state.update % self.config.logging_steps == 0:
                self._log()

    def compare_spread(self, generated: Tensor, real: Tensor) -> None:
        """At a record: the effective rank of generated rows [N, …] over that of as many real ones, as
        `effective_rank`. Where it stays small, generated images collapse, and a warning says so."""
        update = self.state.update + 1
        if self.accelerator.sync_gradients and update % self.config.logging_steps == 0:
            count = min(len(generated), len(real))
            ratio = effective_rank(generated[:count]) / effective_rank(real[:count])
            self.state.averages.add(update, {"effective_rank": ratio})

    def end_epoch(self, **values: float) -> None:
        """Append the epoch's means and `values` to `metrics.jsonl`."""
        self._log()
        update = self.state.update
        means = self.state.averages.end_epoch()
        record = {
            "epoch": self.schedule.epoch(update),
            "step": update,
            "seconds": round(self.state.seconds, 2),
            **means,
            **values,
        }
        self.accelerator.log({f"epoch/{name}": value for name, value in (means | values).items()}, step=update)
        if self.accelerator.is_main_process:
            check_claim(self.config)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._warn_of_collapse(means.get("effective_rank"))
        self.progress.show(means | values)

    def should_stop(self) -> bool:
        """Whether the processes agree to stop: after SIGTERM or SIGINT, or when `max_train_seconds` are over."""
        if self.state.update >= self.schedule.num_updates:
            return False
        agreed = self._agreement.on(_proposal(self.state, self.config))
        if agreed != CONTINUE:
            self.state.stopped_by = "a signal" if agreed == SIGNALLED else "max_train_seconds"
        return agreed != CONTINUE

    def close(self) -> None:
        """End the display of progress, so that what is printed next stands on a line of its own."""
        self.progress.close()

    def _log(self) -> None:
        means = self.state.averages.record(self.accelerator)
        if means:
            self.accelerator.log({f"train/{name}": value for name, value in means.items()}, step=self.state.update)

    def _warn_of_collapse(self, rank: float | None) -> None:
        # A model that has just begun makes one image of everything.
        begun = self.schedule.epoch(self.state.update) >= 2
        if rank is not None and rank < COLLAPSED_RANK and begun and not self._warned:
            self._warned = True
            logger.warning(
                "generated images collapse: their effective rank is %.1f%% of that of as many real images", 100 * rank
            )

    def _keep_until(self, update: int) -> None:
        """Drop the records of updates that a resumed run will repeat, and a line that was cut short."""
        if self.accelerator.is_main_process and self.file.is_file():
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= update]
            write_text(self.file, "".join(f"{line}\n" for line in kept))

    def _reopen_results(self) -> None:
        """Where updates are left, mark the results of an earlier end of the run as incomplete."""
        file = Path(self.config.output_dir) / "results.json"
        if self.accelerator.is_main_process and self.state.update < self.schedule.num_updates and file.is_file():
            results = json.loads(file.read_text(encoding="utf-8"))
            write_json(file, results | {"complete": False, "stopped_by": None})


def _step_of(line: str) -> float:
    """The update of a record; infinite where it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _proposal(state: TrainingState, config: TrainingConfig) -> int:
    """What this process proposes for the run after this update: to continue or to stop."""
    if signals.request.signal is not None:
        return SIGNALLED
    limit = config.max_train_seconds
    return OUT_OF_TIME if limit is not None and state.seconds_here > limit else CONTINUE


@contextmanager
def averaged_weights(state: TrainingState) -> Iterator[None]:
    """In the block, the model has its averaged weights; afterwards its own again."""
    if state.ema is None:
        yield
        return
    state.ema.store(state.model.parameters())
    state.ema.copy_to(state.model.parameters())
    try:
        yield
    finally:
        state.ema.restore(state.model.parameters())


def wants_grid(state: TrainingState, config: TrainingConfig) -> bool:
    """Whether there is time for a sample grid: the run has not been stopped, and nobody asks it to stop."""
    return state.stopped_by is None and _proposal(state, config) == CONTINUE


@torch.no_grad()
def validation_loss(
    state: TrainingState,
    images: Images,
    scheduler: Scheduler,
    config: DiffusionConfig,
    accelerator: Accelerator,
    coupling: SemidiscreteCoupling | None = None,
) -> float:
    """Denoising loss of the averaged weights on the first validation images, with noise that is the same at every
    epoch.

    A semi-discrete coupling pairs this noise with images of its own, which `images` then have to be: held-out images
    have no place in it. A model with classes is told every label.
    """
    count = config.num_validation_samples if coupling else min(config.num_validation_samples, len(images))
    generator = keyed_generator(accelerator.device, config.seed, "validation")
    noise, timesteps = draw_noise(count, torch.Size(images.image_shape), config, generator)
    labels = labels_of(images) if config.class_conditional else None
    asked: Tensor | None = None
    if coupling is not None and coupling.config.num_classes is not None:
        asked = labels_of(images)[torch.randint(len(images), (count,), generator=generator, device=noise.device).cpu()]
    own = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros(2, device=accelerator.device)
    model = accelerator.unwrap_model(state.model)  # processes may have unequal shares
    model.eval()
    with averaged_weights(state):
        for rows in own.split(config.train_batch_size) if len(own) else ():
            if coupling is not None:
                clean, indices = coupled_images(images, noise[rows], coupling, asked if asked is None else asked[rows])
            else:
                clean, indices = images.fetch(rows), rows
            clean = clean.to(accelerator.device)
            told = None if labels is None else labels[indices].to(accelerator.device)
            batch = noised_batch(clean, noise[rows], timesteps[rows], scheduler, rows, rows, state.update, told)
            output = model(batch.noisy, batch.timesteps, batch.class_labels).sample
            total += torch.stack([denoising_loss(output, batch.target) * len(rows), total.new_tensor(len(rows))])
    model.train()
    total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()


def save_sample_grid(
    state: TrainingState,
    scheduler: Scheduler,
    config: DiffusionConfig,
    accelerator: Accelerator,
    classes: Classes | None = None,
) -> None:
    """`samples/update-N.png`: 6 × 6 images with the averaged weights, or a row for each of the first 10 classes, from
    the same noise every time. There is none where the run is asked to stop, or where it trains on the end of the chain
    only."""
    if accelerator.is_main_process and config.max_timestep is None and wants_grid(state, config):
        check_claim(config)
        with averaged_weights(state):
            model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
            pipeline = make_pipeline(model.eval(), scheduler, classes=classes)
            pipeline.set_progress_bar_config(disable=True)
            generator = seeded_generator(config.seed)
            rows, labels = grid_rows(classes)
            call = {"generator": generator, "num_inference_steps": config.num_inference_steps}
            images = pipeline(rows * GRID_COLUMNS, **call, **labels).images
            model.train()
        write_grid(images, rows, f"update-{state.update:08d}", config, accelerator, state.update)
    accelerator.wait_for_everyone()


def write_grid(
    images: list[PIL.Image.Image],
    rows: int,
    name: str,
    config: TrainingConfig,
    accelerator: Accelerator,
    step: int = 0,
) -> None:
    """`samples/NAME.png`, which also goes to TensorBoard and to Weights & Biases as `samples`."""
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    grid = make_image_grid(images, rows, len(images) // rows)
    grid.save(folder / f"{name}.png")
    pixels = np.asarray(grid)[None]  # one image [1, H, W, 3]
    for tracker in accelerator.trackers:
        if tracker.name == TENSORBOARD:
            tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": list(pixels)}, step=step)


def grid_rows(classes: Classes | None) -> tuple[int, dict[str, Any]]:
    """Rows of `GRID_COLUMNS` images in a grid, and the argument of a pipeline's call that makes each a class."""
    if classes is None:
        return GRID_COLUMNS, {}
    rows = min(len(classes), GRID_CLASSES)
    return rows, {"class_labels": torch.arange(rows).repeat_interleave(GRID_COLUMNS)}


def save_results(
    state: TrainingState, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, **values: float
) -> None:
    """`results.json` of the run: its cost and its last records."""
    if accelerator.is_main_process:
        check_claim(config)
        folder = Path(config.output_dir)
        metrics = folder / "metrics.jsonl"  # absent where the time was over within the first epoch
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        results = {
            "updates": state.update,
            "complete": state.update >= schedule.num_updates,
            "stopped_by": state.stopped_by,
            "skipped_updates": state.skipped_updates,
            "training_seconds": round(state.seconds, 2),
            "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "last_epoch": json.loads(lines[-1]) if lines else None,
            **values,
        }
        write_json(folder / "results.json", results)
    accelerator.wait_for_everyone()
    if state.stopped_by is None:
        accelerator.print(f"everything is saved in {config.output_dir}", flush=True)
        return
    latest = "" if config.resume_from_checkpoint == "latest" else " with resume_from_checkpoint=latest"
    accelerator.print(
        f"stopped by {state.stopped_by} after training step {state.update:,} of {schedule.num_updates:,}; everything "
        f"is saved in {config.output_dir}; rerun the same command{latest} to resume",
        flush=True,
    )


def end_run(config: TrainingConfig, accelerator: Accelerator, stopped_by: str | None = None) -> None:
    """Close the trackers; after a complete run, print the commands that come next."""
    if stopped_by is None:
        accelerator.print("\n  ".join(["next:", *next_commands(config)]), flush=True)
    accelerator.end_training()


def next_commands(config: TrainingConfig) -> list[str]:
    """Command lines that use a finished run, ready for a shell.

    Example:
        >>> from ot_diffusers.config import BaselineConfig
        >>> for command in next_commands(BaselineConfig(dataset="a/photos", image_size=32)):
        ...     print(command)
        ot-diffusers sample runs/baseline --output runs/baseline-images
        ot-diffusers evaluate runs/baseline --dataset a/photos --image-size 32 --evaluator efficientnet-lite0
    """
    run, dataset = config.output_dir, config.dataset
    given = [(name, getattr(config, name)) for name in DATA_OPTIONS if getattr(config, name) is not None]
    keys = [f"{name}={value}" for name, value in [("dataset", dataset), *given]]
    flags = ["--dataset", dataset, *(word for name, value in given for word in (f"--{name.replace('_', '-')}", value))]
    has_presets = dataset in HUB_IDS
    if isinstance(config, FeaturesConfig):
        if config.architecture == "residual":
            commands = [["stress", *flags, "--evaluator", run, "--output", f"{run}-stress"]]
        else:
            preset = f"{dataset}/ot.yaml"
            options = ["--config", preset] if has_presets and preset_path(preset).is_file() else []
            commands = [["train", "ot", *options, f"feature_extractor={run}", *keys]]
    elif isinstance(config, DiffusionConfig) and config.max_timestep is not None:
        commands = [["train", "prior", "prior=gaussian", f"denoiser={run}", *keys]]
    else:
        commands = [["sample", run, "--output", f"{run}-images"]]
        evaluator = "efficientnet-lite0"
        if has_presets:
            evaluator = f"{run}-evaluator" if given else f"runs/{dataset}/evaluator"
            options = [*keys, f"output_dir={evaluator}"] if given else []
            commands += [["train", "features", "--config", f"{dataset}/evaluator.yaml", *options]]
        commands += [["evaluate", run, *flags, "--evaluator", evaluator]]
        if isinstance(config, OTConfig) and config.prediction_type != "epsilon":
            tuned = [f"pretrained={run}", f"feature_extractor={config.feature_extractor}"]
            commands += [["train", "few_step", *tuned, *keys]]
    return [shlex.join(["ot-diffusers", *map(str, command)]) for command in commands]
