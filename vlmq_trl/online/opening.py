# SPDX-License-Identifier: Apache-2.0
"""Before a run goes online: what is checked when the trainer is made, and what is opened when it starts."""

from dataclasses import fields
from itertools import chain, count
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..agent_format import AgentFormat, JSONFormat, PlainFormat, prompt_of, taking
from ..env_pool import first_look
from ..replay import ReplayBuffer, process_folder
from ..rollout import EnvSpec, Policy, Rollouts
from ..trajectory import Episode, EpisodeIndex, Turn, dataset_from_episodes, validate_trajectories
from ..vlmq_config import VLMQConfig
from .schedule import Schedule

SAMPLING = tuple(f"rollout_{kind}temperature{when}" for kind in ("", "action_") for when in ("", "_start"))


def check_online(
    args: VLMQConfig,
    env: EnvSpec,
    train_dataset: Dataset | None,
    agent_format: AgentFormat | None,
    rollout_policy: Policy | None,
) -> Dataset:
    """Looks for what would go wrong later, and sets `max_steps` where the budget of turns decides it.

    Returns:
        One turn of the environment as the agent will see it, with an empty response.

    Raises:
        ValueError, TypeError: say what does not fit, and what to do.
    """
    if args.world_size > 1 and args.async_collection:
        raise ValueError(
            "`async_collection` needs a single process: the thread's and the learner's collectives would mix. "
            "Leave it out, or let `rollout_policy` ask a server."
        )
    if args.turns_per_round < args.world_size:
        raise ValueError(f"`turns_per_round={args.turns_per_round}`: each of {args.world_size} processes needs one.")
    schedule = Schedule.from_config(args)
    if args.max_steps <= 0:
        if schedule.num_updates is None:
            raise ValueError("With an `env`, set `max_steps` (updates) or `max_env_turns` (a budget of turns).")
        args.max_steps = schedule.num_updates
    if train_dataset is None and args.offline_steps:
        raise ValueError(f"`offline_steps={args.offline_steps}` needs a `train_dataset` to learn from.")
    if args.eval_seed + args.eval_episodes > args.rollout_seed:
        raise ValueError(
            f"`rollout_seed={args.rollout_seed}`: collection would come to play the evaluation's episodes, seeds "
            f"{args.eval_seed} to {args.eval_seed + args.eval_episodes - 1}. Move it above them."
        )
    check_policy = getattr(rollout_policy, "check", None)
    if check_policy is not None:
        check_policy()
    seen, fmt, legal_actions = _first_look(args, env, agent_format)
    with_images = "images" in seen.column_names
    exploring = {
        "rollout_epsilon": args.rollout_epsilon or args.rollout_epsilon_start,
        "rollout_search_fraction": args.rollout_search_fraction,
    }
    for name, value in exploring.items():
        if value and not legal_actions:
            raise ValueError(
                f"`{name}={value}` needs to know what can be done: give the environment an attribute "
                "`legal_actions`, a sequence of strings."
            )
        if value:
            taking(fmt, legal_actions[0], fmt.replace_action("", legal_actions[0]))
    defaults = {field.name: field.default for field in fields(args)}
    for name in ("legal_actions_only", "rollout_search_fraction", *SAMPLING):
        if getattr(args, name) != defaults[name] and rollout_policy is not None:
            raise ValueError(
                f"`{name}` binds the model's own answers, and `rollout_policy` would know nothing of it. Leave one of "
                "them out."
            )
    if args.rollout_search_fraction and with_images and isinstance(fmt, PlainFormat | JSONFormat):
        raise ValueError(
            f"`rollout_search_fraction={args.rollout_search_fraction}` tells states apart by what a response says "
            f"before its action, and in the format {fmt.name!r} it says nothing: all pictures would be one state. Use "
            "a format that reads them aloud, such as `JSONCoTFormat`."
        )
    if train_dataset is not None and ("images" in train_dataset.column_names) != with_images:
        raise ValueError(
            f"The environment shows {'pictures' if with_images else 'text only'}, the training data "
            f"{'text only' if with_images else 'pictures'}: they are not of the same task."
        )
    return seen


def replay_folder(args: VLMQConfig) -> Path:
    """Where the replay buffer lies, of all processes."""
    return Path(args.replay_dir or Path(args.output_dir) / "replay")


def open_online(
    args: VLMQConfig, env: EnvSpec, agent_format: AgentFormat | None, dataset: Dataset, index: EpisodeIndex | None
) -> tuple[ReplayBuffer, Rollouts]:
    """The replay buffer, with the offline data in it, and the environments.

    Args:
        dataset: the offline data, or one turn of the environment.
        index: of the offline data; None: there are none.
    """
    process, n = args.process_index, args.world_size
    buffer = ReplayBuffer(
        process_folder(replay_folder(args), process, n),
        capacity=args.replay_capacity and max(1, args.replay_capacity // n),
        gamma=args.gamma,
        with_images="images" in dataset.column_names,
    )
    try:
        if index is not None:
            buffer.add_offline(*_offline_share(dataset, index, process, n))
        rollouts = Rollouts(
            env,
            agent_format=agent_format,
            num_envs=args.rollout_num_envs,
            seed=args.rollout_seed,
            id_prefix=_fresh_prefix(index),
            workers=args.rollout_workers,
            env_timeout=args.env_timeout,
            max_env_failures=args.max_env_failures,
        )
    except BaseException:
        buffer.close()
        raise
    return buffer, rollouts


def _fresh_prefix(index: EpisodeIndex | None) -> str:
    """What the ids of collected episodes begin with: "online", or where offline data was a run's own play, "online-2"
    and so on."""
    taken = {str(name).partition("/")[0] for name in (() if index is None else index.episode_ids)}
    names = chain(["online"], (f"online-{k}" for k in count(2)))
    return next(name for name in names if name not in taken)


def _offline_share(dataset: Dataset, index: EpisodeIndex, process: int, n: int) -> tuple[Dataset, EpisodeIndex]:
    """The episodes that a process draws from: all, or every n-th of a distributed run."""
    if n == 1:
        return dataset, index
    if len(index) < n:
        raise ValueError(f"{len(index)} episodes of offline data cannot be shared among {n} processes.")
    spans = zip(index.first_row[process::n], index.length[process::n], strict=True)
    share = dataset.select(np.concatenate([np.arange(first, first + count) for first, count in spans]))
    return share, validate_trajectories(share, check_images="none", require_final_observation=False)


def _first_look(
    args: VLMQConfig, env: EnvSpec, agent_format: AgentFormat | None
) -> tuple[Dataset, AgentFormat, tuple[str, ...]]:
    """One turn of the environment as the agent sees it, with an empty response; its format; and its legal actions."""
    seen, own = first_look(env, args.rollout_seed, workers=args.rollout_workers, env_timeout=args.env_timeout)
    fmt = own if agent_format is None else agent_format
    prompt, images = prompt_of(fmt, seen.task, seen.observation)
    turn = Turn(prompt, images, "", 0.0)
    return dataset_from_episodes([Episode("first look", (turn,), True, False)]), fmt, seen.legal_actions
