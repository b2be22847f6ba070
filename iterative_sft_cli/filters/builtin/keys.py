"""What makes two completions the same, from bytes to equation lists and syntax trees: what the forms of `dedup` share."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from iterative_sft_cli.types import Sample, Verdict

Level = Literal["exact", "normalized", "near", "equation_list", "ast"]
Scope = Literal["prompt", "round", "run"]

DUPLICATE = Verdict(False, None, "duplicate")
MAX_CODE_CHARS = 50_000

_MARKED = re.compile(r"<<([^<>]{1,200})>>")
_EQUATION = re.compile(r"[-+*/×÷().,$%0-9 \t]{1,200}=[ \t]*[-$]{0,2}[0-9][0-9.,]*%?")
FENCE = re.compile(r"```[a-zA-Z0-9_+-]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PUNCTUATION = re.compile(r"[^\w\s.+*/=<>%-]")


def normalized(text: str) -> str:
    """NFKC, case folded, white space collapsed, punctuation dropped except what changes a formula."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(_PUNCTUATION.sub(" ", text.casefold()).split()).strip(" .")


def equations(text: str) -> list[str]:
    """The equations of a solution in order, without spaces: `<<48/2=24>>` where such marks exist (the RFT paper's key),
    else every `numbers and operators = number`."""
    found = _MARKED.findall(text)
    if not found:
        found = [m[0] for m in _EQUATION.finditer(text) if any(sign in m[0].split("=")[0] for sign in "+-*/×÷")]
    return ["".join(one.replace("$", "").split()).rstrip(".,") for one in found]


def equation_list(text: str) -> str:
    """The equation list as one key; a text without equations falls back to its normalized form."""
    found = equations(text)
    return "=" + "|".join(found) if found else "~" + normalized(text)


def python_source(text: str) -> str:
    """The last fenced code block, or the whole text without one."""
    blocks: list[str] = FENCE.findall(text)
    return blocks[-1] if blocks else text


def syntax_tree(text: str) -> str:
    """The Python syntax tree without comments, layout and docstrings; what does not parse falls back to `normalized`."""
    source = python_source(text)
    if len(source) > MAX_CODE_CHARS:
        return "~" + normalized(text)
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                body = node.body
                if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                    if isinstance(body[0].value.value, str):
                        node.body = body[1:] or [ast.Pass()]
        return "=" + ast.dump(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "~" + normalized(text)


def prompt_key(sample: Sample) -> str:
    """The prompt's content, so that one question under two ids counts as one."""
    return sample.prompt if isinstance(sample.prompt, str) else json.dumps(sample.prompt, sort_keys=True, default=str)


KEYS: dict[str, Callable[[str], str]] = {
    "exact": str.strip,
    "normalized": normalized,
    "equation_list": equation_list,
    "ast": syntax_tree,
}
"""How a completion is keyed at each level but `near`."""
