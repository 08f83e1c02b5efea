# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and the lock of a folder's one writer."""

from __future__ import annotations

import os
import weakref
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa


def write_file(path: Path, data: bytes) -> None:
    """Writes aside, flushes to the disk and renames: `path` has its old contents or the new ones, never a part."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def serialized(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _close(file: weakref.ref[IO[str]]) -> None:
    held = file()
    if held is not None:
        held.close()


def take_lock(folder: Path) -> IO[str]:
    """The lock file, locked until it is closed or the process ends, however it ends."""
    import fcntl  # not on Windows, where the rest of the package works

    file = (folder / "lock").open("a+", encoding="utf-8")
    # A forked child would hold the lock as well, and beyond its parent's end.
    os.register_at_fork(after_in_child=partial(_close, weakref.ref(file)))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise RuntimeError(
            f"The replay buffer {folder} is being written by another process or object ({owner}): one writer at a "
            "time. End it, use another folder, or open with read_only=True."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file
