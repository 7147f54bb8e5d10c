"""The truncated chain under every prior, on one data set, in one table: train, sample, evaluate, draw.

    ot-diffusers truncation --config configs/digits/truncation.yaml output_dir=runs/digits-truncation

The scripts train the denoiser, the evaluator and the learned priors. Every way to start the chain is sampled and scored
by the evaluator, which no loss has seen: pure noise in the truncated and in the full chain, closed-form Gaussians, the
learned priors, and real noisy images as the bound of what a prior can reach. Then Fréchet distance and time against T':
a learned prior makes clean images, so that the one of the table starts the chain anywhere, or another is trained for
each T'. Some priors are sampled with OT guidance, too, by the feature network of the losses: in the table, on the
curves, and once from the step `goal_timestep`, where a short guided chain is held against a long plain one. Started
again, the command keeps what is complete.
"""

from .config import TruncationConfig
from .run import run_study

__all__ = ["TruncationConfig", "run_study"]
