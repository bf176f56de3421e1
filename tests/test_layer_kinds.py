"""Every layer type and option against a matrix built column by column from the module itself, with unit inputs."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.layers import Call, Matrix

transformers = pytest.importorskip("transformers.pytorch_utils")


def linear_map(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The matrix of an affine function of an input of that shape, column by column, and its constant part; both flattened."""
    zero = torch.zeros(shape, dtype=torch.float64)
    constant = function(zero).flatten()
    columns = []
    for place in range(zero.numel()):
        unit = zero.clone()
        unit.view(-1)[place] = 1.0
        columns.append(function(unit).flatten() - constant)
    return torch.stack(columns, 1), constant


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().eval().parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def conv(dims: int, *args: Any, transposed: bool = False, **kwargs: Any) -> nn.Module:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return kinds[dims - 1](*args, **kwargs)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: conv(1, 3, 4, 3), (2, 3, 7)),
    "1d stride dilation padding": (lambda: conv(1, 3, 4, 3, stride=2, dilation=2, padding=3), (2, 3, 8)),
    "2d no bias": (lambda: conv(2, 2, 3, 3, bias=False), (2, 2, 5, 4)),
    "2d rectangular": (lambda: conv(2, 2, 3, (1, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2)), (1, 2, 5, 6)),
    "2d kernel of one": (lambda: conv(2, 4, 3, 1), (2, 4, 3, 3)),
    "2d as large as its input": (lambda: conv(2, 2, 3, (4, 3)), (2, 2, 4, 3)),
    "2d without a batch": (lambda: conv(2, 2, 4, 3, groups=2), (2, 5, 4)),
    "3d": (lambda: conv(3, 2, 4, (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (1, 2, 3, 3, 3)),
    "depthwise": (lambda: conv(2, 3, 3, 3, groups=3, padding=1), (1, 3, 4, 4)),
    "depthwise multiplied": (lambda: conv(2, 2, 6, 2, groups=2, bias=False), (2, 2, 4, 3)),
    "transposed 1d": (lambda: conv(1, 3, 4, 3, transposed=True), (2, 3, 4)),
    "transposed stride": (lambda: conv(1, 2, 3, 3, stride=3, padding=1, output_padding=2, transposed=True), (2, 2, 4)),
    "transposed narrow kernel": (lambda: conv(1, 2, 3, 1, stride=3, padding=0, transposed=True), (1, 2, 3)),
    "transposed more padding than kernel": (lambda: conv(1, 2, 3, 2, stride=1, padding=2, transposed=True), (1, 2, 7)),
    "transposed 2d": (
        lambda: conv(2, 4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2), groups=2, transposed=True),
        (1, 4, 3, 2),
    ),
    "transposed depthwise without a batch": (lambda: conv(2, 3, 3, 2, stride=2, groups=3, bias=False, transposed=True), (3, 2, 3)),
    "transposed 3d": (lambda: conv(3, 2, 2, 2, stride=(1, 2, 1), output_padding=(0, 1, 0), transposed=True), (1, 2, 2, 2, 2)),
} | {
    f"padding {padding} {mode} kernel {kernel}": (
        lambda padding=padding, mode=mode, kernel=kernel: conv(2, 2, 3, kernel, padding=padding, padding_mode=mode, dilation=(1, 2)),
        (1, 2, 6, 7),
    )
    for padding, mode, kernel in itertools.product(("same", "valid", (1, 2)), ("zeros", "reflect", "replicate", "circular"), ((3, 2), (2, 3)))
}


def block_product(matrix: Matrix, A: Tensor, W: Tensor) -> Tensor:
    """``A Wᵀ`` group by group, spelled out."""
    G, N, M = matrix.groups, W.shape[1], W.shape[0] // matrix.groups
    return torch.cat([A[:, g * N : (g + 1) * N] @ W[g * M : (g + 1) * M].T for g in range(G)], 1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_the_map_that_unit_inputs_show(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    module = randomised(make())
    matrix = layers.only_matrix(module)
    W = layers.as_matrix(matrix)
    operator, constant = linear_map(lambda x: module(x).detach(), shape)

    def by_rows(x: Tensor) -> Tensor:
        out = module(x)
        Z = block_product(matrix, layers.input_rows(matrix, x, out=out), W)
        batched = out if out.dim() == len(matrix.weight.shape) else out.unsqueeze(0)
        return Z.view(batched.shape[0], *batched.shape[2:], -1).movedim(-1, 1).reshape(out.shape).detach()

    ours, our_constant = linear_map(by_rows, shape)
    torch.testing.assert_close(ours, operator, rtol=0, atol=1e-12)
    torch.testing.assert_close(our_constant, constant, rtol=0, atol=1e-12)
    # the rows' largest factor is exactly the spectral norm of the map from inputs to rows
    rows, _ = linear_map(lambda x: layers.input_rows(matrix, x, out=module(x)), shape)
    spread = matrix.kind.spread(module, matrix.part, Call((torch.zeros(shape, dtype=torch.float64),), {}, module(torch.zeros(shape).double())))
    assert spread == pytest.approx(float(torch.linalg.svdvals(rows)[0]), abs=1e-9)


def test_what_is_asked_of_a_transposed_convolution_when_it_is_called_counts() -> None:
    module = randomised(nn.ConvTranspose1d(2, 3, 3, stride=3))
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    for size in (12, 13, 14):
        out = module(x, output_size=[size])
        A, Z = layers.input_rows(module, x, output_size=[size], out=out), layers.output_rows(module, out)
        torch.testing.assert_close(A @ layers.as_matrix(module).T, Z)
        by_name = layers.input_rows(module, output_size=[size], input=x, out=out)
        assert torch.equal(by_name, A)


QKV = ("in_proj_q", "in_proj_k", "in_proj_v", "out_proj")
RNNS = [
    (kind, {"num_layers": deep, "bidirectional": both, "bias": bias, "batch_first": first, **more})
    for kind, more in ((nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {}))
    for deep, both, bias, first in ((1, False, True, False), (2, True, True, True), (2, False, False, False))
]
SEVERAL: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "attention": (lambda: nn.MultiheadAttention(6, 2), (torch.randn(3, 2, 6),) * 3),
    "attention without bias": (lambda: nn.MultiheadAttention(6, 3, bias=False, batch_first=True), (torch.randn(2, 4, 6),) * 3),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True),
        (torch.randn(2, 3, 6), torch.randn(2, 5, 4), torch.randn(2, 5, 5)),
    ),
    "attention with what is added": (lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True), (torch.randn(3, 2, 6),) * 3),
    "attention without a batch": (lambda: nn.MultiheadAttention(6, 2), (torch.randn(3, 6),) * 3),
    "transposed linear": (lambda: transformers.Conv1D(5, 4), (torch.randn(2, 3, 4),)),
    "RNN cell": (lambda: nn.RNNCell(4, 3), (torch.randn(5, 4), torch.randn(5, 3))),
    "LSTM cell": (lambda: nn.LSTMCell(4, 3, bias=False), (torch.randn(5, 4), (torch.randn(5, 3), torch.randn(5, 3)))),
    "GRU cell without a state or a batch": (lambda: nn.GRUCell(4, 3), (torch.randn(4),)),
} | {f"{kind.__name__} {options}": (lambda kind=kind, options=options: kind(4, 3, **options), (torch.randn(5, 2, 4),)) for kind, options in RNNS}


def to_double(x: Any) -> Any:
    return tuple(map(to_double, x)) if isinstance(x, tuple) else x.double()


@pytest.mark.parametrize("name", SEVERAL)
def test_each_matrix_comes_out_and_goes_back_bit_for_bit_and_makes_its_rows(name: str) -> None:
    make, args = SEVERAL[name]
    module, args = randomised(make()), to_double(args)
    call = Call(args, {}, module(*args))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for matrix in layers.matrices_of(module):
        A, Z, W = matrix.input_rows(call), matrix.output_rows(call), matrix.as_matrix()
        assert matrix.shape == (W.shape[0], W.shape[1] - matrix.has_bias)
        torch.testing.assert_close(A @ W.T, Z)
        torch.testing.assert_close(matrix.forward_rows(A), Z)
        matrix.write_back(W)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        marked = torch.arange(W.numel(), dtype=torch.float64).view(W.shape)
        matrix.write_back(marked)
        assert torch.equal(matrix.as_matrix(), marked)
        matrix.write_back(W)
    entries = sum(matrix.weights().numel() for matrix in layers.matrices_of(module))
    assert entries == sum(p.numel() for key, p in module.named_parameters() if "weight" in key and p.dim() > 1)


def written(module: nn.Module, matrix: Matrix, change: Tensor) -> nn.Module:
    """A copy of the module with something added to one of its matrices."""
    copy = layers.copy_of(module)
    matrix.of(copy).write_back(matrix.as_matrix() + change)
    return copy


@pytest.mark.parametrize("name", [name for name in SEVERAL if name.startswith("attention")])
def test_the_output_of_attention_is_that_of_its_last_matrix_on_the_rows_that_were_found(name: str) -> None:
    make, args = SEVERAL[name]
    module, args = randomised(make()), to_double(args)
    projection = layers.matrices_of(module)[-1]
    assert projection.part.label == "out_proj"
    A = projection.input_rows(Call(args, {}, module(*args)))
    change = torch.randn_like(projection.as_matrix())
    torch.testing.assert_close(written(module, projection, change)(*args)[0].flatten(0, -2), A @ (projection.as_matrix() + change).T)
    # and the first three are where they are: queries changed by what leaves every inner product alone change nothing
    q, k = layers.matrices_of(module)[:2]
    both = layers.copy_of(module)
    q.of(both).write_back(2 * q.as_matrix())
    k.of(both).write_back(0.5 * k.as_matrix())
    if "added" not in name:  # the added keys are not of the matrix
        torch.testing.assert_close(both(*args)[0], module(*args)[0])


@pytest.mark.parametrize("name", [name for name in SEVERAL if name.startswith(("RNN {", "LSTM {", "GRU {"))])
def test_the_rows_of_recurrent_layers_are_the_states_that_the_module_goes_through(name: str) -> None:
    make, (x,) = SEVERAL[name]
    module, x = randomised(make()), x.double()
    for parameter in module.parameters():
        parameter.data.mul_(0.4)
    call = Call((x,), {}, module(x))
    out = call.out[0]
    named = {matrix.part.label: matrix.input_rows(call) for matrix in layers.matrices_of(module)}
    steps, batch = (x.shape[1], x.shape[0]) if module.batch_first else x.shape[:2]
    sequence = (out.transpose(0, 1) if module.batch_first else out).detach()
    last = module.num_layers - 1
    width = module.proj_size or module.hidden_size
    for way, backwards in (("", False), ("_reverse", True))[: 1 + module.bidirectional]:
        states = named[f"weight_hh_l{last}{way}"].view(steps, batch, -1)[..., :width]
        mine = sequence[..., width:].flip(0) if backwards else sequence[..., :width]
        assert not states[0].any()
        torch.testing.assert_close(states[1:], mine[:-1])
    given = named["weight_ih_l0"].view(steps, batch, -1)[..., :4]
    torch.testing.assert_close(given, x.transpose(0, 1) if module.batch_first else x)


def test_recurrent_layers_start_where_they_are_told_to() -> None:
    module, x = randomised(nn.LSTM(4, 3, num_layers=2)), torch.randn(5, 2, 4).double()
    h, c = torch.randn(2, 2, 3).double(), torch.randn(2, 2, 3).double()
    for args, state in (((x, (h, c)), h), ((x[:, 0], (h[:, 0], c[:, 0])), h[:, :1])):
        call = Call(args, {}, module(*args))
        for place, label in ((1, "weight_hh_l0"), (3, "weight_hh_l1")):
            matrix = layers.matrices_of(module)[place]
            assert matrix.part.label == label
            torch.testing.assert_close(matrix.input_rows(call).view(5, -1, 4)[0, :, :3], state[place // 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_narrow_dtypes_go_round_bit_for_bit(dtype: torch.dtype, transposed: bool) -> None:
    module = conv(2, 4, 6, 3, groups=2, transposed=transposed).to(dtype)
    before = module.weight.detach().clone()
    layers.write_back(module, layers.as_matrix(module).double())
    assert torch.equal(before.view(torch.int16), module.weight.detach().view(torch.int16))
    assert layers.compute_dtype(module) == torch.float32


def test_only_kinds_are_registered_and_only_for_modules() -> None:
    with pytest.raises(layers.ArgumentError, match="expected a subclass of nn.Module, or its full name"):
        layers.register(int)  # type: ignore[arg-type]
    with pytest.raises(layers.ArgumentError, match="expected a subclass of nettrim.layers.Kind"):
        layers.register(nn.Bilinear)(nn.Bilinear)  # type: ignore[type-var,arg-type]
    assert not layers.is_supported(nn.Bilinear(1, 1, 1))


def test_modules_of_several_matrices_are_not_taken_for_one() -> None:
    module = nn.GRU(3, 2)
    with pytest.raises(layers.ArgumentError, match="GRU, which holds several matrices .weight_ih_l0, weight_hh_l0."):
        layers.as_matrix(module)
    model = nn.ModuleDict({"a": module, "b": nn.MultiheadAttention(2, 1), "c": nn.Linear(2, 2)})
    assert list(layers.matrices(model)) == ["a.weight_ih_l0", "a.weight_hh_l0", *(f"b.{label}" for label in QKV), "c"]
    assert layers.matrix(model, "a.weight_hh_l0").weight is module.weight_hh_l0
    with pytest.raises(layers.ArgumentError, match=r"no matrix 'a'.*a\.weight_ih_l0"):
        layers.matrix(model, "a")
    assert math.prod(layers.matrix(model, "b.in_proj_k").shape) == 4
