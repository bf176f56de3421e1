"""to_sparse: what is measured faster is converted, everything else is left dense with its reason, and the network computes the same."""

import copy
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import chain, same_bits, samples, state_of
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, NetTrimError, SparseLinear, SparseReport, sparsify
from nettrim.timing import Timing


def thinned(model: nn.Module, kept: float = 0.03, seed: int = 0, side: int = 1) -> nn.Module:
    """The model with so many of its weights kept, in blocks of a side."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            blocks = torch.rand(parameter.shape[0] // side, parameter.shape[1] // side, generator=generator) < kept
            parameter.data.masked_fill_(~blocks.repeat_interleave(side, 0).repeat_interleave(side, 1), 0)
    return model


def fixed(speedups: Mapping[str, float | Callable[[int], float]], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Put a clock in place of the real one: a speed-up by form, or by form and rows. Returns which forms were timed."""
    timed: list[list[str]] = []

    def compare(calls: Mapping[str, Callable[[], Any]], cpu: bool) -> dict[str, Timing]:
        assert cpu
        rows = {form: call().shape[0] for form, call in calls.items()}
        timed.append(list(calls))
        found = {form: speedups.get(form, 1.0) for form in calls}
        return {form: Timing(1.0, value(rows[form]) if callable(value) else value) for form, value in found.items()}

    monkeypatch.setattr(sparsify, "compare", compare)
    return timed


def report(model: nn.Module) -> SparseReport:
    found = model.nettrim_sparse_report
    assert isinstance(found, SparseReport)
    return found


def test_on_this_machine_a_thin_layer_is_faster_and_a_full_one_stays_dense() -> None:
    model = chain(1024, 1024, 64)
    thinned(model[0])
    before = state_of(model)
    sparse = nettrim.to_sparse(model, batch=8)
    found = report(sparse)
    assert found.converted == ["0"] and found.threads == torch.get_num_threads()
    first, second = found.layers
    assert first.speedups[8] > 1.5 and first.form == "csr" and first.bytes * 5 < first.dense_bytes == 4 * 1024 * 1025
    assert first.nonzeros == int(model[0].weight.count_nonzero()) and first.shape == (1024, 1024)
    assert second.form == "dense" and "below 50 % zeros" in second.reason and not second.speedups
    x = samples(9, 1024)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)
    assert same_bits(state_of(model), before) and type(model[0]) is nn.Linear
    assert "1 of 2 linear layers have a sparse form" in str(found) and "left dense: 2: not timed" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["speedups"] == {"8": first.speedups[8]}
    back = nettrim.to_dense(sparse)
    assert same_bits(state_of(back), before) and not hasattr(back, "nettrim_sparse_report")


def test_the_default_is_the_network_alone(digits_network: tuple[Any, ...]) -> None:
    model, inputs, *_ = digits_network
    result = nettrim.prune(model, inputs[:100], sparsity=0.9)
    sparse = nettrim.to_sparse(result.model)  # too small to pay: nothing may become slower
    assert [layer.name for layer in report(sparse).layers] == ["0", "2", "4"]
    torch.testing.assert_close(sparse(inputs), result.model(inputs), rtol=1e-4, atol=1e-5)
    for layer in report(sparse).layers:
        if layer.form != "dense":
            assert set(layer.speedups) == {1, 8, 64} and min(layer.speedups.values()) >= 1.1
        else:
            assert layer.reason


def test_slower_at_any_number_of_rows_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed({"csr": lambda rows: 3.0 if rows < 64 else 0.9}, monkeypatch)
    model = thinned(chain(32, 32))
    sparse = nettrim.to_sparse(model)
    (layer,) = report(sparse).layers
    assert layer.form == "dense" and type(sparse[0]) is nn.Linear and layer.speedups == {1: 3.0, 8: 3.0, 64: 0.9}
    assert "csr is 0.90 times as fast at 64 rows" in layer.reason
    (layer,) = report(nettrim.to_sparse(model, batch=[1, 8])).layers
    assert layer.form == "csr" and layer.reason == ""
    fixed({"csr": 1.2}, monkeypatch)
    (layer,) = report(nettrim.to_sparse(model, batch=1, min_speedup=1.3)).layers
    assert layer.reason == "csr is 1.20 times as fast at 1 row; expected 1.3 at every number of rows"


@pytest.mark.parametrize("side", [4, 8, 16])
def test_blocks_are_found_and_the_faster_form_taken(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = thinned(chain(64, 64, bias=False), 0.2, side=side)
    form = f"bsr {side}x{side}"
    for speedups, best in (({"csr": 2.0, form: 3.0}, form), ({"csr": 2.0, form: 1.5}, "csr"), ({"csr": 1.0, form: 1.5}, form)):
        timed = fixed(speedups, monkeypatch)
        sparse = nettrim.to_sparse(model, batch=4)
        assert timed == [["dense", "csr", form]] and report(sparse).layers[0].form == sparse[0].form == best
        torch.testing.assert_close(sparse(samples(3, 64)), model(samples(3, 64)))
        assert same_bits(state_of(nettrim.to_dense(sparse)), state_of(model))
    timed = fixed({}, monkeypatch)
    nettrim.to_sparse(thinned(chain(64, 64), 0.2), batch=4)
    assert timed == [["dense", "csr"]]


def test_rows_are_those_that_an_example_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            assert not self.training
            return self.head(self.dropout(self.body(x)).mean(1)) * scale

    fixed({"csr": 2.0}, monkeypatch)
    model = thinned(Tokens())
    example = {"x": torch.randn(5, 7, 16), "scale": torch.ones(1)}
    sparse = nettrim.to_sparse(model, example_inputs=example)
    found = {layer.name: layer for layer in report(sparse).layers}
    assert set(found["body"].speedups) == {35} and set(found["head"].speedups) == {5}
    assert found["unused"].reason == "the example inputs do not reach it" and type(sparse.unused) is nn.Linear
    assert model.training and sparse.training and sparse.dropout.training and sparse.body.training
    several = nettrim.to_sparse(model, example_inputs=[example, {"x": torch.randn(2, 7, 16), "scale": torch.ones(1)}])
    assert set(report(several).layers[0].speedups) == {14, 35}
    (layer,) = report(nettrim.to_sparse(thinned(chain(16, 16)), example_inputs=torch.randn(1500, 16))).layers
    assert set(layer.speedups) == {1500}  # one batch, whole


def test_a_choice_is_repeated_by_name_and_its_state_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed({"csr": 2.0}, monkeypatch)
    first = nettrim.to_sparse(thinned(chain(32, 16, 8)), batch=2)
    timed = fixed({}, monkeypatch)
    second = nettrim.to_sparse(chain(32, 16, 8, seed=7), layers=report(first).converted)
    assert timed == [] and report(second).converted == ["0", "2"] and not report(second).layers[0].speedups
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(samples(3, 32)), first(samples(3, 32)))
    only = report(nettrim.to_sparse(chain(32, 16, 8), layers="0"))
    assert only.converted == ["0"] and only.layers[1].reason == "not among the layers asked for"


class Inherits(nn.Linear):
    pass


def hooked() -> nn.Module:
    model = chain(16, 16)
    model[0].register_forward_hook(lambda *args: None)
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "head": nn.Linear(16, 16)})
    model["head"].weight = model["embedding"].weight
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: nn.Sequential(Inherits(16, 16)), "a Inherits: what a subclass"),
    "hooks": (hooked, "has hooks"),
    "masks": (lambda: nettrim.apply_masks(chain(16, 16), {"0.weight": torch.eye(16, dtype=torch.bool)}), "make it permanent first"),
    "shared": (tied, "shared with 'embedding.weight'"),
    "read": (lambda: nn.TransformerEncoderLayer(16, 2, 16), "TransformerEncoderLayer reads its weight without calling it"),
    "meta": (lambda: chain(16, 16).to("meta"), "on 'meta'"),
    "float8": (lambda: chain(16, 16).to(torch.float8_e4m3fn), "float8_e4m3fn on 'cpu'"),
    "empty": (lambda: nn.Sequential(nn.Linear(0, 4)), "empty"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_converted_is_left_with_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = LEFT[name]
    fixed({"csr": 9.0}, monkeypatch)
    sparse = nettrim.to_sparse(make())
    assert report(sparse).converted == [] and not any(isinstance(module, SparseLinear) for module in sparse.modules())
    assert any(reason in layer.reason for layer in report(sparse).layers), report(sparse)
    stuck = next(layer.name for layer in report(sparse).layers if reason in layer.reason)
    with pytest.raises(ArgumentError, match=f"{stuck}.* cannot be converted"):
        nettrim.to_sparse(make(), layers=[stuck])


def test_a_module_in_two_places_is_replaced_in_both_and_the_root_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed({"csr": 2.0}, monkeypatch)
    layer = nn.Linear(16, 16)
    thinned(layer)
    sparse = nettrim.to_sparse(nn.Sequential(layer, nn.ReLU(), layer), inplace=True)
    assert sparse[0] is sparse[2] and isinstance(sparse[0], SparseLinear)
    root = nettrim.to_sparse(layer)
    assert isinstance(root, SparseLinear) and report(root).converted == [""]
    assert type(nettrim.to_dense(root)) is nn.Linear
    kept = copy.deepcopy(root)
    assert torch.equal(kept(samples(2, 16)), root(samples(2, 16))) and report(kept) == report(root)


def test_a_form_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: x.new_full((*x.shape[:-1], self.out_features), torch.nan))
    with pytest.raises(NetTrimError, match="layer '0': its form 'csr' computes something else"):
        nettrim.to_sparse(thinned(chain(32, 32)))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "speed-up below 1": ({"min_speedup": 0.9}, "what is slower is not converted"),
    "speed-up of no number": ({"min_speedup": "fast"}, "min_speedup='fast'"),
    "rows": ({"batch": 0}, "batch=0; expected a whole number"),
    "no rows": ({"batch": []}, r"batch=\[\]"),
    "both": ({"batch": 1, "example_inputs": torch.ones(1, 16)}, "give one"),
    "unknown layer": ({"layers": ["7"]}, "layers: 7: no such linear layer; the model has 0"),
    "example": ({"example_inputs": torch.ones(2, 3)}, "could not run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        nettrim.to_sparse(thinned(chain(16, 16)), **arguments)


def test_what_is_no_module_is_refused() -> None:
    for function in (nettrim.to_sparse, nettrim.to_dense):
        with pytest.raises(ArgumentError, match="model is a str"):
            function("model")  # type: ignore[arg-type]


def test_a_device_decides_which_forms_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str) -> Any:
        return SimpleNamespace(weight=SimpleNamespace(device=SimpleNamespace(type=device)))

    assert sparsify._forms(on("mps"), 3) == "there is no sparse form for device 'mps'"
    packed = nn.Linear(1, 1)
    monkeypatch.setattr("nettrim.semi_structured.convert", lambda linear: packed)
    assert sparsify._forms(on("cuda"), 3) == {"2:4": packed}
    monkeypatch.setattr("nettrim.semi_structured.convert", lambda linear: "no such pattern")
    assert sparsify._forms(on("cuda"), 3) == "no such pattern"


def test_too_many_nonzeros_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fixed({"csr": 2.0}, monkeypatch)
    monkeypatch.setattr(sparsify, "LARGEST", 3)
    assert "more than 3 nonzeros" in report(nettrim.to_sparse(thinned(chain(32, 32), 0.2))).layers[0].reason
    assert timed == []
