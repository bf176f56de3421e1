"""Bad input: a clear error, and the model as it was, bit for bit, whatever stage fails and however."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import chain, hooks_of, same_bits, samples, state_of
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, CalibrationError, ConvergenceError, InfeasibleError, NetTrimError, UnsupportedProgramError, pipeline, prune

INPUTS = samples(60, 8)


class Guard:
    """A model watched: state, flags, hooks and global switches must be what they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for index, module in enumerate(model.modules()):
            module.training = index % 2 == 0
        self.before, self.flags, self.hooks = state_of(model), [module.training for module in model.modules()], hooks_of(model)

    def check(self) -> None:
        assert same_bits(state_of(self.model), self.before)
        assert [module.training for module in self.model.modules()] == self.flags
        assert hooks_of(self.model) == self.hooks
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


class Poisoned(nn.Module):
    """Puts NaN or infinity into what layer 2 reads, for samples whose first entry is above a level."""

    def __init__(self, value: float, level: float = 90.0) -> None:
        super().__init__()
        self.body, self.head, self.value, self.level = chain(8, 6), chain(6, 3), value, level

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h = torch.where(x[:, :1] > self.level, self.value, h)
        return self.head(h)


def with_nan(value: float) -> nn.Module:
    model = chain(8, 10, 4)
    with torch.no_grad():
        model[2].weight[1, 3] = value
    return model


def poisoned_batches() -> list[Tensor]:
    bad = INPUTS[:20].clone()
    bad[:, 0] = 100
    return [INPUTS[:20], bad, INPUTS[20:40]]


class Doubled(nn.Module):
    """A layer that only a part of the forward passes runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).repeat(1, 2))


Model = Callable[[], nn.Module]
plain: Model = lambda: chain(8, 10, 4)  # noqa: E731
BAD: dict[str, tuple[Model, Any, dict[str, Any], type[Exception], str]] = {
    "no sample": (plain, torch.empty(0, 8), {}, CalibrationError, "no calibration sample"),
    "an empty list": (plain, [], {}, CalibrationError, "no calibration sample"),
    "a used generator": (plain, iter(()), {}, CalibrationError, "no calibration sample"),
    "no data at all": (plain, None, {}, CalibrationError, "NoneType.*expected a tensor"),
    "NaN in a weight": (lambda: with_nan(math.nan), INPUTS, {}, ArgumentError, "'2.weight' holds 1 NaN"),
    "infinity in a weight": (lambda: with_nan(math.inf), INPUTS, {}, ArgumentError, "'2.weight' holds 1 NaN or inf"),
    "NaN in the inputs": (plain, torch.where(INPUTS > 2, math.nan, INPUTS), {}, CalibrationError, "NaN.*batch 0"),
    "NaN in an activation": (lambda: Poisoned(math.nan), poisoned_batches(), {"holdout": 0}, CalibrationError, "NaN.*batch 1"),
    "infinity in an activation": (lambda: Poisoned(math.inf), poisoned_batches(), {"holdout": 0}, CalibrationError, "NaN or inf.*batch 1"),
    "epsilon 0": (plain, INPUTS, {"epsilon": 0}, ArgumentError, "epsilon=0; expected a finite number above 0"),
    "epsilon negative": (plain, INPUTS, {"epsilon": -0.1}, ArgumentError, r"epsilon=-0\.1"),
    "epsilon NaN": (plain, INPUTS, {"epsilon": math.nan}, ArgumentError, "epsilon=nan"),
    "epsilon infinite": (plain, INPUTS, {"epsilon": math.inf}, ArgumentError, "epsilon=inf"),
    "epsilon True": (plain, INPUTS, {"epsilon": True}, ArgumentError, "epsilon=True"),
    "epsilon None": (plain, INPUTS, {"epsilon": None}, ArgumentError, "epsilon=None"),
    "a key that matches nothing": (plain, INPUTS, {"epsilon": {"0": 0.1, "fc*": 0.1}}, ArgumentError, "epsilon: 'fc\\*' matches no.*0, 2"),
    "a budget of 0 in a mapping": (plain, INPUTS, {"epsilon": {"0": 0.0}}, ArgumentError, r"epsilon\['0'\]=0\.0"),
    "an empty mapping": (plain, INPUTS, {"epsilon": {}}, ArgumentError, "mapping is empty"),
    "a key that is no pattern": (plain, INPUTS, {"epsilon": {3: 0.1}}, ArgumentError, "epsilon holds 3"),
    "nothing to prune": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), INPUTS, {}, ArgumentError, "no layer to prune.*no layers with weights"),
    "nothing that can be pruned": (Doubled, INPUTS, {}, ArgumentError, "no layer to prune.*called 2 times"),
    "everything ignored": (plain, INPUTS, {"ignore": nn.Linear}, ArgumentError, "no layer to prune.*ignored, as asked"),
    "an ignore pattern that matches nothing": (plain, INPUTS, {"ignore": "conv*"}, ArgumentError, "ignore: 'conv\\*' matches no.*0, 2"),
    "a target that matches nothing": (plain, INPUTS, {"targets": ["0", "9"]}, ArgumentError, "targets: '9' matches no"),
    "a target type that matches nothing": (plain, INPUTS, {"targets": nn.Conv2d}, ArgumentError, "Conv2d"),
    "a broken expression": (plain, INPUTS, {"targets": "re:("}, ArgumentError, "'re:\\('.*regular expression"),
    "targets that are no pattern": (plain, INPUTS, {"targets": 5}, ArgumentError, "targets=5"),
    "a module for its type": (plain, INPUTS, {"ignore": nn.Linear(2, 2)}, ArgumentError, "ignore=Linear.*module type"),
    "too wide": (plain, samples(20, 9), {}, CalibrationError, r"batch 0 \(float32 \(18, 9\)\)"),
    "batches that differ": (plain, [INPUTS, samples(20, 9)], {}, CalibrationError, r"batch 1 .*\(20, 9\)"),
    "on the meta device": (lambda: chain(8, 4).to("meta"), INPUTS, {}, ArgumentError, "'0.weight' is on the meta device"),
    "an unknown solver": (plain, INPUTS, {"solver": "magic"}, ArgumentError, "'magic'.*'admm'"),
    "a solver of another kind": (plain, INPUTS, {"solver": None}, ArgumentError, "solver=None"),
    "a solver that cannot": (plain, INPUTS, {"solver": "osqp"}, UnsupportedProgramError, "'osqp'.*These do: .*cvxpy"),
    "the papers' solver on our set": (plain, INPUTS, {"solver": "admm"}, UnsupportedProgramError, "'admm'.*relaxed"),
    "infeasible": (plain, INPUTS, {"kappa": 1e-3, "consistency": "paper"}, InfeasibleError, "layer '2'.*factor above"),
    "a mode": (plain, INPUTS, {"mode": "serial"}, ArgumentError, "mode='serial'; expected 'cascade' or 'parallel'"),
    "a consistency": (plain, INPUTS, {"consistency": 1}, ArgumentError, "consistency=1"),
    "a penalty": (plain, INPUTS, {"penalty": "l2"}, ArgumentError, "penalty='l2'; expected 'auto' or 'l0' or 'l1'"),
    "on_failure": (plain, INPUTS, {"on_failure": "ignore"}, ArgumentError, "on_failure='ignore'"),
    "gamma below 1": (plain, INPUTS, {"gamma": 0.9}, ArgumentError, r"gamma=0\.9.*at least 1"),
    "gamma infinite": (plain, INPUTS, {"gamma": math.inf}, ArgumentError, "gamma=inf"),
    "gamma in words": (plain, INPUTS, {"gamma": "1.1"}, ArgumentError, "gamma='1.1'"),
    "kappa 0": (plain, INPUTS, {"kappa": 0}, ArgumentError, r"kappa=0; expected a number in \(0, 1\]"),
    "kappa above 1": (plain, INPUTS, {"kappa": 1.5}, ArgumentError, "kappa=1.5"),
    "kappa in parallel": (plain, INPUTS, {"kappa": 0.5, "mode": "parallel"}, ArgumentError, "kappa=0.5.*mode='parallel'"),
    "kappa with own budgets": (plain, INPUTS, {"kappa": 0.5, "epsilon": {"*": 0.1}}, ArgumentError, "kappa=0.5.*mapping"),
    "kappa for a layer left out": (plain, INPUTS, {"kappa": 0.5, "ignore": "2"}, ArgumentError, "kappa=0.5.*'2', which is not pruned"),
    "tol 0": (plain, INPUTS, {"tol": 0}, ArgumentError, "tol=0"),
    "tol None": (plain, INPUTS, {"tol": None}, ArgumentError, "tol=None"),
    "max_iter": (plain, INPUTS, {"max_iter": 0}, ArgumentError, "max_iter=0"),
    "max_rows": (plain, INPUTS, {"max_rows": 0}, ArgumentError, "max_rows=0"),
    "max_rows in parts": (plain, INPUTS, {"max_rows": 1.5}, ArgumentError, "max_rows=1.5"),
    "bias_weight": (plain, INPUTS, {"bias_weight": -1}, ArgumentError, "bias_weight=-1"),
    "holdout": (plain, INPUTS, {"holdout": 1}, ArgumentError, "holdout=1; expected a share"),
    "holdout in words": (plain, INPUTS, {"holdout": "some"}, ArgumentError, "holdout='some'"),
    "seed": (plain, INPUTS, {"seed": 0.5}, ArgumentError, "seed=0.5"),
    "a device": (plain, INPUTS, {"device": "gpu"}, ArgumentError, "device='gpu'"),
    "a device without numbers": (plain, INPUTS, {"device": "meta"}, ArgumentError, "device='meta'"),
    "an executor in cascade": (plain, INPUTS, {"executor": pipeline.Executor()}, ArgumentError, "mode='cascade'"),
    "an executor that is none": (plain, INPUTS, {"executor": 4, "mode": "parallel"}, ArgumentError, "executor is a int"),
    "progress": (plain, INPUTS, {"progress": "bar"}, ArgumentError, "progress='bar'"),
    "forward_fn": (plain, INPUTS, {"forward_fn": 3}, ArgumentError, "forward_fn=3"),
}


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, inplace: bool) -> None:
    make, data, options, kind, message = BAD[name]
    model = make()
    if any(parameter.is_meta for parameter in model.parameters()):
        with pytest.raises(kind, match=message):
            prune(model, data, epsilon=0.1, inplace=inplace)
        return
    guard = Guard(model)
    with pytest.raises(kind, match=message) as caught:
        prune(model, data, **{"epsilon": 0.1, **options}, inplace=inplace)
    assert isinstance(caught.value, NetTrimError)
    assert isinstance(caught.value, ValueError) or kind in (InfeasibleError, ConvergenceError)
    guard.check()


def test_a_quantised_model() -> None:
    packed = torch.quantize_per_tensor(torch.randn(4, 8), 0.1, 0, torch.qint8)
    model = chain(8, 4)
    model.register_buffer("packed", packed)
    with pytest.raises(ArgumentError, match="'packed' is quantised"):
        prune(model, INPUTS, epsilon=0.1)


def test_a_model_without_values() -> None:
    with pytest.raises(ArgumentError, match="'0.weight' is not initialised yet; run the model on one batch first"):
        prune(torch.nn.Sequential(torch.nn.LazyLinear(4)), INPUTS, epsilon=0.1)
    with pytest.raises(ArgumentError, match="'0.weight' is on the meta device"):
        prune(torch.nn.Sequential(torch.nn.Linear(8, 4, device="meta")), INPUTS, epsilon=0.1)


def test_a_model_that_is_none() -> None:
    with pytest.raises(ArgumentError, match="model is a function; expected a torch.nn.Module"):
        prune(lambda x: x, INPUTS, epsilon=0.1)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_copied() -> None:
    model = chain(8, 10, 4)
    model.cache = model(INPUTS)  # type: ignore[assignment]
    guard = Guard(model)
    with pytest.raises(ArgumentError, match="cannot be copied"):
        prune(model, INPUTS, epsilon=0.1)
    guard.check()


def test_nan_in_samples_kept_out_is_found_before_anything_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = INPUTS.clone()
    kept_out = nettrim.calibration.holdout_indices([INPUTS], 0.1, 0)
    bad[kept_out[0], 0] = 100.0
    monkeypatch.setattr(pipeline.dispatch, "solve", lambda *args, **kwargs: pytest.fail("solved something"))
    with pytest.raises(CalibrationError, match="network's output holds 3 NaN"):
        prune(Poisoned(math.nan), bad, epsilon=0.1)


class Selective(nn.Module):
    """How many rows its second layer sees depends on what the first one says."""

    def __init__(self, restore: bool) -> None:
        super().__init__()
        self.a, self.b, self.restore = chain(8, 6)[0], chain(6, 3)[0], restore

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = self.b(h[h[:, 0] > 0.05])
        return out.sum(0, keepdim=True) if self.restore else out


@pytest.mark.parametrize(
    ("mode", "restore", "message"),
    (("cascade", True, "layer 'b' is given .*mode='parallel'"), ("parallel", False, "shape depends on values")),
)
def test_shapes_that_depend_on_values(mode: str, restore: bool, message: str) -> None:
    model = Selective(restore)
    guard = Guard(model)
    with pytest.raises(NetTrimError, match=message):
        prune(model, INPUTS, epsilon=0.9, mode=mode, inplace=True)
    guard.check()


class Boom(Exception):
    pass


def failing(function: Callable[..., Any], call: int, error: BaseException) -> Callable[..., Any]:
    """The function, which raises at its N-th call, after it has done its work."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = function(*args, **kwargs)
        if count == call:
            raise error
        return result

    return wrapped


STAGES = (
    [("surveying.trace", 1), ("layers.copy_of", 1), ("network_bound", 1), ("certify", 1), ("Report", 1)]
    + [(stage, call) for stage in ("store", "dispatch._solve", "goals.make_budget", "_layer_report") for call in (1, 2)]
    + [("capture.kept", call) for call in (1, 2, 3, 4)]
    + [("capture.outputs", call) for call in (1, 2)]
    + [("capture.Outputs.add", call) for call in (1, 4)]
    + [("layers.Matrix.write_back", call) for call in (1, 2, 3, 4)]
    + [("layers.Matrix.forward_rows", 1)]
)


@pytest.mark.parametrize("error", (Boom(), KeyboardInterrupt()), ids=("exception", "interrupt"))
@pytest.mark.parametrize(("stage", "call"), STAGES)
def test_a_failure_at_any_stage_leaves_the_model(monkeypatch: pytest.MonkeyPatch, stage: str, call: int, error: BaseException) -> None:
    """In place too: with two layers the third and fourth `write_back` are those into the model itself."""
    model = chain(8, 10, 4)
    guard = Guard(model)
    *path, name = stage.split(".")
    owner = importlib.import_module(f"nettrim.{path[0]}") if path else pipeline
    for inner in path[1:]:
        owner = getattr(owner, inner)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), call, error))
    with pytest.raises(type(error)):
        prune(model, INPUTS, epsilon=0.1, inplace=True)
    guard.check()


@pytest.mark.parametrize("error", (Boom(), KeyboardInterrupt()), ids=("exception", "interrupt"))
@pytest.mark.parametrize("call", (1, 2, 5, 9, 12))
def test_a_forward_pass_that_fails(call: int, error: BaseException) -> None:
    model = chain(8, 10, 4)
    guard = Guard(model)
    fail = failing(lambda: None, call, error)  # before the model runs: most passes end early, inside it
    forward = lambda model, batch: (fail(), model(batch))[1]  # noqa: E731
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CalibrationError
    with pytest.raises(kind):
        prune(model, [INPUTS[:30], INPUTS[30:]], epsilon=0.1, inplace=True, forward_fn=forward)
    guard.check()


@pytest.mark.parametrize("error", (Boom(), KeyboardInterrupt()), ids=("exception", "interrupt"))
def test_a_progress_callable_that_fails(error: BaseException) -> None:
    model = chain(8, 10, 4)
    guard = Guard(model)
    with pytest.raises(type(error)):
        prune(model, INPUTS, epsilon=0.1, inplace=True, progress=failing(lambda event: None, 2, error))
    guard.check()
