# SPDX-License-Identifier: Apache-2.0
"""Equivalent runs match: stock SFT, padding, batch split, column order, chunk size, resume, evaluation.

Where the arithmetic is the same, equality is bit by bit. Where a sum is taken in another order (packed or padded
tokens, one batch or two, another tile of the vocabulary), the runs may differ by float32 rounding: 1e-6 of the loss
and, for gradients, 1e-5 of the largest one in that weight.
"""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests import tiny_models
from tests.small_runs import NUMBER_LINE, QUIET, config, number_line, text_number_line
from vlmq_trl import modeling, objective
from vlmq_trl.agent_format import CallableFormat, PlainFormat
from vlmq_trl.chat import turn_processor
from vlmq_trl.collator import SegmentSampler
from vlmq_trl.trajectory import validate_trajectories
from vlmq_trl.vlmq_trainer import VLMQTrainer

LOSS, GRADIENT = 1e-6, 1e-5
DROPOUT_LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def dataset_for(name):
    return text_number_line() if name in tiny_models.TEXT_NAMES else number_line(agent_format=PlainFormat())


def make_trainer(output_dir, name="idefics3", dataset=None, init=None, **kwargs) -> VLMQTrainer:
    model, processor = tiny_models.build(name)
    return VLMQTrainer(
        model=model,
        args=config(output_dir, **kwargs),
        train_dataset=dataset_for(name) if dataset is None else dataset,
        processing_class=processor,
        **(init or {}),
    )


def make_stock(output_dir, name="idefics3", trainer_class=SFTTrainer, **kwargs) -> SFTTrainer:
    model, processor = tiny_models.build(name)
    args = SFTConfig(output_dir=str(output_dir), max_length=None, **{**QUIET, "learning_rate": 1e-3, **kwargs})
    return trainer_class(model=model, args=args, train_dataset=dataset_for(name), processing_class=processor)


def rows_batch(trainer, rows):
    """The collated batch of these rows of the training data."""
    return trainer.data_collator(trainer.get_train_dataloader().dataset.__getitems__(list(rows)))


def loss_and_gradients(trainer, *batches, num_items=None):
    """The summed loss of the batches, and each weight's gradient by name, stock or not."""
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
        loss.backward()
        total += loss.item()
    named = trainer.model.named_parameters()
    return total, {n.removeprefix("pretrained_model."): p.grad.clone() for n, p in named if p.grad is not None}


def assert_close(one, other, loss=LOSS, gradient=GRADIENT):
    """(loss, gradients) of two runs are equal up to rounding."""
    assert one[0] == pytest.approx(other[0], rel=loss)
    assert set(one[1]) == set(other[1])
    for name, grad in one[1].items():
        # Some gradients are zero but for rounding, such as that of a key's bias: 1e-6 of the largest of all is noise.
        noise = 1e-6 * max(g.abs().max() for g in other[1].values())
        scale = other[1][name].abs().max()
        error = (grad - other[1][name]).abs().max()
        assert error <= gradient * scale + noise, f"{name}: {error:.2e} where gradients reach {scale:.2e}"


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert set(one) == set(other)
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different


def step_logs(trainer, without=("tokens_per_second",)) -> list[dict]:
    """What each training step logged, without what a clock says."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if k not in without} for entry in logs]


# ---- stock SFT ----


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_without_critic_it_is_stock_sft(name, tmp_path):
    """`filter="none", critic_coef=0`: the tensors are those of `trl.SFTTrainer`, and so are loss and gradients.

    Not bit by bit: stock SFT scores all positions and sums over padding too, here only action tokens are scored.
    """
    ours = make_trainer(tmp_path, name, filter="none", critic_coef=0)
    stock = make_stock(tmp_path, name)
    if name == "paligemma":  # stock SFT fails at its completions
        stock.data_collator.processor = turn_processor(stock.processing_class)
    rows = [0, 1, 2, 7, 5, 11]
    batch, stock_batch = rows_batch(ours, rows), stock.data_collator([stock.train_dataset[row] for row in rows])
    for key in stock_batch:
        assert torch.equal(batch[key], stock_batch[key]), key
    assert len(batch["input_ids"]) == len(rows), "no bootstrap row without a critic"
    assert_close(loss_and_gradients(ours, batch), loss_and_gradients(stock, stock_batch))
    # The trainer's own way, with the number of tokens of all micro-batches.
    assert_close(
        loss_and_gradients(ours, batch, num_items=torch.tensor(100)),
        loss_and_gradients(stock, stock_batch, num_items=torch.tensor(100)),
    )


def test_without_critic_it_trains_as_stock_sft(tmp_path):
    """Over a few updates with accumulation, clipping and a schedule, where stock SFT sees the rows in our order."""

    class InOurOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SegmentSampler(validate_trajectories(dataset_for("idefics3")), 8, self.args.seed)

    steps = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.5}
    ours = make_trainer(tmp_path, filter="none", critic_coef=0, **steps)
    critic = {k: v.clone() for k, v in ours.model.critic.state_dict().items()}
    stock = make_stock(tmp_path, trainer_class=InOurOrder, **steps)
    ours.train()
    stock.train()
    keys = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "epoch")
    for one, other in zip(step_logs(ours), step_logs(stock), strict=True):
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
    # Adam divides by the gradients' size, so rounding in a tiny gradient may move a weight by a part of the rate.
    for (name, one), other in zip(
        ours.model.pretrained_model.named_parameters(), stock.model.parameters(), strict=True
    ):
        assert (one - other).abs().max() < 0.02 * 1e-3, name
    assert all(torch.equal(value, critic[key]) for key, value in ours.model.critic.state_dict().items())


# ---- padding ----


def pad(batch, processor, left=0, right=0):
    """The batch with more columns of padding."""
    pad_id = getattr(processor, "tokenizer", processor).pad_token_id
    width = batch["input_ids"].shape[1]
    fill = {"input_ids": pad_id, "labels": -100}
    return {
        key: torch.nn.functional.pad(value, (left, right), value=fill.get(key, 0))
        if value.ndim == 2 and value.shape[1] == width
        else value
        for key, value in batch.items()
    }


def to_left(batch):
    """A right-padded batch with its padding on the left."""
    width = batch["input_ids"].shape[1]
    shifts = (width - batch["attention_mask"].sum(1)).tolist()
    return {
        key: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        if value.ndim == 2 and value.shape[1] == width
        else value
        for key, value in batch.items()
    }


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
@pytest.mark.parametrize("name", ["idefics3", "llava", "qwen2_5_vl", "llama"])
def test_padding(name, critic_type, tmp_path):
    """Amount and side of the padding change neither loss nor gradients, of policy and critic.

    Padding on the left moves the positions, and rotary embeddings depend on differences of positions up to rounding.
    """
    dataset = None if name == "llama" else number_line()  # responses, and so rows, of different lengths
    trainer = make_trainer(tmp_path, name, dataset, critic_type=critic_type, filter="exp", conservative_coef=1.0)
    batch = rows_batch(trainer, [0, 1, 2, 7, 5, 11])
    if name == "llama":  # rows of one length: lengthen the first prompt
        longer = dict(zip(("left", "right"), (0, 3), strict=True))
        batch = pad(batch, trainer.processing_class, **longer)
        for key, value in {"input_ids": 5, "attention_mask": 1, "labels": -100}.items():
            row = batch[key][0]
            batch[key][0] = torch.cat([row[:1], torch.full((3,), value), row[1:-3]])
    assert (batch["attention_mask"].sum(1).unique().numel() > 1) and batch["bootstrap_mask"].any()
    expected = loss_and_gradients(trainer, batch)
    assert_close(loss_and_gradients(trainer, pad(batch, trainer.processing_class, right=5)), expected)
    assert_close(loss_and_gradients(trainer, to_left(batch)), expected, loss=1e-5, gradient=1e-4)
    both = pad(to_left(batch), trainer.processing_class, left=3, right=2)
    assert_close(loss_and_gradients(trainer, both), expected, loss=1e-5, gradient=1e-4)


# ---- batch split ----


@pytest.fixture
def seen_returns(monkeypatch):
    """The token returns of every loss that is computed, in order."""
    seen = []
    packed_returns = objective.packed_returns
    monkeypatch.setattr(objective, "packed_returns", lambda *a, **k: seen.append(packed_returns(*a, **k)) or seen[-1])
    return seen


def cut_between_episodes(trainer, after: int) -> tuple[range, range]:
    """Rows of episodes 0..after, and as many episodes more."""
    first = trainer._index.first_row
    return range(first[after]), range(first[after], first[2 * after])


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_one_batch_or_two(critic_type, tmp_path, seen_returns):
    """Two micro-batches of whole segments are one batch: loss, gradients and critic targets."""
    trainer = make_trainer(tmp_path, dataset=number_line(), critic_type=critic_type, turn_lambda=0.7, filter="exp")
    one, two = cut_between_episodes(trainer, 2)
    whole = rows_batch(trainer, [*one, *two])
    halves = [rows_batch(trainer, one), rows_batch(trainer, two)]
    num_items = (whole["labels"][:, 1:] != -100).sum()
    expected = loss_and_gradients(trainer, whole, num_items=num_items)
    assert_close(loss_and_gradients(trainer, *halves, num_items=num_items), expected)
    torch.testing.assert_close(torch.cat(seen_returns[1:]), seen_returns[0], rtol=1e-5, atol=1e-6)


def test_a_cut_segment_has_the_same_targets(tmp_path, seen_returns):
    """With `turn_lambda=0` a turn's target does not depend on where its segment is cut."""
    trainer = make_trainer(tmp_path, dataset=number_line())
    longest = int(trainer._index.length.argmax())
    first, length = int(trainer._index.first_row[longest]), int(trainer._index.length[longest])
    assert length >= 6
    for start, stop in ((0, length), (0, 2), (2, 5), (5, length)):
        trainer.compute_loss(trainer.model, rows_batch(trainer, range(first + start, first + stop)))
    torch.testing.assert_close(torch.cat(seen_returns[1:]), seen_returns[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "llama"])
def test_accumulation(name, tmp_path):
    """Batches of 8 against 2 times 4, over a few updates of the trainer's own loop; every turn is its own segment."""
    # Completions of unequal length: a mean of the micro-batches' means would not do.
    uneven = CallableFormat(
        render_fn=lambda action, reading, thoughts: action * (1 + 4 * int(reading["current number"])),
        parse_fn=lambda response: response[:1],
    )
    dataset = number_line(agent_format=uneven)
    if name in tiny_models.TEXT_NAMES:
        dataset = text_number_line(agent_format=uneven)
    logs = []
    trainers = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = make_trainer(
            tmp_path,
            name,
            dataset=dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            segment_length=1,
            max_steps=4 if name == "idefics3" else 2,
            filter="exp",
            target_tau=0.5,
            target_norm_rate=0.5,
        )
        trainer.train()
        logs.append(step_logs(trainer))
        trainers.append(trainer)
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "target_mean", "target_std", "value_error", "advantage_q50"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    for name, value in trainers[0].model.critic.state_dict().items():
        torch.testing.assert_close(value, trainers[1].model.critic.state_dict()[name], rtol=1e-4, atol=1e-4)


# ---- column order, chunk size ----


def test_shuffled_columns(tmp_path):
    """The order of the dataset's columns means nothing, bit by bit."""
    dataset = dataset_for("idefics3")
    names = dataset.column_names
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = dataset.select_columns([names[k] for k in order])
    assert shuffled.column_names != names
    one, other = (make_trainer(tmp_path, dataset=d, max_steps=3) for d in (dataset, shuffled))
    one.train()
    other.train()
    assert step_logs(one) == step_logs(other)
    assert_same_weights(one.model, other.model)


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_chunk_size(critic_type, tmp_path, monkeypatch):
    """How many vocabulary entries, or rows, are projected at a time bounds memory, never the result."""
    trainer = make_trainer(tmp_path, critic_type=critic_type, filter="exp", conservative_coef=1.0)
    batch = rows_batch(trainer, range(6))
    expected = loss_and_gradients(trainer, batch)
    for chunk, tile in ((7, 1), (100, 1500), (500, 2**20)):
        trainer.model.vocab_chunk_size = chunk
        monkeypatch.setattr(modeling, "MAX_TILE_ELEMENTS", tile)
        assert_close(loss_and_gradients(trainer, batch), expected)


# ---- resume, evaluation ----


@pytest.mark.parametrize(
    ("name", "peft_config", "kwargs"),
    [
        ("idefics3", None, {}),
        (
            "idefics3",
            None,
            {"critic_type": "vocab", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        ),
        ("llava", None, {"critic_learning_rate": 0.01}),
        ("idefics3", DROPOUT_LORA, {}),
    ],
    ids=["idefics3", "idefics3-vocab-accumulation", "llava", "idefics3-LoRA-dropout"],
)
def test_resume(name, peft_config, kwargs, tmp_path):
    """Resumed in the middle of the second epoch, a run goes on bit by bit as if it had not been interrupted."""
    dataset = number_line(episodes=7, agent_format=PlainFormat())
    steps = -(-len(dataset) // 8)
    saved, last = steps + steps // 2, 2 * steps + 1
    assert steps < saved < 2 * steps

    def make(**more):
        run = {"max_steps": last, "save_strategy": "steps", "save_steps": saved, "target_tau": 0.1}
        return make_trainer(tmp_path, name, dataset, init={"peft_config": peft_config}, **run, **kwargs, **more)

    whole = make()
    whole.train()
    resumed = make(seed=42)
    # A fresh trainer with other weights: whatever is not restored shows.
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            if parameter.requires_grad or peft_config is None:
                parameter.add_(0.01)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert resumed.state.global_step == last
    # Stock TRL counts tokens from the resumption on.
    ignored = ("tokens_per_second", "num_tokens")
    assert step_logs(resumed, ignored)[-(last - saved) :] == step_logs(whole, ignored)[saved:]
    assert_same_weights(resumed.model, whole.model)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    for index, state in states[1].items():
        assert all(torch.equal(value, states[0][index][key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("peft_config", "kwargs"),
    [(None, {}), (DROPOUT_LORA, {}), (DROPOUT_LORA, {"activation_checkpointing": True})],
    ids=["full", "LoRA-dropout", "LoRA-dropout-checkpointing"],
)
def test_evaluation_does_not_change_training(peft_config, kwargs, tmp_path):
    """Sampled play and an evaluation loss after each update, or none: the same run, bit by bit."""
    run = {"max_steps": 4, **kwargs}
    alone = make_trainer(tmp_path, init={"peft_config": peft_config}, **run)
    alone.train()
    evaluated = make_trainer(
        tmp_path,
        init={
            "peft_config": peft_config,
            "eval_env": NUMBER_LINE,
            "agent_format": PlainFormat(),
            "eval_dataset": number_line(episodes=3, seed=50, agent_format=PlainFormat()),
        },
        eval_strategy="steps",
        eval_steps=1,
        eval_temperature=1.0,
        eval_episodes=3,
        **run,
    )
    evaluated.train()
    assert sum("eval_success_rate" in entry for entry in evaluated.state.log_history) == 4
    assert step_logs(evaluated) == step_logs(alone)
    assert_same_weights(evaluated.model, alone.model)
