"""Compressed files: bit for bit there and back, as small as they should be, and nothing read that does not fit."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import chain, same_bits, samples, state_of
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, FormatError, MaskError, compression


def thin(kept: float, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (40, 50)) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state with one pruned tensor and a bias, and its masks."""
    generator = torch.Generator().manual_seed(int(1000 * kept))
    mask = torch.rand(shape, generator=generator) < kept
    weight = torch.randint(-3, 3, shape, generator=generator).add(0.5).masked_fill(~mask, 0).to(dtype)  # no -0, which would come back as 0
    return {"a.weight": weight, "a.bias": torch.randn(3, generator=generator)}, {"a.weight": mask}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("with_masks", [True, False])
def test_there_and_back_bit_for_bit(dtype: torch.dtype, kept: float, with_masks: bool, tmp_path: Path) -> None:
    state, masks = thin(kept, dtype)
    size = nettrim.save_compressed(state, masks if with_masks else None, tmp_path / "file")
    assert same_bits(nettrim.load_compressed(tmp_path / "file"), state)
    assert size.bytes == (tmp_path / "file").stat().st_size
    assert size.dense_bytes == 2000 * dtype.itemsize + 12
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@given(st.lists(st.booleans() | st.integers(1, 600), max_size=12))
def test_gaps_say_every_position(parts: list[bool | int]) -> None:
    pieces = [np.array([part]) if isinstance(part, bool) else np.zeros(part, dtype=bool) for part in parts]
    kept = np.concatenate([*pieces, np.zeros(0, dtype=bool)]).astype(bool)
    code = compression._gaps(kept)
    assert np.array_equal(compression._from_gaps(code, len(kept)), kept)
    assert len(code) <= kept.sum() + len(kept) // 255


@pytest.mark.parametrize(("kept", "coding"), [(0.05, "gaps"), (0.1, "gaps"), (0.2, "bits"), (0.7, "bits")])
def test_the_smaller_coding_is_chosen_and_the_size_is_as_computed(kept: float, coding: str, tmp_path: Path) -> None:
    state, masks = thin(kept, shape=(200, 300))
    size = nettrim.save_compressed(state, masks, tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        assert sorted(file.keys()) == ["a.bias", f"a.weight:{coding}", "a.weight:values"]
    nonzeros = int(masks["a.weight"].sum())
    positions = 60_000 / 8 if coding == "bits" else nonzeros
    assert size.bytes == pytest.approx(4 * nonzeros + positions, abs=700)  # the header, and gaps above 254
    assert str(size).startswith(f"{size.bytes:,} bytes, {size.dense_bytes / size.bytes:.1f} times smaller than 240,012 dense")


def test_a_network_is_written_and_loads_into_its_dense_form(tmp_path: Path) -> None:
    model = chain(20, 30, 5)
    result = nettrim.prune(model, samples(80, 20), sparsity=0.9)
    nettrim.save_compressed(result.model, result.masks, tmp_path / "file")
    model.load_state_dict(nettrim.load_compressed(tmp_path / "file"))
    assert same_bits(state_of(model), state_of(result.model))


def test_all_that_a_state_holds_comes_back(tmp_path: Path) -> None:
    state = {
        "odd": torch.tensor([[torch.nan, 0.0, -torch.inf], [0.0, 1e-45, 0.0]]),
        "counter": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(6).reshape(2, 3),
        "turned": torch.eye(5, 4).t(),
        "flags": torch.tensor([True, False]),
    }
    nettrim.save_compressed(state, None, tmp_path / "file")
    assert same_bits(nettrim.load_compressed(tmp_path / "file"), state)
    kept_zeros = {"odd": torch.ones(2, 3, dtype=torch.bool)}
    nettrim.save_compressed(state, kept_zeros, tmp_path / "file")
    assert same_bits(nettrim.load_compressed(tmp_path / "file"), state)


def test_a_negative_zero_that_is_left_out_is_a_zero(tmp_path: Path) -> None:
    """torch.nn.utils.prune leaves them: a weight below 0 times a mask."""
    state = {"w": torch.tensor([[-0.0, 1.0]])}
    nettrim.save_compressed(state, {"w": torch.tensor([[False, True]])}, tmp_path / "file")
    assert torch.equal(nettrim.load_compressed(tmp_path / "file")["w"], torch.tensor([[0.0, 1.0]]))


def test_tensors_that_are_one_are_written_once_and_are_one_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    model[1].weight = model[0].weight
    size = nettrim.save_compressed(model, None, tmp_path / "file")
    assert size.bytes < 4 * 930 + 900 and size.dense_bytes == 4 * 960
    state = nettrim.load_compressed(tmp_path / "file")
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr() and same_bits(state, state_of(model))


def masked() -> nn.Module:
    return nettrim.apply_masks(chain(4, 3), {"0.weight": torch.ones(3, 4, dtype=torch.bool)})


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no state": (3, None, ArgumentError, "int"),
    "no tensor": ({"a": 3}, None, ArgumentError, "a state with a; expected dense tensors"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, None, ArgumentError, "sparse tensors"),
    "unknown": (chain(4, 3), {"7.weight": torch.ones(3, 4, dtype=torch.bool)}, ArgumentError, "'7.weight' is not in the state"),
    "masks on": (masked(), {"0.weight": torch.ones(3, 4, dtype=torch.bool)}, ArgumentError, r"call nettrim.remove_masks \(or to_dense"),
    "shape": (chain(4, 3), {"0.weight": torch.ones(4, 3, dtype=torch.bool)}, ArgumentError, r"bool \(4, 3\); expected torch.bool \(3, 4\)"),
    "dtype": (chain(4, 3), {"0.weight": torch.ones(3, 4)}, ArgumentError, "float32"),
    "lost": (chain(4, 3), {"0.weight": torch.zeros(3, 4, dtype=torch.bool)}, MaskError, "0.weight: 12 weights that are not zero"),
    "names": ({"a": torch.eye(3), "a:values": torch.ones(1)}, None, ArgumentError, "names clash"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    state, masks, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        nettrim.save_compressed(state, masks, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write|No such file"):
        nettrim.save_compressed(chain(4, 3), None, tmp_path / "none" / "file")
    with pytest.raises(FileNotFoundError):
        nettrim.load_compressed(tmp_path / "file")


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Write a file again with other tensors or another header."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = safetensors.torch.load_file(path)
    parsed = {key: json.loads(value) if key != "format" else value for key, value in header.items()}
    change(tensors, parsed)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in parsed.items()}
    safetensors.torch.save_file(tensors, path, texts)


def drop(key: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: (tensors if key in tensors else header).pop(key)


def tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: tensors.update({key: change(tensors[key]).contiguous().clone()})


def shape(*sizes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: header["shapes"].update({"a.weight": list(sizes)})


DAMAGED: dict[str, tuple[float, Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = {
    "other format": (0.2, lambda tensors, header: header.update(format="x"), "has format 'x'; expected 'nettrim-compressed-1'"),
    "no shapes": (0.2, drop("shapes"), "KeyError: 'shapes'"),
    "shapes no mapping": (0.2, lambda tensors, header: header.update(shapes=[1]), "AttributeError"),
    "no values": (0.2, drop("a.weight:values"), "KeyError"),
    "no bits": (0.2, drop("a.weight:bits"), "KeyError"),
    "too few bits": (0.2, tensor("a.weight:bits", lambda code: code[:-1]), "249 bytes of bits for 2000 entries"),
    "other bits": (0.2, tensor("a.weight:bits", lambda code: code ^ 1), "values for"),
    "too few values": (0.2, tensor("a.weight:values", lambda values: values[:-1]), "values for"),
    "values in rows": (0.2, tensor("a.weight:values", lambda values: values[:, None]), "do not belong together"),
    "wide bits": (0.2, tensor("a.weight:bits", lambda code: code.short()), "do not belong together"),
    "a huge shape of bits": (0.2, shape(2**30, 2**30), "bytes of bits for"),
    "a huge shape of gaps": (0.05, shape(2**30, 2**30), "gaps cover"),
    "a short shape of gaps": (0.05, shape(4, 5), "gaps cover"),
    "a negative shape": (0.2, shape(-40, -50), "has shape"),
    "a shape of words": (0.2, shape("40", "50"), "has shape"),
    "both": (0.2, lambda tensors, header: tensors.update({"a.weight": torch.ones(1)}), "do not belong together"),
    "same as nothing": (0.2, lambda tensors, header: header.update(same={"b": "c"}), "KeyError: 'c'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_before_anything_is_made_of_it(name: str, tmp_path: Path) -> None:
    kept, change, message = DAMAGED[name]
    nettrim.save_compressed(*thin(kept), tmp_path / "file")
    rewritten(tmp_path / "file", change)
    with pytest.raises(FormatError, match=message):
        nettrim.load_compressed(tmp_path / "file")


def test_bits_behind_the_end_are_refused(tmp_path: Path) -> None:
    nettrim.save_compressed(*thin(0.5, shape=(3, 3)), tmp_path / "file")
    rewritten(tmp_path / "file", tensor("a.weight:bits", lambda code: code | torch.tensor([0, 128], dtype=torch.uint8)))
    with pytest.raises(FormatError, match="bits behind the last entry"):
        nettrim.load_compressed(tmp_path / "file")


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_file_cut_off_or_of_another_kind_is_refused(length: int, tmp_path: Path) -> None:
    nettrim.save_compressed(*thin(0.2), tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[:length])
    with pytest.raises(FormatError, match="no whole safetensors file"):
        nettrim.load_compressed(tmp_path / "file")
    (tmp_path / "file").write_bytes(struct.pack("<Q", 2**60) + whole)
    with pytest.raises(FormatError, match="no whole safetensors file"):
        nettrim.load_compressed(tmp_path / "file")
