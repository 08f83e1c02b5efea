# SPDX-License-Identifier: Apache-2.0
"""From rows of a trajectory dataset to padded tensors: segments, their bootstrap states, one batch.

`SegmentSampler` orders the rows so that each segment's turns are neighbours, `SegmentDataset` reads a batch of rows
and sees which of them follow one another, `VLMQDataCollator` turns them into tensors through TRL's own collator.

A batch of `per_device_train_batch_size` turns is R rows with a completion, then one completion-free row for each
segment that needs a bootstrap state. A batch boundary may cut a segment: its halves simply become two segments.

Axes: B rows of the batch (R turns, then the bootstrap rows), T tokens, S segments, A action tokens.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, List
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from .agent_format import AgentFormat
from .chat import as_messages, chat_text, pictures, text_tokens, turn_processor
from .trajectory import EpisodeIndex

TURN_COLUMNS = ("prompt", "images", "completion", "final_prompt", "final_images", "behavior_logprobs")


class SegmentSampler(Sampler[int]):
    """Row indices of one epoch: every turn once, segments of at most `segment_length` turns in random order.

    Segments that follow one another, as all of an episode do without `shuffle`, join up as far as the batch reaches.
    Each epoch cuts the episodes at new places. The order depends on `seed` and the epoch alone, so that a resumed run
    sees what an uninterrupted one would have.

    Args:
        multiple: an epoch leaves out what is over a multiple of this number of turns: of a batch for each of several
            processes, where accelerate would repeat turns to fill the last. Each epoch leaves out others.

    Raises:
        ValueError: there are fewer turns than `multiple`.
    """

    def __init__(self, index: EpisodeIndex, segment_length: int, seed: int, shuffle: bool = True, multiple: int = 1):
        self.first_row, self.length = np.asarray(index.first_row), np.asarray(index.length)
        self.segment_length, self.seed, self.shuffle, self.epoch = segment_length, seed, shuffle, 0
        turns = int(self.length.sum())
        self.turns = turns // multiple * multiple
        if not self.turns:
            raise ValueError(
                f"The training data has {turns} turns, and one batch for each process takes {multiple}: lower "
                "`per_device_train_batch_size`, or start fewer processes."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.turns

    def __iter__(self) -> Iterator[int]:
        return islice(self._rows(), self.turns)

    def _rows(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        n = self.segment_length
        # An episode's first segment is 1..n turns long, so that cuts fall everywhere over the epochs.
        first = rng.integers(1, n + 1, len(self.length)) if self.shuffle else np.full(len(self.length), n)
        count = 1 + np.maximum(0, -(-(self.length - first) // n))
        episode = np.repeat(np.arange(len(count)), count)
        k = np.arange(len(episode)) - np.repeat(np.cumsum(count) - count, count)
        start = np.where(k == 0, 0, first[episode] + (k - 1) * n)
        stop = np.minimum(np.where(k == 0, first[episode], start + n), self.length[episode])
        order = rng.permutation(len(episode)) if self.shuffle else np.arange(len(episode))
        for s in order:
            row = self.first_row[episode[s]]
            yield from range(int(row + start[s]), int(row + stop[s]))


class SegmentDataset(TorchDataset):
    """Reads batches of rows of a validated trajectory dataset, with each segment's bootstrap observation.

    Items are dictionaries: the row's columns, and `row`, `reward`, `terminated`, `segment` (index within the batch),
    `return_to_go` (the data's own discounted return from this turn on) and `bootstrap` (None, or the `prompt` and
    `images` of the state that follows the segment; always None without `with_bootstrap`).

    Args:
        gamma: discount of `return_to_go`.
        with_bootstrap, bootstrap_truncated: as in `segment_items`.
    """

    def __init__(
        self,
        dataset: Dataset,
        index: EpisodeIndex,
        gamma: float,
        with_bootstrap: bool = True,
        bootstrap_truncated: bool = True,
    ):
        self.dataset = dataset.with_format(None).select_columns([c for c in TURN_COLUMNS if c in dataset.column_names])
        for name in ("images", "final_images"):
            if not getattr(getattr(self.dataset.features.get(name), "feature", None), "decode", True):
                self.dataset = self.dataset.cast_column(name, List(Image()))
        self.index = index
        self.with_bootstrap, self.bootstrap_truncated = with_bootstrap, bootstrap_truncated
        self.return_to_go = index.returns_to_go(gamma)
        self.sampler: SegmentSampler | None = None

    def set_epoch(self, epoch: int) -> None:
        """For its sampler, which accelerate does not find where several processes resume."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        return segment_items(
            rows, self.index, self.return_to_go, self._read, self.with_bootstrap, self.bootstrap_truncated
        )

    def _read(self, rows: list[int]) -> list[dict[str, Any]]:
        columns = self.dataset[rows]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def segment_items(
    rows: Sequence[int] | np.ndarray,
    scalars: Any,
    return_to_go: Any,
    read: Callable[[list[int]], list[dict[str, Any]]],
    with_bootstrap: bool = True,
    bootstrap_truncated: bool = True,
) -> list[dict[str, Any]]:
    """The collator's items of the given rows, in order; neighbours of one episode become one segment.

    Args:
        rows: row numbers; a row that follows its predecessor in the data, within an episode, continues its segment.
        scalars: an `EpisodeIndex` or a `ReplayBuffer`: its `turn`, `reward`, `terminated` and `truncated` are asked.
        return_to_go: of each row; takes an array of row numbers.
        read: row numbers -> records with the columns of `TURN_COLUMNS`.
        with_bootstrap: whether segments that do not end their episode carry the observation after them.
        bootstrap_truncated: False has truncated episodes end as terminated ones do, with nothing beyond.
    """
    numbers = np.asarray(rows, dtype=np.int64)
    turn, reward = scalars.turn[numbers], scalars.reward[numbers]
    terminated, truncated, to_go = scalars.terminated[numbers], scalars.truncated[numbers], return_to_go[numbers]
    if not bootstrap_truncated:
        terminated = terminated | truncated
    follows = np.zeros(len(numbers), dtype=bool)
    follows[1:] = (numbers[1:] == numbers[:-1] + 1) & (turn[1:] > 0)
    ends = np.append(~follows[1:], True) & with_bootstrap
    successors = numbers[ends & ~terminated & ~truncated] + 1
    records = read([*numbers.tolist(), *successors.tolist()])
    following = iter(records[len(numbers) :])
    segment = np.cumsum(~follows) - 1
    items = []
    for i, record in enumerate(records[: len(numbers)]):
        final = {"prompt": record.pop("final_prompt", None), "images": record.pop("final_images", None) or []}
        bootstrap = None
        if ends[i] and not terminated[i]:
            if truncated[i]:
                bootstrap = final
            else:
                successor = next(following)
                bootstrap = {"prompt": successor["prompt"], "images": successor.get("images") or []}
        items.append(
            {
                **record,
                "row": int(numbers[i]),
                "segment": int(segment[i]),
                "reward": float(reward[i]),
                "terminated": bool(terminated[i]),
                "return_to_go": float(to_go[i]),
                "bootstrap": bootstrap,
            }
        )
    return items


@dataclass
class VLMQDataCollator:
    """Items of `SegmentDataset` -> one batch.

    Rows are rendered and tokenised by TRL's collators, so that the tensors of the R turn rows are those that stock
    `SFTTrainer` would see, but for what `chat_text` says of "thinking" models.

    Args:
        processing_class: a processor, or a tokenizer for text-only models.
        max_length: longest row in tokens; None for no limit. A longer row is an error, never cut: its end carries the
            reward.
        pad_to_multiple_of: text-only models.
        action_format: marks the tokens from where a response comes to its action; None: no mark.

    Returns (from calling it):
        `input_ids`, `attention_mask`, `labels` [B, T] and the family's own tensors; `bootstrap_mask` [B, T] bool;
        `turn_row`, `turn_segment`, `turn_reward`, `turn_terminated`, `turn_return_to_go` [R]; `segment_bootstrap` [S]
        row of `bootstrap_mask`'s True entries that follows each segment, -1 for none; `behavior_log_probs` [A], NaN
        where unknown, only if the data has any; `action_mask` [A] bool, only with `action_format`.

    Raises:
        ValueError: a row too long, without action tokens, or with more behaviour log-probabilities than tokens.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    action_format: AgentFormat | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        bootstraps = [item["bootstrap"] for item in items if item["bootstrap"] is not None]
        rows = [(item["prompt"], item.get("images"), item["completion"]) for item in items]
        rows += [(b["prompt"], b["images"], None) for b in bootstraps]
        batch = self.tokenize(rows)
        labels = batch["labels"]
        turns = len(items)
        labels[turns:] = -100
        counts = (labels[:turns] != -100).sum(1)
        self._check(items, batch["attention_mask"], counts)

        batch["bootstrap_mask"] = torch.zeros_like(labels, dtype=torch.bool)
        if bootstraps:
            # Padding may be on either side: the last attended position is the state that generation starts from.
            width = labels.shape[1]
            last = width - 1 - batch["attention_mask"][turns:].flip(1).argmax(1)
            batch["bootstrap_mask"][torch.arange(turns, len(rows)), last] = True
        batch["turn_row"] = torch.tensor([item["row"] for item in items])
        batch["turn_segment"] = torch.tensor([item["segment"] for item in items])
        batch["turn_reward"] = torch.tensor([item["reward"] for item in items], dtype=torch.float32)
        batch["turn_terminated"] = torch.tensor([item["terminated"] for item in items])
        batch["turn_return_to_go"] = torch.tensor([item["return_to_go"] for item in items], dtype=torch.float32)
        segment_bootstrap = torch.full((items[-1]["segment"] + 1,), -1)
        ends = [item["segment"] for item in items if item["bootstrap"] is not None]
        segment_bootstrap[ends] = torch.arange(len(ends))
        batch["segment_bootstrap"] = segment_bootstrap
        if any(item.get("behavior_logprobs") is not None for item in items):
            batch["behavior_log_probs"] = self._behavior_log_probs(items, counts)
        if self.action_format is not None:
            responses = [row[row != -100].tolist() for row in labels[:turns]]
            starts = [self._action_start(self.action_format, tokens) for tokens in responses]
            batch["action_mask"] = torch.cat(
                [torch.arange(len(tokens)) >= start for tokens, start in zip(responses, starts, strict=True)]
            )
        return batch

    def _action_start(self, action_format: AgentFormat, tokens: list[int]) -> int:
        """The first token that a response chooses once it has come to its action, or its last where it ends there; all
        of them if it never does."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)

        def reached(count: int) -> bool:
            return action_format.reaches_action(tokenizer.decode(tokens[:count], skip_special_tokens=True))

        if not reached(len(tokens)):
            return 0
        return bisect.bisect_left(range(len(tokens) - 1), True, key=reached)

    def tokenize(self, rows: list[tuple[list[dict], list | None, list[dict] | None]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` [B, T] and the family's own tensors of rows: prompt, images and
        completion, None for a bootstrap row."""
        batch = self._tokenize([self._render(*row) for row in rows])
        batch["labels"][:, 0] = -100
        return batch

    def _render(self, prompt: list[dict], images: list | None, completion: list[dict] | None) -> dict[str, Any]:
        """One row as text and images; a bootstrap row has an empty completion."""
        images = pictures(images or ())
        example = {"prompt": as_messages(prompt, self.processing_class, images)}
        if completion is not None:
            example["completion"] = as_messages(completion, self.processing_class)
        return {"completion": "", **chat_text(example, self.processing_class), "images": images}

    def _tokenize(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if isinstance(self.processing_class, ProcessorMixin):
            collate = DataCollatorForVisionLanguageModeling(
                turn_processor(self.processing_class), max_length=None, completion_only_loss=True
            )
            return dict(collate(rows))
        examples = []
        for row in rows:
            prompt, completion = text_tokens(self.processing_class, row["prompt"], row["completion"])
            examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        pad_token_id = self.processing_class.pad_token_id
        collate = DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        return dict(collate(examples))

    def _check(self, items: list[dict[str, Any]], attention_mask: torch.Tensor, counts: torch.Tensor) -> None:
        if (counts == 0).any():
            row = items[int((counts == 0).nonzero()[0])]["row"]
            raise ValueError(
                f"Row {row}, column `completion`: it renders to no token, so there is no action to learn from. Drop "
                "the row, or use a chat template that ends an assistant message with an end-of-turn token."
            )
        lengths = attention_mask[: len(items)].sum(1)
        if self.max_length is not None and (lengths > self.max_length).any():
            i = int(lengths.argmax())
            raise ValueError(
                f"Row {items[i]['row']} is {int(lengths[i])} tokens long, over `max_length={self.max_length}`. "
                "Cutting it would lose its end, which carries the reward: raise `max_length`, or set it to None."
            )

    def _behavior_log_probs(self, items: list[dict[str, Any]], counts: torch.Tensor) -> torch.Tensor:
        packed = []
        for item, count in zip(items, counts.tolist(), strict=True):
            recorded = item.get("behavior_logprobs")
            recorded = [] if recorded is None else list(recorded)
            if len(recorded) > count:
                raise ValueError(
                    f"Row {item['row']}, column `behavior_logprobs`: {len(recorded)} values for {count} completion "
                    "tokens. They must be recorded with this model's tokenizer."
                )
            # Text that the chat template adds after the end of turn was never sampled.
            packed += recorded + [math.nan] * (count - len(recorded))
        return torch.tensor(packed, dtype=torch.float32)
