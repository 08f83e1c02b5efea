# SPDX-License-Identifier: Apache-2.0
"""What a replay buffer holds as readers see it: a commit's manifest, its memory-mapped shards, numbers of turns."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FORMAT = 1
LARGEST_SHARD = 2**26  # bytes; no merge makes a larger one
IMAGE_COLUMNS = ("images", "final_images")


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json. Row ids count the offline rows, then all online rows that there ever were."""

    with_images: bool
    num_offline: int = 0
    fingerprint: str | None = None  # of the offline part's source
    start: int = 0  # first online row that has not been evicted
    end: int = 0  # one past the newest row
    shards: tuple[tuple[str, int, int], ...] = ()  # file, id of its first row, rows; in the order of their rows
    rounds: dict[int, tuple[int, bool]] = field(default_factory=dict)  # -> (one past its newest row, complete)
    counters: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        rounds = {str(number): list(end) for number, end in self.rounds.items()}
        return {"format": FORMAT, **asdict(self), "shards": list(map(list, self.shards)), "rounds": rounds}

    @classmethod
    def from_json(cls, values: dict[str, Any], where: Path) -> Manifest:
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{where} was written by another version of vlmq_trl; open it with that one.")
        values["shards"] = tuple((name, first, rows) for name, first, rows in values["shards"])
        values["rounds"] = {int(k): (end, complete) for k, (end, complete) in values["rounds"].items()}
        return cls(**values)


@dataclass(frozen=True)
class Shard:
    """A memory-mapped file of whole episodes."""

    name: str
    first: int  # row id
    batches: list[pa.RecordBatch]

    @property
    def end(self) -> int:
        return self.first + sum(map(len, self.batches))


@dataclass(frozen=True)
class State:
    """One commit as readers see it. A commit makes a new state and swaps it in; for the holder of one nothing changes.

    What a commit evicts stays in its state, and the pictures on the disk, until the next commit.
    """

    manifest: Manifest
    shards: tuple[Shard, ...]
    readable: int  # first online row in `shards` that had not been evicted before this commit
    columns: dict[str, np.ndarray]  # of the offline rows, then the online rows from `first_online` on; maybe longer
    first_online: int

    @cached_property
    def batches(self) -> tuple[list[int], list[pa.RecordBatch]]:
        """The first row of each batch, and the batches."""
        batches = [batch for shard in self.shards for batch in shard.batches]
        firsts = [shard.first + int(n) for shard in self.shards for n in np.cumsum([0, *map(len, shard.batches)])[:-1]]
        return firsts, batches

    def slices(self, low: int, high: int) -> Iterator[pa.RecordBatch]:
        """The rows low..high - 1, in order and without a copy."""
        firsts, batches = self.batches
        for k in range(max(bisect_right(firsts, low) - 1, 0), bisect_left(firsts, high)):
            begin, stop = max(low - firsts[k], 0), min(high - firsts[k], len(batches[k]))
            if begin < stop:
                yield batches[k].slice(begin, stop - begin)

    def position(self, rows: Any) -> np.ndarray:
        """Where rows stand in `columns`."""
        rows, m = np.asarray(rows, dtype=np.int64), self.manifest
        self.check(rows, self.first_online)
        return np.where(rows < m.num_offline, rows, rows - self.first_online + m.num_offline)

    def check(self, rows: np.ndarray, first_online: int) -> None:
        m = self.manifest
        bad = (rows < 0) | (rows >= m.end) | ((rows >= m.num_offline) & (rows < first_online))
        if bad.any():
            raise LookupError(gone(int(rows[bad].flat[0]), m))

    def start(self, end: int, capacity: int | None) -> int:
        """First row of the online window that ends at `end`, the end of an episode."""
        oldest = min(self.manifest.start, end)
        if capacity is None or end - oldest <= capacity:
            return oldest
        turn, left = self.columns["turn"], self.columns["left"]
        row = end - capacity
        at = self.position(row)
        row += int(left[at]) + 1 if turn[at] else 0
        return row if row < end else end - 1 - int(turn[self.position(end - 1)])


def gone(row: int, m: Manifest) -> str:
    return (
        f"Row {row} is not in the replay buffer, which holds rows 0..{m.num_offline - 1} offline and "
        f"{m.start}..{m.end - 1} online. Older rows are evicted: sample again, or raise `capacity`."
    )


def mergeable(shards: Sequence[Shard], new: pa.RecordBatch, most: float) -> int:
    """How many of the last shards should become one with the new rows, of at most `most` rows.

    Those that are no larger than what they are merged with, as in a binary counter: n commits make about log2(n)
    shards, and each row is rewritten about log2(n) times.

    Example: after commits of one turn each there are shards of 1; 2; 2, 1; 4; 4, 1; 4, 2; 4, 2, 1; 8 turns.
    """
    count, rows, size = 0, len(new), new.nbytes
    for shard in reversed(shards):
        more = shard.end - shard.first
        size += sum(batch.nbytes for batch in shard.batches)
        if more > rows or rows + more > most or size > LARGEST_SHARD:
            break
        count, rows = count + 1, rows + more
    return count


def pictures_of(batches: Iterable[pa.RecordBatch]) -> Counter[str]:
    """How often rows refer to each picture."""
    found: Counter[str] = Counter()
    for batch in batches:
        for name in set(IMAGE_COLUMNS) & set(batch.schema.names):
            counts = pc.struct_field(batch.column(name).flatten(), "path").value_counts()
            found.update(dict(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)))
    return found


def ids_of(batches: Iterable[pa.RecordBatch]) -> set[str]:
    return {name for batch in batches for name in batch.column("episode_id").unique().to_pylist()}


def columns_of(batches: Sequence[pa.RecordBatch], gamma: float) -> dict[str, np.ndarray]:
    """The scalars of whole episodes, `left` turns after each (0 at an episode's end) and the discounted return."""

    def column(name: str, kind: type) -> np.ndarray:
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in batches]
        return np.concatenate(parts).astype(kind) if parts else np.zeros(0, kind)

    turn, reward = column("turn", np.int32), column("reward", np.float64)
    first = np.flatnonzero(turn == 0)
    length = np.diff(np.append(first, len(turn)))
    left = (np.repeat(first + length - 1, length) - np.arange(len(turn))).astype(np.int32)
    # G_k = r_k + gamma * G_{k+1}, for all episodes at once from their ends.
    return_to_go, order = reward.copy(), np.argsort(left, kind="stable")
    bounds = np.cumsum(np.bincount(left, minlength=1))
    for low, high in pairwise(bounds):
        return_to_go[order[low:high]] += gamma * return_to_go[order[low:high] + 1]
    return {
        "turn": turn,
        "left": left,
        "reward": reward.astype(np.float32),
        "terminated": column("terminated", bool),
        "truncated": column("truncated", bool),
        "return_to_go": return_to_go,
    }


def stored(png: bytes, pictures: dict[str, bytes]) -> dict[str, Any]:
    """An image as rows hold it, by its path below the folder; its bytes go to `pictures`."""
    digest = hashlib.sha256(png).hexdigest()
    path = f"images/{digest[:2]}/{digest}.png"
    pictures[path] = png
    return {"bytes": None, "path": path}


def absolute(batch: pa.RecordBatch, folder: Path) -> pa.RecordBatch:
    """The rows with their pictures' paths as they are in the folder's present place; the rest is not copied."""
    for name in set(IMAGE_COLUMNS) & set(batch.schema.names):
        lists = batch.column(name)
        stored = lists.values
        paths = pc.binary_join_element_wise(f"{folder}/", stored.field("path"), "")
        images = pa.StructArray.from_arrays([stored.field("bytes"), paths], fields=list(stored.type))
        at = batch.schema.get_field_index(name)
        lists = pa.Array.from_buffers(
            lists.type, len(lists), lists.buffers()[:2], offset=lists.offset, children=[images]
        )
        batch = batch.set_column(at, batch.schema.field(at), lists)
    return batch


def open_shard(path: Path, first: int) -> Shard:
    with pa.memory_map(str(path)) as source:  # the mapping lives as long as the batches, the file handle does not
        batches = list(pa.ipc.open_stream(source))
    return Shard(path.name, first, batches)


def draw_segments(
    state: State, rng: np.random.Generator, draw: Callable[[int], Any], turns: int, segment_length: int
) -> np.ndarray:
    """[S, 2] first row and number of turns of segments, `turns` turns together.

    An episode is cut into blocks of n turns at a random place, a turn is drawn and its block taken with probability
    1 / size. Where `draw` draws any of N rows alike, the block is as likely as any other, so that each of the N turns
    is in it with the same probability; else it is as likely as its turns' mean.
    n is `segment_length` as long as that fits, then what is missing, so that nothing has to be cut off.

    Args:
        draw: count -> [count] rows of one part of the buffer, drawn independently with `rng`.

    Example: of an episode of 3 turns, n = 2, the cuts are [0 1][2] or [0][1 2]. Four blocks, each turn in two of them.
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    while turns:
        n = min(segment_length, turns)
        draws = turns + 4 * n  # a draw yields one turn on average
        row, phase = draw(draws), rng.integers(n, size=draws)
        at = state.position(row)
        turn, left = state.columns["turn"][at], state.columns["left"][at]
        place = (turn + phase) % n
        before = np.minimum(place, turn)
        size = before + np.minimum(n - 1 - place, left) + 1
        blocks = np.stack([row - before, size], axis=1)[rng.random(draws) * size < 1]
        blocks = blocks[turns - (np.cumsum(blocks[:, 1]) - blocks[:, 1]) >= n]
        found.append(blocks)
        turns -= int(blocks[:, 1].sum())
    return np.concatenate(found)
