"""The report in a real browser: it opens from disk without a request or a console error, draws, searches, and runs no payload.

A Chromium is taken from PATH or installed by playwright; where neither can be, the tests are skipped and say why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
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


@pytest.fixture(scope="module", autouse=True)
def browser():
    """Found or installed once, before the first test of this file."""
    global BROWSER
    BROWSER = find_browser()


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


def open_page(path, profile, *options, fragment=""):
    """(DOM after the page's script ran, what the console said, addresses that were asked for)."""
    log = profile / "net.json"
    log.unlink(missing_ok=True)
    fixed = "--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync"
    command = [BROWSER, *fixed.split(), "--disable-component-update", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--timeout=5000", *options]
    result = subprocess.run(
        [*command, "--dump-dom", f"file://{path}{fragment}"], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    requests = set(re.findall(r'"url":"([a-z]+://[^"]*)"', log.read_text(errors="replace"))) if log.exists() else set()
    mine = {url for url in requests if "evil.example" in url or url.startswith(("file:", "ws"))}
    return result.stdout, console, mine


@pytest.fixture(scope="module")
def page(done, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    html.write_report(Run.open(done), path)
    return path


def test_a_request_and_an_error_would_be_seen(tmp_path, profile):
    path = tmp_path / "control.html"
    path.write_text("<title>x</title><img src='http://evil.example/x.png'><script>console.error('seen')</script>")
    _, console, requests = open_page(path, profile)
    assert any("seen" in line for line in console) and any("evil.example" in url for url in requests)


def test_it_opens_without_errors_and_draws(page, profile):
    dom, console, requests = open_page(page, profile)
    assert console == [] and all(url == f"file://{page}" for url in requests)
    assert dom.count('<svg viewBox="0 0 420') >= 12 and "60 of 60 shown" in dom


def test_the_search_hides_what_does_not_fit(page, profile):
    dom, console, _ = open_page(page, profile, fragment="#q=duplicate&round=2")
    shown = [tag for tag in re.findall(r'<article class="sample[^>]*>', dom) if "hidden" not in tag]
    assert console == [] and shown and all('data-round="2"' in tag and "rejected" in tag for tag in shown)
    assert f"{len(shown)} of 60 shown" in dom


def test_no_payload_runs(tmp_path, profile):
    texts = [text for text in PAYLOADS if len(text) < 1000]
    run = hostile(tmp_path, "".join(texts).replace("alert(1)", "document.title='owned'"))
    path = tmp_path / "report.html"
    html.write_report(run, path)
    dom, console, requests = open_page(path, profile)
    title = re.findall(r"<head>.*?<title>(.*?)</title>", dom, re.DOTALL)
    assert console == [] and title == [f"{tmp_path.name}/run: isft report"]
    assert not any("evil.example" in url for url in requests)


def test_light_dark_and_phone_are_painted(page, profile, tmp_path):
    """The pictures differ where they should; look at them with ISFT_TEST_PICTURES=FOLDER."""
    keep = os.environ.get("ISFT_TEST_PICTURES")
    sizes = {}
    for name, options in {
        "light": ["--window-size=1200,1600"],
        "dark": ["--window-size=1200,1600", "--blink-settings=preferredColorScheme=0", "--force-dark-mode"],
        "phone": ["--window-size=390,1600"],
    }.items():
        picture = tmp_path / f"{name}.png"
        open_page(page, profile, f"--screenshot={picture}", *options)
        sizes[name] = picture.read_bytes()
        if keep:
            shutil.copy(picture, keep)
    assert len(set(sizes.values())) == 3 and all(len(data) > 20_000 for data in sizes.values())
