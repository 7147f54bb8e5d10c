"""The Sinkhorn loss compared with other solvers, each at a setting with an accurate gradient."""

from __future__ import annotations

import importlib.util
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ot_diffusers.errors import InputError
from ot_diffusers.transport import median_distance, sinkhorn_divergence

from .timing import Row, interleave, peak_memory_mib, ratio_row, synchronise

COSINE = 0.999
SCALINGS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
SETTINGS = {"geomloss": SCALINGS, "flash-sinkhorn": SCALINGS, "POT": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}
"""Values of `scaling` for geomloss and flash-sinkhorn, and of `stopThr` for POT, the fastest first."""
TARGETS = {"cpu": {"geomloss": 5.0}, "cuda": {"flash-sinkhorn": 1.0}}
MODULES = {"geomloss": "geomloss", "flash-sinkhorn": "flash_sinkhorn", "POT": "ot"}
PEER_SECONDS = 60
"""Time limit for the search of a solver's setting and for its first run; a slower solver is named and left out."""
LARGE_PEERS = {"geomloss": 2**24, "POT": 2**22}
"""Entries of the plan above which these are not run: they need several matrices of this size, or minutes."""
YARDSTICK_ENTRIES = 2**22
"""Above this number of entries, the exact gradient at the smaller blur takes minutes."""


class TooLongError(Exception):
    """A solver has reached its time limit."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Stop the block after this number of seconds, between two Python operations."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    repeats = 3 if quick else 7
    if device.type == "cuda":
        sizes = [(128, 2000)] if quick else [(128, 2000), (2000, 2000), (10_000, 10_000)]
        for n, m in sizes:
            yield from against_peers(n, m, 128, device, repeats)
        yield from large_clouds(4000 if quick else 60_000, device)
    else:
        yield from against_peers(*((64, 500, 64) if quick else (128, 2000, 128)), device, repeats)
    yield from batches(quick, device, repeats)
    yield from fixed_schedule(quick, device, repeats)
    yield from scaling(quick, device)
    if device.type == "cpu":
        yield from memory(quick)


def clouds(n: int, m: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two clouds at a distance of half their width, with median distance 1 and the spectrum of real features."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).rsqrt()
    x, y = (torch.randn(size, dim, generator=generator) * spectrum for size in (n, m))
    y = y + 0.5 * spectrum
    scale = median_distance(y)
    return (x / scale).to(device), (y / scale).to(device)


def against_peers(n: int, m: int, dim: int, device: torch.device, repeats: int) -> Iterator[Row]:
    """Forward and backward pass of the training loss; ours omits the constant of the references."""
    for blur in (0.3, 0.05) if n * m <= YARDSTICK_ENTRIES else (0.3,):
        x, y = clouds(n, m, dim, device)
        exact = exact_gradient(x, y, blur)
        candidates: dict[str, Callable[[], Tensor]] = {"ours": partial(ours, x, y, blur)}
        details: dict[str, object] = {"cosine of ours": cosine(ours(x, y, blur), exact)}
        peers = {"geomloss": geomloss_gradient, "POT": pot_gradient}
        if device.type == "cuda":
            peers = {"geomloss": geomloss_gradient, "flash-sinkhorn": flash_gradient}  # POT's choice is slower by far
        for name, make in peers.items():
            setting, why = first_good_setting(name, make, x, y, blur, exact)
            details[name] = setting if setting is not None else why
            if setting is not None:
                candidates[name] = partial(make, x, y, blur, setting)
        title = f"Sinkhorn loss {n}×{m}×{dim}, blur {blur} of the median distance"
        seconds = interleave(candidates, repeats)
        for name in peers:
            if name in candidates:
                target = TARGETS[device.type].get(name)
                options = {"target": target, "at_least": True, "details": details}
                yield ratio_row(f"{title}: {name} / ours", seconds, name, "ours", **options)
            else:
                print(f"  {title}: {name} left out: {details[name]}", flush=True)


def installed(peer: str) -> bool:
    return importlib.util.find_spec(MODULES[peer]) is not None


def exact_gradient(x: Tensor, y: Tensor, blur: float, rounds: int = 2000) -> Tensor:
    """∂S/∂x in float64 by plain log-domain Sinkhorn until marginals agree to 1e-9, without package code."""
    x, y = x.double(), y.double()

    def field(u: Tensor, v: Tensor) -> Tensor:
        cost, eps = torch.cdist(u, v).square() / 2, blur**2
        f, g = u.new_zeros(len(u)), v.new_zeros(len(v))
        for _ in range(rounds):
            g = -eps * (torch.logsumexp((f[:, None] - cost) / eps, dim=0) - math.log(len(u)))
            before, f = f, -eps * (torch.logsumexp((g - cost) / eps, dim=1) - math.log(len(v)))
            if ((before - f) / eps).abs().max() < 1e-9:
                break
        plan = torch.exp((f[:, None] + g - cost) / eps) / len(v)
        return (u - plan @ v / plan.sum(dim=1, keepdim=True)) / len(u)

    return field(x, y) - field(x, x)


def ours(x: Tensor, y: Tensor, blur: float, num_iterations: int | None = None) -> Tensor:
    points = x.clone().requires_grad_()
    sinkhorn_divergence(points, y, blur=blur, y_self_cost=0.0, num_iterations=num_iterations).sum().backward()
    assert points.grad is not None
    return points.grad


def geomloss_gradient(x: Tensor, y: Tensor, blur: float, setting: float) -> Tensor:
    """`SamplesLoss` at a given scaling."""
    from geomloss import SamplesLoss

    points = x.clone().requires_grad_()
    SamplesLoss("sinkhorn", p=2, blur=blur, scaling=setting, backend="tensorized")(points, y).backward()
    assert points.grad is not None
    return points.grad


def flash_gradient(x: Tensor, y: Tensor, blur: float, setting: float) -> Tensor:
    """flash-sinkhorn through our `backend`, at a given scaling."""
    points = x.clone().requires_grad_()
    sinkhorn_divergence(points, y, blur=blur, scaling=setting, backend="flash-sinkhorn").backward()
    assert points.grad is not None
    return points.grad


def pot_gradient(x: Tensor, y: Tensor, blur: float, setting: float) -> Tensor:
    """POT's `empirical_sinkhorn_divergence` on half squared distances, at a given `stopThr`."""
    import ot

    points = x.clone().requires_grad_()
    options = {"reg": 2 * blur**2, "stopThr": setting, "numIterMax": 5000, "warn": False}
    loss = ot.bregman.empirical_sinkhorn_divergence(points, y, **options, method="sinkhorn_log")
    (gradient,) = torch.autograd.grad(loss, points)
    return gradient / 2


def first_good_setting(
    name: str,
    make: Callable[[Tensor, Tensor, float, float], Tensor],
    x: Tensor,
    y: Tensor,
    blur: float,
    exact: Tensor,
) -> tuple[float | None, str]:
    """The fastest setting whose gradient is as accurate as required of ours, or why there is none."""
    if not installed(name):
        return None, "not installed"
    if len(x) * len(y) > LARGE_PEERS.get(name, math.inf):
        return None, "its matrices are too large"
    try:
        with time_limit(PEER_SECONDS):
            for setting in SETTINGS[name]:
                if cosine(make(x, y, blur, setting), exact) >= COSINE:
                    return setting, ""
    except InputError as error:
        return None, str(error)
    except TooLongError:
        return None, f"no setting in {PEER_SECONDS} s"
    except torch.OutOfMemoryError:
        return None, "out of memory"
    return None, f"no setting reaches {COSINE}"


def large_clouds(size: int, device: torch.device) -> Iterator[Row]:
    """Loss and gradient of clouds whose plan is never stored, with the growth of GPU memory."""
    blur, (x, y) = 0.3, clouds(size, size, 128, device)
    candidates: dict[str, Callable[[], Tensor]] = {"ours": partial(ours, x, y, blur)}
    if installed("flash-sinkhorn"):
        candidates["flash-sinkhorn"] = partial(flash_gradient, x, y, blur, 0.5)
    gradients, peaks = {}, {}
    for name, run in list(candidates.items()):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            with time_limit(2 * PEER_SECONDS):
                gradients[name] = run()
                synchronise()
        except TooLongError:
            print(f"  {size:,} points: {name} left out: more than {2 * PEER_SECONDS} s", flush=True)
            del candidates[name]
            continue
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        title = f"peak memory of the OT term, {size:,} points and references, {name}"
        yield Row(title, peaks[name], (peaks[name], peaks[name]), unit=" MiB")
    if len(gradients) == 2:
        yield ratio_row(
            f"Sinkhorn loss {size:,}×{size:,}×128, blur {blur}: flash-sinkhorn / ours",
            interleave(candidates, 3),
            "flash-sinkhorn",
            "ours",
            target=0.8,
            at_least=True,
            details={"cosine of the two": cosine(gradients["ours"], gradients["flash-sinkhorn"].double())},
        )


def batches(quick: bool, device: torch.device, repeats: int) -> Iterator[Row]:
    """Many small problems in one batch, such as one for each class, compared with a loop over them."""
    for count, n, m in [(8, 32, 32)] if quick else [(32, 64, 64), (16, 128, 200)]:
        pairs = [clouds(n, m, 128, device) for _ in range(count)]
        shifts = torch.linspace(0, 1, count, device=device)[:, None, None]
        x, y = torch.stack([pair[0] for pair in pairs]) + shifts, torch.stack([pair[1] for pair in pairs])

        def loop(x: Tensor = x, y: Tensor = y) -> None:
            for one, other in zip(x, y, strict=True):
                ours(one, other, 0.3)

        seconds = interleave({"loop": loop, "batch": partial(ours, x, y, 0.3)}, repeats)
        yield ratio_row(
            f"{count} problems {n}×{m}×128: one by one / as a batch", seconds, "loop", "batch", target=3, at_least=True
        )


def fixed_schedule(quick: bool, device: torch.device, repeats: int) -> Iterator[Row]:
    """A fixed number of iterations compared with a converged solve."""
    n, m = (64, 500) if quick else (128, 2000)
    for blur, num_iterations in ((0.3, 20), (0.05, 200)):
        x, y = clouds(n, m, 128, device)
        fixed = partial(ours, x, y, blur, num_iterations)
        seconds = interleave({"converged": partial(ours, x, y, blur), "fixed": fixed}, repeats)
        details = {"cosine of the two": cosine(fixed(), ours(x, y, blur).double())}
        title = f"Sinkhorn loss {n}×{m}×128, blur {blur}: {num_iterations} iterations / converged"
        yield ratio_row(title, seconds, "fixed", "converged", details=details)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double().cpu(), b.flatten().cpu(), dim=0))


def scaling(quick: bool, device: torch.device) -> Iterator[Row]:
    """Exponents of a power law in each size, fitted to the medians."""
    base = {"N": 32, "M": 500, "D": 32} if quick else {"N": 64, "M": 1000, "D": 64}
    for name, factors in {"N": (1, 2, 4), "M": (1, 2, 4, 8), "D": (1, 4, 16)}.items():
        candidates = {}
        for factor in factors:
            n, m, dim = (size * (factor if key == name else 1) for key, size in base.items())
            x, y = clouds(n, m, dim, device)
            candidates[str(base[name] * factor)] = partial(ours, x, y, 0.3)
        medians = {key: sorted(values)[len(values) // 2] for key, values in interleave(candidates, 5).items()}
        exponent = slope([math.log(int(key)) for key in medians], [math.log(value) for value in medians.values()])
        title = f"exponent of the loss' time in {name}"
        yield Row(title, exponent, (exponent, exponent), unit="", seconds=medians)


def slope(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line."""
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - centre_x) ** 2 for a in x)


def memory(quick: bool) -> Iterator[Row]:
    """Growth of peak memory through one loss and its gradient, 128 images with 128 features, on the CPU."""
    for references in (2000,) if quick else (2000, 10_000, 60_000):
        code = f"""
import torch
from ot_diffusers.transport import sinkhorn_divergence
x, y = torch.randn(128, 128, requires_grad=True), torch.randn({references}, 128)
sinkhorn_divergence(x[:4], y[:4], blur=3.0).backward()
start()
sinkhorn_divergence(x, y, blur=3.0, y_self_cost=0.0).backward()
"""
        mib = peak_memory_mib(code)
        yield Row(f"peak memory of the OT term, {references:,} references", mib, (mib, mib), unit=" MiB")
