"""Stop strings over a growing list of token ids, whatever way the tokenizer cuts them.

Guarantee: a stop string is noticed at the token that completes it, also when it begins or ends inside a token or a
character is spread over several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are not yet a whole character."""


class StopWatch:
    """Watches one row. `decode` turns token ids into text; it is called with short tails, not with the whole row."""

    def __init__(self, stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.stop = tuple(s for s in stop if s)
        self.longest = max((len(s) for s in self.stop), default=0)
        self.decode = decode
        self.tail = ""
        self.start = 0
        self.read = 0

    def feed(self, ids: Sequence[int]) -> bool:
        """True when the ids, which grew since the last call, now complete a stop string."""
        known = self.decode(ids[self.start : self.read])
        text = self.decode(ids[self.start :])
        if text.endswith(_UNFINISHED) and len(ids) - self.read < 8:
            return False
        # decoded together with the token before, as tokenizers may drop a leading space of what they decode
        self.start, self.read = self.read, len(ids)
        self.tail += text[len(known) :]
        found = any(s in self.tail for s in self.stop)
        self.tail = self.tail[-(self.longest - 1) :] if self.longest > 1 else ""
        return found
