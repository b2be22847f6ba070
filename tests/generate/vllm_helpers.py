"""An engine over stand-in servers, and what its samples must be."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import EOS, VOCAB, completion_of, logprob

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.generate import open_engine
from iterative_sft_cli.generate.vllm import VllmEngine
from iterative_sft_cli.types import Completion, Decoding, Request

DECODING = Decoding(max_new_tokens=6, eos_token_ids=(EOS,), keep_logprobs=True)


class Unigram(torch.nn.Module):
    """The fake server's model."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        logits = self.w * (torch.arange(VOCAB) % 7).float()
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))


def open_vllm(loaded: Any, tmp_path: Path, engines: list[VllmEngine], **settings: Any) -> VllmEngine:
    keys = {k: settings.pop(k) for k in ("timeout_s", "startup_timeout_s") if k in settings}
    section = GenerateConfig(engine="vllm", vllm=settings, **{"timeout_s": 20.0, "startup_timeout_s": 20.0, **keys})
    encoder = SimpleNamespace(vocab_size=VOCAB)
    run = tmp_path / "run"
    engine = open_engine(section, loaded=loaded, encoder=encoder, base_dir=tmp_path, run_dir=run, seed=0)
    assert isinstance(engine, VllmEngine)
    engines.append(engine)
    return engine


def fake_python(tmp_path: Path, fault: str = "", *, only_first: bool = False) -> str:
    """An "interpreter" that runs the stand-in whatever module it is asked for, with `only_first` the first start alone with the fault."""
    script = tmp_path / "fake-python"
    fake = Path(__file__).with_name("fake_vllm.py")
    claim = f'mkdir "{tmp_path}/claimed" 2>/dev/null && ' if only_first else ""
    more = f'{claim}set -- "$@" --fault {fault}\n' if fault else ""
    script.write_text(f'#!/bin/sh\nshift 2\n{more}exec {sys.executable} {fake} "$@"\n')
    script.chmod(0o755)
    return str(script)


def run_all(engine: VllmEngine, requests: list[Request], decoding: Decoding = DECODING) -> list[Completion]:
    completions = list(engine.generate(requests, decoding, engine.plan(requests, decoding)))
    keys = [(c.prompt_id, c.sample_index) for c in completions]
    assert sorted(keys) == sorted((r.prompt_id, k) for r in requests for k in r.sample_indices)
    return completions


def check(completions: list[Completion], requests: list[Request], weight: float = 0.1) -> None:
    by_key = {(c.prompt_id, c.sample_index): c for c in completions}
    for request in requests:
        for index, seed in zip(request.sample_indices, request.seeds, strict=True):
            got = by_key[request.prompt_id, index]
            ids, reason = completion_of(list(request.prompt_ids), seed, DECODING.max_new_tokens)
            assert got.token_ids == tuple(ids)
            assert got.finish_reason == ("eos" if reason == "stop" else "length")
            assert got.token_logprobs == pytest.approx([logprob(weight, t) for t in ids])
            assert got.logprob == pytest.approx(sum(got.token_logprobs or ()))


def server_of(engine: VllmEngine, number: int = 0) -> Any:
    """The process of one of the servers that isft started on this host."""
    servers: Any = engine.servers
    return servers.hosts[0].slots[number].server
