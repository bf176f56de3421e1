"""The language-model benchmark: perplexity by hand, the peers' calls, and the command at its tiny size."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from benchmarks import llm, llm_data  # noqa: E402 (they need transformers)
from benchmarks.pruners import PRUNERS  # noqa: E402

TINY = ("--data", "tiny", "--sequences", "6", "--judged", "3", "--length", "16", "--threads", "1")


def command(*arguments: str) -> Any:
    return CliRunner().invoke(llm.main, arguments)


def test_the_tiny_command_measures_every_method_and_resumes(tmp_path: Path) -> None:
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
    before = out.read_text()
    assert command(*TINY, "--kept", "0.5,2:4", "--out", str(out)).exit_code == 0
    assert out.read_text() == before


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
               for block in inner.layers for group in llm._linear(block) for module in group]  # fmt: skip
    with torch.no_grad():
        llm.hidden_states(subject.model, subject.calibration)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(given) == 14
    for G, A in zip(seen[7:], given[7:], strict=True):
        torch.testing.assert_close(G, A.double().T @ A.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--methods", "best"), "expected some of"), (("--kept", "1.5"), "expected shares"), (("--kept", "a:b"), "expected shares")],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, arguments: tuple[str, str], said: str) -> None:
    result = command(*TINY, *arguments, "--out", str(tmp_path / "out.json"))
    assert result.exit_code != 0
    assert said in result.output


def test_a_folder_of_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_data, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "smollm2").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / "smollm2" / name).write_text("{}")
    result = command("--sequences", "2", "--judged", "1", "--out", str(tmp_path / "out.json"))
    assert result.exit_code != 0
    assert "npm was not found" in result.output
