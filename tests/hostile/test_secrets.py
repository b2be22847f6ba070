"""Planted secrets reach neither the run directory, nor the screen, nor a worker: their bytes are looked for everywhere."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iterative_sft_cli.cli import run as isft

_spec = importlib.util.spec_from_file_location(
    "config_secrets", Path(__file__).parents[1] / "config" / "test_config_secrets.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(Path(__file__).parents[1] / "config"))
    _spec.loader.exec_module(_module)
TOKENS: dict[str, str] = _module.TOKENS

VARIABLES = [
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
    *("AZURE_OPENAI_API_KEY", "MISTRAL_API_KEY", "GROQ_API_KEY", "TOGETHER_API_KEY", "OPENROUTER_API_KEY"),
    *("COHERE_API_KEY", "DEEPSEEK_API_KEY", "FIREWORKS_API_KEY", "NVIDIA_API_KEY", "REPLICATE_API_TOKEN"),
    *("GEMINI_API_KEY", "GOOGLE_API_KEY", "XAI_API_KEY", "PERPLEXITY_API_KEY", "VOYAGE_API_KEY"),
    *("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "COMET_API_KEY", "NEPTUNE_API_TOKEN"),
    *("TRACKIO_TOKEN", "CLEARML_API_SECRET_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN", "CI_JOB_TOKEN", "BITBUCKET_APP_PASSWORD"),
    *("SLACK_BOT_TOKEN", "DISCORD_TOKEN", "TELEGRAM_BOT_TOKEN", "TWILIO_AUTH_TOKEN", "SENDGRID_API_KEY"),
    *("KAGGLE_KEY", "PGPASSWORD", "MYSQL_PWD_PASSWORD", "REDIS_PASSWORD", "DB_PASSWORD", "VAULT_TOKEN"),
    *("NPM_TOKEN", "PYPI_TOKEN", "TWINE_PASSWORD", "UV_PUBLISH_TOKEN", "DOCKER_PASSWORD", "SSH_PASSPHRASE"),
    *("KUBECONFIG_TOKEN", "SLURM_JWT_SECRET", "JUPYTER_TOKEN", "GRADER_KEY", "JUDGE_SECRET", "SESSION_COOKIE"),
    *("LD_API_KEY", "SENTRY_AUTH_TOKEN"),
]
ADDRESSES = [
    *("DATABASE_URL", "REDIS_URL", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("PIP_INDEX_URL", "UV_INDEX_URL", "HF_ENDPOINT", "MLFLOW_TRACKING_URI", "SENTRY_DSN", "AMQP_URL"),
]


def planted() -> dict[str, str]:
    """A value of its own for every variable."""
    values = {name: f"Planted-{i:03d}-value-of-a-secret" for i, name in enumerate(VARIABLES)}
    return values | {
        name: f"https://user:Planted-{i:03d}-in-an-address@example.invalid/x" for i, name in enumerate(ADDRESSES, 500)
    }


def traces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes() + str(path).encode("utf-8", "surrogateescape")


def found_in(data: bytes, secrets: dict[str, str]) -> list[str]:
    return [name for name, value in secrets.items() if value.encode() in data or value[-24:].encode() in data]


def test_there_are_more_than_two_hundred() -> None:
    assert len(TOKENS) * 7 + len(VARIABLES) + len(ADDRESSES) + len(WAYS) * (len(TOKENS) + 1) > 400


# --- environment ----------------------------------------------------------------------------------------------------------

SPY = """
import json, os, sys
from iterative_sft_cli.types import Verdict

def dump(place, name):
    with open(f"{place}/{name}-{os.getpid()}.json", "w") as file:
        json.dump({"environment": dict(os.environ), "argv": sys.argv, "orig": sys.orig_argv}, file)

class Spy:
    def __init__(self, place: str):
        self.place = place
        dump(place, "init")
    def setup(self):
        dump(self.place, "setup")
    def __call__(self, sample):
        dump(self.place, "call")
        print("spying")
        return Verdict(True, extra={"names": sorted(os.environ)})

def once(samples, place: str):
    dump(place, "once")
    return [True] * len(samples)
"""


def test_secrets_of_the_environment_stay_there(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = planted()
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    spied = tmp_path / "spied"
    spied.mkdir()
    (tmp_path / "spy.py").write_text(SPY)
    filters: list[Any] = [
        "finished",
        "numeric_answer",
        {"use": "spy.py:Spy", "args": {"place": str(spied)}, "workers": 1},
        {"use": "spy.py:once", "args": {"place": str(spied)}, "workers": 1, "env": ["GRADER_KEY"]},
    ]
    assert isft(["train", str(toy(rounds=1, filters=filters))]) == 0
    run = tmp_path / "run"
    for argv in (["show", run], ["samples", run], ["report", run], ["env"], ["export", run, "--to", "sft-jsonl"]):
        assert isft([str(one) for one in argv]) == 0
    assert isft(["plan", str(tmp_path / "toy.yaml")]) in (0, 2)
    out, err = capfd.readouterr()
    assert not found_in((out + err).encode(), secrets)
    for name, data in traces(run):
        assert not found_in(data, secrets), name
    dumps = {path.name.split("-")[0]: json.loads(path.read_text()) for path in spied.iterdir()}
    assert dumps.keys() == {"init", "setup", "call", "once"}
    for name, data in traces(spied):
        expected = ["GRADER_KEY"] if "/once-" in name else []
        assert found_in(data, secrets) == expected, name


def test_model_written_code_sees_no_environment(judge_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = planted()
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    from filter_samples import new_sample

    code = "import os\ndef look():\n    return repr(sorted(os.environ.items()))\n"
    entry = {"use": "code_tests", "args": {"sandbox": "cpython", "min_passed": 0.01}, "workers": 1}
    said = judge_([new_sample(code, ["assert 'Planted' not in look()"])], entry)[0].says[0]
    assert said.keep, said
    assert not found_in(repr(said).encode(), secrets)


@pytest.fixture
def judge_(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run filters over samples, as tests/filters does."""
    pytest.importorskip("pydantic_monty")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "filters"))
    from filter_samples import make_entries

    from iterative_sft_cli.filters import FilterChain, resolve_filters

    def run(samples: list[Any], *forms: Any) -> Any:
        with FilterChain(resolve_filters(make_entries(*forms), base_dir=tmp_path), seed=0, round_index=1) as chain:
            return chain.open_shard().finish(samples)

    return run


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENS)
def test_a_secret_in_a_config_stops_every_command_before_anything_is_written(
    name: str, toy: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy(rounds=1, guards={"stop_if": TOKENS[name]})
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in ("validate", "plan", "train", "doctor", "fetch"):
        assert isft([command, str(config)]) == 2
    assert isft(["train", str(toy(rounds=1)), f"prompts.system={TOKENS[name]}"]) == 2
    out, err = capfd.readouterr()
    assert TOKENS[name] not in out + err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- tracebacks, output and answers -------------------------------------------------------------------------------------

LEAKY = """
import os, sys
from iterative_sft_cli.types import Verdict

TEXT = open(TEXT_FILE).read()

def key():
    return TEXT + os.environ.get("GRADER_KEY", "")

def raises(sample):
    raise RuntimeError("401 for " + key())

def raises_from(sample):
    try:
        raise KeyError(key())
    except KeyError as error:
        raise ValueError(f"headers were {{'Authorization': 'Bearer {key()}'}}") from error

def prints_and_raises(sample):
    print(key()); print(key(), file=sys.stderr)
    raise ValueError("see above")

def prints_and_exits(sample):
    print(key(), flush=True)
    os._exit(3)

def exits(sample):
    raise SystemExit(key())

def asserts(sample):
    assert False, key()

def returns(sample):
    return key()

def names_itself(sample):
    raise type("E" + "x", (Exception,), {"__str__": lambda self: key()})()

def in_process(sample):
    raise RuntimeError(key())
in_process.in_process = True

class SetUp:
    def setup(self):
        raise OSError("cannot log in: " + key())
    def __call__(self, sample):
        return True

def grouped(group):
    raise RuntimeError(key())

def whole(samples):
    raise RuntimeError(key())
"""
IMPORTING = "import os\nTEXT = open(TEXT_FILE).read()\nraise RuntimeError(TEXT + os.environ.get('GRADER_KEY', ''))\n"
WAYS: dict[str, Any] = {
    **{name: {} for name in ("raises", "raises_from", "prints_and_raises", "prints_and_exits", "exits", "asserts")},
    **{name: {} for name in ("returns", "names_itself", "in_process", "SetUp", "grouped", "whole")},
    "dropped": {"use": "leaky.py:raises", "on_error": "drop"},
    "retried": {"use": "leaky.py:raises", "on_error": "retry"},
    "importing": {"use": "importing.py:anything"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_plugin_says_when_it_fails_is_told_without_secrets(
    way: str,
    toy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secrets = {**TOKENS, "GRADER_KEY": "Planted-value-of-the-grader"}
    monkeypatch.setenv("GRADER_KEY", secrets["GRADER_KEY"])
    (tmp_path / "text").write_text("\n".join(TOKENS.values()) + "\n")
    for name, code in (("leaky.py", LEAKY), ("importing.py", IMPORTING)):
        (tmp_path / name).write_text(code.replace("TEXT_FILE", repr(str(tmp_path / "text"))))
    entry = {"use": f"leaky.py:{way}", "env": ["GRADER_KEY"], "workers": 1, "name": "leaky", **WAYS[way]}
    code = isft(["train", str(toy(rounds=1, eval=None, filters=["finished", entry], prompts={"limit": 2}))])
    out, err = capfd.readouterr()
    assert code == (3 if way == "dropped" else 5), err
    assert not found_in((out + err).encode(), secrets), err
    for name, data in traces(tmp_path / "run"):
        assert not found_in(data, secrets), name
    if way not in ("returns", "importing", "dropped"):
        assert "<" in err or "[hidden]" in err
    # tried without a model, it says as little
    isft(["filters", "test", f"{tmp_path}/{entry['use']}", str(samples_file(tmp_path))])
    out, err = capfd.readouterr()
    assert not found_in((out + err).encode(), TOKENS)


def samples_file(folder: Path) -> Path:
    path = folder / "samples.jsonl"
    path.write_text('{"completion": "a", "prompt_id": "p"}\n')
    return path


class Echo:
    """A server that repeats the headers it was sent, with the status and in the place that are asked for."""

    def __init__(self) -> None:
        self.status, self.inside = 200, False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                key = str(self.headers.get("Authorization"))
                said = json.dumps({"reason": f"sent {key}", "score": 5}) if server.inside else f"no JSON: {key}"
                message = {"role": "assistant", "content": said}
                body: Any = {"error": {"message": f"invalid key {key}"}}
                if server.status == 200:
                    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
                raw = json.dumps(body).encode()
                self.send_response(server.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("X-Echo", key)
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def echo() -> Iterator[Echo]:
    one = Echo()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.mark.parametrize(("status", "inside"), [(401, False), (403, False), (500, False), (200, False), (200, True)])
@pytest.mark.parametrize("key", ["sk-plain-key-without-a-shape", "short", *list(TOKENS.values())[:3]])
def test_a_judge_that_repeats_its_key(
    status: int,
    inside: bool,
    key: str,
    echo: Echo,
    toy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    echo.status, echo.inside = status, inside
    monkeypatch.setenv("THE_GRADER", key)
    args = {"base_url": echo.url, "model": "m", "api_key_env": "THE_GRADER", "retry_s": 0.1}
    filters = ["finished", {"use": "judge", "args": args, "workers": 1}, {"threshold": {"by": "judge", "min": 1}}]
    code = isft(["train", str(toy(rounds=1, eval=None, filters=filters, prompts={"limit": 1}))])
    assert code == (0 if inside else 5 if status == 200 else 4)
    out, err = capfd.readouterr()
    assert key not in out + err
    for name, data in traces(tmp_path / "run"):
        assert key.encode() not in data, name


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_an_engines_server_that_repeats_its_key(status: int, echo: Echo) -> None:
    from iterative_sft_cli.generate.http_client import ServerError, request_json, stream_json

    echo.status = status
    headers = {"Authorization": "Bearer Planted-key-of-the-teacher"}
    for ask in (
        lambda: request_json("POST", f"{echo.url}/completions", {}, headers=headers),
        lambda: list(stream_json(f"{echo.url}/completions", {}, headers=headers)),
    ):
        with pytest.raises(ServerError) as caught:
            ask()
        assert "Planted" not in str(caught.value) and "invalid key Bearer [hidden]" in str(caught.value)


def test_a_bug_of_ours_is_told_without_secrets(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {**planted(), **TOKENS}
    for name, value in planted().items():
        monkeypatch.setenv(name, value)
    said = "\x1b]0;owned\x07 [/bold] " + " ".join(secrets.values())

    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError(said)

    monkeypatch.setattr("iterative_sft_cli.loop.judge_round", broken)
    assert isft(["train", str(toy(rounds=1, eval=None))]) == 1
    out, err = capfd.readouterr()
    assert "Traceback" in err and "this is a bug in isft" in err and "\x1b" not in err
    assert not found_in((out + err).encode(), secrets)
    for name, data in traces(tmp_path / "run"):
        assert not found_in(data, secrets), name
