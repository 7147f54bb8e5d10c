"""Time of all metrics for 10,000 generated and 10,000 real images, and of torch-fidelity for the common ones."""

from __future__ import annotations

import time

import torch

from ot_diffusers.evaluation import metrics
from ot_diffusers.evaluation.evaluate import ImageSet, evaluate_images

from .timing import Row, interleave, ratio_row


def rows(quick: bool, device: torch.device) -> list[Row]:
    count = 1000 if quick else 10_000
    generator = torch.Generator().manual_seed(0)
    sets = []
    for shift in (0.0, 0.1):
        features = torch.randn(count, 128, generator=generator) * torch.arange(1, 129).rsqrt() + shift
        pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
        sets.append(ImageSet(pixels, features.relu(), torch.randn(count, 10, generator=generator)))
    generated, real = sets
    started = time.perf_counter()
    evaluate_images(generated, reference=real, extractor=None)
    seconds = time.perf_counter() - started
    target = None if quick else 30.0
    return [
        Row(f"all metrics, {count:,} against {count:,}", seconds, (seconds, seconds), target=target, unit=" s"),
        against_torch_fidelity(generated.features, real.features),
    ]


def against_torch_fidelity(features: torch.Tensor, real: torch.Tensor) -> Row:
    """FID, KID and precision/recall from the same features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    def theirs() -> None:
        fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (features, real)), verbose=False)
        kid_features_to_metric(
            features.double(), real.double(), kid_subsets=100, kid_subset_size=1000, rng_seed=0, verbose=False
        )
        options = {"prc_neighborhood": 3, "prc_batch_size": 4096, "save_cpu_ram": True, "verbose": False}
        prc_features_to_metric(features, real, **options)

    def ours() -> None:
        metrics.frechet_distance(features, real)
        metrics.kernel_distance(features, real)
        metrics.precision_recall(features, real)

    seconds = interleave({"torch-fidelity": theirs, "ours": ours}, 2 if len(features) < 10_000 else 5)
    name = "FID, KID, precision and recall: torch-fidelity / ours"
    return ratio_row(name, seconds, "torch-fidelity", "ours", target=1.0, at_least=True)
