"""The report in a real browser: it opens without errors and answers to the keyboard."""

import re
import shutil
import subprocess

import pytest

from llm_vtrans.report.build import run_page
from llm_vtrans.report.record import RunRecord
from tests.unit.test_report import write_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome"),
]
# What a person would do: focus the first chart, press the right arrow twice.
PRESS = """
const chart = document.querySelector('svg.chart');
chart.focus();
for (const key of ['ArrowRight', 'ArrowRight'])
  chart.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
document.title = [document.activeElement === chart, document.documentElement.scrollWidth,
  innerWidth, chart.closest('figure').querySelector('output').textContent].join('|');
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


@pytest.mark.parametrize("width", [1280, 500])  # headless windows are no narrower than 500
def test_opens_and_reads_values_out(tmp_path, width):
    html = run_page(RunRecord.read(write_run(tmp_path / "run")), "run")
    path = tmp_path / "page.html"
    path.write_text(html.replace("</script></body>", f"</script><script>{PRESS}</script></body>"))
    dom, console = opened(path, width)
    assert console == []
    has_focus, content, window, said = re.search("<title>(.*?)</title>", dom)[1].split("|")
    assert has_focus == "true"
    assert said == "MACs, pruned: 25"
    assert int(content) <= int(window)  # nothing sticks out sideways


def test_an_error_would_be_seen(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><title>x</title><script>missing()</script>")
    assert len(opened(path, 800)[1]) == 1
