"""Every template loads, is planned, validates offline, and runs two tiny rounds on the toy model."""

import json
from pathlib import Path

import pytest
from test_loop import rows, run

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.config import load_config
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.plan import describe_plan
from iterative_sft_cli.recipes import files_of, names, title_of, write_recipe
from iterative_sft_cli.recipes.data import dev, seed, train, worked
from iterative_sft_cli.rundir import verify

TOY = Path(__file__).resolve().parent.parent / "toy_backend.py"
CONFIGS = [file for name in names() for file in files_of(name) if file.endswith(".yaml")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("recipes")
    for name in names():
        write_recipe(name, here)
    return here


def tiny(config, folder) -> list[str]:
    """Overrides that make any recipe two rounds of milliseconds."""
    changes = [
        f"model={{use: '{TOY}:make'}}",
        "rounds=2",
        f"output_dir={folder}",
        "guards.on_empty=skip",
        "train.batch_size=4",
    ]
    changes += ["guards.stop_if=null"]
    generate = config.generate
    samples = 1 if not config.at_round(1).generate.do_sample else 4
    changes += [f"generate.samples_per_prompt={samples}", "prompts.per_round=12", "generate.max_new_tokens=32"]
    if config.prompts.use is not None:
        changes += ["prompts.args.per_level=4"]
    if generate.until_accepted is not None:
        changes += ["generate.until_accepted=2"]
    if generate.budget is not None:
        changes += ["generate.budget.pilot=2"]
    if generate.search is not None:
        changes += ["generate.search.prompts=4"]
    if generate.from_ not in ("current", "best", "warmup"):
        changes += ["generate.from=base"]
    if config.train.steps is not None:
        changes += ["train.steps=3"]
    if config.warmup is not None:
        changes += ["warmup.limit=8", "warmup.epochs=1", "warmup.steps=null"]
    if config.eval is not None:
        changes += ["eval.limit=4"]
    return changes


def test_the_papers_of_the_list_are_there():
    wanted = "expert-iteration star star-rationalize adastar rest rest-em raft raft-top rft llama2-rs dart-uniform dart-prop2diff lmsi"
    wanted += " self-consistency self-improve ssd b-star distill spin-data v-star-data rwr minimal gvm reinforce-rej gkd tree-search"
    assert set(names()) == set(wanted.split()) and names()[0] == "minimal"


@pytest.mark.parametrize("name", names())
def test_a_template_has_a_title_a_citation_and_a_small_variant(name):
    files = files_of(name)
    text = files[f"{name}.yaml"]
    assert 20 < len(title_of(name)) < 130 and title_of(name).endswith(".")
    assert f"{name}-small.yaml" in files and f"isft train {name}.yaml" in text
    if name != "minimal":
        assert "arXiv" in text or "2007" in text or "2026" in text
    assert all(len(line) <= 150 for line in text.splitlines())


@pytest.mark.parametrize("file", CONFIGS)
def test_it_loads_and_is_planned(folder, file):
    loaded = load_config(folder / file)
    plan = describe_plan(loaded)
    assert len(plan["rounds"]) == loaded.config.rounds
    if file.endswith("-small.yaml"):
        assert loaded.config.model.init is not None and (folder / loaded.config.model.tokenizer).is_dir()


@pytest.mark.parametrize("file", CONFIGS)
def test_it_validates(folder, file, capsys):
    assert isft(["validate", str(folder / file)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("file", CONFIGS)
def test_it_runs_two_tiny_rounds(folder, tmp_path, file):
    config = load_config(folder / file).config
    outcome, _ = run(folder / file, overrides=tiny(config, tmp_path / "run"))
    assert outcome.code == 0
    stats = rows(tmp_path / "run" / "stats.jsonl")
    assert [row["round"] for row in stats][-2:] == [1, 2] and stats[-1]["generate/num_samples"] > 0
    if not file.startswith("spin"):
        assert sum(row.get("train/num_steps", 0) for row in stats if row["round"]) > 0
    assert verify(tmp_path / "run") == []


def test_nothing_is_replaced_without_force(tmp_path):
    first = write_recipe("star", tmp_path)
    assert all(written for _, written in first)
    assert not any(written for _, written in write_recipe("star", tmp_path))
    (tmp_path / "star.yaml").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="star.yaml is there with other content"):
        write_recipe("star", tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert dict(write_recipe("star", tmp_path, force=True))[tmp_path / "star.yaml"]
    assert (tmp_path / "star.yaml").read_text().startswith("# STaR")


def test_the_command_line_lists_writes_and_refuses(tmp_path, capsys):
    assert isft(["init", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(names()) and all(len(line) <= 160 for line in listed)
    assert isft(["init", "--list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == names()
    assert isft(["init", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert (tmp_path / "minimal.yaml").is_file() and "isft train" in out.err and "minimal-small.yaml" in out.out
    assert isft(["init", "star", "--dir", str(tmp_path), "--json"]) == 0
    assert str(tmp_path / "star.yaml") in json.loads(capsys.readouterr().out)["files"]
    assert isft(["init", "sta", "--dir", str(tmp_path)]) == 2
    assert "did you mean star" in capsys.readouterr().err


def test_a_filter_is_written_with_its_test(tmp_path, capsys):
    assert isft(["init", "--filter", "--dir", str(tmp_path)]) == 0
    path = tmp_path / "my_filter.py"
    assert "def test_keep_short" in path.read_text() and capsys.readouterr().out.strip() == str(path)
    assert isft(["init", "--filter", "--dir", str(tmp_path)]) == 2
    assert isft(["init", "mine.py", "--filter", "--force", "--dir", str(tmp_path)]) == 2
    assert isft(["init", "mine.py", "--filter", "--dir", str(tmp_path)]) == 0 and (tmp_path / "mine.py").is_file()


def test_the_data_sets_do_not_overlap_and_their_steps_are_right():
    asked = [row["question"] for row in (*train(), *dev())] + [row["prompt"] for row in seed()]
    assert len(set(asked)) == len(asked)
    assert worked(17, 25) == "7+5=12, 10+20=30, 12+30=42. Answer: 42"
    assert worked(17, 25, tens_first=True) == "10+20=30, 7+5=12, 30+12=42. Answer: 42"


def test_files_beside_the_configs_work(folder):
    import runpy

    reward = runpy.run_path(str(folder / "data" / "reward.py"))
    reward["test_closeness"]()
    lengths = runpy.run_path(str(folder / "data" / "self_improve.py"))
    made = lengths["make"](2, 3, 5, kind="reverse_add")
    assert len(made) == 10 and {row["level"] for row in made} == {2, 3}
    first, second = made[0]["question"].rstrip("=").split("+")
    assert int(first[::-1]) + int(second[::-1]) == int(made[0]["answer"][::-1])
    assert len(lengths["make"](1, 1, 50, kind="copy")) == 10


def test_raft_pp_is_ppos_clipped_ratio(folder):
    import math
    import runpy

    import torch

    from iterative_sft_cli.train.objectives import TokenBatch, needs_ref_logprobs

    objective = runpy.run_path(str(folder / "data" / "raft_pp.py"))["RaftPP"](clip_low=0.2, clip_high=0.28)
    assert needs_ref_logprobs(objective)
    logprobs = torch.tensor([math.log(0.5), math.log(0.9), math.log(0.5)], requires_grad=True)
    reference = torch.log(torch.tensor([0.5, 0.5, 0.9]))
    weights = torch.tensor([1.0, -1.0])
    batch = TokenBatch(logprobs, -logprobs, torch.tensor([0, 0, 1]), weights, reference)
    loss = objective(batch)
    assert loss.tolist() == pytest.approx([-1.0, -1.28, 0.8])
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.0, 0.0])


def test_distillation_is_the_closed_form_of_the_generalised_divergence(folder, tmp_path):
    import runpy

    import torch
    from tiny import save_tiny, tiny_llama

    from iterative_sft_cli.train.torch_core import StepSettings, TrainCore
    from iterative_sft_cli.types import TrainRow

    teacher = save_tiny(tmp_path / "teacher", model=tiny_llama(seed=1), dtype="float32")
    example = {"use": f"{folder / 'data' / 'token_distill.py'}:Distill", "args": {"teacher": str(teacher), "beta": 0.5}}
    student = tiny_llama(seed=2)
    rows = [TrainRow("a", (9, 10, 11, 12, 13), (-100, -100, 11, 12, 13)), TrainRow("b", (20, 21, 22), (-100, 21, 22))]
    divergence = runpy.run_path(str(folder / "data" / "token_distill.py"))["divergence"]
    expected = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0].log_softmax(-1) for model in (student, tiny_llama(seed=1)))
        places = [i for i, label in enumerate(row.labels[1:]) if label != -100]
        mean = (p[places].exp() + q[places].exp()) / 2
        halves = [(x[places].exp() * (x[places] - mean.log())).sum(-1) / 2 for x in (p, q)]
        expected += (halves[0] + halves[1]).tolist()
        assert divergence(p, q, 0.0).tolist() == pytest.approx((q.exp() * (q - p)).sum(-1).tolist(), abs=1e-6)
    core = TrainCore(student, StepSettings(objective=example, learning_rate=1e-3))
    result = core.step(rows, learning_rate=1e-3, seed=0)
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    later = [core.step(rows, learning_rate=1e-2, seed=0).loss for _ in range(20)]
    assert later[-1] < result.loss / 2


def test_a_search_finds_no_less_likely_answers_than_sampling(folder):
    import runpy

    from iterative_sft_cli.types import EOS, Completion, Decoding, Request

    class Steps:
        """Three letters, each followed by a step's end; a step of `a` is likelier than one of `b`."""

        deterministic = True

        def __init__(self):
            self.asked = []

        def plan(self, requests, decoding):
            return {"max_rows": 4}

        def generate(self, requests, decoding, plan):
            self.asked.append(sum(len(request.seeds) for request in requests))
            for request in requests:
                for index, drawn in zip(request.sample_indices, request.seeds, strict=True):
                    letter = 1 if drawn % 2 else 2
                    last = len(request.prompt_ids) >= 5
                    reason = EOS if last else "stop"
                    yield Completion(
                        request.prompt_id, index, (letter, 0), reason, logprob=-0.1 if letter == 1 else -3.0
                    )

    inner = Steps()
    inner.heartbeat = print
    engine = runpy.run_path(str(folder / "data" / "tree_search.py"))["TreeSearch"](inner, 2, 4, ";")
    requests = [Request(f"p{i}", "?", (7,), (0, 1), (10 * i, 10 * i + 1)) for i in range(3)]
    decoding = Decoding(max_new_tokens=20, eos_token_ids=(0,))
    found = list(engine.generate(requests, decoding, {"max_rows": 4}))
    assert sorted((one.prompt_id, one.sample_index) for one in found) == [
        (f"p{i}", j) for i in range(3) for j in (0, 1)
    ]
    assert inner.asked == [6 * 4, 6 * 2 * 4, 6 * 2 * 4]
    for one in found:
        assert one.finish_reason == EOS and one.token_ids == (1, 0, 1, 0, 1, 0) and one.logprob == pytest.approx(-0.3)
    assert found == list(engine.generate(requests, decoding, {"max_rows": 4}))
    short = list(engine.generate(requests, Decoding(max_new_tokens=2, eos_token_ids=(0,)), {"max_rows": 4}))
    assert {one.finish_reason for one in short} == {"length"} and all(len(one.token_ids) == 2 for one in short)


@pytest.mark.parametrize("name", ["gkd", "tree-search"])
def test_the_examples_of_plug_ins_run_with_a_real_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_recipe(name, tmp_path)
    small = ["rounds=1", "warmup.steps=2", "prompts.limit=3", "eval.limit=2", "guards.on_empty=skip"]
    small += ["train.steps=2"] if name == "gkd" else ["filters=[nonempty]"]
    outcome, _ = run(tmp_path / f"{name}-small.yaml", overrides=small)
    assert outcome.code == 0
    stats = rows(tmp_path / "runs" / f"{name}-small" / "stats.jsonl")
    assert stats[-1]["train/num_steps"] > 0 and stats[-1]["train/loss"] > 0
    assert stats[-1]["generate/num_samples"] == (3 if name == "gkd" else 6)


def test_spins_pairs_have_the_human_answer_as_the_better_side(folder, tmp_path, capsys):
    config = load_config(folder / "spin-data.yaml").config
    run(folder / "spin-data.yaml", overrides=[*tiny(config, tmp_path / "run"), "prompts.template=none"])
    assert isft(["export", str(tmp_path / "run"), "--to", "dpo-jsonl", "--chosen", "completion", "--round", "1"]) == 0
    pairs = rows(tmp_path / "run" / "export" / "dpo.jsonl")
    gold = {row["prompt"]: row["completion"] for row in seed()}
    assert pairs and all(pair["chosen"] == gold[pair["prompt"]] != pair["rejected"] for pair in pairs)
    assert isft(["export", str(tmp_path / "run"), "--to", "dpo-jsonl", "--chosen", "nothing"]) == 4
    assert isft(["export", str(tmp_path / "run"), "--to", "sft-jsonl", "--chosen", "completion"]) == 2
