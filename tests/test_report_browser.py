"""The page in a real browser: it renders, asks for nothing, fits a phone, can be read by a screen reader, in the dark and on paper."""

import dataclasses
import functools
import http.server
import math
import threading

import pytest
import torch
from browser import browser
from reports import certificate, layer, report

import nettrim

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
LONG = "encoder." * 30 + "weight"
MODES = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])

# the ratio of luminances, as WCAG 2 defines it, of every word with what is painted behind it: those below the 4.5 of level AA
CONTRAST = """
const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const parse = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
let count = 0;
for (let node; node = walker.nextNode();) {
  const owner = node.parentElement;
  if (!node.data.trim() || owner.closest("style, svg, details:not([open]) > :not(summary)")) continue;
  let behind = owner;
  while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const back = light(parse(getComputedStyle(behind).backgroundColor)), front = light(parse(getComputedStyle(owner).color));
  const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
  count += 1;
  if (ratio < 4.5) poor.push(`${node.data.trim()}: ${ratio.toFixed(2)}`);
}
return [count, poor];
"""


@pytest.fixture(scope="module")
def window():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def site(digits_network, tmp_path_factory):
    """Pages behind an address of this machine, and what was asked of it: a real run, a hostile one, and a broken one."""
    folder = tmp_path_factory.mktemp("site")
    model, images, _, _ = digits_network
    result = nettrim.prune(model, images, epsilon=0.2, mode="parallel", penalty="l1")
    result.report.to_html(folder / "real.html", masks=result.masks, facts={"Speed at batch 1": "2.5 times"})
    kept = (torch.arange(300 * 784) < 58800).reshape(300, 784)
    hostile = report(layer(HOSTILE), layer(LONG), skipped={HOSTILE: HOSTILE, LONG: LONG}, options={HOSTILE: LONG})
    hostile.to_html(folder / "hostile.html", masks={f"{HOSTILE}.weight": kept}, facts={LONG: HOSTILE})
    dataclasses.replace(hostile, certificate=certificate(holds=False)).to_html(folder / "broken.html")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, message, *arguments):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, result.report
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["real", "hostile", "broken"])
def test_it_renders_and_asks_for_nothing_else(window, site, name):
    root, asked, _ = site
    window.complaints(), window.requests()  # of other tests
    asked.clear()
    window.open(f"{root}/{name}.html")
    assert window.complaints() == []
    elsewhere = [url for url in window.requests() if not url.startswith("data:")]
    assert set(elsewhere) == {f"{root}/{name}.html"} and set(asked) == {f"/{name}.html"}
    assert window.run("return document.scripts.length") == 0
    assert window.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert window.run("return document.querySelectorAll('[id]').length === new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size")
    targets = window.run("return [...document.querySelectorAll('a')].map(a => a.hash)")
    assert targets and all(window.run("return document.querySelector(arguments[0]) !== null", target) for target in targets)
    title = window.run("return document.title")
    assert title == "nettrim report: " + ("CERTIFICATE DOES NOT HOLD" if name == "broken" else "certificate holds")


@MODES
@pytest.mark.parametrize("name", ["real", "hostile", "broken"])
@pytest.mark.parametrize("width", [1280, 700, 360])
def test_it_fits_and_has_contrast(window, site, name, width, dark):
    window.open(f"{site[0]}/{name}.html", width=width, dark=dark)
    window.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert window.run("return document.documentElement.scrollWidth") <= width
    outside = window.run(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && e.getClientRects().length"
        " && getComputedStyle(e).clipPath === 'none' && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    count, poor = window.run(CONTRAST)
    assert count > 100 and poor == []
    back = window.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(back) < 60) == dark


@pytest.mark.parametrize("width", [1280, 360])
def test_a_screen_reader_finds_its_way(window, site, width):
    root, _, real = site
    window.open(f"{root}/real.html", width=width)
    nodes = window.accessible()
    names = {role: [node["name"] for node in nodes if node["role"] == role] for role in {node["role"] for node in nodes}}
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(names[landmark]) == 1, landmark
    assert len(names["region"]) >= 7 and all(names["region"]) and all(names["navigation"])
    levels = [node["level"] for node in nodes if node["role"] == "heading"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    images = [*names.get("image", []), *names.get("img", [])]
    assert len(images) >= 3 + 1 + 2 and all(len(name) > 20 for name in images), "masks, the depth and the open layer's curves say what they show"
    assert len(names["table"]) == 4 and all(names["table"])
    assert {found.name for found in real.layers} <= set(names["rowheader"])
    assert {"layer", "density", "gap", "held out"} <= {name.strip() for name in names["columnheader"]}
    assert all(names["link"]) and all(names.get("DisclosureTriangle", ["?"]))
    assert window.run("return document.documentElement.lang") == "en"


def test_curves_lie_where_the_history_is(window, site):
    root, _, real = site
    window.open(f"{root}/real.html")
    window.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    for index, found in enumerate(real.layers):
        known = [point for point in found.history if 0 < point.gap < float("inf")]
        box = "const plot = document.querySelectorAll('.solve')[arguments[0]].querySelectorAll('.plot')[1];"
        places = window.run(
            f"{box} const frame = plot.querySelector('svg').getBoundingClientRect(); return [...plot.querySelectorAll('.dot')].map(dot => {{"
            "const r = dot.getBoundingClientRect(); return [r.x + r.width / 2 - frame.x, r.y + r.height / 2 - frame.y]; })",
            index,
        )
        assert len(places) == len(known)
        across = [x for x, _ in places]
        step = (across[-1] - across[0]) / (known[-1].iteration - known[0].iteration)
        assert across == pytest.approx([across[0] + step * (point.iteration - known[0].iteration) for point in known], abs=0.6)
        down, decades = [y for _, y in places], [math.log10(point.gap) for point in known]
        step = (down[-1] - down[0]) / (decades[-1] - decades[0])
        assert step < 0 and down == pytest.approx([down[0] + step * (decade - decades[0]) for decade in decades], abs=0.6)


def test_masks_are_light_in_the_dark(window, site):
    for dark, expected in ((False, "none"), (True, "invert(1)")):
        window.open(f"{site[0]}/real.html", dark=dark)
        assert window.run("return getComputedStyle(document.querySelector('.masks img')).filter") == expected


@MODES
def test_everything_is_printed(window, site, dark):
    window.open(f"{site[0]}/real.html", print_it=True, dark=dark)
    assert window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert window.run("return getComputedStyle(document.querySelector('.masks img')).filter") == "none"
    assert window.run(CONTRAST)[1] == []
    assert window.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    heights = window.run("return [...document.querySelectorAll('.solve .plot')].map(plot => plot.getBoundingClientRect().height)")
    assert len(heights) == 6 and min(heights) > 100, "curves of closed layers are on paper too"


def test_the_keyboard_reaches_every_part(window, site):
    window.open(f"{site[0]}/real.html")
    reached = window.run(
        "return [...document.querySelectorAll('a, summary')].filter(e => e.checkVisibility()).map(e => { e.focus();"
        " return document.activeElement === e && getComputedStyle(e).outlineStyle; })"
    )
    assert len(reached) > 10 and all(reached)
