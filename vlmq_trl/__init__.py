# SPDX-License-Identifier: Apache-2.0
"""VLM Q-Learning for TRL: off-policy reinforcement learning that turns vision-language models into agents."""

from .agent_format import AgentFormat, CallableFormat, JSONCoTFormat, JSONFormat, PlainFormat, make_format
from .callbacks import EnvEvaluationCallback
from .critic import Critic, CriticConfig
from .embedded import EmbeddedRecipe, load_embedded_model
from .envs import make_demonstrator
from .metrics import EpisodeMetrics, wilson_interval
from .modeling import AutoModelForImageTextToTextWithValueHead
from .policy import ModelPolicy, evaluate_model
from .rollout import collect_demonstrations, episode_metrics, play_episodes
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
    "Critic",
    "CriticConfig",
    "EmbeddedRecipe",
    "EnvEvaluationCallback",
    "Episode",
    "EpisodeMetrics",
    "JSONCoTFormat",
    "JSONFormat",
    "ModelPolicy",
    "PlainFormat",
    "TrajectoryError",
    "Turn",
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
    "load_trajectories",
    "make_demonstrator",
    "make_format",
    "play_episodes",
    "save_trajectories",
    "validate_trajectories",
    "wilson_interval",
]
