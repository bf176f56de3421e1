"""`nettrim prune` and `nettrim report` as a user runs them: files, output, exit codes."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from commands import FILES, calibration_file, make_chain, nettrim
from networks import chain, same_bits, samples, state_of

import nettrim as package
from nettrim.commands import prune as command

HERE = Path(__file__).resolve().parent


@pytest.fixture
def data(tmp_path) -> Path:
    return calibration_file(tmp_path)


@pytest.fixture
def done(data, tmp_path):
    """The arguments of a run without its --out, and the folder that it wrote."""
    arguments = ["prune", "commands:make_chain", "--calibration", data, "--epsilon", "0.3"]
    result = nettrim(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    return arguments, tmp_path / "out", result


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def one_line(result, exit_code: int) -> str:
    """The last line of stderr of a command that failed as it should."""
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output and result.stdout == ""
    lines = result.stderr.splitlines()
    assert exit_code == 2 or len(lines) == 1, result.stderr
    return lines[-1].removeprefix("Error: ")


class TestPrune:
    def test_does_what_the_function_does(self, done, data):
        _, out, result = done
        expected = package.prune(make_chain(), torch.tensor(np.load(data)), epsilon=0.3)
        assert sorted(path.name for path in out.iterdir()) == FILES
        loaded = package.load(out, make_chain())
        assert same_bits(state_of(loaded.model), state_of(expected.model))
        assert loaded.report.certificate == expected.report.certificate
        assert str(expected.report.certificate) in result.stdout and f"wrote {out}" in result.stdout
        assert result.stderr == ""  # no terminal, no bar

    def test_json_is_all_that_is_printed(self, done):
        arguments, out, _ = done
        result = nettrim(*arguments, "--out", f"{out}2", "--json")
        printed = json.loads(result.stdout)
        assert (printed["out"], printed["holds"], result.stderr) == (f"{out}2", True, "")
        assert package.Report.from_dict(printed["report"]).layers[0].name == "0"

    def test_quiet_prints_nothing(self, done):
        arguments, out, _ = done
        result = nettrim(*arguments, "--out", out, "--force", "--quiet")
        assert (result.exit_code, result.output) == (0, "")

    def test_weights_from_a_file(self, data, tmp_path):
        dense = chain(8, 12, 4, seed=9)
        safetensors.torch.save_file(dense.state_dict(), tmp_path / "w.safetensors")
        arguments = ("--calibration", data, "--sparsity", "0.5", "--out", tmp_path / "out")
        assert nettrim("prune", "commands:make_random", "--weights", tmp_path / "w.safetensors", *arguments).exit_code == 0
        assert same_bits(weights_in(tmp_path / "out"), state_of(package.prune(dense, samples(60, 8), sparsity=0.5).model))

    def test_goals_by_layer(self, data, tmp_path):
        arguments = ("prune", "commands:make_chain", "--calibration", data, "--out", tmp_path / "out", "--quiet")
        assert nettrim(*arguments, "--sparsity", "0=0.5", "--sparsity", "[1-9]=0.25", "--pattern", "unstructured").exit_code == 0
        assert [layer.nonzeros for layer in package.Report.from_json(tmp_path / "out" / "report.json").layers] == [48, 36]
        assert nettrim(*arguments, "--force", "--sparsity", "0.5", "--target", "re:2").exit_code == 0
        report = package.Report.from_json(tmp_path / "out" / "report.json")
        assert [layer.name for layer in report.layers] == ["2"] and "0" in report.skipped

    def test_processes_give_the_same_bits(self, done):
        arguments, out, _ = done
        for name, more in (("a", []), ("b", ["--workers", "2"])):
            result = nettrim(*arguments, "--mode", "parallel", *more, "--threads", "1", "--quiet", "--out", f"{out}-{name}")
            assert result.exit_code == 0, result.output
        assert same_bits(weights_in(Path(f"{out}-a")), weights_in(Path(f"{out}-b")))

    def test_a_certificate_that_does_not_hold(self, done, monkeypatch):
        arguments, out, _ = done
        real = package.prune

        def broken(*args, **kwargs):
            result = real(*args, **kwargs)
            object.__setattr__(result.report.certificate, "holds", False)
            object.__setattr__(result.report.certificate, "explanation", "layer '0' broke its promise")
            return result

        monkeypatch.setattr(package, "prune", broken)
        result = nettrim(*arguments, "--out", out, "--force")
        assert result.exit_code == 1 and result.stderr == "Error: the certificate does not hold: layer '0' broke its promise\n"
        assert nettrim("report", out).exit_code == 1

    def test_goes_on_from_a_checkpoint_folder(self, done, tmp_path):
        arguments, out, _ = done
        for name in ("one", "two"):
            result = nettrim(*arguments, "--checkpoint-dir", tmp_path / "kept", "--out", tmp_path / name)
            assert result.exit_code == 0, result.output
        assert "2 layers taken from it, 0 solved" in " ".join(result.stdout.split())  # the folder's name may break the line
        assert same_bits(weights_in(tmp_path / "two"), weights_in(out))
        assert "checkpoint_dir" not in (tmp_path / "two" / "recipe.yaml").read_text()
        other = nettrim(*arguments, "--gamma", "1.2", "--checkpoint-dir", tmp_path / "kept", "--out", tmp_path / "three")
        assert "gamma" in one_line(other, 1)

    def test_offers_every_option_of_the_function(self):
        callables = {"model", "calibration", "forward_fn", "inplace", "progress", "executor"}
        offered = {option.name for option in command.prune.params}
        assert set(inspect.signature(package.prune).parameters) - callables <= offered
        defaults = {name: parameter.default for name, parameter in inspect.signature(package.prune).parameters.items()}
        for option in command.prune.params:
            if option.name in defaults.keys() - callables and not option.multiple:
                assert option.to_info_dict()["default"] == defaults[option.name], option.name


class TestRecipe:
    def test_repeats_the_run_bit_for_bit(self, done, tmp_path):
        _, out, _ = done
        assert nettrim("prune", "--recipe", out / "recipe.yaml", "--out", tmp_path / "again").exit_code == 0
        assert same_bits(weights_in(out), weights_in(tmp_path / "again"))
        assert (out / "recipe.yaml").read_text() == (tmp_path / "again" / "recipe.yaml").read_text()

    def test_every_option_survives(self, data, tmp_path):
        odd = ("--sparsity", "0=0.5", "--sparsity", "2=0.3", "--repair", "0.7", "--holdout", "0.33", "--tol", "0.1e-3")
        arguments = ("prune", "commands:make_random", "--calibration", data, *odd, "--seed", "4", "--samples", "50", "--preserve-zeros", "--quiet")
        assert nettrim(*arguments, "--out", tmp_path / "a").exit_code == 0
        written = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
        assert written["sparsity"] == {"0": 0.5, "2": 0.3} and written["repair"] == 0.7 and written["seed"] == 4
        assert next(iter(written)) == "model" and Path(written["calibration"]).is_absolute()
        result = nettrim("prune", "--recipe", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "b", "--quiet")
        assert result.exit_code == 0, result.output
        assert same_bits(weights_in(tmp_path / "a"), weights_in(tmp_path / "b"))
        assert package.Report.from_json(tmp_path / "b" / "report.json").layers[0].rows == 33  # of 50, less a third

    def test_by_hand_with_relative_paths(self, data, tmp_path):
        text = "model: commands:make_chain\ncalibration: samples.npy\nepsilon: {'0': 0.2, '2': 0.4}\ntargets: ['0', '2']\nquiet: true\n"
        (tmp_path / "mine.yaml").write_text(text.replace("quiet: true\n", ""))
        assert nettrim("prune", "--recipe", tmp_path / "mine.yaml", "--out", tmp_path / "out").exit_code == 0
        (tmp_path / "mine.yaml").write_text(text)
        assert "has no option 'quiet'; expected some of" in one_line(nettrim("prune", "--recipe", tmp_path / "mine.yaml", "--out", tmp_path / "b"), 2)

    def test_the_command_line_counts_before_it(self, done, tmp_path):
        _, out, _ = done
        result = nettrim("prune", "--recipe", out / "recipe.yaml", "--out", tmp_path / "b", "--sparsity", "0.25", "--seed", "3", "--quiet")
        assert result.exit_code == 0, result.output
        options = package.Report.from_json(tmp_path / "b" / "report.json").options
        assert (options["epsilon"], options["sparsity"], options["seed"]) == (None, 0.25, 3)

    def test_a_file_that_has_changed(self, done, data, tmp_path):
        _, out, _ = done
        np.save(data, samples(60, 8, seed=7).numpy())
        result = nettrim("prune", "--recipe", out / "recipe.yaml", "--out", tmp_path / "b")
        assert one_line(result, 1).startswith(f"{data} is not what it was when the recipe was written")
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epsilon: [", "is no YAML"),
            ("- 3", "holds a list; expected a mapping"),
            ("{3: 4}", "holds a dict; expected a mapping of options"),
            ("!!python/object/apply:os.system ['true']", "is no YAML"),
            ("mode: [1]", "Invalid value for '--mode'"),
            ("seed: -1", "Invalid value for '--seed'"),
        ],
    )
    def test_one_that_cannot_be_read(self, tmp_path, data, text, message):
        (tmp_path / "bad.yaml").write_text(text)
        result = nettrim("prune", "commands:make_chain", "--calibration", data, "--recipe", tmp_path / "bad.yaml", "--out", tmp_path / "b")
        assert message in one_line(result, 2)


class TestReport:
    def test_prints_json_or_writes_a_page(self, done, tmp_path):
        _, out, _ = done
        report = package.Report.from_json(out / "report.json")
        assert nettrim("report", out).stdout == f"{report}\n"
        assert json.loads(nettrim("report", out, "--json").stdout) == report.to_dict()
        result = nettrim("report", out, "--html", tmp_path / "page.html")
        assert (result.exit_code, result.output) == (0, "")
        assert "<html" in (tmp_path / "page.html").read_text()

    def test_what_it_refuses(self, done, tmp_path):
        _, out, _ = done
        assert "has no report.json; expected a folder that" in one_line(nettrim("report", tmp_path), 1)
        assert "give one of them" in one_line(nettrim("report", out, "--json", "--html", "x"), 2)
        (out / "report.json").write_text("{}")
        assert "not a nettrim report" in one_line(nettrim("report", out), 1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("nowhere/at/all", "is no folder, no .pt2 file and no package.module:factory"),
            ("nomodule:make", "cannot be imported (ModuleNotFoundError: No module named 'nomodule')"),
            ("commands:nothing", "cannot be imported (AttributeError"),
            ("commands:failing", "failed (RuntimeError: no weights here)"),
            ("commands:not_a_network", "returned a int; expected a torch.nn.Module"),
            ("commands:TABLE", "is a Tensor; expected a function"),
        ],
    )
    def test_models(self, data, tmp_path, model, message):
        result = nettrim("prune", model, "--calibration", data, "--epsilon", 0.1, "--out", tmp_path / "out")
        assert message in one_line(result, 1)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "expected exactly one of epsilon"),
            ("--epsilon 0.1 --sparsity 0.5", "epsilon=0.1 and sparsity=0.5; expected exactly one"),
            ("--epsilon much", "'much' is neither a number nor LAYER=NUMBER"),
            ("--epsilon 0.1 --epsilon 0=0.2", "give one number for all layers, or LAYER=NUMBER"),
            ("--epsilon 0=0.1 --epsilon 0=0.2", "the same LAYER is given twice"),
            ("--budget nan", "nan is not a finite number"),
            ("--sparsity 0.5 --repair most", "'most'; expected a number, or auto"),
            ("--epsilon 0.1 --gamma 0.5", "gamma=0.5; expected a number at least 1"),
            ("--epsilon 0.1 --solver fastest", "solver='fastest'; expected 'auto' or one of"),
            ("--epsilon 0.1 --workers 2", "--workers goes with --mode parallel"),
            ("--epsilon 0.1 --quiet --json", "--quiet prints nothing and --json prints"),
            ("--epsilon 0.1 --image-size 3by4", "'3by4' is no size"),
            ("--epsilon 0.1 --image-mean a,b", "'a,b'; expected a number, or one for each channel"),
            ("--epsilonn 0.1", "No such option"),
        ],
    )
    def test_usage(self, data, tmp_path, options, message):
        result = nettrim("prune", "commands:failing", "--calibration", data, "--out", tmp_path / "out", *options.split())
        assert message in one_line(result, 2)

    def test_what_is_missing(self, data, tmp_path):
        assert "MODEL is missing; give it, or a --recipe" in one_line(nettrim("prune", "--epsilon", 0.1, "--out", tmp_path / "out"), 2)
        assert "--calibration is missing" in one_line(nettrim("prune", "commands:MADE", "--epsilon", 0.1, "--out", tmp_path / "out"), 2)
        result = nettrim("prune", "commands:MADE", "--calibration", tmp_path / "gone.npy", "--epsilon", 0.1, "--out", tmp_path / "out")
        assert "does not exist" in one_line(result, 2)

    def test_an_existing_folder_before_the_work(self, done):
        arguments, out, _ = done
        arguments[1] = "commands:failing"
        assert "holds the result of another run" in one_line(nettrim(*arguments, "--out", out), 1)
        assert "is no folder that nettrim wrote" in one_line(nettrim(*arguments, "--out", out.parent, "--force"), 1)

    def test_a_layer_that_cannot_be_solved(self, data, tmp_path):
        result = nettrim("prune", "commands:make_chain", "--calibration", data, "--epsilon", "9=0.1", "--out", tmp_path / "out")
        assert "matches no module of the model" in one_line(result, 1)

    def test_an_error_that_nobody_thought_of(self, done, monkeypatch):
        arguments, out, _ = done

        def broken(*args, **kwargs):
            raise ZeroDivisionError("division\nby zero")

        monkeypatch.setattr(package, "prune", broken)
        result = nettrim(*arguments, "--out", f"{out}2")
        assert one_line(result, 1) == "ZeroDivisionError: division by zero (set NETTRIM_TRACEBACK=1 to see where)"
        monkeypatch.setenv("NETTRIM_TRACEBACK", "1")
        assert isinstance(nettrim(*arguments, "--out", f"{out}2").exception, ZeroDivisionError)


def test_ctrl_c_leaves_no_folder(data, tmp_path):
    """A run that would take minutes, interrupted: one word, exit code 1, nothing written."""
    (tmp_path / "slow.py").write_text(
        "import time\nfrom torch import nn\n"
        "class Net(nn.Sequential):\n    def forward(self, x):\n        print('runs', flush=True)\n        time.sleep(60)\n"
        "def make():\n    return Net(nn.Linear(8, 4))\n"
    )
    arguments = [sys.executable, "-m", "nettrim", "prune", "slow:make", "--calibration", data, "--epsilon", "0.1", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{tmp_path}"}
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # what the child is born with: a shell's background jobs ignore it
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
    assert process.stdout.readline() == "runs\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (1, "Aborted!")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"samples.npy", "slow.py"}


def test_shell_completion():
    """As a shell asks for it: the subcommands that begin so, and the options of one."""
    for words, place, expected in (("nettrim pr", 1, "plain,prune"), ("nettrim prune --spars", 2, "plain,--sparsity")):
        asked = {"_NETTRIM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        done = subprocess.run([sys.executable, "-m", "nettrim"], capture_output=True, text=True, env={**os.environ, **asked}, cwd=HERE.parent)
        assert expected in done.stdout.splitlines(), done.stderr
