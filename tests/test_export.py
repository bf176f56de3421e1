"""Pruned networks go through torch.export and ONNX as any others; a sparse one says what it needs first."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import chain, samples
from torch import nn

import nettrim


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    return nettrim.prune(chain(24, 32, 16, 5), samples(120, 24), sparsity=0.8).model.eval()


def to_onnx(model: nn.Module, path: Path) -> None:
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (samples(2, 24),), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_holds_the_pruned_weights_and_onnxruntime_agrees(pruned: nn.Module, tmp_path: Path) -> None:
    to_onnx(pruned, tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(stored)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored.graph.initializer}
    for name, parameter in pruned.named_parameters():
        assert np.array_equal(arrays[name], parameter.detach().numpy()), name
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7):
        x = samples(count, 24, seed=count)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, pruned(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_sparse_network_names_the_way_to_onnx(pruned: nn.Module, tmp_path: Path) -> None:
    sparse = nettrim.to_sparse(pruned, layers=["0"])
    with pytest.raises(Exception, match=r"ONNX has no sparse product; export nettrim.to_dense\(model\)"):
        to_onnx(sparse, tmp_path / "model.onnx")
    to_onnx(nettrim.to_dense(sparse), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("form", ["dense", "sparse", "shrunk"])
def test_torch_export_saves_and_loads_every_form(pruned: nn.Module, form: str, tmp_path: Path) -> None:
    model = {
        "dense": lambda: pruned,
        "sparse": lambda: nettrim.to_sparse(pruned, layers=["0", "2"]),
        "shrunk": lambda: nettrim.shrink(pruned, samples(4, 24)),
    }[form]()
    program = torch.export.export(model, (samples(2, 24),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 7):
        torch.testing.assert_close(loaded(samples(count, 24)), model(samples(count, 24)))
    if form == "sparse":
        assert any("nettrim.sparse_linear" in str(node.target) for node in program.graph.nodes)
