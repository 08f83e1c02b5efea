# SPDX-License-Identifier: Apache-2.0
"""Environments times a policy give trajectories.

Many environments run at once and every request of a tick is answered in one `Policy.act` call, so that a model
generates in batches; a finished environment takes the next episode at once. Episode i depends on its own seed alone.

Contents: `Request`, `Response`, `Policy`, `DemonstratorPolicy`, `ExploringPolicy`, `Rollouts`, `play_episodes`,
`collect_demonstrations`, `episode_metrics`; from `env_pool`, `EnvSpec`, `make_env` and `EnvFailureError`.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, Protocol

import datasets
import gymnasium
import numpy as np
from tqdm.auto import tqdm

from vlmq_trl.agent_format import AgentFormat, Exchange, action_of, check_format, default_format, prompt_of, taking
from vlmq_trl.env_pool import (
    FAILURES,
    EnvFailureError,
    EnvPool,
    EnvSpec,
    Failure,
    Outcome,
    close_env,
    make_env,
)
from vlmq_trl.envs import Decision, Demonstrator, make_demonstrator
from vlmq_trl.metrics import load_metric
from vlmq_trl.trajectory import Episode, Turn
from vlmq_trl.trajectory.episodes import dataset_until_error

logger = logging.getLogger(__name__)

NO_STATE_TO_READ = (
    "A demonstrator reads the environment's state, which lies in another process when workers=True; play it with "
    "workers=False."
)
# How many episodes may have ended, for each environment, before one that was begun earlier.
AHEAD = 16
# The least value of each argument that is a number.
LONG_EPISODE = 1000  # turns, after which it is told
LEAST = {"episodes": 1, "seed": 0, "num_envs": 1, "max_turns": 1, "max_env_failures": 0}


@dataclass(frozen=True)
class Request:
    """One environment waits for the agent's answer."""

    env: gymnasium.Env | None  # for scripted policies; None if it lives in a process of its own (`workers`)
    prompt: list[dict[str, Any]]
    images: list[np.ndarray]  # uint8 [H, W, 3], in the order of the prompt's image parts
    rng: np.random.Generator  # the episode's own generator, the same object in each of its turns
    legal_actions: tuple[str, ...] = ()  # in canonical spelling, as the environment lists them now; () if it does not
    episode: int = 0  # its number


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
    """A scripted player that answers in an agent format.

    Raises:
        TypeError: the demonstrator is no function (env, generator) -> Decision.
    """

    def __init__(self, demonstrator: Demonstrator, agent_format: AgentFormat):
        _check_demonstrator(demonstrator)
        self.demonstrator = demonstrator
        self.agent_format = agent_format

    def act(self, requests: list[Request]) -> list[Response]:
        responses = []
        for request in requests:
            if request.env is None:
                raise TypeError(NO_STATE_TO_READ)
            decision = self.demonstrator(request.env, request.rng)
            if not isinstance(decision, Decision):
                raise TypeError(
                    f"The demonstrator gave {decision!r:.100}; it must give a Decision(action, reading, thoughts)."
                )
            text = self.agent_format.render(decision.action, decision.reading, decision.thoughts)
            responses.append(Response(taking(self.agent_format, decision.action, text)))
        return responses


class ExploringPolicy:
    """Another policy's answers, some of them with a uniformly random legal action in place of their own.

    Off-policy learning allows it. Besides the share `epsilon` of the turns these are all in which the answer names no
    legal action, so that even a model that cannot act yet meets what the environment has to give. Such answers have no
    log-probabilities.

    Args:
        policy: whose answers.
        agent_format: reads their actions and replaces them.
        epsilon: in [0, 1].
    """

    def __init__(self, policy: Policy, agent_format: AgentFormat, epsilon: float):
        self.policy, self.agent_format, self.epsilon = policy, agent_format, epsilon

    def act(self, requests: list[Request]) -> list[Response]:
        responses = _answers(self.policy, requests)
        return [self._explored(request, response) for request, response in zip(requests, responses, strict=True)]

    def _explored(self, request: Request, response: Response) -> Response:
        parsed, legal = action_of(self.agent_format, response.text), request.legal_actions
        known = parsed.valid and parsed.action.casefold() in (action.casefold() for action in legal)
        if not legal or (request.rng.random() >= self.epsilon and known):
            return response
        action = legal[int(request.rng.integers(len(legal)))]
        return Response(taking(self.agent_format, action, self.agent_format.replace_action(response.text, action)))


@dataclass
class _Running:
    """An episode that has not ended."""

    number: int
    seed: int
    rng: np.random.Generator
    observation: Mapping[str, Any]
    prompt: list[dict[str, Any]]
    images: list[np.ndarray]
    legal_actions: tuple[str, ...]
    reading: Mapping[str, str] | None
    history: deque[Exchange]
    turns: list[Turn] = field(default_factory=list)


def _env_name(env: EnvSpec) -> str:
    if isinstance(env, partial):
        made = env.func is gymnasium.make and bool(env.args)
        return _env_name(env.args[0] if made else env.func)
    return env if isinstance(env, str) else str(getattr(env, "__name__", type(env).__name__))


def _check_policy(policy: Any, workers: bool) -> None:
    if isinstance(policy, type):
        raise TypeError(f"The policy is the class {policy.__name__}; pass an instance of it.")
    if not hasattr(policy, "act"):
        raise TypeError(
            f"The policy has no method `act(requests)`, got {policy!r}. A function (env, generator) -> Decision, such "
            "as a demonstrator, becomes one by `DemonstratorPolicy(function, agent_format)`."
        )
    if workers and isinstance(policy, DemonstratorPolicy):
        raise TypeError(NO_STATE_TO_READ)


def _check_demonstrator(demonstrator: Any) -> None:
    wanted = (
        "it must be a function (env, generator) -> Decision (or, for `collect_demonstrations`, a name or `Policy`)"
    )
    if isinstance(demonstrator, type) or not callable(demonstrator):
        raise TypeError(f"The policy is {demonstrator!r:.100}; {wanted}.")
    try:
        signature = inspect.signature(demonstrator)
    except ValueError:  # some that are written in C do not say
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"The policy is a function with the arguments {signature} ({error}); {wanted}.") from None


def _answers(policy: Policy, requests: list[Request]) -> list[Response]:
    """`policy.act(requests)`, which may be a user's own."""
    answers = policy.act(requests)
    if not isinstance(answers, list | tuple) or not all(
        isinstance(answer, Response) and isinstance(answer.text, str) for answer in answers
    ):
        raise TypeError(
            f"The policy's `act` must give a list with one Response(text) for each request, got {answers!r:.100}."
        )
    if len(answers) != len(requests):
        raise ValueError(f"The policy gave {len(answers)} responses to {len(requests)} requests.")
    return list(answers)


def _check_arguments(agent_format: Any, **numbers: Any) -> None:
    """Raises TypeError or ValueError for a format that is none, or numbers (see `LEAST`) that are no whole ones or
    too small; `max_turns` may be None."""
    for name, value in numbers.items():
        if name == "max_turns" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}.")
        if value < LEAST[name]:
            raise ValueError(f"{name} must be at least {LEAST[name]}, got {value}.")
    check_format(agent_format)


class Rollouts:
    """Environments that play episode after episode, with one policy or another, until they are closed.

    Episode i is reset with `seed + i`, has the generator `default_rng((seed + i, 1))` and the id
    "<id_prefix>/<seed + i>". So with a policy whose answer depends on its own request only, an episode depends neither
    on `num_envs`, nor on `workers`, nor on its neighbours, failed ones included.

    A response that does not parse reaches the environment as "", which no environment of this package takes for a
    legal action; `Turn.valid` says whether the response parsed and the environment (`info["valid"]`, where it says
    so) took the action. A truncated episode records its final observation.

    An environment that fails (`env_pool.FAILURES`) is made anew and its episode is dropped, until more than
    `max_env_failures` have failed with no episode ending well in between.

    Attributes:
        name: the environment's.
        agent_format: of prompts and responses.
        failures: dropped episodes by kind, since the beginning.
        dropped: the numbers of these episodes.

    Args:
        env: a Gymnasium id, or a function that makes a new environment.
        agent_format: the environment's own by default (`default_format`).
        num_envs: environments that run at once.
        env_kwargs: given to `gymnasium.make` or the factory.
        seed: at least 0.
        max_turns: truncate an episode after so many turns, for environments without a limit of their own.
        id_prefix: of episode ids; the environment's name by default.
        workers: a process for each environment. The function and `env_kwargs` must be picklable then, and policies
            cannot look into the environment. Worth it where environments are slow, or hang or crash.
        env_timeout: seconds that a reset or a step may take; None waits for ever. Without workers it has no effect:
            an environment in this process cannot be interrupted.
        max_env_failures: see above; with 0 the first failure raises.

    Raises:
        ValueError, TypeError: bad arguments.
        EnvFailureError: no environment could be made in a process of its own.
    """

    def __init__(
        self,
        env: EnvSpec,
        *,
        agent_format: AgentFormat | None = None,
        num_envs: int = 16,
        env_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_turns: int | None = None,
        id_prefix: str | None = None,
        workers: bool = False,
        env_timeout: float | None = None,
        max_env_failures: int = 0,
    ):
        _check_arguments(
            agent_format, num_envs=num_envs, seed=seed, max_turns=max_turns, max_env_failures=max_env_failures
        )
        self.env, self.name = env, _env_name(env)
        self._prefix = self.name if id_prefix is None else id_prefix
        self._seed, self._max_turns, self._max_failures = seed, max_turns, max_env_failures
        self._pool = EnvPool(env, env_kwargs, num_envs=num_envs, workers=workers, env_timeout=env_timeout)
        self.agent_format = self._pool.agent_format if agent_format is None else agent_format
        self._running: dict[int, _Running] = {}  # by environment
        self._playing = False
        self._failures_in_a_row = 0
        self.failures: dict[str, int] = Counter()
        self.dropped: list[int] = []

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the environments."""
        self._pool.close()

    @property
    def turns_running(self) -> int:
        """Turns played in episodes that have not ended."""
        return sum(len(one.turns) for one in list(self._running.values()))

    def play(
        self, policy: Policy, numbers: Iterable[int], seed_of: Callable[[int], int] | None = None
    ) -> Iterator[Episode]:
        """Plays the episodes with these numbers and yields each when it ends.

        A number is drawn when an environment is free for it, after what ended before has been yielded; so the caller
        can stop by ending `numbers`, and the running episodes are then played to their end; an iterator that has more
        again by then is asked again. Closing the generator drops them; the environments can play again.

        Args:
            seed_of: by an episode's number, the seed its environment is reset with, in place of `seed` + number.

        Raises:
            TypeError, ValueError: a policy that is none, or does not answer every request.
            EnvFailureError: too many failures in a row; episodes that ended have been yielded.
        """
        _check_policy(policy, self._pool.workers)
        if not len(self._pool):
            raise ValueError("These rollouts are closed; make new ones.")
        seed_of = seed_of or (lambda number: self._seed + number)
        return self._play(policy, iter(numbers), seed_of)

    def _play(self, policy: Policy, numbers: Iterator[int], seed_of: Callable[[int], int]) -> Iterator[Episode]:
        if self._playing:
            raise RuntimeError("These rollouts are playing already; exhaust or close the other generator first.")
        self._playing = True
        try:
            self._start(numbers, seed_of)
            while self._running:
                running = sorted(self._running.items())
                requests = [
                    Request(self._pool.env(k), one.prompt, one.images, one.rng, one.legal_actions, one.number)
                    for k, one in running
                ]
                responses = _answers(policy, requests)
                yield from self._turn({k: response for (k, _), response in zip(running, responses, strict=True)})
                self._start(numbers, seed_of)
        finally:
            self._playing = False
            self._running.clear()
            self._pool.abandon()

    def _start(self, numbers: Iterator[int], seed_of: Callable[[int], int]) -> None:
        """Begins an episode in every free environment, as long as there are numbers."""
        free = [k for k in range(len(self._pool)) if k not in self._running]
        while free:
            # In this order, so that no number is drawn in vain.
            begun = {k: (number, seed_of(number)) for k, number in zip(free, numbers, strict=False)}
            for k, (_, seed) in begun.items():
                self._pool.reset(k, seed)
            free = []
            for k, answer in self._pool.receive().items():
                number, seed = begun[k]
                if not isinstance(answer, Failure):
                    shown = self._shown(answer)
                    answer = shown if isinstance(shown, Failure) else answer
                if isinstance(answer, Failure):
                    error = self._drop(number, seed, None, answer)
                    if error is not None:
                        raise error
                    free.append(k)
                else:
                    prompt, images = shown
                    rng = np.random.default_rng((self._seed + number, 1))
                    history: deque[Exchange] = deque(maxlen=self.agent_format.history)
                    self._running[k] = _Running(
                        number,
                        seed,
                        rng,
                        answer.observation,
                        prompt,
                        images,
                        answer.legal_actions,
                        answer.reading,
                        history,
                    )

    def _turn(self, responses: dict[int, Response]) -> Iterator[Episode]:
        """Plays one turn in every environment; yields the episodes that it ends."""
        parsed = {k: action_of(self.agent_format, response.text) for k, response in responses.items()}
        actions = {k: found.action if found.valid else "" for k, found in parsed.items()}
        for k, action in actions.items():
            self._pool.step(k, action)
        ended: list[Episode] = []
        error: Exception | None = None
        for k, answer in self._pool.receive().items():
            one = self._running[k]
            if isinstance(answer, Failure):
                del self._running[k]
                error = self._drop(one.number, one.seed, len(one.turns), answer) or error
                continue
            turn = Turn(
                prompt=one.prompt,
                images=one.images,
                completion=responses[k].text,
                reward=answer.reward,
                action=actions[k],
                valid=parsed[k].valid and answer.valid,
                behavior_logprobs=responses[k].behavior_logprobs,
                read_right=None if one.reading is None else self.agent_format.reads(responses[k].text, one.reading),
            )
            episode = self._take(one, turn, answer)
            if isinstance(episode, Failure):
                del self._running[k]
                error = self._drop(one.number, one.seed, len(one.turns) - 1, episode) or error
            elif episode is not None:
                del self._running[k]
                self._failures_in_a_row = 0
                ended.append(episode)
        yield from ended
        if error is not None:
            raise error

    def _shown(self, answer: Outcome, history: tuple[Exchange, ...] = ()) -> Any:
        """Prompt and pictures; or a `Failure`, if the format cannot show what the environment gave."""
        try:
            return prompt_of(self.agent_format, answer.task, answer.observation, history)
        except Exception as error:
            did = f"gave an observation that its format cannot show ({type(error).__name__}: {error})"
            return Failure("observation", did, error=error)

    def _take(self, one: _Running, turn: Turn, answer: Outcome) -> Episode | Failure | None:
        """Adds a turn to its episode in place; the episode if it has ended."""
        one.turns.append(turn)
        one.history.append(Exchange(one.observation, turn.completion))
        one.observation, one.legal_actions, one.reading = answer.observation, answer.legal_actions, answer.reading
        terminated, truncated = answer.terminated, answer.truncated
        if self._max_turns is not None and len(one.turns) >= self._max_turns and not terminated:
            truncated = True
        if not terminated or truncated:
            shown = self._shown(answer, tuple(one.history))
            if isinstance(shown, Failure):
                return shown
            one.prompt, one.images = shown
        if not (terminated or truncated):
            if len(one.turns) % LONG_EPISODE == 0:
                logger.warning(
                    "The episode of %s with seed %d has come to %s turns and goes on. If it may never end, give the "
                    "environment a limit: `max_episode_steps` in `gymnasium.register` or `gymnasium.make`.",
                    self.name,
                    one.seed,
                    f"{len(one.turns):,}",
                )
            return None
        return Episode(
            episode_id=f"{self._prefix}/{self._seed + one.number}",
            turns=tuple(one.turns),
            terminated=terminated,
            truncated=truncated,
            final_prompt=one.prompt if truncated else None,
            final_images=one.images if truncated else None,
            env_id=self.name,
            seed=one.seed,
        )

    def _drop(self, number: int, seed: int, turn: int | None, failure: Failure) -> Exception | None:
        """Counts a failure; the error if it is one too many."""
        self.failures[failure.kind] += 1
        self.dropped.append(number)
        self._failures_in_a_row += 1
        when = "at the reset" if turn is None else f"on turn {turn}"
        what = f"{self.name} {failure.did} {when} of the episode with seed {seed}"
        if self._failures_in_a_row <= self._max_failures:
            logger.warning("%s; the episode is dropped (%s).", what, failure.kind)
            return None
        if failure.kind == "observation" and isinstance(failure.error, Exception) and not self._max_failures:
            return failure.error  # the format's own words
        row = f" These are {self._failures_in_a_row} failures in a row; all by kind: {dict(self.failures)}."
        trace = f"\n{failure.trace}" if failure.trace else ""
        error = EnvFailureError(f"{what}. {FAILURES[failure.kind]}{row if self._max_failures else ''}{trace}")
        error.__cause__ = failure.error
        return error


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
    workers: bool = False,
    env_timeout: float | None = None,
    max_env_failures: int = 0,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Generator[Episode, None, None]:
    """Play episodes and yield them in order.

    Episodes are those of `Rollouts`: each depends on its own seed alone.

    Args:
        policy: answers all running environments in one call.
        episodes: how many; at least 1. Those that failures cost are missing.
        share: (k, n) plays the k-th, (k + n)-th, ... of them only, counted from 0: a process's part.
        progress: show a bar over episodes.
        Others: as `Rollouts`.

    Raises:
        ValueError, TypeError: bad arguments, a policy that does not answer every request.
        EnvFailureError: an environment raised, gave a reward that is not finite, ... (`env_pool.FAILURES`), more than
            `max_env_failures` times in a row.

    Whatever ends the play early, Ctrl-C included, is raised after the episodes that had ended were yielded.
    """
    _check_arguments(
        agent_format,
        episodes=episodes,
        num_envs=num_envs,
        seed=seed,
        max_turns=max_turns,
        max_env_failures=max_env_failures,
    )
    _check_policy(policy, workers)
    numbers = range(share[0], episodes, share[1])

    def play() -> Generator[Episode, None, None]:
        if not numbers:
            return
        rollouts = Rollouts(
            env,
            agent_format=agent_format,
            num_envs=min(num_envs, len(numbers)),
            env_kwargs=env_kwargs,
            seed=seed,
            max_turns=max_turns,
            id_prefix=id_prefix,
            workers=workers,
            env_timeout=env_timeout,
            max_env_failures=max_env_failures,
        )
        finished: dict[int, Episode] = {}
        due, stopped = numbers.start, None  # the next that is yielded

        class Near:
            """The numbers, for now only those that are not far ahead of the first that has not ended: what ends before
            it waits in memory."""

            coming = unended = numbers.start

            def __iter__(self) -> Iterator[int]:
                return self

            def __next__(self) -> int:
                self.unended = max(self.unended, due)
                while self.unended in rollouts.dropped or self.unended in finished:
                    self.unended += numbers.step
                if self.coming >= numbers.stop or self.coming - self.unended > AHEAD * num_envs * numbers.step:
                    raise StopIteration
                self.coming += numbers.step
                return self.coming - numbers.step

        with rollouts, tqdm(total=len(numbers), unit="episode", desc=_env_name(env), disable=not progress) as bar:
            try:
                for episode in rollouts.play(policy, Near()):
                    finished[episode.seed - seed] = episode
                    bar.update()
                    while due in finished or due in rollouts.dropped:
                        if due in finished:
                            yield finished.pop(due)
                        due += numbers.step
            except (Exception, KeyboardInterrupt) as error:
                stopped = error
            yield from (finished[number] for number in sorted(finished))
            if stopped is not None:
                raise stopped

    return play()


def collect_demonstrations(
    env_id: EnvSpec,
    *,
    policy: str | Demonstrator | Policy = "random",
    episodes: int,
    seed: int = 0,
    flaw_probability: float = 0.6,
    agent_format: AgentFormat | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    num_envs: int = 16,
    workers: bool = False,
    env_timeout: float | None = None,
    max_env_failures: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """A trajectory dataset of scripted play.

    Episodes that had ended when an environment fails once too often, the policy raises, the disk is full or the user
    interrupts stay on the disk; a note to the error says where.

    Args:
        env_id: a Gymnasium id, or a function that makes a new environment; a policy given by name needs a
            `TextActionEnv` with a script.
        policy: "expert", "random", "flawed", "flawed:0.3", a mixture such as "expert=0.5,random=0.5" (one member drawn
            per episode; `vlmq_trl.envs.make_demonstrator`), a function (env, rng) -> Decision, or a `Policy`.
        flaw_probability: how often "flawed" makes its mistake, at each action.
        workers: for a `Policy` only, one that does not look into the environment.
        cache_dir: where the data is written (`dataset_from_episodes`).
        Others: as `play_episodes`.

    Raises:
        TypeError, ValueError, EnvFailureError: as `play_episodes`.
    """
    check_format(agent_format)
    probe = make_env(env_id, env_kwargs)
    try:
        fmt = agent_format if agent_format is not None else default_format(probe)
    finally:
        close_env(probe)
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
        workers=workers,
        env_timeout=env_timeout,
        max_env_failures=max_env_failures,
        progress=progress,
    )
    with closing(played):
        ds, error = dataset_until_error(played, cache_dir)
    if error is not None:
        file, gone = ds.cache_files[0]["filename"], "" if cache_dir else " until this process ends"
        error.add_note(
            f"The {len(set(ds['episode_id']))} episodes that had ended, the last with the seed {max(ds['seed'])}, lie "
            f"in {file}{gone}: open them with `datasets.Dataset.from_file`, collect the others from another `seed`, "
            "and join them by `concatenate_trajectories`."
        )
        raise error
    return ds


def episode_metrics(episodes: Iterable[Episode], confidence: float = 0.95) -> dict[str, float]:
    """`EpisodeMetrics` of played episodes; reads them once and keeps three numbers of each."""
    return metrics_of([measures(episode) for episode in episodes], confidence)


def measures(episode: Episode) -> tuple[float, int, float, float]:
    """Of an episode, what `metrics_of` needs: its return, its turns, its fractions of valid responses and of right
    readings (NaN: not known)."""
    return episode.return_, len(episode.turns), episode.valid_rate, episode.reading_rate


def metrics_of(rows: Sequence[tuple[float, int, float, float]], confidence: float = 0.95) -> dict[str, float]:
    """`EpisodeMetrics` of the `measures` of episodes; `reading_rate` (over all turns) where readings are known."""
    if not rows:
        raise ValueError("There are no episodes to measure.")
    returns, turns, valid, read = zip(*rows, strict=True)
    metrics = load_metric().compute(returns=returns, turns=turns, valid=valid, confidence=confidence)
    known = [(rate, count) for rate, count in zip(read, turns, strict=True) if not math.isnan(rate)]
    if known:
        metrics["reading_rate"] = sum(rate * count for rate, count in known) / sum(count for _, count in known)
    return metrics
