"""What a call is made under: the caller's autocast and default device are no part of what is computed; a network's own autocast is part of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import same_bits, state_of
from torch import Tensor, nn

import nettrim


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 5))


class Own(nn.Module):
    """A network that runs a part of itself under autocast."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = self.inner(x)
        found = found[0][:, -1] if isinstance(found, tuple) else found.flatten(1)
        return self.head(found.float())


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Placing(nn.Module):
    """A network that makes tensors where the caller's default device says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.empty(1).device.type)
        found: Tensor = self.inner(x)
        return found


ASKED: dict[str, dict[str, Any]] = {
    "zeros": {"sparsity": 0.6},
    "budget": {"epsilon": 0.1},
    "papers": {"epsilon": 0.1, "consistency": "paper"},
    "parallel": {"sparsity": 0.5, "mode": "parallel"},
}


@pytest.mark.parametrize("name", ASKED)
def test_the_callers_autocast_changes_nothing(name: str) -> None:
    """It used to keep what it had made of a weight before it was pruned, so that nothing was ever seen to change."""
    model, x = chain(), samples(400, 40)
    expected = nettrim.prune(model, x, **ASKED[name])
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = nettrim.prune(model, x, **ASKED[name])
        assert nettrim.verify(model, found.model, x, found.report).holds
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    assert same_bits(state_of(found.model), state_of(expected.model))
    assert [layer.discrepancy for layer in found.report.layers] == [layer.discrepancy for layer in expected.report.layers]
    assert found.report.certificate == expected.report.certificate


def test_a_program_is_solved_in_its_own_precision_and_neurons_are_taken_out() -> None:
    A, W = samples(200, 20), torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    program = nettrim.LayerProgram(A, (A @ W.T).clamp(min=0), epsilon=2.0)
    model, x = chain(), samples(400, 40)
    pruned = nettrim.prune(model, x, pattern="neuron", sparsity=0.3).model
    expected = nettrim.solve(program), nettrim.shrink(pruned, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = nettrim.solve(program), nettrim.shrink(pruned, x)
    assert torch.equal(found[0].weights, expected[0].weights)
    assert found[0].objective == expected[0].objective
    assert same_bits(state_of(found[1]), state_of(expected[1]))


def test_an_error_leaves_the_callers_autocast_as_it_was() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(nettrim.ArgumentError):
        nettrim.prune(chain(), samples(20, 40), sparsity=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(nettrim.ArgumentError):
            nettrim.prune(chain(), samples(20, 40), sparsity=2.0)
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("name", ASKED)
def test_a_network_with_its_own_is_certified_and_verified(name: str) -> None:
    torch.manual_seed(3)
    model, x = Own(chain()), samples(400, 40)
    found = nettrim.prune(model, x, **ASKED[name])
    assert [layer.name for layer in found.report.layers] == ["inner.0", "inner.2", "inner.4", "head"]
    assert found.report.certificate.holds
    assert all(layer.discrepancy > 0 for layer in found.report.layers if layer.density < 1)
    assert nettrim.verify(model, found.model, x, found.report).holds


class Decorated(nn.Sequential):
    """An autocast that was made before the caller's, and would turn its cache on again."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("name", ASKED)
def test_an_autocast_made_beforehand_hides_nothing_either(name: str) -> None:
    model, x = Decorated(*chain()), samples(400, 40)
    expected = nettrim.prune(model, x, **ASKED[name])
    assert expected.report.certificate.holds
    assert expected.report.certificate.guaranteed is None and "bfloat16" in expected.report.certificate.explanation
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = nettrim.prune(model, x, **ASKED[name])
        assert nettrim.verify(model, found.model, x, found.report).holds
    assert found.report.certificate == expected.report.certificate


def test_nothing_that_was_kept_of_the_weights_is_left_behind() -> None:
    model, x = chain(), samples(400, 40)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        nettrim.prune(model, x, sparsity=0.9, inplace=True)
        after = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), after) and not torch.equal(before, after)


@pytest.mark.parametrize("inner", ("convolution", "gru"))
def test_layers_of_other_kinds_too(inner: str) -> None:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 1, 4)) if inner == "convolution" else nn.GRU(8, 5, batch_first=True)
    model = Own(made)
    x = samples(120, 4, 8)
    found = nettrim.prune(model, x, sparsity=0.5)
    assert found.report.certificate.holds
    assert nettrim.verify(model, found.model, x, found.report).holds


@pytest.mark.parametrize("name", ASKED)
def test_the_default_device_is_the_models_alone(name: str) -> None:
    """On meta every tensor made without a device holds nothing: none of ours is; the model's own are where the caller wants them."""
    model, x = Placing(chain()), samples(400, 40)
    expected = nettrim.prune(model, x, **ASKED[name])
    model.seen.clear()
    with torch.device("meta"):
        found = nettrim.prune(model, x, **ASKED[name])
        assert nettrim.verify(model, found.model, x, found.report).holds
        assert torch.get_default_device().type == "meta"
    assert model.seen == {"meta"}
    assert same_bits(state_of(found.model), state_of(expected.model))


def test_what_is_done_with_a_pruned_network_is_done_where_it_is(tmp_path: Path) -> None:
    model, x = chain(), samples(400, 40)
    found = nettrim.prune(model, x, sparsity=0.9)
    with torch.device("meta"):
        nettrim.save(found, tmp_path / "pruned")
        loaded = nettrim.load(tmp_path / "pruned", chain_on_cpu())
        sparse = nettrim.to_sparse(found.model)
        torch.testing.assert_close(sparse(x), found.model(x))
        assert same_bits(state_of(nettrim.to_dense(sparse)), state_of(found.model))
        nettrim.save_compressed(found.model, found.masks, tmp_path / "small")
        small = nettrim.load_compressed(tmp_path / "small")
        found.report.to_html(tmp_path / "page.html", masks=found.masks)
    assert same_bits(state_of(loaded.model), state_of(found.model))
    assert all(torch.equal(small[name], value) for name, value in found.model.state_dict().items())


def chain_on_cpu() -> nn.Sequential:
    with torch.device("cpu"):
        return chain()


@pytest.mark.parametrize(
    ("asked", "solver"),
    [({"epsilon": 2.0}, "auto"), ({"epsilon": 2.0}, "cvxpy"), ({"epsilon": 2.0, "consistency": "paper"}, "admm"), ({"regularization": 0.5}, "osqp"),
     ({"epsilon": 2.0, "penalty": "l0"}, "auto"), ({"epsilon": 2.0, "activation": None}, "gram_admm"), ({"nonzeros": 30}, "auto")],
)  # fmt: skip
def test_programs_lie_where_their_rows_do(asked: dict[str, Any], solver: str) -> None:
    A, W = samples(200, 20).double(), torch.randn(6, 20, generator=torch.Generator().manual_seed(2)).double()
    Y = (A @ W.T).clamp(min=0)
    expected = nettrim.solve(nettrim.LayerProgram(A, Y, **asked), solver)
    with torch.device("meta"):
        for rows in ((A, Y), (A.numpy(), Y.numpy())):
            assert torch.equal(nettrim.solve(nettrim.LayerProgram(*rows, **asked), solver).weights, expected.weights)
