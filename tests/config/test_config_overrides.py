from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_files import SHORT, load, problems, write
from hypothesis import given, settings
from hypothesis import strategies as st

from iterative_sft_cli.config import LoadedConfig, load_config
from iterative_sft_cli.config.problems import dotted, undotted


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("generate.temperature=0.7", "generate.temperature", 0.7),
        ("generate.temperature=2e-1", "generate.temperature", 0.2),
        ("prompts.system=Answer: yes, or [no]", "prompts.system", "Answer: yes, or [no]"),
        ("prompts.system=yes", "prompts.system", "yes"),
        ("prompts.system='12'", "prompts.system", "12"),
        ('prompts.system="a\\nb"', "prompts.system", "a\nb"),
        ("prompts.system=a=b", "prompts.system", "a=b"),
        ("prompts.system=", "prompts.system", None),
        ("prompts.system=- x", "prompts.system", "- x"),
        ("prompts.system=#x", "prompts.system", "#x"),
        ("prompts.system=*x &y !z %a @b `c`", "prompts.system", "*x &y !z %a @b `c`"),
        ("generate.stop=[a, 'b c']", "generate.stop", ["a", "b c"]),
        ("generate.stop=a", "generate.stop", ["a"]),
        ("guards.min_accepted=3", "guards.min_accepted", 3),
        ("eval=null", "eval", None),
        ("model.dtype=float32", "model.dtype", "float32"),
        ("model=other/model", "model.path", "other/model"),
        ("prompts.answer.pattern=#### (.+)", "prompts.answer.pattern", "#### (.+)"),
        ("prompts.answer=solution", "prompts.answer.column", "solution"),
        ("prompts.dataset=a/b", "prompts.path", None),
        ("prompts.dataset.id=a/b", "prompts.path", None),
        ("train.steps=7", "train.epochs", None),
        ("train.data.window=2", "train.data.window", 2),
        ("filters[3].max_per_prompt=8", "filters[3].bare", 8),
        ("filters[3].timeout_s=5", "filters[3].bare", 4),
        ("filters[0].timeout_s=5", "filters[0].timeout_s", 5.0),
        ("filters[2]=regex", "filters[2].use", "regex"),
        ("filters[2].dedup.scope=run", "filters[2].args.scope", "run"),
        ("filters[2].scope=run", "filters[2].args.scope", "run"),
        ("filters[1].drop=false", "filters[1].args.drop", False),
    ],
)
def test_overrides_go_where_they_point(tmp_path: Path, override: str, path: str, value: object) -> None:
    found: object = load(tmp_path, override).merged
    for step in undotted(path):
        found = found[step]  # type: ignore[index]
    assert found == value and type(found) is type(value)


LONG = (
    "filters: [{use: threshold, args: {by: num_tokens, min: 1}}, {use: max_per_prompt, bare: 4}, {length: {max: 9}}]\n"
)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("filters[0].min=2", "filters[0].args.min", 2),
        ("filters[0].threshold.min=2", "filters[0].args.min", 2),
        ("filters[0].args.min=2", "filters[0].args.min", 2),
        ("filters[1].max_per_prompt=2", "filters[1].bare", 2),
        ("filters[2].max=2", "filters[2].args.max", 2),
        ("filters[2].length.min=2", "filters[2].args.min", 2),
        ("filters[2].args.min=2", "filters[2].args.min", 2),
    ],
)
def test_an_argument_of_a_filter_is_named_in_either_form(
    tmp_path: Path, override: str, path: str, value: object
) -> None:
    text = "".join(line + "\n" for line in SHORT.splitlines() if not line.startswith(("filters", "  - "))) + LONG
    found: object = load(tmp_path, override, text=text).merged
    for step in undotted(path):
        found = found[step]  # type: ignore[index]
    assert found == value
    kept = load(tmp_path, override, text=text).merged["filters"][2]["args"]
    assert kept["max"] == (2 if override == "filters[2].max=2" else 9)
    assert problems(tmp_path, "filters[0].timeout=3", text=text) == [
        "command line: filters[0].timeout: unknown key. Did you mean timeout_s?"
    ]


def test_naming_a_model_keeps_what_else_is_said_of_it(tmp_path: Path) -> None:
    text = SHORT.replace("model: HuggingFaceTB/SmolLM2-135M-Instruct", "model: {path: a, dtype: float32}")
    assert load(tmp_path, "model=b", text=text).config.model.dtype == "float32"


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "seed=1", "seed=2").config.seed == 2


def test_the_file_is_kept_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT.replace("\n", "\r\n").encode())
    loaded = load_config(path, ["seed=2"])
    assert loaded.source == path.read_bytes() and b"\r\n" in loaded.source


def test_overrides_can_follow_later(tmp_path: Path) -> None:
    loaded = load(tmp_path, "seed=4")
    limited = loaded.with_overrides(["rounds=1", "prompts.limit=3", "output_dir=o-limit3"])
    assert (limited.config.seed, limited.config.rounds, limited.config.prompts.limit) == (4, 1, 3)
    assert loaded.config.rounds == 3
    assert limited.with_overrides(["seed=5"]).config.prompts.limit == 3


def test_a_run_goes_on_from_its_merged_tree(tmp_path: Path) -> None:
    loaded = load(tmp_path, "generate.temperature={linear: [1, 0.5]}", "output_dir=runs/{seed}")
    resumed = LoadedConfig.from_resolved(
        loaded.merged,
        source=loaded.source,
        path=tmp_path / "run" / "config.yaml",
        output_dir="runs/{0}",
        overrides=["rounds=5"],
        base_dir=tmp_path,
    )
    assert resumed.config.output_dir == "runs/{0}" and resumed.config.rounds == 5
    assert resumed.source == loaded.source and resumed.base_dir == tmp_path
    assert [resumed.config.at_round(r).generate.temperature for r in (1, 2, 3, 5)] == [1.0, 0.75, 0.5, 0.5]


names = st.text(st.characters(categories=["L", "N"], include_characters="_-/"), min_size=1, max_size=8)
paths = st.tuples(names, st.lists(names | st.integers(0, 99), max_size=5)).map(lambda pair: (pair[0], *pair[1]))


@given(paths)
def test_a_path_survives_being_written(path: tuple[str | int, ...]) -> None:
    assert undotted(dotted(path)) == path


@settings(max_examples=60, deadline=None)
@given(value=st.floats(1e-6, 1e6), spelling=st.sampled_from(["{}", "{:e}", "{:.9E}"]))
def test_a_number_means_the_same_in_the_file_and_on_the_command_line(
    tmp_path_factory, value: float, spelling: str
) -> None:
    folder = tmp_path_factory.mktemp("c")
    text = spelling.format(value)
    on_line = load(folder, f"train.learning_rate={text}").config.train.learning_rate
    in_file = load(folder, text=SHORT.replace("2e-5", text)).config.train.learning_rate
    assert on_line == in_file == float(text)


json_texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"], exclude_characters="\ufeff"),
    min_size=1,
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(json_texts)
def test_any_text_in_json_quotes_arrives(tmp_path_factory, text: str) -> None:
    folder = tmp_path_factory.mktemp("c")
    assert load(folder, f"prompts.system={json.dumps(text, ensure_ascii=False)}").config.prompts.system == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_override_breaks_the_reader(tmp_path_factory, key: str, value: str) -> None:
    folder = tmp_path_factory.mktemp("c")
    problems(folder, f"{key}={value}")
    problems(folder, f"generate.{value}")


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(
        ["model", "prompts", "filters", "filters[0]", "train", "train.data", "generate.from", "eval", "eval.k"]
    ),
)
def test_no_value_breaks_the_reader(tmp_path_factory, value: object, path: str) -> None:
    folder = tmp_path_factory.mktemp("c")
    said = problems(folder, f"{path}={json.dumps(value)}")
    assert all(": " in text and text.endswith((".", "?")) for text in said)
