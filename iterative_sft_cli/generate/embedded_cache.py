"""Keys and values of the rows being generated, laid out so that attention reads each byte once and nothing is concatenated.

A prompt is kept once for all its samples. What rows generate lies in blocks of positions: every row writes its new token to
the same column of the newest block, and rows are ordered by age, so a block concerns a prefix of the rows and every product
is one `bmm` over contiguous memory. Guarantee: a row's attention covers exactly its prompt and its own tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iterative_sft_cli.generate.embedded_native import NativeStep, offered

ROW_STEP = 8
"""Row counts of products are rounded up to a multiple of this: fewer distinct shapes for the matrix library to prepare."""
BLOCK = 32
"""Columns of a block while the oldest row is young; an eighth of its age later."""
MERGE_SHARE = 0.8
"""Two full blocks of like size are joined when at least so many of the younger one's rows are in the older one."""
_MASKED = {torch.float16: -3e4}
"""Added to the score of what may not be attended to: finite, so that rows of padding stay finite too; -1e30 elsewhere."""


def _rounded(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


@dataclass(slots=True)
class _Block:
    """Columns start..end (counted from the cache's first step): keys [layers, rows, heads, columns, d], values alike."""

    start: int
    end: int
    keys: torch.Tensor
    values: torch.Tensor
    rows: int = 0
    """Rows of this step's products with the block: those born before its end, rounded up."""


class BlockCache:
    """See the module. Rows are numbered 0..num_rows-1, oldest first; the tensors of a step have `padded_rows` of them."""

    def __init__(
        self,
        layers: int,
        heads: int,
        kv_heads: int,
        key_width: int,
        value_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.heads = heads
        self.kv_heads = kv_heads
        self.native = offered(dtype, device, key_width, value_width, heads // kv_heads)
        self._step: NativeStep | None = None
        self._mixed: torch.Tensor | None = None
        self.widths = (key_width, value_width)
        self.dtype = dtype
        self.device = device
        self.masked = _MASKED.get(dtype, -1e30)
        self.clock = 0
        self.born: list[int] = []
        self.slot: list[int] = []
        self.seat: list[int] = []
        self.prompt_lengths: list[int] = []
        self.seats = 0
        self.prompts: tuple[torch.Tensor, torch.Tensor] | None = None
        self.blocks: list[_Block] = []
        self._scores: torch.Tensor | None = None
        self._moved = True

    @property
    def num_rows(self) -> int:
        """Rows being continued."""
        return len(self.born)

    @property
    def padded_rows(self) -> int:
        """Rows of a step's tensors."""
        return _rounded(len(self.born))

    def positions(self) -> list[int]:
        """The position of each row's newest token (within a step: the one that is being added)."""
        return [self.prompt_lengths[s] + self.clock - b - 1 for s, b in zip(self.slot, self.born, strict=True)]

    def held(self) -> int:
        """Positions for which memory is allocated."""
        prompts = 0 if self.prompts is None else self.prompts[0].shape[1] * self.prompts[0].shape[3]
        return prompts + sum(block.keys.shape[1] * (block.end - block.start) for block in self.blocks)

    def next_block(self) -> int:
        """Columns of the block that the next step has to open, 0 when there is room in the newest."""
        if self.blocks and self.clock < self.blocks[-1].end:
            return 0
        age = self.clock - min(self.born, default=self.clock)
        return max(BLOCK, 1 << max((age // 8).bit_length() - 1, 0))

    # -- rows come and go ------------------------------------------------------------------------------------------

    def admit(self, lengths: Sequence[int], copies: Sequence[int]) -> list[int]:
        """Take in prompts of the given lengths with so many rows each; returns their slots, to be filled by `put_prompt`."""
        first = len(self.prompt_lengths)
        slots = list(range(first, first + len(lengths)))
        self.prompt_lengths.extend(lengths)
        for slot, count in zip(slots, copies, strict=True):
            self.born.extend([self.clock] * count)
            self.slot.extend([slot] * count)
            self.seat.extend(range(count))
        self._lay_out_prompts(keep=first)
        self._moved = True
        return slots

    def put_prompt(self, layer: int, slot: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values [heads, length, d] of the prompt in `slot`, from its token `start` on."""
        assert self.prompts is not None
        end = start + keys.shape[1]
        for store, new in zip(self.prompts, (keys, values), strict=True):
            store[layer, slot, :, start:end] = new

    def admit_read(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], copies: Sequence[int]) -> None:
        """Take in prompts with so many rows each, whose keys and values [layers, heads, length, d] are there."""
        slots = self.admit([one.shape[2] for one in keys], copies)
        assert self.prompts is not None
        for store, given in zip(self.prompts, (keys, values), strict=True):
            for slot, new in zip(slots, given, strict=True):
                store[:, slot, :, : new.shape[2]] = new

    def whole_prompt(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of a prompt's keys and values [layers, heads, length, d]."""
        assert self.prompts is not None
        keys, values = (store[:, slot, :, : self.prompt_lengths[slot]].clone() for store in self.prompts)
        return keys, values

    @torch.inference_mode()
    def remove(self, rows: Sequence[int]) -> list[int]:
        """Take rows out. Returns, for each new row number, the old one: the caller reorders what it keeps per row."""
        gone = set(rows)
        kept = [i for i in range(len(self.born)) if i not in gone]
        birth = [sum(block.end <= born for block in self.blocks) for born in self.born]
        result, moves = list[int](), list[tuple[int, int]]()
        at = 0
        while at < len(kept):
            # among rows born in one block the order is free: survivors stay where they can, the last fill the gaps
            until = at
            while until < len(kept) and birth[kept[until]] == birth[kept[at]]:
                until += 1
            stay = {i for i in kept[at:until] if i < until}
            movers = iter([i for i in kept[at:until] if i >= until])
            for position in range(at, until):
                source = position if position in stay else next(movers)
                result.append(source)
                if source != position:
                    moves.append((position, source))
            at = until
        self._move(moves, birth)
        self.born = [self.born[i] for i in result]
        self.slot = [self.slot[i] for i in result]
        self.seat = [self.seat[i] for i in result]
        self._drop_empty_prompts()
        oldest = min(self.born, default=self.clock)
        self.blocks = [block for block in self.blocks if block.end > oldest]
        self._moved = True
        return result

    @torch.inference_mode()
    def trim(self) -> None:
        """Give back the memory of rows that are gone."""
        for block in self.blocks:
            rows = max(_rounded(sum(born < block.end for born in self.born)), ROW_STEP)
            if block.keys.shape[1] > rows:
                block.keys, block.values = block.keys[:, :rows].clone(), block.values[:, :rows].clone()

    def _move(self, moves: Sequence[tuple[int, int]], birth: Sequence[int]) -> None:
        for index, block in enumerate(self.blocks):
            # a row born just now has nothing yet, and perhaps no place
            pairs = [(to, of) for to, of in moves if birth[of] <= index and self.born[of] < self.clock]
            if pairs:
                to = torch.tensor([p[0] for p in pairs], device=self.device)
                of = torch.tensor([p[1] for p in pairs], device=self.device)
                for store in (block.keys, block.values):
                    store.index_copy_(1, to, store.index_select(1, of))

    def _drop_empty_prompts(self) -> None:
        """Free the slots of prompts without rows: the last slots move into their places."""
        used = set(self.slot)
        count = len(self.prompt_lengths)
        holes = [s for s in range(count) if s not in used]
        if not holes:
            return
        keep = count - len(holes)
        movers = [s for s in range(keep, count) if s in used]
        rename = dict(zip(movers, (h for h in holes if h < keep), strict=True))
        for of, to in rename.items():
            self.prompt_lengths[to] = self.prompt_lengths[of]
            for store in self.prompts or ():
                store[:, to] = store[:, of]
        del self.prompt_lengths[keep:]
        self.slot = [rename.get(s, s) for s in self.slot]

    def _lay_out_prompts(self, keep: int) -> None:
        """Room for all prompts at the width of the longest; the first `keep` slots hold data."""
        count, width = len(self.prompt_lengths), -(-max(self.prompt_lengths) // BLOCK) * BLOCK
        self.seats = max(self.seat) + 1
        old = self.prompts
        if old is not None:
            slots, capacity = old[0].shape[1], old[0].shape[3]
            if slots >= count and width <= capacity <= max(width * 5 // 4, width + BLOCK):
                return
        count = _rounded(count)
        self.prompts = (self._new(count, width, 0), self._new(count, width, 1))
        for store, before in zip(self.prompts, old or (), strict=False):
            shared = min(width, before.shape[3])
            store[:, :keep, :, :shared] = before[:, :keep, :, :shared]

    def _new(self, rows: int, positions: int, which: int) -> torch.Tensor:
        # zeros, as masked positions are multiplied by a weight of 0 and must be finite
        shape = (self.layers, rows, self.kv_heads, positions, self.widths[which])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # -- one step --------------------------------------------------------------------------------------------------

    def start_step(self) -> None:
        """Every row grows by one token: open a block when needed, and say what may be attended to."""
        num_rows, padded = self.num_rows, self.padded_rows
        columns = self.next_block()
        if columns:
            self._merge()
            store = [self._new(padded, columns, which) for which in (0, 1)]
            self.blocks.append(_Block(self.clock, self.clock + columns, store[0], store[1]))
        self._widen(self.blocks[-1], padded)
        if self.native:
            self.clock += 1
            self._start_native()
            return
        if self._scores is not None:
            # the masks of a step add up where a block has no row
            self._scores.zero_()
        self._column = self.clock - self.blocks[-1].start
        self.clock += 1
        for block in self.blocks[:-1]:
            block.rows = _rounded(sum(born < block.end for born in self.born))
        self.blocks[-1].rows = padded
        self._seat_rows(padded)
        assert self.prompts is not None
        prompt_width, start = self.prompts[0].shape[3], self.blocks[0].start
        self._prompt_width = prompt_width
        offset = prompt_width - start
        self._spans = [(block, offset + block.start, offset + block.end) for block in self.blocks]
        # a row of padding attends to its own new token only, whose values are finite
        first = [*(offset + max(b, start) for b in self.born), *([offset + self.clock - 1] * (padded - num_rows))]
        length = [*(self.prompt_lengths[s] for s in self.slot), *([0] * (padded - num_rows))]
        column = torch.arange(self._spans[-1][2])
        blocked = (column < torch.tensor(first).unsqueeze(1)) | (column >= offset + self.clock)
        blocked[:, :prompt_width] = column[:prompt_width] >= torch.tensor(length).unsqueeze(1)
        mask = torch.zeros(padded, 1, len(column), dtype=self.dtype)
        self._mask = mask.masked_fill_(blocked.unsqueeze(1), self.masked).to(self.device)

    def _start_native(self) -> None:
        assert self.prompts is not None
        self._step = NativeStep(
            heads=self.heads,
            kv_heads=self.kv_heads,
            prompts=self.prompts,
            slot=self.slot,
            prompt_length=self.prompt_lengths,
            born=self.born,
            clock=self.clock,
            blocks=[(block.start, block.end, block.keys, block.values) for block in self.blocks],
        )
        shape = self.padded_rows, self.heads, self.widths[1]
        if self._mixed is None or self._mixed.shape != shape:
            self._mixed = torch.zeros(shape, dtype=self.dtype)

    def _merge(self) -> None:
        """Join the newest blocks while that costs few products with rows that are younger: fewer, larger products."""
        while len(self.blocks) > 1:
            old, new = self.blocks[-2:]
            old_rows, new_rows = (sum(born < block.end for born in self.born) for block in (old, new))
            split, columns = old.end - old.start, new.end - old.start
            if split > columns - split or old_rows < MERGE_SHARE * new_rows:
                return
            keys, values = (self._new(_rounded(new_rows), columns, which) for which in (0, 1))
            for store, first, second in ((keys, old.keys, new.keys), (values, old.values, new.values)):
                store[:, :old_rows, :, :split] = first[:, :old_rows]
                store[:, :new_rows, :, split:] = second[:, :new_rows]
            self.blocks[-2:] = [_Block(old.start, new.end, keys, values)]

    def _widen(self, block: _Block, rows: int) -> None:
        have = block.keys.shape[1]
        if have < rows:
            keys, values = (self._new(max(rows, have * 3 // 2), block.end - block.start, which) for which in (0, 1))
            keys[:, :have], values[:, :have] = block.keys, block.values
            block.keys, block.values = keys, values

    def _seat_rows(self, padded: int) -> None:
        """Index tensors between rows and (prompt, seat) places; they change only when rows do."""
        if not self._moved:
            return
        row_at = [0] * (len(self.prompt_lengths) * self.seats)
        for row, (slot, seat) in enumerate(zip(self.slot, self.seat, strict=True)):
            row_at[slot * self.seats + seat] = row
        extra = [0] * (padded - len(self.slot))
        self._row_at = torch.tensor(row_at, device=self.device)
        self._slot_of = torch.tensor([*self.slot, *extra], device=self.device)
        self._seat_of = torch.tensor([*self.seat, *extra], device=self.device)
        self._moved = False

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        turn: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Store the new keys and values [padded_rows, kv_heads, d] and attend: query [padded_rows, heads, d] -> alike.

        `turn` (native only): the rotary embedding is still to be applied, with these float32 cosines and sines. The result
        is overwritten by the next call.
        """
        if self._step is not None and self._mixed is not None:
            self._step.attend(layer, query, key, value, turn, scaling, self._mixed)
            return self._mixed
        padded, heads, width = query.shape
        kv_heads, group = self.kv_heads, heads // self.kv_heads
        newest = self.blocks[-1]
        newest.keys[layer, :padded, :, self._column] = key
        newest.values[layer, :padded, :, self._column] = value
        scores = self._score_buffer(padded, heads, self._spans[-1][2])
        self._score_prompts(layer, query, scores, scaling)
        folded = query.reshape(padded * kv_heads, group, width)
        for block, lower, upper in self._spans:
            keys = block.keys[layer, : block.rows].view(block.rows * kv_heads, upper - lower, width)
            found = torch.bmm(folded[: block.rows * kv_heads], keys.transpose(1, 2))
            torch.mul(found.view(block.rows, heads, -1), scaling, out=scores[: block.rows, :, lower:upper])
        weights = torch.softmax(scores.add_(self._mask), -1)
        mixed = self._mix_prompts(layer, weights, heads)
        for block, lower, upper in self._spans:
            values = block.values[layer, : block.rows].view(block.rows * kv_heads, upper - lower, -1)
            part = weights[: block.rows, :, lower:upper].reshape(block.rows * kv_heads, group, -1)
            mixed[: block.rows].add_(torch.bmm(part, values).view(block.rows, heads, -1))
        return mixed

    def _score_buffer(self, padded: int, heads: int, columns: int) -> torch.Tensor:
        buffer = self._scores
        if buffer is None or buffer.numel() < padded * heads * columns:
            buffer = torch.zeros(padded * heads * columns * 5 // 4, dtype=self.dtype, device=self.device)
            self._scores = buffer
        return buffer[: padded * heads * columns].view(padded, heads, columns)

    def _score_prompts(self, layer: int, query: torch.Tensor, scores: torch.Tensor, scaling: float) -> None:
        """Scores of every row against its prompt, which is read once for all its samples."""
        assert self.prompts is not None
        padded, heads, width = query.shape
        slots, seats, group = len(self.prompt_lengths), self.seats, heads // self.kv_heads
        seated = query.index_select(0, self._row_at).view(slots, seats, self.kv_heads, group * width)
        seated = seated.transpose(1, 2).reshape(slots * self.kv_heads, seats * group, width)
        keys = self.prompts[0][layer, :slots].view(slots * self.kv_heads, -1, width)
        found = torch.bmm(seated, keys.transpose(1, 2)).view(slots, self.kv_heads, seats, -1)
        found = found[self._slot_of, :, self._seat_of].view(padded, heads, -1)
        torch.mul(found, scaling, out=scores[:, :, : self._prompt_width])

    def _mix_prompts(self, layer: int, weights: torch.Tensor, heads: int) -> torch.Tensor:
        """Each row's weighted sum of its prompt's values, [rows, heads, d]."""
        assert self.prompts is not None
        slots, seats, group = len(self.prompt_lengths), self.seats, heads // self.kv_heads
        prompt_width = self._prompt_width
        seated = weights[:, :, :prompt_width].index_select(0, self._row_at)
        seated = seated.view(slots, seats, self.kv_heads, -1).transpose(1, 2)
        seated = seated.reshape(slots * self.kv_heads, seats * group, prompt_width)
        values = self.prompts[1][layer, :slots].view(slots * self.kv_heads, prompt_width, -1)
        found = torch.bmm(seated, values).view(slots, self.kv_heads, seats, -1)
        return found[self._slot_of, :, self._seat_of].view(weights.shape[0], heads, -1)
