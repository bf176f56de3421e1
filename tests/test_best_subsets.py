"""``python -m benchmarks.best_subsets``: against all subsets by least squares, and at a tiny size."""

import itertools

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import best_subsets


def by_least_squares(A: Tensor, Y: Tensor, most: int) -> Tensor:
    """Every subset's least squares with a bias, one after the other."""
    found = [Y.sub(Y.mean(0)).square().sum(0)]
    ones = torch.ones(len(A), 1, dtype=A.dtype)
    for count in range(1, most + 1):
        misfits = []
        for chosen in itertools.combinations(range(A.shape[1]), count):
            inputs = torch.cat([A[:, chosen], ones], 1)
            misfits.append((inputs @ torch.linalg.lstsq(inputs, Y, driver="gelsd").solution - Y).square().sum(0))
        found.append(torch.stack([*misfits, found[-1]]).amin(0))
    return torch.stack(found)


@pytest.mark.parametrize("case", ("any", "collinear", "dead"))
def test_every_subset_is_tried(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(40, 7, dtype=torch.float64, generator=generator)
    if case == "collinear":
        A[:, 4] = A[:, 1]
    if case == "dead":
        A[:, 2] = 0
    Y = A @ torch.randn(7, 3, dtype=torch.float64, generator=generator) + torch.rand(40, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(best_subsets.least_misfits(A, Y, 4), by_least_squares(A, Y, 4), rtol=1e-8, atol=1e-8)


def test_inputs_that_do_not_vary_leave_the_bias() -> None:
    A, Y = torch.ones(10, 3), torch.rand(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(best_subsets.least_misfits(A, Y, 2), Y.sub(Y.mean(0)).square().sum(0).expand(3, 2))


def test_the_fewest_within_a_budget() -> None:
    misfits = torch.tensor([[9.0, 9.0], [4.0, 8.0], [1.0, 7.0]], dtype=torch.float64)
    for budget, expected in ((18.0, 0), (13.0, 1), (10.0, 2), (8.0, 4), (1.0, 5), (0.0, 6)):
        assert best_subsets.fewest(misfits, budget) == expected


def test_the_command(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(best_subsets.main, ["--data", "digits", "--networks", "tiny", "--samples", "300"], catch_exceptions=False)
    assert result.exit_code == 0 and "10x16" in result.output
    monkeypatch.setattr(best_subsets, "fewest", lambda misfits, budget: 10**6)
    result = CliRunner().invoke(best_subsets.main, ["--data", "digits", "--networks", "tiny", "--samples", "300"])
    assert result.exit_code == 1 and "fewer weights were found" in result.output
