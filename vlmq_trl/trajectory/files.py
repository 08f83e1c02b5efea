# SPDX-License-Identifier: Apache-2.0
"""Trajectory datasets on disk, and datasets made of others.

Contents: `save_trajectories`, `load_trajectories`, `concatenate_trajectories`, `filter_top_returns`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import embed_table_storage

from .validation import TrajectoryError, rounding, validate_trajectories

# Words by which files of parquet say of which split they are.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "holdout", "heldout"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
UNFINISHED = ".unfinished-"


def save_trajectories(ds: datasets.Dataset, path: str | os.PathLike, *, file_format: str = "arrow") -> None:
    """Write a dataset to the folder `path`: "arrow" (`save_to_disk`, memory-mapped when loaded) or "parquet" (smaller,
    and what the Hub streams). A dataset of the same format that is there already is replaced, as soon as the new one
    is whole; where it is open, this one too, it can be read on.

    Raises:
        TypeError: `ds` is no `datasets.Dataset`.
        ValueError: an unknown format.
        FileExistsError: the folder holds a dataset in other files, which `load_trajectories` would read as well.
    """
    if not isinstance(ds, datasets.Dataset):
        raise TypeError(
            f"save_trajectories takes a datasets.Dataset, got {type(ds).__name__}. Save each split of a DatasetDict "
            "by itself; episodes become a dataset by `dataset_from_episodes(episodes)`, a stream by "
            "`dataset_from_episodes(episodes_from_dataset(stream))`."
        )
    if file_format not in ("arrow", "parquet"):
        raise ValueError(f"file_format must be 'arrow' or 'parquet', got {file_format!r}.")
    folder = Path(path)
    own = folder / "train-00000-of-00001.parquet"
    others = [folder / "state.json", *folder.glob("**/*.parquet")]
    ours = folder / "state.json" if file_format == "arrow" else own
    foreign = [file.name for file in others if file.exists() and file != ours]
    if foreign:
        raise FileExistsError(
            f"{folder} holds another dataset ({foreign[0]}); save to a new folder, or remove that dataset first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{UNFINISHED}*"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as work:
        if file_format == "arrow":
            ds.save_to_disk(work)
            _take_over(Path(work), folder)
        else:
            # Images that are files of their own, as a replay buffer's, go into the parquet file.
            cache = {"cache_file_name": f"{work}/embedded.arrow", "desc": "taking the images in"}
            # An Arrow batch holds 2 GiB at most.
            embedded = ds.with_format("arrow").map(embed_table_storage, batched=True, batch_size=50, **cache)
            # Not called .parquet: a kill may leave it, and `load_trajectories` reads what is.
            embedded.with_format(None).to_parquet(f"{work}/whole", batch_size=500)
            os.replace(f"{work}/whole", own)


def _take_over(new: Path, folder: Path) -> None:
    """Moves what `save_to_disk` wrote in `new` to `folder`. `state.json`, which lists the data files, comes last: up
    to then the dataset that was there is the one that is loaded (if its columns are the same)."""
    old = json.loads((folder / "state.json").read_text())["_data_files"] if (folder / "state.json").exists() else []
    state = json.loads((new / "state.json").read_text())
    for file in state["_data_files"]:
        name = f"data-{uuid.uuid4().hex}.arrow"  # the old ones' names are taken
        os.replace(new / file["filename"], folder / name)
        file["filename"] = name
    (new / "state.json").write_text(json.dumps(state, indent=2))
    if _features(new) != _features(folder):
        os.replace(new / "dataset_info.json", folder / "dataset_info.json")
    os.replace(new / "state.json", folder / "state.json")
    for file in old:
        (folder / file["filename"]).unlink(missing_ok=True)


def load_trajectories(path: str | os.PathLike, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset from a folder that `save_trajectories` wrote, or from a folder or file of parquet.

    Args:
        streaming: give an `IterableDataset`, read piece by piece (for `episodes_from_dataset`). Without it the dataset
            has random access and is memory-mapped, so it too may be larger than memory.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: the names of the parquet files tell several splits, such as train and test.
    """
    files = trajectory_files(path)
    if files[0].name == "state.json":
        ds = _loaded(files[0])
        return ds.to_iterable_dataset() if streaming else ds
    return datasets.load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", streaming=streaming
    )


def _features(folder: Path) -> Any:
    info = folder / "dataset_info.json"
    return json.loads(info.read_text())["features"] if info.is_file() else None


def _loaded(state: Path) -> datasets.Dataset:
    """The dataset on disk; where another took its place meanwhile, that one."""
    while True:
        found = state.read_bytes()
        try:
            return datasets.load_from_disk(str(state.parent))
        except (FileNotFoundError, ValueError):
            if state.read_bytes() == found:
                raise


def trajectory_files(path: str | os.PathLike) -> list[Path]:
    """What `load_trajectories(path)` reads: the `state.json` of a dataset on disk, or files of parquet.

    Raises:
        FileNotFoundError, ValueError: as `load_trajectories`.
    """
    folder = Path(path)
    if (folder / "state.json").is_file():
        return [folder / "state.json"]
    if folder.is_file() and folder.suffix == ".parquet":
        return [folder]
    files = sorted(folder.glob("**/*.parquet"))
    if not files:
        if (folder / "dataset_dict.json").is_file():
            raise FileNotFoundError(f"{folder} holds a DatasetDict: give the folder of one of its splits.")
        raise FileNotFoundError(
            f"No trajectories at {folder}: neither a dataset saved by save_trajectories nor parquet files."
        )
    splits = {_split_of(file.relative_to(folder)) or "no split named": file for file in files}
    if len(splits) > 1:
        told = ", ".join(f"{file.relative_to(folder)} ({split})" for split, file in sorted(splits.items()))
        raise ValueError(
            f"{folder} holds files of several splits, {told}, which would become one dataset. Give one file, or a "
            "folder with the files of one split."
        )
    return files


def _split_of(file: Path) -> str | None:
    """The split that a file's name, or else that of a folder around it, tells.

    >>> _split_of(Path("data/test/part-0.parquet")), _split_of(Path("play.parquet"))
    ('test', None)
    """
    for part in reversed(file.parts):
        words = set(re.split(r"[\W_\d]+", part.lower()))
        found = next((split for split, known in SPLITS.items() if words & set(known)), None)
        if found:
            return found
    return None


def concatenate_trajectories(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """One dataset of the given ones, in order. Where an episode id occurs in two of them, the ids of all become
    "<position>/<id>".

    Raises:
        TrajectoryError: no dataset, or datasets with different columns or types.
    """
    if not parts:
        raise TrajectoryError("there are no datasets to concatenate.")
    for k, part in enumerate(parts):
        if part.features != parts[0].features:
            here, there = set(part.column_names), set(parts[0].column_names)
            raise TrajectoryError(
                f"dataset {k} has other features than dataset 0 (only there: {sorted(there - here)}, only here: "
                f"{sorted(here - there)}); cast it with ds.cast(features), or rebuild it with with_images=True."
            )
    ids = [set(part.unique("episode_id")) for part in parts]
    if sum(map(len, ids)) != len(set().union(*ids)):
        renamed = []
        for k, part in enumerate(parts):
            names = pa.array([f"{k}/{name}" for name in part.with_format(None)["episode_id"]], type=pa.string())
            renamed.append(part.remove_columns("episode_id").add_column("episode_id", names))
        parts = renamed
    return datasets.concatenate_datasets(list(parts))


def filter_top_returns(ds: datasets.Dataset, fraction: float, seed: int = 0) -> datasets.Dataset:
    """The ceil(fraction * E) episodes with the highest undiscounted returns, whole and in the dataset's order.

    Ties at the cut are broken at random, by `seed`, so that no part of the dataset is favoured; returns that differ by
    the rounding of rewards to float32 alone tie. For return-filtered cloning.

    Raises:
        ValueError: a fraction outside (0, 1].
        TrajectoryError: a dataset that does not validate.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")
    index = validate_trajectories(ds, check_images="none", require_final_observation=False)
    keep = math.ceil(fraction * len(index) - 1e-9)
    tie = np.random.default_rng(seed).permutation(len(index))
    # Ranks from the highest return on; the next one begins where two returns are further apart than by rounding.
    order = np.argsort(-index.returns)
    off = rounding(index.reward, index.first_row)[order]
    rank = np.zeros(len(index), dtype=np.int64)
    rank[order[1:]] = np.cumsum(-np.diff(index.returns[order]) > (off[:-1] + off[1:]) / 2)
    best = np.lexsort((tie, rank))[:keep]
    chosen = np.zeros(len(index), dtype=bool)
    chosen[best] = True
    return ds.select(np.flatnonzero(chosen[index.row_episode]))
