# SPDX-License-Identifier: Apache-2.0
"""The trajectory dataset's schema, and episodes as Python records: into a dataset, and out of it.

Contents: `trajectory_features`, `FEATURES`; `Turn`, `Episode`; `flatten_content`; `dataset_from_episodes`,
`dataset_until_error`, `episodes_from_dataset`, `episodes_of`.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.util import Finalize
from numbers import Integral, Real
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import numpy as np
import PIL.Image
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from .validation import (
    LARGEST_REWARD,
    MESSAGE_KEYS,
    NOT_KEPT,
    NOT_SHOWN,
    PNG_MODES,
    ROLES,
    UNSEEN_MODE,
    TrajectoryError,
    undiscounted,
)

Message = dict[str, Any]


def trajectory_features(with_images: bool = True) -> datasets.Features:
    """The dataset's features; without images, message contents are strings and the image columns are absent."""
    string = datasets.Value("string")
    content = datasets.List({"type": string, "text": string}) if with_images else string
    prompt = datasets.List({"role": string, "content": content})
    images = datasets.List(datasets.Image())
    columns: dict[str, Any] = {
        "prompt": prompt,
        "images": images,
        "completion": datasets.List({"role": string, "content": string}),
        "episode_id": string,
        "turn": datasets.Value("int32"),
        "reward": datasets.Value("float32"),
        "terminated": datasets.Value("bool"),
        "truncated": datasets.Value("bool"),
        "final_prompt": prompt,
        "final_images": images,
        "action": string,
        "valid": datasets.Value("bool"),
        "behavior_logprobs": datasets.List(datasets.Value("float32")),
        "env_id": string,
        "seed": datasets.Value("int64"),
    }
    if not with_images:
        del columns["images"], columns["final_images"]
    return datasets.Features(columns)


FEATURES = trajectory_features()
IMAGE = datasets.Image()
ROWS_AT_ONCE, BYTES_AT_ONCE = 500, 2**28  # written to the disk: an Arrow batch holds 2 GiB at most


# ---------------------------------------------------------------------------------------------------------------------
# Episodes as Python records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One turn: the prompt seen, the raw response given, and the reward it earned."""

    prompt: list[Message]
    images: list  # PIL images or uint8 arrays [H, W, 3], in the order of the prompt's image parts
    completion: str
    reward: float
    action: str = ""  # the parsed action; "" when the response did not parse
    valid: bool = True
    behavior_logprobs: list[float] | None = None  # per completion token, end token included
    read_right: bool | None = None  # whether the response reads the state as it is; None: not known


@dataclass(frozen=True)
class Episode:
    """The turns of one episode, and how it ended."""

    episode_id: str
    turns: tuple[Turn, ...]
    terminated: bool
    truncated: bool
    final_prompt: list[Message] | None = None  # the observation after a truncated last turn
    final_images: list | None = None
    env_id: str = ""
    seed: int = -1

    @property
    def return_(self) -> float:
        """Undiscounted sum of rewards; 0 where only the rounding of float32, which datasets hold, is left of it."""
        reward = np.array([float(turn.reward) for turn in self.turns])
        return float(undiscounted(reward, np.zeros(1, np.int64))[0]) if self.turns else 0.0

    @property
    def success(self) -> bool:
        """Whether the undiscounted return is positive."""
        return self.return_ > 0

    @property
    def valid_rate(self) -> float:
        """Fraction of turns with a valid response."""
        return sum(turn.valid for turn in self.turns) / len(self.turns) if self.turns else 0.0

    @property
    def reading_rate(self) -> float:
        """Fraction of right readings among the turns of which it is known; NaN without such."""
        known = [turn.read_right for turn in self.turns if turn.read_right is not None]
        return sum(known) / len(known) if known else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


def flatten_content(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages whose contents are strings: the text parts joined by newlines. For text-only tokenizers' templates.

    Raises:
        TrajectoryError: there is an image part.
    """
    flat = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            if any(part["type"] == "image" for part in content):
                raise TrajectoryError("an image part cannot be shown to a text-only model.", column="prompt")
            content = "\n".join(part["text"] for part in content)
        flat.append({"role": message["role"], "content": content})
    return flat


def has_image_parts(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the messages say where their pictures stand."""
    contents = (message["content"] for message in messages)
    return any(part["type"] == "image" for content in contents if not isinstance(content, str) for part in content)


def _structured(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[Message]:
    """Messages whose contents are lists of {"type", "text"} parts; images precede the first string user message,
    as in `trl.data_utils.prepare_multimodal_messages`, unless there are image parts."""
    result, placed = [], has_image_parts(messages)
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            parts: list[Message] = [{"type": "text", "text": content}]
            if message["role"] == "user" and not placed:
                parts = [{"type": "image", "text": None}] * num_images + parts
                placed = True
        else:
            parts = [{"type": part["type"], "text": part.get("text")} for part in content]
        result.append({"role": message["role"], "content": parts})
    return result


def without_nulls(messages: Sequence[Mapping[str, Any]] | None) -> list[Message] | None:
    """Messages as they come out of Arrow, without what is null in their parts, such as the `text` of images."""
    if messages is None:
        return None
    result: list[Message] = []
    for message in messages:
        content = message["content"]
        if content is not None and not isinstance(content, str):
            content = [{key: value for key, value in part.items() if value is not None} for part in content]
        result.append({"role": message["role"], "content": content})
    return result


def _check_messages(messages: Any, num_images: int, *, row: int, column: str) -> None:
    """Raise unless `messages` is a prompt that ends with the user's (or a tool's) message and shows every image."""

    def fail(problem: str) -> None:
        raise TrajectoryError(problem, row=row, column=column)

    if not isinstance(messages, Sequence) or isinstance(messages, str):
        fail(
            f"expected a list of messages like [{{'role': 'user', 'content': ...}}], got {type(messages).__name__}; "
            "wrap plain text in a user message."
        )
    if not messages:
        fail("there is no message; a prompt needs at least one user message.")
    placeholders, plain_user = 0, False
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            fail("every message needs the keys 'role' and 'content'.")
        if message["role"] not in ROLES:
            fail(f"unknown role {message['role']!r}; use one of {', '.join(ROLES)}.")
        others = sorted(key for key, value in message.items() if key not in MESSAGE_KEYS and value is not None)
        if others:
            fail(f"a message's {others[0]!r} {NOT_KEPT}")
        content = message["content"]
        if content is None:
            fail("a message's content is null; write the text, or '' for none.")
        if isinstance(content, str):
            plain_user |= message["role"] == "user"
            continue
        if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
            fail("a message's content is neither a string nor a list of parts like {'type': 'text', 'text': ...}.")
        for part in content:
            kind = part.get("type")
            if kind == "image":
                if part.get("image") is not None:
                    fail(
                        "an image stands inside the messages; put it into the turn's `images` and keep the part bare."
                    )
                if message["role"] == "tool":
                    fail(f"an image part in a tool message, {NOT_SHOWN}")
                placeholders += 1
            elif kind == "text":
                if not isinstance(part.get("text"), str):
                    fail("a text part has no text.")
            else:
                fail(f"unknown content part {kind!r}; use 'text' or 'image'.")
    if messages[-1]["role"] not in ("user", "tool"):
        fail(f"the last message is the {messages[-1]['role']}'s; a prompt ends with a user (or tool) message.")
    if placeholders != num_images and not (plain_user and placeholders == 0):
        fail(f"{placeholders} image parts for {num_images} images; give one image part for each image.")


# ---------------------------------------------------------------------------------------------------------------------
# Building and reading
# ---------------------------------------------------------------------------------------------------------------------

_temporary: dict[int, Path] = {}  # process id -> folder of datasets built without cache_dir


def _temporary_folder() -> Path:
    """A folder of this process, removed when the process (not a fork of it) exits, unless it is killed."""
    pid = os.getpid()
    if pid not in _temporary:
        folder = Path(tempfile.mkdtemp(prefix="vlmq_trl-"))
        _temporary[pid] = folder
        # A forked worker of multiprocessing ends without `atexit`.
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        Finalize(None, remove, exitpriority=0)
        atexit.register(lambda: remove() if os.getpid() == pid else None)
    return _temporary[pid]


def in_png_mode(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of a dataset, in RGB if it is of a mode that PNG has not (print's CMYK): as processors see it too."""
    return picture if picture.mode in PNG_MODES else picture.convert("RGB")


class _PngCache:
    """PNG bytes of images; the last distinct ones, `max_bytes` in all, are remembered, since environments repeat
    pictures."""

    def __init__(self, max_bytes: int = 2**26):
        self.max_bytes, self.bytes = max_bytes, 0
        self.store: dict[tuple, dict[str, Any]] = {}

    def __call__(self, image: Any, *, row: int, column: str) -> dict[str, Any]:
        def fail(problem: str) -> None:
            raise TrajectoryError(problem, row=row, column=column)

        key = None
        if isinstance(image, PIL.Image.Image):
            pil = image
            try:
                pil.load()  # an image that was opened from a file is read only now
            except Exception as error:
                fail(f"the image does not decode ({type(error).__name__}: {error}); restore it or drop the episode.")
            if pil.mode not in PNG_MODES:
                fail(f"the image is of mode {pil.mode!r}, {UNSEEN_MODE}")
            raw: Any = pil.tobytes() if pil.mode in ("L", "RGB", "RGBA") else None
            shape: tuple = (pil.mode, pil.size)
        else:
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
                fail(
                    f"expected a PIL image or a uint8 array [H, W, 3], got {array.dtype} of shape {list(array.shape)}."
                )
            raw, shape, pil = np.ascontiguousarray(array), array.shape, None
        if raw is not None:
            key = (shape, hashlib.sha256(raw).digest())
            if key in self.store:
                return self.store[key]
        pil = PIL.Image.fromarray(raw) if pil is None else pil
        buffer = io.BytesIO()
        pil.save(buffer, format="PNG", compress_level=3)
        encoded: dict[str, Any] = {"bytes": buffer.getvalue(), "path": None}
        if key is not None:
            self.store[key] = encoded
            self.bytes += len(encoded["bytes"])
            while self.bytes > self.max_bytes:
                self.bytes -= len(self.store.pop(next(iter(self.store)))["bytes"])
        return encoded


def _encodable(text: Any, *, row: int, column: str) -> str:
    """`text` if it is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise TrajectoryError(f"expected a string, got {type(text).__name__}.", row=row, column=column)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TrajectoryError(
            f"not valid Unicode (a lone surrogate at position {error.start}); decode responses with errors='replace'.",
            row=row,
            column=column,
        ) from None
    return text


def _pictures(given: Any, *, row: int, column: str) -> list:
    """A turn's images as a list; None is none."""
    if given is None:
        return []
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise TrajectoryError(
            f"expected a list of images, got {type(given).__name__}; put a single image into a list, and make one of "
            "a stack by `list(stack)`.",
            row=row,
            column=column,
        )
    return list(given)


def _episode_rows(episode: Episode, first_row: int, with_images: bool, png: _PngCache) -> Iterator[dict[str, Any]]:
    """The encoded rows of one episode, checked."""
    last = len(episode.turns) - 1
    if last < 0:
        raise TrajectoryError(
            f"episode {episode.episode_id!r} has no turns; leave it out.", row=first_row, column="turn"
        )
    if not (episode.terminated or episode.truncated):
        raise TrajectoryError(
            f"episode {episode.episode_id!r} is neither terminated nor truncated; set one of them (truncated for a "
            "time limit or an interrupted episode, with its final observation).",
            row=first_row + last,
            column="terminated",
        )
    if not isinstance(episode.seed, Integral) or not -(2**63) <= episode.seed < 2**63:
        raise TrajectoryError(
            f"expected an int64 (-1 where there is none), got {episode.seed!r}.", row=first_row, column="seed"
        )
    for k, turn in enumerate(episode.turns):
        row = first_row + k
        if not isinstance(turn.reward, Real):
            raise TrajectoryError(
                f"the reward is a {type(turn.reward).__name__}; it must be a number (of a tensor: `.item()`).",
                row=row,
                column="reward",
            )
        if not abs(turn.reward) <= LARGEST_REWARD:
            raise TrajectoryError(
                f"the reward is {turn.reward}; it must be finite, in float32 too.", row=row, column="reward"
            )

        def messages(value, images, column, row=row):
            _check_messages(value, len(images), row=row, column=column)
            for message in value:
                content = message["content"]
                for text in [content] if isinstance(content, str) else [p["text"] for p in content if p.get("text")]:
                    _encodable(text, row=row, column=column)
            if with_images:
                return _structured(value, len(images))
            if images:
                raise TrajectoryError(
                    "an image in a text-only dataset; build it with with_images=True.", row=row, column=column
                )
            return flatten_content(value)

        final = k == last and episode.final_prompt is not None
        images = _pictures(turn.images, row=row, column="images")
        final_images = _pictures(episode.final_images, row=row, column="final_images") if final else []
        try:
            given = turn.behavior_logprobs
            log_probs = None if given is None else [float(one) for one in given]
        except (TypeError, ValueError) as error:
            raise TrajectoryError(
                f"expected a list of numbers, or None where they are not known ({error}).",
                row=row,
                column="behavior_logprobs",
            ) from None
        encoded = {
            "prompt": messages(turn.prompt, images, "prompt"),
            "completion": [
                {"role": "assistant", "content": _encodable(turn.completion, row=row, column="completion")}
            ],
            "episode_id": episode.episode_id,
            "turn": k,
            "reward": float(turn.reward),
            "terminated": bool(episode.terminated and k == last),
            "truncated": bool(episode.truncated and k == last),
            "final_prompt": messages(episode.final_prompt, final_images, "final_prompt") if final else None,
            "action": _encodable(turn.action, row=row, column="action"),
            "valid": bool(turn.valid),
            "behavior_logprobs": log_probs,
            "env_id": _encodable(episode.env_id, row=row, column="env_id"),
            "seed": episode.seed,
        }
        if with_images:
            encoded["images"] = [png(image, row=row, column="images") for image in images]
            encoded["final_images"] = (
                [png(image, row=row, column="final_images") for image in final_images] if final else None
            )
        yield encoded


def dataset_from_episodes(
    episodes: Iterable[Episode],
    *,
    cache_dir: str | os.PathLike | None = None,
    with_images: bool | None = None,
    desc: str | None = None,
) -> datasets.Dataset:
    """A trajectory dataset from episodes, written to disk as they come, so that it may be larger than memory.

    Args:
        episodes: any iterable, read once.
        cache_dir: where the Arrow file is written; by default a temporary folder that is removed when the process
            ends (`save_trajectories` keeps a dataset).
        with_images: whether the dataset has image columns; by default, whether the first episode shows an image.
        desc: label of a progress bar over episodes; no bar without it.

    Raises:
        TrajectoryError: a bad episode, naming the row, the column and what to do; nothing is left on disk.
    """
    path, error = _write(tqdm(episodes, desc=desc, unit="episode") if desc else episodes, cache_dir, with_images)
    if error is not None:
        path.unlink(missing_ok=True)
        raise error
    return datasets.Dataset.from_file(str(path))


def dataset_until_error(
    episodes: Iterable[Episode], cache_dir: str | os.PathLike | None = None
) -> tuple[datasets.Dataset, BaseException | None]:
    """As `dataset_from_episodes`, but the episodes before an error, or Ctrl-C, are kept.

    Returns:
        Their dataset, and the error; it is raised if there are none.
    """
    path, error = _write(episodes, cache_dir, None)
    if error is not None and not path.is_file():
        raise error
    return datasets.Dataset.from_file(str(path)), error


def _write(
    episodes: Iterable[Episode], cache_dir: str | os.PathLike | None, with_images: bool | None
) -> tuple[Path, BaseException | None]:
    """Writes the episodes that come before an error, if any do.

    Returns:
        The Arrow file, and the error.
    """
    source = iter(episodes)
    first = next(source, None)
    if first is None:
        raise TrajectoryError("there are no episodes; an empty dataset cannot be trained on.")
    if with_images is None:
        with_images = any(_pictures(turn.images, row=k, column="images") for k, turn in enumerate(first.turns))
    folder = Path(cache_dir) if cache_dir is not None else _temporary_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trajectories-{uuid.uuid4().hex}.arrow"
    partial = path.with_suffix(".partial")
    png = _PngCache()
    seen: set[str] = set()
    rows = waiting = weight = whole = 0  # the last: bytes of the file, up to the end of an episode
    error: BaseException | None = None
    torn = False  # what follows those bytes may be half a batch
    writer = ArrowWriter(path=str(partial), features=trajectory_features(with_images), writer_batch_size=sys.maxsize)
    try:
        for episode in chain([first], source):
            name = _encodable(episode.episode_id, row=rows, column="episode_id")
            if name in seen:
                raise TrajectoryError(
                    f"episode_id {name!r} occurs twice; ids must be unique within a dataset.",
                    row=rows,
                    column="episode_id",
                )
            seen.add(name)
            encoded = list(_episode_rows(episode, rows, with_images, png))
            with _interrupts_wait():
                if weight and weight + sum(map(_picture_bytes, encoded)) > BYTES_AT_ONCE:
                    torn = True
                    waiting, weight, whole = 0, 0, _flush(writer)
                    torn = False
                for row in encoded:
                    writer.write(row)
                    rows, waiting, weight = rows + 1, waiting + 1, weight + _picture_bytes(row)
                    if weight >= BYTES_AT_ONCE:  # of this episode alone
                        torn = True  # until its end
                        weight = 0
                        _flush(writer)
                if torn or waiting >= ROWS_AT_ONCE:
                    torn = True
                    waiting, weight, whole = 0, 0, _flush(writer)
                    torn = False
    except BaseException as stopped:
        error = stopped
    try:
        with _interrupts_wait():
            if not torn:
                try:
                    whole = _flush(writer)
                    writer.finalize()
                except Exception as stopped:
                    error, torn = error or stopped, True
            if torn:  # a full disk: what has reached it is kept
                with suppress(Exception):
                    writer.close()
                os.truncate(partial, whole)
            if whole:
                os.replace(partial, path)
    except KeyboardInterrupt as stopped:
        error = error or stopped
    finally:
        partial.unlink(missing_ok=True)
    return path, error


def _picture_bytes(row: Mapping[str, Any]) -> int:
    return sum(len(image["bytes"]) for name in ("images", "final_images") for image in row.get(name) or ())


def _flush(writer: ArrowWriter) -> int:
    """The bytes of the file then."""
    writer.write_examples_on_file()
    writer.stream.flush()
    return writer.stream.tell()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is heeded where the block ends. (It comes to the main thread alone.)"""
    heeded = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(heeded):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heeded)
    if came:
        heeded(*came[-1])


def episodes_from_dataset(ds: datasets.Dataset | datasets.IterableDataset) -> Iterator[Episode]:
    """The dataset's episodes, in order, one in memory at a time; images come as PIL images. Takes streams too.

    Raises:
        TrajectoryError: `turn` does not count 0, 1, 2, ... within an episode, or an episode does not end.
    """

    def decoded(row: dict[str, Any]) -> dict[str, Any]:
        for name in ("images", "final_images"):
            if row.get(name):  # as files, where the dataset does not decode them or a stream does not know them
                row[name] = [IMAGE.decode_example(one) if isinstance(one, dict) else one for one in row[name]]
        return row

    return episodes_of(map(decoded, ds.with_format(None)))


def episodes_of(dataset_rows: Iterable[dict[str, Any]]) -> Iterator[Episode]:
    """The episodes of a dataset's rows, images as they are there. Raises as `episodes_from_dataset`."""

    def finish(rows: list[dict[str, Any]], at: int) -> Episode:
        last = rows[-1]
        if not (last["terminated"] or last["truncated"]):
            raise TrajectoryError(
                f"episode {last['episode_id']!r} stops here without `terminated` or `truncated`; drop the episode, "
                "or mark it truncated and give its final observation.",
                row=at,
                column="terminated",
            )
        return Episode(
            episode_id=last["episode_id"],
            turns=tuple(
                Turn(
                    prompt=without_nulls(row["prompt"]) or [],
                    images=list(row.get("images") or []),
                    completion=row["completion"][0]["content"],
                    reward=float(row["reward"]),
                    action=row.get("action") or "",
                    valid=bool(row.get("valid", True)),
                    behavior_logprobs=row.get("behavior_logprobs"),
                )
                for row in rows
            ),
            terminated=bool(last["terminated"]),
            truncated=bool(last["truncated"]),
            final_prompt=without_nulls(last.get("final_prompt")),
            final_images=last.get("final_images"),
            env_id=last.get("env_id") or "",
            seed=-1 if last.get("seed") is None else int(last["seed"]),
        )

    rows: list[dict[str, Any]] = []
    i = -1
    for i, row in enumerate(dataset_rows):
        if rows and row["episode_id"] != rows[-1]["episode_id"]:
            yield finish(rows, i - 1)
            rows = []
        if row["turn"] != len(rows):
            raise TrajectoryError(
                f"turn {row['turn']} of episode {row['episode_id']!r} stands where turn {len(rows)} belongs; keep an "
                "episode's rows contiguous and in order.",
                row=i,
                column="turn",
            )
        rows.append(row)
    if rows:
        yield finish(rows, i)
