"""Built-ins with a model of their own, on tiny random models made in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filter_samples import make_entries, new_sample

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.filters import FilterChain, Judged, resolve_filters

Judge = Callable[..., list[Judged]]

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `reward`, `two_labels`, `causal`, `encoder` with a byte-level tokenizer that has a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    shape = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    llama = LlamaConfig(**shape, max_position_embeddings=256, num_labels=1)
    made = {
        "reward": LlamaForSequenceClassification(llama),
        "two_labels": LlamaForSequenceClassification(LlamaConfig(**shape, max_position_embeddings=256, num_labels=2)),
        "causal": LlamaForCausalLM(llama),
        "encoder": BertModel(BertConfig(**shape, max_position_embeddings=256)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


TEXTS = ["4", "It is four, of course.", "x" * 90, "4", "no"]


def scores(judge: Judge, models: Path, form: Any, texts: list[str] = TEXTS, **fields: Any) -> list[float | None]:
    samples = [new_sample(text, i=i, **fields) for i, text in enumerate(texts)]
    return [one.says[0].score for one in judge(samples, form, base_dir=models)]


def test_a_reward_model_scores_each_sample_as_alone(judge: Judge, models: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = scores(judge, models, {"reward_model": "reward"})
    assert found[0] == pytest.approx(found[3], abs=1e-5) and len({round(s or 0, 4) for s in found}) == 4
    tokenizer = AutoTokenizer.from_pretrained(models / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(models / "reward").eval()
    for text, score in zip(TEXTS, found, strict=True):
        rendered = f"[user]What is 2 + 2?<eos>[assistant]{text}<eos>"
        ids = torch.tensor([tokenizer(rendered)["input_ids"]])
        with torch.inference_mode():
            assert score == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-4)


def test_best_of_n_by_a_reward_model(judge: Judge, models: Path) -> None:
    samples = [new_sample(text, i=i) for i, text in enumerate(TEXTS)]
    judged = judge(
        samples, {"reward_model": {"path": "reward", "batch_size": 2}}, {"best_of_n": "reward_model"}, base_dir=models
    )
    best = max(range(5), key=lambda i: judged[i].sample.scores["reward_model"])
    assert [i for i, one in enumerate(judged) if one.kept] == [best]


def test_outputs_of_a_reward_model(judge: Judge, models: Path) -> None:
    raw = scores(judge, models, {"reward_model": "reward"})
    squashed = scores(judge, models, {"reward_model": {"path": "reward", "output": "sigmoid"}})
    assert squashed == pytest.approx([1 / (1 + math.exp(-(s or 0))) for s in raw], abs=1e-5)
    first = scores(judge, models, {"reward_model": {"path": "two_labels", "label": 0}})
    second = scores(judge, models, {"reward_model": {"path": "two_labels", "label": 1}})
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx([1.0] * 5, abs=1e-5)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="the model has 2 labels, expected `label`"):
        scores(judge, models, {"reward_model": "two_labels"})
    with pytest.raises(ConfigError, match="argument `label` is 5"):
        scores(judge, models, {"reward_model": {"path": "two_labels", "label": 5}})


def test_a_long_conversation_loses_its_beginning_and_says_so(judge: Judge, models: Path) -> None:
    judged = judge([new_sample("x" * 400), new_sample("x", i=1)], {"reward_model": "reward"}, base_dir=models)
    assert [one.says[0].extra for one in judged] == [{"truncated": True}, {}]


def test_perplexity_is_that_of_the_completion_given_the_prompt(judge: Judge, models: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = scores(judge, models, {"perplexity": "causal"}, ["It is four.", "4", ""])
    tokenizer = AutoTokenizer.from_pretrained(models / "causal")
    model = AutoModelForCausalLM.from_pretrained(models / "causal").eval()
    for text, score in zip(["It is four.", "4"], found, strict=False):
        before = tokenizer("[user]What is 2 + 2?<eos>[assistant]")["input_ids"]
        said = tokenizer(text)["input_ids"]
        ids = torch.tensor([before + said])
        labels = torch.tensor([[-100] * len(before) + said])
        with torch.inference_mode():
            assert score == pytest.approx(math.exp(float(model(ids, labels=labels).loss)), rel=1e-4)
    assert found[2] is None
    alone = scores(judge, models, {"perplexity": {"path": "causal", "given_prompt": False}}, ["It is four."])
    assert alone[0] != found[0]
    assert scores(judge, models, {"perplexity": {"path": "causal", "max_length": 8}}, ["x" * 20, "abc"])[0] is None


def test_embedding_similarity(judge: Judge, models: Path) -> None:
    found = scores(judge, models, {"embedding_similarity": "encoder"}, ["four", "something else"], answer="four")
    assert found[0] == pytest.approx(1.0, abs=1e-5) and (found[1] or 1) < 0.9999
    to_prompt = {"embedding_similarity": {"path": "encoder", "to": "prompt"}}
    assert scores(judge, models, to_prompt, ["What is 2 + 2?"])[0] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(DataError, match="has no `note` to compare with"):
        scores(judge, models, {"embedding_similarity": {"path": "encoder", "to": "note"}}, ["x"])


def test_a_missing_model_is_told_before_or_when_it_loads(judge: Judge, models: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file ./gone"):
        resolve_filters(make_entries({"reward_model": "./gone"}), base_dir=models)
    (models / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="no weights in the model's folder"):
        scores(judge, models, {"reward_model": "empty"}, ["x"])


def test_models_wait_for_the_accelerator_and_leave_it(models: Path) -> None:
    filters = resolve_filters(
        make_entries("nonempty", {"reward_model": "reward"}, {"top_k": "reward_model"}), base_dir=models
    )
    with FilterChain(filters, seed=0, round_index=1) as chain:
        assert chain.needs_device
        shard = chain.open_shard()
        samples = [new_sample(text, i=i) for i, text in enumerate(TEXTS)]
        for sample in samples:
            shard.submit(sample)
        [(_, _, instance)] = [call for call in chain.runtime._calls.values() if call[0].name == "reward_model"]
        assert instance._scorer._model is None
        judged = shard.finish(samples)
        assert sum(one.kept for one in judged) == 1
    on_cpu = resolve_filters(
        make_entries({"use": "reward_model", "args": {"path": "reward"}, "device": "cpu"}), base_dir=models
    )
    with FilterChain(on_cpu, seed=0, round_index=1) as chain:
        assert not chain.needs_device


def test_scores_do_not_depend_on_the_batch(judge: Judge, models: Path) -> None:
    by_one = scores(judge, models, {"reward_model": {"path": "reward", "batch_size": 1}})
    by_four = scores(judge, models, {"reward_model": {"path": "reward", "batch_size": 4}})
    assert by_one == pytest.approx(by_four, abs=1e-4)
    alone = scores(judge, models, {"embedding_similarity": {"path": "encoder", "batch_size": 1}}, answer="four")
    together = scores(judge, models, {"embedding_similarity": {"path": "encoder", "batch_size": 8}}, answer="four")
    assert alone == pytest.approx(together, abs=1e-5)
    alone = scores(judge, models, {"perplexity": {"path": "causal", "batch_size": 1}})
    assert alone == pytest.approx(scores(judge, models, {"perplexity": {"path": "causal", "batch_size": 8}}), rel=1e-4)


def test_chat_prompts_are_shown_as_they_are(judge: Judge, models: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 2 + 2?"}]
    samples = [replace(new_sample("4"), prompt=chat), new_sample("4", i=1)]
    found = [one.says[0].score for one in judge(samples, {"reward_model": "reward"}, base_dir=models)]
    assert found[0] != found[1]
