"""language: keeps completions written in given languages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from iterative_sft_cli.filters.builtin.spec import BuiltIn
from iterative_sft_cli.types import Sample, Verdict


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _check(arguments: Mapping[str, Any]) -> None:
    languages = arguments["languages"]
    for one in [languages] if isinstance(languages, str) else languages:
        if not (len(one) in (2, 3) and one.isalpha() and one.islower()):
            raise ValueError(f"argument `languages` holds {one!r}, expected ISO 639-1 codes such as en or de")
    if not 0 <= arguments.get("min_confidence", 0.5) <= 1:
        raise ValueError(f"argument `min_confidence` is {arguments['min_confidence']}, expected 0 to 1")


SPEC = BuiltIn(
    role="check", cost="about 0.2 ms; 0.4 s once to load the model", requires=(("py3langid", "language"),), check=_check
)


def language(
    sample: Sample,
    languages: str | list[str],
    min_confidence: float = 0.5,
    min_chars: int = 20,
    of: Literal["completion", "final", "reasoning"] = "completion",
) -> Verdict:
    """Keep a completion in one of `languages` (ISO 639-1 codes) with at least `min_confidence`.

    Texts under `min_chars` letters are kept: too short to tell. Identified by py3langid, 97 languages. Dropped as
    `other_language`; extras `language` and `confidence`.
    """
    text = sample.completion if of == "completion" else sample.final if of == "final" else sample.reasoning or ""
    if sum(map(str.isalpha, text)) < min_chars:
        return Verdict(True, None, None, {"language": None})
    found, confidence = _identifier().classify(text)
    extra = {"language": str(found), "confidence": round(float(confidence), 4)}
    wanted = [languages] if isinstance(languages, str) else languages
    if found in wanted and confidence >= min_confidence:
        return Verdict(True, None, None, extra)
    return Verdict(False, None, "other_language", extra)
