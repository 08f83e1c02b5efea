# SPDX-License-Identifier: Apache-2.0
"""Environments times a policy give trajectories.

Many environments run at once and every request of a tick is answered in one `Policy.act` call, so that a model
generates in batches; a finished environment takes the next episode at once. Episode i depends on its own seed alone.

Contents: `Request`, `Response`, `Policy`, `DemonstratorPolicy`, `play_episodes`, `collect_demonstrations`,
`episode_metrics`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import datasets
import gymnasium
import numpy as np
from tqdm.auto import tqdm

from vlmq_trl.agent_format import AgentFormat, Exchange, check_format, default_format
from vlmq_trl.envs import Demonstrator, make_demonstrator
from vlmq_trl.metrics import load_metric
from vlmq_trl.trajectory import Episode, Turn, dataset_from_episodes

EnvSpec = str | Callable[..., gymnasium.Env]


@dataclass(frozen=True)
class Request:
    """One environment waits for the agent's answer."""

    env: gymnasium.Env  # for scripted policies; a model reads the prompt only
    prompt: list[dict[str, Any]]
    images: list[np.ndarray]  # uint8 [H, W, 3], in the order of the prompt's image parts
    rng: np.random.Generator  # the episode's own generator, the same object in each of its turns


@dataclass(frozen=True)
class Response:
    """A policy's answer."""

    text: str
    behavior_logprobs: list[float] | None = None  # per generated token, end token included


class Policy(Protocol):
    """Answers all waiting environments at once."""

    def act(self, requests: list[Request]) -> list[Response]:
        """One response for each request, in order."""
        ...


class DemonstratorPolicy:
    """A scripted player that answers in an agent format."""

    def __init__(self, demonstrator: Demonstrator, agent_format: AgentFormat):
        self.demonstrator = demonstrator
        self.agent_format = agent_format

    def act(self, requests: list[Request]) -> list[Response]:
        responses = []
        for request in requests:
            decision = self.demonstrator(request.env, request.rng)
            responses.append(Response(self.agent_format.render(decision.action, decision.reading, decision.thoughts)))
        return responses


@dataclass
class _Running:
    """An environment in the middle of an episode."""

    env: gymnasium.Env
    number: int  # of the episode
    rng: np.random.Generator
    observation: Mapping[str, Any]
    prompt: list[dict[str, Any]]
    images: list[np.ndarray]
    history: deque[Exchange]
    turns: list[Turn] = field(default_factory=list)


def _task(env: gymnasium.Env) -> str:
    """The environment's task text, which may change from episode to episode."""
    return str(env.get_wrapper_attr("task")) if env.has_wrapper_attr("task") else ""


def _kept(observation: Any) -> Any:
    """An observation whose image is a copy: environments may draw every picture into the same buffer."""
    if not isinstance(observation, Mapping) or observation.get("image") is None:
        return observation
    return {**observation, "image": np.array(observation["image"])}


def _env_name(env: EnvSpec) -> str:
    return env if isinstance(env, str) else str(getattr(env, "__name__", type(env).__name__))


def make_env(env: EnvSpec, env_kwargs: Mapping[str, Any] | None = None) -> gymnasium.Env:
    """A new environment from a Gymnasium id or a factory.

    Raises:
        TypeError: `env` is an environment itself (one object cannot run several episodes at once), or not callable.
    """
    kwargs = dict(env_kwargs or {})
    if isinstance(env, str):
        return gymnasium.make(env, **kwargs)
    if isinstance(env, gymnasium.Env) or not callable(env):
        raise TypeError(
            f"env must be a Gymnasium id or a function that makes a new environment, got {type(env).__name__}; "
            "pass for example `lambda: MyEnv()`."
        )
    made = env(**kwargs)
    if not isinstance(made, gymnasium.Env):
        raise TypeError(f"The environment factory returned {type(made).__name__}, not a gymnasium.Env.")
    return made


def play_episodes(
    env: EnvSpec,
    policy: Policy,
    *,
    episodes: int,
    seed: int = 0,
    agent_format: AgentFormat | None = None,
    num_envs: int = 16,
    env_kwargs: Mapping[str, Any] | None = None,
    max_turns: int | None = None,
    id_prefix: str | None = None,
    progress: bool = False,
) -> Iterator[Episode]:
    """Play episodes and yield them in order.

    Episode i is reset with `seed + i` and has the generator `default_rng((seed + i, 1))`, so with a policy whose
    answer depends on its own request only, the episodes do not depend on `num_envs`. A response that does not parse
    reaches the environment as "", which no environment of this package takes for a legal action; `Turn.valid` says
    whether the response parsed and the environment (`info["valid"]`, where it says so) took the action. A truncated
    episode records its final observation.

    Args:
        env: a Gymnasium id, or a function that makes a new environment.
        policy: answers all running environments in one call.
        episodes: how many; at least 1.
        seed: at least 0.
        agent_format: the environment's own by default (`default_format`).
        num_envs: environments that run at once.
        env_kwargs: given to `gymnasium.make` or the factory.
        max_turns: truncate an episode after so many turns, for environments without a limit of their own.
        id_prefix: episode ids are "<id_prefix>/<seed + i>"; the environment's name by default.
        progress: show a bar over episodes.

    Raises:
        ValueError, TypeError: bad arguments, a reward that is not finite, a policy that does not answer every request.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"max_turns must be at least 1, got {max_turns}.")
    check_format(agent_format)
    if not hasattr(policy, "act"):
        raise TypeError(
            f"The policy has no method `act(requests)`, got {policy!r}. A function (env, generator) -> Decision, such "
            "as a demonstrator, becomes one by `DemonstratorPolicy(function, agent_format)`."
        )
    return _play(env, policy, episodes, seed, agent_format, num_envs, env_kwargs, max_turns, id_prefix, progress)


def _play(
    env: EnvSpec,
    policy: Policy,
    episodes: int,
    seed: int,
    agent_format: AgentFormat | None,
    num_envs: int,
    env_kwargs: Mapping[str, Any] | None,
    max_turns: int | None,
    id_prefix: str | None,
    progress: bool,
) -> Iterator[Episode]:
    name = _env_name(env)
    prefix = name if id_prefix is None else id_prefix
    envs: list[gymnasium.Env] = []
    bar = tqdm(total=episodes, unit="episode", desc=name, disable=not progress)
    try:
        for _ in range(min(num_envs, episodes)):
            made = make_env(env, env_kwargs)
            if any(made is other for other in envs):
                raise ValueError("The environment factory returned the same object twice; make a new one each time.")
            envs.append(made)
        fmt = agent_format if agent_format is not None else default_format(envs[0])

        def start(one: gymnasium.Env, number: int) -> _Running:
            observation = _kept(one.reset(seed=seed + number)[0])
            prompt, images = fmt.build_prompt(_task(one), observation, ())
            rng = np.random.default_rng((seed + number, 1))
            return _Running(one, number, rng, observation, prompt, images, deque(maxlen=fmt.history))

        running = [start(one, number) for number, one in enumerate(envs)]
        started, due = len(running), 0
        finished: dict[int, Episode] = {}
        while running:
            requests = [Request(slot.env, slot.prompt, slot.images, slot.rng) for slot in running]
            responses = policy.act(requests)
            if len(responses) != len(requests):
                raise ValueError(f"The policy gave {len(responses)} responses to {len(requests)} requests.")
            still = []
            for slot, response in zip(running, responses, strict=True):
                episode = _advance(slot, response, fmt, max_turns, name, prefix, seed)
                if episode is None:
                    still.append(slot)
                    continue
                finished[slot.number] = episode
                bar.update()
                if started < episodes:
                    still.append(start(slot.env, started))
                    started += 1
            running = still
            while due in finished:
                yield finished.pop(due)
                due += 1
    finally:
        bar.close()
        for one in envs:
            one.close()


def _advance(
    slot: _Running,
    response: Response,
    fmt: AgentFormat,
    max_turns: int | None,
    env_name: str,
    prefix: str,
    seed: int,
) -> Episode | None:
    """Play one turn in place; the episode if it has ended."""
    parsed = fmt.parse(response.text)
    action = parsed.action if parsed.valid else ""
    observation, reward, terminated, truncated, info = slot.env.step(action)
    if not math.isfinite(float(reward)):
        raise ValueError(
            f"{env_name} gave the reward {reward} on turn {len(slot.turns)} of the episode with seed "
            f"{seed + slot.number}; rewards must be finite."
        )
    slot.turns.append(
        Turn(
            prompt=slot.prompt,
            images=slot.images,
            completion=response.text,
            reward=float(reward),
            action=action,
            valid=parsed.valid and bool(info.get("valid", True)),
            behavior_logprobs=response.behavior_logprobs,
        )
    )
    slot.history.append(Exchange(slot.observation, response.text))
    slot.observation = observation = _kept(observation)
    if max_turns is not None and len(slot.turns) >= max_turns and not terminated:
        truncated = True
    if not terminated or truncated:
        slot.prompt, slot.images = fmt.build_prompt(_task(slot.env), observation, tuple(slot.history))
    if not (terminated or truncated):
        return None
    return Episode(
        episode_id=f"{prefix}/{seed + slot.number}",
        turns=tuple(slot.turns),
        terminated=bool(terminated),
        truncated=bool(truncated),
        final_prompt=slot.prompt if truncated else None,
        final_images=slot.images if truncated else None,
        env_id=env_name,
        seed=seed + slot.number,
    )


def collect_demonstrations(
    env_id: str,
    *,
    policy: str | Demonstrator | Policy = "random",
    episodes: int,
    seed: int = 0,
    flaw_probability: float = 0.6,
    agent_format: AgentFormat | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    num_envs: int = 16,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """A trajectory dataset of scripted play.

    Args:
        env_id: a Gymnasium id; a policy given by name needs one of `vlmq_trl.envs`.
        policy: "expert", "random", "flawed", "flawed:0.3", a mixture such as "expert=0.5,random=0.5" (one member drawn
            per episode; `vlmq_trl.envs.make_demonstrator`), a function (env, rng) -> Decision, or a `Policy`.
        flaw_probability: how often "flawed" makes its mistake, at each action.
        cache_dir: where the data is written (`dataset_from_episodes`).
        Others: as `play_episodes`.
    """
    check_format(agent_format)
    probe = make_env(env_id, env_kwargs)
    try:
        fmt = agent_format if agent_format is not None else default_format(probe)
    finally:
        probe.close()
    if isinstance(policy, str):
        policy = make_demonstrator(env_id, policy, flaw_probability)
    player: Any = policy if hasattr(policy, "act") else DemonstratorPolicy(policy, fmt)
    played = play_episodes(
        env_id,
        player,
        episodes=episodes,
        seed=seed,
        agent_format=fmt,
        num_envs=num_envs,
        env_kwargs=env_kwargs,
        progress=progress,
    )
    return dataset_from_episodes(played, cache_dir=cache_dir)


def episode_metrics(episodes: Iterable[Episode], confidence: float = 0.95) -> dict[str, float]:
    """`EpisodeMetrics` of played episodes; reads them once and keeps three numbers of each."""
    rows = [(episode.return_, len(episode.turns), episode.valid_rate) for episode in episodes]
    if not rows:
        raise ValueError("There are no episodes to measure.")
    returns, turns, valid = zip(*rows, strict=True)
    return load_metric().compute(returns=returns, turns=turns, valid=valid, confidence=confidence)
