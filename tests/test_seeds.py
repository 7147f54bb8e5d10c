"""Keyed random numbers depend on their key alone, and are standard normal."""

import pytest
import torch
from scipy import stats

from ot_diffusers.seeds import keyed_normal


def test_rows_depend_on_key_and_index_alone():
    together = keyed_normal((3, "noise"), torch.tensor([5, 0, 2**40]), (2, 4))
    assert torch.equal(keyed_normal((3, "noise"), torch.tensor([2**40, 5]), (2, 4)), together[[2, 0]])
    for other in ((4, "noise"), (3, "other")):
        assert not torch.isclose(keyed_normal(other, torch.tensor([5]), (2, 4)), together[:1]).any()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_numbers_are_standard_normal_and_uncorrelated(shape):
    rows = keyed_normal((0, "noise"), torch.arange(2000), shape).flatten(1)
    # The numbers are fixed. The p value of a good generator is uniform; these p values are above 1 in 1,000.
    assert stats.kstest(rows.flatten()[:100_000].numpy(), "norm").pvalue > 1e-3
    # Correlations of 2,000 independent pairs have a standard deviation of 1/√2000 = .022; 64² of them stay below five
    # times that.
    within = torch.corrcoef(rows[:, :64].T) - torch.eye(64)
    between = torch.corrcoef(rows[:64]) - torch.eye(64)
    assert within.abs().max() < 5 / len(rows) ** 0.5
    assert between.abs().max() < 5.5 / rows.shape[1] ** 0.5
