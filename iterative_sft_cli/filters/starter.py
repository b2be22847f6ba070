"""The file that `isft init --filter` writes: a filter to change, what it may use, and its own test."""

from __future__ import annotations

from pathlib import Path

from iterative_sft_cli.errors import ConfigError

STARTER = '''"""A filter for isft: says of each sample whether it is kept, why, and with which score.

In the config:

    filters:
      - {file}:keep_short                     # with its defaults
      - {file}:keep_short: 20                 # a bare value is the first argument after `sample`
      - {{use: {file}:keep_short, args: {{max_words: 20}}, timeout_s: 5, on_error: drop}}

Try it without a model:   isft filters test {file}:keep_short samples.jsonl max_words=20
where samples.jsonl holds lines such as {{"prompt_id": "p1", "completion": "It is 4.", "answer": "4"}}.
Test it:                  pytest {file}

The name of the first parameter says what the filter looks at:
  sample     one sample; return True, False, a float (kept, with this score) or a Verdict
  group      all samples of one prompt; return a list with one of these for each, in order
  samples    all samples of the round, once a round; likewise
Arguments after it come from the config and are checked before a run starts. A parameter `context` gives
context.round_index, .seed, .rng (use it instead of `random`), .cache_dir, .accepted_earlier.

The file runs in worker processes: print what you like (it is shown with an error), import what is installed, read
files by absolute path. An error, a hang or a wrong return value stops the run with the prompt named (on_error: drop or
retry to go on); it is never counted as a score of 0. Environment variables are passed on by name: env: [MY_API_KEY].
"""

from iterative_sft_cli import Sample, Verdict


def keep_short(sample: Sample, max_words: int = 40) -> Verdict:
    """Keep completions of at most `max_words` words. This text is what `isft filters show` prints."""
    # sample.completion is the whole text, sample.final what follows a thinking block; sample.answer is the reference,
    # sample.row every column of the prompt, sample.scores what earlier filters gave
    words = len(sample.final.split())
    if words > max_words:
        # the reason is counted in the statistics; extras become columns everywhere
        return Verdict(False, reason="too_many_words", extra={{"words": words}})
    return Verdict(True)


class MentionsWord:
    """Keep completions that mention a word. A class is built once a worker: load models in `setup`."""

    def __init__(self, word: str) -> None:
        self.word = word

    def setup(self) -> None:
        """Called once, before the first sample."""
        self.wanted = self.word.casefold()

    def __call__(self, sample: Sample) -> bool:
        return self.wanted in sample.final.casefold()


def make_sample(text: str) -> Sample:
    """A sample for the tests below."""
    return Sample(prompt_id="p1", sample_id="s1", round_index=1, prompt="2 + 2?", completion=text, final=text, answer="4")


def test_keep_short() -> None:
    assert keep_short(make_sample("It is 4.")).keep
    dropped = keep_short(make_sample("It is 4."), max_words=2)
    assert (dropped.keep, dropped.reason) == (False, "too_many_words")


def test_mentions_word() -> None:
    mentions = MentionsWord("Four")
    mentions.setup()
    assert mentions(make_sample("It is four."))
    assert not mentions(make_sample("It is 4."))
'''


def starter_text(file: str) -> str:
    """The starter, with `file` as the name it is called by in the config."""
    return STARTER.format(file=file)


def write_starter(path: Path) -> None:
    """Write the starter. Raises ConfigError rather than replace a file, and for a name that Python cannot import."""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(f"`{path.name}` is no name for a filter file", expected="letters, digits and _ with .py")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(starter_text(path.name))
    except FileExistsError:
        raise ConfigError(f"{path} exists already", hint="choose another name; nothing was written") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
