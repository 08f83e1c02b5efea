# SPDX-License-Identifier: Apache-2.0
"""Evaluation in an environment during training: a stock SFTTrainer, the choice of the best weights, TensorBoard."""

import pytest
import torch
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import SFTConfig, SFTTrainer

from tests import tiny_models
from vlmq_trl import VLMQConfig, VLMQTrainer, callbacks
from vlmq_trl.callbacks import EnvEvaluationCallback
from vlmq_trl.rollout import collect_demonstrations

ENV = "vlmq_trl/NumberLine-v0"


@pytest.fixture(scope="module")
def data():
    return collect_demonstrations(ENV, policy="random", episodes=4, progress=False)


def arguments(path, config=SFTConfig, **kwargs):
    kwargs = {"max_steps": 3, "learning_rate": 1e-3, "report_to": "none", **kwargs}
    return config(
        output_dir=str(path),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        **{"save_strategy": "no", **kwargs},
    )


def make_callback(**kwargs):
    kwargs = {"eval_steps": 2, "episodes": 3, "num_envs": 3, "max_completion_length": 2, **kwargs}
    return EnvEvaluationCallback(ENV, **kwargs)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_stock_trainer_is_evaluated_at_the_start_on_the_way_and_at_the_end(data, tmp_path):
    model, processor = tiny_models.build("idefics3")
    callback = make_callback()
    trainer = SFTTrainer(
        model, arguments(tmp_path), train_dataset=data, processing_class=processor, callbacks=[callback]
    )
    trainer.train()
    assert [record["step"] for record in callback.history] == [0, 2, 3]
    for record in callback.history:
        assert record["episodes"] == 3 and 0 <= record["low"] <= record["success_rate"] <= record["high"] <= 1
    # Two tokens cannot hold an answer: ten turns without a legal action, each costs 1.
    assert callback.history[0]["mean_return"] == -10 and callback.history[0]["valid_rate"] == 0
    assert callback.best == callback.history[-1]  # all equal: the latest
    logged = [entry for entry in trainer.state.log_history if "env_success_rate" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 3]


def test_the_last_evaluation_is_of_the_last_step(data, tmp_path, monkeypatch):
    """And not of the weights that `load_best_model_at_end` puts in their place."""
    model, processor = tiny_models.build("idefics3")
    callback, seen = make_callback(), {}
    evaluate = callback._evaluate

    def watched(args, state, kwargs):
        seen[state.global_step] = weights(kwargs["model"])
        evaluate(args, state, kwargs)

    monkeypatch.setattr(callback, "_evaluate", watched)
    each = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3}
    args = arguments(tmp_path, **each, load_best_model_at_end=True)
    trainer = SFTTrainer(
        model, args, train_dataset=data, eval_dataset=data, processing_class=processor, callbacks=[callback]
    )
    trainer.train()
    assert list(seen) == [0, 2, 3] and trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    kept = callback._best_weights
    assert callback.best["step"] == 3 and all(
        torch.equal(kept[name], x) for name, x in seen[3].items() if name in kept
    )
    assert any(not torch.equal(x, weights(model)[name]) for name, x in seen[3].items())


def play_back(monkeypatch, results):
    """Lets evaluations give `results`, (success rate, mean return) each."""
    left = iter(results)

    def evaluate_model(model, processing_class, env, **kwargs):
        success, mean_return = next(left)
        return dict.fromkeys(callbacks.COPIED, 0.0) | {
            "success_rate": success,
            "success_rate_low": success,
            "success_rate_high": success,
            "mean_return": mean_return,
        }

    monkeypatch.setattr(callbacks, "evaluate_model", evaluate_model)


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ([(0.1, 0), (0.5, 0), (0.3, 9), (0.4, 9)], 1),
        ([(0.1, 0), (0.5, 1), (0.5, 1), (0.5, 0)], 2),  # equal success: the higher return, then the later
        ([(0.1, 0), (0.2, 0), (0.3, 0), (0.4, 0)], 3),
    ],
)
def test_best_weights_come_back(data, tmp_path, monkeypatch, results, best):
    play_back(monkeypatch, results)
    model, processor = tiny_models.build("idefics3")
    model.lm_head.weight.requires_grad_(False)
    callback, seen = make_callback(eval_steps=1), []
    keep = callback._evaluate
    monkeypatch.setattr(callback, "_evaluate", lambda *a: (seen.append(weights(model)), keep(*a)))
    trainer = SFTTrainer(
        model, arguments(tmp_path), train_dataset=data, processing_class=processor, callbacks=[callback]
    )
    trainer.train()
    record = callback.restore_best(trainer.model)
    assert record["step"] == best
    restored = weights(model)
    assert all(torch.equal(restored[name], seen[best][name]) for name in restored)
    assert any(not torch.equal(restored[name], seen[best - 1][name]) for name in restored)
    assert "lm_head.weight" not in callback._best_weights
    with pytest.raises(ValueError, match="other trainable parameters"):
        callback.restore_best(torch.nn.Linear(2, 2))


def test_evaluating_does_not_change_the_training(data, tmp_path):
    results = []
    for extra in ([], [make_callback(eval_steps=1, temperature=1.0)]):
        model, processor = tiny_models.build("idefics3")
        args = arguments(tmp_path, VLMQConfig, max_steps=2)
        trainer = VLMQTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=extra)
        trainer.train()
        results.append(weights(trainer.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_scalars_reach_the_trainers_tensorboard(data, tmp_path, monkeypatch):
    play_back(monkeypatch, [(0.25, 0.0), (0.75, 0.0)])
    model, processor = tiny_models.build("idefics3")
    args = arguments(tmp_path, max_steps=2, report_to="tensorboard", logging_steps=1)
    SFTTrainer(
        model, args, train_dataset=data, processing_class=processor, callbacks=[make_callback(eval_steps=2)]
    ).train()
    folders = {path.parent for path in tmp_path.rglob("events.out*")}
    assert len(folders) == 1  # beside the trainer's own scalars
    events = EventAccumulator(str(folders.pop())).Reload()
    assert [(e.step, e.value) for e in events.Scalars("env/success_rate")] == [(0, 0.25), (2, 0.75)]
    assert "train/loss" in events.Tags()["scalars"]


def test_errors():
    with pytest.raises(ValueError, match="`eval_steps=0`: it must be at least 1"):
        make_callback(eval_steps=0)
    with pytest.raises(RuntimeError, match="train first"):
        make_callback().restore_best(torch.nn.Linear(2, 2))


def test_the_whole_critic_comes_back(data, tmp_path, monkeypatch):
    play_back(monkeypatch, [(0.1, 0), (0.5, 0), (0.3, 0), (0.4, 0)])
    model, processor = tiny_models.build("idefics3")
    callback, seen = make_callback(eval_steps=1), []
    args = arguments(tmp_path, VLMQConfig, target_tau=0.5)
    trainer = VLMQTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=[callback])
    keep = callback._evaluate
    monkeypatch.setattr(
        callback,
        "_evaluate",
        lambda *a: (seen.append({k: v.clone() for k, v in trainer.model.critic.state_dict().items()}), keep(*a)),
    )
    trainer.train()
    last = {k: v.clone() for k, v in trainer.model.critic.state_dict().items()}
    assert callback.restore_best(trainer.model)["step"] == 1
    for name, value in trainer.model.critic.state_dict().items():
        assert torch.equal(value, seen[1][name])
    assert not torch.equal(last["target_mean"], seen[1]["target_mean"])
    assert any(not torch.equal(last[name], seen[1][name]) for name in last if name.startswith("target."))


def test_the_card_tells_of_the_weights_that_were_put_back(data, tmp_path, monkeypatch):
    play_back(monkeypatch, [(0.1, 0), (0.5, 0), (0.3, 0), (0.4, 0)])
    model, processor = tiny_models.build("idefics3")
    callback = make_callback(eval_steps=1)
    trainer = VLMQTrainer(
        model, arguments(tmp_path, VLMQConfig), train_dataset=data, processing_class=processor, callbacks=[callback]
    )
    trainer.train()

    def told():
        trainer.create_model_card()
        return ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value

    assert told() == 0.4 and callback.restored_step is None
    callback.restore_best(trainer.model)
    assert told() == 0.5 and callback.restored_step == 1


def test_training_ends_at_the_success_that_was_asked_for(data, tmp_path, monkeypatch):
    play_back(monkeypatch, [(0.5, 0), (1.0, 0), (0.98, 0), (0.1, 0)])
    model, processor = tiny_models.build("idefics3")
    callback = make_callback(eval_steps=1, stop_at_success=0.98)
    trainer = SFTTrainer(
        model, arguments(tmp_path), train_dataset=data, processing_class=processor, callbacks=[callback]
    )
    trainer.train()
    assert trainer.state.global_step == 2  # not at step 1, which may be luck
    with pytest.raises(ValueError, match="stop_at_success"):
        make_callback(stop_at_success=1.5)


@pytest.mark.parametrize("trainer_class", [SFTTrainer, VLMQTrainer])
def test_a_run_that_resumes_goes_on_with_its_records_and_its_best_weights(trainer_class, data, tmp_path, monkeypatch):
    """The best evaluation is before the interruption; what comes out equals the run without one."""
    config = VLMQConfig if trainer_class is VLMQTrainer else SFTConfig
    given = [(0.0, 0.0), (0.9, 1.0), (0.1, 0.0), (0.5, 0.0)]

    def trainer(callback, output_dir):
        model, processor = tiny_models.build("idefics3")
        args = arguments(output_dir, config, max_steps=3)
        args.save_strategy, args.save_steps = "steps", 2
        return trainer_class(model, args, train_dataset=data, processing_class=processor, callbacks=[callback])

    play_back(monkeypatch, given)
    straight = make_callback(eval_steps=1)
    first = trainer(straight, tmp_path)
    first.train()
    play_back(monkeypatch, given[3:])
    again = make_callback(eval_steps=1)
    second = trainer(again, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def rates(callback):
        return [(record["step"], record["success_rate"]) for record in callback.history]

    assert rates(again) == rates(straight) == [(0, 0.0), (1, 0.9), (2, 0.1), (3, 0.5)]
    assert again.history[3]["train_seconds"] > again.history[2]["train_seconds"]
    assert straight.restore_best(first.model)["step"] == again.restore_best(second.model)["step"] == 1
    for key, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key
