"""Shared by the training scripts: the run's folder, the order of the data and the noise, checkpoints, records, sample
grids.

Randomness is a function of (seed, update) alone. One update sees one *global* batch of G = processes × accumulation ×
`train_batch_size` images, with one draw of noise and timesteps for all G; a process takes its rows of it. So the number
of processes and of accumulation steps changes who computes what, not what is computed, and a resumed run needs no state
of any generator.
"""

from .batches import (
    DiffusionBatch,
    Images,
    Schedule,
    diffusion_batches,
    draw_noise,
    image_batches,
    index_batches,
    make_schedule,
    noised_batch,
)
from .checkpoints import TrainingState, checkpoints, resume, save_checkpoint
from .coupling import make_coupling
from .folder import check_output_dir, load_split, load_splits, make_accelerator, open_run, saved_model, write_json
from .models import make_classes, make_noise_scheduler, make_optimizer, make_pipeline, make_unet
from .pretrained import load_source, with_source
from .processes import gather_rows
from .records import Record, averaged_weights, end_run, save_results, save_sample_grid, validation_loss, wants_grid

__all__ = [
    "DiffusionBatch",
    "Images",
    "Record",
    "Schedule",
    "TrainingState",
    "averaged_weights",
    "check_output_dir",
    "checkpoints",
    "diffusion_batches",
    "draw_noise",
    "end_run",
    "gather_rows",
    "image_batches",
    "index_batches",
    "load_source",
    "load_split",
    "load_splits",
    "make_accelerator",
    "make_classes",
    "make_coupling",
    "make_noise_scheduler",
    "make_optimizer",
    "make_pipeline",
    "make_schedule",
    "make_unet",
    "noised_batch",
    "open_run",
    "resume",
    "save_checkpoint",
    "save_results",
    "save_sample_grid",
    "saved_model",
    "validation_loss",
    "wants_grid",
    "with_source",
    "write_json",
]
