"""What the training scripts share: the run's folder, the order of the data and the noise, checkpoints, records, sample
grids.

Randomness is a function of (seed, update) alone. One update sees one *global* batch of G = processes × accumulation ×
`train_batch_size` images, with one draw of noise and timesteps for all G; a process takes its rows of it. So the number
of processes and of accumulation steps changes who computes what, not what is computed, and a resumed run needs no state
of any generator.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .config import BaselineConfig, TrainingConfig
from .data import ResidentImages, StreamedImages, load_images, training_order
from .errors import InputError, require
from .losses import denoising_loss
from .schedules import alpha_sigma, training_target
from .seeds import key, keyed_generator

Images = ResidentImages | StreamedImages

# Options that may change when a run goes on; any other difference makes it another run.
RESUMABLE = {
    "max_train_seconds",
    "max_train_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "num_workers",
    "report_to",
    "output_dir",
}


# --- The run's folder -------------------------------------------------------------------------------------------------


def check_output_dir(config: TrainingConfig) -> None:
    """Refuse a folder that holds something else than this run, before anything is written.

    Raises:
        InputError: naming the option that differs from the run in the folder.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        complete = (Path(config.resume_from_checkpoint) / "state.json").is_file()
        require(
            complete,
            "resume_from_checkpoint",
            "be latest, none or a checkpoint's folder",
            config.resume_from_checkpoint,
        )
    folder = Path(config.output_dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    require(folder.is_dir(), "output_dir", "be a folder", config.output_dir)
    record = folder / "run.json"
    require(record.is_file(), "output_dir", "be empty or hold a run of this script", config.output_dir)
    require(
        config.resume_from_checkpoint is not None,
        "output_dir",
        "be empty with resume_from_checkpoint=none",
        config.output_dir,
    )
    earlier, now = json.loads(record.read_text(encoding="utf-8"))["config"], _as_json(config)
    for name in sorted((earlier.keys() | now.keys()) - RESUMABLE):
        if earlier.get(name) != now.get(name):
            raise InputError(
                f"`output_dir` must be empty or hold this run, got {config.output_dir!r}, which holds a run with "
                f"{name}={earlier.get(name)!r} instead of {now.get(name)!r}"
            )


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """An accelerator for the configuration, with the random seed set alike on every process.

    Raises:
        InputError: a tracker that is not installed.
    """
    tracker = None if config.report_to == "none" else config.report_to
    installed = [str(name) for name in get_available_trackers()]
    known = tracker is None or tracker in installed
    require(known, "report_to", f"be none or an installed tracker ({', '.join(installed)})", config.report_to)
    # Without a GPU, accelerate joins a process group only where it is told to use the CPU.
    in_group = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(
        cpu=in_group and not (torch.cuda.is_available() or torch.xpu.is_available()),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_dir=str(Path(config.output_dir) / "logs") if tracker else None,
    )
    set_seed(config.seed)
    return accelerator


def open_run(config: TrainingConfig, accelerator: Accelerator, images: Images) -> None:
    """Create the folder, write `run.json`, start the trackers; the last place where a run can be refused.

    Raises:
        InputError: the folder holds a run on other images.
    """
    folder = Path(config.output_dir)
    before = _read_json(folder / "run.json").get("data", {}).get("fingerprint", images.fingerprint)
    require(before == images.fingerprint, "dataset", "hold the images that the run began with", config.dataset)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "script": type(config).__doc__,
            "config": _as_json(config),
            "data": {"name": images.name, "fingerprint": images.fingerprint, "num_samples": len(images)},
            "num_processes": accelerator.num_processes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_json(folder / "run.json", record)
    accelerator.wait_for_everyone()
    flat = {key: str(value) if isinstance(value, list) else value for key, value in _as_json(config).items()}
    accelerator.init_trackers("ot_diffusers", config={key: value for key, value in flat.items() if value is not None})


def _as_json(config: TrainingConfig) -> dict[str, Any]:
    """The configuration as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_json(file: Path) -> dict[str, Any]:
    """Its content; empty where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_json(file: Path, content: Any) -> None:
    """Write aside, then rename, so that a reader never meets half a file."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def load_split(config: TrainingConfig, split: str, accelerator: Accelerator) -> Images:
    """One split of the configured data set, on the training device if it is small enough to be held decoded."""
    images = load_images(
        config.dataset,
        split,
        image_column=config.image_column,
        label_column=config.label_column,
        image_size=config.image_size,
        channels=config.channels,
    )
    return images.to(accelerator.device)


# --- Models -----------------------------------------------------------------------------------------------------------


def make_unet(config: BaselineConfig, image_shape: tuple[int, int, int]) -> UNet2DModel:
    """A `UNet2DModel` for images of `image_shape` (C, H, W)."""
    channels, height, width = image_shape
    levels = len(config.block_out_channels)
    require(height == width, "image_size", "be given for images that are not square", image_shape)
    divisor = 2 ** (levels - 1)
    require(
        height % divisor == 0, "image_size", f"be a multiple of {divisor} for a UNet of {levels} resolutions", height
    )
    known = all(0 <= level < levels for level in config.attention_levels)
    require(known, "attention_levels", f"lie in 0 … {levels - 1} for {levels} resolutions", config.attention_levels)
    attention = [level in config.attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attention),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attention)),
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        add_attention=bool(config.attention_levels),
    )


def make_noise_scheduler(config: BaselineConfig) -> DDPMScheduler:
    """The noising chain."""
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
    )


def make_optimizer(config: TrainingConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )


# --- Data order and noise ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How long a run is: updates per epoch and in all, and the images in one update over all processes."""

    global_batch_size: int
    updates_per_epoch: int
    num_updates: int

    def epoch(self, update: int) -> int:
        """Completed epochs after `update` updates."""
        return update // self.updates_per_epoch

    def ends_epoch(self, update: int) -> bool:
        """Whether `update` updates complete an epoch, or the run."""
        return update % self.updates_per_epoch == 0 or update == self.num_updates

    def wants_checkpoint(self, update: int, config: TrainingConfig) -> bool:
        """Whether to save on the way; the end of the run saves in any case."""
        return update < self.num_updates and update % (config.checkpointing_steps or self.updates_per_epoch) == 0


def plan(config: TrainingConfig, accelerator: Accelerator, images: Images) -> Schedule:
    """The length of the run.

    Raises:
        InputError: a global batch larger than the data set.
    """
    size = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    require(size <= len(images), "train_batch_size", f"give a global batch of at most {len(images)} images", size)
    updates_per_epoch = len(images) // size
    return Schedule(size, updates_per_epoch, config.max_train_steps or config.num_train_epochs * updates_per_epoch)


@dataclass(frozen=True)
class DiffusionBatch:
    """A process' rows of a global batch, noised.

    Attributes:
        indices: [B] rows of the data set.
        global_indices: [G] rows that any process sees in this update.
        noisy: x_t, [B, C, H, W].
        timesteps: [B].
        target: what the model should predict, [B, C, H, W].
        alpha, sigma: [B], noise level.
        update: number of the update, from 0.
    """

    indices: Tensor
    global_indices: Tensor
    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    alpha: Tensor
    sigma: Tensor
    update: int


def index_batches(
    images: Images, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, start: int
) -> Iterator[tuple[int, Tensor, slice]]:
    """(update, global indices [G], this process' rows of them) for each forward pass from update `start` on."""
    size = config.train_batch_size
    order = training_order(len(images), schedule.global_batch_size, seed=config.seed, start=start)
    for update, global_indices in zip(range(start, schedule.num_updates), order, strict=False):
        for micro in range(config.gradient_accumulation_steps):
            first = (micro * accelerator.num_processes + accelerator.process_index) * size
            yield update, global_indices, slice(first, first + size)


def image_batches(
    images: Images, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, start: int
) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """As `index_batches`, with the images, [B, C, H, W] in [-1, 1] on the training device."""
    wanted = index_batches(images, config, schedule, accelerator, start)
    rows = (indices[part] for _, indices, part in index_batches(images, config, schedule, accelerator, start))
    for (update, indices, part), (_, clean) in zip(wanted, images.stream(rows, config.num_workers), strict=True):
        yield update, indices, part, clean.to(accelerator.device, non_blocking=True)


def diffusion_batches(
    images: Images,
    scheduler: DDPMScheduler,
    config: BaselineConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    start: int = 0,
) -> Iterator[DiffusionBatch]:
    """Noised batches from update `start` on, the same for any split of the global batch over processes and
    accumulation."""
    for update, indices, part, clean in image_batches(images, config, schedule, accelerator, start):
        generator = keyed_generator(accelerator.device, config.seed, "noise", update)
        noise, timesteps = draw_noise(len(indices), clean.shape[1:], config, generator)
        torch.manual_seed(key(config.seed, "dropout", update, part.start))
        yield noised_batch(clean, noise[part], timesteps[part], scheduler, indices, indices[part], update)


def noised_batch(
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
    global_indices: Tensor,
    indices: Tensor,
    update: int,
) -> DiffusionBatch:
    """x_t = α_t x0 + σ_t ε and the target of the scheduler's prediction type."""
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    target = training_target(clean, noise, alpha, sigma, scheduler.config.prediction_type)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    return DiffusionBatch(indices, global_indices, noisy, timesteps, target, alpha, sigma, update)


def draw_noise(
    num_samples: int, image_shape: torch.Size, config: BaselineConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ε [N, C, H, W] and timesteps [N], uniform or quadratic, on the generator's device."""
    device = generator.device
    noise = torch.randn((num_samples, *image_shape), generator=generator, device=device)
    uniform = torch.rand(num_samples, generator=generator, device=device)
    position = uniform**2 if config.timestep_sampler == "quadratic" else uniform
    length = config.max_timestep or config.num_train_timesteps
    return noise, (position * length).long().clamp(max=length - 1)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """All that changes during training, saved as safetensors and JSON only.

    Attributes:
        model: the prepared model.
        optimizer: the prepared optimizer.
        lr_scheduler: stepped once per update.
        ema: average of the model's parameters, None where a script keeps none.
        update: updates done.
        earlier_seconds: training time before this process took over.
    """

    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel | None = None
    update: int = 0
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_here(self) -> float:
        """Training time of this process."""
        return time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        """Training time of the whole run."""
        return self.earlier_seconds + self.seconds_here

    @classmethod
    def prepare(
        cls,
        accelerator: Accelerator,
        model: torch.nn.Module,
        config: TrainingConfig,
        schedule: Schedule,
        ema: EMAModel | None,
    ) -> TrainingState:
        """Optimizer and learning-rate schedule for `model`, prepared by the accelerator."""
        optimizer = make_optimizer(config, model)
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=schedule.num_updates,
        )
        model, optimizer = accelerator.prepare(model, optimizer)
        if ema is not None:
            ema.to(accelerator.device)
        return cls(model, optimizer, lr_scheduler, ema)

    def backward(self, accelerator: Accelerator, loss: Tensor, max_grad_norm: float) -> None:
        """Backward pass and, where the accumulation is complete, one update."""
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.lr_scheduler.step()
            self.update += 1
            if self.ema is not None:
                self.ema.step(self.model.parameters())

    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Write the state into `folder`, aside first and renamed when complete."""
        if not accelerator.is_main_process:
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / "model.safetensors"
        )
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{name}": value for index, entry in optimizer["state"].items() for name, value in entry.items()
        }
        save_file(moments, partial / "optimizer.safetensors")
        if self.ema is not None:
            shadow = {str(index): tensor.contiguous() for index, tensor in enumerate(self.ema.shadow_params)}
            save_file(shadow, partial / "ema.safetensors")
        record = {
            "update": self.update,
            "seconds": self.seconds,
            "param_groups": optimizer["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        write_json(partial / "state.json", record)
        if folder.exists():  # moved away first: a folder that is half deleted would pass for a checkpoint
            discarded = folder.with_name(f".{folder.name}.discarded")
            shutil.rmtree(discarded, ignore_errors=True)
            os.replace(folder, discarded)
            shutil.rmtree(discarded)
        os.replace(partial, folder)

    def load(self, folder: Path, accelerator: Accelerator) -> None:
        """Take up the state saved in `folder`."""
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        accelerator.unwrap_model(self.model, keep_torch_compile=False).load_state_dict(
            load_file(folder / "model.safetensors")
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
        self.lr_scheduler.load_state_dict(record["lr_scheduler"])
        if self.ema is not None:
            shadow = load_file(folder / "ema.safetensors", device=str(accelerator.device))
            self.ema.shadow_params = [shadow[str(index)] for index in range(len(shadow))]
            self.ema.optimization_step = record["ema_step"]
        if accelerator.scaler is not None and record["scaler"] is not None:
            accelerator.scaler.load_state_dict(record["scaler"])
        self.update, self.earlier_seconds = record["update"], record["seconds"]


def resume(state: TrainingState, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Continue from the checkpoint that the configuration names, if there is one."""
    if config.resume_from_checkpoint is None:
        return
    if config.resume_from_checkpoint != "latest":
        state.load(Path(config.resume_from_checkpoint), accelerator)
        _discard_after(state.update, config, accelerator)
    elif folders := checkpoints(config):
        state.load(folders[-1], accelerator)
    if state.update:
        accelerator.print(f"resumed after update {state.update}")


def save_checkpoint(state: TrainingState, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Save into `checkpoints/update-N` and delete the oldest beyond the limit."""
    state.save(Path(config.output_dir) / "checkpoints" / f"update-{state.update:08d}", accelerator)
    if accelerator.is_main_process:
        for folder in checkpoints(config)[: -config.checkpoints_total_limit]:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def _discard_after(update: int, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Delete checkpoints of a continuation that is being replaced: `latest` would name one of them."""
    if accelerator.is_main_process:
        for folder in checkpoints(config):
            if int(folder.name.removeprefix("update-")) > update:
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def checkpoints(config: TrainingConfig) -> list[Path]:
    """Complete checkpoints of the run, oldest first."""
    return sorted((Path(config.output_dir) / "checkpoints").glob("update-*"))


# --- Records ----------------------------------------------------------------------------------------------------------


class Record:
    """Losses of a run: means over `logging_steps` to the trackers, means over an epoch to `metrics.jsonl`.

    Values stay on the device until they are written, so that a training step never waits for them.
    """

    def __init__(
        self, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, state: TrainingState
    ) -> None:
        self.config, self.schedule, self.accelerator, self.state = config, schedule, accelerator, state
        self.file = Path(config.output_dir) / "metrics.jsonl"
        self._recent: dict[str, list[Tensor]] = {}
        self._epoch: dict[str, list[tuple[float, int]]] = {}
        self._keep_until(state.update)
        disable = not accelerator.is_main_process
        self.progress = tqdm(
            total=schedule.num_updates, initial=state.update, disable=disable, desc="updates", mininterval=1.0
        )

    def add(self, **values: Tensor) -> None:
        """Losses of one forward pass, 0-d tensors."""
        for name, value in values.items():
            self._recent.setdefault(name, []).append(value.detach())
        if self.accelerator.sync_gradients:
            self.progress.update()
            if self.state.update % self.config.logging_steps == 0:
                self._flush()

    def end_epoch(self, **values: float) -> None:
        """Append the epoch's means and `values` to `metrics.jsonl`."""
        self._flush()
        update = self.state.update
        means = {
            name: sum(mean * count for mean, count in entries) / sum(count for _, count in entries)
            for name, entries in self._epoch.items()
        }
        self._epoch = {}
        record = {
            "epoch": self.schedule.epoch(update),
            "step": update,
            "seconds": round(self.state.seconds, 2),
            **means,
            **values,
        }
        self.accelerator.log({f"epoch/{name}": value for name, value in (means | values).items()}, step=update)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.progress.set_postfix({name: f"{value:.4g}" for name, value in (means | values).items()})

    def out_of_time(self) -> bool:
        """Whether `max_train_seconds` are over, decided by the main process for all."""
        limit = self.config.max_train_seconds
        if limit is None or self.state.update >= self.schedule.num_updates:
            return False
        over = torch.tensor(float(self.state.seconds_here > limit), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(over, 0)
        if over:
            self.accelerator.print(
                f"stopped after {limit} s (max_train_seconds); the same command goes on from update {self.state.update}"
            )
        return bool(over)

    def _flush(self) -> None:
        if not self._recent:
            return
        names = list(self._recent)
        means = torch.stack([torch.stack(self._recent[name]).float().mean() for name in names])
        values = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=self.state.update)
        for name, value in values.items():
            self._epoch.setdefault(name, []).append((value, len(self._recent[name])))
        self._recent = {}

    def _keep_until(self, update: int) -> None:
        """Drop records of updates that a resumed run will do again."""
        if self.accelerator.is_main_process and self.file.is_file():
            lines = [
                line
                for line in self.file.read_text(encoding="utf-8").splitlines()
                if json.loads(line)["step"] <= update
            ]
            self.file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@contextmanager
def averaged_weights(state: TrainingState) -> Iterator[None]:
    """The model with its averaged weights inside, with its own again after."""
    if state.ema is None:
        yield
        return
    state.ema.store(state.model.parameters())
    state.ema.copy_to(state.model.parameters())
    try:
        yield
    finally:
        state.ema.restore(state.model.parameters())


@torch.no_grad()
def validation_loss(
    state: TrainingState, images: Images, scheduler: DDPMScheduler, config: BaselineConfig, accelerator: Accelerator
) -> float:
    """Denoising loss of the averaged weights on the first validation images, with noise that is the same at every
    epoch."""
    count = min(config.num_validation_samples, len(images))
    generator = keyed_generator(accelerator.device, config.seed, "validation")
    noise, timesteps = draw_noise(count, torch.Size(images.image_shape), config, generator)
    own = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros(2, device=accelerator.device)
    state.model.eval()
    with averaged_weights(state):
        for rows in own.split(config.train_batch_size):
            clean = images.fetch(rows).to(accelerator.device)
            batch = noised_batch(clean, noise[rows], timesteps[rows], scheduler, rows, rows, state.update)
            output = state.model(batch.noisy, batch.timesteps).sample
            total += torch.stack([denoising_loss(output, batch.target) * len(rows), total.new_tensor(len(rows))])
    state.model.train()
    total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()


def save_sample_grid(
    state: TrainingState, scheduler: DDPMScheduler, config: BaselineConfig, accelerator: Accelerator, rows: int = 6
) -> None:
    """`samples/update-N.png`: rows² images by DDIM with the averaged weights, from the same noise every time."""
    if accelerator.is_main_process:
        with averaged_weights(state):
            model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
            pipeline = DDIMPipeline(model.eval(), DDIMScheduler.from_config(scheduler.config))
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(config.seed)
            images = pipeline(rows**2, generator=generator, num_inference_steps=config.num_inference_steps).images
            model.train()
        folder = Path(config.output_dir) / "samples"
        folder.mkdir(exist_ok=True)
        make_image_grid(images, rows, rows).save(folder / f"update-{state.update:08d}.png")
    accelerator.wait_for_everyone()


def save_results(
    state: TrainingState, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, **values: float
) -> None:
    """`results.json` of the run: what it cost and where it ended."""
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        metrics = folder / "metrics.jsonl"  # absent where the time was over within the first epoch
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        results = {
            "updates": state.update,
            "complete": state.update >= schedule.num_updates,
            "training_seconds": round(state.seconds, 2),
            "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "last_epoch": json.loads(lines[-1]) if lines else None,
            **values,
        }
        write_json(folder / "results.json", results)
    accelerator.wait_for_everyone()


class _GatherRows(torch.autograd.Function):
    """All processes' rows in order; the gradient of a process' own rows times the number of processes, which averaging
    undoes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, accelerator: Accelerator) -> Tensor:
        ctx.accelerator, ctx.count = accelerator, len(rows)
        return accelerator.gather(rows.contiguous())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        first = ctx.accelerator.process_index * ctx.count
        return grad_output[first : first + ctx.count] * ctx.accelerator.num_processes, None


def gather_rows(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """[B, D] of every process as one [processes · B, D], for a loss that is one problem over all of them.

    Each process computes the same global loss. Distributed training averages gradients over processes, so that the
    result is the gradient of one process on the whole batch.
    """
    return rows if accelerator.num_processes == 1 else _GatherRows.apply(rows, accelerator)
