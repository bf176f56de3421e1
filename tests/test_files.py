"""Files from anyone: what is sound is read as it is, what is not ends in one error, soon and in little memory, and nothing in it is run."""

from __future__ import annotations

import io
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import nettrim
from benchmarks import soak_files
from nettrim import ArgumentError, Report
from nettrim.files import inside, load_arrays
from nettrim.reading import MAX_DEPTH, load_json

ARRAYS = {
    "a": np.arange(12.0).reshape(3, 4),
    "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big-endian": np.arange(4, dtype=">i4"),
    "half": np.ones((1, 2), dtype=np.float16),
    "none": np.zeros((0, 3)),
    "one": np.array(3.5),
    "mask": np.array([True, False]),
}


def same(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        array = np.asarray(expected[name])
        assert tensor.shape == array.shape and tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_what_is_sound_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    np.savez_compressed(tmp_path / "b.npz", **ARRAYS)
    same(load_arrays(tmp_path / "a.npz"), ARRAYS)
    same(load_arrays(str(tmp_path / "b.npz")), ARRAYS)
    for index, array in enumerate(ARRAYS.values()):
        np.save(tmp_path / f"{index}.npy", array)
        same(load_arrays(tmp_path / f"{index}.npy"), {"arr_0": array})
    tensors = {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("=")).copy()) for name, array in ARRAYS.items()}
    tensors["bf16"] = torch.ones(2, dtype=torch.bfloat16)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    torch.save(tensors | {"view": tensors["a"].T, "parameter": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    assert load_arrays(tmp_path / "a.safetensors").keys() == tensors.keys()
    found = load_arrays(tmp_path / "a.pt")
    assert torch.equal(found["view"], tensors["a"].T) and not found["parameter"].requires_grad and found["bf16"].dtype == torch.bfloat16
    torch.save([tensors["a"]], tmp_path / "b.PTH")
    assert list(load_arrays(tmp_path / "b.PTH")) == ["arr_0"]


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"w": Trap()}, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.pt", "a.npy", "a.npz", "b.pt", "b.npy"):
        with pytest.raises(ArgumentError, match=name):
            load_arrays(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def header(descr: str, shape: object, data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"\x93NUMPY\x03\x00\x10\x00\x00\x00", "version"),
        (header("<f8", (2**60,)), "says that it has"),
        (header("<f8", (2**40, 2**40)), "says that it has"),
        (header("<f8", (0, 2**70)), "damaged"),
        (header("<f8", (-1,), b"\0" * 8), "at least 0"),
        (header("<f8", (2,), b"\0" * 15), "says that it has 16 bytes and has 15"),
        (header("<f8", (2,), b"\0" * 17), "says that it has 16 bytes and has 17"),
        (header("|O", (1,)), "dtype object"),
        (header("<c16", (1,), b"\0" * 16), "dtype complex128"),
        (header("<U3", (1,), b"\0" * 12), "dtype <U3"),
        (header("<f16", (1,), b"\0" * 16), "float128|longdouble"),
    ],
)
def test_headers_that_lie(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ArgumentError, match=words):
        load_arrays(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(ArgumentError, match=words):
        load_arrays(tmp_path / "x.npz")


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    soak_files.bomb(tmp_path / "bomb.npz", 2**30)
    assert (tmp_path / "bomb.npz").stat().st_size < 2**21
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ArgumentError, match="once inflated"):
        load_arrays(tmp_path / "bomb.npz", max_bytes=2**26)
    assert time.perf_counter() - start < 2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17
    # one that says it is small: no more than it says is inflated
    data = (tmp_path / "bomb.npz").read_bytes()
    size = (2**30 + 128).to_bytes(8, "little")
    at = data.rfind(b"PK\x01\x02")
    lying = data[:at] + data[at:].replace(size, (1000).to_bytes(8, "little")).replace(size[:4], (1000).to_bytes(4, "little"))
    (tmp_path / "lies.npz").write_bytes(lying)
    with pytest.raises(ArgumentError):
        load_arrays(tmp_path / "lies.npz", max_bytes=2**26)
    torch.save({"endless": torch.zeros(1).expand(2**40)}, tmp_path / "view.pt")
    with pytest.raises(ArgumentError, match=f"tensors of {2**42} bytes"):
        load_arrays(tmp_path / "view.pt")


def test_what_else_is_refused(tmp_path: Path) -> None:
    def refused(name: str, words: str, **options: Any) -> None:
        with pytest.raises(ArgumentError, match=words):
            load_arrays(tmp_path / name, **options)

    refused("missing.npy", "No such file")
    refused("a.txt", r"ends in \.npy")
    (tmp_path / "folder.npy").mkdir()
    refused("folder.npy", "no regular file|directory")
    os.mkfifo(tmp_path / "pipe.npz")
    refused("pipe.npz", "no regular file")
    np.save(tmp_path / "large.npy", np.zeros(1000))
    refused("large.npy", "has 8128 bytes; expected at most 100", max_bytes=100)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused("other.npz", "expected arrays NAME.npy")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", header("<f8", (0,)))
    refused("twice.npz", "two members of one name")
    torch.save({"w": torch.zeros(2)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    refused("packed.pt", "compressed inside")
    torch.save({"w": torch.zeros(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    refused("legacy.pt", "legacy.pt is damaged or no .pt file")
    for index, content in enumerate((3, {"a": 1}, {3: torch.zeros(1)}, {"a": {"b": torch.zeros(1)}}, {"a": torch.zeros(1, dtype=torch.complex64)})):
        torch.save(content, tmp_path / f"{index}.pt")
        refused(f"{index}.pt", "expected")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    refused("sparse.pt", "expected plain numbers")


def test_odd_names_and_very_many(tmp_path: Path) -> None:
    names = ["../../etc/passwd", "ünï cödé", "a\nb", "con", ".", "-rf", "'; drop table", "x" * 5000, ""]
    safetensors.torch.save_file({name: torch.zeros(1) for name in names}, tmp_path / "odd.safetensors")
    assert set(load_arrays(tmp_path / "odd.safetensors")) == set(names)
    many = {f"layers.{index}.weight": torch.zeros(1) for index in range(100_000)}
    safetensors.torch.save_file(many, tmp_path / "many.safetensors")
    start = time.perf_counter()
    assert len(load_arrays(tmp_path / "many.safetensors")) == len(many)
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("name", ("../x", "/etc/passwd", "a/../../x", "", ".", "a\0b", "x" * 300, "link/x", "\ud800"))
def test_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ArgumentError):
        inside(folder, name)


def test_names_that_stay() -> None:
    assert inside("/tmp/folder", "a/b.safetensors") == Path("/tmp/folder/a/b.safetensors").resolve()
    assert inside("/tmp/folder", "a/../b…c").name == "b…c"


# -- reports ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ("1" * 5000, "digits"),
        ("", "Expecting value"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match=words):
        Report.from_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match="utf-8"):
        load_json(path)
    with pytest.raises(ArgumentError, match="expected at most 1"):
        load_json(path, max_bytes=1)


def test_a_report_of_very_many_layers() -> None:
    torch.manual_seed(0)
    data = nettrim.prune(torch.nn.Linear(3, 2), torch.randn(20, 3), epsilon=0.2).report.to_dict()
    data["layers"] = data["layers"] * 20_000
    report = Report.from_dict(data)
    assert len(report.layers) == 20_000 and report.layers[-1].rows == 18


# -- by the thousand ----------------------------------------------------------------------------------------------------------------


def test_malformed_files_end_in_a_clean_error() -> None:
    figures = soak_files.soak(600, seed=1)
    assert figures["wrong"] == [] and figures["refused"] > 300
    assert figures["refused"] + figures["read"] == figures["cases"] == 600


def test_the_soak_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(soak_files, "read", crash)
    figures = soak_files.soak(5)
    assert len(figures["wrong"]) == 5 and "KeyError" in figures["wrong"][0]
    run = CliRunner().invoke(soak_files.main, ["--cases", "3"])
    assert run.exit_code == 1 and "wrong outcomes: 3" in run.output
    monkeypatch.setattr(soak_files, "SECONDS", 0.05)
    monkeypatch.setattr(soak_files, "read", lambda path: time.sleep(2))
    assert "longer than" in soak_files.outcome(tmp_path / "x.npy")
