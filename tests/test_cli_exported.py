"""`nettrim prune NET.pt2`: a program in, the same program with zeros in its weights out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import calibration_file, nettrim
from networks import chain, same_bits, samples, state_of
from torch import nn
from torch.export import Dim, export, load
from torch.export import save as save_program

import nettrim as package
from nettrim import ArgumentError
from nettrim.sources.exported import Exported, as_layers, read_program


class Net(nn.Module):
    """Two inputs, a residual sum, a norm, and two layers with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4, bias=False)
        self.tied = nn.Linear(8, 4, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x, shift):
        h = self.norm(self.body(x) + x)
        return self.head(h) + self.tied(h * h), shift + 1


def program(folder: Path, model: nn.Module, *inputs: torch.Tensor, dynamic: bool = True) -> Path:
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if dynamic else None
    save_program(export(model.eval(), inputs, dynamic_shapes=shapes), folder / "net.pt2")
    return folder / "net.pt2"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return program(tmp_path_factory.mktemp("program"), Net(), samples(3, 8), samples(3, 1))


class TestRewriting:
    def test_computes_what_the_program_does(self, exported):
        original, layered = read_program(exported).module(), as_layers(read_program(exported))
        x, shift = samples(7, 8), samples(7, 1)
        for a, b in zip(original(x, shift), layered(x, shift), strict=True):
            assert torch.equal(a, b)
        assert same_bits(state_of(original), state_of(layered))
        kinds = {name for name, module in layered.named_modules() if isinstance(module, nn.Linear)}
        assert kinds == {"body.0", "body.2", "tied"} or kinds == {"body.0", "body.2", "head"}

    def test_pruning_it_is_pruning_the_module(self, tmp_path):
        model = chain(8, 12, 4)
        layered = as_layers(read_program(program(tmp_path, model, samples(3, 8))))
        mine, theirs = (package.prune(net, samples(60, 8), epsilon=0.3) for net in (layered, model))
        assert same_bits(state_of(mine.model), state_of(theirs.model))
        assert mine.report.certificate == theirs.report.certificate  # with the bound for the network: it is seen to be a chain
        assert [layer.activation for layer in mine.report.layers] == ["relu", None]

    def test_what_has_no_linear_operation(self, tmp_path):
        path = program(tmp_path, nn.Sequential(nn.ReLU()), samples(3, 8))
        with pytest.raises(ArgumentError, match="has no aten.linear that could be pruned; its linear operations do not read plain parameters"):
            as_layers(read_program(path))
        decomposed = export(chain(8, 4), (samples(3, 8),)).run_decompositions()
        with pytest.raises(ArgumentError, match="decomposed to core operations: export it anew, without run_decompositions"):
            as_layers(decomposed)

    def test_a_weight_that_is_computed_stays(self, tmp_path):
        class Computed(nn.Module):
            def __init__(self):
                super().__init__()
                self.plain, self.scaled = nn.Linear(8, 8), nn.Linear(8, 4)

            def forward(self, x):
                return nn.functional.linear(self.plain(x), 2 * self.scaled.weight, self.scaled.bias)

        layered = as_layers(read_program(program(tmp_path, Computed(), samples(3, 8))))
        result = package.prune(layered, samples(60, 8), sparsity=0.5)
        assert [layer.name for layer in result.report.layers] == ["plain"] and "scaled" in result.report.skipped


class TestCommand:
    def test_writes_a_program_with_the_zeros_in_it(self, exported, tmp_path):
        np.savez(tmp_path / "both.npz", shift=samples(60, 1).numpy(), x=samples(60, 8).numpy())
        out = tmp_path / "out"
        result = nettrim("prune", exported, "--calibration", tmp_path / "both.npz", "--sparsity", 0.5, "--allocation", "uniform", "--out", out)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        pruned, report = load(out / "model.pt2"), package.Report.from_json(out / "report.json")
        assert [layer.name for layer in report.layers] == ["body.0", "body.2"]
        masks = package.load(out, as_layers(read_program(exported))).masks
        for name, mask in masks.items():
            assert torch.equal(pruned.state_dict[name] != 0, mask) and int(mask.sum()) == mask.numel() // 2
        dense = load(exported)
        assert torch.equal(pruned.state_dict["norm.weight"], dense.state_dict["norm.weight"])
        # what runs is what was certified: the pruned program itself, on the samples solved on and those kept out
        outputs = [net.module()(samples(60, 8), samples(60, 1))[0].detach() for net in (pruned, dense)]
        assert 0 < float((outputs[0] - outputs[1]).norm()) < float(outputs[1].norm())
        assert same_bits(state_of(Exported(exported).read_pruned(out)), {name: pruned.state_dict[name] for name in pruned.state_dict})
        again = nettrim("prune", "--recipe", out / "recipe.yaml", "--out", tmp_path / "again", "--quiet")
        assert again.exit_code == 0, again.output
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    def test_a_program_for_one_sample_at_a_time(self, tmp_path):
        path = program(tmp_path, chain(8, 12, 4), samples(1, 8), dynamic=False)
        result = nettrim("prune", path, "--calibration", calibration_file(tmp_path), "--epsilon", 0.3, "--out", tmp_path / "out", "--quiet")
        assert result.exit_code == 0, result.output
        assert package.Report.from_json(tmp_path / "out" / "report.json").layers[0].rows == 54

    def test_a_program_for_some_samples_at_a_time(self, tmp_path):
        path = program(tmp_path, chain(8, 12, 4), samples(6, 8), dynamic=False)
        arguments = ("prune", path, "--calibration", calibration_file(tmp_path), "--epsilon", 0.3, "--out", tmp_path / "out")
        result = nettrim(*arguments)
        assert result.exit_code == 1 and "exported for 6 samples at a time, and a batch has" in result.stderr
        assert nettrim(*arguments, "--holdout", 0, "--quiet").exit_code == 0
        result = nettrim(*arguments, "--holdout", 0, "--samples", 50, "--force")
        assert result.exit_code == 1 and "and a batch has 2" in result.stderr

    def test_arguments_by_keyword_in_any_order_and_in_double_precision(self, tmp_path):
        made = export(Net().eval(), (samples(3, 8),), {"shift": samples(3, 1)}, dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO}))
        save_program(made, tmp_path / "net.pt2")
        np.savez(tmp_path / "both.npz", shift=samples(60, 1).double().numpy(), x=samples(60, 8).double().numpy())
        options = ("--epsilon", 0.3, "--out", tmp_path / "out")
        result = nettrim("prune", tmp_path / "net.pt2", "--calibration", tmp_path / "both.npz", *options)
        assert result.exit_code == 0, result.output
        result = nettrim("prune", tmp_path / "net.pt2", "--calibration", calibration_file(tmp_path), *options, "--force")
        assert result.exit_code == 1 and "the program takes x, shift, and the arrays are x; expected the same names" in result.stderr
        np.savez(tmp_path / "uneven.npz", x=samples(60, 8).numpy(), shift=samples(59, 1).numpy())
        result = nettrim("prune", tmp_path / "net.pt2", "--calibration", tmp_path / "uneven.npz", *options, "--force")
        assert result.exit_code == 1 and "different numbers of samples ({'x': 60, 'shift': 59})" in result.stderr

    @pytest.mark.parametrize("form", ("a dictionary", "a number beside it", "None beside it", "by keyword, in another order"))
    def test_inputs_that_are_nested_or_constant(self, form, tmp_path):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = chain(8, 12, 4)

            def forward(self, x, other=None, *, first=None, second=None):
                h = self.body(x["inner"][0] if isinstance(x, dict) else x) * (other if isinstance(other, int) else 1)
                return h if first is None else h * first - second

        one, many = samples(3, 8), {0: Dim.AUTO}
        keywords = {"second": samples(3, 1), "first": samples(3, 1)}
        args, kwargs, shapes = {
            "a dictionary": (({"inner": [one]},), {}, {"x": {"inner": [many]}}),
            "a number beside it": ((one, 3), {}, {"x": many, "other": None}),
            "None beside it": ((one, None), {}, {"x": many, "other": None}),
            "by keyword, in another order": ((one,), keywords, {"x": many, "second": many, "first": many}),
        }[form]
        model = Odd().eval()
        save_program(export(model, args, kwargs, dynamic_shapes=shapes), tmp_path / "net.pt2")
        source, x = Exported(tmp_path / "net.pt2"), samples(60, 8)
        more = {name: samples(60, 1, seed) for seed, name in enumerate(keywords)} if kwargs else {}
        expected = model({"inner": [x]} if form == "a dictionary" else x, *args[1:], **more)
        batches = source.from_arrays({next(iter(source.inputs)): x, **more})
        assert torch.equal(torch.cat([source.forward_fn(source.model, batch) for batch in batches]), expected)
        result = package.prune(source.model, batches, epsilon=0.3, forward_fn=source.forward_fn)
        assert result.report.certificate.holds and [layer.rows for layer in result.report.layers] == [54, 54]

    def test_what_has_no_dimension_for_samples(self, tmp_path):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(8, 4)

            def forward(self, x, scale):
                return self.body(x) * scale

        save_program(export(Scaled(), (samples(3, 8), torch.tensor(2.0))), tmp_path / "scaled.pt2")
        with pytest.raises(ArgumentError, match="takes scale, a tensor without dimensions; expected samples along the first dimension"):
            Exported(tmp_path / "scaled.pt2")
        with pytest.raises(ArgumentError, match="the array 'input' is a single number; expected samples"):
            Exported(program(tmp_path, chain(8, 4), samples(3, 8))).from_arrays({"x": torch.tensor(1.0)})

    def test_a_file_that_is_no_program(self, tmp_path):
        (tmp_path / "net.pt2").write_bytes(b"PK\x03\x04 nothing")
        for path in (tmp_path / "net.pt2", tmp_path / "gone.pt2"):
            result = nettrim("prune", path, "--calibration", calibration_file(tmp_path), "--epsilon", 0.3, "--out", tmp_path / "out")
            assert result.exit_code == 1 and "is no program that this torch reads" in result.stderr
            assert len(result.stderr.splitlines()) == 1
