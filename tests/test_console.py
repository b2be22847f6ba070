"""What reaches the screen: nothing steers the terminal, and figures are readable."""

import io

import pytest

from iterative_sft_cli.console import Console, duration, one_line, safe_text
from iterative_sft_cli.samples import StoredSample
from iterative_sft_cli.types import Sample

PAYLOADS = [
    "\x1b]0;owned\x07", "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\", "\x1b]52;c;cm0gLXJm\x07", "\x1b[2J", "\x1b[31mred", "\x1bc",
    "\x1bP1$r\x1b\\", "\x9b2J", "\x9d0;x\x9c", "a\rb", "\x08\x08\x08hidden", "\x07", "\x00", "\x7f", "\u202etxt.exe", "\u2066x\u2069",
    "\u200b\u200c\u200d", "\ufeff", "\u2028line", "\u2029par", "\x85", "\ud800", "\udfff", "\u061c", "\u00ad", "\u180e", "\u3164",
    "\U000e0041", "\x1b[?1049h", "\x1b[6n", "\x1b[5i", "\x1b]1337;File=:AA==\x07", "\x1b_Gf=100;AA\x1b\\", "\x1b^x\x1b\\", "\x0e\x0f",
    "\x1b[1;1H", "\x1b[9999B", "\x1b[3J", "\x1b]4;1;?\x07", "\x1b]10;?\x07", "\x1b#8", "\x1b(0", "\x1b[c", "\x1b[>c", "\x90x\x9c",
    "[/bold]", "[link=http://evil]x[/link]", "[red]x", "[[/]]", "\\[bold]",
]  # fmt: skip


def screen(text: str) -> str:
    stream = io.StringIO()
    console = Console(stream)
    sample = Sample("p", "1-p-0", 1, text, text, final=text)
    says = ({"filter": text, "keep": False, "reason": text},)
    console.samples(1, [], [StoredSample(sample, 0, says, False)])
    console.note(text)
    return stream.getvalue()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_reaches_the_terminal(payload):
    out = screen(f"before {payload} after")
    bad = [
        c for c in out if (ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) <= 0x9F or 0xD800 <= ord(c) <= 0xDFFF
    ]
    assert not bad
    assert not set(out) & set(
        "\u202e\u2066\u2069\u200b\u200c\u200d\ufeff\u2028\u2029\u061c\u00ad\u180e\u3164\U000e0041"
    )
    assert "before" in out and "after" in out


def test_markup_is_shown_as_it_was_written():
    assert "[/bold]" in screen("[/bold]") and "[link=http://evil]x[/link]" in screen("[link=http://evil]x[/link]")


def test_safe_text_keeps_text_and_says_what_it_cut():
    assert safe_text("naïve 数学 \t\n") == "naïve 数学 \t\n"
    assert safe_text("\x1b[2J") == "\\x1b[2J" and safe_text("\u202e") == "\\u202e"
    assert safe_text("abcdef", 4) == "abcd [... 2 more]"
    assert one_line("a\n  b\tc") == "a b c"


def test_durations():
    assert [duration(s) for s in (8.2, 125, 12000)] == ["8 s", "2 m 05 s", "3 h 20 m"]
