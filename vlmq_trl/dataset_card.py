# SPDX-License-Identifier: Apache-2.0
"""Trajectory datasets on the Hub, with a card that says what was played and how well.

Contents: `push_trajectories`, `trajectory_card`.
"""

from typing import Any

import datasets
import numpy as np
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi

from .metrics import mean_interval, wilson_interval
from .trajectory import validate_trajectories

COLUMNS = {
    "prompt": "conversational: what the agent was shown, text and image parts",
    "images": "the prompt's pictures, in order",
    "completion": "one assistant message: the raw response",
    "episode_id": "unique within the dataset",
    "turn": "0-based",
    "reward": "of this turn",
    "terminated": "Gymnasium's; true on an episode's last row only",
    "truncated": "likewise",
    "final_prompt": "what followed a truncated last turn",
    "final_images": "its pictures",
    "action": "read from the response",
    "valid": "whether the response and its action were valid",
    "behavior_logprobs": "of each completion token under the policy that sampled it; null where unknown",
    "env_id": "where it was played",
    "seed": "of the episode's reset",
}


def push_trajectories(
    dataset: datasets.Dataset,
    repo_id: str,
    *,
    description: str = "",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Validates a trajectory dataset and uploads it, pictures included, and its card.

    Args:
        description: who played, for the card.
        revision: a branch; it is made if need be.

    Raises:
        TrajectoryError: the data does not follow the contract; nothing is uploaded.
    """
    card = trajectory_card(dataset, repo_id, description)  # validates first
    dataset.push_to_hub(repo_id, private=private, token=token, revision=revision)
    api = HfApi(token=token)
    # What `push_to_hub` says of files and features, for the Hub's viewer, stays.
    path = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision, force_download=True)
    made = DatasetCard.load(path, repo_type="dataset")
    card.data = DatasetCardData(**{**made.data.to_dict(), **card.data.to_dict()})
    text = f"---\n{card.data.to_yaml()}\n---\n{card.text}"
    return api.upload_file(
        path_or_fileobj=text.encode(),
        path_in_repo="README.md",
        repo_id=repo_id,
        repo_type="dataset",
        revision=revision,
        commit_message="Dataset card",
    )


def trajectory_card(dataset: datasets.Dataset, repo_id: str, description: str = "") -> DatasetCard:
    """The card of a trajectory dataset: environments, episodes, success and return with 95 % intervals, columns.

    Raises:
        TrajectoryError: the data does not follow the contract.
    """
    index = validate_trajectories(dataset, require_final_observation=False)
    episodes, successes = len(index), int(index.success.sum())
    returns = np.asarray(index.returns_to_go(1.0))[np.asarray(index.first_row)]
    low, high = wilson_interval(successes, episodes)
    between = "{:.3f} to {:.3f}".format(*mean_interval(returns))
    known = dataset.unique("env_id") if "env_id" in dataset.column_names else []
    envs = sorted(env for env in known if env)
    sees = "images" in dataset.column_names
    data = DatasetCardData(
        tags=["trl", "vlmq", "trajectories", "reinforcement-learning", "agents"],
        task_categories=["image-text-to-text" if sees else "text-generation", "reinforcement-learning"],
        pretty_name=repo_id.rpartition("/")[2],
    )
    rows = [
        ("environments", ", ".join(f"`{env}`" for env in envs) or "not recorded"),
        ("episodes", f"{episodes:,}"),
        ("turns", f"{len(dataset):,}, {len(dataset) / episodes:.1f} an episode"),
        ("success", f"{100 * successes / episodes:.1f} % ({100 * low:.1f} to {100 * high:.1f})"),
        ("mean return", f"{returns.mean():.3f}" + (f" ({between})" if episodes > 1 else "")),
        ("episodes cut off (truncated)", f"{int(np.asarray(index.truncated)[_last_rows(index)].sum()):,}"),
    ]
    lines = [
        f"# {repo_id.rpartition('/')[2]}",
        "",
        *([description, ""] if description else []),
        "Play of an agent, one row a turn, for VLM Q-Learning ([arXiv 2505.03181]"
        "(https://huggingface.co/papers/2505.03181)) and, unchanged, for TRL's `SFTTrainer`.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "Success is a positive return; intervals are of 95 %.",
        "",
        "```python",
        "from datasets import load_dataset",
        "from vlmq_trl import VLMQTrainer",
        "",
        f'play = load_dataset("{repo_id}", split="{dataset.split or "train"}")',
        "trainer = VLMQTrainer(model, train_dataset=play)",
        "```",
        "",
        "| column | meaning |",
        "| --- | --- |",
        *(f"| `{name}` | {COLUMNS.get(name, '')} |" for name in dataset.column_names),
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _last_rows(index: Any) -> np.ndarray:
    return np.asarray(index.first_row) + np.asarray(index.length) - 1
