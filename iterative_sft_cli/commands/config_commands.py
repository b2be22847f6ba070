"""`isft validate`, `plan`, `schema` and `env`: what can be said of a config and of this machine without a model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from iterative_sft_cli import __version__
from iterative_sft_cli.app import AsJson, Config, Overrides, app, echo, print_json


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Iterative supervised fine-tuning: generate, filter, train, repeat, from one YAML file."""
    if version:
        print(f"isft {__version__}")
        raise typer.Exit(0)


@app.command()
def validate(
    config: Config,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the whole config with its defaults.")] = False,
    as_json: AsJson = False,
) -> int:
    """Check CONFIG: every error at once with its line, plug-ins resolved, no model loaded."""
    from iterative_sft_cli.config import InvalidConfig, load_config, resolved_yaml
    from iterative_sft_cli.errors import ConfigError
    from iterative_sft_cli.filters import check_filters

    try:
        loaded = load_config(config, list(overrides or []), checks=[check_filters])
    except ConfigError as error:
        if not as_json:
            raise
        details = [problem.to_tree() for problem in error.details] if isinstance(error, InvalidConfig) else []
        print_json({"valid": False, "problems": error.problems or [error.render()], "details": details})
        return error.exit_code
    if as_json:
        print_json({"valid": True, "warnings": loaded.warnings, **({"config": loaded.merged} if resolved else {})})
    elif resolved:
        echo(resolved_yaml(loaded.config))
    else:
        echo(f"{config}: valid")
        for warning in loaded.warnings:
            echo(f"warning: {warning}")
    return 0


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Add time, peak memory and disk, measured by a short run of two rounds.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan memory for so many processes, one a GPU.")] = None,
    gpu_gb: Annotated[
        float | None, typer.Option("--gpu-gb", help="Memory of each GPU; without it, this machine's.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Print what each round of CONFIG will do: weights, data, samples, steps, memory; nothing is run without --probe."""
    from iterative_sft_cli.config import load_config
    from iterative_sft_cli.plan import describe_plan, render_plan
    from iterative_sft_cli.plan_memory import check_memory

    loaded = load_config(config, list(overrides or []))
    described = describe_plan(loaded, gpus=gpus or 1, gpu_gb=gpu_gb)
    if gpus is not None or gpu_gb is not None:
        check_memory(described["memory"])
    if probe:
        from iterative_sft_cli.probe import estimate, render_probe, run_probe

        if not as_json:
            echo(render_plan(described))
        described["probe"] = estimate(loaded, described, run_probe(loaded))
        if not as_json:
            echo(render_probe(described["probe"]))
            return 0
    if as_json:
        print_json(described)
    else:
        echo(render_plan(described))
    return 0


@app.command()
def schema() -> int:
    """Print the JSON schema of the config, for editors."""
    from iterative_sft_cli.config import json_schema

    print_json(json_schema())
    return 0


@app.command()
def env(as_json: AsJson = False) -> int:
    """Print versions and hardware, ready to paste into a bug report; no names, no paths, no secrets."""
    facts = machine_facts()
    if as_json:
        print_json(facts)
    else:
        for key, value in facts.items():
            echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def machine_facts() -> dict[str, Any]:
    """What `isft env` prints."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    names = (
        "torch",
        "transformers",
        "datasets",
        "accelerate",
        "peft",
        "safetensors",
        "typer",
        "pydantic",
        "pyyaml",
        "rich",
    )
    extras = (
        "math-verify",
        "reasoning-gym",
        "rapidfuzz",
        "datasketch",
        "py3langid",
        "pydantic-monty",
        "bitsandbytes",
        "liger-kernel",
    )
    versions: dict[str, str] = {}
    for name in (*names, *extras):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            if name in names:
                versions[name] = "missing"
    facts: dict[str, Any] = {
        "isft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "versions": versions,
    }
    try:
        import torch

        facts["threads"] = torch.get_num_threads()
        facts["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except ImportError:
        facts["accelerators"] = []
    return facts


def processor_name() -> str:
    """The processor's model name and whether it computes bf16, where the system tells."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.split(":", 1) for line in lines[:40] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in found.items()}
    flags = fields.get("flags", "").split()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(bf16) or 'no bf16'})"
