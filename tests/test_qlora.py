# SPDX-License-Identifier: Apache-2.0
"""QLoRA: a base model in 4 bits (bitsandbytes, here on the CPU) and an adapter, offline and online."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from examples import train_agent
from tests import small_runs, tiny_models
from vlmq_trl import AutoModelForImageTextToTextWithValueHead, VLMAgent, VLMQTrainer
from vlmq_trl.modeling import keep_trainable
from vlmq_trl.rollout import Request

LORA = LoraConfig(target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj)", r=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for part in tiny_models.build("idefics3"):
        part.save_pretrained(folder)
    return str(folder)


def make_trainer(source, folder, peft_config=LORA):
    return VLMQTrainer(
        source,
        small_runs.config(
            folder,
            **{"max_steps": 4, "offline_steps": 2, "turns_per_round": 4, "updates_per_turn": 0.5, "filter": "exp"},
            **{"rollout_num_envs": 2, "save_strategy": "steps", "save_steps": 2},
        ),
        train_dataset=small_runs.number_line(),
        env=small_runs.NUMBER_LINE,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=peft_config,
    )


def learned(trainer):
    """Adapter, critic and target copy."""
    state = trainer.model.state_dict()
    return {name: x.clone() for name, x in state.items() if "lora_" in name or name.startswith("critic.")}


def in_4_bits(model):
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def test_a_whole_course(base, tmp_path):
    trainer = make_trainer(base, tmp_path / "run")
    packed = in_4_bits(trainer.model)
    assert any("q_proj" in name for name in packed) and not any("lm_head" in name for name in packed)
    before = learned(trainer)
    trainer.train()
    after = learned(trainer)
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert any("lora_B" in name for name in moved) and any(name.startswith("critic.target") for name in moved)
    assert any("rollout_round" in entry for entry in trainer.state.log_history)

    resumed = make_trainer(base, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(x, after[name]) for name, x in learned(resumed).items())

    # What was saved opens on the base model as it is, with the same critic, and trains on in 4 bits.
    trainer.save_model(str(tmp_path / "saved"))
    agent = VLMAgent.from_pretrained(str(tmp_path / "saved"))
    assert not in_4_bits(agent.model)
    row = trainer.train_dataset[0]
    request = Request(None, row["prompt"], [np.asarray(image) for image in row["images"]], np.random.default_rng(0))
    (values,) = agent.score([request], ['{"action": "+"}'])
    assert np.isfinite([value.advantage for value in values]).all()
    further = make_trainer(str(tmp_path / "saved"), tmp_path / "further", peft_config=None)
    assert in_4_bits(further.model) == packed
    assert all(torch.equal(x, after[name]) for name, x in learned(further).items())
    further.train()
    assert not all(torch.equal(x, after[name]) for name, x in learned(further).items())


def test_a_head_in_4_bits_is_refused(base):
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["connector"])
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=quantization)
    with pytest.raises(ValueError, match=r'`lm_head` is quantised.*add "lm_head" to `llm_int8_skip_modules`'):
        AutoModelForImageTextToTextWithValueHead(model)


def test_gradients_pass_after_an_evaluation(base):
    """On every processor: some have bitsandbytes pack the weights for play alone, once they are evaluated."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=quantization)
    keep_trainable(model)
    layer = next(module for module in model.modules() if type(module).__name__ == "Linear4bit")

    def gradient():
        layer.train()
        x = torch.linspace(-1, 1, 2 * layer.in_features).reshape(2, -1).requires_grad_()
        layer(x).square().sum().backward()
        return x.grad

    before = gradient()
    with torch.no_grad():
        layer.eval()(torch.ones(2, layer.in_features))
    assert before.abs().max() > 0 and torch.equal(gradient(), before)


def test_the_script_trains_in_4_bits(base, tmp_path, monkeypatch):
    seen = []
    train = VLMQTrainer.train
    monkeypatch.setattr(VLMQTrainer, "train", lambda self, **k: (seen.append(in_4_bits(self.model)), train(self, **k)))
    argv = f"--model_name_or_path {base} --load_in_4bit --use_peft --game NumberLine --method vlmq --episodes 4"
    argv += " --max_steps 1 --eval_steps 1 --eval_episodes 2 --test_episodes 2 --before_episodes 0"
    argv += f" --max_completion_length 4 --disable_tqdm true --output_dir {tmp_path}"
    train_agent.main(argv.split())
    assert len(seen) == 1 and any("q_proj" in name for name in seen[0])
