"""The benchmark of sentence similarity: embeddings and pairs by hand, the peers' calls, and the command at its tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("transformers")

from benchmarks import similarity, similarity_data  # noqa: E402 (they need transformers)
from benchmarks.data import DataError  # noqa: E402
from benchmarks.pruners import PRUNERS  # noqa: E402
from nettrim.errors import ConvergenceError  # noqa: E402

TINY = ("--data", "tiny", "--sequences", "6", "--length", "12", "--pairs", "20", "--threads", "1")


def command(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(similarity.main, [*TINY, "--out", str(out), *arguments])


def test_every_method_is_judged_by_the_dense_similarities_and_a_second_call_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "similarity.json"
    result = command(out)
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text())["runs"]
    assert [(run["settings"]["kept"], run["settings"]["method"]) for run in runs] == [(k, m) for k in ("0.5", "2:4") for m in similarity.METHODS]
    assert all(run["within"] and abs(run["density"] - 0.5) < 0.01 and -1 <= run["spearman"] < 1 and run["same"] < 1 for run in runs)
    for words in ("2:4 kept", "nettrim-layer", "of another text than the calibration"):
        assert words in " ".join(result.output.split())
    before = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(similarity, "measure", lambda *_: pytest.fail("pruned again"))
        assert command(out).exit_code == 0
    assert out.read_bytes() == before
    # an argument of ours that changes is another run
    monkeypatch.setitem(similarity.OURS, "nettrim", {"repair": 0.5})
    monkeypatch.setattr(similarity, "measure", lambda *_: {**runs[0], "spearman": 0.123})
    assert command(out, "--methods", "nettrim,alps", "--kept", "0.5").exit_code == 0
    assert [run["spearman"] == 0.123 for run in json.loads(out.read_text())["runs"]] == [False] * len(runs) + [True]


def test_a_network_that_is_left_as_it_is_has_the_same_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = similarity_data.tiny(4, 12, 20, 0)
    monkeypatch.setitem(PRUNERS, "magnitude", lambda W, G, kept: W)
    measured = similarity.measure(subject, {"method": "magnitude", "kept": "0.5", "seed": 0})
    assert measured["spearman"] == pytest.approx(1) and measured["same"] == pytest.approx(1, abs=1e-5) and not measured["within"]


def test_padding_does_not_count_in_an_embedding() -> None:
    subject = similarity_data.tiny(1, 12, 4, 0)
    batch = subject.sentences[0]
    short = {name: value[:1, :7] for name, value in batch.items()}
    with torch.no_grad():
        whole = similarity.embed(subject.model, batch)
        torch.testing.assert_close(whole[:1], similarity.embed(subject.model, short), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(similarity.embed(subject.model, short["input_ids"]), whole[:1], rtol=1e-4, atol=1e-5)
        embeddings, found = similarity.similarities(subject.model, subject)
    assert embeddings.shape == (8, 16) and found[1] == pytest.approx(float(embeddings[2] @ embeddings[3]))


def test_pairs_are_neighbours_and_others_in_equal_parts() -> None:
    sentences = [f"This is the sentence number {index} of the text." for index in range(50)]
    chosen, pairs = similarity_data.draw_pairs(" ".join(["Too short.", *sentences, "Short too!"]), 20, 0)
    numbers = [sentences.index(sentence) for sentence in chosen]
    assert pairs.shape == (20, 2) and len(chosen) == 20
    apart = [numbers[right] - numbers[left] for left, right in pairs.tolist()]
    assert apart[:10] == [1] * 10 and 1 not in apart[10:]
    assert similarity_data.draw_pairs(" ".join(sentences), 20, 0)[0] != similarity_data.draw_pairs(" ".join(sentences), 20, 1)[0]
    with pytest.raises(DataError, match="200 pairs of sentences were asked for; the text has 98"):
        similarity_data.draw_pairs(" ".join(sentences), 200, 0)


def test_a_peer_sees_the_inputs_of_what_it_has_pruned_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = similarity_data.tiny(4, 12, 2, 0)
    seen: list[torch.Tensor] = []

    def keep_all(W: torch.Tensor, G: torch.Tensor, kept: Any) -> torch.Tensor:
        seen.append(G.clone())
        return W * 0 if len(seen) == 6 else W  # the last layer of the first block gives nothing

    monkeypatch.setitem(PRUNERS, "alps", keep_all)
    model: Any = similarity.prune_blocks(subject.model, similarity.blocks, similarity.embed, subject.calibration.split(2), "0.5", "alps")
    layers = [layer for block in similarity.blocks(model) for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    given: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten(0, -2).double())) for layer in layers]
    with torch.no_grad():
        similarity.embed(model, subject.calibration)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(given) == 12 and not layers[5].weight.any()
    for G, A in zip(seen, given, strict=True):
        torch.testing.assert_close(G, A.T @ A, rtol=1e-4, atol=1e-5)


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ConvergenceError("no end in sight")

    def broken(model: torch.nn.Module, *_: Any, **__: Any) -> Any:
        certificate = type("Certificate", (), {"holds": False, "explanation": "layer 3 is off"})
        return type("Result", (), {"model": model, "report": type("Report", (), {"certificate": certificate})})

    out, asked = tmp_path / "similarity.json", ("--kept", "0.5", "--methods", "nettrim,magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(similarity, "prune_by_ours", fail)
        result = command(out, *asked)
    assert result.exit_code == 1 and "1 of 2 runs failed" in result.output
    runs = json.loads(out.read_text())["runs"]
    assert runs[0]["error"] == "ConvergenceError: no end in sight" and "error" not in runs[1]
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.similarity.nettrim.prune", broken)
        assert command(out, *asked).exit_code == 1
    assert "NetTrimError: the certificate does not hold: layer 3 is off" in out.read_text()
    assert command(out, *asked).exit_code == 0  # tried again, and found


def test_a_method_that_keeps_too_many_is_told_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "similarity.json", ("--kept", "0.5", "--methods", "magnitude")
    with monkeypatch.context() as patch:
        patch.setitem(PRUNERS, "magnitude", lambda W, G, kept: W)
        results = [command(out, *asked)]
    for result in [*results, command(out, *asked)]:
        assert result.exit_code == 1 and "keeps too many" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "best"), "is not one of"),
        (("--kept", "1.5"), "expected shares"),
        (("--kept", "a:b"), "expected shares"),
        (("--pairs", "2"), "x>=3"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, arguments: tuple[str, str], said: str) -> None:
    result = command(tmp_path / "out.json", *arguments)
    assert result.exit_code == 2 and said in result.output


def test_without_transformers_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(DataError, match="pip install transformers"):
        similarity_data.tiny(1, 8, 2, 0)
