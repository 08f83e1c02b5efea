# SPDX-License-Identifier: Apache-2.0
"""Every model family through a whole course, and the table in docs/families.md that says so.

`VLMQ_WRITE_DOCS=1 python -m pytest -m slow tests/test_families.py` writes the table; without, it is compared.
"""

import functools
import itertools
import os
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests import small_runs, tiny_models
from tests.small_runs import NUMBER_LINE, TextNumberLine
from vlmq_trl import AutoModelForImageTextToTextWithValueHead, VLMAgent, VLMQTrainer
from vlmq_trl.rollout import Request

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families: generated, do not edit -->", "<!-- families: end -->"
STAGES = ("offline", "online", "save, load", "resume", "play, values")
# Attention projections of the language model; Idefics3 calls that one `text_model`.
TARGETS = r".*(language_model|text_model).*\.(q_proj|v_proj)"
KINDS = {"full": None, "LoRA": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}
passed: dict[tuple[str, str], list[str]] = {}


def short_line(text):
    """NumberLine, three turns an episode."""
    return gymnasium.wrappers.TimeLimit(TextNumberLine() if text else gymnasium.make(NUMBER_LINE), 3)


def make_trainer(family, kind, folder, base, **kwargs):
    text = family in tiny_models.TEXT_NAMES
    model, processor = tiny_models.build(family)
    if not base.exists():
        model.save_pretrained(base)
        (processor if text else processor.tokenizer).save_pretrained(base)
    model = type(model).from_pretrained(base)
    torch.manual_seed(1)
    return VLMQTrainer(
        model,
        small_runs.config(
            folder,
            **{"max_steps": 4, "offline_steps": 2, "turns_per_round": 4, "updates_per_turn": 0.5, "filter": "exp"},
            **{"rollout_num_envs": 2, "save_strategy": "steps", "save_steps": 2, "eval_episodes": 2, **kwargs},
        ),
        train_dataset=small_runs.text_number_line() if text else small_runs.number_line(),
        env=functools.partial(short_line, text),
        processing_class=processor,
        peft_config=None
        if KINDS[kind] is None
        else LoraConfig(target_modules=["q_proj", "v_proj"] if text else TARGETS, r=4, **KINDS[kind]),
    )


def state(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [*itertools.product(tiny_models.BUILDERS, ("full", "LoRA")), ("idefics3", "DoRA"), ("idefics3", "rsLoRA")],
)
def test_a_whole_course(family, kind, tmp_path):
    lora, done = kind != "full", passed.setdefault((family, kind), [])
    base = tmp_path / "base"
    trainer = make_trainer(family, kind, tmp_path / "run", base)
    before = state(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and np.isfinite(losses).all()
    after = state(trainer)
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert any("lora_B" in name for name in moved) if lora else any("q_proj" in n or "qkv" in n for n in moved)
    assert any(name.startswith("critic.target") for name in moved)
    done.append("offline")
    rounds = [entry for entry in trainer.state.log_history if "rollout_round" in entry]
    assert rounds and rounds[-1]["rollout_episodes"] >= 1
    done.append("online")

    trainer.save_model(str(tmp_path / "saved"))
    opened = AutoModelForImageTextToTextWithValueHead.from_pretrained(tmp_path / "saved")
    saved = opened.state_dict()
    assert saved.keys() == after.keys() and all(torch.equal(saved[name], x) for name, x in after.items())
    done.append("save, load")

    resumed = make_trainer(family, kind, tmp_path / "run", base)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(x, after[name]) for name, x in state(resumed).items())
    done.append("resume")

    agent = VLMAgent(opened, trainer.processing_class, env=trainer.env, max_completion_length=8)
    assert len(agent.play(episodes=2, num_envs=2)) == 2
    row = trainer.train_dataset[0]
    images = [np.asarray(image) for image in row.get("images") or ()]
    (values,) = agent.score([Request(None, row["prompt"], images, np.random.default_rng(0))], ['{"action": "+"}'])
    assert len(values) > 1 and np.isfinite([value.advantage for value in values]).all()
    done.append("play, values")


def table():
    lines = ["| family | model class | " + " | ".join(STAGES) + " |", "| --- | --- |" + " --- |" * len(STAGES)]
    for family in tiny_models.BUILDERS:
        model, _ = tiny_models.build(family)
        cells = []
        for stage in STAGES:
            kinds = [kind for kind in ("full", "LoRA") if stage in passed.get((family, kind), [])]
            cells.append(", ".join(kinds) or "–")
        name = f"{family}{'' if family in tiny_models.VLM_NAMES else ' (text only)'}"
        lines.append(f"| {name} | `{type(model).__name__}` | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_page_has_this_table():
    """After the tests above, in one process."""
    if len(passed) < 2 * len(tiny_models.BUILDERS):
        pytest.fail("the table is of all families: run the whole file in one process")
    page = PAGE.read_text()
    made = f"{BEGIN}\n\n{table()}\n\n{END}"
    if os.environ.get("VLMQ_WRITE_DOCS"):
        PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: made, page, flags=re.DOTALL))
        page = PAGE.read_text()
    assert made in page


def test_the_page_names_every_family():
    text = PAGE.read_text()
    rows = re.findall(r"^\| (\w+)(?: \(text only\))? \| `(\w+)` \|", text, flags=re.MULTILINE)
    assert [family for family, _ in rows] == list(tiny_models.BUILDERS)
    assert "–" not in text.partition(BEGIN)[2].partition(END)[0]
