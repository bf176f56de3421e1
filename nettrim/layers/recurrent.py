"""RNN, LSTM, GRU and their cells: of each layer and direction the matrix of the inputs, that of the hidden states, and an LSTM's projection.

``Z`` is what a matrix adds to the gates (its own bias included). Its rows are those of every step, the hidden states as the module itself goes
through them: a step is not asked what it would do on other states than those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from nettrim.layers.base import Call, Kind, Part, register


@dataclass
class _Seen:
    """What the three matrices of one layer and direction were given, each (steps, batch, width)."""

    ih: Tensor
    hh: Tensor
    hr: Tensor | None
    out: Tensor


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    found: Tensor | None = getattr(module, name, None)
    return found


def _step(kind: str, gates: tuple[Tensor, Tensor], h: Tensor, c: Tensor | None, relu: bool) -> tuple[Tensor, Tensor | None]:
    """Next hidden state (before a projection) and cell state, from what the two matrices add to the gates."""
    x, r = gates
    if kind == "LSTM":
        assert c is not None
        i, f, g, o = (x + r).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), r.chunk(3, 1)
        z = (xz + hz).sigmoid()
        return (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h, None
    return (x + r).relu() if relu else (x + r).tanh(), None


def _scan(module: nn.Module, suffix: str, x: Tensor, h: Tensor, c: Tensor | None) -> _Seen:
    """Run one layer in one direction over ``x`` (steps, batch, width), from the states (batch, H)."""
    kind, relu = type_name(module), getattr(module, "nonlinearity", None) == "relu"
    own = {key: _parameter(module, f"{key}_{suffix}") for key in ("weight_hh", "bias_hh", "weight_hr")}
    weight_ih = _parameter(module, f"weight_ih_{suffix}")
    assert weight_ih is not None and own["weight_hh"] is not None
    added = F.linear(x, weight_ih, _parameter(module, f"bias_ih_{suffix}"))
    states, before, out = [], [], []
    for step in added:
        states.append(h)
        h, c = _step(kind, (step, F.linear(h, own["weight_hh"], own["bias_hh"])), h, c, relu)
        before.append(h)
        if own["weight_hr"] is not None:
            h = F.linear(h, own["weight_hr"])
        out.append(h)
    return _Seen(x, torch.stack(states), torch.stack(before) if own["weight_hr"] is not None else None, torch.stack(out))


def type_name(module: nn.Module) -> str:
    """``"RNN"``, ``"LSTM"`` or ``"GRU"``, of a module or a cell."""
    return "LSTM" if isinstance(module, nn.LSTM | nn.LSTMCell) else "GRU" if isinstance(module, nn.GRU | nn.GRUCell) else "RNN"


class RecurrentKind(Kind):
    """``nn.RNN``, ``nn.LSTM``, ``nn.GRU``: ``weight_ih_l0``, ``weight_hh_l0``, ``weight_ih_l0_reverse`` ..."""

    observed = False
    feeds_itself = True

    def refuses_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if any(isinstance(x, PackedSequence) for x in (*args, *kwargs.values())):
            return "it is given a PackedSequence; give padded sequences (e.g. sorted by length, in batches of one length)"
        return None

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        found = []
        for suffix in _suffixes(module):
            for key in ("ih", "hh", "hr") if getattr(module, "proj_size", 0) else ("ih", "hh"):
                bias = f"bias_{key}_{suffix}" if module.bias and key != "hr" else None
                found.append(Part(f"weight_{key}_{suffix}", f"weight_{key}_{suffix}", bias))
        return tuple(found)

    def inputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        _, key, suffix = part.label.split("_", 2)
        seen: Tensor = getattr(_run(module, call, suffix), key)
        return seen.flatten(0, -2)

    def outputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        bias = None if part.bias is None else module.get_parameter(part.bias)
        return F.linear(self.inputs(module, part, call), module.get_parameter(part.weight), bias)


def _suffixes(module: nn.Module) -> list[str]:
    return [f"l{layer}{way}" for layer in range(module.num_layers) for way in (("", "_reverse") if module.bidirectional else ("",))]  # type: ignore[arg-type]


def _run(module: nn.Module, call: Call, wanted: str) -> _Seen:
    """What the layer and direction ``wanted`` is given."""
    x, states = call.argument(module), call.argument(module, "hx")
    lstm = isinstance(module, nn.LSTM)
    if x.dim() == 2:  # no batch
        x = x.unsqueeze(1)
        if states is not None:
            states = tuple(state.unsqueeze(1) for state in states) if lstm else states.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    hidden: int = module.hidden_size  # type: ignore[assignment]
    suffixes = _suffixes(module)
    if states is None:
        h = x.new_zeros(len(suffixes), x.shape[1], getattr(module, "proj_size", 0) or hidden)
        c = x.new_zeros(len(suffixes), x.shape[1], hidden) if lstm else None
    else:
        h, c = states if lstm else (states, None)
    ways: list[Tensor] = []
    for place, suffix in enumerate(suffixes):
        backwards = suffix.endswith("_reverse")
        seen = _scan(module, suffix, x.flip(0) if backwards else x, h[place], None if c is None else c[place])
        if suffix == wanted:
            return seen
        ways.append(seen.out.flip(0) if backwards else seen.out)
        if len(ways) == 1 + bool(module.bidirectional):
            x, ways = torch.cat(ways, -1), []
    raise AssertionError(f"{wanted} is none of {suffixes}")


class CellKind(Kind):
    """``nn.RNNCell``, ``nn.LSTMCell``, ``nn.GRUCell``: ``weight_ih`` and ``weight_hh``; their rows are those of every call."""

    observed = False
    feeds_itself = True
    repeats = True

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        return tuple(Part(f"weight_{key}", f"weight_{key}", f"bias_{key}" if module.bias else None) for key in ("ih", "hh"))

    def inputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        x = torch.atleast_2d(call.argument(module))
        if part.label == "weight_ih":
            return x
        state = call.argument(module, "hx")
        if state is None:
            return x.new_zeros(len(x), module.hidden_size)
        return torch.atleast_2d(state[0] if isinstance(module, nn.LSTMCell) else state)

    def outputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        bias = None if part.bias is None else module.get_parameter(part.bias)
        return F.linear(self.inputs(module, part, call), module.get_parameter(part.weight), bias)


for _recurrent in (nn.RNN, nn.LSTM, nn.GRU):
    register(_recurrent)(RecurrentKind)
for _cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    register(_cell)(CellKind)
