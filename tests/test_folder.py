"""`nettrim.save` and `nettrim.load`: what ordinary loaders read, and a folder that is there whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from networks import chain, same_bits, samples, state_of
from torch import nn

import nettrim
from nettrim import ArgumentError, folder

FILES = {"model.safetensors", "masks.safetensors", "report.json", "report.html"}


@pytest.fixture(scope="module")
def result():
    return nettrim.prune(chain(8, 12, 4), samples(60, 8), epsilon=0.3)


@pytest.fixture
def out(result, tmp_path) -> Path:
    nettrim.save(result, tmp_path / "out")
    return tmp_path / "out"


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


class TestRoundTrip:
    def test_ordinary_loaders_read_it(self, result, out):
        assert names(out) == FILES
        model = chain(8, 12, 4, seed=5)
        model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
        assert same_bits(state_of(model), state_of(result.model))
        assert sum(int((parameter == 0).sum()) for parameter in model.parameters()) > 0

    def test_load_gives_all_of_it_back(self, result, out):
        loaded = nettrim.load(out, chain(8, 12, 4, seed=5))
        assert same_bits(state_of(loaded.model), state_of(result.model))
        assert same_bits(loaded.masks, result.masks)
        assert loaded.report == result.report

    def test_every_dtype_keeps_its_bits(self, tmp_path):
        for dtype in (torch.float64, torch.bfloat16):
            result = nettrim.prune(chain(8, 6, 4, dtype=dtype), samples(60, 8), sparsity=0.5)
            nettrim.save(result, tmp_path / str(dtype))
            assert same_bits(state_of(nettrim.load(tmp_path / str(dtype), chain(8, 6, 4, dtype=dtype)).model), state_of(result.model))

    def test_tied_weights_are_there_under_each_name(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.first, self.last = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
                self.last.weight = self.table.weight

            def forward(self, x):
                return self.last(self.first(self.table(x)).relu())

        torch.manual_seed(0)
        result = nettrim.prune(Tied(), torch.randint(5, (40, 3)), sparsity=0.5)
        nettrim.save(result, tmp_path / "out")
        fresh = Tied()
        fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
        assert fresh.last.weight is fresh.table.weight
        assert same_bits(state_of(fresh), state_of(result.model))

    def test_everyone_may_read_what_the_umask_lets_them(self, out):
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}


class TestLoadRefuses:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (lambda: chain(8, 12, 12, 4), r"it lacks '4.bias', '4.weight'"),
            (lambda: chain(8, 4), r"the model has no '2.bias', '2.weight'"),
            (lambda: chain(8, 11, 4), r"'0.bias' as torch.float32 \(12,\), and the model as torch.float32 \(11,\)"),
            (lambda: chain(8, 12, 4, dtype=torch.float64), "a cast would change what was certified"),
        ],
    )
    def test_another_model(self, out, model, message):
        made = model()
        before = state_of(made)
        with pytest.raises(ArgumentError, match=message):
            nettrim.load(out, made)
        assert same_bits(state_of(made), before)

    def test_a_folder_that_is_not_ours(self, tmp_path):
        with pytest.raises(ArgumentError, match="has no report.json; expected a folder that nettrim.save"):
            nettrim.load(tmp_path, chain(8, 4))

    def test_masks_that_the_weights_break(self, result, out):
        weights = state_of(result.model)
        weights["0.weight"] = torch.ones_like(weights["0.weight"])
        safetensors.torch.save_file(weights, out / "model.safetensors")
        with pytest.raises(ArgumentError, match="'0.weight' is not zero where its mask"):
            nettrim.load(out, chain(8, 12, 4))

    def test_masks_of_another_model(self, out):
        safetensors.torch.save_file({"nine.weight": torch.ones(2, dtype=torch.bool)}, out / "masks.safetensors")
        with pytest.raises(ArgumentError, match="for 'nine.weight', and in the model there is none"):
            nettrim.load(out, chain(8, 12, 4))


class TestPlace:
    def test_what_is_there_is_kept(self, result, out):
        before = (out / "report.json").read_bytes()
        with pytest.raises(ArgumentError, match="holds the result of another run; give another folder"):
            nettrim.save(result, out)
        assert (out / "report.json").read_bytes() == before

    def test_force_replaces_a_folder_of_ours_and_no_other(self, result, out, tmp_path):
        (out / "old").touch()
        nettrim.save(result, out, force=True)
        assert names(out) == FILES and names(tmp_path) == {"out"}
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.tex").touch()
        for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
            with pytest.raises(ArgumentError, match="is no folder that nettrim wrote; expected a new one, or an empty one"):
                nettrim.save(result, place, force=True)

    def test_an_empty_folder_and_folders_to_make(self, result, tmp_path):
        (tmp_path / "empty").mkdir()
        for place in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
            nettrim.save(result, place)
            assert names(place) == FILES

    @pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_a_failure_leaves_nothing(self, result, tmp_path, monkeypatch, failure):
        def fail(*args, **kwargs):
            raise failure

        monkeypatch.setattr(nettrim.Report, "to_html", fail)  # the last file
        with pytest.raises(type(failure)):
            nettrim.save(result, tmp_path / "out")
        assert names(tmp_path) == set()

    def test_a_failure_while_replacing_leaves_the_old_one(self, result, out, tmp_path, monkeypatch):
        (out / "old").touch()
        rename = os.rename

        def fail(source, target):
            if str(source).endswith(".unfinished"):
                raise OSError(5, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(folder.os, "rename", fail)
        with pytest.raises(OSError, match="Input/output"):
            nettrim.save(result, out, force=True)
        assert names(out) == {*FILES, "old"} and names(tmp_path) == {"out"}

    def test_two_that_write_at_once(self, result, tmp_path):
        """The second finds the place taken, and says so; the first's folder is whole."""
        with pytest.raises(OSError), folder.new_folder(tmp_path / "out", force=False) as made:
            (made / "file").touch()
            nettrim.save(result, tmp_path / "out")
        assert names(tmp_path / "out") == FILES and names(tmp_path) == {"out"}


def test_what_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Sequential):
        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            pass

    result = nettrim.prune(Odd(nn.Linear(4, 3)), samples(20, 4), sparsity=0.5)
    with pytest.raises(ArgumentError, match="'_extra_state', a dict; expected tensors"):
        nettrim.save(result, tmp_path / "out")
    assert names(tmp_path) == set()
