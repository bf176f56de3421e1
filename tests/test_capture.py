"""Captured rows are the layer's own, and the model is left as it was, whatever happens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nettrim
from nettrim import calibration, capture, layers, passes
from nettrim.errors import CalibrationError

RUN = calibration.runner()
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class InPlace(nn.Module):
    """Changes the layer's input and output in place once the layer has run; counts what ran behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.after = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self.after += 1
        h.relu_()
        x.zero_()
        return self.last(h)


class Stubborn(InPlace):
    """Catches everything and goes on."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except BaseException:  # noqa: B036
            x.zero_()
            return x


def hook_counts(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("model_type", [InPlace, Stubborn])
def test_rows_are_taken_before_anything_changes_them(
    model_type: type[InPlace], dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    model = model_type().to(device=device, dtype=dtype)
    batches = calibration.batches([torch.randn(5, 4), torch.randn(3, 4)])
    originals = [batch.clone() for batch in batches]
    a, z = capture.rows(model, batches, RUN, model.fc)
    x = torch.cat(originals).to(device=device, dtype=dtype)
    assert a.dtype == z.dtype == layers.compute_dtype(model.fc) and a.device.type == device
    assert torch.equal(a[:, :-1], x.to(a.dtype)) and torch.equal(a[:, -1], torch.ones_like(a[:, -1]))
    assert torch.allclose(z, model.fc(x).to(z.dtype), rtol=2 * torch.finfo(dtype).eps) and (z < 0).any()
    assert torch.allclose(layers.forward_rows(model.fc, a), z, rtol=4 * torch.finfo(dtype).eps)
    assert all(torch.equal(batch, original) for batch, original in zip(batches, originals, strict=True))
    assert model.after == 0 and hook_counts(model) == [0] * 3


def test_rows_share_no_memory_with_what_the_model_goes_on_to_change() -> None:
    model = Stubborn()
    model.fc = nn.Linear(4, 3, bias=False)  # nothing is appended to the inputs, so nothing copies them by itself
    x = torch.randn(5, 4)
    a, _ = capture.rows(model, [x], RUN, model.fc)
    assert torch.equal(a, x)


def test_rows_see_the_layers_own_output_not_what_a_hook_makes_of_it() -> None:
    model = InPlace()
    model.fc.register_forward_hook(lambda module, args, out: out * 0)
    x = torch.randn(5, 4)
    _, z = capture.rows(model, [x], RUN, model.fc)
    assert torch.allclose(z, layers.forward_rows(model.fc, layers.input_rows(model.fc, x)))


def test_rows_of_layers_in_the_fused_transformer_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    encoder.train()
    fused = torch.backends.mha.get_fastpath_enabled()
    a, z = capture.rows(encoder, [torch.randn(3, 5, 8)], RUN, encoder.layers[1].linear2)
    assert a.shape == (15, 17) and z.shape == (15, 8)
    assert torch.backends.mha.get_fastpath_enabled() is fused and all(flags(encoder))


@pytest.mark.parametrize("where", ["input", "output"])
def test_nan_names_the_layer_and_the_batch(where: str) -> None:
    model = InPlace()
    batches = [torch.ones(2, 4), torch.ones(2, 4)]
    if where == "input":
        batches[1][0, 2] = torch.nan
    else:
        model.half()
        batches[1][:] = 6e4
        model.fc.weight.data.fill_(1)
    with pytest.raises(CalibrationError, match=rf"the {where} of layer 'fc' holds .* batch 1"):
        capture.rows(model, batches, RUN, model.fc)
    assert hook_counts(model) == [0] * 3


def test_nan_in_a_later_call_of_a_cell_names_the_cell_and_the_batch() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.RNNCell(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 4)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.out(torch.nan_to_num(h))

    batches = [torch.randn(5, 4, 3), torch.randn(5, 4, 3)]
    batches[1][2, 3, 0] = float("nan")  # in the last of four calls
    with pytest.raises(CalibrationError, match=r"the input of layer 'cell.weight_ih' holds \d+ NaN or infinite value\(s\) .* in calibration batch 1"):
        nettrim.prune(Cells(), batches, epsilon=0.1, holdout=0)


def test_a_layer_that_does_not_run_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    run = calibration.runner(lambda model, batch: model["used"](batch))
    with pytest.raises(CalibrationError, match="layer 'unused' did not run in calibration batch 0"):
        capture.rows(model, [torch.ones(1, 2)], run, model["unused"])


def test_a_failing_forward_is_chained_and_leaves_no_trace() -> None:
    model = InPlace().train()
    model.last.eval()
    before = flags(model)
    with pytest.raises(
        CalibrationError, match=r"InPlace could not run calibration batch 1 \(float32 \(2, 5\)\)"
    ) as caught:
        capture.rows(model, [torch.ones(2, 4), torch.ones(2, 5)], RUN, model.fc)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert hook_counts(model) == [0] * 3 and flags(model) == before and torch.is_grad_enabled()


def test_evaluation_puts_every_flag_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    before = flags(model)
    with pytest.raises(KeyError), passes.evaluation(model):
        assert not any(flags(model)) and not torch.is_grad_enabled() and not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert flags(model) == before and torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_outputs_are_rows_where_they_can_be() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    batches = [torch.randn(5, 4), torch.randn(2, 4)]
    found = capture.outputs(model, batches, RUN)
    assert found.shape == (7, 3) and torch.equal(found, model.eval()(torch.cat(batches)))
    tokens = [torch.randn(2, 6, 4), torch.randn(2, 3, 4)]
    assert capture.outputs(model, tokens, RUN).shape == (18, 3)
    assert capture.outputs(model.half(), batches, RUN).dtype == torch.float32
    assert capture.outputs(model.double(), batches, RUN).dtype == torch.float64


def test_outputs_hold_every_element_of_a_nested_output() -> None:
    class Output:
        def __init__(self, x: Tensor) -> None:
            self.hidden, self.count, self.own = x, x.argmax(-1), self

    def forward(model: nn.Module, x: Tensor) -> dict[str, Any]:
        return {"a": (x[:, 0], [x]), "b": Output(x + 1)}

    x = torch.arange(6.0).reshape(3, 2)
    found = capture.outputs(nn.Identity(), [x], calibration.runner(forward))
    assert found.shape == (15, 1)
    assert torch.equal(
        found.sort(0).values, torch.cat([x[:, 0], x.flatten(), (x + 1).flatten()])[:, None].sort(0).values
    )


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(CalibrationError, match="without a floating-point tensor for batch 0"):
        capture.outputs(nn.Identity(), [torch.ones(2, 3)], calibration.runner(lambda model, x: x.argmax(1)))
    with pytest.raises(CalibrationError, match="the network's output holds 3 NaN .* batch 1"):
        capture.outputs(
            nn.Identity(),
            [torch.ones(1, 3), -torch.ones(1, 3)],
            calibration.runner(lambda _, x: F.relu(x).log() / x.clamp(0)),
        )
