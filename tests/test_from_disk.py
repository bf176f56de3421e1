"""A network larger than memory, from its files to new ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks import same_bits, state_of
from test_blockwise import ASKED, TOKENS, Decoder, decoder
from tiny_models import llama
from torch import nn

import nettrim
from nettrim import ArgumentError, FormatError, mapped, prune, prune_folder

DATA = list(TOKENS.split(4))


def written(folder: Path, model: nn.Module, files: int = 2) -> Path:
    """The weights in several files."""
    folder.mkdir()
    state = list(state_of(model).items())
    for index in range(files):
        safetensors.torch.save_file(dict(state[index::files]), folder / f"part-{index}.safetensors")
    (folder / "notes.txt").write_text("kept")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        if path.name != "masks.safetensors":
            found |= safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_files_are_those_of_the_network_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    source = written(tmp_path / "dense", model)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    report = prune_folder(source, tmp_path / "pruned", DATA, factory=Decoder, **{"sparsity": 0.5})
    expected = prune(model, DATA, **ASKED)
    assert same_bits(dict(sorted(read(tmp_path / "pruned").items())), dict(sorted(state_of(expected.model).items())))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert report.certificate.holds
    assert report.options["fidelity"] == "layer"
    assert report.options["allocation"] == "uniform"
    assert report.options["blocks"] == "blocks: 3 blocks"
    assert [layer.epsilon for layer in report.layers] == [layer.epsilon for layer in expected.report.layers]
    assert nettrim.Report.from_json(tmp_path / "pruned" / "report.json") == report
    assert (tmp_path / "pruned" / "notes.txt").read_text() == "kept"
    pruned = decoder().to(dtype)
    pruned.load_state_dict(read(tmp_path / "pruned"))
    assert nettrim.verify(model, pruned, DATA, report, bounds=False).holds


def test_the_new_folder_is_one_that_nettrim_wrote(tmp_path: Path) -> None:
    """With masks: loaded, replaced when that is allowed, and pruned again as any other folder is."""
    source, out = written(tmp_path / "dense", decoder()), tmp_path / "pruned"
    prune_folder(source, out, DATA, factory=Decoder, sparsity=0.5)
    expected = prune(decoder(), DATA, **ASKED)
    loaded = nettrim.load(out, Decoder())
    assert same_bits(state_of(loaded.model), state_of(expected.model))
    assert same_bits(dict(sorted(loaded.masks.items())), dict(sorted(expected.masks.items())))
    assert "masks.safetensors" in {path.name for path in out.iterdir()}
    with pytest.raises(ArgumentError, match="may be replaced"):
        prune_folder(source, out, DATA, factory=Decoder, sparsity=0.6)
    report = prune_folder(source, out, DATA, factory=Decoder, sparsity=0.6, force=True)
    assert nettrim.load(out, Decoder()).report == report
    again = prune_folder(out, tmp_path / "again", DATA, factory=Decoder, sparsity=0.8, preserve_zeros=True)
    masks = nettrim.load(tmp_path / "again", Decoder()).masks
    assert again.certificate.holds
    assert all(not bool((mask & ~first).any()) for mask, first in zip(masks.values(), nettrim.load(out, Decoder()).masks.values(), strict=True))


def test_a_folder_of_transformers_with_tied_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    llama(tmp_path / "dense")
    data = [{"input_ids": ids} for ids in TOKENS.split(4)]
    report = prune_folder(tmp_path / "dense", tmp_path / "pruned", data, sparsity=0.5)
    assert report.options["blocks"] == "model.layers: 2 blocks"
    assert report.certificate.holds
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    layer = pruned.model.layers[1].mlp.up_proj.weight
    assert layer.dtype == torch.bfloat16
    assert int((layer == 0).sum()) == layer.numel() // 2


CHILD = """
import json, resource, sys
from pathlib import Path
import torch
from torch import nn
from safetensors.torch import save_file
import nettrim

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EACH))

    def forward(self, hidden):
        for layer in self.inner:
            hidden = hidden + 0.1 * layer(hidden)
        return hidden

class Deep(nn.Module):
    def __init__(self, depth=64):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

folder = Path(sys.argv[1])
if sys.argv[2] == "write":
    (folder / "dense").mkdir()
    for index in range(64):
        torch.manual_seed(index)
        save_file({f"blocks.{index}.{name}": value for name, value in Block().state_dict().items()}, folder / "dense" / f"{index:02}.safetensors")
    sys.exit()
torch.set_num_threads(1)
small = folder / f"small-{sys.argv[2]}"
small.mkdir()
save_file(Deep(2).state_dict(), small / "a.safetensors")  # what is imported and compiled on first use is no part of what is measured
out = folder / f"{small.name}-pruned"
nettrim.prune_folder(small, out, torch.randn(64, WIDTH), factory=lambda: Deep(2), sparsity=0.5, targets="blocks.*.inner.0")
data = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
status = Path("/proc/self/status").read_text().split("VmData:")[1].split()
limit = int(status[0]) * 1024 + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "hold":
    Deep()
    sys.exit()
source, out = folder / "dense", folder / "pruned"
report = nettrim.prune_folder(source, out, data, factory=Deep, sparsity=0.75, targets="blocks.*.inner.0")
print(json.dumps({"holds": report.certificate.holds, "layers": len(report.layers), "weights": sum(r.nonzeros for r in report.layers)}))
"""
WIDTH, EACH = 256, 24
WEIGHTS = 64 * EACH * WIDTH**2


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what a process maps for itself on Linux alone")
def test_64_blocks_larger_than_the_memory_that_the_process_may_have(tmp_path: Path) -> None:
    limit = 128 * 2**20
    assert 4 * WEIGHTS > 2.5 * limit  # bytes

    def child(what: str) -> subprocess.CompletedProcess[str]:
        code = CHILD.replace("WIDTH", str(WIDTH)).replace("EACH", str(EACH))
        return subprocess.run([sys.executable, "-c", code, str(tmp_path), what, str(limit)], capture_output=True, text=True, check=False)

    assert child("write").returncode == 0
    refused = child("hold")  # the limit is one: the network itself does not fit
    assert refused.returncode != 0
    assert "memory" in refused.stderr
    done = child("prune")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"holds": True, "layers": 64, "weights": 64 * WIDTH**2 // 4}
    assert int(sum((value != 0).sum() for name, value in read(tmp_path / "pruned").items() if name.endswith("inner.0.weight"))) == 64 * WIDTH**2 // 4


def test_a_failure_leaves_nothing_of_the_new_folder(tmp_path: Path) -> None:
    source = written(tmp_path / "dense", decoder())
    with pytest.raises(ArgumentError, match="matches no module"):
        prune_folder(source, tmp_path / "pruned", DATA, factory=Decoder, sparsity=0.5, targets="nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fidelity": "network"}, "gradients"),
        ({"fidelity": "diagonal"}, "gradients"),
        ({"allocation": "auto"}, "gradients"),
        ({"inplace": True}, "new folder"),
        ({"recalibrate_batchnorm": True}, "no weights"),
        ({"budget": 0.1}, "several times"),
        ({"repair": "auto"}, "several times"),
    ],
)
def test_what_needs_the_whole_network_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    source = written(tmp_path / "dense", decoder())
    with pytest.raises(ArgumentError, match=said):
        prune_folder(source, tmp_path / "pruned", DATA, factory=Decoder, **{"sparsity": 0.5, **options})
    assert not (tmp_path / "pruned").exists()


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "dense", decoder(2))
    with pytest.raises(ArgumentError, match="they lack 'blocks.2"):
        prune_folder(source, tmp_path / "pruned", DATA, factory=Decoder, sparsity=0.5)
    with pytest.raises(ArgumentError, match="the network has no 'blocks.1"):
        prune_folder(source, tmp_path / "pruned", DATA, factory=lambda: Decoder(1), sparsity=0.5)
    with pytest.raises(ArgumentError, match=r"as torch.float32 \(23, 12\), and the network as torch.float32 \(23, 8\)"):
        prune_folder(source, tmp_path / "pruned", DATA, factory=lambda: Decoder(2, width=8), sparsity=0.5)
    with pytest.raises(ArgumentError, match=r"returned a int; expected a torch.nn.Module"):
        mapped.network(lambda: 3, {})
    with pytest.raises(ArgumentError, match="is no folder"):
        prune_folder(tmp_path / "none", tmp_path / "pruned", DATA, factory=Decoder, sparsity=0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"holds no \.safetensors file"):
        prune_folder(tmp_path / "empty", tmp_path / "pruned", DATA, factory=Decoder, sparsity=0.5)


def test_a_buffer_that_nobody_filled_is_refused(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("count", torch.empty(2), persistent=False)

    with pytest.raises(ArgumentError, match="buffer 'count' is made by torch.empty"):
        mapped.network(Counting, dict(nn.Linear(3, 3).state_dict()))
    kept = mapped.network(lambda: nn.BatchNorm1d(3), {**nn.BatchNorm1d(3).state_dict(), "running_mean": torch.ones(3)})
    assert kept.running_mean.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    (("bias", torch.zeros(3, dtype=torch.int64), r"'0.bias' as torch.int64 \(3,\), and the network as torch.float32 \(3,\)"),
     ("running_mean", torch.ones(7), r"'1.running_mean' as torch.float32 \(7,\), and the network as torch.float32 \(3,\)"),
     ("num_batches_tracked", torch.tensor(1.0), r"'1.num_batches_tracked' as torch.float32 \(\), and the network as torch.int64 \(\)")),
)  # fmt: skip
def test_numbers_of_another_kind_and_buffers_of_another_shape_are_refused(name: str, value: torch.Tensor, said: str) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    state = {key: value if key.endswith(name) else old for key, old in made().state_dict().items()}
    with pytest.raises(ArgumentError, match=said):
        mapped.network(made, state)


def test_a_module_with_two_names_has_its_buffers_from_either() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(3)
            self.a, self.b = nn.Sequential(nn.Linear(3, 3), norm), nn.Sequential(nn.Linear(3, 3), norm)

    state = Twice().state_dict()
    state["a.1.running_mean"] = state["b.1.running_mean"] = torch.arange(3.0)
    for names in (list(state), [name for name in state if not name.startswith("b.1")], [name for name in state if not name.startswith("a.1")]):
        network = mapped.network(Twice, {name: state[name] for name in names})
        assert network.a[1] is network.b[1] and network.a[1].running_mean.tolist() == [0, 1, 2]


def test_damaged_and_double_files_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "dense", decoder())
    whole = (source / "part-0.safetensors").read_bytes()
    (source / "part-2.safetensors").write_bytes(whole)
    with pytest.raises(ArgumentError, match="twice"):
        mapped.tensors(source, writable=False)
    (source / "part-2.safetensors").write_bytes(whole[:-5])
    with pytest.raises(FormatError, match="no whole safetensors file"):
        mapped.tensors(source, writable=False)
    safetensors.torch.save_file({"odd": torch.zeros(2, dtype=torch.uint16)}, source / "part-2.safetensors")
    with pytest.raises(FormatError, match="dtype U16"):
        mapped.tensors(source, writable=False)


def test_tensors_are_where_the_format_says(tmp_path: Path) -> None:
    named = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int8), "c": torch.randn(5).double(), "d": torch.zeros(0, 4)}
    safetensors.torch.save_file(named, tmp_path / "x.safetensors")
    found = mapped.tensors(tmp_path, writable=False)
    assert same_bits(dict(sorted(found.items())), named)
    mapped.tensors(tmp_path, writable=True)["a"][0, 0] = 9
    assert float(safetensors.torch.load_file(tmp_path / "x.safetensors")["a"][0, 0]) == 9


@pytest.mark.parametrize("names", (("model.safetensors", "more.safetensors"), ("model.safetensors",)))
def test_folders_of_several_files_and_of_files_without_buffers_are_loaded(tmp_path: Path, names: tuple[str, ...]) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)).eval()

    state = [(name, value) for name, value in made().state_dict().items() if "num_batches" not in name]
    (tmp_path / "dense").mkdir()
    for index, name in enumerate(names):
        safetensors.torch.save_file(dict(state[index :: len(names)]), tmp_path / "dense" / name)
    report = prune_folder(tmp_path / "dense", tmp_path / "pruned", torch.randn(60, 12), factory=made, sparsity=0.5)
    assert nettrim.load(tmp_path / "pruned", made()).report == report


def test_masks_are_a_safetensors_file(tmp_path: Path) -> None:
    shapes = {"odd": torch.Size((3, 5)), "none": torch.Size((0, 4)), "scalar": torch.Size(())}
    made = mapped.new_masks(tmp_path / "masks.safetensors", shapes)
    made["odd"][1, 2] = True
    found = safetensors.torch.load_file(tmp_path / "masks.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert {tensor.dtype for tensor in found.values()} == {torch.bool}
    assert found["odd"].nonzero().tolist() == [[1, 2]] and not bool(found["scalar"])
