"""What travels between ranks comes out as it went in."""

import math

from hypothesis import given
from hypothesis import strategies as st

from iterative_sft_cli.ranks.wire import (
    from_completion,
    from_decoding,
    from_requests,
    from_rows,
    pack,
    to_completion,
    to_decoding,
    to_requests,
    to_rows,
    unpack,
)
from iterative_sft_cli.types import Completion, Decoding, Request, TrainRow

ids = st.lists(st.integers(0, 200_000), max_size=8).map(tuple)
reals = st.floats(allow_nan=False, allow_infinity=False)


@given(ids, st.data(), reals)
def test_rows(tokens, data, weight):
    labels = tuple(data.draw(st.sampled_from([-100, token, token + 1])) for token in tokens)
    reference = data.draw(st.none() | st.lists(reals, max_size=3).map(tuple))
    rows = [TrainRow("é", tokens, labels, weight, reference), TrainRow("b", (1, 2, 3, 4), (-100, 2, -100, 4))]
    assert to_rows(unpack(pack(from_rows(rows)))) == rows


def test_labels_of_an_encoder_decoder_are_not_runs():
    rows = [TrainRow("a", (1, 2, 3), (7, 8))]
    assert to_rows(unpack(pack(from_rows(rows)))) == rows


@given(ids, st.none() | st.text(), st.none() | reals, st.none() | st.lists(reals, max_size=4).map(tuple))
def test_completions(tokens, text, logprob, logprobs):
    made = Completion("p", 3, tokens, "eos", text, logprob, logprobs)
    again = to_completion(unpack(pack(from_completion(made))))
    assert again == made
    assert logprob is None or math.copysign(1, again.logprob) == math.copysign(1, logprob)


def test_requests_and_decoding():
    chat = [{"role": "user", "content": "ü"}]
    requests = [Request("a", "x", (1, 2), (0, 1), (2**62, 5)), Request("b", chat, (), (7,), (1,))]
    assert to_requests(unpack(pack(from_requests(requests)))) == requests
    decoding = Decoding(temperature=0.1 + 0.2, stop=("\n", "é"), eos_token_ids=(2,), keep_logprobs=True)
    assert to_decoding(unpack(pack(from_decoding(decoding)))) == decoding
