# SPDX-License-Identifier: Apache-2.0
"""A small online run in a process of its own, to be killed at any instant and started again with the same arguments.

    python -m tests.chaos_run FOLDER STEPS

Each episode's id is appended to FOLDER/reported.txt once its commit has returned. FOLDER/training exists as soon as
training has begun. The final evaluation is written to FOLDER/result.json.
"""

import json
import os
import sys
from pathlib import Path

import gymnasium
from transformers import TrainerCallback

from tests import tiny_models
from tests.small_runs import config
from vlmq_trl.agent_format import PlainFormat
from vlmq_trl.checkpoints import newest_checkpoint
from vlmq_trl.online import data as online_data
from vlmq_trl.replay import ReplayBuffer
from vlmq_trl.rollout import Response, play_episodes
from vlmq_trl.trajectory import dataset_from_episodes
from vlmq_trl.vlmq_trainer import VLMQTrainer

CAPACITY = 300
TURNS = 5


class Echo(gymnasium.Env):
    """Five turns, each of which says "up" or "down" and wants "+" or "-": a task that a small model learns at once."""

    observation_space = gymnasium.spaces.Dict({"text": gymnasium.spaces.Text(max_length=9)})
    action_space = gymnasium.spaces.Text(max_length=99)
    legal_actions = ("+", "-")

    def _look(self):
        self.wanted = str(self.np_random.choice(self.legal_actions))
        return {"text": "up" if self.wanted == "+" else "down"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return self._look(), {}

    def step(self, action):
        reward = 1.0 if action == self.wanted else -1.0
        self.turn += 1
        return self._look(), reward, self.turn == TURNS, False, {}


class AnyAction:
    def act(self, requests):
        return [Response(str(request.rng.choice(Echo.legal_actions))) for request in requests]


def report_commits(folder: Path) -> None:
    """Makes every commit report what it has made durable, when it returns."""
    append, commit = ReplayBuffer.append, ReplayBuffer.commit
    pending = []

    def appending(self, episode, *, round):
        append(self, episode, round=round)
        pending.append(episode.episode_id)

    def committing(self, counters=None, *, end_round=None):
        commit(self, counters, end_round=end_round)
        with (folder / "reported.txt").open("a") as file:
            file.write("".join(f"{name}\n" for name in pending))
        pending.clear()

    ReplayBuffer.append, ReplayBuffer.commit = appending, committing


class Began(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        (self.folder / "training").touch()


def main(folder: Path, steps: int) -> None:
    report_commits(folder)
    online_data.COMMIT_SECONDS = 0.0  # many small commits: the more there is to interrupt
    model, processor = tiny_models.build("llama")
    args = config(
        folder / "run",
        max_steps=steps,
        offline_steps=40,
        turns_per_round=40,
        updates_per_turn=0.25,
        replay_capacity=CAPACITY,
        rollout_num_envs=4,
        online_fraction=0.5,
        gamma=0.0,
        filter="exp",
        learning_rate=1e-3,
        critic_learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        max_completion_length=2,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
    )
    trainer = VLMQTrainer(
        model,
        args,
        train_dataset=dataset_from_episodes(play_episodes(Echo, AnyAction(), episodes=60)),
        env=Echo,
        agent_format=PlainFormat(),
        processing_class=processor,
        callbacks=[Began(folder)],
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))
    result = {"step": trainer.state.global_step, **trainer.evaluate(episodes=200)}
    (folder / "result.json.part").write_text(json.dumps(result))
    os.replace(folder / "result.json.part", folder / "result.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
