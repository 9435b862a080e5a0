"""The report in a real browser: it opens without errors and answers to the keyboard."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from llm_vtrans.report.build import run_page
from llm_vtrans.report.record import RunRecord
from tests.unit.test_report import add_probe, write_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome"),
]
PHONE = 390  # pixels; a headless window is no narrower than 500, so the page stands in a frame
SMALLEST = 10.5  # pixels of a letter on a chart
# What a person would do: focus the first chart, press the right arrow twice; and see.
LOOK = """
const chart = document.querySelector('svg.chart');
chart.focus();
for (const key of ['ArrowRight', 'ArrowRight'])
  chart.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
const size = (svg) => parseFloat(getComputedStyle(svg.querySelector('text')).fontSize)
  * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
const leaves = (svg) => [...svg.querySelectorAll('text')].some((text) => {
  const [inner, outer] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
  return inner.left < outer.left - 1 || inner.right > outer.right + 1;
});
const charts = [...document.querySelectorAll('svg.chart')];
const headline = document.querySelector('.headline');
parent.document.title = JSON.stringify({
  hasFocus: document.activeElement === chart,
  said: chart.closest('figure').querySelector('output').textContent,
  window: innerWidth, content: document.documentElement.scrollWidth,
  headline: headline.scrollWidth - headline.clientWidth,
  smallest: Math.min(...charts.map(size)),
  cut: charts.filter(leaves).map((svg) => svg.getAttribute('aria-label')),
});
"""


def opened(path, width):
    """DOM after the page's scripts ran, and what the browser wrote to its log."""
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--window-size={width},900", f"--user-data-dir={path.parent / 'profile'}",
         "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with everything a report can show: it was probed, scored and compared."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    add_probe(folder)
    manifest = json.loads((folder / "vtrans.json").read_text())
    manifest["params"] = {"before": 6_738_415_616, "after": 3_369_207_808}  # wide, as in earnest
    manifest["macs"] |= {"before": 3_384_000_000_000, "after": 846_000_000_000}
    (folder / "vtrans.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("width", [1280, PHONE])
def test_opens_reads_values_out_and_fits(folder, tmp_path, width):
    html = run_page(RunRecord.read(folder), "run")
    html = html.replace("</script></body>", f"</script><script>{LOOK}</script></body>")
    path = tmp_path / "page.html"
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{escape(html)}">'
    path.write_text(f"<!doctype html><title>x</title><body style=margin:0>{frame}</iframe>")
    dom, console = opened(path, max(width, 500))
    assert console == []
    seen = json.loads(unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert seen["hasFocus"] and seen["said"] == "MACs, pruned: 25"
    assert seen["window"] == width
    assert seen["content"] <= width  # nothing sticks out sideways
    assert seen["headline"] <= 0  # dense against pruned is read without scrolling
    assert seen["smallest"] >= SMALLEST
    assert seen["cut"] == []


def test_an_error_would_be_seen(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><title>x</title><script>missing()</script>")
    assert len(opened(path, 800)[1]) == 1
