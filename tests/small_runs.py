# SPDX-License-Identifier: Apache-2.0
"""Small datasets and quiet configurations for tests that train."""

import functools
from pathlib import Path
from typing import Any

import datasets
import gymnasium

import vlmq_trl.envs  # noqa: F401  registers the environments
from vlmq_trl.agent_format import AgentFormat, PlainFormat
from vlmq_trl.envs import make_demonstrator
from vlmq_trl.rollout import DemonstratorPolicy, collect_demonstrations, play_episodes
from vlmq_trl.trajectory import dataset_from_episodes
from vlmq_trl.vlmq_config import VLMQConfig

NUMBER_LINE = "vlmq_trl/NumberLine-v0"
# float32 on the CPU, nothing written and nothing shown.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def config(output_dir: str | Path, **kwargs: Any) -> VLMQConfig:
    """A `VLMQConfig` for the CPU: batches of 8 turns, evaluations of 4 short episodes."""
    small = {"per_device_train_batch_size": 8, "eval_episodes": 4, "max_completion_length": 8, "learning_rate": 1e-3}
    return VLMQConfig(output_dir=str(output_dir), **{**QUIET, **small, **kwargs})


@functools.cache
def number_line(
    episodes: int = 12, seed: int = 0, agent_format: AgentFormat | None = None, policy: str = "random"
) -> datasets.Dataset:
    """Demonstrations of NumberLine with pictures."""
    return collect_demonstrations(
        NUMBER_LINE, policy=policy, episodes=episodes, seed=seed, agent_format=agent_format, progress=False
    )


class UnevenNumberLine(gymnasium.Wrapper):
    """NumberLine whose episodes end after two turns where the seed is even: of two processes' play, all of one's."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make(NUMBER_LINE))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.turns_left = 10 if seed is None or seed % 2 else 2
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.turns_left -= 1
        return observation, reward, terminated, truncated or not self.turns_left, info


class TextNumberLine(gymnasium.ObservationWrapper):
    """NumberLine with its two numbers, such as "2 to 4", as text in place of the picture, and no task text."""

    task = ""

    def __init__(self) -> None:
        super().__init__(gymnasium.make(NUMBER_LINE))
        self.observation_space = gymnasium.spaces.Dict({"text": gymnasium.spaces.Text(max_length=64)})

    def observation(self, observation: Any) -> dict[str, str]:
        return {"text": "{} to {}".format(*self.unwrapped.state_text().values())}


@functools.cache
def text_number_line(episodes: int = 12, seed: int = 0, agent_format: AgentFormat | None = None) -> datasets.Dataset:
    """Random play of `TextNumberLine`; by default the response is the action."""
    policy = DemonstratorPolicy(make_demonstrator(NUMBER_LINE, "random"), agent_format or PlainFormat())
    played = play_episodes(TextNumberLine, policy, episodes=episodes, seed=seed, agent_format=policy.agent_format)
    return dataset_from_episodes(played, with_images=False)
