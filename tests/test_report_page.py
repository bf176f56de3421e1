"""The page and the figure: every figure of the report is on them, hostile names are text, pictures and curves are the data's."""

import base64
import dataclasses
import html
import io
import math
import re
import sys

import numpy
import pytest
import torch
from PIL import Image
from reports import certificate, layer, report

from nettrim.errors import ArgumentError, NetTrimError
from nettrim.rendering import charts, pictures
from nettrim.solvers import HistoryPoint

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}"


def page_of(original, tmp_path, **options):
    original.to_html(tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def mask(rows=300, columns=784, kept=58800):
    """A mask with so many entries kept, from the top left."""
    return (torch.arange(rows * columns) < kept).reshape(rows, columns)


def pixels(address):
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("L")
    return torch.tensor(numpy.asarray(image)).flatten()


class TestPage:
    def test_holds_every_figure(self, tmp_path):
        shown = html.unescape(page_of(report(), tmp_path, facts={"Speed": "2.5 times"})).replace("\N{NO-BREAK SPACE}", " ")
        for words in (
            *("The certificate holds", "differs from the dense network's by 2.80 %", "by 3.20 % on samples kept out", "4.56 was guaranteed"),
            *("75.00 %", "300 × 784", "58,800", "9.75 %", "11.00 %", "12.50 %", "0.04 %", "optimal", "admm", "2.438", "gap 0.04 %, 120 steps"),
            *("Conv2d is not supported", "cascade", '["head"]', "Speed", "2.5 times", "A chain of 2 layers."),
        ):
            assert words in shown, words

    def test_a_broken_certificate_is_never_shown_as_kept(self, tmp_path):
        page = page_of(report(certificate=certificate(holds=False, measured=math.nan)), tmp_path)
        assert "THE CERTIFICATE DOES NOT HOLD" in page and "which is not within" in page
        assert "The certificate holds" not in page and 'class="verdict broken"' in page

    def test_is_one_file_without_a_script(self, tmp_path):
        page = page_of(report(), tmp_path, masks={"fc1.weight": mask()})
        assert page.startswith("<!DOCTYPE html>")
        assert not re.search(r"<script|https?:|url\(|@import|\son\w+=", page)
        assert all(address.startswith(("data:", "#")) for address in re.findall(r'(?:src|href)="([^"]*)"', page))
        assert "default-src 'none'" in page

    def test_hostile_words_are_text(self, tmp_path):
        original = report(layer(HOSTILE), skipped={HOSTILE: HOSTILE}, options={HOSTILE: HOSTILE}, certificate=certificate(explanation=HOSTILE))
        page = page_of(original, tmp_path, masks={f"{HOSTILE}.weight": mask()}, facts={HOSTILE: HOSTILE})
        assert "<script" not in page and "<img src=x" not in page and "{{7*7}}" in page
        assert page.count("</title>") == page.count("<title>")

    def test_sizes_are_those_of_the_weights(self, tmp_path):
        small = layer(shape=(3, 5), nonzeros=4, density=4 / 15, weight_bytes=60)
        assert "60\N{NO-BREAK SPACE}B dense, 18\N{NO-BREAK SPACE}B packed" in page_of(report(small), tmp_path)  # 4 values of 4 bytes, 15 bits

    def test_what_is_missing_is_said(self, tmp_path):
        bare = layer(gap=1.0, lower_bound=0.0, holdout=None, accumulated=None, history=(), discrepancy=math.nan, relative_discrepancy=math.nan)
        page = page_of(report(bare, certificate=certificate(guaranteed=None, holdout=None)), tmp_path)
        assert "no bound covers the whole network" in page and "No curves" in page and "no bound, 120 steps" in page
        counted = page_of(report(layer(gap=1.0, lower_bound=0.0)), tmp_path)
        assert "nothing is proven about a smaller one" in counted and "lower bound</li>" not in counted and "Gap</strong>" not in counted
        assert "held out</span>" not in page and 'id="depth"' not in page and 'id="masks"' not in page

    def test_without_layers(self, tmp_path):
        page = page_of(report(layers=(), density=1.0), tmp_path)
        assert "Conv2d is not supported" in page and 'id="figures"' not in page

    def test_a_layer_without_a_name_has_one(self, tmp_path):
        assert "(the model itself)" in page_of(report(layer("")), tmp_path, masks={"weight": mask()})

    def test_many_large_layers_make_a_small_file(self, tmp_path):
        torch.manual_seed(0)
        wide = torch.rand(1024, 1024) < 0.5
        many = [layer(f"l{i}", shape=(1024, 1024), nonzeros=int(wide.sum()), density=0.5) for i in range(60)]
        page = page_of(report(*many), tmp_path, masks={f"l{i}.weight": wide for i in range(60)})
        assert page.count("data:image/png") == 60 and len(page) < 5e6

    def test_masks_of_another_run_are_refused(self, tmp_path):
        for masks, words in (
            ({"other.weight": mask()}, "'other.weight' belongs to no pruned layer"),
            ({"fc1.weight": mask(kept=3)}, "keeps 3 weights; the report says 58800"),
            ({"fc1.weight": mask()[:299]}, r"shape \(299, 784\)"),
        ):
            for method in (lambda masks: report().to_html(tmp_path / "x.html", masks=masks), lambda masks: report().plot(masks=masks)):
                with pytest.raises(ArgumentError, match=words):
                    method(masks)
        assert not (tmp_path / "x.html").exists()


class TestPictures:
    def test_a_small_mask_is_shown_weight_by_weight(self):
        torch.manual_seed(0)
        kept = torch.rand(7, 5) < 0.4
        [picture] = pictures.pictures({"a.weight": kept}, (layer("a", shape=(7, 5), nonzeros=int(kept.sum())),))
        assert (picture.width, picture.height, picture.cell) == (5, 7, (1, 1))
        assert torch.equal(pixels(picture.address) == 0, kept.flatten())

    def test_a_large_one_is_averaged(self):
        kept = torch.zeros(1030, 600, dtype=torch.bool)
        kept[:3, :2] = True  # all of the first cell
        kept[3, 0] = True  # a sixth of the one below
        kept[-1, -1] = True  # of the last cell, of which there is one row
        [picture] = pictures.pictures({"a.weight": kept}, (layer("a", shape=(1030, 600), nonzeros=8, density=8 / 618000),))
        assert picture.cell == (3, 2) and (picture.width, picture.height) == (300, 344)
        grey = pixels(picture.address).reshape(344, 300)
        assert [int(grey[0, 0]), int(grey[1, 0]), int(grey[-1, -1]), int(grey[5, 5])] == [0, 255 - round(255 / 6), 255 - round(255 / 2), 255]
        assert "a dot stands for 3 by 2 weights, the darkest for 100.00 % kept" in picture.says

    def test_shares_do_not_depend_on_how_many_are_averaged_at_a_time(self, monkeypatch):
        torch.manual_seed(0)
        kept = torch.rand(700, 90) < 0.3
        at_once, cell = pictures.density_map(kept, 1000)
        monkeypatch.setattr(pictures, "_CELLS", 1)
        again, same = pictures.density_map(kept, 1000)
        assert torch.equal(at_once, again) and cell == same and at_once.numel() <= 1000
        assert float(at_once[0, 0]) == pytest.approx(float(kept[: cell[0], : cell[1]].float().mean()))

    def test_a_convolution_is_shown_as_its_matrix(self):
        kept = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
        kept[0, 1] = True
        [picture] = pictures.pictures({"c.weight": kept}, (layer("c", shape=(2, 12), nonzeros=4),))
        assert (picture.width, picture.height) == (12, 2)
        assert "empty rows: 1; empty columns: 8" in picture.says

    def test_a_parameter_of_several_layers_is_shown_as_it_is(self):
        half = {"shape": (2, 4), "nonzeros": 3}
        parts = (layer("attention.q", **half), layer("attention.k", **half), layer("first.inner", **half), layer("first", shape=(1, 2), nonzeros=1))
        masks = {"first.weight": torch.tensor([[True, False]]), "attention.in_proj_weight": torch.ones(6, 4, dtype=torch.bool)}
        shown = pictures.pictures(masks, parts)
        assert [picture.name for picture in shown] == ["attention.in_proj_weight", "first"] and shown[0].height == 6

    def test_nothing_kept_is_white(self):
        [picture] = pictures.pictures({"a.weight": torch.zeros(3, 3)}, (layer("a", shape=(3, 3), nonzeros=0, density=0.0),))
        assert (pixels(picture.address) == 255).all()


class TestCharts:
    def test_points_lie_where_the_values_are(self):
        curve = charts.Curve("c", "measured", [0.0, 5.0, 10.0], [0.0, 20.0, math.inf], ["a", "b", "c"])
        chart = charts.line_chart([curve], title="t", x_label="x", y_label="y", summary="s")
        assert [(tick.place, tick.label) for tick in chart.y_ticks] == [(0.0, "0"), (25.0, "5"), (50.0, "10"), (75.0, "15"), (100.0, "20")]
        assert [(point.x, point.y, point.title) for point in chart.lines[0].points] == [(0.0, 100.0, "a"), (83.33, 0.0, "b")]

    def test_a_logarithmic_axis(self):
        curve = charts.Curve("c", "measured", [1.0, 2.0, 3.0], [1.0, 0.01, 0.0], ["a", "b", "c"])
        chart = charts.line_chart([curve], title="t", x_label="x", y_label="y", summary="s", log=True, percent=True)
        assert [(tick.place, tick.label) for tick in chart.y_ticks] == [(0.0, "1 %"), (50.0, "10 %"), (100.0, "100 %")]
        assert [point.y for point in chart.lines[0].points] == [0.0, 100.0]

    def test_nothing_to_draw(self):
        curve = charts.Curve("c", "measured", [1.0], [math.nan], ["a"])
        assert charts.line_chart([curve], title="t", x_label="x", y_label="y", summary="s") is None

    @pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-30, 3e-30], [1e30], [-1.0, 2.0], [123456.7, 123456.8]])
    @pytest.mark.parametrize("options", [{}, {"from_zero": False}])
    def test_every_point_is_inside(self, values, options):
        curve = charts.Curve("c", "measured", [float(i) for i in range(len(values))], values, [""] * len(values))
        chart = charts.line_chart([curve], title="t", x_label="x", y_label="y", summary="s", **options)
        assert 2 <= len(chart.y_ticks) <= 7
        assert all(0 <= point.x <= 100 and 0 <= point.y <= 100 for point in chart.lines[0].points)

    def test_many_layers_share_few_labels(self):
        names = [f"layer {i}" for i in range(200)]
        curve = charts.Curve("c", "measured", [float(i) for i in range(200)], [0.1] * 200, names)
        chart = charts.line_chart([curve], title="t", x_label="x", y_label="y", summary="s", names=names)
        assert chart.x_ticks[0].label == "layer 0" and len(chart.x_ticks) <= 6
        assert all(tick.place == pytest.approx(100 * int(tick.label.split()[1]) / 199, abs=0.01) for tick in chart.x_ticks)


class TestPlot:
    def test_shows_what_the_page_shows(self, tmp_path):
        later = layer("b", epsilon=math.inf, accumulated=0.3, holdout=None, history=(HistoryPoint(10, 0.1, 2.0, 1.0),))
        figure = report(layer("$a$"), later).plot(masks={"$a$.weight": mask()})
        kept, promise, depth, gaps = figure.axes[:4]
        assert [bar.get_height() for bar in kept.patches] == [0.25, 0.25]
        heights = [bar.get_height() for bar in promise.patches]
        assert heights[0] == pytest.approx(0.1) and math.isnan(heights[1]) and heights[2:5] == [0.0975, 0.0975, 0.11] and math.isnan(heights[5])
        assert [text.get_text() for text in promise.get_legend().get_texts()] == ["promised", "measured", "held out"]
        assert list(depth.lines[0].get_ydata()) == [0.125, 0.3] and list(depth.lines[1].get_ydata()) == [0.0975, 0.0975]
        assert list(gaps.lines[1].get_xdata()) == [10] and list(gaps.lines[1].get_ydata()) == [0.5]
        assert list(gaps.lines[0].get_xdata()) == [40, 120], "before there are feasible weights there is no gap"
        assert [len(axes.images) for axes in figure.axes[4:]] == [1, 0, 0, 0]
        assert figure.axes[4].images[0].get_array().sum() > 0
        figure.savefig(tmp_path / "report.png")
        assert (tmp_path / "report.png").stat().st_size > 1000

    def test_leaves_pyplot_alone(self):
        from matplotlib import pyplot

        report().plot()
        assert pyplot.get_fignums() == []

    def test_without_layers(self, tmp_path):
        report(layers=()).plot().savefig(tmp_path / "empty.png")

    def test_a_missing_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(NetTrimError, match=r"nettrim\[plot\]"):
            report().plot()


def test_the_page_of_a_real_run_shows_its_masks_and_curves(digits_network, tmp_path):
    import nettrim

    model, images, _, _ = digits_network
    result = nettrim.prune(model, images, epsilon=0.2, mode="parallel", penalty="l1")
    page = page_of(result.report, tmp_path, masks=result.masks)
    assert page.count("data:image/png") == 3 and 'id="depth"' in page
    for found in result.report.layers:
        for point in found.history:
            assert f"step {point.iteration:,}, " in page
    first = result.report.layers[0]
    [picture] = pictures.pictures({"0.weight": result.masks["0.weight"]}, (first,))
    assert picture.address in page_of(dataclasses.replace(result.report, layers=(first,)), tmp_path, masks={"0.weight": result.masks["0.weight"]})
