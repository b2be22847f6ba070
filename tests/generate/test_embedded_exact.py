"""What the embedded engine generates is what the model says: token by token against `generate`, and as a distribution."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny
import torch
from helpers_generate import engine_of, requests_of, run

from iterative_sft_cli.generate.embedded_lean import LeanDecoder
from iterative_sft_cli.generate.embedded_module import ModuleDecoder
from iterative_sft_cli.generate.embedded_probe import rows_of
from iterative_sft_cli.generate.embedded_prompts import common_prefix
from iterative_sft_cli.types import EOS, LENGTH, Decoding, Request, derive_seed


def sharper(model: Any, factor: float = 6.0) -> Any:
    """A tiny random model hardly looks at its context; larger weights give it opinions, so that mistakes show."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and id(parameter) not in embeddings:
                parameter.mul_(factor)
    return model


def tiny_qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tiny._seeded(Qwen3ForCausalLM, config, 1)


def tiny_qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = tiny._seeded(Qwen2ForCausalLM, config, 1)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


def tiny_gptneox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, hidden_dropout=0.0, attention_dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tiny._seeded(GPTNeoXForCausalLM, config, 1)


def tiny_mistral_window() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tiny._seeded(MistralForCausalLM, config, 1)


def tiny_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0, eos_token_id=2
    )
    return tiny._seeded(MambaForCausalLM, config, 1)


MODELS = {
    "llama": (tiny.tiny_llama, LeanDecoder),
    "llama_untied": (lambda: tiny.tiny_llama(tied=False), LeanDecoder),
    "llama_plain_heads": (lambda: tiny.tiny_llama(num_key_value_heads=4), LeanDecoder),
    "qwen2": (tiny_qwen2, LeanDecoder),
    "qwen3": (tiny_qwen3, LeanDecoder),
    "gpt2": (tiny.tiny_gpt2, ModuleDecoder),
    "gpt_neox": (tiny_gptneox, ModuleDecoder),
    "mistral_window": (tiny_mistral_window, type(None)),
    "mamba": (tiny_mamba, type(None)),
    "t5": (tiny.tiny_t5, type(None)),
}


def by_generate(model: Any, request: Request, num_tokens: int, **settings: Any) -> list[int]:
    """Greedy tokens of transformers' own `generate`, for one prompt alone."""
    ids = torch.tensor([request.prompt_ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=settings.pop("eos_token_id", None),
        pad_token_id=0,
        **settings,
    )[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[len(request.prompt_ids) :]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_generate_token_by_token(name: str, penalty: float) -> None:
    make, kind = MODELS[name]
    model = sharper(make())
    engine = engine_of(model)
    assert type(engine._decoder) is kind
    requests = requests_of([1, 4, 4, 9, 17, 30], samples=2)
    decoding = Decoding(do_sample=False, max_new_tokens=70, repetition_penalty=penalty)
    got = run(engine, requests, decoding, max_rows=7, admit_rows=2, prefill_tokens=40)
    for request in requests:
        expected = by_generate(model, request, 70, repetition_penalty=penalty)
        for k in request.sample_indices:
            assert list(got[request.prompt_id, k].token_ids) == expected
            assert got[request.prompt_id, k].finish_reason == LENGTH
    assert len({token for completion in got.values() for token in completion.token_ids}) > 3


def test_layers_without_rotary_embedding_stay_without_it_where_the_probe_is_blind() -> None:
    """A model that was trained on few tokens only: the probe asks others, of which it knows nothing."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, no_rope_layers=[0, 0], use_sliding_window=False,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = sharper(tiny._seeded(SmolLM3ForCausalLM, config, 1))
    asked = {token for row in rows_of(tiny.VOCAB_SIZE) for token in row}
    known = [token for token in range(3, tiny.VOCAB_SIZE) if token not in asked]
    with torch.no_grad():
        model.model.embed_tokens.weight[sorted(asked)] = 0
    engine = engine_of(model)
    assert type(engine._decoder) is ModuleDecoder
    request = Request("p", "", tuple(known[:12]), (0,), (1,))
    got = run(engine, [request], Decoding(do_sample=False, max_new_tokens=20))
    assert list(got["p", 0].token_ids) == by_generate(model, request, 20)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_rows_end_at_eos_and_others_go_on(name: str) -> None:
    model = sharper(MODELS[name][0]())
    engine = engine_of(model)
    requests = requests_of(range(3, 15))
    free = run(engine, requests, Decoding(do_sample=False, max_new_tokens=40))
    eos = free["p0", 0].token_ids[5], free["p7", 0].token_ids[20]
    decoding = Decoding(do_sample=False, max_new_tokens=40, eos_token_ids=eos)
    got = run(engine, requests, decoding, max_rows=5, admit_rows=1)
    assert {c.finish_reason for c in got.values()} == {EOS, LENGTH} or name != "llama"
    for request in requests:
        expected = by_generate(model, request, 40, eos_token_id=list(eos))
        completion = got[request.prompt_id, 0]
        assert list(completion.token_ids) == expected
        assert (completion.finish_reason == EOS) == (expected[-1] in eos)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "t5"])
def test_samples_do_not_depend_on_their_neighbours(name: str) -> None:
    engine = engine_of(sharper(MODELS[name][0](), 3.0))
    requests = requests_of([5, 3, 12, 7, 5, 9], samples=4)
    decoding = Decoding(max_new_tokens=45, eos_token_ids=(9, 30, 77), keep_logprobs=True)
    wide = run(engine, requests, decoding, max_rows=24, admit_rows=1)
    narrow = run(engine, requests, decoding, max_rows=5, admit_rows=2)
    few = run(engine, requests[3:4], decoding)
    for key, completion in wide.items():
        assert completion.token_ids == narrow[key].token_ids
        assert completion.logprob == pytest.approx(narrow[key].logprob, abs=1e-3)
    assert all(few[key].token_ids == wide[key].token_ids for key in few)
    assert len({c.token_ids for c in wide.values()}) == len(wide)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_second_tokens_follow_the_models_distribution(name: str) -> None:
    model = sharper(MODELS[name][0](), 2.0)
    engine = engine_of(model)
    first, samples = 17, 6000
    base = requests_of([6])[0]
    seeds = tuple(derive_seed("chi", k) for k in range(samples))
    request = Request("p0", "", base.prompt_ids, tuple(range(samples)), seeds)
    got = run(engine, [request], Decoding(max_new_tokens=2, temperature=0.8), max_rows=512)
    ids = torch.tensor([[*base.prompt_ids, first]])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=ids[:, :-1], decoder_input_ids=torch.tensor([[0, first]])).logits
        else:
            logits = model(ids).logits
    tokens = torch.tensor([c.token_ids for c in got.values()])
    seconds = tokens[tokens[:, 0] == first][:, 1]
    firsts = torch.softmax(logits[0, -2].float() / 0.8, -1)
    counts = torch.bincount(tokens[:, 0], minlength=len(firsts)).double()
    expected = firsts.double() * samples
    busy = expected > 8
    chi2 = float((((counts - expected) ** 2 / expected)[busy]).sum())
    df = int(busy.sum())
    assert chi2 < df + 5 * math.sqrt(2 * df)
    assert bool((torch.softmax(logits[0, -1].float() / 0.8, -1)[seconds] > 0).all())


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_the_models(name: str) -> None:
    model = sharper(MODELS[name][0]())
    request = requests_of([8], samples=3)[0]
    got = run(engine_of(model), [request], Decoding(max_new_tokens=40, temperature=0.7, top_k=50, keep_logprobs=True))
    for completion in got.values():
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.tensor([[0, *completion.token_ids[:-1]]])
                logits = model(input_ids=torch.tensor([request.prompt_ids]), decoder_input_ids=start).logits[0]
            else:
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        chosen = logits.float().log_softmax(-1).gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1)
        assert completion.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-3)
        assert completion.logprob == pytest.approx(float(chosen.sum()), abs=1e-2)


def test_the_same_plan_gives_the_same_bytes_in_bfloat16() -> None:
    model = sharper(tiny.tiny_llama(), 3.0)
    requests = requests_of([5, 3, 12, 7, 5, 9] * 2, samples=3)
    decoding = Decoding(max_new_tokens=40, eos_token_ids=(9, 30, 77))
    first = run(engine_of(model, dtype=torch.bfloat16), requests, decoding, max_rows=9)
    again = run(engine_of(copy.deepcopy(model), dtype=torch.bfloat16), requests, decoding, max_rows=9)
    assert first == again


def test_one_row_more_than_memory_allows_is_sent_back_and_resumes_exactly() -> None:
    model = sharper(tiny.tiny_llama())
    engine = engine_of(model)
    requests = requests_of([9, 6, 14, 3], samples=4)
    decoding = Decoding(max_new_tokens=100, eos_token_ids=(9, 30))
    roomy = run(engine, requests, decoding)
    tight = run(engine, requests, decoding, max_rows=16, cache_tokens_per_row=60, admit_rows=1)
    assert {k: c.token_ids for k, c in tight.items()} == {k: c.token_ids for k, c in roomy.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral_window"])
def test_prompts_that_begin_alike(name: str) -> None:
    model = sharper(MODELS[name][0]())
    engine = engine_of(model)
    start = tuple(range(20, 32))
    requests = [
        Request(r.prompt_id, "", start + r.prompt_ids, r.sample_indices, r.seeds) for r in requests_of([1, 9, 4, 2, 4])
    ]
    requests.append(Request("start", "", start, (0,), (1,)))
    for some in (requests, requests[:5], requests[:1]):
        got = run(engine, some, Decoding(do_sample=False, max_new_tokens=50), max_rows=3, admit_rows=1)
        for request in some:
            assert list(got[request.prompt_id, 0].token_ids) == by_generate(model, request, 50)


def test_common_prefix() -> None:
    start = tuple(range(9))
    assert common_prefix([(*start, 3, 4), (*start, 3, 5), (*start, 9)]) == list(start)
    assert common_prefix([start, (*start, 4)]) == list(start[:8])
    assert common_prefix([start] * 2) == list(start[:8])
    assert common_prefix([start[:8]] * 2) == common_prefix([start]) == common_prefix([]) == []
