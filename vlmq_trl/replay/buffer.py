# SPDX-License-Identifier: Apache-2.0
"""The replay buffer: see the package's docstring for what is on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
from tqdm.auto import tqdm

from ..trajectory import Episode, EpisodeIndex, TrajectoryError, trajectory_features
from ..trajectory.episodes import _encodable, _episode_rows, _PngCache
from .contents import (
    IMAGE_COLUMNS,
    Manifest,
    State,
    absolute,
    columns_of,
    draw_segments,
    gone,
    ids_of,
    mergeable,
    open_shard,
    pictures_of,
    stored,
)
from .files import flush, serialized, take_lock, write_file
from .offline import conformed, fingerprint_of
from .priorities import Priorities, SumTree

OFFLINE_BATCH = 1024  # rows of the offline part in memory at once while it is copied in
PICTURE_CACHE = 128  # decoded pictures that `read` keeps at hand
WRITERS = 16  # threads that write pictures: their flushes to the disk are waited for together

READ_COLUMNS = ("prompt", "images", "completion", "final_prompt", "final_images", "behavior_logprobs")

Part = Literal["all", "online", "offline"]


class _Lookup:
    """A number of each committed row, by row id: `buffer.reward[rows]` for one row or an array of them."""

    def __init__(self, buffer: ReplayBuffer, name: str):
        self.buffer, self.name = buffer, name

    def __getitem__(self, rows: Any) -> Any:
        state = self.buffer._state
        return state.columns[self.name][state.position(rows)]


class ReplayBuffer:
    """Turns on disk: an offline part, and the newest online episodes, up to `capacity` turns of them.

    Rows have ids that never change: 0..num_offline - 1, then the online rows in order of appending, also after older
    ones were evicted. Only committed rows count. What a commit evicts can be read until the commit after it, so that a
    batch that was sampled just before still loads.

    One thread may write while others read. A process that was forked off, such as a data loader's worker, may read.

    Args:
        folder: opened, or made if there is none.
        capacity: online turns to keep, at least the newest episode; None for all. The offline part is kept always.
        gamma: discount of `return_to_go`.
        with_images: whether the rows have image columns; None for what the folder has, with images if it is new.
        read_only: open what another process may be writing, as it stands now; takes no lock and writes nothing. The
            pictures of what the writer evicts go.

    Raises:
        RuntimeError: another process (or another object of this one) has opened the folder for writing.
        FileNotFoundError: nothing to read. FileExistsError: the folder holds something else.
        ValueError: bad arguments; `with_images` is not what the folder has.
    """

    _state: State  # what is committed

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        capacity: int | None = None,
        gamma: float = 1.0,
        with_images: bool | None = None,
        read_only: bool = False,
    ):
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1 turn, or None for no limit, got {capacity}.")
        self.folder = Path(folder).absolute()
        self.capacity, self.gamma = None if capacity is None else int(capacity), gamma
        self.read_only = read_only
        self._lock: IO[str] | None = None
        if read_only and not (self.folder / "manifest.json").is_file():
            raise FileNotFoundError(f"No replay buffer at {self.folder}: it has no manifest.json.")
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.folder)
        # For the writer. Pending: the rows and the round of each episode, the pictures that they show.
        self._pending: list[tuple[pa.RecordBatch, int]] = []
        self._pending_pictures: dict[str, bytes] = {}
        self._ids: set[str] = set()  # of live and of pending episodes
        self._references: Counter[str] = Counter()  # picture -> how often live rows refer to it
        self._unused: set[str] = set()  # pictures that the last commit ceased to refer to
        self._counted: State | None = None  # whose ids and references these are
        self._png = _PngCache()
        self._picture = lru_cache(PICTURE_CACHE)(self._decoded)
        try:
            if not read_only:
                self._make(True if with_images is None else with_images)
            self._open()
            if with_images is not None and with_images != self.with_images:
                raise ValueError(
                    f"{self.folder} holds turns {'with' if self.with_images else 'without'} images, but with_images="
                    f"{with_images}: use another folder, or with_images={self.with_images}."
                )
        except BaseException:
            self.close()
            raise
        self._schema = trajectory_features(self.with_images).arrow_schema
        self.turn, self.reward = _Lookup(self, "turn"), _Lookup(self, "reward")
        self.terminated, self.truncated = _Lookup(self, "terminated"), _Lookup(self, "truncated")
        self.return_to_go = _Lookup(self, "return_to_go")  # float64; nothing is bootstrapped after an episode's end

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another writer in. What is pending is dropped; what was read stays valid."""
        if self._lock is not None and not self._lock.closed:
            if self._unused and self._counted is self._state:
                self._delete(self._unused - self._references.keys())
            self._lock.close()
        self._lock = None

    # -- what is there ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Live turns, offline and online."""
        return self.num_offline + self.num_online

    @property
    def with_images(self) -> bool:
        return self._state.manifest.with_images

    @property
    def num_offline(self) -> int:
        """Offline turns."""
        return self._state.manifest.num_offline

    @property
    def num_online(self) -> int:
        """Live online turns."""
        return self.end - self.start()

    @property
    def num_episodes(self) -> int:
        """Live episodes, offline and online."""
        state = self._state
        rows = np.r_[0 : state.manifest.num_offline, self.start() : state.manifest.end]
        return int(np.count_nonzero(state.columns["turn"][state.position(rows)] == 0))

    @property
    def end(self) -> int:
        """One past the newest row id."""
        return self._state.manifest.end

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._state.manifest.counters)

    @property
    def pending_turns(self) -> int:
        """Appended and not committed."""
        return sum(len(batch) for batch, _ in self._pending)

    def manifest(self) -> dict[str, Any]:
        """What manifest.json says, for a checkpoint's copy."""
        return self._state.manifest.as_json()

    def start(self, end: int | None = None) -> int:
        """First row id of the online window that ends at row id `end` (by default the newest): whole episodes, at most
        `capacity` turns but at least the newest episode, and nothing that has been evicted.

        Raises:
            ValueError: no episode ends at `end`.
        """
        return self._window(self._state, end)[0]

    def _window(self, state: State, end: int | None) -> tuple[int, int]:
        m = state.manifest
        end = m.end if end is None else int(end)
        if not m.num_offline <= end <= m.end or (m.start < end and state.columns["left"][state.position(end - 1)]):
            raise ValueError(
                f"No online window ends at row {end}: give an episode's end in {m.num_offline}..{m.end}, such as "
                "`round_end` does."
            )
        return state.start(end, self.capacity), end

    def round_end(self, round: int) -> tuple[int, bool] | None:
        """(one past the newest committed row id of that round, whether the round is complete); None: nothing of it."""
        return self._state.manifest.rounds.get(round)

    def is_online(self, rows: Any) -> np.ndarray:
        """[R] bool."""
        return np.asarray(rows) >= self.num_offline

    # -- reading ------------------------------------------------------------------------------------------------------

    def sample(
        self,
        rng: np.random.Generator,
        turns: int,
        segment_length: int,
        online_fraction: float,
        end: int | None = None,
        *,
        priorities: Priorities | None = None,
        prioritized_fraction: float = 0.0,
    ) -> np.ndarray:
        """[turns] row ids: segments of at most `segment_length` consecutive turns of one episode, one after the other.
        Two that happen to follow one another in the episode too look like one.

        `turns * online_fraction` of them, rounded at random, are from the online window that ends at `end`, the others
        offline; a part that is empty leaves its share to the other. Every turn of a part is equally likely. The time
        does not depend on how many rows there are.

        With `priorities`, `prioritized_fraction` of each part's turns come from segments that are drawn in proportion
        to them, unless all are 0. They are made to cover the rows that are drawn from.

        Raises:
            ValueError: bad arguments, or nothing to sample from.
            LookupError: all of the window that ends at `end` has been evicted.
        """
        fractions = (online_fraction, prioritized_fraction)
        if turns < 1 or segment_length < 1 or not all(0.0 <= fraction <= 1.0 for fraction in fractions):
            raise ValueError(
                "turns and segment_length must be at least 1 and the fractions in [0, 1], got "
                f"{turns}, {segment_length}, {online_fraction} and {prioritized_fraction}."
            )
        state = self._state
        (start, end), offline = self._window(state, end), state.manifest.num_offline
        if start == end > offline:
            raise LookupError(gone(end - 1, state.manifest))
        if start == end and not offline:
            raise ValueError("The replay buffer is empty: add offline data, or append episodes and commit.")

        def rounded(share: float) -> int:
            return math.floor(share) + int(rng.random() < share - math.floor(share))

        online = rounded(turns * (1.0 if not offline else 0.0 if start == end else online_fraction))
        drawn = []
        for low, high, count, part in ((0, offline, turns - online, "offline"), (start, end, online, "online")):
            if priorities is not None and count:
                tree: SumTree = getattr(priorities, part)
                tree.cover(low, high)
                prioritized = rounded(count * prioritized_fraction) if tree.total else 0
                drawn.append(draw_segments(state, rng, partial(tree.draw, rng), prioritized, segment_length))
                count -= prioritized
            drawn.append(draw_segments(state, rng, partial(rng.integers, low, high), count, segment_length))
        first, size = rng.permutation(np.concatenate(drawn)).T
        return np.repeat(first - (np.cumsum(size) - size), size) + np.arange(turns)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """What was seen and said in these rows: the columns `prompt`, `images`, `completion`, `final_prompt`,
        `final_images` and `behavior_logprobs`, as `datasets` gives them, images decoded.

        Raises:
            LookupError: a row that is not there (any more).
            FileNotFoundError: a row's picture is lost.
        """
        state, rows = self._state, np.asarray(rows, dtype=np.int64)
        state.check(rows, state.readable)
        names = [name for name in READ_COLUMNS if name in self._schema.names]
        records: list[dict[str, Any]] = []
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else ():
            for batch in state.slices(int(run[0]), int(run[-1]) + 1):
                columns = [batch.column(name).to_pylist() for name in names]
                records += [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        for row, record in zip(rows.tolist(), records, strict=True):
            for name in set(IMAGE_COLUMNS) & set(names):
                try:
                    record[name] = record[name] and [self._picture(image["path"]).copy() for image in record[name]]
                except FileNotFoundError:
                    now = self._load()
                    now.check(np.array([row]), now.readable)  # evicted since, by another commit
                    raise
        return records

    def _decoded(self, path: str) -> PIL.Image.Image:
        return datasets.Image().decode_example({"bytes": None, "path": f"{self.folder}/{path}"})

    def dataset(self, part: Part = "all") -> datasets.Dataset:
        """The live rows as an ordinary trajectory dataset over the memory-mapped shards and the image files.

        It stands for the buffer as it is now. Rows that are evicted later stay in it, but not their image files: what
        is to outlive the buffer goes through `save_trajectories`, which takes the images along.
        """
        if part not in ("all", "online", "offline"):
            raise ValueError(f"part must be 'all', 'online' or 'offline', got {part!r}.")
        state = self._state
        m, (start, end) = state.manifest, self._window(state, None)
        windows = {
            "all": [(0, m.num_offline), (start, end)],
            "offline": [(0, m.num_offline)],
            "online": [(start, end)],
        }
        batches = [absolute(batch, self.folder) for window in windows[part] for batch in state.slices(*window)]
        table = pa.Table.from_batches(batches, schema=self._schema)
        content = json.dumps([str(self.folder), part, m.shards, start, end])
        return datasets.Dataset(table, fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16])

    # -- writing ------------------------------------------------------------------------------------------------------

    def append(self, episode: Episode, *, round: int) -> None:
        """Takes an episode in, pending until `commit`.

        Raises:
            TrajectoryError: a bad episode, naming it, the turn (as `row`), the column and what to do. The buffer is
                as it was.
        """
        self._check_writable()
        self._finish_commit()
        name = _encodable(episode.episode_id, row=0, column="episode_id")
        pictures: dict[str, bytes] = {}
        try:
            if name in self._ids:
                raise TrajectoryError("this episode_id is there already; ids must be unique.", column="episode_id")
            if episode.truncated and not episode.terminated and episode.final_prompt is None:
                raise TrajectoryError(
                    "a truncated episode needs the observation after its last turn, to bootstrap from.",
                    row=len(episode.turns) - 1,
                    column="final_prompt",
                )
            rows = list(_episode_rows(episode, 0, self.with_images, self._png))
            for k, row in enumerate(rows):
                if not all(value <= 1e-3 and math.isfinite(value) for value in row["behavior_logprobs"] or ()):
                    raise TrajectoryError(
                        "a log-probability is not finite or positive; record natural logarithms, or None.",
                        row=k,
                        column="behavior_logprobs",
                    )
        except TrajectoryError as error:
            named = TrajectoryError(f"episode {name!r}, {error}")
            named.row, named.column = error.row, error.column
            raise named from None
        for row in rows:
            for column in set(IMAGE_COLUMNS) & set(row):
                images = row[column]
                row[column] = images and [stored(image["bytes"], pictures) for image in images]
        batch = pa.RecordBatch.from_pylist(rows, schema=self._schema)
        self._pending_pictures.update(pictures)
        self._ids.add(name)
        self._pending.append((batch, int(round)))  # last: an interruption takes the episode in, or not

    def commit(self, counters: Mapping[str, int] | None = None, *, end_round: int | None = None) -> None:
        """Makes what is pending part of the buffer, durably and as a whole, and evicts what is over capacity.

        Args:
            counters: kept in the manifest; they replace earlier ones of the same names.
            end_round: mark this round complete.

        Raises:
            OSError: the disk is full, or broken. The last commit is whole and what is pending is still in memory, so
                that `commit` can be called again; after an interruption too.
        """
        self._check_writable()
        self._finish_commit()
        m = self._state.manifest
        counters = {name: int(count) for name, count in (counters or {}).items()}
        end_round = None if end_round is None else int(end_round)
        rounds, end = dict(m.rounds), m.end
        for batch, number in self._pending:
            end += len(batch)
            rounds[number] = (end, rounds.get(number, (end, False))[1])
        if end_round is not None:
            rounds[end_round] = (rounds.get(end_round, (m.end, False))[0], True)
        changed = replace(m, end=end, rounds=rounds, counters={**m.counters, **counters})
        if changed == m:
            return
        pictures = {path: png for path, png in self._pending_pictures.items() if path not in self._references}
        batches = [batch for batch, _ in self._pending]
        size = sum(map(len, pictures.values())) + sum(batch.nbytes for batch in batches)
        with self._explaining_a_full_disk(size):
            self._write_pictures(pictures)
            self._commit(changed, pa.concat_batches(batches) if batches else None)

    def add_offline(self, dataset: datasets.Dataset, index: EpisodeIndex) -> None:
        """Copies a validated trajectory dataset in, as rows 0, 1, 2, ..., and commits. It may be larger than memory.

        Columns that it lacks are filled as `Turn` and `Episode` are, columns that a trajectory dataset has not are
        left out. If the offline part is this dataset already, nothing is done.

        Args:
            index: what `validate_trajectories(dataset)` returned.

        Raises:
            ValueError: another offline part is there, or online episodes are; images for a buffer without.
        """
        self._check_writable()
        m = self._state.manifest
        if len(dataset) != index.num_rows:
            raise ValueError(f"The index is of {index.num_rows} rows, the dataset has {len(dataset)}: validate it.")
        fingerprint = fingerprint_of(dataset, index)
        if m.num_offline and m.fingerprint == fingerprint:
            return
        if m.num_offline or m.end or self._pending:
            what = "another offline dataset" if m.num_offline else "online episodes, and the offline part comes first"
            raise ValueError(f"{self.folder} already holds {what}: use the same dataset as before, or a new folder.")
        if not self.with_images and "images" in dataset.column_names:
            raise ValueError(f"The dataset has images, {self.folder} holds turns without: open a new folder.")
        path = self._shard_path(0, len(dataset))
        with self._explaining_a_full_disk(dataset.data.nbytes):
            known: set[str] = set()
            with path.open("wb") as file, pa.ipc.new_stream(file, self._schema) as writer:
                with tqdm(total=len(dataset), desc="copying offline data", unit="turn", delay=3) as bar:
                    for table in dataset.with_format("arrow").iter(OFFLINE_BATCH):
                        batch, pictures = conformed(table, self._schema, self._png, bar.n)
                        self._write_pictures({path: pictures[path] for path in pictures.keys() - known})
                        known |= pictures.keys()
                        writer.write_batch(batch)
                        bar.update(len(table))
            flush(path)
            flush(path.parent)
            rows = len(dataset)
            shards = ((path.name, 0, rows),)
            self._write_manifest(
                replace(m, num_offline=rows, fingerprint=fingerprint, start=rows, end=rows, shards=shards)
            )
        self._open()

    def _commit(self, m: Manifest, new: pa.RecordBatch | None) -> None:
        """Commits new rows and the manifest `m`, whose `start` and `shards` are still the last commit's."""
        old = self._state
        columns, first_online = old.columns, old.first_online
        shards = [shard for shard in old.shards if shard.first < m.num_offline or shard.end > m.start]
        if new is not None:
            online = [shard for shard in shards if shard.first >= m.num_offline]
            count = mergeable(online, new, math.inf if self.capacity is None else self.capacity / 8)
            first = max(online[-count].first, m.start) if count else old.manifest.end
            path = self._shard_path(first, m.end)
            write_file(path, serialized(pa.concat_batches([*old.slices(first, old.manifest.end), new])))
            flush(path.parent)
            shards = [*shards[: len(shards) - count], open_shard(path, first)]
            columns, first_online = self._extended(new)
        state = State(m, tuple(shards), m.start, columns, first_online)
        start = state.start(m.end, self.capacity)
        live = [(s.name, s.first, s.end - s.first) for s in shards if s.first < m.num_offline or s.end > start]
        state = replace(state, manifest=replace(m, start=start, shards=tuple(live)))
        self._write_manifest(state.manifest)

        self._state = state
        # From here on the rows are committed. Should anything end this before its last line, `_finish_commit` counts.
        self._references.update(pictures_of(state.slices(old.manifest.end, m.end)))
        evicted = list(state.slices(m.start, start))
        self._ids -= ids_of(evicted)
        unused = set()
        for picture, count in pictures_of(evicted).items():
            self._references[picture] -= count
            if not self._references[picture]:
                del self._references[picture]
                unused.add(picture)
        self._delete(f"shards/{name}" for name in {s[0] for s in m.shards} - {s[0] for s in live})
        self._delete(self._unused - self._references.keys())
        self._unused = unused
        self._pending, self._pending_pictures = [], {}
        self._counted = state

    def _count(self) -> None:
        """What the live rows refer to, from the rows themselves."""
        state, m = self._state, self._state.manifest
        live = [*state.slices(0, m.num_offline), *state.slices(m.start, m.end)]
        self._ids, self._references = ids_of(live), pictures_of(live)
        self._counted = state

    def _finish_commit(self) -> None:
        """Where a commit was interrupted after its rows had become part of the buffer: they are pending no more."""
        if self._counted is not self._state:
            self._pending, self._pending_pictures = [], {}
            self._count()

    def _extended(self, new: pa.RecordBatch) -> tuple[dict[str, np.ndarray], int]:
        """The columns with new rows at their end, and the first online row in them."""
        m, columns, first_online = self._state.manifest, self._state.columns, self._state.first_online
        used = m.num_offline + m.end - first_online
        added = columns_of([new], self.gamma)
        if used + len(new) > len(columns["turn"]):  # longer arrays, without the rows that are gone
            kept = np.r_[0 : m.num_offline, used - (m.end - m.start) : used]
            used, first_online = len(kept), m.start
            space = np.zeros(used // 2 + len(new) + 1024, dtype=np.int8)
            columns = {name: np.append(values[kept], space.astype(values.dtype)) for name, values in columns.items()}
        for name, values in added.items():
            columns[name][used : used + len(new)] = values
        return columns, first_online

    # -- files --------------------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._lock is None or self._lock.closed:
            why = "opened read-only" if self.read_only else "closed" if self._lock is None else "opened by the parent"
            raise RuntimeError(f"The replay buffer {self.folder} was {why}: open it for writing, here.")

    def _make(self, with_images: bool) -> None:
        """An empty buffer, if there is none."""
        if not (self.folder / "manifest.json").exists():
            others = {path.name for path in self.folder.iterdir()} - {"lock", "manifest.json.part"}
            if others:
                raise FileExistsError(
                    f"{self.folder} has no manifest.json but holds {sorted(others)[0]}: give the replay buffer a "
                    "folder of its own."
                )
            self._write_manifest(Manifest(with_images))

    def _open(self) -> None:
        """Reads what is committed; a writer counts what refers to each picture, and removes what nothing refers to."""
        self._state = self._load()
        if self._lock is not None:
            self._count()
            self._sweep()

    def _load(self) -> State:
        path, seen = self.folder / "manifest.json", ""
        while True:
            text = path.read_text(encoding="utf-8")
            m = Manifest.from_json(json.loads(text), path)
            try:
                shards = tuple(open_shard(self.folder / "shards" / name, first) for name, first, _ in m.shards)
                break
            except FileNotFoundError:
                if text == seen:
                    raise
                seen = text  # a writer has gone on in the meantime: look again
        first = next((shard.first for shard in shards if shard.first >= m.num_offline), m.start)
        columns = columns_of([batch for shard in shards for batch in shard.batches], self.gamma)
        return State(m, shards, m.start, columns, first)

    def _shard_path(self, first: int, end: int) -> Path:
        """Where the rows first..end - 1 go. No two commits' shards have a name in common, those of retries may."""
        (self.folder / "shards").mkdir(exist_ok=True)
        return self.folder / "shards" / f"{first:012d}-{end:012d}.arrow"

    def _write_manifest(self, manifest: Manifest) -> None:
        write_file(self.folder / "manifest.json", json.dumps(manifest.as_json()).encode())
        flush(self.folder)

    def _write_pictures(self, pictures: Mapping[str, bytes]) -> None:
        for folder in {os.path.dirname(path) for path in pictures}:
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda path: write_file(self.folder / path, pictures[path]), pictures))

    def _delete(self, paths: Iterable[str]) -> None:
        """What cannot be deleted now goes when the buffer is opened the next time."""
        for path in paths:
            with suppress(OSError):
                (self.folder / path).unlink()

    def _sweep(self) -> None:
        """Removes what an interrupted commit has left."""
        known = {f"shards/{name}" for name, _, _ in self._state.manifest.shards}
        shards = [f"shards/{path.name}" for path in (self.folder / "shards").glob("*")]
        self._delete(path for path in shards if path not in known)
        for folder in (self.folder / "images").glob("*/"):
            paths = [f"images/{folder.name}/{name}" for name in os.listdir(folder)]
            self._delete(path for path in paths if path not in self._references)
        self._delete(["manifest.json.part"])

    @contextmanager
    def _explaining_a_full_disk(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"the disk is full: {self.folder} needs {size / 1e6:,.1f} MB more and has "
                f"{shutil.disk_usage(self.folder).free / 1e6:,.1f} MB. Nothing that was committed is lost, and "
                f"{self.pending_turns} pending turns are in memory: make room (or lower `capacity`) and call again.",
            ) from error


def load_replay(folder: str | os.PathLike, part: Part = "all") -> datasets.Dataset:
    """The rows of a replay buffer, as they stand now, as a trajectory dataset (see `ReplayBuffer.dataset`); of a run
    of several processes, those of all of them."""
    parts = sorted(Path(folder).glob("process-*-of-*"), key=lambda path: int(path.name.split("-")[1]))
    found = [ReplayBuffer(path, read_only=True).dataset(part) for path in parts or [Path(folder)]]
    return datasets.concatenate_datasets(found) if len(found) > 1 else found[0]


def process_folder(folder: str | os.PathLike, process: int, num_processes: int) -> Path:
    """Where a process of a distributed run keeps its part of the buffer: the folder itself if it is the only one.

    Raises:
        ValueError: the folder holds the buffer of a run with another number of processes.
    """
    folder = Path(folder)
    found = {int(path.name.split("-")[-1]) for path in folder.glob("process-*-of-*")}
    found |= {1} if (folder / "manifest.json").is_file() else set()
    if found - {num_processes}:
        raise ValueError(
            f"{folder} holds the replay buffer of a run with {min(found - {num_processes})} process(es), and this one "
            f"has {num_processes}: start as many as before, or choose another `replay_dir`."
        )
    return folder if num_processes == 1 else folder / f"process-{process}-of-{num_processes}"
