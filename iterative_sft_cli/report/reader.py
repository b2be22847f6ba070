"""`Run.open(path)`: everything a run directory holds, for readers; it takes no lock and changes nothing, also while the run goes on.

from iterative_sft_cli import Run

run = Run.open("runs/quickstart")
run.stats[-1]["eval/pass@1"]                  # figures of the last round
frame = run.samples(as_="pandas")             # or a datasets.Dataset, the default
frame.groupby("round")["accepted"].mean()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.guards import best_round
from iterative_sft_cli.report.columns import columns_of
from iterative_sft_cli.rundir import RunView, peek
from iterative_sft_cli.samples import StoredSample, iter_round, sample_shards

if TYPE_CHECKING:
    from iterative_sft_cli.config import Config


class Run:
    """A run directory as a reader sees it."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self.path = view.path

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run at `path`. Raises DataError when there is none."""
        view = peek(path)
        if view is None:
            raise DataError("there is no run here", where=str(path), expected="a folder that `isft train` made")
        return cls(view)

    @property
    def config(self) -> dict[str, Any]:
        """The config with its defaults, as plain data."""
        return self.view.resolved

    @cached_property
    def settings(self) -> Config:
        """The config as an object. Raises DataError when this version of isft cannot read it."""
        from iterative_sft_cli.config import Config  # a page of samples needs none of it, and is there sooner

        try:
            return Config.model_validate(self.view.resolved)
        except ValueError as error:
            raise DataError(
                "the stored config is not one that this version of isft knows",
                where=str(self.path / "resolved.yaml"),
                hint="use the version of isft that made the run; environment.json names it",
            ) from error

    @property
    def base_dir(self) -> Path:
        """The folder that the paths in the config are relative to: the config file's, or where this is called when that is gone."""
        written_in = Path(str(self.view.environment.get("config_dir", "")))
        return written_in if written_in.is_dir() else Path.cwd()

    @property
    def stats(self) -> list[dict[str, Any]]:
        """One row a round, oldest first."""
        return self.view.stats_rows()

    @property
    def rounds(self) -> list[int]:
        """The rounds whose samples are there, oldest first; `samples.keep` may have dropped some."""
        return [index for index in self.view.rounds if sample_shards(self.view.shards, index)]

    @property
    def metric(self) -> str:
        """The key of the figure that defines `best`, such as `eval/pass@1`."""
        return f"eval/{self.settings.eval.metric if self.settings.eval is not None else 'pass@1'}"

    @property
    def best_round(self) -> int | None:
        """The round whose evaluation is best, 0 for the starting model; None without evaluations."""
        return best_round(self.stats, self.metric)

    @property
    def model_name(self) -> str:
        """What the config names as the model."""
        model = self.settings.model
        return str(model.path or model.use or (model.init or {}).get("model_type", "a fresh model"))

    def samples(
        self,
        rounds: Sequence[int] | None = None,
        *,
        accepted: bool | None = None,
        as_: Literal["dataset", "pandas"] = "dataset",
    ) -> Any:
        """The judged samples as a `datasets.Dataset` or a `pandas.DataFrame`, a row each; `columns.py` names the columns.

        `rounds` and `accepted` narrow them down; what is asked for is in memory. `iter_samples` reads any number one by one.
        """
        wanted = (one for one in self.iter_samples(rounds) if accepted is None or one.accepted == accepted)
        columns = columns_of(wanted)
        if as_ == "pandas":
            return import_module("pandas").DataFrame(columns)
        if as_ != "dataset":
            raise ValueError(f"as_ is {as_!r}, expected 'dataset' or 'pandas'")
        import datasets

        return datasets.Dataset.from_dict(columns)

    def iter_samples(self, rounds: Sequence[int] | None = None) -> Iterator[StoredSample]:
        """The judged samples of the given rounds (all by default), one shard in memory at a time."""
        for round_index in self.rounds if rounds is None else rounds:
            yield from iter_round(self.view.shards, round_index)
