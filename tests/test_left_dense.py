"""A last layer that is left dense behind a pruned one, its weights so small that what rounding adds is most of the network's error."""

import pytest
import torch
from networks import samples
from torch import nn

import nettrim

ACTIVATIONS = (nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardtanh(0.5, 1.0), nn.Hardswish(), nn.Tanh(), nn.Identity())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_what_rounding_adds_to_an_output_that_is_far_from_zero_is_in_the_bound(activation: nn.Module, seed: int) -> None:
    broken = []
    for scale in (4e-4, 1.2e-3, 4e-3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 64, bias=seed == 2), activation)
        with torch.no_grad():
            model[2].weight.mul_(scale)  # type: ignore[operator]
            if seed == 2:
                model[2].bias.mul_(10)  # type: ignore[operator]
        model = model.half()
        result = nettrim.prune(model, samples(800, 10), epsilon=1e-3, targets="0", mode="parallel")
        certificate = result.report.certificate
        if not certificate.holds:
            broken.append((scale, certificate.explanation))
        found = nettrim.verify(model, result.model, samples(800, 10), result.report, bounds=False)
        stated = next(check for check in found.checks if check.what == "guaranteed")
        assert stated.outcome == "holds", str(stated)  # by the verifier's own formula
    assert not broken
