# SPDX-License-Identifier: Apache-2.0
"""Rows of any trajectory dataset as a replay buffer stores them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..trajectory import EpisodeIndex, flatten_content, trajectory_features
from ..trajectory.episodes import _PngCache, _structured, in_png_mode
from .contents import IMAGE_COLUMNS, stored

ABSENT = {"action": "", "valid": True, "env_id": "", "seed": -1}  # as in `Turn` and `Episode`; other columns: null
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def fingerprint_of(dataset: datasets.Dataset, index: EpisodeIndex) -> str:
    """Of all episode ids, rewards, ends, prompts and responses, and of 64 whole rows with their pictures: enough to
    tell datasets apart in seconds."""
    digest = hashlib.sha256(json.dumps([len(dataset), index.episode_ids.tolist()]).encode())
    for values in (index.length, index.reward.astype(np.float32), index.terminated, index.truncated):
        digest.update(np.ascontiguousarray(values).tobytes())
    names = [name for name in trajectory_features(True) if name in dataset.column_names]
    said = [name for name in ("prompt", "completion", "final_prompt") if name in names]
    for table in dataset.select_columns(said).with_format("arrow").iter(batch_size=1000):
        for column in table.columns:
            _update(digest, column.combine_chunks())
    rows = np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))
    for row in dataset.select_columns(names).with_format("arrow")[rows].to_pylist():
        for name in IMAGE_COLUMNS:
            images = row.pop(name, None) or ()
            row[name] = [hashlib.sha256(encoded(image)).hexdigest() for image in images]
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _update(digest: Any, values: pa.Array) -> None:
    """With all values of an array of texts, or of lists and structs of them."""
    if pa.types.is_struct(values.type):
        for member in values.flatten():
            _update(digest, member)
    elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        digest.update(pc.fill_null(pc.list_value_length(values), -1).to_numpy(zero_copy_only=False).astype(np.int64))
        _update(digest, values.flatten())
    else:
        digest.update(json.dumps(values.to_pylist()).encode())


def conformed(
    table: pa.Table, schema: pa.Schema, png: _PngCache, first_row: int
) -> tuple[pa.RecordBatch, dict[str, bytes]]:
    """Rows of any valid trajectory dataset as `schema` has them, and the pictures that they show."""
    pictures: dict[str, bytes] = {}
    images: dict[str, list] = {}
    for name in IMAGE_COLUMNS:
        lists = table[name].to_pylist() if name in table.column_names else [None] * len(table)
        images[name] = [
            given and [stored(as_png(image, png, first_row + k, name), pictures) for image in given]
            for k, given in enumerate(lists)
        ]
    if "images" not in table.column_names:
        images["images"] = [[]] * len(table)

    def column(name: str, kind: pa.DataType) -> Any:
        if name in IMAGE_COLUMNS:
            return images[name]
        if name not in table.column_names:
            return [ABSENT.get(name)] * len(table)
        values = table[name].combine_chunks()
        if values.type == kind or not pa.types.is_list(kind):
            return values.cast(kind, safe=False)
        if name not in ("prompt", "final_prompt"):
            return values.to_pylist()
        if "images" not in schema.names:
            return [messages and flatten_content(messages) for messages in values.to_pylist()]
        shown = images["images" if name == "prompt" else "final_images"]
        return [m and _structured(m, len(given or ())) for m, given in zip(values.to_pylist(), shown, strict=True)]

    columns = [column(one.name, one.type) for one in schema]
    arrays = [pa.array(c, one.type) if isinstance(c, list) else c for c, one in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema), pictures


def as_png(image: dict[str, Any], png: _PngCache, row: int, column: str) -> bytes:
    """The bytes of an image of a dataset: a PNG's own, others' pixels as PNG."""
    data = encoded(image)
    if data.startswith(PNG_SIGNATURE):
        return data
    return png(in_png_mode(datasets.Image().decode_example(image)), row=row, column=column)["bytes"]


def encoded(image: dict[str, Any]) -> bytes:
    """The bytes of an image's file; empty if there is none at hand."""
    if image["bytes"] is not None:
        return image["bytes"]
    return Path(image["path"]).read_bytes() if os.path.isfile(image["path"]) else b""
