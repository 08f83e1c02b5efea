# SPDX-License-Identifier: Apache-2.0
"""The trainer on tiny models: it trains, logs, evaluates, saves and opens again; and a model as a policy."""

import json
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback

from tests import tiny_models
from tests.small_runs import NUMBER_LINE, TextNumberLine, config, number_line, text_number_line
from vlmq_trl import callbacks, collect_demonstrations, objective, vlmq_trainer
from vlmq_trl.agent_format import PlainFormat
from vlmq_trl.critic import Critic
from vlmq_trl.modeling import AutoModelForImageTextToTextWithValueHead
from vlmq_trl.rollout import Response, play_episodes
from vlmq_trl.trajectory import Episode, Turn, concatenate_trajectories, dataset_from_episodes
from vlmq_trl.vlmq_trainer import VLMQTrainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
PLAYED = (
    "success_rate",
    "success_rate_low",
    "success_rate_high",
    "mean_return",
    "return_low",
    "return_high",
    "mean_turns",
    "reading_rate",
    "valid_rate",
    "episodes",
    "runtime",
    "temperature",
    "seed",
)


def make_trainer(output_dir, *, name="idefics3", dataset=None, peft_config=None, init=None, **kwargs) -> VLMQTrainer:
    model, processor = tiny_models.build(name)
    return VLMQTrainer(
        model=model,
        args=config(output_dir, **kwargs),
        train_dataset=number_line() if dataset is None else dataset,
        processing_class=processor,
        peft_config=peft_config,
        **(init or {}),
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def step_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- training ----

VARIANTS = {
    "scalar": {},
    "LoRA": {"peft_config": LORA},
    "vocab": {"critic_type": "vocab"},
    "LoRA, vocab": {"peft_config": LORA, "critic_type": "vocab"},
    "linear heads, one critic": {"critic_hidden_size": 0, "num_critics": 1},
    "three critics, min": {"num_critics": 3, "target_aggregation": "min"},
    "exponential filter": {"filter": "exp"},
    "no filter": {"filter": "none"},
    "tree backup": {"off_policy_trace": "tree_backup", "turn_lambda": 0.5},
    "lambdas 1": {"turn_lambda": 1.0, "token_lambda": 1.0},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "checkpointing": {"activation_checkpointing": True},
    "LoRA, checkpointing": {"activation_checkpointing": True, "peft_config": LORA},
    "LLaVA": {"name": "llava"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains(variant, tmp_path):
    """What should learn moves, what should not stays, and everything that is logged is a finite number."""
    trainer = make_trainer(tmp_path, max_steps=3, **VARIANTS[variant])
    before, saved = weights_of(trainer), trainer.args.to_dict()
    trainer.train()
    after = weights_of(trainer)
    lora = "peft_config" in VARIANTS[variant]
    kept = step_logs(trainer)
    assert len(kept) == 3
    policy_moves = sum(entry["kept_fraction"] for entry in kept) > 0
    for key, value in after.items():
        moved = not torch.equal(value, before[key])
        if key.startswith(("critic.online", "critic.target")):
            assert moved, f"{key} did not learn"
        elif lora and "lora_" not in key and key.startswith("pretrained_model"):
            assert not moved, f"{key} is frozen, and moved"
    trained = [k for k in after if k.startswith("pretrained_model") and ("lora_B" in k or not lora) and "q_proj" in k]
    assert policy_moves and trained
    assert all(not torch.equal(after[k], before[k]) for k in trained if "vision" not in k)
    expected = {
        *("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "nll", "policy_loss", "q_loss"),
        *("kept_fraction", "kept_fraction_uncertain", "uncertain_fraction", "num_tokens", "tokens_per_second"),
        *("target_mean", "target_std", "value_bias", "value_error"),
        *(f"{name}_q{q:02d}" for name in ("advantage", "value") for q in (5, 25, 50, 75, 95)),
        "conservative_loss" if saved["critic_type"] == "vocab" else "value_loss",
    }
    for entry in kept:
        assert expected <= set(entry), expected - set(entry)
        assert all(math.isfinite(value) for value in entry.values())
        assert 0 <= entry["kept_fraction"] <= 1


def test_loss_is_its_parts(tmp_path):
    """loss = policy_loss + critic_coef * (q_loss + value_loss), and `nll` is the policy's loss where all is kept."""
    trainer = make_trainer(tmp_path, max_steps=2, critic_coef=0.25, critic_warmup_steps=1)
    trainer.train()
    for entry in step_logs(trainer):
        parts = entry["policy_loss"] + 0.25 * (entry["q_loss"] + entry["value_loss"])
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    assert step_logs(trainer)[0]["nll"] == pytest.approx(step_logs(trainer)[0]["policy_loss"])


class RecordHeads(TrainerCallback):
    """Each step's (target heads before, online heads after, target heads after)."""

    def __init__(self):
        self.critic, self.steps = None, []

    def state(self, heads):
        return {k: v.clone() for k, v in getattr(self.critic, heads).state_dict().items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = self.state("target")

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((self.before, self.state("online"), self.state("target")))


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_target_moves_by_tau(critic_type, tmp_path, monkeypatch):
    """target <- target + tau * (online - target), once an optimiser step, also with gradient accumulation."""
    # The moments stay, so that nothing rescales the heads.
    monkeypatch.setattr(Critic, "update_moments", lambda self, *args, **kwargs: None)
    record = RecordHeads()
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        target_tau=0.25,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        critic_type=critic_type,
        init={"callbacks": [record]},
    )
    record.critic = trainer.model.critic
    trainer.train()
    assert len(record.steps) == 3
    for before, online, after in record.steps:
        for key in after:
            assert not torch.equal(online[key], before[key])
            torch.testing.assert_close(after[key], torch.lerp(before[key], online[key], 0.25), rtol=0, atol=0)


def test_moments_follow_the_targets(tmp_path, monkeypatch):
    """With a rate of 1 the moments are those of the step's targets, over all of its micro-batches."""
    returns = []
    packed_returns = objective.packed_returns
    monkeypatch.setattr(
        objective, "packed_returns", lambda *a, **kw: returns.append(packed_returns(*a, **kw)) or returns[-1]
    )
    trainer = make_trainer(tmp_path, max_steps=1, target_norm_rate=1.0, gradient_accumulation_steps=2)
    trainer.train()
    assert len(returns) == 2
    critic, seen = trainer.model.critic, torch.cat(returns)
    torch.testing.assert_close(critic.target_mean, seen.mean())
    torch.testing.assert_close(critic.target_variance, seen.var(correction=0))


def test_fresh_critic_starts_at_the_data_s_returns(tmp_path):
    trainer = make_trainer(tmp_path)
    returns = trainer._index.returns_to_go(0.95)
    assert trainer.model.critic.target_mean.item() == pytest.approx(returns.mean(), rel=1e-5)
    assert trainer.model.critic.target_std.item() == pytest.approx(returns.std(), rel=1e-5)


def test_warm_up_keeps_every_token(tmp_path):
    """A filter that lets nothing through starts after `critic_warmup_steps` updates."""
    trainer = make_trainer(tmp_path, max_steps=4, critic_warmup_steps=2, filter_threshold=1e9)
    trainer.train()
    assert [entry["kept_fraction"] for entry in step_logs(trainer)] == [1.0, 1.0, 0.0, 0.0]
    assert [entry["policy_loss"] > 0 for entry in step_logs(trainer)] == [True, True, False, False]


def test_the_filter_may_judge_the_action_alone(tmp_path):
    """A filter that lets nothing through, with and without the tokens before the action."""
    env = "vlmq_trl/NumberLine-v0"
    data = collect_demonstrations(env, policy="random", episodes=2, seed=0, progress=False)
    strict = {"dataset": data, "max_steps": 1, "filter_threshold": 1e9, "filter_scope": "action"}
    whole = make_trainer(tmp_path, **{**strict, "filter_scope": "response"}, init={"eval_env": env})
    whole.train()
    assert step_logs(whole)[0]["kept_fraction"] == 0
    trainer = make_trainer(tmp_path, **strict, init={"eval_env": env})
    trainer.train()
    (log,) = step_logs(trainer)
    assert 0.8 < log["kept_fraction"] < 1 and log["policy_loss"] > 0, "the reading and the thoughts, not the action"
    with pytest.raises(ValueError, match=r"`filter_scope='action'` needs to know .* give `agent_format`"):
        make_trainer(tmp_path, **strict)


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_the_critic_may_learn_the_action_alone(critic_type, tmp_path):
    """Of the heads' gradients, and of the returns, nothing comes from between a turn's first token and its action."""
    env = "vlmq_trl/NumberLine-v0"
    data = collect_demonstrations(env, policy="random", episodes=4, seed=0, progress=False)
    options = {"dataset": data, "critic_type": critic_type, "filter_scope": "action", "critic_scope": "action"}
    options |= {"token_lambda": 0.5, "turn_lambda": 0.5, "off_policy_trace": "tree_backup", "gamma": 0.9}
    trainer = make_trainer(tmp_path, **options, init={"eval_env": env})
    inputs = next(iter(trainer.get_train_dataloader()))
    turns = {k: v for k, v in inputs.items() if k.startswith(("turn_", "segment_", "action_"))}
    output = trainer.model(**{k: v for k, v in inputs.items() if k not in turns}, with_critic=True)
    for values in (output.target_q_values, output.target_state_values):
        values.normal_()  # fresh heads all but agree
    output.q_values.retain_grad()
    judged = objective.critic_losses(trainer.args, trainer.model.critic, output, inputs["labels"], turns)
    sum(judged.parts.values()).backward()
    turn = (inputs["labels"][:, 1:] != -100).nonzero()[:, 0]
    first = torch.ones_like(turn, dtype=torch.bool)
    first[1:] = turn[1:] != turn[:-1]
    action = turns["action_mask"]
    values = output.state_values if critic_type == "scalar" else output.target_state_values
    begins = action & (first | ~action.roll(1))
    torch.testing.assert_close(judged.turn_values, values.detach().mean(-1)[begins])
    learned, within = output.q_values.grad.abs().sum(-1) > 0, 0
    assert torch.equal(learned, action | first) and (~learned).sum() > 2 * learned.sum()
    for k in range(int(turn.max()) + 1):
        whole, begun = judged.returns[turn == k], judged.returns[(turn == k) & action]
        before = whole[: len(whole) - len(begun)]
        torch.testing.assert_close(before, before[-1:].expand_as(before))
        assert not torch.isclose(before[-1], begun[0], rtol=1e-3), "the state before the action bootstraps"
        assert len(begun) > 1 and not torch.isclose(begun[0], begun[-1], rtol=1e-3), "the action's tokens bootstrap"
        if k and turns["turn_segment"][k] == turns["turn_segment"][k - 1]:
            ended, followed = judged.returns[turn == k - 1][-1], turns["turn_reward"][k - 1] + 0.9 * before[0]
            torch.testing.assert_close(ended, followed)  # not from the next turn's first token either
            within += 1
    assert within
    trainer.train()
    assert all(math.isfinite(entry["q_loss"]) for entry in step_logs(trainer))


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_critic_learning_rate(peft_config, tmp_path):
    """The online heads are in groups of their own, and every trainable weight is in exactly one."""
    trainer = make_trainer(tmp_path, critic_learning_rate=0.05, weight_decay=0.1, peft_config=peft_config)
    trainer.create_optimizer()
    online = {id(p) for p in trainer.model.critic.online.parameters()}
    groups = trainer.optimizer.param_groups
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)
    assert online <= set(owned)
    for group in groups:
        heads = {id(p) in online for p in group["params"]}
        assert len(heads) <= 1, "a group mixes the critic's weights with the model's"
        if heads:
            assert group["lr"] == (0.05 if heads == {True} else 1e-3)


def with_log_probs(value: float | None):
    """Random play of the text NumberLine; each token (the action and the end of turn) has this log-probability."""

    class Player:
        def act(self, requests):
            recorded = None if value is None else [value, value]
            return [Response(str(r.rng.choice(["-", "+"])), recorded) for r in requests]

    played = play_episodes(TextNumberLine, Player(), episodes=8, agent_format=PlainFormat())
    return dataset_from_episodes(played, with_images=False)


def first_loss(tmp_path, dataset, **kwargs) -> float:
    trainer = make_trainer(tmp_path, name="llama", dataset=dataset, turn_lambda=0.9, **kwargs)
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()


def segments(trainer, rows):
    return trainer.get_train_dataloader().dataset.__getitems__(list(rows))


def test_off_policy_traces(tmp_path):
    """Retrace is no trace where mu is far below pi, and tree-backup where mu is 1 or was not recorded."""
    rare, sure, unknown = (with_log_probs(value) for value in (-50.0, 0.0, None))
    none = first_loss(tmp_path, rare)
    tree_backup = first_loss(tmp_path, rare, off_policy_trace="tree_backup")
    assert abs(none - tree_backup) > 1e-3
    assert first_loss(tmp_path, rare, off_policy_trace="retrace") == pytest.approx(none, rel=1e-6)
    assert first_loss(tmp_path, sure, off_policy_trace="retrace") == pytest.approx(tree_backup, rel=1e-6)
    # Where a part of the data was recorded, a batch without falls back to tree-backup.
    mixed = concatenate_trajectories([sure, unknown])
    trainer = make_trainer(tmp_path, name="llama", dataset=mixed, off_policy_trace="retrace", turn_lambda=0.9)
    reference = make_trainer(tmp_path, name="llama", dataset=mixed, off_policy_trace="tree_backup", turn_lambda=0.9)
    rows = range(len(sure), len(sure) + 6)
    loss, expected = (t.compute_loss(t.model, t.data_collator(segments(t, rows))) for t in (trainer, reference))
    assert loss.item() == expected.item()


def test_retrace_trains(tmp_path):
    trainer = make_trainer(
        tmp_path, name="llama", dataset=with_log_probs(-0.7), max_steps=3, off_policy_trace="retrace", turn_lambda=0.9
    )
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in step_logs(trainer))


def test_text_only_learns_to_answer(tmp_path):
    """Imitation of play whose answers are "-" and "+": the model answers so, and ends its turn."""
    trainer = make_trainer(
        tmp_path,
        name="llama",
        dataset=text_number_line(),
        filter="none",
        max_steps=30,
        learning_rate=3e-3,
        init={"eval_env": TextNumberLine, "agent_format": PlainFormat()},
    )
    assert trainer.evaluate()["eval_valid_rate"] < 0.5
    trainer.train()
    assert trainer.evaluate()["eval_valid_rate"] == 1.0


def test_the_training_data_may_be_exchanged(tmp_path):
    data = text_number_line()
    trainer = make_trainer(tmp_path, name="llama", dataset=data)
    other = text_number_line(episodes=5, seed=1).map(lambda row: {"reward": 42.0})
    trainer.train_dataset = other
    rewards = torch.cat([batch["turn_reward"] for batch in trainer.get_train_dataloader()])
    assert rewards.tolist() == [42.0] * len(other)


def test_a_finished_run_goes_on_where_the_data_has_grown(tmp_path):
    run = {"name": "llama", "num_train_epochs": 1, "save_strategy": "epoch"}
    first = make_trainer(tmp_path, dataset=text_number_line(episodes=4), **run)
    first.train()
    more = make_trainer(tmp_path, dataset=text_number_line(episodes=12), **run)
    more.train(resume_from_checkpoint=True)
    batches = len(more.get_train_dataloader())
    assert more.state.global_step == batches > first.state.global_step


# ---- evaluation ----


def test_metrics_of_logits_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, name="llama", dataset=text_number_line())
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match="`compute_metrics` gets the logits of whole sequences"):
        trainer.evaluate(text_number_line())


def test_evaluate_plays(tmp_path):
    trainer = make_trainer(tmp_path, init={"eval_env": NUMBER_LINE})
    metrics = trainer.evaluate()
    assert set(metrics) == {f"eval_{name}" for name in PLAYED}
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["eval_episodes"] == 4
    assert metrics["eval_success_rate_low"] <= metrics["eval_success_rate"] <= metrics["eval_success_rate_high"]
    assert trainer.state.log_history[-1]["eval_mean_turns"] == metrics["eval_mean_turns"] == 10.0
    other = trainer.evaluate(metric_key_prefix="test", episodes=2, temperature=1.0, seed=5)
    assert other["test_episodes"] == 2 and "test_success_rate" in other
    assert (other["test_temperature"], other["test_seed"]) == (1.0, 5.0)


def test_evaluate_computes_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, init={"eval_dataset": number_line(seed=100)})
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_runtime"} <= set(metrics) and "eval_success_rate" not in metrics
    logged = trainer.state.log_history[-1]
    assert {"eval_nll", "eval_q_loss", "eval_value_loss", "eval_kept_fraction", "eval_value_error"} <= set(logged)
    # Nothing of an evaluation reaches the moments of the targets.
    assert not trainer._target_sums.any()
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]


def test_evaluate_does_both(tmp_path, monkeypatch):
    """The environment is played once, however many evaluation datasets there are."""
    plays = []
    monkeypatch.setattr(vlmq_trainer, "evaluate_model", lambda *a, **kw: plays.append(1) or {"success_rate": 0.5})
    splits = {"a": number_line(seed=100), "b": number_line(episodes=3, seed=200)}
    trainer = make_trainer(tmp_path, init={"eval_env": NUMBER_LINE, "eval_dataset": splits})
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_success_rate"} <= set(metrics)
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"] and len(plays) == 1
    for name in ("nll", "q_loss", "value_q50", "value_error"):
        assert metrics[f"eval_a_{name}"] != metrics[f"eval_b_{name}"] and f"eval_{name}" not in metrics


def test_evaluation_datasets_are_not_mistaken_for_one_another(tmp_path):
    """A dataset that is made on the spot and freed may leave its id to the next."""
    dataset = number_line()
    trainer = make_trainer(tmp_path)
    first, last = trainer._index.first_row[4], trainer._index.first_row[8]
    expected = trainer.evaluate(dataset.select(range(first, last)))["eval_loss"]
    for rows in (range(first), range(first, last), range(last, len(dataset))):
        loss = trainer.evaluate(dataset.select(rows))["eval_loss"]
        assert (loss == expected) == (rows == range(first, last))


@pytest.mark.parametrize(("own", "warned"), [(PlainFormat(), True), (None, False)])
def test_data_of_another_format_than_the_play_s(tmp_path, own, warned, recwarn):
    """The data answers in JSON, as the environment's default asks."""
    make_trainer(tmp_path, init={"eval_env": NUMBER_LINE, "agent_format": own})
    said = [str(one.message) for one in recwarn if "finds the action in none" in str(one.message)]
    assert bool(said) == warned and all("PlainFormat, in which the agent will play" in text for text in said)


@pytest.mark.parametrize(
    "shown", [{"type": "arrow"}, {"type": "pandas"}, {"type": "numpy", "columns": ["reward"]}], ids=str
)
def test_data_that_is_shown_in_another_way(tmp_path, shown):
    """`with_format` changes what a reader of the dataset gets, not what there is to learn from."""
    data, unknown = with_log_probs(-0.7), with_log_probs(None)
    make_trainer(tmp_path, name="llama", dataset=data.with_format(**shown), init={"eval_env": TextNumberLine})
    retrace = {"name": "llama", "off_policy_trace": "retrace"}
    make_trainer(tmp_path, dataset=data.with_format(**shown), **retrace)
    with pytest.raises(ValueError, match="no row of the training data has `behavior_logprobs`"):
        make_trainer(tmp_path, dataset=unknown.with_format(**shown), **retrace)


def test_an_evaluation_does_not_take_the_training_logs(tmp_path):
    """An evaluation between two logs leaves what training has recorded to the next log."""
    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        init={"eval_env": NUMBER_LINE, "eval_dataset": number_line(episodes=3, seed=100)},
    )
    trainer.train()
    alone = make_trainer(tmp_path, max_steps=2, logging_steps=2)
    alone.train()
    timings = ("tokens_per_second",)
    with_, without = step_logs(trainer)[0], step_logs(alone)[0]
    assert {k: v for k, v in with_.items() if k not in timings} == {
        k: v for k, v in without.items() if k not in timings
    }
    played = [entry for entry in trainer.state.log_history if "eval_success_rate" in entry]
    assert len(played) == 2 and "nll" not in played[0] and "value_q50" not in played[0]


def test_where_all_turns_look_alike_the_log_has_numbers(tmp_path):
    turn = {"prompt": [{"role": "user", "content": "go"}], "images": [], "completion": "up"}
    played = [Episode(str(k), (Turn(reward=0.1 * k, **turn),), True, False) for k in range(7)]
    trainer = make_trainer(tmp_path, name="llama", dataset=dataset_from_episodes(played), max_steps=2)
    trainer.train()
    for entry in step_logs(trainer):
        assert all(math.isfinite(value) for value in entry.values())


def test_callbacks_hear_of_an_evaluation_once(tmp_path):
    """With all metrics, so that early stopping counts evaluations, of dataset and environment together."""
    heard = []

    class Listen(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            heard.append(metrics)

    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        init={"eval_env": NUMBER_LINE, "eval_dataset": number_line(), "callbacks": [Listen()]},
    )
    trainer.train()
    assert len(heard) == 2
    assert all({"eval_loss", "eval_success_rate"} <= set(metrics) for metrics in heard)


def test_evaluation_in_half_precision(tmp_path):
    trainer = make_trainer(tmp_path, bf16_full_eval=True, init={"eval_dataset": number_line()})
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.model.dtype == torch.bfloat16


# ---- checkpoints ----


@pytest.mark.parametrize("save_strategy", ["steps", "best"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_best_checkpoint_is_kept_by_success(save_strategy, peft_config, tmp_path, monkeypatch):
    """With success rates 0.2, 0.9, 0.5 after the first three updates, training ends with the second's weights."""
    rates, seen = iter([0.2, 0.9, 0.5]), []

    def play(model, *args, **kwargs):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"success_rate": next(rates)}

    monkeypatch.setattr(vlmq_trainer, "evaluate_model", play)
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy=save_strategy,
        save_steps=1,
        load_best_model_at_end=True,
        filter="none",
        peft_config=peft_config,
        init={"eval_env": NUMBER_LINE},
    )
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    now = weights_of(trainer)
    assert all(torch.equal(now[key], seen[1][key]) for key in now)
    assert not torch.equal(now["critic.online.q.weight"], seen[2]["critic.online.q.weight"])


def test_a_best_checkpoint_that_moved_or_is_gone(tmp_path):
    """The run ends, or is known to have ended, all the same."""
    steps = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 0.1,
    }
    run = {"name": "llama", "dataset": text_number_line(), "max_steps": 2, "load_best_model_at_end": True, **steps}
    run |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the last is the best
    init = {"eval_dataset": text_number_line()}
    first = make_trainer(tmp_path / "first", init=init, **run)
    first.train()
    best = Path(first.state.best_model_checkpoint).name
    (tmp_path / "first").rename(tmp_path / "moved")
    again = make_trainer(tmp_path / "moved", init=init, **run)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / best)
    now, then = weights_of(again), weights_of(first)
    assert all(torch.equal(now[key], then[key]) for key in then)
    again.state.best_model_checkpoint = str(tmp_path / "moved" / "checkpoint-9")
    with pytest.warns(UserWarning, match=r"The best checkpoint, .*checkpoint-9, is gone"):
        again._load_best_model()
    assert all(torch.equal(x, now[key]) for key, x in weights_of(again).items())


def test_arguments_that_json_cannot_hold(tmp_path):
    context = {"use_reentrant": False, "context_fn": torch.utils.checkpoint.noop_context_fn}
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": True}
    run = {"name": "llama", "dataset": text_number_line(), "gradient_checkpointing_kwargs": context, **saving}
    make_trainer(tmp_path, max_steps=1, **run).train()
    assert "noop_context_fn" in (tmp_path / "checkpoint-1" / "vlmq_config.json").read_text()
    longer = make_trainer(tmp_path, max_steps=2, **run)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2


def same_critic(one, other):
    one, other = one.critic.state_dict(), other.critic.state_dict()
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_saves_a_stock_model_and_opens_it_again(critic_type, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, critic_type=critic_type, critic_rank=8, num_critics=3)
    trainer.train()
    trainer.save_model()
    files = {file.name for file in tmp_path.iterdir()}
    assert {"model.safetensors", "critic.safetensors", "critic_config.json", "vlmq_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert json.loads((tmp_path / "vlmq_config.json").read_text())["critic_type"] == critic_type
    # A stock library reads the model, and finds no critic in it.
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ours = trainer.model.pretrained_model.state_dict()
    assert set(stock.state_dict()) == set(ours)
    assert all(torch.equal(value, ours[key]) for key, value in stock.state_dict().items())
    assert not any("critic" in key for key in load_file(tmp_path / "model.safetensors"))
    # The trainer goes on where it was, processor included.
    again = VLMQTrainer(
        model=str(tmp_path),
        args=config(tmp_path / "again", max_steps=1, critic_type=critic_type, critic_rank=8, num_critics=3),
        train_dataset=number_line(),
    )
    same_critic(again.model, trainer.model)
    again.train()
    assert math.isfinite(step_logs(again)[0]["loss"])


def test_saves_a_stock_adapter_and_opens_it_again(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    model, processor = tiny_models.build("idefics3")
    model.save_pretrained(base)
    processor.save_pretrained(base)
    trainer = VLMQTrainer(
        model=str(base), args=config(out, max_steps=2, filter="none"), train_dataset=number_line(), peft_config=LORA
    )
    trainer.train()
    trainer.save_model()
    files = {file.name for file in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "critic.safetensors"} <= files
    assert "model.safetensors" not in files
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), out)
    ours = trainer.model.pretrained_model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in stock.state_dict().items())
    assert any(value.any() for key, value in ours.items() if "lora_B" in key)

    again = VLMQTrainer(model=str(out), args=config(tmp_path / "again", max_steps=1), train_dataset=number_line())
    same_critic(again.model, trainer.model)
    before = weights_of(again)
    assert all(torch.equal(before[f"pretrained_model.{key}"], value) for key, value in ours.items())
    again.train()
    moved = {key for key, value in weights_of(again).items() if not torch.equal(value, before[key])}
    assert {key for key in moved if "pretrained_model" in key} == {key for key in before if "lora_" in key}


def test_value_head_model_keeps_its_critic(tmp_path):
    """A model of the value-head class brings its critic along."""
    model, processor = tiny_models.build("idefics3")
    wrapped = AutoModelForImageTextToTextWithValueHead(model)
    wrapped.critic.initialize_moments(3.0, 2.0)
    trainer = VLMQTrainer(
        model=wrapped, args=config(tmp_path), train_dataset=number_line(), processing_class=processor
    )
    same_critic(trainer.model, wrapped)
    assert trainer.model.critic.target_mean == 3.0


def test_value_head_model_with_another_critic_than_the_arguments(tmp_path):
    model, processor = tiny_models.build("llama")
    with pytest.raises(ValueError, match="The model holds a critic with critic_type='scalar'"):
        VLMQTrainer(
            AutoModelForImageTextToTextWithValueHead(model),
            config(tmp_path, critic_type="vocab"),
            text_number_line(),
            processing_class=processor,
        )


# ---- optimisers that the user brings ----


def test_a_users_optimizer_learns_the_critic_too(tmp_path):
    """One that was made of the model's weights gets the heads, at `critic_learning_rate`."""
    model, processor = tiny_models.build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = VLMQTrainer(
        model,
        config(tmp_path, max_steps=2, critic_learning_rate=0.02),
        text_number_line(),
        processing_class=processor,
        optimizers=(optimizer, None),
    )
    before = weights_of(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 0.02]
    assert all(not torch.equal(v, before[k]) for k, v in weights_of(trainer).items() if "critic.online" in k)


def test_an_optimizer_that_is_set_later_learns_the_critic_too(tmp_path):
    trainer = make_trainer(tmp_path, name="llama", dataset=text_number_line(), max_steps=2, critic_learning_rate=0.02)
    trainer.optimizer = torch.optim.AdamW(trainer.model.pretrained_model.parameters(), lr=1e-3)
    before = weights_of(trainer)
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-3, 0.02]
    assert all(not torch.equal(v, before[k]) for k, v in weights_of(trainer).items() if "critic.online" in k)
    trainer.train()  # with the optimiser that it has
    assert len(trainer.optimizer.param_groups) == 2


class TwoSetsOfWeights(torch.optim.SGD):
    """As `schedule_free_adamw`, it must be told whether the model is trained or evaluated."""

    evaluates = False

    def train(self):
        self.evaluates = False

    def eval(self):
        self.evaluates = True


def test_play_is_with_the_weights_that_the_optimizer_evaluates(tmp_path, monkeypatch):
    model, processor = tiny_models.build("llama")
    optimizer, seen = TwoSetsOfWeights(model.parameters(), lr=1e-3), []
    evaluate_model = vlmq_trainer.evaluate_model

    def watched(*args, **kwargs):
        seen.append(optimizer.evaluates)
        return evaluate_model(*args, **kwargs)

    monkeypatch.setattr(vlmq_trainer, "evaluate_model", watched)
    monkeypatch.setattr(callbacks, "evaluate_model", watched)
    played = callbacks.EnvEvaluationCallback(TextNumberLine, episodes=1, max_completion_length=2)
    trainer = VLMQTrainer(
        model,
        config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, eval_episodes=1, max_completion_length=2),
        text_number_line(),
        eval_env=TextNumberLine,
        processing_class=processor,
        callbacks=[played],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert len(seen) > 3 and all(seen)


def test_a_users_optimizer_and_scheduler(tmp_path):
    model, processor = tiny_models.build("llama")

    def trainer(model, parameters):
        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        args = config(tmp_path, max_steps=2)
        return VLMQTrainer(
            model, args, text_number_line(), processing_class=processor, optimizers=(optimizer, scheduler)
        )

    with pytest.raises(ValueError, match="The optimiser lacks the critic's heads, and its scheduler"):
        trainer(model, model.parameters())
    wrapped = AutoModelForImageTextToTextWithValueHead(model)
    learns = trainer(wrapped, wrapped.parameters())
    assert learns.model.critic is wrapped.critic
    returns = learns._index.returns_to_go(learns.args.gamma)  # a critic of no data yet begins at these
    assert wrapped.critic.target_mean.item() == pytest.approx(returns.mean(), rel=1e-5)
    before = weights_of(learns)
    learns.train()
    assert all(not torch.equal(v, before[k]) for k, v in weights_of(learns).items() if "critic.online" in k)


def test_an_optimizer_that_would_leave_the_model_as_it_is(tmp_path):
    """The adapter is made by the trainer, after the optimiser."""
    model, processor = tiny_models.build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="The optimiser has none of the model's trainable weights"):
        VLMQTrainer(
            model,
            config(tmp_path, max_steps=2),
            text_number_line(),
            processing_class=processor,
            optimizers=(optimizer, None),
            peft_config=LoraConfig(target_modules=["q_proj"], r=2),
        )


def test_a_frozen_model_is_refused(tmp_path):
    model, processor = tiny_models.build("llama")
    frozen = AutoModelForImageTextToTextWithValueHead(model.requires_grad_(False))  # as of `is_trainable=False`
    with pytest.raises(ValueError, match="No weight of the model is trainable"):
        VLMQTrainer(frozen, config(tmp_path), text_number_line(), processing_class=processor)


def test_the_users_arguments_stay_as_they_are(tmp_path):
    """They may be those of the next run, too."""
    model, processor = tiny_models.build("llama")
    args = config(tmp_path, max_steps=-1, max_env_turns=40, turns_per_round=20, updates_per_turn=0.1)
    before = args.to_dict()
    trainer = VLMQTrainer(model, args, env=TextNumberLine, processing_class=processor)
    assert trainer.args.max_steps == 4 and args.to_dict() == before


def test_the_rate_falls_on_a_plateau_of_the_loss(tmp_path):
    data = text_number_line()
    run = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, name="llama", dataset=data, init={"eval_dataset": data}, **run)
    trainer.train()
    assert trainer.args.metric_for_best_model == "loss" and trainer.lr_scheduler.best < float("inf")


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_success_that_rises_keeps_the_rate(scheduler, tmp_path, monkeypatch):
    """And where there is no environment the loss is the metric, of either scheduler."""
    run = {"lr_scheduler_type": scheduler, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    run["lr_scheduler_kwargs"] = {"patience": 0}
    data, init = text_number_line(), {"eval_env": TextNumberLine}
    trainer = make_trainer(tmp_path, name="llama", dataset=data, init=init, **run)
    rising = iter([0.1, 0.3, 0.6, 0.9])
    played = vlmq_trainer.evaluate_model
    monkeypatch.setattr(
        vlmq_trainer, "evaluate_model", lambda *a, **k: {**played(*a, **k), "success_rate": next(rising)}
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] >= trainer.args.learning_rate
    run |= {"max_steps": 1, "lr_scheduler_kwargs": None}
    trainer = make_trainer(tmp_path / "loss", name="llama", dataset=data, init={"eval_dataset": data}, **run)
    trainer.train()
    assert trainer.args.metric_for_best_model == "loss"


def test_workers_of_evaluations_stay_as_they_are(tmp_path):
    data = {"one": text_number_line(), "two": text_number_line(episodes=5)}
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, name="llama", dataset=data["one"], init={"eval_dataset": data}, **workers)
    before = len(multiprocessing.active_children())
    first, count = trainer.evaluate(), len(multiprocessing.active_children())
    again = trainer.evaluate()
    assert count - before == 2 == len(multiprocessing.active_children()) - before
    losses = {name: value for name, value in first.items() if name.endswith("_loss")}
    assert losses == {name: again[name] for name in losses} and losses["eval_one_loss"] != losses["eval_two_loss"]
    for loader in trainer._eval_dataloaders.values():
        del loader.base_dataloader._iterator


def test_another_optimiser_s_state(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    changed = make_trainer(tmp_path, max_steps=2, critic_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"checkpoint-1 is not that of this run: .*parameter groups.*as they were"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_optimizer_class(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=1,
        critic_learning_rate=0.5,
        init={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.25, "momentum": 0.5})},
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.25, 0.5}
