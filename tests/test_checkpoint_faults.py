"""Checkpoint folders under faults: damaged files, full disks, and kills at any time lose nothing, and nothing goes unnoticed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpointing import INPUTS, files, heavier, in_fresh_process, model, same, state
from networks import hooks_of, same_bits, state_of
from torch import Tensor

import nettrim
from benchmarks import soak_resume
from nettrim import CheckpointError, prune, sealed


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("layer", (0, 1, 2))
@pytest.mark.parametrize("harm", (cut, flip))
@pytest.mark.parametrize("share", (0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 1.0))
def test_a_damaged_file_is_found_and_its_layer_solved_again(
    tmp_path: Path, solves: list[int], layer: int, harm: Callable[[Path, float], None], share: float
) -> None:
    first = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    harm(files(tmp_path)[layer], share)
    solves.clear()
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    whole = harm is cut and share == 1
    assert same(result, first) and len(solves) == (0 if whole else 1)
    notes = state(result)["notes"]
    assert notes == [] if whole else f"layer '{2 * layer}': its file was damaged" in notes[0] and notes[0] in " ".join(str(result.report).split("\n"))


def test_a_file_that_is_gone(tmp_path: Path, solves: list[int]) -> None:
    first = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    files(tmp_path)[1].unlink()
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert same(result, first) and len(solves) == 4 and state(result)["resumed"] == 2


@pytest.mark.parametrize("text", ("", "{", "[]", '{"fingerprint": {}, "checksum": "0"}', None))
def test_a_run_json_that_is_damaged_is_written_again(tmp_path: Path, solves: list[int], text: str | None) -> None:
    first = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    whole = (tmp_path / "run.json").read_bytes()
    if text is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_text(text)
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert same(result, first) and len(solves) == 3 and "run.json was" in state(result)["notes"][0]
    assert (tmp_path / "run.json").read_bytes() == whole


def test_layers_of_another_run_do_not_count_without_run_json(tmp_path: Path, solves: list[int]) -> None:
    prune(heavier(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    (tmp_path / "run.json").unlink()
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert len(solves) == 6 and len([note for note in state(result)["notes"] if "another run's" in note]) == 3
    assert same(result, prune(model(), INPUTS, epsilon=0.2))


def test_a_layer_counts_only_behind_the_weights_that_it_was_solved_for(tmp_path: Path, solves: list[int]) -> None:
    """Another machine would round the first layer in another way: what the others promised was for the old one."""
    prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    tensors, record = sealed.read(files(tmp_path)[0])
    tensors["matrix"][0, 0] += 1e-7
    sealed.write(files(tmp_path)[0], tensors, record)
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert len(solves) == 5 and ["other weights now" in note for note in state(result)["notes"]] == [True, True]
    assert result.report.certificate.holds


@pytest.mark.parametrize(("place", "kept"), ((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 1), (7, 1), (8, 2), (9, 2), (10, 3)))
def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solves: list[int], place: int, kept: int) -> None:
    """At each of the times that something is put on the disk: the folders, what the run is of, each layer and its name."""
    synced = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(sealed.os, "fsync", full)
    network = model().train()
    before = state_of(network)
    with pytest.raises(CheckpointError, match="cannot be (written|made a folder): No space left on device"):
        prune(network, INPUTS, epsilon=0.2, checkpoint_dir=tmp_path, inplace=True)
    assert same_bits(state_of(network), before) and hooks_of(network) == 0 and network[0].training
    assert not list(tmp_path.rglob("*.tmp")) and len(files(tmp_path)) == kept
    solves.clear()
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert state(result)["resumed"] == kept and len(solves) == 3 - kept
    assert same(result, prune(model(), INPUTS, epsilon=0.2))


def within_quota(size: int, folder: Path) -> str:
    """What a call says whose files may have so many bytes each."""
    import resource  # Unix's

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_quota(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own: the second layer's file is too large for it."""
    pytest.importorskip("resource", reason="a limit on files is Unix's")
    prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path / "free")
    sizes = sorted(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert "cannot be written: File too large" in in_fresh_process(within_quota, sizes[-1] - 1, tmp_path / "small")
    result = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path / "small")
    assert same(result, prune(model(), INPUTS, epsilon=0.2)) and not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------------ kills


@pytest.mark.parametrize("scenario", ("cascade", "exact zeros"))
def test_a_kill_at_each_operation_on_files_loses_nothing(scenario: str) -> None:
    found = in_fresh_process(soak_resume.crashes_at_files, scenario, every=3)
    assert found.injected >= 8 and (found.lost, found.repeated, found.complaints) == (0, 0, [])
    assert found.resumed > 0


def test_kills_at_random_times_lose_nothing() -> None:
    found = in_fresh_process(soak_resume.crashes, 6, seed=int.from_bytes(os.urandom(4)), scenarios=("parallel, processes", "a budget", "repair"))
    assert found.injected >= 6 and (found.lost, found.repeated, found.complaints) == (0, 0, [])


def crashes_with_a_reader_that_trusts() -> soak_resume.Crashes:
    def trusting(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, record = sealed.read(path)
        return {name: value + 1e-3 for name, value in tensors.items()}, record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nettrim.checkpoints, "sealed", SimpleNamespace(**{**vars(sealed), "read": trusting}))
        return soak_resume.crashes_at_files("cascade", every=6)


def test_the_judge_of_crashes_sees_a_lost_one() -> None:
    """A resume that takes a damaged file for whole is what it must notice."""
    found = in_fresh_process(crashes_with_a_reader_that_trusts)
    assert found.lost > 0 and "weights" in found.complaints[0]
