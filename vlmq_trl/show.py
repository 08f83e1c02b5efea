# SPDX-License-Identifier: Apache-2.0
"""Plays episodes and writes them down to be looked at: as GIF, as HTML page and as JSON lines.

    python -m vlmq_trl.show vlmq_trl/NumberLine-v0 --policy flawed:0.3
    python -m vlmq_trl.show vlmq_trl/Blackjack-v0 --model runs/my_agent --temperature 1 --episodes 3

Contents: `show_episodes`, `check_folder`, `env_option`.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium

from vlmq_trl.agent_format import AgentFormat, default_format, make_format
from vlmq_trl.env_pool import EnvFailureError, EnvSpec, close_env, make_env
from vlmq_trl.envs import make_demonstrator
from vlmq_trl.recorder import EpisodeRecorder
from vlmq_trl.rollout import DemonstratorPolicy, Policy, play_episodes
from vlmq_trl.trajectory import Episode

# What a command line may ask in vain: a bad value, a missing package or file, a script that does not exist, ...
EXPECTED = (ValueError, TypeError, ImportError, OSError, NotImplementedError, EnvFailureError)


def show_episodes(
    env: EnvSpec,
    policy: str | Policy = "expert",
    folder: str | os.PathLike = "episodes",
    *,
    episodes: int = 1,
    seed: int = 0,
    agent_format: AgentFormat | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    max_turns: int | None = None,
) -> list[Episode]:
    """Plays episodes and writes each as `000-<episode id>.gif` and `.html`, and their turns as `episodes.jsonl`.

    Args:
        env: a Gymnasium id, or a function that makes a new environment.
        policy: a demonstrator's name ("expert", "random", "flawed:0.3", ...), or anything with `act(requests)`, such
            as `ModelPolicy(model, processor)`.
        folder: where the files go.
        Others: as `play_episodes`.

    Returns:
        The episodes that were played.

    Raises:
        ValueError: an unknown id or demonstrator; bad numbers.
        OSError: the files cannot be written; those of earlier episodes stay.
    """
    check_folder(folder)
    if isinstance(policy, str):
        demonstrator = make_demonstrator(env, policy)
        if agent_format is None:
            probe = make_env(env, env_kwargs)
            try:
                agent_format = default_format(probe)
            finally:
                close_env(probe)
        policy = DemonstratorPolicy(demonstrator, agent_format)
    played = play_episodes(
        env,
        policy,
        episodes=episodes,
        seed=seed,
        agent_format=agent_format,
        num_envs=1,
        env_kwargs=env_kwargs,
        max_turns=max_turns,
    )
    recorder = EpisodeRecorder(folder, episodes, html=True)
    shown: list[Episode] = []
    for episode in recorder.watch(played):
        if recorder.error is not None:  # the files are what it is played for
            raise OSError(f"only {len(shown)} of {episodes} episodes were written to {folder}: {recorder.error}")
        shown.append(episode)
    return shown


def check_folder(folder: str | os.PathLike) -> None:
    """Refuses a folder that could not be made or written to, before anything is loaded or played for it.

    Raises:
        OSError: names what is in the way.
    """
    path = Path(folder)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"no folder {path} can be made: {there} is a file; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing may be written into {there}; name another folder than {path}")


def env_option(text: str) -> tuple[str, Any]:
    """`key=value`, an environment's argument; a value that is a Python literal counts as one, else it is a string.

    Raises:
        ValueError: it has another form.
    """
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise ValueError(f"an option of the environment is of the form key=value, not {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def main(arguments: list[str] | None = None) -> None:
    """The command; what it cannot do ends it with a line."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmq_trl.show", description="Play episodes, and write them as GIF, HTML page and JSON lines."
    )
    parser.add_argument("env_id", help="a Gymnasium id; `python -m vlmq_trl.envs` lists this package's")
    player = parser.add_mutually_exclusive_group()
    player.add_argument("--policy", help="expert, random, flawed:0.3, ... (default: expert)")
    player.add_argument("--model", help="a saved model or adapter, or a Hub repository, instead of a script")
    parser.add_argument("--episodes", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode (default: 0)")
    parser.add_argument("--output", default="episodes", help="folder (default: episodes)")
    parser.add_argument("--agent_format", choices=("plain", "json"), help="default: a model's, or the environment's")
    parser.add_argument("--temperature", type=float, help="of a model; 0, the default, is greedy")
    parser.add_argument("--max_completion_length", type=int, help="of a model, in tokens; default: what its card says")
    parser.add_argument("--max_turns", type=int, help="truncate episodes after so many turns")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the environment")
    chosen = parser.parse_args(arguments)
    for name in ("temperature", "max_completion_length"):
        if getattr(chosen, name) is not None and chosen.model is None:
            parser.error(f"--{name} is a model's, and no --model is given.")
    try:
        played = _show(chosen)
    except (*EXPECTED, gymnasium.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for episode in played:
        how = "terminated" if episode.terminated else "truncated"
        print(f"{episode.episode_id}: return {episode.return_:+.4g}, {len(episode.turns)} turns, {how}")
        for k, turn in enumerate(episode.turns):
            print(f"  {k:>3}  {turn.action or '-'}{'' if turn.valid else '  (invalid)'}  {turn.reward:+.4g}")
    print(f"Pictures, pages and turns: {Path(chosen.output).resolve()}{os.sep}")


def _show(chosen: argparse.Namespace) -> list[Episode]:
    """What the command line asks for."""
    check_folder(chosen.output)
    policy: Any = chosen.policy or "expert"
    agent_format = make_format(chosen.agent_format) if chosen.agent_format else None
    if chosen.model is not None:
        from vlmq_trl.agent import VLMAgent  # which needs torch

        agent = VLMAgent.from_pretrained(
            chosen.model,
            agent_format=agent_format,
            temperature=chosen.temperature or 0.0,
            max_completion_length=chosen.max_completion_length,
        )
        policy, agent_format = agent.policy(), agent.own_format()
    return show_episodes(
        chosen.env_id,
        policy,
        chosen.output,
        episodes=chosen.episodes,
        seed=chosen.seed,
        agent_format=agent_format,
        env_kwargs=dict(map(env_option, chosen.option)),
        max_turns=chosen.max_turns,
    )


if __name__ == "__main__":
    main()
