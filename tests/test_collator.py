# SPDX-License-Identifier: Apache-2.0
"""Segments, their bootstrap states, and batches: against stock TRL's tensors and the episodes that they come from."""

import copy
import math
from collections import defaultdict

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from tests import tiny_models
from vlmq_trl import make_format
from vlmq_trl.chat import completion_tokens, turn_processor
from vlmq_trl.collator import SegmentDataset, SegmentSampler, VLMQDataCollator
from vlmq_trl.policy import render
from vlmq_trl.rollout import Request
from vlmq_trl.trajectory import Episode, Turn, dataset_from_episodes, validate_trajectories

lengths_of_episodes = st.lists(st.integers(1, 12), min_size=1, max_size=8)
segment_lengths = st.integers(1, 9)
NAN = math.nan

ANSWERS = ("red", '{"thoughts": "", "action": "+"}', "stand", "up down left right")


class Lengths:
    """As much of an `EpisodeIndex` as the sampler needs."""

    def __init__(self, lengths):
        self.length = np.asarray(lengths, dtype=np.int64)
        self.first_row = np.cumsum(self.length) - self.length
        self.row_episode = np.repeat(np.arange(len(lengths)), lengths)


def runs(rows, index):
    """Maximal runs of consecutive rows of one episode."""
    result = []
    for r in rows:
        if result and r == result[-1][-1] + 1 and index.row_episode[r] == index.row_episode[r - 1]:
            result[-1].append(r)
        else:
            result.append([r])
    return result


def cuts(rows, index):
    """{episode: the turns at which a run starts, but 0}."""
    result = defaultdict(list)
    for run in runs(rows, index):
        episode = index.row_episode[run[0]]
        if run[0] > index.first_row[episode]:
            result[int(episode)].append(int(run[0] - index.first_row[episode]))
    return result


# ---- SegmentSampler ----


@given(lengths_of_episodes, segment_lengths, st.integers(0, 2**31), st.integers(0, 50), st.booleans())
def test_an_epoch_has_each_row_once(lengths, n, seed, epoch, shuffle):
    sampler = SegmentSampler(Lengths(lengths), n, seed, shuffle)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler) == sum(lengths)
    assert sorted(rows) == list(range(sum(lengths)))
    assert all(type(r) is int for r in rows)


@given(lengths_of_episodes, segment_lengths, st.integers(0, 2**31), st.integers(0, 50))
def test_segments_are_contiguous_and_cut_every_n_turns(lengths, n, seed, epoch):
    index = Lengths(lengths)
    sampler = SegmentSampler(index, n, seed)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    # After its first cut an episode is cut every n turns, so all its cuts are equal modulo n. (Segments that meet
    # again by chance only take cuts away.)
    for turns in cuts(rows, index).values():
        assert len({turn % n for turn in turns}) == 1
    # And no more often: a first segment of one turn at least, then full ones.
    assert len(runs(rows, index)) <= sum(1 + -(-(m - 1) // n) for m in lengths)


@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_segments_are_at_most_n_turns_long(n):
    # With 300 episodes in random order, hardly any two neighbouring segments meet.
    index = Lengths([20] * 300)
    found = runs(SegmentSampler(index, n, 7), index)
    assert sum(len(run) > n for run in found) <= 0.01 * len(found)
    # And they are no shorter than they must be: a full one but for an episode's first and last.
    assert sum(len(run) == n for run in found) >= 300 * ((20 - n) // n)
    assert all(len(run) == 1 for run in runs(SegmentSampler(Lengths([1] * 300), n, 7), Lengths([1] * 300)))


def test_segments_come_in_random_order():
    index = Lengths([4] * 200)
    order = [index.row_episode[run[0]] for run in runs(SegmentSampler(index, 4, 0), index)]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.15
    # The two ends of an episode are apart: one is not drawn after the other.
    rows = list(SegmentSampler(index, 2, 0))
    place = np.argsort(rows)
    assert np.mean(np.abs(place[index.first_row] - place[index.first_row + 3])) > 100


def test_unshuffled_rows_are_in_order():
    assert list(SegmentSampler(Lengths([3, 1, 5]), 2, 0, shuffle=False)) == list(range(9))


@given(lengths_of_episodes, segment_lengths, st.integers(0, 2**31), st.integers(0, 9))
def test_order_depends_on_seed_and_epoch_alone(lengths, n, seed, epoch):
    index = Lengths(lengths)
    used = SegmentSampler(index, n, seed)
    for past in range(epoch):  # a run that was not interrupted
        used.set_epoch(past)
        list(used)
    used.set_epoch(epoch)
    resumed = SegmentSampler(index, n, seed)
    resumed.set_epoch(epoch)
    rows = list(used)
    assert list(resumed) == rows == list(used)


def test_with_several_processes_nothing_is_repeated():
    index = Lengths([3, 1, 5, 9, 2])  # 20 turns
    left_out = set()
    for epoch in range(30):
        sampler = SegmentSampler(index, 2, 0, multiple=6)
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(sampler) == len(rows) == len(set(rows)) == 18
        left_out |= set(range(20)) - set(rows)
    assert len(left_out) > 10  # others each time
    with pytest.raises(ValueError, match="has 20 turns, and one batch for each process takes 32"):
        SegmentSampler(index, 2, 0, multiple=32)


def test_epochs_and_seeds_differ_in_order_and_cuts():
    index = Lengths([12] * 30)
    sampler = SegmentSampler(index, 4, seed=3)
    found = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    found.append(list(SegmentSampler(index, 4, seed=4)))
    assert len({tuple(rows) for rows in found}) == 7
    assert len({tuple(sorted(cuts(rows, index).items(), key=str).__repr__()) for rows in found}) == 7
    # Cuts fall everywhere: over six epochs, each of the turns 1..11 was one.
    assert {turn for rows in found[:6] for turns in cuts(rows, index).values() for turn in turns} == set(range(1, 12))
    first = [turns[0] for rows in found[:6] for turns in ([sorted(t) for t in cuts(rows, index).values()])]
    assert min(np.bincount(first, minlength=5)[1:5]) > 0.15 * len(first)


# ---- SegmentDataset ----


def picture(k):
    return np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def prompt(name, k):
    """Its length depends on `k`."""
    text = f"what colour is the square {k}?" + " up down" * (k % 5)
    if name in tiny_models.TEXT_NAMES:
        return [{"role": "user", "content": text}]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def episodes(name, endings, logprobs=None):
    """`endings`: (turns, "terminated" or "truncated"). Row r shows prompt and picture r; the observation that ends
    episode e shows 100 + e. Row r's reward is r."""
    row = 0
    for e, (length, ending) in enumerate(endings):
        images = (lambda k: [picture(k)]) if name not in tiny_models.TEXT_NAMES else (lambda k: [])
        truncated = ending == "truncated"
        turns = tuple(
            Turn(
                prompt=prompt(name, r),
                images=images(r),
                completion=ANSWERS[r % len(ANSWERS)],
                reward=float(r),
                behavior_logprobs=None if logprobs is None else logprobs[r],
            )
            for r in range(row, row + length)
        )
        yield Episode(
            episode_id=f"e{e}",
            turns=turns,
            terminated=not truncated,
            truncated=truncated,
            final_prompt=prompt(name, 100 + e) if truncated else None,
            final_images=images(100 + e) if truncated else None,
        )
        row += length


def segments(name, endings, *, gamma=0.5, logprobs=None, **kwargs):
    dataset = dataset_from_episodes(episodes(name, endings, logprobs))
    return SegmentDataset(dataset, validate_trajectories(dataset), gamma, **kwargs)


# Rows 0 1 2 | 3 4 (truncated) | 5
ENDINGS = [(3, "terminated"), (2, "truncated"), (1, "terminated")]


@pytest.fixture(scope="module")
def pictured():
    return segments("idefics3", ENDINGS)


def shown(state):
    """The number that a state shows in its text, checked against its picture."""
    if state is None:
        return None
    text = next(part["text"] for part in state["prompt"][-1]["content"] if part["type"] == "text")
    k = int(text.split("?")[0].split()[-1])
    assert [np.array_equal(np.asarray(image), picture(k)) for image in state["images"]] == [True]
    return k


@pytest.mark.parametrize(
    ("rows", "segment", "bootstrap"),
    [
        ([0, 1, 2], [0, 0, 0], [None, None, None]),  # terminated: nothing follows
        ([0, 1], [0, 0], [None, 2]),  # a cut: the next row's prompt
        ([0], [0], [1]),
        ([3, 4], [0, 0], [None, 101]),  # truncated: the final observation
        ([3], [0], [4]),
        ([4, 5], [0, 1], [101, None]),  # neighbouring rows of two episodes
        ([2, 3], [0, 1], [None, 4]),
        ([1, 0], [0, 1], [2, 1]),  # not in order, so no segment
        ([0, 2], [0, 1], [1, None]),
        ([3, 4, 0, 1, 5, 2], [0, 0, 1, 1, 2, 3], [None, 101, None, 2, None, None]),
        ([0, 0], [0, 1], [1, 1]),
    ],
)
def test_segments_and_bootstraps_of_a_batch(pictured, rows, segment, bootstrap):
    items = pictured.__getitems__(rows)
    assert [item["row"] for item in items] == [shown(item) for item in items] == rows
    assert [item["segment"] for item in items] == segment
    assert [shown(item["bootstrap"]) for item in items] == bootstrap


def test_items_by_hand(pictured):
    assert len(pictured) == 6
    items = pictured.__getitems__(np.arange(6))
    assert [item["reward"] for item in items] == [0, 1, 2, 3, 4, 5]
    assert [item["terminated"] for item in items] == [False, False, True, False, False, True]
    # gamma 0.5: 0 + 0.5 * (1 + 0.5 * 2) = 1, 1 + 1 = 2, 2 | 3 + 0.5 * 4 = 5, 4 | 5
    assert [item["return_to_go"] for item in items] == [1, 2, 2, 5, 4, 5]
    assert items[1]["completion"] == [{"role": "assistant", "content": ANSWERS[1]}]
    assert not {"final_prompt", "final_images", "seed"} & items[4].keys()
    assert pictured[4]["bootstrap"] == pictured.__getitems__([4])[0]["bootstrap"]


def test_a_batch_boundary_cuts(pictured):
    whole = pictured.__getitems__([0, 1, 2])
    halves = [*pictured.__getitems__([0, 1]), *pictured.__getitems__([2])]
    assert [shown(item["bootstrap"]) for item in whole] == [None, None, None]
    assert [shown(item["bootstrap"]) for item in halves] == [None, 2, None]


def test_a_limit_that_belongs_to_the_task_ends_the_return(pictured):
    """Rows 3 and 4 are a truncated episode. What a batch sees of any other is as it was."""
    ended = segments("idefics3", ENDINGS, bootstrap_truncated=False)
    items = ended.__getitems__([3, 4, 0, 5])
    assert [item["terminated"] for item in items] == [False, True, False, True]
    assert [shown(item["bootstrap"]) for item in items] == [None, None, 1, None]
    assert ended.__getitems__([3, 1, 2]) == pictured.__getitems__([3, 1, 2])


def test_without_bootstraps():
    items = segments("llama", ENDINGS, with_bootstrap=False).__getitems__([0, 3, 4])
    assert [item["bootstrap"] for item in items] == [None] * 3
    assert [item["segment"] for item in items] == [0, 1, 1]


@pytest.fixture(scope="module")
def long_text():
    endings = [(1, "truncated"), (4, "terminated"), (6, "truncated"), (1, "terminated"), (3, "terminated")]
    return segments("llama", endings)


@given(st.lists(st.integers(0, 14), min_size=1, max_size=12))
@settings(max_examples=60)
def test_any_batch_of_rows(long_text, rows):
    index = long_text.index
    items = long_text.__getitems__(rows)
    assert items[0]["segment"] == 0
    for i, (row, item) in enumerate(zip(rows, items, strict=True)):
        assert item["row"] == row and item["prompt"][0]["content"].startswith(f"what colour is the square {row}?")
        following = items[i + 1] if i + 1 < len(items) else None
        same = following and rows[i + 1] == row + 1 and index.row_episode[row] == index.row_episode[row + 1]
        if following:
            assert following["segment"] - item["segment"] == (0 if same else 1)
        if same or index.terminated[row]:
            assert item["bootstrap"] is None
        else:
            expected = 100 + index.row_episode[row] if index.truncated[row] else row + 1
            assert f"square {expected}?" in item["bootstrap"]["prompt"][0]["content"]
            assert item["bootstrap"]["images"] == []


# ---- VLMQDataCollator ----


def attended(batch, row):
    return batch["input_ids"][row][batch["attention_mask"][row].bool()]


def generation_ids(processor, state):
    """Token ids that generation starts from, by the stock chat template and processor."""
    prompt = [
        m
        if isinstance(m["content"], str)
        else m | {"content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
        for m in state["prompt"]
    ]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    kwargs = {"images": [state["images"]]} if state["images"] else {}
    inputs = turn_processor(processor)(text=[text], return_tensors="pt", add_special_tokens=False, **kwargs)
    return inputs["input_ids"][0]


@pytest.mark.parametrize("name", tiny_models.VLM_NAMES)
def test_turn_rows_are_those_of_stock_trl(name):
    _, processor = tiny_models.build(name)
    data = segments(name, [(3, "terminated"), (1, "terminated")])
    batch = VLMQDataCollator(processor)(data.__getitems__([0, 1, 2, 3]))
    rows = [{k: data.dataset[r][k] for k in ("prompt", "images", "completion")} for r in range(4)]
    stock = DataCollatorForVisionLanguageModeling(turn_processor(processor), completion_only_loss=True)(rows)
    # No segment needs a bootstrap row, so the batches are equal, picture tensors included.
    assert set(stock) <= set(batch) and "pixel_values" in stock
    for k, v in stock.items():
        assert torch.equal(batch[k], v), k
    assert not batch["bootstrap_mask"].any() and batch["segment_bootstrap"].tolist() == [-1, -1]
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1


def test_paligemmas_rows_are_those_of_its_own_processor():
    """Which makes them, labels and `token_type_ids` too, of a prompt and a suffix."""
    _, processor = tiny_models.build("paligemma")
    data = segments("paligemma", [(3, "terminated"), (1, "terminated")])
    batch = VLMQDataCollator(processor)(data.__getitems__([0, 1, 2, 3]))
    for row in range(4):
        turn = data.dataset[row]
        prompt = [{"role": m["role"], "content": m["content"]} for m in turn["prompt"]]
        text = processor.apply_chat_template(
            prepare_multimodal_messages(prompt, images=turn["images"]), add_generation_prompt=True, tokenize=False
        )
        own = processor(images=[turn["images"]], text=[text], suffix=[ANSWERS[row]], return_tensors="pt")
        kept = batch["attention_mask"][row].bool()
        for name in ("input_ids", "token_type_ids", "labels"):
            assert torch.equal(batch[name][row][kept], own[name][0]), name
        assert torch.equal(batch["pixel_values"][row], own["pixel_values"][0])
    item = data[0] | {"images": []}
    item["prompt"] = [{"role": "user", "content": "what now?"}]
    with pytest.raises(ValueError, match="Row 1 of this batch has no picture, and PaliGemma's processor takes no"):
        VLMQDataCollator(processor)([data[0], item])


@pytest.mark.parametrize("shape", [(64, 64, 3), (3, 60, 3), (60, 3, 3)])
def test_a_picture_is_the_same_as_an_array(shape):
    """At play it is one, in a dataset an image. Three rows are not the channels."""
    _, processor = tiny_models.build("qwen2_vl")
    picture = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]}]
    answer = [{"role": "assistant", "content": "red"}]
    kinds = [[picture], [Image.fromarray(picture)]]
    one, other = [VLMQDataCollator(processor).tokenize([(prompt, images, answer)]) for images in kinds]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", tiny_models.VLM_NAMES)
def test_bootstrap_rows_leave_the_turn_rows(name):
    _, processor = tiny_models.build(name)
    data = segments(name, ENDINGS)
    items = data.__getitems__([0, 1, 3, 4])
    batch = VLMQDataCollator(processor)(items)
    stock = DataCollatorForVisionLanguageModeling(turn_processor(processor), completion_only_loss=True)(
        [{k: data.dataset[r][k] for k in ("prompt", "images", "completion")} for r in (0, 1, 3, 4)]
    )
    assert batch["input_ids"].shape[0] == 6
    for row in range(4):
        assert torch.equal(attended(batch, row), attended(stock, row))
        keep, stock_keep = batch["attention_mask"][row].bool(), stock["attention_mask"][row].bool()
        assert torch.equal(batch["labels"][row][keep], stock["labels"][row][stock_keep])
        assert (batch["labels"][row][~keep] == -100).all()
    assert torch.equal(batch["pixel_values"][: len(stock["pixel_values"])], stock["pixel_values"])


@pytest.mark.parametrize("name", [*tiny_models.VLM_NAMES, *tiny_models.TEXT_NAMES])
def test_bootstrap_rows_are_generation_prompts(name):
    _, processor = tiny_models.build(name)
    data = segments(name, [(3, "terminated"), (2, "truncated"), (4, "truncated")])
    items = data.__getitems__([5, 6, 3, 4, 2, 0, 7, 8, 1])
    batch = VLMQDataCollator(processor)(items)
    turns, bootstraps = 9, [item["bootstrap"] for item in items if item["bootstrap"] is not None]
    assert len(bootstraps) == 5 and batch["input_ids"].shape[0] == turns + 5
    mask = batch["bootstrap_mask"]
    assert mask.dtype == torch.bool and not mask[:turns].any()
    for i, state in enumerate(bootstraps):
        row = turns + i
        ids = attended(batch, row)
        assert torch.equal(ids, generation_ids(processor, state))
        # One position a row: the last attended one.
        (position,) = mask[row].nonzero()[:, 0].tolist()
        assert batch["attention_mask"][row].nonzero().max() == position
        assert (batch["labels"][row] == -100).all()
    # A cut's bootstrap row is the next turn's prompt, token by token: row 0's is that of row 1, the batch's last turn.
    prompt_of_row_1 = batch["input_ids"][8][(batch["labels"][8] == -100) & batch["attention_mask"][8].bool()]
    assert torch.equal(attended(batch, turns + 2), prompt_of_row_1)
    # Segments 5 6 | 3 4 | 2 | 0 | 7 8 | 1: bootstrap rows in order, none after the terminated row 2.
    assert batch["segment_bootstrap"].tolist() == [0, 1, -1, 2, 3, 4]
    assert batch["turn_segment"].tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_labels_are_the_completion_and_its_end(name):
    _, processor = tiny_models.build(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    batch = VLMQDataCollator(processor)(segments(name, ENDINGS).__getitems__([0, 1, 3]))
    for row, answer in enumerate([ANSWERS[0], ANSWERS[1], ANSWERS[3]]):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != -100]) == answer + tiny_models.END
        assert torch.equal(labels[labels != -100], batch["input_ids"][row][labels != -100])
    assert batch["turn_reward"].tolist() == [0, 1, 3] and batch["turn_reward"].dtype == torch.float32
    assert batch["turn_terminated"].tolist() == [False, False, False]
    assert batch["turn_return_to_go"].tolist() == [1, 2, 5]
    assert "behavior_log_probs" not in batch


@pytest.mark.parametrize("thought", ["<think>\n", "answer: "])
@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_a_turn_begins_where_play_does(name, thought):
    """A generation prompt that ends with text which the template leaves out of an answered turn, as "thinking" models
    have: a turn is that very prompt and its response, whatever that begins with."""
    _, processor = tiny_models.build(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    processor.chat_template = processor.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", f"<|im_start|>assistant\n{thought}{{% endif %}}"
    )
    data = segments(name, ENDINGS)
    answers = ("up", "<b>up", "it is up</think>\nup", "an answer", "")
    items = [data[0] for _ in answers]
    for item, answer in zip(items, answers, strict=True):
        item["completion"] = [{"role": "assistant", "content": answer}]
    batch = VLMQDataCollator(processor)(items)
    state = {"prompt": items[0]["prompt"], "images": items[0].get("images")}
    prompt = generation_ids(processor, state).tolist()
    assert tokenizer.decode(prompt).endswith(f"assistant\n{thought}")
    for row, answer in enumerate(answers):
        ids, labels = attended(batch, row).tolist(), batch["labels"][row]
        assert ids[: len(prompt)] == prompt and labels[labels != -100].tolist() == ids[len(prompt) :]
        assert tokenizer.decode(ids[len(prompt) :]) == answer + tiny_models.END
        assert completion_tokens(processor, answer) == ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_text_only_rows_are_those_of_stock_trl(name):
    _, tokenizer = tiny_models.build(name)
    data = segments(name, [(3, "terminated"), (1, "terminated")])
    batch = VLMQDataCollator(tokenizer)(data.__getitems__([0, 1, 2, 3]))
    examples = []
    for r in range(4):
        row = data.dataset[r]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole)]
        assert ids[1][: len(ids[0])] == ids[0]
        examples.append({"input_ids": ids[1], "labels": [-100] * len(ids[0]) + ids[1][len(ids[0]) :]})
    stock = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(examples)
    for k in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[k], stock[k]), k


def test_a_tokenizer_that_begins_a_text_with_another_token():
    """As SentencePiece's do: a response's first token follows the prompt, in training as in play and in stock TRL."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<pad>", tiny_models.END]
    trained = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    words.train_from_iterator([tiny_models.CORPUS, *ANSWERS], trained)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token=tiny_models.END, unk_token="<unk>"
    )
    tokenizer.chat_template = tiny_models.chat_template()
    alone, together = (tokenizer(text)["input_ids"] for text in ("red", "assistant\nred"))
    assert alone != together[-len(alone) :]
    turn = [{"role": "user", "content": "Which?"}], None, [{"role": "assistant", "content": "red"}]
    batch = VLMQDataCollator(tokenizer).tokenize([turn])
    whole = tokenizer.apply_chat_template(turn[0] + turn[2], return_dict=True)["input_ids"]
    start = tokenizer.apply_chat_template(turn[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole[: len(start)] == start and batch["input_ids"][0].tolist() == whole
    assert batch["labels"][0].tolist() == [-100] * len(start) + whole[len(start) :]
    assert completion_tokens(tokenizer, "red") == whole[len(start) :]


def test_rows_in_another_format_or_not_decoded():
    _, processor = tiny_models.build("idefics3")
    data = segments("idefics3", ENDINGS)
    batch = VLMQDataCollator(processor)(data.__getitems__([0, 3]))
    raw = data.dataset.cast_column("images", datasets.List(datasets.Image(decode=False)))
    for other in (data.dataset.with_format("torch"), data.dataset.with_format("numpy"), raw):
        same = SegmentDataset(other, data.index, 1.0)
        same.return_to_go = data.return_to_go
        again = VLMQDataCollator(processor)(same.__getitems__([0, 3]))
        assert again.keys() == batch.keys() and all(torch.equal(again[k], batch[k]) for k in batch)


def test_text_only_padding_to_a_multiple():
    _, tokenizer = tiny_models.build("llama")
    items = segments("llama", ENDINGS).__getitems__([0, 3])
    plain = VLMQDataCollator(tokenizer)(items)
    padded = VLMQDataCollator(tokenizer, pad_to_multiple_of=64)(items)
    assert padded["input_ids"].shape[1] % 64 == 0 and plain["input_ids"].shape[1] % 64 != 0
    width = plain["input_ids"].shape[1]
    for k in ("input_ids", "attention_mask", "labels", "bootstrap_mask"):
        assert torch.equal(padded[k][:, :width], plain[k])
    assert padded["bootstrap_mask"].sum() == 2 and not padded["attention_mask"][:, width:].any()


def test_content_in_parts_for_a_text_only_model():
    # A dataset may hold its text in parts; a tokenizer's template gets it as a string.
    _, tokenizer = tiny_models.build("llama")
    (item,) = segments("llama", [(1, "terminated")]).__getitems__([0])
    text = item["prompt"][0]["content"]
    parts = item | {"prompt": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
    collate = VLMQDataCollator(tokenizer)
    assert torch.equal(collate([item])["input_ids"], collate([parts])["input_ids"])


def test_what_is_null_in_a_part_is_not_there():
    """`datasets` gives all parts the same keys."""
    _, processor = tiny_models.build("idefics3")
    items = segments("idefics3", ENDINGS).__getitems__([0, 3])
    filled = copy.deepcopy(items)
    for item in filled:
        for prompt in (item["prompt"], item["bootstrap"]["prompt"]):
            prompt[0]["content"] = [{"image": None, "text": None, **part} for part in prompt[0]["content"]]
    batch, again = VLMQDataCollator(processor)(items), VLMQDataCollator(processor)(filled)
    assert again.keys() == batch.keys() and all(torch.equal(again[k], batch[k]) for k in batch)


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_behaviour_log_probabilities_lie_on_their_tokens(name):
    _, processor = tiny_models.build(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    counts = [len(tokenizer(answer)["input_ids"]) + 1 for answer in ANSWERS]
    # Row 0: for each token; row 1: unknown; row 2: its end token was not sampled; row 3: for each token.
    recorded = [[-(10.0 * r + i) for i in range(count)] for r, count in enumerate(counts)]
    recorded[1], recorded[2] = None, recorded[2][:-1]
    data = segments(name, [(4, "terminated")], logprobs=recorded)
    for rows in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 1]):
        batch = VLMQDataCollator(processor)(data.__getitems__(rows))
        expected = []
        for r in rows:
            values = recorded[r] or []
            expected += values + [NAN] * (counts[r] - len(values))
        packed = batch["behavior_log_probs"]
        assert len(packed) == int((batch["labels"] != -100).sum())
        assert_close(packed, torch.tensor(expected), equal_nan=True)
    assert "behavior_log_probs" not in VLMQDataCollator(processor)(data.__getitems__([1]))


def test_the_action_s_tokens_are_marked():
    _, processor = tiny_models.build("idefics3")
    data = segments("idefics3", [(4, "terminated")])
    batch = VLMQDataCollator(processor, action_format=make_format("json_cot"))(data.__getitems__([1, 0, 3]))
    tokens = batch["labels"][batch["labels"] != -100]
    assert batch["action_mask"].shape == tokens.shape and batch["action_mask"].dtype == torch.bool
    row = torch.repeat_interleave(torch.arange(3), (batch["labels"][:3] != -100).sum(1))
    of_first = row == 0
    before = processor.tokenizer.decode(tokens[of_first & ~batch["action_mask"]])
    action = processor.tokenizer.decode(tokens[of_first & batch["action_mask"]])
    assert before.endswith('"action":') and action.startswith(' "+"}'), "from the action's value on"
    assert batch["action_mask"][row > 0].all(), "where a response never comes to an action, all are filtered"
    plain = VLMQDataCollator(processor, action_format=make_format("plain"))(data.__getitems__([0, 2]))
    assert plain["action_mask"].all()
    assert "action_mask" not in VLMQDataCollator(processor)(data.__getitems__([0]))


def test_a_response_that_is_cut_off_where_its_action_would_begin_has_a_state():
    """Without a token behind it, as in templates that end a turn by none: its turn still has a value."""
    _, processor = tiny_models.build("idefics3")
    json_cot = make_format("json_cot")
    collator = VLMQDataCollator(processor, action_format=json_cot)
    tokens = processor.tokenizer('{"thoughts": "so", "action":', add_special_tokens=False)["input_ids"]
    assert json_cot.reaches_action(processor.tokenizer.decode(tokens))
    assert not json_cot.reaches_action(processor.tokenizer.decode(tokens[:-1]))
    assert collator._action_start(json_cot, tokens) == len(tokens) - 1


def test_too_many_behaviour_log_probabilities():
    _, tokenizer = tiny_models.build("llama")
    count = len(tokenizer(ANSWERS[1])["input_ids"]) + 1
    data = segments("llama", [(3, "terminated")], logprobs=[[-1.0], [-1.0] * (count + 1), None])
    message = (
        rf"Row 1, column `behavior_logprobs`: {count + 1} values for {count} completion tokens.*this model's tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        VLMQDataCollator(tokenizer)(data.__getitems__([2, 0, 1]))


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_a_row_over_max_length_is_named(name):
    _, processor = tiny_models.build(name)
    data = segments(name, [(5, "terminated")])
    items = data.__getitems__([4, 0, 3])
    lengths = VLMQDataCollator(processor)(items)["attention_mask"].sum(1).tolist()[:3]
    longest = max(lengths)
    assert lengths.count(longest) == 1
    row = items[lengths.index(longest)]["row"]
    whole = VLMQDataCollator(processor, max_length=longest)(items)
    assert whole["attention_mask"].sum(1).tolist()[:3] == lengths
    message = rf"Row {row} is {longest} tokens long, over `max_length={longest - 1}`.*raise `max_length`"
    with pytest.raises(ValueError, match=message):
        VLMQDataCollator(processor, max_length=longest - 1)(items)


def test_a_completion_of_no_token_is_named():
    _, tokenizer = tiny_models.build("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    items = segments("llama", [(3, "terminated")]).__getitems__([1, 2])
    items[1]["completion"] = [{"role": "assistant", "content": ""}]
    with pytest.raises(ValueError, match="Row 2, column `completion`: it renders to no token"):
        VLMQDataCollator(tokenizer)(items)


def test_a_picture_for_a_text_only_model_is_refused():
    _, tokenizer = tiny_models.build("llama")
    with pytest.raises(ValueError, match="an image part cannot be shown to a text-only model"):
        VLMQDataCollator(tokenizer)(segments("idefics3", [(1, "terminated")]).__getitems__([0]))


def test_a_vlm_reads_text_only_rows():
    _, processor = tiny_models.build("idefics3")
    data = segments("llama", ENDINGS)
    batch = VLMQDataCollator(processor)(data.__getitems__([0, 3]))
    assert "pixel_values" not in batch
    text = processor.tokenizer.decode(attended(batch, 2))
    assert text.startswith("<|im_start|>user\nwhat colour is the square 1?") and text.endswith("assistant\n")


@pytest.mark.parametrize("name", tiny_models.VLM_NAMES)
def test_a_mark_of_a_picture_in_a_text_is_no_picture(name):
    """An agent or a page that writes what the processor puts pictures in the place of."""
    processor = tiny_models.build(name)[1]
    mark, picture = processor.image_token, Image.new("RGB", (20, 20))
    broken = f"{mark[0]} {mark[1:]}"
    collate = VLMQDataCollator(processor)

    def row(text):
        parts = [{"type": "image"}, {"type": "text", "text": f"What is {text}?"}]
        return [{"role": "user", "content": parts}], [picture], [{"role": "assistant", "content": f"I see {text}."}]

    batch, other = collate.tokenize([row(mark), row("it")]), collate.tokenize([row(broken), row("it")])
    assert batch.keys() == other.keys()
    for key in batch:
        assert_close(batch[key], other[key])
    prompt = render(processor, Request(None, row(mark)[0], [np.array(picture)], np.random.default_rng(0)))[0]
    assert prompt.count(mark) == 1 and broken in prompt
    assert completion_tokens(processor, f"I see {mark}.") == completion_tokens(processor, f"I see {broken}.")


def test_items_are_not_changed():
    # A dataloader may hand the same item out twice.
    _, processor = tiny_models.build("idefics3")
    items = segments("idefics3", ENDINGS).__getitems__([0, 3])
    collate = VLMQDataCollator(processor)
    first, second = collate(items), collate(items)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
