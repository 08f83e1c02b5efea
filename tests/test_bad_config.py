# SPDX-License-Identifier: Apache-2.0
"""Broken configurations and trainer arguments, each with its error and a part of the text."""

import re
import shutil
import warnings

import datasets
import gymnasium
import pytest
import transformers
from peft import LoraConfig, PromptTuningConfig
from trl import SFTConfig

from tests import tiny_models
from tests.small_runs import NUMBER_LINE, TextNumberLine, config, number_line, text_number_line
from vlmq_trl import (
    CallableFormat,
    EnvEvaluationCallback,
    PlainFormat,
    VLMAgent,
    collect_demonstrations,
    evaluate_model,
)
from vlmq_trl.trajectory import TrajectoryError
from vlmq_trl.vlmq_config import VLMQConfig
from vlmq_trl.vlmq_trainer import VLMQTrainer

NAN, INFINITY = float("nan"), float("inf")

# (arguments of `VLMQConfig`, part of the message of a ValueError)
BROKEN_CONFIGS = [
    ({"gamma": 1.5}, "`gamma=1.5`: it must lie in [0, 1]"),
    ({"gamma": "high"}, "`gamma='high'`: it must be a finite number"),
    ({"token_gamma": -0.1}, "`token_gamma=-0.1`: it must lie in [0, 1]"),
    ({"turn_lambda": 2}, "`turn_lambda=2`: it must lie in [0, 1]"),
    ({"token_lambda": NAN}, "`token_lambda=nan`: it must be a finite number"),
    ({"segment_length": 0}, "`segment_length=0`: it must be at least 1"),
    ({"segment_length": 2.5}, "`segment_length=2.5`: it must be an integer"),
    ({"off_policy_trace": "vtrace"}, "must be one of ('none', 'retrace', 'tree_backup')"),
    ({"critic_type": "dueling"}, "choose one of ('scalar', 'vocab')"),
    ({"num_critics": 0}, "at least one head"),
    ({"critic_hidden_size": -1}, "0 makes linear heads"),
    ({"critic_rank": 0}, "`critic_rank` is 0; it must be at least 1"),
    ({"critic_coef": -1.0}, "`critic_coef=-1.0`: it must not be negative"),
    ({"critic_coef": INFINITY}, "`critic_coef=inf`: it must be a finite number"),
    ({"critic_coef": 0}, "`filter='binary'` would filter by noise"),
    ({"critic_coef": 0, "filter": "none", "replay_prioritized_fraction": 0.5}, "what surprises it"),
    ({"replay_prioritized_fraction": 1.5}, "`replay_prioritized_fraction=1.5`: it must lie in"),
    ({"critic_coef": 0, "filter": "exp"}, "Set `filter='none'` for plain SFT"),
    ({"critic_learning_rate": 0.0}, "`critic_learning_rate=0.0`: it must be positive"),
    ({"critic_learning_rate": "1e-3"}, "`critic_learning_rate='1e-3'`: it must be a finite number"),
    ({"critic_warmup_steps": True}, "`critic_warmup_steps=True`: it must be an integer"),
    ({"token_gamma": 0.9, "replay_prioritized_fraction": 0.5}, "returns that are discounted by turns alone"),
    ({"bootstrap_truncated": "false"}, "`bootstrap_truncated='false'`: it must be True or False"),
    ({"rollout_workers": 1}, "`rollout_workers=1`: it must be True or False"),
    ({"gamma": True}, "`gamma=True`: it must be a finite number"),
    ({"completion_only_loss": False}, "only the agent's own tokens are learned"),
    ({"train_sampling_strategy": "group_by_length"}, "whole segments of an episode are drawn at random"),
    ({"value_expectile": 0.0}, "`value_expectile=0.0`: it must lie strictly between 0 and 1"),
    ({"value_expectile": 1.0}, "`value_expectile=1.0`: it must lie strictly between 0 and 1"),
    ({"conservative_coef": -0.1}, "`conservative_coef=-0.1`: it must not be negative"),
    ({"target_tau": 0.0}, "`target_tau=0.0`: it must lie in (0, 1]"),
    ({"target_tau": 1.5}, "`target_tau=1.5`: it must lie in (0, 1]"),
    ({"target_aggregation": "max"}, "must be 'mean' or 'min'"),
    ({"target_norm_rate": 0}, "`target_norm_rate=0`: it must lie in (0, 1]"),
    ({"filter": "soft"}, "must be one of ('binary', 'exp', 'none')"),
    ({"filter_scope": "thoughts"}, "must be one of ('response', 'action')"),
    ({"critic_scope": "thoughts"}, "must be one of ('response', 'action')"),
    ({"advantage_estimator": "gae"}, "must be one of ('q', 'return')"),
    ({"critic_scope": "action"}, "Set `filter_scope='action'` too"),
    ({"filter_threshold": NAN}, "`filter_threshold=nan`: it must be a finite number"),
    ({"filter_temperature": 0.0}, "`filter_temperature=0.0`: it must be positive"),
    ({"filter_max_weight": -1}, "`filter_max_weight=-1`: it must be positive"),
    ({"critic_warmup_steps": -1}, "`critic_warmup_steps=-1`: it must not be negative"),
    ({"eval_episodes": 0}, "`eval_episodes=0`: it must be at least 1"),
    ({"eval_num_envs": 0}, "`eval_num_envs=0`: it must be at least 1"),
    ({"eval_seed": -1}, "`eval_seed=-1`: it must not be negative"),
    ({"eval_temperature": -0.5}, "`eval_temperature=-0.5`: it must not be negative"),
    ({"max_completion_length": 0}, "`max_completion_length=0`: it must be at least 1"),
    ({"offline_steps": -1}, "`offline_steps=-1`: it must not be negative"),
    ({"turns_per_round": 0}, "`turns_per_round=0`: it must be at least 1"),
    ({"updates_per_turn": 0}, "`updates_per_turn=0`: it must be positive"),
    ({"max_env_turns": 0}, "`max_env_turns=0`: it must be at least 1"),
    ({"max_env_turns": 1e4}, "`max_env_turns=10000.0`: it must be an integer"),
    ({"online_fraction": 1.1}, "`online_fraction=1.1`: it must lie in [0, 1]"),
    ({"online_fraction_start": -0.1}, "`online_fraction_start=-0.1`: it must lie in [0, 1]"),
    ({"online_fraction_start": 0.1}, "`online_fraction_start=0.1` and `online_fraction_steps=0` go together"),
    ({"online_fraction_steps": 9}, "`online_fraction_start=None` and `online_fraction_steps=9` go together"),
    ({"replay_capacity": 0}, "`replay_capacity=0`: it must be at least 1"),
    ({"rollout_temperature": 0.0}, "`rollout_temperature=0.0`: it must be positive"),
    ({"rollout_action_temperature": 0.0}, "`rollout_action_temperature=0.0`: it must be positive"),
    ({"rollout_temperature_start": 1.5}, "`rollout_annealing_turns=0` and one of rollout_temperature_start, rollout_"),
    (
        {"rollout_action_temperature_start": 1.5, "rollout_annealing_turns": 9},
        "`rollout_action_temperature_start=1.5` needs to know where it moves to",
    ),
    ({"rollout_repeat_fraction": 1.5}, "`rollout_repeat_fraction=1.5`: it must lie in [0, 1]"),
    ({"online_thought_weight": 1.5}, "`online_thought_weight=1.5`: it must lie in [0, 1]"),
    ({"online_thought_filter": "kl"}, "`online_thought_filter='kl'`: it must be one of ('none', 'reference')"),
    ({"rollout_search_fraction": -0.1}, "`rollout_search_fraction=-0.1`: it must lie in [0, 1]"),
    ({"rollout_annealing_turns": 100}, "`rollout_annealing_turns=100` and one of rollout_temperature_start"),
    ({"rollout_num_envs": 0}, "`rollout_num_envs=0`: it must be at least 1"),
    ({"env_timeout": 5.0}, "Set `rollout_workers=True`"),
    ({"env_timeout": -5.0, "rollout_workers": True}, "`env_timeout=-5.0`: it must be positive"),
    ({"max_env_failures": -1}, "`max_env_failures=-1`: it must not be negative"),
    ({"max_staleness": 0}, "`max_staleness=0`: it must be at least 1"),
    ({"stop_at_success": 98}, "`stop_at_success=98`: it must lie in (0, 1]"),
    ({"stop_at_success": 0.0}, "`stop_at_success=0.0`: it must lie in (0, 1]"),
    ({"packing": True}, "`packing=True` is not supported: each row is one turn"),
    ({"padding_free": True}, "`padding_free=True` is not supported"),
    ({"assistant_only_loss": True}, "`assistant_only_loss=True` is not supported"),
    ({"loss_type": "dft"}, "`loss_type='dft'` is not supported"),
    ({"label_smoothing_factor": 0.1}, "the filter weighs each token's own nll"),
]


@pytest.mark.parametrize(("kwargs", "message"), BROKEN_CONFIGS, ids=[str(kwargs) for kwargs, _ in BROKEN_CONFIGS])
def test_broken_config(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **kwargs)


def test_edges_are_legal(tmp_path):
    """Values at the edge of what is allowed."""
    config(tmp_path, gamma=0, token_gamma=1, turn_lambda=1, token_lambda=0, target_tau=1, target_norm_rate=1.0)
    config(tmp_path, critic_hidden_size=0, num_critics=1, segment_length=1, filter_threshold=-1.0, critic_coef=5)
    config(tmp_path, critic_coef=0, filter="none")
    VLMQConfig("out", use_cpu=True, bf16=False, activation_checkpointing=False)


def test_unknown_option(tmp_path):
    with pytest.raises(TypeError, match="gama"):
        config(tmp_path, gama=0.9)


def test_the_better_direction_follows_the_metric(tmp_path):
    """The default metric is better when larger, a loss when smaller, unless the user says otherwise."""
    assert config(tmp_path).greater_is_better is True
    assert config(tmp_path, metric_for_best_model="eval_loss").greater_is_better is False
    assert config(tmp_path, metric_for_best_model="loss", greater_is_better=True).greater_is_better is True


def build(output_dir, *, name="idefics3", init=None, **kwargs):
    model, processor = tiny_models.build(name)
    given = {
        "model": model,
        "args": config(output_dir, **kwargs),
        "train_dataset": text_number_line() if name in tiny_models.TEXT_NAMES else number_line(),
        "processing_class": processor,
        **(init or {}),
    }
    return VLMQTrainer(**given)


def without(column):
    return number_line().remove_columns(column)


def unfinished():
    """Cut off after the first turn of an episode that goes on."""
    return number_line().select(range(number_line()["turn"].index(1)))


PLAIN_TEXT = datasets.Dataset.from_dict({"text": ["a", "b"]})
SHUFFLED = "keep an episode's rows contiguous|Keep turns 0, 1, 2"

# name: (keyword arguments of `build`, error, pattern of the message)
BROKEN_TRAINERS = {
    "no model": (lambda: {"init": {"model": None}}, TypeError, "`model` must be a name, .* got NoneType"),
    "no such folder": (lambda: {"init": {"model": "./nowhere"}}, OSError, r"There is no folder \./nowhere"),
    "no data": (lambda: {"init": {"train_dataset": None}}, ValueError, "Nothing to learn from"),
    "plain text": (
        lambda: {"init": {"train_dataset": PLAIN_TEXT}},
        TrajectoryError,
        "column `prompt`: .*no such column",
    ),
    "no reward": (lambda: {"init": {"train_dataset": without("reward")}}, TrajectoryError, "column `reward`"),
    "stream": (
        lambda: {"init": {"train_dataset": number_line().to_iterable_dataset()}},
        TrajectoryError,
        "needs random access, got IterableDataset",
    ),
    "several splits": (
        lambda: {"init": {"train_dataset": datasets.DatasetDict(train=number_line())}},
        TrajectoryError,
        "got DatasetDict",
    ),
    "shuffled rows": (lambda: {"init": {"train_dataset": number_line().shuffle(seed=0)}}, TrajectoryError, SHUFFLED),
    "unfinished episode": (
        lambda: {"init": {"train_dataset": unfinished()}},
        TrajectoryError,
        "column `terminated`: the episode stops here",
    ),
    "bad evaluation data": (lambda: {"init": {"eval_dataset": unfinished()}}, TrajectoryError, "column `terminated`"),
    "bad named evaluation data": (
        lambda: {"init": {"eval_dataset": {"good": number_line(), "bad": unfinished()}}},
        TrajectoryError,
        "column `terminated`",
    ),
    "an SFTConfig": (
        lambda: {"init": {"args": SFTConfig("out", use_cpu=True, bf16=False)}},
        TypeError,
        "`args` must be a `VLMQConfig`, got `SFTConfig`",
    ),
    "evaluation of nothing": (
        lambda: {"eval_strategy": "steps", "eval_steps": 1},
        ValueError,
        "needs an `eval_env` or an `eval_dataset`",
    ),
    "best success without an environment": (
        lambda: {
            "init": {"eval_dataset": number_line()},
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "best",
        },
        ValueError,
        "`metric_for_best_model='success_rate'` needs an `eval_env`",
    ),
    "padding to a multiple": (lambda: {"pad_to_multiple_of": 64}, ValueError, "is for text-only models"),
    "Liger kernels": (lambda: {"use_liger_kernel": True}, ValueError, "would do nothing"),
    "returns beyond float32": (
        lambda: {"init": {"train_dataset": number_line().map(lambda row: {"reward": 1e20 * row["reward"]})}},
        ValueError,
        "too large for float32 arithmetic. Scale the rewards down",
    ),
    "an empty evaluation": (
        lambda: {"init": {"eval_dataset": number_line().select([])}},
        TrajectoryError,
        "the dataset has no rows",
    ),
    "a format's name": (lambda: {"init": {"agent_format": "json"}}, TypeError, "make_format..json"),
    "unknown environment": (
        lambda: {"init": {"eval_env": "vlmq_trl/NumberLines-v0"}},
        gymnasium.error.NameNotFound,
        "NumberLine",
    ),
    "an environment in place of a factory": (
        lambda: {"init": {"eval_env": gymnasium.make(NUMBER_LINE)}},
        TypeError,
        "pass for example `lambda: MyEnv",
    ),
    "a factory of something else": (
        lambda: {"init": {"eval_env": lambda: "game"}},
        TypeError,
        "returned str, not a gymnasium.Env",
    ),
    "retrace without log-probabilities": (
        lambda: {"off_policy_trace": "retrace"},
        ValueError,
        "no row of the training data has `behavior_logprobs`",
    ),
    "retrace without the column": (
        lambda: {"off_policy_trace": "retrace", "init": {"train_dataset": without("behavior_logprobs")}},
        ValueError,
        "Choose 'tree_backup'",
    ),
    "pictures for a text-only model": (
        lambda: {"name": "llama", "init": {"train_dataset": number_line()}},
        ValueError,
        "text-only|vision",
    ),
    "prompt learning": (
        lambda: {
            "name": "llama",
            "init": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        },
        ValueError,
        "use LoRA or another adapter",
    ),
    "an adapter that acts on a part of the tokens": (
        lambda: {
            "name": "llama",
            "init": {"peft_config": LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3, 4])},
        },
        ValueError,
        "use LoRA without it",
    ),
    "an adapter on the head": (
        lambda: {"name": "llama", "init": {"peft_config": LoraConfig(target_modules=["lm_head"])}},
        ValueError,
        "Remove .*lm_head.* from your `target_modules`",
    ),
    "no such model": (lambda: {"init": {"model": "./nowhere"}}, (OSError, ValueError), "nowhere"),
}


@pytest.mark.parametrize("case", BROKEN_TRAINERS)
def test_broken_trainer(case, tmp_path):
    kwargs, error, message = BROKEN_TRAINERS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        build(tmp_path, **kwargs())


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_no_chat_template(name, tmp_path):
    model, processor = tiny_models.build(name)
    template, processor.chat_template = processor.chat_template, None
    with pytest.raises(ValueError, match="has no chat template, by which turns become text"):
        build(tmp_path, name=name, init={"processing_class": processor})
    with pytest.raises(ValueError, match="has no chat template"):
        VLMAgent(model, processor)
    (tmp_path / "chatml.jinja").write_text(template)
    options = {"chat_template_path": str(tmp_path / "chatml.jinja"), "max_steps": 1}
    build(tmp_path, name=name, init={"processing_class": processor}, **options).train()


def test_no_legal_actions(tmp_path):
    class OpenEnded(TextNumberLine):
        legal_actions = None

    with pytest.raises(ValueError, match="`legal_actions_only` needs to know what can be done"):
        build(tmp_path, legal_actions_only=True, init={"eval_env": OpenEnded, "agent_format": PlainFormat()})


def test_a_format_that_does_not_write_what_it_reads(tmp_path):
    """Whatever has to write an action says so, where the environment would get none."""
    fmt = CallableFormat(parse_fn=lambda text: text[3:] if text.startswith("<a>") else None)  # no `render_fn`
    said = r"writes the action '.' as '.', and finds no action at all in it\. Give it a `render_fn`"
    with pytest.raises(ValueError, match=said):
        collect_demonstrations(NUMBER_LINE, policy="expert", episodes=2, agent_format=fmt, progress=False)
    model, processor = tiny_models.build("llama")
    with pytest.raises(ValueError, match=said):
        evaluate_model(model, processor, TextNumberLine, episodes=2, legal_actions_only=True, agent_format=fmt)
    for option in ({"rollout_epsilon": 0.1}, {"rollout_epsilon_start": 0.1, "rollout_annealing_turns": 9}):
        init = {"env": TextNumberLine, "agent_format": fmt, "train_dataset": None}
        with pytest.raises(ValueError, match=said):
            build(tmp_path, name="llama", init=init, max_steps=2, **option)
    build(tmp_path, name="llama", init=init, max_steps=2)


def test_a_model_that_writes_nothing(tmp_path):
    model = transformers.LlamaForSequenceClassification(tiny_models.build("llama")[0].config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no language-model head"):
        VLMQTrainer(model, config(tmp_path), text_number_line())


def test_arguments_that_were_set_in_vain(tmp_path):
    with pytest.warns(UserWarning, match="Without an `env` to collect in, `offline_steps=3`, `max_env_turns=9` will"):
        build(tmp_path, offline_steps=3, max_env_turns=9)
    with pytest.warns(UserWarning, match=r"Without evaluations .*, `stop_at_success=0\.9`, `record_episodes=2` will"):
        build(tmp_path, stop_at_success=0.9, record_episodes=2)
    losses_alone = {"eval_strategy": "steps", "eval_steps": 1, "init": {"eval_dataset": number_line(3)}}
    with pytest.warns(UserWarning, match=r"Without an `eval_env` to play, `stop_at_success=0\.9`, `record_episodes=2"):
        build(tmp_path, stop_at_success=0.9, record_episodes=2, **losses_alone)
    callback = EnvEvaluationCallback(NUMBER_LINE, stop_at_success=0.9)  # which stops, and writes no episodes
    with pytest.warns(UserWarning, match=r"Without evaluations \(`eval_strategy`\), `record_episodes=2` will"):
        build(tmp_path, stop_at_success=0.9, record_episodes=2, init={"callbacks": [callback]})
    played = {"eval_strategy": "steps", "eval_steps": 1, "init": {"eval_env": NUMBER_LINE}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Without ")
        build(tmp_path, stop_at_success=0.9, record_episodes=2, **played)
        build(tmp_path, max_steps=1, offline_steps=1, init={"env": NUMBER_LINE})


def test_a_row_too_long(tmp_path):
    """It is named, and never cut: its end carries the reward."""
    trainer = build(tmp_path, max_length=20, max_steps=1)
    with pytest.raises(ValueError, match=r"Row \d+ is \d+ tokens long, over `max_length=20`"):
        trainer.train()


def test_too_many_log_probs(tmp_path):
    rows = text_number_line().to_list()
    rows[0]["behavior_logprobs"] = [-0.1] * 50
    dataset = datasets.Dataset.from_list(rows, features=text_number_line().features)
    trainer = build(tmp_path, name="llama", init={"train_dataset": dataset}, off_policy_trace="retrace", max_steps=20)
    with pytest.raises(ValueError, match="Row 0, column `behavior_logprobs`: 50 values for 2 completion tokens"):
        trainer.train()


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(ValueError, match="Nothing to evaluate: give the trainer an `eval_env` or an `eval_dataset`"):
        build(tmp_path).evaluate()


def test_no_predictions_of_whole_sequences(tmp_path):
    with pytest.raises(NotImplementedError, match=r"Use `evaluate\(eval_dataset=...\)`"):
        build(tmp_path, name="llama").predict(text_number_line())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model saved with its critic and processor, and a checkpoint inside."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = build(folder, name="llama", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"critic_type": "vocab"}, "holds a critic with critic_type='scalar', `args` asks for 'vocab'"),
        ({"num_critics": 3}, "holds a critic with num_critics=2, `args` asks for 3"),
        ({"critic_hidden_size": 0}, "critic_hidden_size=128, `args` asks for 0"),
    ],
)
def test_another_critic_than_the_saved_one(kwargs, message, saved, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tmp_path, name="llama", init={"model": str(saved), "processing_class": None}, **kwargs)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "critic.safetensors").unlink(), OSError, "critic.safetensors"),
        (lambda folder: (folder / "critic_config.json").unlink(), OSError, "critic_config.json"),
        (lambda folder: (folder / "critic.safetensors").write_bytes(b"abc"), ValueError, "damaged"),
        (lambda folder: (folder / "critic_config.json").write_text('{"kind": 1}'), ValueError, "not a critic's"),
        (lambda folder: (folder / "model.safetensors").unlink(), OSError, "model.safetensors"),
    ],
    ids=["no critic weights", "no critic configuration", "damaged critic", "another configuration", "no model"],
)
def test_damaged_checkpoint(damage, error, message, saved, tmp_path):
    """A checkpoint that lacks a part is refused; nothing is left fresh silently."""
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved / "checkpoint-1", folder)
    damage(folder)
    trainer = build(tmp_path, name="llama", max_steps=2)
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(folder))


def test_checkpoint_of_another_critic(saved, tmp_path):
    trainer = build(tmp_path, name="llama", num_critics=3, max_steps=2)
    with pytest.raises(ValueError, match=re.escape("(saved, wanted) are {'num_critics': (2, 3)}")):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-1"))
