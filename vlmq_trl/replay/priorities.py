# SPDX-License-Identifier: Apache-2.0
"""Priorities of replayed turns (prioritized experience replay, arXiv 1511.05952), in sum trees."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np


class SumTree:
    """A number >= 0 for each row of a window, and draws in proportion to it.

    Draws and updates take time logarithmic in the window, moving it linear.

    Rows are named as the replay buffer names them: by ids that never change.

    Attributes:
        start, end: the window, rows start..end - 1.
        total: the sum of its priorities.
    """

    def __init__(self) -> None:
        self.start = self.end = 0
        self._tree = np.zeros(2)  # node k is the sum of nodes 2k and 2k + 1; the second half are the leaves

    @property
    def total(self) -> float:
        return float(self._tree[1])

    @property
    def _leaves(self) -> np.ndarray:
        return self._tree[len(self._tree) // 2 :]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._leaves[np.asarray(rows) - self.start]

    def cover(self, start: int, end: int) -> None:
        """Moves the window. Rows that come in get the largest priority that there is (1 where all are 0), so that each
        is likely to be drawn once."""
        if (start, end) == (self.start, self.end):
            return
        values = np.full(end - start, self._leaves.max() or 1.0)
        kept = np.arange(max(start, self.start), min(end, self.end))
        values[kept - start] = self[kept]
        self.place(start, values)

    def place(self, start: int, values: np.ndarray) -> None:
        """Makes the window the rows from `start` on, with these priorities."""
        self.start, self.end = start, start + len(values)
        size = 1 << max(len(values) - 1, 0).bit_length()
        self._tree = np.zeros(2 * size)
        self._leaves[: len(values)] = values
        while size > 1:
            size //= 2
            self._tree[size : 2 * size] = self._tree[2 * size : 4 * size].reshape(-1, 2).sum(1)

    def update(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Sets priorities; rows outside of the window are passed over, of equal rows the last counts."""
        inside = (rows >= self.start) & (rows < self.end)
        nodes = rows[inside] - self.start + len(self._tree) // 2
        self._tree[nodes] = values[inside]
        while len(nodes) and nodes[0] > 1:
            nodes = np.unique(nodes // 2)
            self._tree[nodes] = self._tree[2 * nodes] + self._tree[2 * nodes + 1]

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count] rows, independently, each with probability priority / total. `total` must not be 0."""
        rest = rng.random(count) * self.total
        nodes = np.ones(count, dtype=np.int64)
        while nodes[0] < len(self._tree) // 2:
            left = self._tree[2 * nodes]
            # Where roundings leave a little too much, to the right only if there is something.
            right = (rest >= left) & (self._tree[2 * nodes + 1] > 0)
            rest = np.where(right, rest - left, rest)
            nodes = 2 * nodes + right
        return nodes - len(self._tree) // 2 + self.start


class Priorities:
    """The priorities of a replay buffer's rows: a tree for each of its parts, `offline` and `online`."""

    def __init__(self) -> None:
        self.offline, self.online = SumTree(), SumTree()

    @property
    def mean(self) -> float:
        """Over all rows; 0 if there are none."""
        trees = (self.offline, self.online)
        return sum(tree.total for tree in trees) / max(sum(tree.end - tree.start for tree in trees), 1)

    def update(self, rows: np.ndarray, values: np.ndarray) -> None:
        """As `SumTree.update`."""
        for tree in (self.offline, self.online):
            tree.update(rows, values)

    def save(self, file: str | os.PathLike | IO[bytes]) -> None:
        """For a checkpoint: each part's first row and priorities, as an .npz file."""
        arrays: dict[str, Any] = {}
        for name, tree in (("offline", self.offline), ("online", self.online)):
            arrays |= {f"{name}_start": np.int64(tree.start), name: tree[np.arange(tree.start, tree.end)]}
        np.savez(file, **arrays)

    def load(self, file: str | os.PathLike | IO[bytes]) -> None:
        """What `save` wrote.

        Raises:
            OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: no such file, or not a whole one of these.
        """
        with np.load(file, allow_pickle=False) as saved:
            for name, tree in (("offline", self.offline), ("online", self.online)):
                tree.place(int(saved[f"{name}_start"]), saved[name].astype(np.float64))
