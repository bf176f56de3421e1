"""The report: its words, its round trip through JSON, its table, page and figure."""

import dataclasses
import functools
import json
import math
import sys

import numpy
import pytest
import torch
from reports import certificate, layer, report

from nettrim.errors import ArgumentError, NetTrimError
from nettrim.report import LayerReport, Report


class TestVerdict:
    def test_a_kept_promise(self):
        line = str(certificate())
        assert line == (
            "certificate holds: measured 1.23 <= guaranteed 4.56 (2.80 % of the dense output; held-out 3.20 %)"
        )

    @pytest.mark.parametrize("measured", [5.0, math.nan])
    def test_a_broken_promise_is_never_written_as_kept(self, measured):
        line = str(certificate(holds=False, measured=measured))
        assert line.startswith("CERTIFICATE DOES NOT HOLD: ")
        assert "not <= guaranteed 4.56" in line

    def test_a_graph_that_is_no_chain_says_so(self):
        line = str(certificate(guaranteed=None, holdout=None))
        assert line == "certificate holds: measured 1.23, no bound for the whole network (2.80 % of the dense output)"


class TestText:
    def test_says_everything(self):
        text = str(report())
        lines = text.splitlines()
        assert lines[0] == str(certificate())
        assert "a chain of 2 layers" in text
        assert "density 25.00 %, mode cascade, consistency relaxed, epsilon 0.1" in text
        assert "left dense: conv: Conv2d is not supported" in text
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        assert table[0][:6] == ["layer", "shape", "density", "promised", "measured", "relative"]
        assert table[2] == ["fc1", "300x784", "25.00 %", "2.5", "2.438", "9.75 %", "0.04 %", "optimal", "120", "1.5"]
        assert table[3][:2] == ["fc2", "10x300"]

    def test_is_plain_and_narrow(self, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "20")
        text = str(report(layer("encoder." * 40 + "fc", status="iteration_limit")))
        assert "\x1b" not in text
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= 120
        cells = "".join(line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|"))
        assert "encoder." * 40 + "fc" in cells, "a long name is folded, not cut"

    def test_names_are_not_markup(self):
        assert "[bold]a[/bold]" in str(report(layer("[bold]a[/bold]"), skipped={"[/]": ":smile: [red]why"}))
        assert "left dense: [/]: :smile: [red]why" in str(report(skipped={"[/]": ":smile: [red]why"}))

    def test_missing_and_infinite_figures(self):
        text = str(report(layer(lower_bound=-math.inf, gap=math.inf, discrepancy=math.nan), seconds=0.0))
        assert "inf %" in text and "nan" in text

    def test_small_shares_are_not_shown_as_zero(self):
        assert "< 0.01 %" in str(report(layer(gap=3e-6)))
        assert "0.00 %" in str(report(layer(gap=0.0)))

    def test_without_layers(self):
        text = str(report(layers=(), skipped={"fc": "infeasible"}))
        assert "left dense: fc: infeasible" in text and "|" not in text


class TestRoundTrip:
    @pytest.mark.parametrize(
        "original",
        [
            report(),
            report(layers=(), skipped={}, options={}),
            report(layer("naïve", lower_bound=-math.inf, gap=math.inf)),
            report(certificate=certificate(guaranteed=None, holdout=None)),
            report(layer("NaN", status="infeasible", solver="Infinity")),
            report(layer(history=(), holdout=None, accumulated=None)),
            report(options={"epsilon": {"fc*": 0.1}, "device": None, "inplace": False}),
        ],
    )
    def test_is_exact(self, original, tmp_path):
        assert Report.from_dict(original.to_dict()) == original
        text = original.to_json(tmp_path / "report.json")
        assert (tmp_path / "report.json").read_text(encoding="utf-8") == text == original.to_json()
        assert Report.from_json(tmp_path / "report.json") == original

    def test_json_is_strict(self, tmp_path):
        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        written = report(layer(gap=math.inf, lower_bound=-math.inf, objective=math.nan)).to_json(tmp_path / "r.json")
        data = json.loads(written, parse_constant=refuse)
        written_layer = data["layers"][0]
        assert written_layer["gap"] == "Infinity"
        assert written_layer["lower_bound"] == "-Infinity"
        assert written_layer["objective"] == "NaN"
        again = Report.from_json(tmp_path / "r.json").layers[0]
        assert again.gap == math.inf and again.lower_bound == -math.inf and math.isnan(again.objective)

    def test_options_that_json_has_no_word_for_become_names(self):
        options = {
            "targets": (torch.nn.Linear, "fc*"),
            "forward_fn": functools.partial(lambda model: None),
            "device": torch.device("cpu"),
            "epsilon": numpy.float32(0.5),
            "seed": numpy.int64(3),
            "ignore": {"b", "a"},
            "weights": {torch.nn.Linear: 1.0},
        }
        plain = report(options=options).to_dict()["options"]
        assert plain == {
            "targets": ["torch.nn.modules.linear.Linear", "fc*"],
            "forward_fn": "functools.partial",
            "device": "cpu",
            "epsilon": 0.5,
            "seed": 3,
            "ignore": ["a", "b"],
            "weights": {"torch.nn.modules.linear.Linear": 1.0},
        }
        assert type(plain["seed"]) is int and type(plain["epsilon"]) is float

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda data: data.pop("schema"), "schema 2, found None"),
            (lambda data: data.update(schema=3), "found 3"),
            (lambda data: data.pop("layers"), "Report has the keys"),
            (lambda data: data["layers"][0].pop("gap"), "LayerReport has the keys"),
            (lambda data: data["certificate"].update(colour="red"), "Certificate has the keys"),
            (lambda data: data["layers"][0].update(gap="wide"), "gap is 'wide'; expected float"),
            (lambda data: data.update(schema=1), "found 1"),
            (lambda data: data["layers"][0].update(history=[[1, 2.0]]), "HistoryPoint is a list of 4"),
            (lambda data: data["layers"][0].update(history=[[1, 2.0, "wide", 1.0]]), "'wide'; expected float"),
            (lambda data: data.update(layers=3), "layers is 3; expected tuple"),
        ],
    )
    def test_refuses_what_is_no_report(self, damage, words, tmp_path):
        data = report().to_dict()
        damage(data)
        with pytest.raises(ArgumentError, match=words):
            Report.from_dict(data)
        (tmp_path / "bad.json").write_text(json.dumps(data))
        with pytest.raises(ArgumentError, match=f"bad.json: .*{words}"):
            Report.from_json(tmp_path / "bad.json")

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe"])
    def test_refuses_other_files_by_name(self, content, tmp_path):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ArgumentError, match="other.json"):
            Report.from_json(tmp_path / "other.json")


class TestFrame:
    def test_one_row_a_layer(self):
        frame = report().to_frame()
        assert list(frame.columns) == [field.name for field in dataclasses.fields(LayerReport) if field.name != "history"]
        assert list(frame["name"]) == ["fc1", "fc2"]
        assert frame["shape"][1] == (10, 300)
        assert frame["density"].sum() == 0.5

    def test_without_layers_it_has_its_columns(self):
        frame = report(layers=()).to_frame()
        assert len(frame) == 0 and "density" in frame


@pytest.mark.parametrize(
    ("method", "module", "extra"), [("to_frame", "pandas", "frame"), ("plot", "matplotlib.figure", "plot")]
)
def test_a_missing_extra_is_named(method, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NetTrimError, match=rf"nettrim\[{extra}\]"):
        getattr(report(), method)()


def test_a_report_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().density = 0.0
