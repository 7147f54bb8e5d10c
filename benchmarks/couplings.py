"""The cost of couplings: pairing noise in a training step, and solving for the potentials before it.

The peers TorchCFM and ott-jax are measured where they are installed (`pip install torchcfm ott-jax`). The solver needs
the real MNIST, since the content of images decides how long it takes; without it, and with --quick, it solves for the
digits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch

from ot_diffusers.data import load_images, pixels_of
from ot_diffusers.errors import InputError
from ot_diffusers.models.semidiscrete_coupling import SemidiscreteCoupling
from ot_diffusers.training.coupling import assigned_noise
from ot_diffusers.transport.semidiscrete import assign, semidiscrete_potentials

from .timing import Row, interleave, ratio_row
from .training import Step, configuration

COMPONENTS = 128
"""Principal components that the points of the pairing have."""


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    yield from pairing_rows(quick, device)
    if find_spec("ott") is not None and device.type == "cpu":
        yield from peer_rows(quick)
    yield from solver_rows(quick, device)


def pairing_rows(quick: bool, device: torch.device) -> list[Row]:
    """A training step with the time for its pairs, beside the step alone, at the sizes of the MNIST preset."""
    step, size = Step(configuration(quick), device), configuration(quick).train_batch_size
    noise = torch.randn(size, 1, 28, 28, device=device)
    rows = noise.flatten(1)[:, :COMPONENTS]
    images = torch.rand(512, 1, 28, 28, device=device) * 2 - 1
    candidates: dict[str, Callable[[], object]] = {
        "step": step.run,
        "assignment of 512 images": lambda: assigned_noise(images, torch.randn_like(images)),
    }
    counts = (2_000, 20_000) if quick else (60_000, 1_000_000)
    for count in counts:
        points, potentials = torch.randn(count, COMPONENTS, device=device), torch.zeros(count, device=device)
        longest = points.norm(dim=1).max()
        candidates[f"{count:,} images"] = partial(assign, rows, points, potentials, longest=longest)
    if find_spec("torchcfm") is not None:
        from torchcfm.optimal_transport import OTPlanSampler

        sampler = OTPlanSampler("exact")
        candidates["TorchCFM"] = lambda: sampler.sample_plan(noise, images[:size])
    seconds = interleave(candidates, 3 if quick or device.type == "cpu" else 20)
    target = 1.03 if device.type == "cpu" else 1.02

    def added(name: str, label: str, share: float = 1.0, target: float | None = None) -> Row:
        pairs = zip(seconds[name], seconds["step"], strict=True)
        ratios = [1 + share * pairing / alone for pairing, alone in pairs]
        medians = {key: round(statistics.median(seconds[key]), 5) for key in (name, "step")}
        return Row(label, statistics.median(ratios), (min(ratios), max(ratios)), target, seconds=medians)

    coupled = "coupled training step / plain step"
    found = [added(f"{count:,} images", f"{coupled}, {count:,} images", target=target) for count in counts]
    found.append(added("assignment of 512 images", f"{coupled}, assignment of 512 images", size / 512))
    if "TorchCFM" in seconds:
        found.append(added("TorchCFM", "training step with TorchCFM's OTPlanSampler / plain step"))
    return found


def peer_rows(quick: bool, tolerance: float = 0.02) -> list[Row]:
    """The potentials of the digits, beside ott-jax's stochastic gradient descent, which is compiled before and stops by
    its own estimate of χ²; its step size is the fastest of 1, 10 and 100."""
    import jax
    import optax
    from ott.geometry.semidiscrete_pointcloud import SemidiscretePointCloud
    from ott.problems.linear.semidiscrete_linear_problem import SemidiscreteLinearProblem
    from ott.solvers.linear.semidiscrete import SemidiscreteSolver

    points = pixels_of(load_images("digits", "train")).float().flatten(1) / 127.5 - 1
    cloud = SemidiscretePointCloud(jax.random.normal, jax.numpy.asarray(points.numpy()), epsilon=0.0)
    problem = SemidiscreteLinearProblem(cloud)
    options = {"error_eval_every": 250, "error_batch_size": 4096, "threshold": tolerance}
    solve = jax.jit(SemidiscreteSolver(num_iterations=20_000, batch_size=1024, optimizer=optax.sgd(10.0), **options))
    candidates: dict[str, Callable[[], object]] = {
        "ours": partial(semidiscrete_potentials, points, tolerance=tolerance),
        "ott-jax": lambda: solve(jax.random.key(0), problem).g.block_until_ready(),
    }
    seconds = interleave(candidates, 1 if quick else 3)
    return [ratio_row(f"potentials of the digits to χ² ≤ {tolerance}: ott-jax / ours", seconds, "ott-jax", "ours")]


def solver_rows(quick: bool, device: torch.device) -> Iterator[Row]:
    """Seconds until the potentials have each χ²; on a CPU those of the processor, and the first χ² alone."""
    try:
        images = load_images("digits" if quick else "mnist", "train")
    except InputError:
        images = load_images("digits", "train")
    pixels, on_cpu = pixels_of(images).to(device), device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    for tolerance, target in ((0.05, 600),) if on_cpu else ((0.05, None), (0.01, 60)):
        started = clock()
        config = SemidiscreteCoupling.from_images(pixels, tolerance=tolerance).config
        seconds = clock() - started
        label = f"potentials of {len(pixels):,} × {pixels[0].numel()} images to χ² ≤ {tolerance}"
        details = {
            "components": config.num_components,
            "kept_share": config.kept_share,
            "chi_squared": config.chi_squared,
        }
        yield Row(label, seconds, (seconds, seconds), target, unit=" s", details=details)
