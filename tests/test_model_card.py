# SPDX-License-Identifier: Apache-2.0
"""The model card: what the Hub reads off its head, what people read, and that its lines run."""

import re
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests import small_runs, tiny_models
from tests.small_runs import NUMBER_LINE
from vlmq_trl import EnvEvaluationCallback, VLMQTrainer
from vlmq_trl.dataset_card import trajectory_card
from vlmq_trl.model_card import Evaluation, evaluations, model_card

LORA = LoraConfig(target_modules=r".*text_model.*\.(q_proj|v_proj)", r=4)


def make_trainer(folder, lora=False, **kwargs):
    torch.manual_seed(0)
    model, processor = tiny_models.build("idefics3")
    model.save_pretrained(folder / "base")
    callbacks = kwargs.pop("callbacks", None)
    return VLMQTrainer(
        type(model).from_pretrained(folder / "base"),
        small_runs.config(folder / "agent", max_steps=4, **kwargs),
        train_dataset=small_runs.number_line(),
        eval_env=NUMBER_LINE,
        processing_class=processor,
        peft_config=LORA if lora else None,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_runs_card(lora, tmp_path):
    secret = "hf_" + "s" * 34
    trainer = make_trainer(tmp_path, lora, eval_strategy="steps", eval_steps=2, hub_token=secret)
    trainer.hub_model_id = "me/agent"
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="The Agent", dataset_name="me/play", tags="cards")
    text = (tmp_path / "agent" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert {"trl", "vlmq", "cards", "reinforcement-learning"} <= set(card.data.tags)
    assert card.data.datasets == "me/play" and card.data.pipeline_tag == "image-text-to-text"
    success, reward = card.data.eval_results
    last = trainer.state.log_history[-1] if "eval_success_rate" in trainer.state.log_history[-1] else None
    last = last or [entry for entry in trainer.state.log_history if "eval_success_rate" in entry][-1]
    assert (success.metric_type, success.dataset_type) == ("success_rate", NUMBER_LINE)
    assert success.metric_value == round(last["eval_success_rate"], 4) and "95 % interval" in success.metric_name
    assert reward.metric_value == round(last["eval_mean_return"], 4)
    assert len(re.findall(r"^\| \d", text, flags=re.MULTILINE)) == 2  # evaluations
    assert "| `critic_type` | scalar |" in text and 'VLMAgent.from_pretrained("me/agent")' in text
    assert ("PeftModel.from_pretrained" in text) == lora
    assert (tmp_path / "agent" / "success.png").stat().st_size > 5000
    for file in (tmp_path / "agent").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_the_lines_of_the_card_run(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()  # names the folder where there is no repository
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "agent" / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "lines.py").write_text(f"{code}\nprint('tokens:', len(values))")
    run = subprocess.run([sys.executable, str(tmp_path / "lines.py")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "'success_rate'" in run.stdout and int(run.stdout.rpartition("tokens:")[2]) > 1


def test_what_a_callback_played_counts_too(tmp_path):
    callback = EnvEvaluationCallback(NUMBER_LINE, eval_steps=2, episodes=3, max_completion_length=8)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    found = evaluations(trainer.state.log_history, trainer.args.to_dict())
    assert [e.step for e in found] == [0, 2, 4] == [record["step"] for record in callback.history]
    assert [e.mean_return for e in found] == [record["mean_return"] for record in callback.history]


def test_an_evaluation_under_other_settings_does_not_count(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    for other in ({"episodes": 7}, {"temperature": 1.0}, {"seed": 5}):
        trainer.evaluate(**other)
        trainer.state.log_history[-1]["eval_success_rate"] = 0.875  # so that it can be told from the run's own
    trainer.create_model_card()
    text = (tmp_path / "agent" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.* (\d+) \|$", text, flags=re.MULTILINE)
    assert rows == [("2", "4"), ("4", "4")] and "87.5" not in text and "0.875" not in text


def test_an_evaluation_after_training_takes_no_steps_place(tmp_path):
    """It may be of other weights, such as the best."""
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    own = evaluations(trainer.state.log_history, trainer.args.to_dict())
    trainer.evaluate()
    trainer.state.log_history[-1]["eval_success_rate"] = 0.875
    assert evaluations(trainer.state.log_history, trainer.args.to_dict()) == own
    assert [e.step for e in own] == [2, 4]


@pytest.mark.parametrize("family", ["idefics3", "llama"])
def test_the_stock_line_opens_the_model(family, tmp_path):
    sees_images = family in tiny_models.VLM_NAMES
    model, _ = tiny_models.build(family)
    model.save_pretrained(tmp_path)
    text = str(card(repo_id=str(tmp_path), is_adapter=False, sees_images=sees_images))
    name, repo = re.search(r"`model = (\w+)\.from_pretrained\(.(.*).\)`", text).groups()
    assert type(getattr(transformers, name).from_pretrained(repo)) is type(model)


def played(n):
    return [Evaluation(10 * k, k / n, k / n - 0.1, k / n + 0.1, 2.0 * k, 100, 500.0 * k) for k in range(n + 1)]


def card(**kwargs):
    given = {
        "model_name": "m",
        "repo_id": "me/m",
        "base_model": "them/base",
        "dataset_name": None,
        "tags": [],
        "is_adapter": True,
        "sees_images": True,
        "env_id": NUMBER_LINE,
        "env_kwargs": {},
        "arguments": {"seed": 3},
        "played": [],
        "step": 1000,
        "curve": None,
    }
    return model_card(**{**given, **kwargs})


def test_a_long_history_is_thinned_and_keeps_the_weights_that_are_shown():
    made = card(played=played(100), step=370)
    text = str(made)
    rows = re.findall(r"^\| (\d+) \|.*", text, flags=re.MULTILINE)
    assert len(rows) <= 10 and {"0", "370", "1000"} <= set(rows)
    assert "| 370 | 18,500 | **37.0 (27.0 to 47.0)** | 74.000 | 100 |" in text
    assert made.data.eval_results[0].metric_value == 0.37
    assert "in bold, that of the weights here." in text and "step" not in made.data.eval_results[0].metric_name


def test_weights_that_were_trained_on_after_their_evaluation():
    """As those of a checkpoint between two evaluations."""
    made = card(played=played(100), step=377)
    assert "| 370 | 18,500 | **37.0 (27.0 to 47.0)** |" in str(made)
    assert "in bold, the last before the weights here, of step 377." in str(made)
    assert all(result.metric_name.endswith(", at step 370 of 377") for result in made.data.eval_results)


def test_without_evaluation_environment_or_base():
    text = str(card(env_id=None, base_model=None))
    assert "It has not been evaluated" in text and "agent.play(my_env" in text and "None" not in text
    assert not card().data.eval_results


def test_a_single_episode_has_no_interval_of_returns():
    one = small_runs.text_number_line(episodes=1).remove_columns("final_prompt")  # as `load_trajectories` takes them
    text = str(trajectory_card(one, "me/play"))
    assert "| episodes | 1 |" in text and re.search(r"\| mean return \| -?\d+\.\d{3} \|", text)
