"""The language-model benchmark: perplexity by hand, the peers' calls, and the command at its tiny size."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from benchmarks import llm, llm_data  # noqa: E402 (they need transformers)
from benchmarks.peers_by_block import linear_groups  # noqa: E402
from benchmarks.pruners import PRUNERS  # noqa: E402
from nettrim.errors import ConvergenceError  # noqa: E402

TINY = ("--data", "tiny", "--sequences", "6", "--judged", "3", "--length", "16", "--threads", "1")


def command(*arguments: str) -> Any:
    return CliRunner().invoke(llm.main, arguments)


def test_the_tiny_command_measures_every_method_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "llm.json"
    result = command(*TINY, "--kept", "0.5,2:4", "--out", str(out))
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text())["runs"]
    assert [(run["settings"]["method"], run["settings"]["kept"]) for run in runs] == [
        ("dense", "1"), *((method, kept) for kept in ("0.5", "2:4") for method in llm.METHODS)
    ]  # fmt: skip
    assert all(run["within"] and abs(run["density"] - 0.5) < 0.01 and run["seconds"] >= 0 for run in runs[1:])
    assert all(math.isfinite(run["perplexity"]) and run["perplexity"] > 1 for run in runs)
    for words in ("nettrim", "alps", "50% zeros", "2:4 kept"):
        assert words in result.output
    assert "were chosen with this network" in " ".join(result.output.split())
    before = out.read_text()
    assert command(*TINY, "--kept", "0.5,2:4", "--out", str(out)).exit_code == 0
    assert out.read_text() == before
    # an argument of ours that changes is another run
    monkeypatch.setitem(llm.OURS, "nettrim", {"repair": 0.75, "fidelity": "layer"})
    monkeypatch.setattr(llm, "measure", lambda subject, settings: {**runs[-1], "perplexity": 77.0})
    assert command(*TINY, "--kept", "0.5,2:4", "--out", str(out)).exit_code == 0
    assert [run["perplexity"] == 77 for run in json.loads(out.read_text())["runs"]] == [False] * len(runs) + [True] * 2
    monkeypatch.undo()
    shown = command(*TINY, "--kept", "0.5", "--methods", "nettrim-full-repair", "--out", str(out))
    assert shown.exit_code == 0 and "nettrim-full-repair" in shown.output


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ConvergenceError("no end in sight")

    out = tmp_path / "llm.json"
    asked = (*TINY, "--kept", "0.5", "--methods", "nettrim,magnitude", "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(llm, "prune_by_ours", fail)
        result = command(*asked)
    assert result.exit_code == 1 and "1 of 3 runs failed" in result.output and "failed" in result.output
    runs = json.loads(out.read_text())["runs"]
    assert runs[1]["error"] == "ConvergenceError: no end in sight" and runs[2]["settings"]["method"] == "magnitude" and "error" not in runs[2]
    assert command(*asked).exit_code == 0  # tried again, and found


def test_a_certificate_that_does_not_hold_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module, *_: Any, **__: Any) -> Any:
        certificate = type("Certificate", (), {"holds": False, "explanation": "layer 3 is off"})
        return type("Result", (), {"model": model, "report": type("Report", (), {"certificate": certificate})})

    monkeypatch.setattr("benchmarks.llm.nettrim.prune", broken)
    out = tmp_path / "llm.json"
    assert command(*TINY, "--kept", "0.5", "--methods", "nettrim", "--out", str(out)).exit_code == 1
    assert json.loads(out.read_text())["runs"][1]["error"] == "NetTrimError: the certificate does not hold: layer 3 is off"


def test_a_method_that_keeps_too_many_is_told_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "llm.json"
    with monkeypatch.context() as patch:
        patch.setitem(PRUNERS, "magnitude", lambda W, G, kept: W)
        results = [command(*TINY, "--kept", "0.5", "--methods", "magnitude,wanda", "--out", str(out))]
    results.append(command(*TINY, "--kept", "0.5", "--methods", "magnitude,wanda", "--out", str(out)))
    for result in results:
        assert result.exit_code == 1 and "keeps too many" in result.output and "wanda" in result.output


def test_every_run_of_the_real_network_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: list[str] = []

    def in_a_process(work: partial[Any]) -> Any:
        apart.append(work.args[2]["method"])
        return work()

    monkeypatch.setattr(llm, "in_a_process", in_a_process)
    monkeypatch.setitem(llm_data.LOADERS, "smollm2", llm_data.tiny)
    asked = ("--data", "smollm2", *TINY[2:], "--kept", "0.5", "--methods", "magnitude,wanda", "--out", str(tmp_path / "llm.json"))
    assert command(*asked).exit_code == 0
    assert apart == ["dense", "magnitude", "wanda"]


def test_layers_that_are_given_the_same_input_are_together() -> None:
    model: Any = llm_data.tiny(1, 1, 8, 0, 1).model
    block, calls = model.model.layers[0], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    llm.hidden_states(model, torch.arange(8)[None])
    handle.remove()
    names = {module: name.rpartition(".")[2] for name, module in block.named_modules()}
    found = [[names[layer] for layer in group] for group in linear_groups(block, calls[0])]
    assert found == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_perplexity_of_equal_chances_is_the_number_of_tokens() -> None:
    subject = llm_data.tiny(2, 3, 8, 0, None)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.zero_()
    assert llm.perplexity(subject.model, subject.judged) == pytest.approx(32, rel=1e-5)


def test_a_peer_sees_the_inputs_of_what_it_has_pruned_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = llm_data.tiny(4, 1, 8, 0, 2)
    seen: list[torch.Tensor] = []

    def keep_all(W: torch.Tensor, G: torch.Tensor, kept: Any) -> torch.Tensor:
        seen.append(G.clone())
        return W * 0 if len(seen) == 7 else W  # the last layer of the first block gives nothing

    monkeypatch.setitem(PRUNERS, "alps", keep_all)
    llm.prune_by_peer(subject.model, subject.calibration, "0.5", "alps")
    given: list[torch.Tensor] = []
    inner: Any = subject.model.model
    with torch.no_grad():
        inner.layers[0].mlp.down_proj.weight.zero_()
    handles = [module.register_forward_pre_hook(lambda module, args: given.append(args[0].flatten(0, -2)))
               for block in inner.layers for module in block.modules() if isinstance(module, torch.nn.Linear)]  # fmt: skip
    with torch.no_grad():
        llm.hidden_states(subject.model, subject.calibration)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(given) == 14
    for G, A in zip(seen[7:], given[7:], strict=True):
        torch.testing.assert_close(G, A.double().T @ A.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--methods", "best"), "is not one of"), (("--kept", "1.5"), "expected shares"), (("--kept", "a:b"), "expected shares")],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, arguments: tuple[str, str], said: str) -> None:
    result = command(*TINY, *arguments, "--out", str(tmp_path / "out.json"))
    assert result.exit_code != 0
    assert said in result.output


def test_a_folder_of_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_data, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(llm, "in_a_process", lambda work: work())  # a process of its own would not know the folder
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "smollm2").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / "smollm2" / name).write_text("{}")
    result = command("--sequences", "2", "--judged", "1", "--out", str(tmp_path / "out.json"))
    assert result.exit_code != 0
    assert "npm was not found" in result.output
