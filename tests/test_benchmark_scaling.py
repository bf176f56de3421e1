"""`benchmarks.scaling` at its smallest, and its arithmetic by hand."""

import pytest
from click.testing import CliRunner

from benchmarks import scaling
from benchmarks.scaling_arithmetic import LLAMA_70B, Architecture, Costs, Shape, costs


def test_runs_and_finds_the_same_bits(monkeypatch):
    monkeypatch.setattr(scaling, "WAYS", (("serial", 1), ("processes", 1)))  # Dask has tests of its own
    result = CliRunner().invoke(scaling.main, ["--quick"])
    assert result.exit_code == 0, result.output
    assert result.output.count(" yes ") == 4 and " NO " not in result.output
    assert "over all neurons" in result.output and "70 billion" in result.output


def test_the_large_model_is_as_large_as_it_is_called():
    embeddings = 2 * 8192 * 32000
    assert LLAMA_70B.weights + embeddings == pytest.approx(69e9, rel=0.01)


def test_the_arithmetic_of_one_layer():
    table = costs(Architecture("tiny", 3, (Shape("only", 1000, 2000),)), 5000, Costs(1e9, 0.5e9, 100))
    cells = [list(column.cells) for column in table.columns]
    gather, solving = 2 * 5000 * 2000 * 3000, 2 / 3 * 2000**3 + 100 * 2 * 2000**2 * 1000
    assert [cells[4][0], cells[5][0]] == [f"{gather:.2e}", f"{solving:.2e}"]
    assert cells[6] == [f"{(gather / 0.5e9 + solving / 1e9) / 3600:.2f}", f"{3 * (gather / 0.5e9 + solving / 1e9) / 3600:.0f}"]
    assert cells[2][0] == f"{4 * 5000 * 3000 / 2**30:.2f}" and cells[3][0] == f"{8 * (2000**2 + 2000 * 1000) / 2**30:.2f}"
