"""Stop strings are noticed at the token that completes them, however the tokenizer cuts the text."""

from __future__ import annotations

import pytest
import tiny

from iterative_sft_cli.generate.stops import StopWatch

MERGES = [("a", "b"), ("ab", "c"), ("x", "y")]


def stops_at(text_tokens: list[str], stop: list[str], merges: list[tuple[str, str]] | None = None) -> int | None:
    """Number of tokens after which the watch fires, None if never."""
    tokenizer = tiny.tiny_tokenizer(merges=merges or [])
    watch = StopWatch(stop, lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)))
    ids: list[int] = []
    for piece in text_tokens:
        ids += tokenizer.encode(piece, add_special_tokens=False)
        if watch.feed(ids):
            return len(ids)
    return None


def test_a_stop_string_over_several_tokens() -> None:
    assert stops_at(list("so END of it"), ["END"]) == 6


def test_a_stop_string_that_ends_inside_a_token() -> None:
    assert stops_at(["x", "abc", "y"], ["xa"], MERGES) == 2


def test_a_stop_string_that_begins_inside_a_token() -> None:
    assert stops_at(["abc", "q", "z"], ["cq"], MERGES) == 2


def test_a_stop_string_of_one_character() -> None:
    assert stops_at(list("ab\ncd"), ["\n"]) == 3


@pytest.mark.parametrize("stop", ["né", "数", "\U0001f600"])
def test_characters_of_several_byte_tokens(stop: str) -> None:
    text = f"ab{stop}cd"
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    watch = StopWatch([stop], lambda part: str(tokenizer.decode(list(part), skip_special_tokens=True)))
    fired = [n for n in range(1, len(ids) + 1) if watch.feed(ids[:n])]
    assert fired[:1] == [len(f"ab{stop}".encode())]


def test_bytes_that_never_become_a_character_do_not_hide_what_follows() -> None:
    tokenizer = tiny.tiny_tokenizer()
    broken = 8 + 0xF0
    ids = [broken] * 12 + tokenizer.encode("xEND", add_special_tokens=False)
    watch = StopWatch(["END"], lambda part: str(tokenizer.decode(list(part), skip_special_tokens=True)))
    fired = [n for n in range(1, len(ids) + 1) if watch.feed(ids[:n])]
    assert fired == [16]


def test_nothing_fires_without_the_string() -> None:
    assert stops_at(list("E N D EN ED"), ["END", ""]) is None
