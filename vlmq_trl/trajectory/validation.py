# SPDX-License-Identifier: Apache-2.0
"""Validation of a trajectory dataset, and the index of its episodes.

Everything is checked on whole Arrow columns, so a million rows take seconds; only images are read one by one.

Contents: `TrajectoryError`, `rounding`, `undiscounted`, `EpisodeIndex`, `validate_trajectories`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

REQUIRED_COLUMNS = ("prompt", "completion", "episode_id", "turn", "reward", "terminated", "truncated")
TEMPLATE_COLUMNS = ("chat_template_kwargs", "tools")  # which TRL hands to the chat template
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content")
NOT_KEPT = "would be lost, and is nowhere in play; write it into the content."
NOT_SHOWN = "where TRL shows no picture; show it in a user message."
UNSEEN_MODE = (
    "which processors do not show as it is (16-bit grey becomes white); convert it to 8 bits, as 'L' or 'RGB'."
)
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
PICTURE_MODES = (*PNG_MODES, "CMYK", "YCbCr")
LARGEST_REWARD = float(np.finfo(np.float32).max)
IMAGE_SAMPLE = 64  # rows of each image column that validate_trajectories(check_images="sample") looks at
IMAGE_BATCH = 64  # rows whose images are in memory at once


class TrajectoryError(ValueError):
    """Bad trajectory data; the message names the row and the column, and says what to do."""

    def __init__(self, problem: str, *, row: int | None = None, column: str | None = None):
        self.row, self.column = row, column
        where = [f"row {row}"] if row is not None else []
        where += [f"column `{column}`"] if column is not None else []
        super().__init__(f"{', '.join(where)}: {problem}" if where else problem)


def rounding(reward: np.ndarray, first_row: np.ndarray) -> np.ndarray:
    """[E] by how much each episode's return may be off, since datasets hold rewards in float32.

    Rounding changes a reward r by at most 2^-24 |r|; this is twice the sum of that over an episode.
    """
    return 2.0**-23 * np.add.reduceat(np.abs(reward), first_row)


def undiscounted(reward: np.ndarray, first_row: np.ndarray) -> np.ndarray:
    """[E] the sum of each episode's rewards, exactly 0 where it is below `rounding`: -0.1, -0.1, -0.1 and 0.3 are 7e-9
    in float32, and a return above 0 is a success."""
    returns = np.add.reduceat(reward, first_row)
    return np.where(np.abs(returns) < rounding(reward, first_row), 0.0, returns)


@dataclass(frozen=True)
class EpisodeIndex:
    """Where the episodes of a validated dataset are, and the scalars of its rows.

    Axes: E episodes in the dataset's order, R rows.
    """

    episode_ids: np.ndarray  # [E] str
    first_row: np.ndarray  # [E] int64
    length: np.ndarray  # [E] int64, turns
    returns: np.ndarray  # [E] float64, undiscounted, 0 where only rounding is left
    success: np.ndarray  # [E] bool, returns > 0
    row_episode: np.ndarray  # [R] int64, the episode of each row
    turn: np.ndarray  # [R] int64
    reward: np.ndarray  # [R] float64
    terminated: np.ndarray  # [R] bool
    truncated: np.ndarray  # [R] bool
    _order: np.ndarray = field(repr=False)  # [R] rows by increasing distance to their episode's end

    def __len__(self) -> int:
        return len(self.first_row)

    @property
    def num_rows(self) -> int:
        return len(self.turn)

    @property
    def last_row(self) -> np.ndarray:
        """[E] int64."""
        return self.first_row + self.length - 1

    def returns_to_go(self, gamma: float) -> np.ndarray:
        """[R] float64, G_k = r_k + gamma * G_{k+1} within each episode; nothing is bootstrapped after the last row."""
        result = self.reward.copy()
        to_end = (self.first_row + self.length - 1)[self.row_episode] - np.arange(self.num_rows)
        bounds = np.cumsum(np.bincount(to_end[self._order])) if self.num_rows else np.zeros(1, dtype=np.int64)
        for low, high in pairwise(bounds):
            rows = self._order[low:high]
            result[rows] += gamma * result[rows + 1]
        return result


class _Columns:
    """A dataset's columns as Arrow arrays of the dataset's own rows; selections do not copy the base table.

    Facts are computed on whole base columns and then indexed, so that images behind a selection are never copied.
    """

    def __init__(self, ds: datasets.Dataset):
        self.table, self.features = ds.data.table, ds.features
        self.indices = None if ds._indices is None else ds._indices.column(0).to_numpy()

    def fact(self, column: str, function: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
        """`function` of each chunk of the column, concatenated, one value per row of the dataset."""
        chunks = [function(chunk) for chunk in self.table.column(column).chunks]
        values = np.concatenate(chunks) if chunks else np.zeros(0)
        return values if self.indices is None else values[self.indices]

    def null(self, column: str) -> np.ndarray:
        """[R] bool."""
        return self.fact(column, lambda chunk: pc.is_null(chunk).to_numpy(zero_copy_only=False))


def _first(mask: np.ndarray) -> int | None:
    """The first row where `mask` is True, or None."""
    return int(mask.argmax()) if mask.any() else None


def _fail(mask: np.ndarray, column: str, problem: str) -> None:
    row = _first(mask)
    if row is not None:
        raise TrajectoryError(problem, row=row, column=column)


def _lengths(lists: pa.Array) -> np.ndarray:
    """[R] int, the lengths of R lists; 0 for a null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)


def _per_parent(lists: pa.Array, flags: np.ndarray) -> np.ndarray:
    """[R] int, how many items of each of R lists are flagged (or the sum of flags). flags: [N] over all items."""
    parents = np.repeat(np.arange(len(lists)), _lengths(lists))
    return np.bincount(parents, weights=flags, minlength=len(lists)).astype(np.int64)


def _bools(values: pa.Array) -> np.ndarray:
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool)


def _others(messages: pa.Array) -> np.ndarray:
    """[N] bool, whether a message holds something else than `MESSAGE_KEYS`."""
    held = np.zeros(len(messages), dtype=bool)
    for name in {one.name for one in messages.type} - set(MESSAGE_KEYS):
        held |= pc.is_valid(pc.struct_field(messages, name)).to_numpy(zero_copy_only=False)
    return held


def _message_facts(chunk: pa.Array) -> np.ndarray:
    """Structural facts of each prompt of a chunk, as int32 [R, 8].

    Columns: messages, messages with an unknown role, null contents, bad parts, image parts (-1: placed by TRL before
    the first string user message), whether the last role is the user's or a tool's, tool messages with image parts,
    messages with something else than `MESSAGE_KEYS`.
    """
    facts = np.zeros((len(chunk), 8), dtype=np.int32)
    facts[:, 0] = _lengths(chunk)
    messages = chunk.flatten()
    role, content = pc.struct_field(messages, "role"), pc.struct_field(messages, "content")
    known = _bools(pc.is_in(role, value_set=pa.array(ROLES, type=role.type)))
    asks = _bools(pc.is_in(role, value_set=pa.array(("user", "tool"), type=role.type)))
    facts[:, 1] = _per_parent(chunk, ~known)
    null = pc.is_null(content).to_numpy(zero_copy_only=False)
    facts[:, 2] = _per_parent(chunk, null)
    facts[:, 7] = _per_parent(chunk, _others(messages))
    if _is_list(content.type):
        parts = content.flatten()
        kind, text = pc.struct_field(parts, "type"), pc.struct_field(parts, "text")
        is_image = _bools(pc.equal(kind, "image"))
        if parts.type.get_field_index("image") >= 0:
            is_image &= pc.is_null(pc.struct_field(parts, "image")).to_numpy(zero_copy_only=False)
        is_text = _bools(pc.equal(kind, "text")) & ~pc.is_null(text).to_numpy(zero_copy_only=False)
        facts[:, 3] = _per_parent(chunk, _per_parent(content, ~(is_image | is_text)) > 0)
        shown = _per_parent(content, is_image)
        facts[:, 4] = _per_parent(chunk, shown)
        facts[:, 6] = _per_parent(chunk, (shown > 0) & _bools(pc.equal(role, "tool")))
    else:
        user = _bools(pc.equal(role, "user"))
        facts[:, 4] = np.where(_per_parent(chunk, user) > 0, -1, 0)
    last = np.cumsum(facts[:, 0]) - 1
    nonempty = facts[:, 0] > 0
    facts[nonempty, 5] = asks[last[nonempty]]
    return facts


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _message_keys(kind: pa.DataType) -> set[str] | None:
    """The messages' keys in a list of messages; None for another type."""
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return None
    return {kind.value_type.field(i).name for i in range(kind.value_type.num_fields)}


def _check_prompts(columns: _Columns, column: str, image_column: str | None, skip: np.ndarray) -> None:
    """Raise at the first bad prompt of `column`; rows in `skip` [R] are null by right."""
    kind = columns.table.schema.field(column).type
    names = _message_keys(kind)
    if names is None:
        raise TrajectoryError(
            f"expected a list of messages like [{{'role': 'user', 'content': ...}}], found {kind}; wrap plain text in "
            "a user message.",
            column=column,
        )
    if not {"role", "content"} <= names:
        raise TrajectoryError(
            f"messages need the keys 'role' and 'content', found {sorted(names)}; rename them.", column=column
        )
    content = kind.value_type.field("content").type
    if _is_list(content):
        part = content.value_type
        if not pa.types.is_struct(part) or part.get_field_index("type") < 0 or part.get_field_index("text") < 0:
            raise TrajectoryError(
                f"content parts need the keys 'type' and 'text', found {part}; write "
                "{'type': 'text', 'text': ...} and {'type': 'image', 'text': None}.",
                column=column,
            )
    elif not _is_string(content):
        raise TrajectoryError(f"a message's content is a string or a list of parts, found {content}.", column=column)

    facts = columns.fact(column, _message_facts)
    keep = ~skip
    messages, unknown, null, bad, shown, asks, by_tool, others = facts.T
    _fail(keep & (messages == 0), column, "there is no message; a prompt needs at least one user message.")
    _fail(keep & (unknown > 0), column, f"a message's role is unknown or null; use one of {', '.join(ROLES)}.")
    _fail(keep & (null > 0), column, "a message's content is null; write the text, or '' for none.")
    problem = "a content part is neither {'type': 'image'}, its picture apart, nor {'type': 'text', 'text': ...}."
    _fail(keep & (bad > 0), column, problem)
    _fail(keep & (by_tool > 0), column, f"an image part in a tool message, {NOT_SHOWN}")
    _fail(keep & (others > 0), column, f"a message's {', '.join(sorted(names - set(MESSAGE_KEYS)))} {NOT_KEPT}")
    _fail(
        keep & (asks == 0),
        column,
        "the last message is not the user's; a prompt ends with a user (or tool) message, the answer is `completion`.",
    )
    if image_column is None:
        _fail(keep & (shown > 0), column, "an image part, but the dataset has no `images`; add them or drop the part.")
        return
    given = columns.fact(image_column, _lengths)
    row = _first(keep & (shown >= 0) & (shown != given))
    if row is not None:
        raise TrajectoryError(
            f"{shown[row]} image parts for {given[row]} images in `{image_column}`; give one part for each image.",
            row=row,
            column=column,
        )


def _check_completions(columns: _Columns) -> None:
    column = "completion"
    kind = columns.table.schema.field(column).type
    names = _message_keys(kind)
    if names is None:
        raise TrajectoryError(
            f"expected a list with one assistant message, found {kind}; write "
            "[{'role': 'assistant', 'content': response}].",
            column=column,
        )
    if not {"role", "content"} <= names:
        raise TrajectoryError("the message needs the keys 'role' and 'content'; rename them.", column=column)
    if not _is_string(kind.value_type.field("content").type):
        raise TrajectoryError(
            f"the response must be a string, found {kind.value_type.field('content').type}; join its text parts.",
            column=column,
        )

    def facts(chunk: pa.Array) -> np.ndarray:
        result = np.zeros((len(chunk), 4), dtype=np.int32)
        result[:, 0] = _lengths(chunk)
        messages = chunk.flatten()
        role, content = pc.struct_field(messages, "role"), pc.struct_field(messages, "content")
        result[:, 1] = _per_parent(chunk, ~_bools(pc.equal(role, "assistant")))
        result[:, 2] = _per_parent(chunk, pc.is_null(content).to_numpy(zero_copy_only=False))
        result[:, 3] = _per_parent(chunk, _others(messages))
        return result

    count, other, null, more = columns.fact(column, facts).T
    _fail(count != 1, column, "expected exactly one message, the assistant's; past turns belong in `prompt`.")
    _fail(other > 0, column, "the message's role is not 'assistant'.")
    _fail(null > 0, column, "the response is null; write '' for an empty response.")
    _fail(more > 0, column, f"the message's {', '.join(sorted(names - set(MESSAGE_KEYS)))} {NOT_KEPT}")


def _check_image_column(columns: _Columns, column: str, nullable: bool) -> None:
    kind = columns.table.schema.field(column).type
    if not isinstance(getattr(columns.features[column], "feature", None), datasets.Image):
        raise TrajectoryError(
            f"expected a list of images, found {kind}; cast with ds.cast_column({column!r}, "
            "datasets.List(datasets.Image())).",
            column=column,
        )
    if not nullable:
        _fail(columns.null(column), column, "null; write an empty list for a prompt without images.")

    def missing(chunk: pa.Array) -> np.ndarray:
        images = chunk.flatten()
        absent = pc.is_null(pc.struct_field(images, "bytes"))
        if kind.value_type.get_field_index("path") >= 0:
            absent = pc.and_(absent, pc.is_null(pc.struct_field(images, "path")))
        return _per_parent(chunk, absent.to_numpy(zero_copy_only=False)) > 0

    _fail(columns.fact(column, missing), column, "an image is null; drop the episode or restore the image.")


def _check_image(image: dict) -> None:
    """Raise whatever Pillow raises at an image that is broken: of a PNG the checksums, of others every pixel."""
    source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    with PIL.Image.open(source) as picture:
        if picture.mode not in PICTURE_MODES:
            raise ValueError(f"it is of mode {picture.mode!r}, {UNSEEN_MODE}")
        if picture.format == "PNG":  # thirty times faster than its pixels
            picture.verify()
        else:
            picture.load()


def _check_images(ds: datasets.Dataset, column: str, rows: np.ndarray, known: set[bytes]) -> None:
    """Raise at the first broken image of `rows`; `known` holds digests of images that have been checked already."""
    undecoded = ds.select_columns([column]).with_format("arrow")
    batches = [rows[start : start + IMAGE_BATCH] for start in range(0, len(rows), IMAGE_BATCH)]
    bar = tqdm(total=len(rows), desc=f"checking {column}", unit="row", delay=3, leave=False)
    for batch in batches:
        for row, images in zip(batch, undecoded[batch].column(column).to_pylist(), strict=True):
            for k, image in enumerate(images or []):
                digest = hashlib.sha256(image["bytes"]).digest() if image["bytes"] is not None else None
                if digest in known:
                    continue
                try:
                    _check_image(image)
                except Exception as error:
                    raise TrajectoryError(
                        f"image {k} does not decode ({type(error).__name__}: {error}); drop the episode or restore "
                        "the image.",
                        row=int(row),
                        column=column,
                    ) from None
                if digest is not None:
                    known.add(digest)
        bar.update(len(batch))
    bar.close()


def _scalar(columns: _Columns, column: str, accepts: Callable[[pa.DataType], bool], wanted: str) -> pa.DataType:
    """The column's Arrow type; raises when it is not `wanted` or where there is a null."""
    kind = columns.table.schema.field(column).type
    if not accepts(kind):
        raise TrajectoryError(f"expected {wanted}, found {kind}; cast the column.", column=column)
    _fail(columns.null(column), column, f"null; every row needs {wanted}.")
    return kind


def _numbers(columns: _Columns, column: str, accepts: Callable[[pa.DataType], bool], wanted: str) -> np.ndarray:
    _scalar(columns, column, accepts, wanted)
    return columns.fact(column, lambda chunk: chunk.to_numpy(zero_copy_only=False))


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def validate_trajectories(
    ds: datasets.Dataset, check_images: str = "all", *, require_final_observation: bool = True
) -> EpisodeIndex:
    """Check a trajectory dataset, column by column, and index its episodes.

    Scalars and the structure of messages are checked on every row with columnar operations.

    Args:
        ds: a dataset with random access (a stream has none: read it with `episodes_from_dataset`).
        check_images: "all" reads every distinct image, PNGs by their checksums and others by decoding them; "sample"
            those of 64 rows spread evenly, the first row and the last included; "none" does not look.
        require_final_observation: whether a truncated episode must carry its final observation, from which its last
            turn bootstraps. False suits methods without a critic, and `bootstrap_truncated=False`.

    Raises:
        TrajectoryError: the first problem found, naming row, column and what to do.
    """
    if check_images not in ("all", "sample", "none"):
        raise ValueError(f"check_images must be 'all', 'sample' or 'none', got {check_images!r}.")
    if not isinstance(ds, datasets.Dataset):
        raise TrajectoryError(
            f"validation needs random access, got {type(ds).__name__}; pass a datasets.Dataset (one split), which may "
            "be larger than memory."
        )
    if ds.format["type"] == "custom":
        raise TrajectoryError(
            "the dataset has a transform (`set_transform`, `with_transform`), which training would not apply. Change "
            "the rows with `map`, or take it away (`ds.reset_format()`)."
        )
    missing = [column for column in REQUIRED_COLUMNS if column not in ds.column_names]
    if missing:
        raise TrajectoryError(
            f"the dataset has no such column; it has {ds.column_names}. Rename or add it (build datasets with "
            "dataset_from_episodes).",
            column=missing[0],
        )
    if len(ds) == 0:
        raise TrajectoryError("the dataset has no rows.")
    columns = _Columns(ds)
    rows = len(ds)

    # Episodes: contiguous, counted from 0, ended once.
    _scalar(columns, "episode_id", _is_string, "a string")
    ids = columns.table.column("episode_id").combine_chunks().dictionary_encode()
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    code = ids.indices.to_numpy(zero_copy_only=False)
    code = code if columns.indices is None else code[columns.indices]
    turn = _numbers(columns, "turn", pa.types.is_integer, "an integer").astype(np.int64)
    starts = np.concatenate([[True], (code[1:] != code[:-1])])
    first_row = np.flatnonzero(starts)
    _, first_seen = np.unique(code[first_row], return_index=True)
    if len(first_seen) != len(first_row):
        again = np.ones(len(first_row), dtype=bool)
        again[first_seen] = False
        row = int(first_row[again][0])
        raise TrajectoryError(
            f"episode {ids.dictionary[int(code[row])].as_py()!r} continues here after another episode; keep an "
            "episode's rows contiguous (do not shuffle rows), and ids unique.",
            row=row,
            column="episode_id",
        )
    length = np.diff(np.append(first_row, rows))
    row_episode = np.repeat(np.arange(len(first_row)), length)
    expected = np.arange(rows) - first_row[row_episode]
    wrong = _first(turn != expected)
    if wrong is not None:
        name = ids.dictionary[int(code[wrong])].as_py()
        raise TrajectoryError(
            f"turn {turn[wrong]} of episode {name!r} where turn {expected[wrong]} belongs: a gap, a repeated or "
            "unordered turn, or two episodes with one id. Keep turns 0, 1, 2, ... in order.",
            row=wrong,
            column="turn",
        )
    terminated = _numbers(columns, "terminated", pa.types.is_boolean, "a bool").astype(bool)
    truncated = _numbers(columns, "truncated", pa.types.is_boolean, "a bool").astype(bool)
    is_last = np.zeros(rows, dtype=bool)
    is_last[first_row + length - 1] = True
    for column, flags in (("terminated", terminated), ("truncated", truncated)):
        _fail(
            flags & ~is_last,
            column,
            "true before the episode's last row; only the last turn ends an episode (two ends mean two episodes: give "
            "them their own ids).",
        )
    _fail(
        is_last & ~terminated & ~truncated,
        "terminated",
        "the episode stops here with neither `terminated` nor `truncated`; drop the episode, or mark it truncated and "
        "give its final observation.",
    )
    reward = _numbers(columns, "reward", _is_number, "a number").astype(np.float64)
    wrong = _first(~(np.abs(reward) <= LARGEST_REWARD))
    if wrong is not None:
        raise TrajectoryError(
            f"the reward is {reward[wrong]}; rewards must be finite, in float32 too. Repair the environment or drop "
            "the episode.",
            row=wrong,
            column="reward",
        )

    # What was seen and said.
    nobody = np.zeros(rows, dtype=bool)
    has_images = "images" in ds.column_names
    if "image" in ds.column_names and not has_images:
        raise TrajectoryError(
            "a single picture, as `SFTTrainer` takes it too; put it into `images`, a list: "
            "`ds.map(lambda row: {'images': [row['image']]}, remove_columns='image')`.",
            column="image",
        )
    if has_images:
        _check_image_column(columns, "images", nullable=False)
    _fail(columns.null("prompt"), "prompt", "null; every turn needs its prompt.")
    _check_prompts(columns, "prompt", "images" if has_images else None, nobody)
    _fail(columns.null("completion"), "completion", "null; every turn needs its response.")
    _check_completions(columns)

    # The observation after a truncated last turn.
    needs_final = truncated & ~terminated
    no_final = columns.null("final_prompt") if "final_prompt" in ds.column_names else ~nobody
    if require_final_observation:
        _fail(
            needs_final & no_final,
            "final_prompt",
            "a truncated episode needs the observation after its last turn, to bootstrap from; record it, or, if the "
            "limit belongs to the task, set `terminated` or train with `bootstrap_truncated=False`.",
        )
    _fail(~no_final & ~is_last, "final_prompt", "set before the episode's last row; only the last row may have it.")
    if "final_images" in ds.column_names:
        _check_image_column(columns, "final_images", nullable=True)
    if "final_prompt" in ds.column_names and not no_final.all():
        final_images = "final_images" if "final_images" in ds.column_names else None
        if has_images:
            null = columns.null("final_images") if final_images else ~nobody
            _fail(
                ~no_final & null & (columns.fact("images", _lengths) > 0),
                "final_images",
                "null where the turn shows pictures: the final observation would be seen blind. Give its pictures, or "
                "an empty list if it shows none.",
            )
        _check_prompts(columns, "final_prompt", final_images, no_final)

    # Optional columns; those with other names are nobody's business.
    for column in TEMPLATE_COLUMNS:
        if column in ds.column_names:
            _fail(
                ~columns.null(column),
                column,
                "the chat template would get this in training alone, since a turn that is played has no such column. "
                "Set it in the template, for both: `processing_class.chat_template = '{% set enable_thinking = false "
                "%}' + processing_class.chat_template`, for instance; then drop the column.",
            )
    if "action" in ds.column_names:
        _scalar(columns, "action", _is_string, "a string ('' when nothing was parsed)")
    if "valid" in ds.column_names:
        _scalar(columns, "valid", pa.types.is_boolean, "a bool")
    if "seed" in ds.column_names and not pa.types.is_integer(kind := columns.table.schema.field("seed").type):
        raise TrajectoryError(f"expected an integer (-1 where there is none), found {kind}; cast it.", column="seed")
    if "behavior_logprobs" in ds.column_names:
        _check_logprobs(columns)

    if check_images != "none" and has_images:
        known: set[bytes] = set()
        for column in ("images", "final_images"):
            if column in ds.column_names:
                present = np.flatnonzero(~columns.null(column))
                if check_images == "sample" and len(present) > IMAGE_SAMPLE:
                    present = present[np.linspace(0, len(present) - 1, IMAGE_SAMPLE).astype(int)]
                _check_images(ds, column, present, known)

    returns = undiscounted(reward, first_row)
    to_end = (first_row + length - 1)[row_episode] - np.arange(rows)
    return EpisodeIndex(
        episode_ids=np.asarray(ids.dictionary.to_pylist(), dtype=object)[code[first_row]],
        first_row=first_row,
        length=length,
        returns=returns,
        success=returns > 0,
        row_episode=row_episode,
        turn=turn,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        _order=np.argsort(to_end, kind="stable"),
    )


def _check_logprobs(columns: _Columns) -> None:
    column = "behavior_logprobs"
    kind = columns.table.schema.field(column).type
    if pa.types.is_null(kind):
        return
    if not _is_list(kind) or not _is_number(kind.value_type):
        raise TrajectoryError(
            f"expected a list of floats or null, found {kind}; one log-probability per completion token.",
            column=column,
        )

    def bad(chunk: pa.Array) -> np.ndarray:
        values = pc.cast(chunk.flatten(), pa.float64())
        numbers = values.to_numpy(zero_copy_only=False)  # nulls become NaN
        return _per_parent(chunk, ~(np.isfinite(numbers) & (numbers <= 1e-3))) > 0

    _fail(
        columns.fact(column, bad),
        column,
        "a log-probability is null, not finite or positive; record natural logarithms of probabilities, or null.",
    )
