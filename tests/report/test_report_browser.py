"""The report in a real browser: it opens from disk without a request or a console error, draws, searches, and runs no payload.

A Chromium is taken from PATH or installed by playwright; where neither can be, the tests are skipped and say why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_runs
from devtools import Browser
from test_report_page import PAYLOADS, hostile

from iterative_sft_cli import Run
from iterative_sft_cli.report import html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL_S = 300


def find_browser():
    """The path of a Chromium: named, on PATH, or installed by playwright where that package is there. Skips with the reason where none can be had."""
    found = os.environ.get("ISFT_TEST_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found:
        return found
    none = f"no browser: none of {', '.join(BROWSERS)} is on PATH"
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.skip(f"{none}, and playwright is not installed")
    try:
        install = [sys.executable, "-m", "playwright", "install", "chromium"]
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{none}, and playwright did not get one in {INSTALL_S} s")
    if done.returncode:
        pytest.skip(f"{none}, and playwright could not get one: {(done.stderr or done.stdout).strip()[-200:]}")
    with sync_playwright() as played:
        return played.chromium.executable_path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests of this file."""
    with Browser(find_browser(), tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def report(done, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    html.write_report(Run.open(done), path)
    return path


PAINTED = """
Array.from(document.querySelectorAll(".chart canvas"), (canvas) => {
  const copy = document.createElement("canvas"), seen = {};
  Object.assign(copy, { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, copy.width, copy.height);
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) {
    const colour = data.slice(i, i + 3).join();
    seen[colour] = (seen[colour] ?? 0) + 1;
  }
  return seen;
})
"""
"""For every chart how many of its pixels have which colour."""
BLUE, ORANGE, BLUE_IN_THE_DARK = "37,99,235", "194,87,12", "110,168,254"
FITS = "document.documentElement.scrollWidth <= innerWidth"


def test_a_request_and_an_error_would_be_seen(browser, tmp_path):
    path = tmp_path / "control.html"
    path.write_text("<title>x</title><img src='http://evil.example/x.png'><script>console.error('seen')</script>")
    page = browser.page(f"file://{path}")
    assert "seen" in page.console and "http://evil.example/x.png" in page.requests


def test_the_policy_stops_what_is_not_the_pages_own(browser, report, tmp_path):
    path = tmp_path / "changed.html"
    path.write_text(report.read_text().replace("</footer>", "</footer><script>document.title = 'owned'</script>"))
    page = browser.page(f"file://{path}")
    assert page.value("document.title") != "owned" and any("Content Security Policy" in said for said in page.console)


def test_it_opens_without_errors_or_requests_and_draws(browser, report):
    page = browser.page(f"file://{report}")
    assert page.console == [] and page.requests == [f"file://{report}"]
    painted = page.value(PAINTED)
    assert len(painted) == 13 and all(len(seen) > 3 and seen.get(BLUE, 0) > 100 for seen in painted)
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.settle()
    # of a round that was closed too
    sizes = page.value("Array.from(document.querySelectorAll('.chart'), (one) => [one.clientWidth, one.clientHeight])")
    assert len(sizes) == 13 and all(width > 300 and height > 100 for width, height in sizes) and page.console == []


def test_the_values_under_the_pointer_are_written(browser, report, done):
    page = browser.page(f"file://{report}")
    stats = Run.open(done).stats

    def said():
        rows = "Array.from(document.querySelector('.u-legend').rows)"
        return dict(page.value(f"{rows}.map((row) => [row.cells[0].innerText, row.cells[1]?.innerText])"))

    def written(row):
        shown = [f"{row[key]:.4g}" for key in ("eval/pass@1", "eval/pass@1_low", "eval/pass@1_high")]
        return {"round": str(row["round"]), "pass@1": f"{shown[0]} ({shown[1]} to {shown[2]})"}

    assert said() | written(stats[3]) == said()
    x, y = page.value(
        "(() => { const { left, top, width } = document.querySelector('.u-over').getBoundingClientRect();"
        " return [left + width / 3, top + 20]; })()"
    )
    page.move(x, y)
    assert said() | written(stats[1]) == said()
    page.move(1, 1)
    assert said() | written(stats[3]) == said() and page.console == []


def test_a_curve_with_its_band_or_a_part_of_the_bars_can_be_put_away(browser, report):
    page = browser.page(f"file://{report}")
    charts = page.value("Array.from(document.querySelectorAll('.panel h3'), (one) => one.innerText)")
    first = "querySelector('.u-series:not(.aside)[style*=\"order: 1\"] th').click()"

    def put_away(title):
        """What the chart showed before and shows after its first name was clicked."""
        place = charts.index(title)
        before = page.value(PAINTED)[place]
        page.value(f"document.querySelectorAll('.chart')[{place}].{first}")
        page.settle()
        return before, page.value(PAINTED)[place]

    before, after = put_away("Held-out accuracy")
    assert before[BLUE] > 100 and not any(_is_blue(colour) for colour in after)
    before, after = put_away("Why samples were dropped")
    stored = page.value(
        f"document.querySelectorAll('.chart')[{charts.index('Why samples were dropped')}].dataset.chart"
    )
    below, above = json.loads(stored)["values"]
    # what stood on it stands on the ground, and the highest bar fills the chart again
    grown = max(map(sum, zip(below, above, strict=True))) / max(above)
    assert BLUE not in after and after[ORANGE] / before[ORANGE] == pytest.approx(grown, rel=0.1)
    assert page.console == []


def _is_blue(colour):
    """Whether a pixel is of the first curve or its band."""
    red, green, blue = map(int, colour.split(","))
    return blue > red + 20 and blue > green + 20


def test_the_charts_follow_light_and_dark(browser, report):
    page = browser.page(f"file://{report}", dark=True)
    dark = page.value(PAINTED)
    assert all(seen.get(BLUE_IN_THE_DARK, 0) > 100 and BLUE not in seen for seen in dark)
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    page.scheme("light")
    assert page.until(f"getComputedStyle(document.body).backgroundColor !== '{paper}'")
    page.settle()
    light = page.value(PAINTED)
    assert all(seen.get(BLUE, 0) > 100 and BLUE_IN_THE_DARK not in seen for seen in light) and len(light) == len(dark)
    assert page.console == []


def test_it_is_readable_on_a_phone_and_when_the_window_grows(browser, report):
    page = browser.page(f"file://{report}", width=390)
    inside = "Array.from(document.querySelectorAll('.uplot'), (one) => one.getBoundingClientRect().width <= one.closest('.panel').clientWidth)"
    assert page.value(FITS) and page.value(f"{inside}.every(Boolean)")
    narrow = page.value("document.querySelector('.uplot').clientWidth")
    page.size(1200)
    assert narrow < 390 and page.until(f"document.querySelector('.uplot').clientWidth > {narrow} + 100")
    page.size(390)
    assert page.until(f"document.querySelector('.uplot').clientWidth === {narrow}") and page.value(FITS)
    assert page.console == []


def test_without_scripts_the_values_stand_in_tables(browser, report, done):
    page = browser.page(f"file://{report}", script=False)
    page.send("Emulation.setScriptExecutionDisabled", value=False)
    assert page.value("document.querySelectorAll('canvas').length") == 0
    assert page.value("document.querySelector('noscript p').getBoundingClientRect().height") > 0
    values = page.value("document.querySelector('.panel table').textContent")
    assert f"{Run.open(done).stats[1]['eval/pass@1']:.4g} (" in values


def test_the_search_hides_what_does_not_fit(browser, report):
    page = browser.page(f"file://{report}#q=duplicate&round=2")
    shown = page.value(
        "Array.from(document.querySelectorAll('.sample:not([hidden])'), (one) => [one.dataset.round, one.dataset.verdict])"
    )
    assert shown and all(one == ["2", "rejected"] for one in shown)
    assert page.value("document.getElementById('count').innerText") == f"{len(shown)} of 60 shown"
    page.value("document.getElementById('search').value = ''; document.getElementById('round').value = '';")
    page.value("document.getElementById('search').dispatchEvent(new Event('input'))")
    assert page.value("document.getElementById('count').innerText") == "60 of 60 shown" and page.console == []


def test_no_payload_runs(browser, tmp_path):
    texts = [text for text in PAYLOADS if len(text) < 1000]
    run = hostile(tmp_path, "".join(texts).replace("alert(1)", "document.title='owned'"))
    path = tmp_path / "report.html"
    html.write_report(run, path)
    page = browser.page(f"file://{path}")
    assert page.console == [] and page.requests == [f"file://{path}"]
    assert page.value("document.title") == f"{tmp_path.name}/run: isft report"
    # what the scripts wrote is text too
    made = set(page.value("Array.from(document.querySelectorAll('.chart *'), (one) => one.localName)"))
    assert "canvas" in made and made <= {"div", "canvas", "table", "tbody", "tr", "th", "td"}


ODD = {
    "one round": [{"round": 1, "filters/accept_rate": 0.5, "filters/difficulty": [1, 0, 0, 0, 0, 0]}],
    "nothing known": [{"round": 1, "filters/accept_rate": None, "eval/pass@1": None}],
    "one figure": [{"round": 0, "eval/pass@1": 0.0}, {"round": 1, "eval/pass@1": None, "eval/pass@1_low": 0.1}],
    "all the same": [{"round": n, "generate/mean_tokens": 0, "generate/token_nll": 3.0} for n in (1, 2, 3)],
    "very large and small": [
        {"round": n, "generate/mean_tokens": 1e12 * n, "train/seed_loss": 1e-9 * n} for n in (1, 2)
    ],
    "a round left out": [
        {"round": n, "filters/accept_rate": 0.1 * n, "filters/difficulty": [n] * 6} for n in (1, 2, 7)
    ],
    "many rounds": [{"round": n, "filters/accept_rate": 1 / n, "filters/difficulty": [n] * 6} for n in range(1, 200)],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_statistics_break_nothing(browser, tmp_path, name):
    run = report_runs.write_large(tmp_path / "run", 16)
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ODD[name]))
    path = tmp_path / "report.html"
    html.write_report(Run.open(run), path)
    page = browser.page(f"file://{path}")
    assert page.console == [] and page.value("document.getElementById('count').innerText") == "16 of 16 shown"
    charts = page.value("document.querySelectorAll('.chart').length")
    painted = page.value(PAINTED)
    assert len(painted) == charts == (0 if name == "nothing known" else charts)
    assert all(seen.get(BLUE, 0) > 10 for seen in painted)


def test_pictures_to_look_at(browser, report, tmp_path):
    """Light, dark and phone differ; look at them with ISFT_TEST_PICTURES=FOLDER."""
    keep = os.environ.get("ISFT_TEST_PICTURES")
    page = browser.page(f"file://{report}")
    pictures = {}
    for name, width, scheme in (("light", 1200, "light"), ("dark", 1200, "dark"), ("phone", 390, "light")):
        page.scheme(scheme)
        page.size(width)
        page.settle()
        pictures[name] = page.picture(Path(keep or tmp_path) / f"{name}.png")
    assert len(set(pictures.values())) == 3 and all(len(data) > 20_000 for data in pictures.values())
