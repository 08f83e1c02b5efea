# SPDX-License-Identifier: Apache-2.0
"""Training online: the schedule, the data of a batch, resuming, what goes wrong, collection while learning."""

import errno
import functools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests import tiny_models
from tests.misbehaving_envs import Misbehaving
from tests.small_runs import NUMBER_LINE, TextNumberLine, config, number_line, text_number_line
from vlmq_trl import EnvEvaluationCallback, losses, vlmq_trainer
from vlmq_trl.agent_format import CallableFormat, JSONCoTFormat, PlainFormat, default_format
from vlmq_trl.checkpoints import newest_checkpoint
from vlmq_trl.env_pool import EnvFailureError
from vlmq_trl.envs import make_demonstrator
from vlmq_trl.online import OnlineData, Schedule
from vlmq_trl.online.asynchronous import changing, copy_of_policy
from vlmq_trl.online.data import LEAST_PRIORITY, identity
from vlmq_trl.online.schedule import exploration, online_fraction
from vlmq_trl.online.search import VisitedStates
from vlmq_trl.policy import ModelPolicy
from vlmq_trl.replay import ReplayBuffer, load_replay
from vlmq_trl.replay import buffer as replay_buffer
from vlmq_trl.rollout import DemonstratorPolicy, Request, Response
from vlmq_trl.trajectory import (
    Episode,
    TrajectoryError,
    Turn,
    concatenate_trajectories,
    dataset_from_episodes,
    episodes_from_dataset,
    validate_trajectories,
)
from vlmq_trl.vlmq_trainer import VLMQTrainer

SMALL = {
    "max_steps": 6,
    "turns_per_round": 15,
    "updates_per_turn": 2 / 15,
    "rollout_num_envs": 2,
    "max_completion_length": 3,
    "lr_scheduler_type": "constant",
}


def make_trainer(
    output_dir, *, dataset=None, env=TextNumberLine, name="llama", init=None, callbacks=None, **kwargs
) -> VLMQTrainer:
    model, processor = tiny_models.build(name)
    return VLMQTrainer(
        model,
        config(output_dir, **{**SMALL, **kwargs}),
        train_dataset=dataset,
        env=env,
        processing_class=processor,
        callbacks=callbacks,
        **{"agent_format": PlainFormat(), **(init or {})},
    )


def step_logs(trainer) -> list[dict]:
    ignored = ("tokens_per_second", "num_tokens")
    return [{k: v for k, v in e.items() if k not in ignored} for e in trainer.state.log_history if "loss" in e]


def collected(output_dir) -> list:
    return list(episodes_from_dataset(load_replay(output_dir / "replay", "online")))


def assert_same_run(one, other):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert collected_of(one) == collected_of(other)


def collected_of(trainer) -> list:
    return collected(Path(trainer.args.output_dir))


class OpenEnded(gymnasium.Env):
    """An environment whose actions are any text."""

    observation_space = gymnasium.spaces.Dict({"text": gymnasium.spaces.Text(max_length=9)})
    action_space = gymnasium.spaces.Text(max_length=99)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"text": "say"}, {}


class Mute:
    """A policy that is no model."""

    def act(self, requests):
        return [Response("")] * len(requests)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ---- the schedule ----


def test_the_worked_example():
    schedule = Schedule(offline_steps=10, turns_per_round=100, updates_per_round=20, warmup_turns=150, max_turns=300)
    assert [schedule.rounds_before(update) for update in (0, 9, 10, 29, 30, 49, 50, 10**6)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [schedule.turns_after(round) for round in (1, 2, 3)] == [150, 250, 300]
    assert (schedule.num_rounds, schedule.num_updates) == (3, 70)


def test_without_a_budget_rounds_go_on():
    schedule = Schedule(offline_steps=0, turns_per_round=10, updates_per_round=1)
    assert (schedule.num_rounds, schedule.num_updates) == (None, None)
    assert schedule.rounds_before(999) == 1000 and schedule.turns_after(1000) == 10_000


def test_a_budget_below_one_round():
    schedule = Schedule(offline_steps=3, turns_per_round=10, updates_per_round=4, max_turns=7)
    assert (schedule.num_rounds, schedule.num_updates, schedule.turns_after(1)) == (1, 7, 7)


def test_the_share_of_collected_turns(tmp_path):
    args = config(tmp_path, offline_steps=2, online_fraction_start=0.2, online_fraction=0.8, online_fraction_steps=4)
    shares = [online_fraction(args, update) for update in range(8)]
    assert shares == pytest.approx([0, 0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.8])
    assert [online_fraction(config(tmp_path, online_fraction=0.4), u) for u in (0, 99)] == [0.4, 0.4]


def test_exploration_moves_over_the_collected_turns(tmp_path):
    args = config(
        tmp_path,
        rollout_temperature_start=1.5,
        rollout_temperature=0.5,
        rollout_action_temperature_start=2.0,
        rollout_action_temperature=1.0,
        rollout_epsilon=0.1,
        rollout_annealing_turns=200,
    )
    schedule = Schedule(offline_steps=0, turns_per_round=100, updates_per_round=1, warmup_turns=150, max_turns=400)
    before = [schedule.turns_before(round) for round in (1, 2, 3)]
    assert before == [0, 150, 250]
    assert [exploration(args, "rollout_temperature", turns) for turns in before] == pytest.approx([1.5, 0.75, 0.5])
    assert [exploration(args, "rollout_action_temperature", turns) for turns in before] == pytest.approx([2, 1.25, 1])
    assert [exploration(args, "rollout_epsilon", turns) for turns in before] == [0.1] * 3


# ---- a run ----


def test_from_offline_to_online(tmp_path):
    """Offline first, then rounds; the policy that collected is the one that learns from it at once."""
    dataset = text_number_line()
    trainer = make_trainer(
        tmp_path, dataset=dataset, offline_steps=2, online_fraction=1.0, save_strategy="steps", save_steps=3
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logs = step_logs(trainer)
    assert [log["round"] for log in logs] == [0, 0, 1, 1, 2, 2]
    assert [log["env_turns"] > 0 for log in logs] == [False, False, True, True, True, True]
    assert logs[-1]["env_turns"] >= 30 and logs[-1]["replay_turns"] == len(dataset) + logs[-1]["env_turns"]
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    # Before the first update after a collection the policy is still the one that collected.
    kl = [log.get("behavior_kl") for log in logs]
    assert kl[:2] == [None, None] and kl[2] == pytest.approx(0, abs=1e-5) and kl[3] > 1e-6
    rounds = [log for log in trainer.state.log_history if "rollout_round" in log]
    assert [log["rollout_round"] for log in rounds] == [1, 2]
    assert sum(log["rollout_mean_turns"] * log["rollout_episodes"] for log in rounds) == logs[-1]["env_turns"]
    # The buffer stays, as an ordinary dataset: the offline rows, then the collected ones.
    everything = load_replay(tmp_path / "replay")
    validate_trajectories(everything)
    assert everything["completion"][: len(dataset)] == dataset["completion"][:]
    assert len(everything) == len(dataset) + logs[-1]["env_turns"]
    assert all(episode.episode_id.startswith("online/") for episode in collected(tmp_path))
    assert (tmp_path / "checkpoint-6" / "replay_manifest.json").is_file()


def test_a_round_does_not_take_the_training_logs(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=5, max_steps=5, turns_per_round=30, updates_per_turn=0.1)
    trainer.train()
    rounds = [entry for entry in trainer.state.log_history if "rollout_success_rate" in entry]
    assert [entry["step"] for entry in rounds] == [0, 3]
    assert not any("nll" in entry or "advantage_q50" in entry for entry in rounds)
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    parts = [logged[name] for name in ("policy_loss", "q_loss", "value_loss")]
    assert sum(parts) == pytest.approx(logged["loss"], rel=0.1)  # of the same updates, each weighed by its tokens


def test_actions_are_found_in_the_format_that_is_played_in(tmp_path):
    """Not in that of another environment for evaluation."""

    def plain():
        env = TextNumberLine()
        env.unwrapped.reading_fields = ()
        return env

    init = {"agent_format": None, "eval_env": plain}
    trainer = make_trainer(tmp_path, init=init, filter_scope="action", max_steps=1)
    assert trainer.data_collator.action_format == default_format(TextNumberLine()) != default_format(plain())
    trainer = make_trainer(tmp_path, init=init, max_steps=1)
    assert trainer.data_collator.action_format is None


def test_no_two_micro_batches_are_drawn_alike(tmp_path, monkeypatch):
    drawn, items = [], OnlineData.items
    monkeypatch.setattr(OnlineData, "items", lambda self, *a: drawn.append(a[:2]) or items(self, *a))
    make_trainer(tmp_path, dataset=text_number_line(), max_steps=3, gradient_accumulation_steps=2).train()
    assert drawn == [(update, 2 * update + k) for update in range(3) for k in range(2)]


def test_a_runs_own_play_as_the_next_ones_offline_data(tmp_path):
    ids = set()
    dataset = text_number_line()
    for run in "abc":
        make_trainer(tmp_path / run, dataset=dataset, offline_steps=1, max_steps=2, max_env_turns=None).train()
        played = load_replay(tmp_path / run / "replay", "online")
        assert not ids & set(played["episode_id"])
        ids |= set(played["episode_id"])
        dataset = concatenate_trajectories([dataset, played])
    assert {name.partition("/")[0] for name in ids} == {"online", "online-2", "online-3"}


def test_pictures(tmp_path):
    trainer = make_trainer(tmp_path, dataset=number_line(), env=NUMBER_LINE, name="idefics3", max_steps=3)
    trainer.train()
    assert all(np.isfinite(log["loss"]) for log in step_logs(trainer))
    assert collected(tmp_path)[0].turns[0].images[0].size == (300, 300)


def test_purely_online(tmp_path):
    """With no offline data every turn is collected; a fresh critic starts at the first round's returns."""
    trainer = make_trainer(tmp_path, max_steps=1)
    moments = []
    initialize = trainer.model.critic.initialize_moments
    trainer.model.critic.initialize_moments = lambda mean, std: moments.append((mean, std)) or initialize(mean, std)
    trainer.train()
    index = validate_trajectories(load_replay(tmp_path / "replay"))
    returns = index.returns_to_go(trainer.args.gamma)
    assert moments == [(pytest.approx(returns.mean()), pytest.approx(returns.std()))]


def test_a_budget_of_turns_ends_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, max_env_turns=40)
    trainer.train()
    assert trainer.state.global_step == 6 == trainer.args.max_steps
    assert 40 <= step_logs(trainer)[-1]["env_turns"] < 40 + 10 * 3


def test_batches_hold_the_share_that_was_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, dataset=text_number_line(), online_fraction=0.25, max_steps=4)
    drawn = []
    collator = trainer.data_collator
    trainer.data_collator = lambda items: drawn.extend(item["row"] for item in items) or collator(items)
    trainer.train()
    rows = np.array(drawn)
    assert len(rows) == 4 * 8 and (rows >= len(text_number_line())).sum() == 8


@pytest.mark.parametrize("bootstrapped", [True, False])
def test_a_limit_that_belongs_to_the_task_ends_what_was_collected(tmp_path, bootstrapped):
    trainer = make_trainer(tmp_path, max_steps=2, bootstrap_truncated=bootstrapped)
    seen = []
    collator = trainer.data_collator
    trainer.data_collator = lambda items: seen.extend(items) or collator(items)
    trainer.train()
    truncated = load_replay(tmp_path / "replay")["truncated"]
    cut_off = [item for item in seen if truncated[item["row"]]]
    assert cut_off and {item["terminated"] for item in cut_off} == {not bootstrapped}
    assert all((item["bootstrap"] is not None) == bootstrapped for item in cut_off)


def test_where_a_limit_belongs_to_the_task_nobody_needs_what_came_after(tmp_path):
    data = text_number_line().remove_columns(["final_prompt"])
    assert any(data["truncated"])
    with pytest.raises(TrajectoryError, match="or train with `bootstrap_truncated=False`"):
        make_trainer(tmp_path, dataset=data, max_steps=2)
    make_trainer(tmp_path, dataset=data, max_steps=3, offline_steps=1, bootstrap_truncated=False).train()
    assert load_replay(tmp_path / "replay").select(range(len(data)))["truncated"] == data["truncated"]


def test_priorities_draw_once_the_offline_steps_are_done(tmp_path, monkeypatch):
    drawn = []
    sample = ReplayBuffer.sample

    def watched(self, *args, **kwargs):
        drawn.append(kwargs["prioritized_fraction"])
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(ReplayBuffer, "sample", watched)
    make_trainer(
        tmp_path, dataset=text_number_line(), offline_steps=2, max_steps=5, replay_prioritized_fraction=0.5
    ).train()
    assert drawn == [0.0, 0.0, 0.5, 0.5, 0.5]


def test_what_went_better_than_expected_comes_back(tmp_path):
    """A turn's priority is what its return had over the critic's value when it was last seen."""
    trainer = make_trainer(
        tmp_path, dataset=text_number_line(), replay_prioritized_fraction=0.5, rollout_epsilon=1.0, max_steps=5
    )
    seen = {}
    opened = trainer._open_online

    def watched(env):
        opened(env)
        learned = trainer._online.learned

        def learn(rows, surprise):
            # Of a turn that a batch holds twice, one of two equal numbers.
            seen.update(zip(rows.tolist(), (np.maximum(surprise, 0) + LEAST_PRIORITY).tolist(), strict=True))
            over = trainer._online.buffer.return_to_go[rows] - trainer._recorded["train"]["value"][-1].numpy()
            np.testing.assert_allclose(surprise, over / trainer.model.critic.target_std.item(), atol=1e-5)
            learned(rows, surprise)

        trainer._online.learned = learn

    trainer._open_online = watched
    trainer.train()
    online, offline = trainer._online, len(text_number_line())
    for tree, span in ((online.priorities.offline, (0, offline)), (online.priorities.online, (offline, online.end))):
        assert (tree.start, tree.end) == span
        rows = np.array([row for row in seen if span[0] <= row < span[1]])
        np.testing.assert_allclose(tree[rows], [seen[row] for row in rows], atol=1e-6)
        assert 0 < (tree[rows] > LEAST_PRIORITY).sum() < len(rows)
    assert step_logs(trainer)[-1]["replay_surprise"] > LEAST_PRIORITY


def test_two_runs_are_one(tmp_path):
    """Equal seeds: equal episodes, log-probabilities and weights."""
    runs = [make_trainer(tmp_path / name, dataset=text_number_line(), offline_steps=1) for name in "ab"]
    for trainer in runs:
        trainer.train()
    assert_same_run(*runs)
    other = make_trainer(tmp_path / "c", dataset=text_number_line(), offline_steps=1, seed=1)
    other.train()
    assert collected_of(other) != collected_of(runs[0])


def test_evaluation_does_not_change_collection(tmp_path):
    alone = make_trainer(tmp_path / "a")
    evaluated = make_trainer(tmp_path / "b", eval_strategy="steps", eval_steps=1, eval_temperature=1.0)
    for trainer in (alone, evaluated):
        trainer.train()
    assert_same_run(alone, evaluated)


def test_another_policy_collects(tmp_path):
    class Player:
        def __init__(self):
            self.checked = False

        def check(self):
            self.checked = True

        def act(self, requests):
            return [Response("+")] * len(requests)

    player = Player()
    trainer = make_trainer(tmp_path, init={"rollout_policy": player}, max_steps=1)
    assert player.checked
    trainer.train()
    assert {turn.completion for episode in collected(tmp_path) for turn in episode.turns} == {"+"}


def test_capacity(tmp_path):
    trainer = make_trainer(tmp_path, dataset=text_number_line(), replay_capacity=20)
    trainer.train()
    logs = step_logs(trainer)
    assert logs[-1]["env_turns"] > 40 and logs[-1]["replay_turns"] <= len(text_number_line()) + 20
    assert len(load_replay(tmp_path / "replay", "offline")) == len(text_number_line())


def test_a_target_ends_training(tmp_path, monkeypatch):
    rates = iter([0.5, 0.9, 0.8, 0.9, 0.95, 1.0])
    metrics = {"success_rate_low": 0.0, "success_rate_high": 1.0, "mean_return": 0.0}
    monkeypatch.setattr(
        "vlmq_trl.vlmq_trainer.evaluate_model", lambda *args, **kwargs: {"success_rate": next(rates), **metrics}
    )
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, stop_at_success=0.9)
    trainer.train()
    assert trainer.state.global_step == 5, "two in a row: 0.9 and 0.95"


def test_evaluations_are_recorded(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, record_episodes=2)
    trainer.train()
    for step in (1, 2):
        folder = tmp_path / "episodes" / f"step-{step:06d}"
        assert len(list(folder.glob("*.gif"))) == 2 and (folder / "episodes.jsonl").is_file()


def test_exploring_lets_a_model_that_cannot_act_meet_rewards(tmp_path):
    """A random model names no legal action; what it explores is legal, and its answers have no log-probabilities."""
    trainer = make_trainer(tmp_path, rollout_epsilon=0.1, max_steps=1)
    trainer.train()
    turns = [turn for episode in collected(tmp_path) for turn in episode.turns]
    assert {turn.action for turn in turns} == {"-", "+"} and all(turn.valid for turn in turns)
    assert all(turn.behavior_logprobs is None for turn in turns)
    assert len({turn.reward for turn in turns}) > 1


def test_a_model_that_cannot_act_explores_by_its_own_odds(tmp_path):
    """With an action temperature its actions are legal, its own, and drawn with the probabilities it gives them."""
    trainer = make_trainer(tmp_path, rollout_action_temperature=1.0, max_steps=1)
    trainer.train()
    turns = [turn for episode in collected(tmp_path) for turn in episode.turns]
    assert {turn.action for turn in turns} == {"-", "+"} and all(turn.valid for turn in turns)
    chances = [np.exp(sum(turn.behavior_logprobs)) for turn in turns]
    assert all(0 < chance < 1 for chance in chances) and len(turns) > 10


@pytest.mark.parametrize(
    ("weight", "by_reference", "peft_config"),
    [
        (0.0, False, None),
        (0.25, False, None),
        (1.0, True, None),
        (0.5, True, LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5)),
    ],
)
def test_what_was_said_before_the_action_counts_less(weight, by_reference, peft_config, tmp_path, monkeypatch):
    """In the collected turns alone, and nothing but the action's own tokens is spared; and where the reference filters
    by as much as the model found it improbable before training."""
    fmt = JSONCoTFormat(reading_fields=("current number", "target number"))
    player = DemonstratorPolicy(make_demonstrator(NUMBER_LINE, "random"), fmt)
    trainer = make_trainer(
        tmp_path,
        dataset=text_number_line(agent_format=fmt),
        init={"agent_format": fmt, "rollout_policy": player, "peft_config": peft_config},
        online_thought_weight=weight,
        online_thought_filter="reference" if by_reference else "none",
        online_fraction=0.5,
        filter="none",
        max_completion_length=64,
        max_steps=3,
        learning_rate=0.05,
    )
    for part in trainer.model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5  # in training; the reference is without
    before = tiny_models.build("llama")[0].eval()
    batches, weights, seen, moved = [], [], {False: 0, True: 0}, 0.0
    own, policy_loss = trainer.compute_loss, losses.policy_loss

    def compute_loss(model, inputs, **kwargs):
        batches.append({**inputs})
        return own(model, inputs, **kwargs)

    def recorded(log_probs, tokens, *args):
        weights.append(tokens.tolist())
        return policy_loss(log_probs, tokens, *args)

    trainer.compute_loss = compute_loss
    monkeypatch.setattr(losses, "policy_loss", recorded)
    trainer.train()
    assert len(batches) == len(weights) == 3
    tokenizer, first_online = trainer.processing_class, len(trainer.train_dataset)
    for batch, given in zip(batches, weights, strict=True):
        first, last = (chances(model, batch) for model in (before, trainer.model.pretrained_model.eval()))
        learned = batch["labels"] != -100
        moved = max(moved, (first / last)[learned].log().abs().max().item())
        for i, row in enumerate(batch["turn_row"].tolist()):
            labels, online = batch["labels"][i], row >= first_online
            positions = (labels != -100).nonzero().flatten().tolist()
            seen[online] += 1
            for k, t in enumerate(positions):  # the action's from where the text before it and it name the key
                thought = '"action": ' not in tokenizer.decode(labels[positions[: k + 1]])
                expected = weight * (first[i, t].item() if by_reference else 1.0) if thought and online else 1.0
                assert given.pop(0) == pytest.approx(expected, rel=1e-4)
        assert not given
    assert min(seen.values()) >= 6
    assert moved > 0.5  # what is probable now, in nats
    log = trainer.state.log_history
    assert {entry["rollout_reading_rate"] for entry in log if "rollout_round" in entry} == {1.0}
    assert trainer.evaluate()["eval_reading_rate"] == 0  # an untrained model reads nothing
    with pytest.raises(ValueError, match=r"`online_thought_weight=0.5` needs to know where a response comes to its"):
        VLMQTrainer(
            tiny_models.build("llama")[0],
            config(tmp_path / "offline", online_thought_weight=0.5),
            train_dataset=text_number_line(agent_format=fmt),
            processing_class=tokenizer,
        )


@torch.no_grad()
def chances(model, batch) -> torch.Tensor:
    """[B, T] the probability of each token, given those before it; that of the first is 0."""
    ids = batch["input_ids"]
    given = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].softmax(-1)
    return torch.nn.functional.pad(given.gather(-1, ids[:, 1:, None])[..., 0], (1, 0))


def test_a_reference_needs_whole_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(vlmq_trainer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"`online_thought_filter='reference'` keeps a whole copy of the trained"):
        make_trainer(tmp_path, init={"agent_format": JSONCoTFormat()}, online_thought_filter="reference")


class Doors(gymnasium.Env):
    """Two rooms with four doors each; one door of each leads on."""

    observation_space = gymnasium.spaces.Dict({"text": gymnasium.spaces.Text(99)})
    action_space = gymnasium.spaces.Text(99)
    task, legal_actions = "Which door?", ("a", "b", "c", "D")

    def __init__(self, right=("a", "a")):
        self.right = right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = ()
        return {"text": "outside"}, {}

    def step(self, action):
        self.taken += (action,)
        return {"text": f"behind {action}"}, float(self.taken == self.right), len(self.taken) == 2, False, {}


def test_search_finds_what_the_policy_hardly_ever_does(tmp_path):
    run = {"rollout_action_temperature": 0.5, "learning_rate": 1e-9, "turns_per_round": 16, "updates_per_turn": 1 / 16}

    def played(name, right, fraction):
        """[N, 2] doors of the episodes, in order."""
        env = functools.partial(Doors, right)
        make_trainer(tmp_path / name, env=env, max_steps=20, rollout_search_fraction=fraction, **run).train()
        return [tuple(turn.action for turn in episode.turns) for episode in collected(tmp_path / name)]

    plain = played("plain", ("a", "a"), 0.0)
    rare = [sorted("abcD", key=[doors[room] for doors in plain].count)[1] for room in (0, 1)]
    right = (rare[0], rare[1])
    assert plain.count(right) < 0.1 * len(plain), "so it is not found by chance soon"
    searched = played("search", right, 1.0)
    assert searched[len(searched) // 2 :].count(right) > 0.8 * len(searched) / 2
    half = played("half", right, 0.5)
    assert 0.3 * len(half) / 2 < half[len(half) // 2 :].count(right) < 0.7 * len(half) / 2


def test_what_is_known_to_be_worse_is_left(tmp_path):
    """By prompt and by what is said before the action, whatever its spelling; the offline turns count, evicted ones do
    not."""
    fmt = JSONCoTFormat(reading_fields=("room",))
    legal = ("Left", "Right", "up")

    def prompt(task):
        return [{"role": "user", "content": [{"type": "text", "text": text} for text in (task, "where?")]}]

    def request(task="go", episode=0):
        return Request(None, prompt(task), [], np.random.default_rng(0), legal, episode)

    def said(room, action=""):
        return fmt.render(action, {"room": room})

    def played(number, *turns):
        """Of (room, action, reward)."""
        return Episode(
            f"e{number}",
            tuple(Turn(prompt("go"), [], said(room, action), reward) for room, action, reward in turns),
            True,
            False,
            seed=number,
        )

    visited = VisitedStates(fmt, 1.0, seed=0)

    def left(room, task="go"):
        return tuple(visited(request(task), said(room)[:-2]))

    # Where each step costs something, the way that did best is gone again from its first step on.
    costly = VisitedStates(fmt, 1.0, seed=0)
    costly.add(played(0, ("1", "left", -0.1), ("2", "right", -0.1), ("3", "up", 1.0)))
    costly.add(played(1, ("1", "right", -0.1), ("4", "up", 0.5)))
    assert [tuple(costly(request(), said(room)[:-2])) for room in "1234"] == [
        ("Left",),
        ("Right",),
        ("up",),
        legal[:2],
    ]

    # Each state has actions of its own: of B both were tried; of D one never was, that C has not.
    own = VisitedStates(fmt, 1.0, seed=0)

    def asked(room, *actions):
        return tuple(own(replace(request(), legal_actions=actions), said(room)[:-2]))

    for number, action in enumerate(("up", "down")):
        own.add(played(number, ("A", "left", 0.0), ("B", action, -1.0)))
    own.add(played(2, ("A", "right", 0.0)))
    asked("B", "up", "down")
    assert asked("A", "left", "right") == ("right",)
    own.add(played(3, ("C", "left", 0.0), ("D", "left", -1.0)))
    own.add(played(4, ("C", "right", -1.0)))
    asked("D", "left", "dig")
    assert asked("C", "left", "right") == ("left",)

    offline = dataset_from_episodes([played(0, ("1", "left", 0.0), ("2", "LEFT", 5.0))])
    with ReplayBuffer(tmp_path, with_images=False, capacity=3) as buffer:
        buffer.add_offline(offline, validate_trajectories(offline))
        assert left("1") == left("2") == legal
        visited.count(buffer)
        assert left("1") == left("2") == ("Left",), "it had the highest return"
        first = played(1, ("1", "Right", -1.0), ("3", "up", 0.0))
        visited.add(first)
        visited.add(played(2, ("1", "Left", 0.0), ("2", "Left", 0.0)))
        # Right cost 1, and at best 5 follow; Left led to where something is unknown, but not to 5 the last time.
        assert visited(request(), said("1", "Ri")) == {"Left": 2, "up": 0}
        assert left("2") == ("Right", "up"), "2.5 on the average, and 5 may be had elsewhere"
        assert left("1", task="stay") == legal and left("3") == ("Left", "Right")
        visited.add(played(3, ("3", "Left", 0.0)))
        visited.add(played(4, ("3", "Right", 2.0)))
        assert left("3") == ("Right",), "all were tried"
        visited.add(played(5, ("1", "up", 0.0), ("3", "Right", 0.0)))
        assert left("1") == ("Left",), "up leads to where 1 is to be had on the average"
        visited.add(played(6, ("5", "Left", 0.0), ("5", "right", 0.0), ("5", "Up", 0.0)))
        assert left("5") == ("Left", "Right"), "what leads back counts as unknown, Up ends with nothing"

        buffer.append(first, round=1)
        buffer.commit()
        visited.count(buffer)
        assert left("3") == ("Left", "Right"), "as if it had been there all along"
        buffer.append(played(7, ("4", "up", -2.0), ("4", "up", 0.0)), round=2)
        buffer.commit()
        visited.count(buffer)
        assert left("3") == legal and left("1") == ("Left",), "the first online episode is gone"
        few = VisitedStates(fmt, 0.3, seed=0)
        few.count(buffer)
        tells = [len(few(request(episode=number), said("1")[:-2])) == 1 for number in range(1000)]
        assert 0.25 < np.mean(tells) < 0.35
        assert tells == [len(few(request(episode=number), said("1")[:-2])) == 1 for number in range(1000)]


class OwnGoal(TextNumberLine):
    """Knows its task only once an episode has begun, and can be made so often."""

    left = 0

    def __init__(self):
        OwnGoal.left -= 1
        if OwnGoal.left < 0:
            raise ConnectionError("the simulator is busy")
        super().__init__()
        self.goal = None

    @property
    def task(self):
        return {0: "Go."}[self.goal]

    def reset(self, *, seed=None, options=None):
        self.goal = 0
        return super().reset(seed=seed, options=options)


def test_saving_makes_no_environment(tmp_path):
    OwnGoal.left = 100
    trainer = make_trainer(
        tmp_path, env=OwnGoal, save_strategy="steps", save_steps=2, max_steps=2, init={"agent_format": None}
    )
    trainer.train()
    OwnGoal.left = 0
    trainer.save_model(tmp_path / "agent")
    assert (tmp_path / "checkpoint-2" / "agent.json").is_file() and (tmp_path / "agent" / "agent.json").is_file()


def test_exploration_that_ends(tmp_path):
    """All of the first round's actions are explored, none of the last round's."""
    trainer = make_trainer(
        tmp_path, rollout_epsilon_start=1.0, rollout_annealing_turns=1, rollout_temperature_start=5.0, max_steps=4
    )
    trainer.train()
    rates = [log["rollout_valid_rate"] for log in trainer.state.log_history if "rollout_round" in log]
    assert len(rates) >= 2 and rates[0] == 1 and rates[-1] == 0


class TwoDoors(gymnasium.Env):
    """Whatever the agent does, odd seeds give 1, even ones 0."""

    observation_space = gymnasium.spaces.Dict({"text": gymnasium.spaces.Text(99)})
    action_space = gymnasium.spaces.Text(99)
    task, legal_actions = "Which door?", ("left", "right")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.gain = float(seed % 2)
        return {"text": f"door {seed % 2}"}, {}

    def step(self, action):
        return {"text": "the end"}, self.gain, True, False, {}


def test_episodes_that_went_badly_are_repeated(tmp_path):
    """Seeds that gave the most are played once, others again and again, each time as an episode of its own."""
    run = {"env": TwoDoors, "rollout_repeat_fraction": 0.8, "max_steps": 8}
    trainer = make_trainer(tmp_path, **run)
    trainer.train()
    episodes = collected(tmp_path)
    seeds = [episode.seed for episode in episodes]
    assert len({episode.episode_id for episode in episodes}) == len(episodes)
    repeated = [seed for k, seed in enumerate(seeds) if seed in seeds[:k]]
    assert len(repeated) > len(seeds) / 2 and {seed % 2 for seed in repeated} == {0}
    assert {seed % 2 for seed in seeds} == {0, 1}
    again = ReplayBuffer(tmp_path / "replay", with_images=False)
    assert dict(OnlineData._known_returns(SimpleNamespace(buffer=again))) == {seed: float(seed % 2) for seed in seeds}
    again.close()


# ---- going on ----


@pytest.mark.parametrize(("saved", "prioritized"), [(3, 0.0), (4, 0.0), (4, 0.75)])  # and repeats, then
def test_resume(tmp_path, saved, prioritized):
    """From a checkpoint in the middle of a round, or at its end, a run goes on bit by bit."""
    run = {"dataset": text_number_line(), "offline_steps": 1, "save_strategy": "steps", "save_steps": saved}
    run |= {"replay_prioritized_fraction": prioritized, "rollout_repeat_fraction": prioritized}
    whole = make_trainer(tmp_path / "whole", **run)
    whole.train()
    cut = make_trainer(tmp_path / "cut", callbacks=[StopAt(5)], **run)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make_trainer(tmp_path / "cut", **run)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(0.01)
    resumed.train(resume_from_checkpoint=True)
    assert step_logs(resumed) == step_logs(whole)
    assert_same_run(resumed, whole)


def test_a_checkpoint_from_before_the_first_round(tmp_path):
    run = {"dataset": text_number_line(), "offline_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, **run)
    whole.train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path, **run)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_a_resumed_run_needs_its_buffer(tmp_path):
    run = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path / "run", **run).train()
    make_trainer(tmp_path / "other", gamma=0.5, **run).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "replay")
    with pytest.raises(ValueError, match=r"was written with .* collected turns in .*replay, which now holds 0 coll"):
        make_trainer(tmp_path / "run", **run).train(resume_from_checkpoint=True)
    shutil.copytree(tmp_path / "other" / "replay", tmp_path / "run" / "replay", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"which now holds other play.*Put the run's own buffer back"):
        make_trainer(tmp_path / "run", **run).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("online", "checkpoint"), [(False, lambda path: True), (True, lambda path: path)])
def test_a_finished_run_is_not_trained_further(tmp_path, online, checkpoint):
    kwargs = {"dataset": text_number_line(), "env": TextNumberLine if online else None, "max_steps": 3}
    kwargs |= {"save_strategy": "steps", "save_steps": 3}
    callbacks = [EnvEvaluationCallback(TextNumberLine, eval_steps=3, episodes=2, max_completion_length=3)]
    whole = make_trainer(tmp_path, callbacks=callbacks, **kwargs)
    whole.train()
    kept = EnvEvaluationCallback(TextNumberLine, eval_steps=3, episodes=2, max_completion_length=3)
    again = make_trainer(tmp_path, callbacks=[kept], **kwargs)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.add_(0.01)
    again.train(resume_from_checkpoint=checkpoint(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3 and kept.history == callbacks[0].history
    kept.restore_best(again.model)
    for (name, a), b in zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-best")
    longer = make_trainer(tmp_path, **{**kwargs, "max_steps": 5})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5


@pytest.mark.parametrize("first", [{"max_steps": -1, "num_train_epochs": 0.5}, {"max_steps": 2}])
def test_more_epochs_are_trained(tmp_path, first):
    run = {"dataset": text_number_line(), "env": None, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **run, **first).train()
    longer = make_trainer(tmp_path, **run, max_steps=-1, num_train_epochs=1)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.epoch == 1 and longer.state.global_step > 2


def test_half_a_checkpoint_is_none(tmp_path):
    trainer = make_trainer(tmp_path, dataset=text_number_line(), env=None, save_strategy="steps", save_steps=6)
    trainer.train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=f"no whole checkpoint in {tmp_path}"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_without_a_checkpoint_finds_its_rounds_again(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", callbacks=[StopAt(3)]).train()
    known = collected(tmp_path / "cut")
    again = make_trainer(tmp_path / "cut")
    again.train()
    assert collected(tmp_path / "cut")[: len(known)] == known
    assert_same_run(again, whole)


def test_purely_online_a_run_whose_first_rounds_were_evicted_finds_its_rounds_again(tmp_path):
    run = {"replay_capacity": 20, "max_steps": 8}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[StopAt(7)], **run).train()
    again = make_trainer(tmp_path, **run)
    again.train()
    assert again.state.global_step == 8 and again.model.critic.target_std.isfinite()


def test_a_smaller_batch_after_a_full_memory(tmp_path, monkeypatch):
    """`auto_find_batch_size` begins anew, on the buffer that is open."""
    trainer = make_trainer(tmp_path, auto_find_batch_size=True, max_steps=2)
    compute_loss, failed = trainer.compute_loss, []

    def full(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", full)
    trainer.train()
    assert failed and trainer.state.global_step == 2


def test_an_interrupted_round_is_filled_up(tmp_path, monkeypatch):
    """What was committed of a round stays, and what it lacks is played: no episode twice, none lost."""
    monkeypatch.setattr("vlmq_trl.online.data.COMMIT_SECONDS", 0.0)
    append = ReplayBuffer.append
    count = 0

    def interrupted(self, episode, *, round):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        append(self, episode, round=round)

    with monkeypatch.context() as patch:
        patch.setattr(ReplayBuffer, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path).train()
    (first,) = collected(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.train()
    episodes = collected(tmp_path)
    assert episodes[0] == first
    assert len({episode.episode_id for episode in episodes}) == len(episodes) == len({e.seed for e in episodes})
    assert step_logs(trainer)[-1]["env_turns"] == sum(len(episode.turns) for episode in episodes)


def other_weights(trainer):
    with torch.no_grad():
        trainer.model.pretrained_model.get_output_embeddings().weight.add_(0.01)


class Scaled(gymnasium.RewardWrapper):
    def __init__(self, by=1.0):
        super().__init__(TextNumberLine())
        self.by = by

    def reward(self, reward):
        return self.by * reward


@pytest.mark.parametrize(
    ("kwargs", "change"),
    [
        ({"gamma": 0.5}, None),
        ({}, other_weights),  # another model, one that has been trained since, or a second `train`
        ({"env": functools.partial(Scaled, by=2.0)}, None),
        ({"env": lambda: Scaled(2.0)}, None),
        ({"init": {"agent_format": PlainFormat(history=1)}}, None),
    ],
)
def test_the_play_of_another_run_is_not_taken(tmp_path, kwargs, change):
    env = (lambda: Scaled(1.0)) if callable(kwargs.get("env")) else TextNumberLine
    env = functools.partial(Scaled, by=1.0) if isinstance(kwargs.get("env"), functools.partial) else env
    make_trainer(tmp_path, env=env, max_steps=1).train()
    other = make_trainer(tmp_path, **{"env": env, "max_steps": 1, **kwargs})
    if change is not None:
        change(other)
    with pytest.raises(ValueError, match="another model or another environment collected"):
        other.train()
    make_trainer(tmp_path, env=env, max_steps=1).train()  # the same is


def test_what_tells_factories_apart_is_the_same_in_another_process():
    def factory(by):
        return lambda: Scaled(by)

    assert identity(factory(1.0)) == identity(factory(1.0)) != identity(factory(2.0))
    assert identity(CallableFormat(parse_fn=str.strip)) == identity(CallableFormat(parse_fn=str.strip))
    assert identity(functools.partial(Scaled, env=object())) == identity(functools.partial(Scaled, env=object()))
    assert identity(Scaled) != identity(TextNumberLine)
    program = """if True:
        from vlmq_trl.online.data import identity
        class Player: pass
        player = Player()
        player.words, player.responses, player._cache = {f"word {n}" for n in range(9)}, RESPONSES, object()
        print(identity(player))"""
    told = {
        subprocess.run(
            [sys.executable, "-c", program.replace("RESPONSES", str(n))],
            env={**os.environ, "PYTHONHASHSEED": str(n)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in (1, 2)
    }
    assert len(told) == 1 and "word 8" in told.pop()


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_steps": -1}, "set `max_steps`.*or `max_env_turns`"),
        ({"offline_steps": 3}, "`offline_steps=3` needs a `train_dataset`"),
        ({"rollout_seed": 1_000_001}, "collection would come to play the evaluation's episodes"),
        ({"rollout_epsilon": 0.1, "env": OpenEnded}, "`rollout_epsilon=0.1` needs to know what can be done"),
        ({"rollout_search_fraction": 0.1, "env": OpenEnded}, "`rollout_search_fraction=0.1` needs to know what can"),
        (
            {"rollout_search_fraction": 0.1, "init": {"rollout_policy": Mute()}},
            "`rollout_search_fraction` binds the model's own answers",
        ),
        (
            {"rollout_search_fraction": 0.1, "env": NUMBER_LINE, "name": "idefics3"},
            "in the format 'plain' it says nothing: all pictures would be one state",
        ),
        ({"dataset": number_line}, "shows text only, the training data pictures"),
    ],
)
def test_bad_arguments(kwargs, message, tmp_path):
    kwargs = {name: value() if name == "dataset" else value for name, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **kwargs)


def test_neither_data_nor_environment(tmp_path):
    with pytest.raises(ValueError, match="Nothing to learn from"):
        make_trainer(tmp_path, env=None)


class Breaks(TextNumberLine):
    """Raises in every step once eight episodes have begun."""

    begun = 0

    def reset(self, **kwargs):
        Breaks.begun += 1
        return super().reset(**kwargs)

    def step(self, action):
        if Breaks.begun > 8:
            raise RuntimeError("the server is gone")
        return super().step(action)


def test_failing_environments_end_a_run_that_has_saved_everything(tmp_path):
    Breaks.begun = 0
    trainer = make_trainer(tmp_path, env=Breaks, max_env_failures=2, max_steps=50)
    with pytest.raises(EnvFailureError, match="the server is gone"):
        trainer.train()
    step = trainer.state.global_step
    assert step > 0 and (tmp_path / f"checkpoint-{step}" / "trainer_state.json").is_file()
    assert sum(len(episode.turns) for episode in collected(tmp_path)) >= 15
    with ReplayBuffer(tmp_path / "replay") as buffer:  # it was closed
        assert buffer.counters["env_failures"] >= 3


class Flaky(TextNumberLine):
    """Raises in every fourth reset."""

    resets = 0

    def reset(self, **kwargs):
        Flaky.resets += 1
        if Flaky.resets % 4 == 0:
            raise RuntimeError("a hiccup")
        return super().reset(**kwargs)


def test_some_failures_are_borne_and_counted(tmp_path):
    Flaky.resets = 0
    trainer = make_trainer(tmp_path, env=Flaky, init={"eval_env": TextNumberLine})
    trainer.train()
    assert step_logs(trainer)[-1]["env_failures"] == Flaky.resets // 4 > 0


class FailsLate(TextNumberLine):
    """Of the episodes of a run the first raises at its second turn, the second at its fifth."""

    first = 0

    def reset(self, *, seed=None, options=None):
        self.left = {FailsLate.first: 1, FailsLate.first + 1: 4}.get(seed, 99)
        return super().reset(seed=1 if self.left < 99 else seed)  # seed 1: far from the goal

    def step(self, action):
        if self.left == 0:
            raise RuntimeError("a hiccup")
        self.left -= 1
        return super().step(action)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_round_is_complete_when_it_has_its_turns(asynchronous, tmp_path):
    """Also where running episodes, with which it would have been, are dropped when no other was to begin any more."""
    FailsLate.first = config(tmp_path).rollout_seed
    run = {"turns_per_round": 4, "max_env_turns": 4, "max_steps": 2, "max_env_failures": 5}
    trainer = make_trainer(
        tmp_path, env=FailsLate, init={"eval_env": TextNumberLine}, async_collection=asynchronous, **run
    )
    trainer.train()
    logs = step_logs(trainer)[-1]
    assert logs["env_turns"] >= 4 and logs["env_failures"] == 2


def test_evaluation_bears_failures_as_collection_does(tmp_path):
    Flaky.resets = 0
    run = {"init": {"eval_env": Flaky}, "eval_strategy": "steps", "eval_steps": 2, "eval_num_envs": 2}
    trainer = make_trainer(tmp_path / "borne", **run)
    trainer.train()
    told = [log["eval_episodes"] for log in trainer.state.log_history if "eval_episodes" in log]
    assert len(told) == 3 and all(0 < episodes < 4 for episodes in told)
    with pytest.raises(EnvFailureError, match="a hiccup"):
        make_trainer(tmp_path / "not", max_env_failures=0, **run).train()
    assert (tmp_path / "not" / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.parametrize(("fault", "timeout"), [("exit", None), ("deaf", 1)])
def test_processes_that_die_or_hang_do_not_stop_training(fault, timeout, tmp_path, caplog):
    """The episodes before, beside and after the failed one are there, and the run goes to its end."""
    first = config(tmp_path).rollout_seed
    env = functools.partial(Misbehaving, fault, (first + 1, first + 6), images=False)
    trainer = make_trainer(
        tmp_path, env=env, init={"eval_env": TextNumberLine}, rollout_workers=True, env_timeout=timeout
    )
    trainer.train()
    assert trainer.state.global_step == 6 and step_logs(trainer)[-1]["env_failures"] == 2
    seeds = sorted(episode.seed - first for episode in collected(tmp_path))
    assert seeds == [n for n in range(seeds[-1] + 1) if n not in (1, 6)] and seeds[-1] > 10
    kind = "died" if fault == "exit" else "timeout"
    assert caplog.text.count(f"the episode is dropped ({kind})") == 2


def test_a_loss_that_is_not_finite_ends_a_run_that_has_saved_everything(tmp_path, monkeypatch):
    """Aside: the update before may have broken the weights, and the checkpoints before it stay."""
    pushed = []
    monkeypatch.setattr(VLMQTrainer, "_push_from_checkpoint", lambda self, folder: pushed.append(Path(folder).name))
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    policy_loss = losses.policy_loss

    def broken(*args, **kwargs):
        loss = policy_loss(*args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 3 else loss

    monkeypatch.setattr(losses, "policy_loss", broken)
    trainer.args.push_to_hub = True
    with pytest.raises(FloatingPointError, match=r"The loss of update 3 is nan.*They lie in \S+stopped-3, which"):
        trainer.train()
    assert pushed == ["checkpoint-2"] and trainer.args.push_to_hub
    folders = {path.name for path in tmp_path.iterdir() if path.name.startswith(("checkpoint-", "stopped-"))}
    assert folders == {"checkpoint-2", "stopped-3"}
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    saved = make_trainer(tmp_path, max_steps=3)
    saved._load_from_checkpoint(str(tmp_path / "stopped-3"))
    for (name, a), b in zip(saved.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all(), name
    monkeypatch.undo()
    trainer.args.push_to_hub = False
    trainer.train(resume_from_checkpoint=True)  # the same trainer, from before; nothing is left of the batch
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert step_logs(trainer)[-1] == step_logs(whole)[-1]
    assert_same_run(trainer, whole)
    other = make_trainer(tmp_path)
    other.train(resume_from_checkpoint=str(tmp_path / "stopped-3"))  # told to: it goes on from there
    assert_same_run(other, whole)


def test_a_full_disk(tmp_path, monkeypatch):
    """The run ends and says what is missing; with room again it goes on as if nothing had happened."""
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    write, rounds = replay_buffer.write_file, []

    def full(path, data):
        if path.parent.name == "shards":
            rounds.append(path)
            if len(rounds) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(replay_buffer, "write_file", full)
        with pytest.raises(OSError, match=r"the disk is full: .* needs .* MB more"):
            make_trainer(tmp_path / "cut").train()
    resumed = make_trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert step_logs(resumed) == step_logs(whole)
    assert_same_run(resumed, whole)


# ---- collection while the model learns ----


def test_a_copy_of_the_policy(tmp_path):
    """It answers as the learner does, shares what is frozen, and does not follow the learner by itself."""
    model, processor = tiny_models.build("llama")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trainer = VLMQTrainer(model, config(tmp_path), train_dataset=text_number_line(), processing_class=processor)
    learner = trainer.model.pretrained_model
    copied = copy_of_policy(learner)
    trained = dict(learner.named_parameters())
    for name, parameter in copied.named_parameters():
        assert (parameter is trained[name]) != trained[name].requires_grad, name
    ids = torch.arange(10, 20)[None]
    before = learner(input_ids=ids).logits
    assert torch.equal(copied(input_ids=ids).logits, before)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(copied(input_ids=ids).logits, before)
    assert not torch.equal(learner(input_ids=ids).logits, before)
    for name, weight in changing(learner).items():
        changing(copied)[name].data.copy_(weight)
    assert torch.equal(copied(input_ids=ids).logits, learner(input_ids=ids).logits)


def test_collecting_while_learning(tmp_path):
    trainer = make_trainer(
        tmp_path,
        dataset=text_number_line(),
        offline_steps=2,
        max_steps=14,
        async_collection=True,
        max_staleness=3,
        eval_strategy="steps",
        eval_steps=5,
    )
    trainer.train()
    logs = step_logs(trainer)
    assert [log["round"] for log in logs] == [0, 0] + [1 + k // 2 for k in range(12)]
    assert max(log.get("staleness_max", 0) for log in logs) <= 3
    assert 0 < max(log["learner_idle"] for log in logs) <= 1
    # Nothing is collected for updates that will not come.
    assert 6 * 15 <= logs[-1]["env_turns"] == sum(len(e.turns) for e in collected(tmp_path)) < 6 * 15 + 30
    assert not trainer._online._thread.is_alive()


def test_an_error_while_collecting_reaches_the_learner(tmp_path):
    Breaks.begun = 0
    trainer = make_trainer(
        tmp_path, env=Breaks, async_collection=True, max_env_failures=1, max_steps=100, max_staleness=2
    )
    with pytest.raises(EnvFailureError, match="the server is gone"):
        trainer.train()
    assert not trainer._online._thread.is_alive()
    assert list((tmp_path).glob("checkpoint-*/trainer_state.json"))
    assert collected(tmp_path)


def test_an_interrupted_learner_ends_the_collection(tmp_path):
    trainer = make_trainer(tmp_path, async_collection=True, max_steps=100, callbacks=[StopAt(3)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer._online._thread.is_alive()
    with ReplayBuffer(tmp_path / "replay") as buffer:  # it was closed
        assert buffer.end > 0


class SlowPlayer:
    """Answers after a while, and counts."""

    def __init__(self):
        self.calls = 0

    def act(self, requests):
        self.calls += 1
        time.sleep(0.02)
        return [Response("+")] * len(requests)


def test_an_interrupted_learner_does_not_wait_for_a_round_of_another_policy(tmp_path):
    player = SlowPlayer()
    calls = []

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(player.calls)
            raise KeyboardInterrupt

    trainer = make_trainer(
        tmp_path,
        async_collection=True,
        turns_per_round=200,
        max_steps=100,
        callbacks=[Interrupt()],
        init={"rollout_policy": player},
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert player.calls <= calls[0] + 2 and not trainer._online._thread.is_alive()


def test_play_pauses_during_an_evaluation(tmp_path, monkeypatch):
    """So that the evaluation's samples are those of its seed, whatever is collected."""
    player, calls = SlowPlayer(), []

    def evaluated(*args, **kwargs):
        before = player.calls
        time.sleep(0.2)
        calls.append(player.calls - before)
        return {"success_rate": 0.0, "success_rate_low": 0.0, "success_rate_high": 1.0, "mean_return": 0.0}

    monkeypatch.setattr("vlmq_trl.vlmq_trainer.evaluate_model", evaluated)
    run = {"async_collection": True, "turns_per_round": 60, "updates_per_turn": 0.05}
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, max_steps=4, init={"rollout_policy": player}, **run
    )
    trainer.train()
    assert calls == [0] * 4 and player.calls > 40


def test_the_learner_goes_on_where_all_that_it_has_is_evicted(tmp_path):
    """A slow learner: the thread's next round is the whole buffer before a batch is drawn from this one."""
    trainer = make_trainer(
        tmp_path, async_collection=True, replay_capacity=15, gradient_accumulation_steps=4, max_steps=8
    )
    collate = trainer.data_collator

    def slow(items):
        time.sleep(0.05)
        return collate(items)

    trainer.data_collator = slow
    trainer.train()
    assert trainer.state.global_step == 8


def test_the_copy_waits_for_newer_weights(tmp_path, monkeypatch):
    """A slow environment lets the learner run ahead: the copy still answers with weights of the last updates."""

    class Slow(TextNumberLine):
        def step(self, action):
            time.sleep(0.02)
            return super().step(action)

    ages = []
    act = ModelPolicy.act

    def watched(self, requests):
        online = trainer._online
        ages.append(online._update - online._held_update)
        return act(self, requests)

    monkeypatch.setattr(ModelPolicy, "act", watched)
    trainer = make_trainer(
        tmp_path, env=Slow, async_collection=True, max_steps=40, updates_per_turn=1.0, max_staleness=4
    )
    trainer.train()
    assert max(ages) <= 4 and len(set(ages)) > 1


def test_gymnasium_ids_work_in_processes(tmp_path):
    gymnasium.make(NUMBER_LINE).close()
    trainer = make_trainer(
        tmp_path,
        env=NUMBER_LINE,
        name="idefics3",
        max_steps=1,
        rollout_workers=True,
        env_timeout=60,
        eval_strategy="steps",
        eval_steps=1,
        eval_episodes=2,
    )
    trainer.train()
    assert collected(tmp_path)
