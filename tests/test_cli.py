"""The command line: what `nettrim demo` prints, writes and exits with."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import nettrim
from nettrim import demo
from nettrim.cli import main
from nettrim.errors import InfeasibleError
from nettrim.report import Report

NETWORK_ROW = re.compile(r"^ *(\w+(?:/\w+)?) +([\d.]+)% +([\d.]+)% ", re.MULTILINE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One whole demo: its output folder and click's result."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    return out, CliRunner().invoke(main, ["demo", "--out", str(out)])


@pytest.fixture
def forbid_work(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("started to train although the arguments are wrong")

    monkeypatch.setattr(demo, "train", never)


class TestDemo:
    def test_all_certificates_hold(self, run):
        _, result = run
        assert result.exit_code == 0, result.output
        assert result.stdout.count(" holds ") == len(demo.RUNS)

    def test_prints_every_run_and_every_layer(self, run):
        _, result = run
        for mode, consistency in demo.RUNS:
            assert f"{mode}/{consistency}" in result.stdout
        for layer in ("hidden1", "hidden2", "output"):
            assert sum(line.strip().startswith(layer) for line in result.stdout.splitlines()) == len(demo.RUNS)
        assert max(map(len, result.stdout.split("accuracy: on")[0].splitlines())) <= 80
        for word in ("dense", "density", "accuracy", "promised", "measured", "holdout", "gap", "status"):
            assert word in result.stdout

    def test_keeps_most_of_the_accuracy_with_fewer_weights(self, run):
        _, result = run
        # "cascade/relaxed  41.20%  96.11%  ...": density, then accuracy
        rows = NETWORK_ROW.findall(result.stdout)
        shares = {name: (float(density), float(accuracy)) for name, density, accuracy in rows}
        assert list(shares) == ["dense", *(f"{mode}/{consistency}" for mode, consistency in demo.RUNS)]
        dense = shares["dense"][1]
        assert dense > 95
        density, accuracy = shares["cascade/relaxed"]
        assert density < 60
        assert accuracy > dense - 3

    def test_writes_a_network_that_loads_and_is_pruned_as_its_masks_say(self, run):
        out, _ = run
        assert sorted(path.name for path in out.iterdir()) == [
            "masks.safetensors",
            "model.safetensors",
            "report.json",
        ]
        state = safetensors.torch.load_file(out / "model.safetensors")
        masks = safetensors.torch.load_file(out / "masks.safetensors")
        model = demo.train(demo.load_digits(), seed=0, epochs=0)
        model.load_state_dict(state)
        report = Report.from_json(out / "report.json")
        assert (report.options["mode"], report.options["consistency"]) == ("cascade", "relaxed")
        for layer in report.layers:
            weight, mask = state[f"{layer.name}.weight"], masks[f"{layer.name}.weight"]
            assert mask.dtype == torch.bool
            assert torch.equal(weight != 0, mask)
            assert int(mask.sum()) == layer.nonzeros

    def test_measured_figures_are_true(self, run):
        out, _ = run
        report = Report.from_json(out / "report.json")
        certificate = report.certificate
        assert certificate.holds
        assert 0 < certificate.measured <= certificate.guaranteed
        for layer in report.layers:
            assert layer.discrepancy <= layer.epsilon * (1 + 1e-5)

    def test_progress_is_kept_out_of_stdout(self, run):
        _, result = run
        assert not re.search(r"\b(training|pruning)\b", result.stdout)


class TestQuiet:
    def test_prints_nothing_and_writes_all(self, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "EPOCHS", 3)
        monkeypatch.setattr(demo, "RUNS", (("cascade", "relaxed"),))
        options = ["--quiet", "--epsilon", "0.2", "--seed", "3", "--out", str(tmp_path)]
        result = CliRunner().invoke(main, ["demo", *options])
        assert (result.exit_code, result.output) == (0, "")
        options = json.loads((tmp_path / "report.json").read_text())["options"]
        assert (options["epsilon"], options["seed"]) == (0.2, 3)
        assert len(list(tmp_path.iterdir())) == 3


class TestFailures:
    def test_a_folder_that_cannot_be_made_is_said_before_the_work(self, tmp_path, forbid_work):
        (tmp_path / "file").touch()
        result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "file" / "folder")])
        assert result.exit_code == 1
        assert "cannot write to" in result.stderr and "--out" in result.stderr
        assert len(result.stderr.splitlines()) == 1

    def test_a_missing_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
        assert result.exit_code == 1
        assert "nettrim[demo]" in result.stderr

    def test_an_error_of_ours_is_one_line(self, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise InfeasibleError("layer hidden1:\n  no weights satisfy it")

        monkeypatch.setattr(demo, "EPOCHS", 1)
        monkeypatch.setattr(demo, "prune", fail)
        result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == "Error: layer hidden1: no weights satisfy it"
        assert "Traceback" not in result.output
        assert list(tmp_path.iterdir()) == []

    def test_a_broken_certificate_is_an_error(self, tmp_path, monkeypatch):
        real = demo.prune

        def broken(*args, **kwargs):
            result = real(*args, **kwargs)
            certificate = dataclasses.replace(result.report.certificate, holds=False)
            return dataclasses.replace(result, report=dataclasses.replace(result.report, certificate=certificate))

        monkeypatch.setattr(demo, "EPOCHS", 1)
        monkeypatch.setattr(demo, "RUNS", (("cascade", "relaxed"),))
        monkeypatch.setattr(demo, "prune", broken)
        result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
        assert result.exit_code == 1
        assert "BROKEN" in result.stdout
        assert "the certificate does not hold: cascade/relaxed" in result.stderr

    @pytest.mark.parametrize("wrong", ["--epsilon 0", "--epsilon much", "--epsilon nan", "--seed -1", "--colo", "more"])
    def test_wrong_usage_exits_with_2(self, wrong, forbid_work, tmp_path):
        result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out"), *wrong.split()])
        assert result.exit_code == 2, result.output
        assert not (tmp_path / "out").exists()


class TestTraining:
    def test_is_the_same_for_a_seed_and_leaves_the_random_state(self):
        digits = demo.load_digits()
        before = torch.random.get_rng_state()
        first, again, other = (demo.train(digits, seed, epochs=2).state_dict() for seed in (0, 0, 1))
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["output.weight"], other["output.weight"])

    def test_the_number_of_threads_is_put_back(self):
        before = torch.get_num_threads()
        with pytest.raises(RuntimeError, match="interrupted"), demo.one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("interrupted")
        assert torch.get_num_threads() == before

    def test_the_split_is_fixed_and_scaled(self):
        digits, again = demo.load_digits(), demo.load_digits()
        assert torch.equal(digits.train_images, again.train_images)
        assert digits.train_images.shape == (1437, 64) and digits.test_images.shape == (360, 64)
        assert digits.train_images.min() == 0 and digits.train_images.max() == 1
        assert set(digits.test_labels.tolist()) == set(range(10))


def test_version_and_help():
    assert CliRunner().invoke(main, ["--version"]).output == f"nettrim, version {nettrim.__version__}\n"
    assert "demo" in CliRunner().invoke(main, ["-h"]).output


def test_is_a_module_too():
    done = subprocess.run([sys.executable, "-m", "nettrim", "--version"], capture_output=True, text=True, check=True)
    assert nettrim.__version__ in done.stdout
