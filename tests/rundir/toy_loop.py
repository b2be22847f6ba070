"""A whole experiment in miniature on the real run directory: deterministic, a few milliseconds a run, standard library only.

It keeps to the rules of the real loop: shards before use, a save inside each round, train, checkpoint, eval, stats row.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError, IsftError
from iterative_sft_cli.rundir import RunDir, peek

ROUNDS, SHARDS, STEPS, SAVE_AFTER = 3, 2, 4, 2
BASE = b"\0" * 32
NOT_COMPARED = {"LOCK", "telemetry.jsonl", "quarantine", "isft-run.json", "outcome.json", "spare"}


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=bytes.hex).encode()).hexdigest()


def train(path: Path, rounds: int = ROUNDS, keep: int = 2) -> RunDir | None:
    """Begin, go on or find finished; the closed run directory, or None when there was nothing to do."""
    view = peek(path)
    if view is not None and view.finished and view.resolved["rounds"] == rounds:
        return None
    if view is None:
        run = RunDir.create(
            path, config_source=b"toy: 1\n", resolved={"rounds": rounds}, environment={"python": "3"}, run_id="toy"
        )
    else:
        run = RunDir.open(path)
    with run:
        if run.resolved != {"rounds": rounds}:
            run.write_config(b"toy: 1\n", {"rounds": rounds})
        Toy(run, rounds, keep).go()
        run.outcome(0, "complete", "isft show")
    return run


class Toy:
    def __init__(self, run: RunDir, rounds: int, keep: int) -> None:
        self.run, self.rounds = run, rounds
        run.checkpoints.retain(keep)
        self.weights, self.done, self.step = BASE, -1, 0
        newest = run.checkpoints.newest()
        if newest is not None:
            self.weights = (newest.path / "state" / "masters.safetensors").read_bytes()
            self.done, self.step = newest.state["done"], newest.state["step"]

    def go(self) -> None:
        # a save inside a round comes after the eval of the round before
        for r in range(max(self.done, 0) if self.step == 0 else self.done + 1, self.rounds + 1):
            if r > self.done and r > 0:
                self.learn(r)
            self.evaluate(r)

    def learn(self, r: int) -> None:
        if self.step == 0:
            self.run.ledger.append({"event": "start", "round": r, "weights": self.weights.hex()})
        pool = [self.accepted(e, k, fresh=e == r) for e in range(1, r + 1) for k in range(SHARDS)]
        if self.run.shards.read(r, "train") is None:
            self.run.shards.seal(r, "train", [{"ids": [row["id"] for part in pool for row in part]}], {"n": len(pool)})
        while self.step < STEPS:
            self.weights = bytes.fromhex(digest(self.weights, pool, r, self.step))
            self.step += 1
            self.run.ledger.append({"event": "step", "round": r, "step": self.step, "loss": self.weights[0] / 7})
            if self.step == SAVE_AFTER:
                self.save(f"{r:04d}-{self.step:06d}", r - 1)
        self.run.ledger.append({"event": "trained", "round": r})
        self.step = 0
        self.save(f"{r:04d}", r)
        self.done = r

    def accepted(self, r: int, k: int, *, fresh: bool) -> list[dict[str, Any]]:
        made = self.run.shards.read(r, f"generated-{k:05d}")
        if made is None:
            start = self.round_start(r)
            rows = [{"id": f"{r}-{k}-{i}", "text": f"é\u2028{digest(start, r, k, i)}"} for i in range(4)]
            meta = {"weights": start.hex(), "plan": {"max_rows": 4}}
            self.run.shards.seal(r, f"generated-{k:05d}", rows, meta)
            made = rows, meta
        judged = self.run.shards.read(r, f"verdicts-{k:05d}")
        if judged is None:
            says = [{"id": row["id"], "keep": int(row["text"][-1], 16) < 8} for row in made[0]]
            self.run.shards.seal(r, f"verdicts-{k:05d}", says, {})
            judged = says, {}
        kept = {row["id"] for row in judged[0] if row["keep"]}
        return [row for row in made[0] if row["id"] in kept]

    def round_start(self, r: int) -> bytes:
        """The weights that generated round `r`: those at hand, else those of the checkpoint before it."""
        if r == self.done + 1 and self.step == 0:
            return self.weights
        if r == 1:
            return BASE
        found = self.run.checkpoints.verified(f"{r - 1:04d}")
        if found is None:
            raise DataError(f"a shard of round {r} is damaged and the weights that made it are gone", where="rounds")
        return (found.path / "model.safetensors").read_bytes()

    def save(self, key: str, done: int) -> None:
        def write(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(self.weights)
            (folder / "state").mkdir()
            (folder / "state" / "masters.safetensors").write_bytes(self.weights)

        # the next seal or commit waits for it, so the order of operations stays the same in every run
        self.run.checkpoints.commit_async(key, write, {"done": done, "step": self.step})
        self.run.checkpoints.wait()

    def evaluate(self, r: int) -> None:
        if self.run.shards.read(r, "eval-00000") is None:
            self.run.shards.seal(r, "eval-00000", [{"score": self.weights[1]}], {"weights": self.weights.hex()})
        found = self.run.shards.read(r, "eval-00000")
        assert found is not None
        self.run.ledger.append({"event": "eval", "round": r, "score": found[0][0]["score"]})
        self.run.stats.append({"round_index": r, "eval/pass@1": found[0][0]["score"]})
        self.run.telemetry.append({"round": r})


def contents(path: Path) -> dict[str, str]:
    """Checksums of everything a user would compare: all but clock, lock, run id, outcome, quarantine and the copies in checkpoints."""
    found = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        in_copies = parts[0] == "checkpoints" and parts[-1] == "run.json"
        if file.is_file() and not {parts[0], parts[-1].partition(".")[0]} & NOT_COMPARED and not in_copies:
            found["/".join(parts)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def main() -> int:
    try:
        train(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:3]))
    except IsftError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
