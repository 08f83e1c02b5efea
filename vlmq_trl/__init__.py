# SPDX-License-Identifier: Apache-2.0
"""VLM Q-Learning for TRL: off-policy reinforcement learning that turns vision-language models into agents."""

import importlib
from typing import TYPE_CHECKING, Any

from . import envs as envs  # registers the environments

if TYPE_CHECKING:
    from .agent import VLMAgent
    from .agent_format import AgentFormat, CallableFormat, JSONCoTFormat, JSONFormat, PlainFormat, make_format
    from .callbacks import EnvEvaluationCallback
    from .critic import Critic, CriticConfig
    from .dataset_card import push_trajectories
    from .embedded import EmbeddedRecipe, load_embedded_model
    from .env_pool import EnvFailureError
    from .envs import make_demonstrator
    from .metrics import EpisodeMetrics, wilson_interval
    from .minari import trajectories_from_minari, trajectories_to_minari
    from .modeling import AutoModelForImageTextToTextWithValueHead
    from .policy import ModelPolicy, evaluate_model
    from .recorder import EpisodeRecorder
    from .remote import ChatError, ChatPolicy
    from .replay import ReplayBuffer, load_replay
    from .rollout import Rollouts, collect_demonstrations, episode_metrics, play_episodes
    from .trajectory import (
        Episode,
        TrajectoryError,
        Turn,
        concatenate_trajectories,
        dataset_from_episodes,
        episodes_from_dataset,
        filter_top_returns,
        load_trajectories,
        save_trajectories,
        validate_trajectories,
    )
    from .vlmq_config import VLMQConfig
    from .vlmq_trainer import VLMQTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "AgentFormat",
    "AutoModelForImageTextToTextWithValueHead",
    "CallableFormat",
    "ChatError",
    "ChatPolicy",
    "Critic",
    "CriticConfig",
    "EmbeddedRecipe",
    "EnvEvaluationCallback",
    "EnvFailureError",
    "Episode",
    "EpisodeMetrics",
    "EpisodeRecorder",
    "JSONCoTFormat",
    "JSONFormat",
    "ModelPolicy",
    "PlainFormat",
    "ReplayBuffer",
    "Rollouts",
    "TrajectoryError",
    "Turn",
    "VLMAgent",
    "VLMQConfig",
    "VLMQTrainer",
    "collect_demonstrations",
    "concatenate_trajectories",
    "dataset_from_episodes",
    "episode_metrics",
    "episodes_from_dataset",
    "evaluate_model",
    "filter_top_returns",
    "load_embedded_model",
    "load_replay",
    "load_trajectories",
    "make_demonstrator",
    "make_format",
    "play_episodes",
    "push_trajectories",
    "save_trajectories",
    "trajectories_from_minari",
    "trajectories_to_minari",
    "validate_trajectories",
    "wilson_interval",
]

# Where each name comes from, on its first use: a process that needs the environments only does not import torch.
_HOMES = {
    "agent": ["VLMAgent"],
    "agent_format": ["AgentFormat", "CallableFormat", "JSONCoTFormat", "JSONFormat", "PlainFormat", "make_format"],
    "callbacks": ["EnvEvaluationCallback"],
    "critic": ["Critic", "CriticConfig"],
    "dataset_card": ["push_trajectories"],
    "embedded": ["EmbeddedRecipe", "load_embedded_model"],
    "env_pool": ["EnvFailureError"],
    "envs": ["make_demonstrator"],
    "metrics": ["EpisodeMetrics", "wilson_interval"],
    "minari": ["trajectories_from_minari", "trajectories_to_minari"],
    "modeling": ["AutoModelForImageTextToTextWithValueHead"],
    "policy": ["ModelPolicy", "evaluate_model"],
    "recorder": ["EpisodeRecorder"],
    "remote": ["ChatError", "ChatPolicy"],
    "replay": ["ReplayBuffer", "load_replay"],
    "rollout": ["Rollouts", "collect_demonstrations", "episode_metrics", "play_episodes"],
    "trajectory": [
        "Episode",
        "TrajectoryError",
        "Turn",
        "concatenate_trajectories",
        "dataset_from_episodes",
        "episodes_from_dataset",
        "filter_top_returns",
        "load_trajectories",
        "save_trajectories",
        "validate_trajectories",
    ],
    "vlmq_config": ["VLMQConfig"],
    "vlmq_trainer": ["VLMQTrainer"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    elif name in _HOMES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
