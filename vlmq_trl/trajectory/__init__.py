# SPDX-License-Identifier: Apache-2.0
"""The trajectory dataset: its schema and builders, its validation, and its files.

One row per turn; an episode's rows are contiguous and in order. The dataset is a valid TRL prompt-completion (vision)
dataset, so a stock `trl.SFTTrainer` trains on it unchanged.

| column | type | meaning |
| --- | --- | --- |
| `prompt` | list of messages | conversational; content is a list of parts (with images) or a string (text only) |
| `images` | list of `Image` | the prompt's images, in order; absent from a text-only dataset |
| `completion` | list of messages | one assistant message, the raw response as a string |
| `episode_id` | string | unique within the dataset |
| `turn` | int32 | 0-based |
| `reward` | float32 | the environment's reward for this turn |
| `terminated`, `truncated` | bool | as Gymnasium; true on the episode's last row only |
| `final_prompt`, `final_images` | as above, nullable | the observation after a truncated last turn |
| `action`, `valid` | string, bool | the parsed action, and whether the response was valid |
| `behavior_logprobs` | list of float32, nullable | per completion token, under the sampling policy |
| `env_id`, `seed` | string, int64 | provenance |
"""

from .episodes import (
    FEATURES,
    Episode,
    Turn,
    dataset_from_episodes,
    episodes_from_dataset,
    flatten_content,
    trajectory_features,
)
from .files import concatenate_trajectories, filter_top_returns, load_trajectories, save_trajectories
from .validation import EpisodeIndex, TrajectoryError, validate_trajectories

__all__ = [
    "FEATURES",
    "Episode",
    "EpisodeIndex",
    "TrajectoryError",
    "Turn",
    "concatenate_trajectories",
    "dataset_from_episodes",
    "episodes_from_dataset",
    "filter_top_returns",
    "flatten_content",
    "load_trajectories",
    "save_trajectories",
    "trajectory_features",
    "validate_trajectories",
]
