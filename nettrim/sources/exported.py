"""A ``torch.export`` program (``.pt2``): its calls of ``aten.linear`` become ``nn.Linear`` modules to prune, and the weights go back into it.

A program has no layers, only operations on parameters that keep their names. Where an ``aten.linear`` reads the parameters ``NAME.weight`` and
``NAME.bias`` as they are, a module ``NAME`` with these very parameters takes its place in a copy of the graph; the program that is written is the one
that was read, with other numbers in its parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import tree_unflatten

from nettrim.calibration import SAMPLES_PER_CHUNK, sample_count
from nettrim.errors import ArgumentError, CalibrationError
from nettrim.sources.base import Reading, Source

PROGRAM = "model.pt2"
_ATEN = torch.ops.aten
_DECOMPOSED = {_ATEN.addmm.default, _ATEN.mm.default}


class Exported(Source):
    """A program that ``torch.export.save`` wrote."""

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        self.files = [self.place]
        program = read_program(self.place)
        self.inputs = _inputs(program)
        self.leaves, self.form = _leaves(program), program.call_spec.in_spec
        first = next((value.shape[0] for value in self.inputs.values() if value.dim()), None)
        self.fixed_batch = first if isinstance(first, int) else None
        self.forward_fn = self._run
        self.model = as_layers(program)

    def from_arrays(self, arrays: dict[str, Tensor]) -> Any:
        found = super().from_arrays(arrays)
        named = {next(iter(self.inputs)): found} if isinstance(found, Tensor) else found
        if named.keys() != self.inputs.keys():
            raise CalibrationError(f"the program takes {', '.join(self.inputs)}, and the arrays are {', '.join(named)}; expected the same names")
        single = next((name for name, value in named.items() if not value.dim()), None)
        if single is not None:
            raise CalibrationError(f"the array {single!r} is a single number; expected samples along the first dimension")
        counts = {name: len(value) for name, value in named.items()}
        if len(set(counts.values())) > 1:
            raise CalibrationError(f"the arrays hold different numbers of samples ({counts}); expected one number, along the first dimension")
        size = self.fixed_batch or SAMPLES_PER_CHUNK
        parts = [named[name].to(value.dtype).split(size) for name, value in self.inputs.items()]
        return [dict(zip(self.inputs, tensors, strict=True)) for tensors in zip(*parts, strict=True)]

    def from_images(self, images: Tensor, reading: Reading) -> list[Any]:
        return [{next(iter(self.inputs)): part} for part in images.split(self.fixed_batch or reading.batch_size)]

    def _run(self, model: nn.Module, batch: Any) -> Any:
        if self.fixed_batch is not None and sample_count(batch) != self.fixed_batch:
            raise CalibrationError(
                f"the program was exported for {self.fixed_batch} samples at a time, and a batch has {sample_count(batch)}; export it with a dynamic "
                "first dimension (torch.export's dynamic_shapes), or give a multiple of them with --holdout 0"
            )
        values = [constant if name is None else batch[name] for name, constant in self.leaves]
        args, keywords = tree_unflatten(values, self.form)
        return model(*args, **keywords)

    def write(self, pruned: nn.Module, place: Path) -> None:
        super().write(pruned, place)
        program = read_program(self.place)
        state = pruned.state_dict()
        with torch.no_grad():
            for name, tensor in program.state_dict.items():
                tensor.copy_(state[name])
        torch.export.save(program, place / PROGRAM)

    def read_pruned(self, place: Path) -> nn.Module:
        return as_layers(read_program(place / PROGRAM))


def read_program(path: Path) -> torch.export.ExportedProgram:
    """A program from its file.

    Raises
    ------
    ArgumentError
        torch cannot read it.
    """
    try:
        return torch.export.load(path)
    except Exception as error:  # zip, JSON and schema errors of many kinds
        raise ArgumentError(f"{path} is no program that this torch reads ({type(error).__name__}: {error}); expected torch.export.save's") from error


def as_layers(program: torch.export.ExportedProgram) -> nn.Module:
    """The program as a module whose linear operations are ``nn.Linear`` modules, named as their parameters are.

    Parameters
    ----------
    program : torch.export.ExportedProgram

    Returns
    -------
    nn.Module
        It computes what the program does, and has the same state dict.

    Raises
    ------
    ArgumentError
        None of its operations can be read so.
    """
    module = program.module()
    graph = module.graph
    replaced = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.linear.default:
            continue
        x, weight, bias = (*node.args, None)[:3]
        name = _owner(module, weight, bias)
        if name is None:
            continue  # it stays what it is, and its weight is in a module that the report names among those left dense
        if not isinstance(module.get_submodule(name), nn.Linear):
            _put_linear(module, name)
        with graph.inserting_before(node):
            call = graph.call_module(name, (x,))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        for read in {weight, bias} - {None}:
            if not read.users:
                graph.erase_node(read)
        replaced += 1
    if not replaced:
        decomposed = any(node.target in _DECOMPOSED for node in graph.nodes)
        reason = "its linear operations do not read plain parameters NAME.weight and NAME.bias"
        if decomposed:
            reason = "it was decomposed to core operations: export it anew, without run_decompositions()"
        raise ArgumentError(f"the program has no aten.linear that could be pruned; {reason}")
    graph.lint()
    module.recompile()
    return module


def _owner(module: nn.Module, weight: Any, bias: Any) -> str | None:
    """``NAME``, where the operation reads exactly the parameters ``NAME.weight`` and ``NAME.bias``, and NAME holds no others."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not str(weight.target).endswith(".weight"):
        return None
    name = str(weight.target).removesuffix(".weight")
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == f"{name}.bias"):
        return None
    holder = module.get_submodule(name)
    wanted = {"weight"} if bias is None else {"weight", "bias"}
    own = {key for key, value in holder._parameters.items() if value is not None}
    empty = not holder._buffers and not any(True for _ in holder.children())
    return name if own == wanted and empty else None


def _put_linear(module: nn.Module, name: str) -> None:
    """An ``nn.Linear`` in the place of what holds its parameters, with the same ones."""
    holder = module.get_submodule(name)
    weight = holder.get_parameter("weight")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in holder._parameters, device="meta")
    for key in layer._parameters:
        if layer._parameters[key] is not None:
            setattr(layer, key, holder.get_parameter(key))
    layer.training = holder.training
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


def _inputs(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """What it is called with, by name and in order: tensors without values, of which dtypes and shapes count.

    Raises
    ------
    ArgumentError
        One is no tensor, or has no dimension for samples.
    """
    wanted = set(program.graph_signature.user_inputs)
    found = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted}
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        raise ArgumentError(f"the program takes {others[0] if others else 'nothing'}, which is no tensor; expected one that is called with tensors")
    single = next((name for name, value in found.items() if not value.dim()), None)
    if single is not None:
        raise ArgumentError(f"the program takes {single}, a tensor without dimensions; expected samples along the first dimension of each")
    return found


def _leaves(program: torch.export.ExportedProgram) -> list[tuple[str | None, Any]]:
    """What it is called with, flat: a tensor's name, or None and the constant that it was exported with."""
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return [(None, arg.value) if isinstance(arg, ConstantArgument) else (arg.name, None) for arg in given]
