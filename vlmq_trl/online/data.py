# SPDX-License-Identifier: Apache-2.0
"""Rounds of play in turn with updates: with which policy, into which buffer, and what a batch draws from it."""

import hashlib
import inspect
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..collator import segment_items
from ..policy import ModelPolicy
from ..replay import Priorities, ReplayBuffer
from ..rollout import ExploringPolicy, Policy, Rollouts, measures, metrics_of
from ..sharding import ready_to_generate
from ..vlmq_config import VLMQConfig
from .schedule import Schedule, exploration, online_fraction
from .search import VisitedStates

# The first episode that ends so long after the last commit brings the next one, if the round's end does not.
COMMIT_SECONDS = 10.0
# Priority of a turn that went no better than expected, in standard deviations of the targets.
LEAST_PRIORITY = 0.01
# Numbers of each trainable tensor that tell one model from another.
WEIGHT_SAMPLES = 256


class OnlineData:
    """Collects rounds of play into a replay buffer when they are due, and draws batches from it.

    Args:
        args: the collection's part of a `VLMQConfig`.
        buffer: opened for writing; holds the offline data already.
        rollouts: the environments.
        model: what plays; anything with `generate`.
        processing_class: its processor or tokenizer.
        policy: plays in the model's place (a remote endpoint, another model).
        report: called after each round with what it measured.
        process: (k, n): this is the k-th of n processes, counted from 0. Each plays every n-th episode into a buffer
            of its own and draws from that; turns and rounds count over all. `advance` is collective then.
        progress: show a bar over a round's turns.
    """

    def __init__(
        self,
        args: VLMQConfig,
        buffer: ReplayBuffer,
        rollouts: Rollouts,
        model: Any,
        processing_class: Any,
        *,
        policy: Policy | None = None,
        report: Callable[[dict[str, float]], None],
        process: tuple[int, int] = (0, 1),
        progress: bool = False,
    ):
        self.args, self.buffer, self.rollouts, self.model = args, buffer, rollouts, model
        self.processing_class, self.policy, self.report, self.progress = processing_class, policy, report, progress
        self.process, self.num_processes = process
        self.schedule = Schedule.from_config(args)
        self.round = 0  # of which the learner has the data
        self.end = buffer.num_offline  # rows of the buffer that the learner draws from end here
        self.priorities = Priorities() if args.replay_prioritized_fraction else None
        self.run = int(buffer.counters.get("run", 0))  # whose play it is
        self.returns: dict[int, float] = {}  # the last of each seed, as a round began
        fraction = args.rollout_search_fraction
        self.tried = VisitedStates(rollouts.agent_format, fraction, args.rollout_seed) if fraction else None
        self._failures_before = int(buffer.counters.get("env_failures", 0))
        self._counts: dict[str, int] | None = None  # of all processes, when they last counted

    @property
    def own_turns(self) -> int:
        """Turns that this process has collected so far, evicted ones too."""
        return self.buffer.end - self.buffer.num_offline

    @property
    def env_turns(self) -> int:
        """Turns that the learner has so far, collected by all processes, evicted ones too."""
        return self._own_counts()["env_turns"] if self._counts is None else self._counts["env_turns"]

    @property
    def env_failures(self) -> int:
        """Episodes that this process dropped since their environment failed, earlier runs on its buffer included."""
        return self._failures_before + sum(self.rollouts.failures.values())

    def _own_counts(self) -> dict[str, int]:
        return {
            "env_turns": self.end - self.buffer.num_offline,
            "env_failures": self.env_failures,
            "replay_turns": self.end - self.buffer.start(self.end) + self.buffer.num_offline,
        }

    def _count(self) -> None:
        if self.num_processes > 1:
            counts = gather_object([self._own_counts()])
            self._counts = {name: sum(one[name] for one in counts) for name in counts[0]}

    def _share_of(self, turns: int) -> int:
        """This process's part of a number of turns; the parts of all add up to it."""
        k, n = self.process, self.num_processes
        return turns * (k + 1) // n - turns * k // n

    # ---- before an update ----

    def check_run(self) -> None:
        """Raises ValueError if a run that starts anew finds the play of another run in its buffer.

        A run that was killed before its first checkpoint goes on: the same arguments lead to the same rounds.
        """
        run = fingerprint(self)
        if self.own_turns and run != self.run:
            raise ValueError(
                f"{self.buffer.folder} holds {self.own_turns} turns that a run with other arguments, another model or "
                "another environment collected, or this trainer when it was called before. Resume that run "
                "(`train(resume_from_checkpoint=True)`, with a larger `max_steps` or `max_env_turns` if it is done), "
                "choose another `replay_dir`, or remove the folder."
            )
        self.run = run

    def check_resumed(self, saved: dict[str, Any]) -> None:
        """Raises ValueError if the buffer is not the one that a checkpoint's run had, or has lost some of it.

        Args:
            saved: the buffer's manifest when the checkpoint was written.
        """
        here = self.buffer.manifest()
        run = saved["counters"].get("run")  # None: nothing had been collected
        other = here["fingerprint"] != saved["fingerprint"] or run not in (None, here["counters"].get("run"))
        if other or here["end"] < saved["end"]:
            held = "other play" if other and here["end"] > here["num_offline"] else f"{self.own_turns} collected turns"
            raise ValueError(
                f"The checkpoint was written with {saved['end'] - saved['num_offline']} collected turns in "
                f"{self.buffer.folder}, which now holds {held}. Put the run's own buffer back, or start a new run "
                "(without `resume_from_checkpoint`, in another `replay_dir`)."
            )

    def advance(self, update: int) -> None:
        """Sees to it that the buffer has every round that is due before this update."""
        if self._counts is None:
            self._count()
        for round in range(self.round + 1, self.schedule.rounds_before(update) + 1):
            measured = self._obtain(round)
            self.round = round
            self._count()
            if measured:
                self.report(measured)

    def _obtain(self, round: int) -> dict[str, float]:
        """Sees to it that the buffer has this round; returns what was measured where it had to be played."""
        measured: dict[str, float] = {}
        known = self.buffer.round_end(round)
        lacking = [known is None or not known[1]]
        # A resumed process may have a round that another lacks; they play together, or none does.
        if any(lacking if self.num_processes == 1 else gather_object(lacking)):
            measured = self._collect(round)
            known = self.buffer.round_end(round)
        assert known is not None
        # Of an old checkpoint's window nothing may be left: newer play is better than none.
        self.end = known[0] if self.buffer.start(known[0]) < known[0] else self.buffer.end
        return measured

    def _collect(self, round: int) -> dict[str, float]:
        """Plays a round with the model as it is, and measures it. Torch's random state is left as it was.

        Raises:
            RuntimeError: another process failed, with its error's text; so that all stop, and can save together.
        """
        policy = self.policy
        was_training = self.model.training
        self.model.eval()
        devices = [torch.device(self.model.device)] if torch.device(self.model.device).type == "cuda" else []
        played, error = Played(), None
        try:
            with ready_to_generate(self.model), torch.random.fork_rng(devices=devices):
                seed = (self.args.seed, round, int(self.buffer.counters.get("next_episode", 0)), *self._other_process)
                torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
                try:
                    played = self.play(round, policy or self.model_policy(self.model, round))
                except Exception as failure:
                    error = failure
        finally:
            self.model.train(was_training)
        parts = [played]
        if self.num_processes > 1:
            said = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            failed = [k for k, text in enumerate(said) if text is not None]
            if failed and error is None:
                error = RuntimeError(f"Process {failed[0]} failed while it collected. {said[failed[0]]}")
            parts = gather_object(parts)
        if error is not None:
            raise error
        return measure(round, parts)

    @property
    def _other_process(self) -> tuple[int, ...]:
        """What tells this process's random draws from the first one's."""
        return (self.process,) if self.process else ()

    def model_policy(self, model: Any, round: int) -> ModelPolicy:
        turns = self.schedule.turns_before(round)
        return ModelPolicy(
            model,
            self.processing_class,
            temperature=exploration(self.args, "rollout_temperature", turns),
            max_completion_length=self.args.max_completion_length,
            batch_size=self.args.rollout_num_envs,
            logprobs=True,
            action_temperature=exploration(self.args, "rollout_action_temperature", turns),
            legal_actions_only=self.args.legal_actions_only,
            choices=self.tried,
            agent_format=self.rollouts.agent_format,
        )

    def play(self, round: int, policy: Policy) -> "Played":
        """Collects what a round still lacks: whole episodes, committed as they come.

        Whatever ends it early, an error or an interruption, the finished episodes are committed.
        """
        buffer, goal = self.buffer, self._share_of(self.schedule.turns_after(round))
        counters = {"next_episode": int(buffer.counters.get("next_episode", 0))}
        played = Played()
        start = last_commit = time.perf_counter()
        before = self.own_turns
        answered, retokenized = (getattr(policy, name, 0) for name in ("responses", "retokenized"))
        if self.args.rollout_repeat_fraction:
            self.returns = dict(self._known_returns())
        if self.tried is not None:
            self.tried.count(buffer)

        def numbers() -> Iterator[int]:
            while self.own_turns + buffer.pending_turns + self.rollouts.turns_running < goal:
                counters["next_episode"] += 1
                yield (counters["next_episode"] - 1) * self.num_processes + self.process

        def commit(end_round: int | None = None) -> None:
            buffer.commit({**counters, "env_failures": self.env_failures, "run": self.run}, end_round=end_round)

        bar = tqdm(
            total=goal - before, desc=f"collecting, round {round}", unit="turn", disable=not self.progress, leave=False
        )
        complete = False
        try:
            # Again where running episodes that were counted on have been dropped.
            while self.own_turns + buffer.pending_turns < goal:
                for episode in self.rollouts.play(self._exploring(policy, round), numbers(), self._seed_of):
                    buffer.append(episode, round=round)
                    if self.tried is not None:
                        self.tried.add(episode)
                    played.episodes.append(measures(episode))
                    bar.update(len(episode.turns))
                    if time.perf_counter() - last_commit > COMMIT_SECONDS:
                        commit()
                        last_commit = time.perf_counter()
            complete = True
        finally:
            bar.close()
            commit(end_round=round if complete else None)
        played.seconds = time.perf_counter() - start
        played.responses = getattr(policy, "responses", 0) - answered
        played.retokenized = getattr(policy, "retokenized", 0) - retokenized
        return played

    def _known_returns(self) -> Iterator[tuple[int, float]]:
        """Seed and return of the episodes that the buffer keeps, in order."""
        play = self.buffer.dataset("online").select_columns(["episode_id", "seed", "reward"]).to_pandas()
        for _, episode in play.groupby("episode_id", sort=False):
            yield int(episode["seed"].iloc[0]), float(episode["reward"].sum())

    def _seed_of(self, number: int) -> int:
        """Of an episode: a new one, or that of an earlier one that went badly."""
        rng = np.random.default_rng((self.args.rollout_seed, number, 2))
        if rng.random() < self.args.rollout_repeat_fraction and self.returns:
            returns = np.array(list(self.returns.values()))
            lacking = returns.max() - returns
            if lacking.any():
                return int(rng.choice(list(self.returns), p=lacking / lacking.sum()))
        return self.args.rollout_seed + number

    def _exploring(self, policy: Policy, round: int) -> Policy:
        epsilon = exploration(self.args, "rollout_epsilon", self.schedule.turns_before(round))
        return ExploringPolicy(policy, self.rollouts.agent_format, epsilon) if epsilon else policy

    # ---- a batch ----

    def rows(self) -> np.ndarray:
        """[R] the collected rows that the learner has."""
        return np.arange(self.buffer.start(self.end), self.end)

    def items(self, update: int, number: int, turns: int) -> list[dict[str, Any]]:
        """The collator's items of a batch, which depends on the seed, `number`, the buffer and the priorities alone.

        Args:
            update: for the share of collected turns.
            number: of the micro-batch, over the whole training.
            turns: how many.
        """
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        rng = np.random.default_rng((seed, number, *self._other_process))
        rows = self.buffer.sample(
            rng,
            turns,
            args.segment_length,
            online_fraction(args, update),
            self.end,
            priorities=self.priorities,
            prioritized_fraction=args.replay_prioritized_fraction if update >= args.offline_steps else 0.0,
        )
        buffer, with_bootstrap = self.buffer, args.critic_coef > 0
        return segment_items(rows, buffer, buffer.return_to_go, buffer.read, with_bootstrap, args.bootstrap_truncated)

    def learned(self, rows: np.ndarray, surprise: np.ndarray) -> None:
        """Sets the priorities of a batch's turns, after its forward pass.

        The priority is max(G_t - V(s_t), 0) (self-imitation learning, arXiv 1806.05635, section 3) and a little more,
        so that what little is left of it where all has been understood does not decide what is drawn.

        Args:
            rows: [R] of the buffer.
            surprise: [R] G_t - V(s_t), the discounted return that was collected from the turn on less the critic's
                value of its beginning, in the critic's normalised unit.
        """
        if self.priorities is not None:
            self.priorities.update(rows, np.fmax(surprise, 0.0) + LEAST_PRIORITY)  # 0 where it is not a number

    def logs(self) -> dict[str, float]:
        """What the trainer's log says of the data."""
        logs: dict[str, float] = {**(self._counts or self._own_counts()), "round": self.round}
        if self.priorities is not None:
            logs["replay_surprise"] = self.priorities.mean
        return logs

    def paused(self) -> AbstractContextManager[None]:
        """No play goes on meanwhile."""
        return nullcontext()

    def close(self) -> None:
        """Closes the environments and the buffer."""
        try:
            self.rollouts.close()
        finally:
            self.buffer.close()


@dataclass
class Played:
    """What one process played in a round.

    Attributes:
        episodes: `rollout.measures` of each.
        seconds: that it took.
        responses, retokenized: as `ModelPolicy` counts them.
    """

    episodes: list[tuple[float, int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    responses: int = 0
    retokenized: int = 0


def measure(round: int, parts: Sequence[Played]) -> dict[str, float]:
    """What the log says of a round that processes have played; nothing if nothing had to be played."""
    episodes = [episode for part in parts for episode in part.episodes]
    if not episodes:  # the rounds before went over their goal by as much
        return {}
    seconds, turns = max(part.seconds for part in parts), sum(row[1] for row in episodes)
    logs = {"rollout_round": round, **{f"rollout_{name}": float(x) for name, x in metrics_of(episodes).items()}}
    logs |= {"rollout_seconds": seconds, "rollout_turns_per_second": turns / max(seconds, 1e-9)}
    if responses := sum(part.responses for part in parts):
        logs["rollout_retokenized"] = sum(part.retokenized for part in parts) / responses
    return logs


def fingerprint(data: OnlineData) -> int:
    """Equal for two runs that, started anew, would collect the same; taken before the first update."""
    decisive = [
        *(name for name in VLMQConfig.__annotations__ if not name.startswith(("eval_", "replay_dir", "record_"))),
        *("seed", "data_seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("max_steps", "max_grad_norm", "lr_scheduler_type", "weight_decay"),
    ]
    facts = [repr(getattr(data.args, name)) for name in decisive]
    facts += [identity(part) for part in (data.rollouts.env, data.rollouts.agent_format, data.policy)]
    facts += [str(data.buffer.num_offline), str(data.num_processes), *_samples_of_weights(data.model)]
    return int.from_bytes(hashlib.sha256("\n".join(facts).encode()).digest()[:6], "big")


def identity(part: Any) -> str:
    """What tells an environment's factory, a format or a policy from another, and is the same in a later process: of
    functions and classes the source, of objects what they hold."""
    if isinstance(part, partial):
        return f"{identity(part.func)} {_told(part.args)} {_told(part.keywords)}"
    if inspect.isfunction(part) or inspect.isclass(part):
        try:
            source = inspect.getsource(part)
        except (OSError, TypeError):  # typed in a console
            source = part.__qualname__
        enclosed = inspect.getclosurevars(part).nonlocals if inspect.isfunction(part) else {}
        return f"{source} {_told(enclosed)}"
    # What is private, or counted while it plays, says nothing of who it is.
    held = {
        name: identity(x) if callable(x) else _told(x)
        for name, x in getattr(part, "__dict__", {}).items()
        if not name.startswith("_") and name not in ("responses", "retokenized")
    }
    return f"{type(part).__qualname__} {held or _told(part)}"


def _told(value: Any) -> str:
    """A value's `repr` without addresses, and with sets, which have another order in each process, in order."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} {sorted(map(_told, value))}"
    if isinstance(value, dict):
        return f"{type(value).__name__} {[(_told(key), _told(x)) for key, x in value.items()]}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} {list(map(_told, value))}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _samples_of_weights(model: Any) -> Iterator[str]:
    """A few numbers of each trainable tensor, of this process's part where weights are split."""
    for name, p in model.named_parameters() if hasattr(model, "named_parameters") else ():
        if p.requires_grad:
            own = getattr(p, "ds_tensor", p).detach()
            own = (own.to_local() if isinstance(own, DTensor) else own).reshape(-1)
            sample = own[:: max(1, len(own) // WEIGHT_SAMPLES)].float().cpu()
            yield f"{name} {tuple(p.shape)} {hashlib.sha256(sample.numpy().tobytes()).hexdigest()}"
