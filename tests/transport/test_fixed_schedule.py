"""A fixed number of Sinkhorn iterations: as accurate as the converged solve, and no value is read back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ot_diffusers.errors import InputError
from ot_diffusers.losses.denoising import ot_loss
from ot_diffusers.transport import divergence_gradient, divergence_gradient_at, geometry, sinkhorn_divergence

needs_newer_torch = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="torch 2.6 traces no such context managers and no fake GPU",
)


def _cloud(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Normal points with a decaying spectrum, like features."""
    points = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift
    return points * torch.arange(1, shape[-1] + 1).rsqrt()


def _clustered(rows: int, width: int, seed: int) -> Tensor:
    """Six clusters of unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(6, width, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(6, (rows,), generator=generator)] + torch.randn(rows, width, generator=generator) / 2


def _cosine(u: Tensor, v: Tensor) -> float:
    return torch.cosine_similarity(u.double().flatten(), v.double().flatten(), dim=0).item()


class NoCopies(TorchDispatchMode):
    """Fails at every copy between the host and a GPU, which would be a synchronisation."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        actual = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            assert {part.device.type for part in (actual, *args) if isinstance(part, Tensor)} == {actual.device.type}
        return actual


# The claims of the docstring: blur in median distances, and iterations for a cosine similarity of .999.
_STEPS = [(1.0, 10), (0.3, 20), (0.1, 100), (0.05, 200)]


@pytest.mark.parametrize("ratio, num_iterations", _STEPS)
@pytest.mark.parametrize("sizes", [(128, 500, 64), (60, 40, 3), (64, 64, 1), (1, 30, 4), (30, 1, 4)])
@pytest.mark.parametrize("reach", [None, 1.0])
def test_the_gradient_is_that_of_the_converged_problem(ratio, num_iterations, sizes, reach):
    n, m, width = sizes
    x, y = _cloud(n, width, shift=0.5), _cloud(m, width, seed=1)
    median = torch.cdist(x, y).median().item()
    weights = (torch.arange(n) % 3 + 1.0) / (torch.arange(n) % 3 + 1.0).sum()
    options = {"blur": ratio * median, "reach": reach and reach * median, "x_weights": weights}
    actual, _ = divergence_gradient(x, y, num_iterations=num_iterations, **options)
    expected, _ = divergence_gradient(x.double(), y.double(), **options)
    assert _cosine(actual, expected) > 0.999
    assert (actual.double() - expected).norm() < 0.05 * expected.norm()  # a cosine of .999 is an angle of .045


@pytest.mark.parametrize("ratio, num_iterations", _STEPS[:3])
def test_clusters_of_unequal_shares(ratio, num_iterations):
    """Sinkhorn iterations are slow where mass has to cross the gaps between clusters."""
    x, y = _clustered(100, 8, 1), _clustered(150, 8, 2)
    blur = ratio * torch.cdist(x, y).median().item()
    actual, _ = divergence_gradient(x, y, blur=blur, num_iterations=num_iterations)
    assert _cosine(actual, divergence_gradient(x.double(), y.double(), blur=blur)[0]) > 0.999


def test_loss_and_field_agree_and_more_steps_are_closer():
    x, y = _clustered(40, 4, 1).requires_grad_(), _clustered(60, 4, 2)
    expected = sinkhorn_divergence(x, y, blur=0.5).item()
    errors = []
    for num_iterations in (5, 40, 300):
        value = sinkhorn_divergence(x, y, blur=0.5, num_iterations=num_iterations)
        (gradient,) = torch.autograd.grad(value, x)
        field, _ = divergence_gradient(x, y, blur=0.5, num_iterations=num_iterations)
        torch.testing.assert_close(gradient, field, rtol=1e-4, atol=1e-7)
        errors.append(abs(value.item() - expected))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4 * expected


def test_a_warm_start_needs_few_steps():
    x, y = _cloud(50, 8, shift=0.5), _cloud(80, 8, seed=1)
    _, potentials = divergence_gradient(x, y, blur=0.2)
    moved = x + 0.02 * _cloud(50, 8, seed=2)
    expected = divergence_gradient(moved, y, blur=0.2)[0]
    cold = divergence_gradient(moved, y, blur=0.2, num_iterations=8)[0]
    warm = divergence_gradient(moved, y, blur=0.2, num_iterations=8, initial=potentials)[0]
    assert _cosine(warm, expected) > 0.999
    assert (warm - expected).norm() < (cold - expected).norm() / 3


@pytest.mark.slow
@needs_newer_torch
@pytest.mark.parametrize(
    "shape, options", [((20, 5), {"y_self_cost": 0.0}), ((3, 20, 5), {"reach": 2.0, "x_weights": torch.ones(20) / 20})]
)
def test_torch_compile_sees_one_graph(shape, options):
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 2 * sinkhorn_divergence(x * 1.5, y, blur=0.5, num_iterations=6, **options)

    x, y = _cloud(*shape), _cloud(30, 5, seed=1, shift=0.5)
    compiled, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="eager")(compiled, y).sum().backward()
    loss(plain, y).sum().backward()
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-4, atol=1e-6)  # float32 sums in a different order


@pytest.mark.slow
@needs_newer_torch
def test_the_whole_loss_compiles_with_its_backward():
    x, y, weights = _cloud(20, 5), _cloud(30, 5, seed=1), torch.linspace(0.1, 1, 20)
    compiled, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(ot_loss, fullgraph=True, backend="aot_eager")(
        compiled, y, blur=0.5, sample_weights=weights, num_iterations=6
    ).backward()
    ot_loss(plain, y, blur=0.5, sample_weights=weights, num_iterations=6).backward()
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_newer_torch
@pytest.mark.parametrize("entries", [2**25, 100])
def test_nothing_is_read_from_a_gpu(entries, monkeypatch):
    """Fake tensors of a GPU have no values: reading one raises an error."""
    monkeypatch.setattr(geometry, "MAX_DENSE_ENTRIES", entries)
    with FakeTensorMode():
        x, y = (torch.empty(rows, 5, device="cuda", requires_grad=True) for rows in (20, 30))
        weights = torch.empty(20, device="cuda")
        for options in ({}, {"reach": 2.0}, {"x_weights": weights}, {"x_pair": y.detach()}):
            assert sinkhorn_divergence(x, y, blur=0.5, num_iterations=20, **options).is_cuda
        assert ot_loss(x, y, blur=0.5, sample_weights=weights, num_iterations=20).is_cuda
        with NoCopies():
            _, potentials = divergence_gradient(x, y, blur=0.5, num_iterations=20)
            divergence_gradient(x, y, blur=0.5, num_iterations=5, initial=potentials)
            divergence_gradient_at(x[:3], x, y, potentials.cross.g, potentials.self_potential, blur=0.5)
        with pytest.raises(Exception, match=r"[Dd]ata.?dependent|_local_scalar_dense"):
            sinkhorn_divergence(x, y, blur=0.5)  # the converged solve reads values


def test_blocks_give_what_the_whole_matrix_gives(monkeypatch):
    x, y = _cloud(23, 3).double(), _cloud(41, 3, seed=1).double()
    expected, _ = divergence_gradient(x, y, blur=0.5, num_iterations=40)
    monkeypatch.setattr(geometry, "MAX_DENSE_ENTRIES", 200)
    monkeypatch.setattr(geometry, "BLOCK_ENTRIES", {"cpu": 100})
    actual, _ = divergence_gradient(x, y, blur=0.5, num_iterations=40)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)  # 40 iterations with either annealing


@pytest.mark.parametrize("ratio", [1e-3, 1e-2, 10.0, 1e2])
@pytest.mark.parametrize("reach", [None, 0.01, 100.0])
@pytest.mark.parametrize("kind", ["spread", "one place", "copies", "far"])
def test_any_blur_gives_a_finite_gradient(ratio, reach, kind):
    x, y = _cloud(20, 3), _cloud(30, 3, seed=1)
    x = {"spread": x, "one place": torch.ones_like(x), "copies": x[torch.arange(20) % 3], "far": x + 1000}[kind]
    x = x.requires_grad_()
    value = sinkhorn_divergence(x, y, blur=ratio * 2, reach=reach, num_iterations=30)
    value.backward()
    assert math.isfinite(value.item()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_iterations": 0}, "`num_iterations` must be at least 1 or None, got 0"),
        ({"num_iterations": 20, "backend": "geomloss"}, "`num_iterations` must be None with backend='geomloss'"),
    ],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(InputError, match=message):
        sinkhorn_divergence(torch.zeros(4, 3), torch.ones(5, 3), blur=1.0, **options)
