# SPDX-License-Identifier: Apache-2.0
"""Online data for a trainer: when to collect, with which policy, into which buffer, and what a batch draws from it.

Rounds of collection alternate with updates. Everything that decides what is collected and drawn is a function of the
seed, the number of the update and what the replay buffer holds, so that a resumed run needs no state of its own (but
the priorities, where batches are drawn by them): it finds the rounds that are due in the buffer, and collects those
that are not.

Contents: `Schedule`; `OnlineData`, alone or as one of several processes; `AsyncOnlineData`, which collects in a thread
while the model learns.
"""

import copy
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from .collator import segment_items
from .policy import ModelPolicy
from .replay import Priorities, ReplayBuffer
from .rollout import ExploringPolicy, Policy, Request, Response, Rollouts, measures, metrics_of
from .sharding import ready_to_generate
from .vlmq_config import VLMQConfig

# How long finished episodes may wait for their commit: what a crash can cost.
COMMIT_SECONDS = 10.0
# Priority of a turn that went no better than expected, in standard deviations of the targets.
LEAST_PRIORITY = 0.01


@dataclass(frozen=True)
class Schedule:
    """Which rounds come before which update. Rounds are counted from 1, updates from 0.

    Example: `offline_steps` 10, `turns_per_round` 100, `updates_per_round` 20, `warmup_turns` 150, `max_turns` 300.
    Round 1 comes before update 10 and ends at 150 turns, round 2 before update 30 at 250, round 3, the last, before
    update 50 at 300.
    """

    offline_steps: int
    turns_per_round: int
    updates_per_round: int
    warmup_turns: int = 0
    max_turns: int | None = None

    @classmethod
    def from_config(cls, args: VLMQConfig) -> "Schedule":
        updates = max(1, round(args.turns_per_round * args.updates_per_turn))
        return cls(args.offline_steps, args.turns_per_round, updates, args.replay_warmup_turns, args.max_env_turns)

    @property
    def num_rounds(self) -> int | None:
        """Rounds that the budget pays for; None without a budget."""
        if self.max_turns is None:
            return None
        return 1 + max(0, math.ceil((self.max_turns - self.first_round) / self.turns_per_round))

    @property
    def first_round(self) -> int:
        return max(self.turns_per_round, self.warmup_turns)

    @property
    def num_updates(self) -> int | None:
        """Updates until the budget is spent and learned from; None without a budget."""
        return None if self.num_rounds is None else self.offline_steps + self.num_rounds * self.updates_per_round

    def rounds_before(self, update: int) -> int:
        """Rounds that are collected before this update."""
        if update < self.offline_steps:
            return 0
        due = 1 + (update - self.offline_steps) // self.updates_per_round
        return due if self.num_rounds is None else min(due, self.num_rounds)

    def turns_before(self, round: int) -> int:
        """Turns collected in all before a round."""
        return 0 if round == 1 else self.turns_after(round - 1)

    def turns_after(self, round: int) -> int:
        """Turns collected in all by the end of a round."""
        turns = self.first_round + (round - 1) * self.turns_per_round
        return turns if self.max_turns is None else min(turns, self.max_turns)


def online_fraction(args: VLMQConfig, update: int) -> float:
    """The share of a batch that comes from the collected data: 0 in the offline phase, then a line, then constant."""
    if update < args.offline_steps:
        return 0.0
    if args.online_fraction_start is None or update >= args.offline_steps + args.online_fraction_steps:
        return args.online_fraction
    moved = (update - args.offline_steps) / args.online_fraction_steps
    return args.online_fraction_start + moved * (args.online_fraction - args.online_fraction_start)


def exploration(args: VLMQConfig, name: str, turns: int) -> float:
    """`rollout_temperature` or `rollout_epsilon` of a round before which so many turns were collected: a line from
    where it starts, over `rollout_annealing_turns`, then constant."""
    start, end = getattr(args, f"{name}_start"), getattr(args, name)
    if start is None or turns >= args.rollout_annealing_turns:
        return end
    return start + turns / args.rollout_annealing_turns * (end - start)


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
        self.run = fingerprint(args, rollouts, buffer, self.num_processes)
        self._failures_before = int(buffer.counters.get("env_failures", 0))
        self._counts: dict[str, int] | None = None  # of all processes, when they last counted

    @property
    def own_turns(self) -> int:
        """Turns that this process has collected so far, evicted ones too."""
        return self.buffer.end - self.buffer.num_offline

    @property
    def env_turns(self) -> int:
        """Turns collected so far by all processes, evicted ones too."""
        return self._own_counts()["env_turns"] if self._counts is None else self._counts["env_turns"]

    @property
    def env_failures(self) -> int:
        """Episodes that this process dropped since their environment failed, earlier runs on its buffer included."""
        return self._failures_before + sum(self.rollouts.failures.values())

    def _own_counts(self) -> dict[str, int]:
        return {
            "env_turns": self.own_turns,
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
        if self.own_turns and self.buffer.counters.get("run") != self.run:
            raise ValueError(
                f"{self.buffer.folder} holds {self.own_turns} turns that a run with other arguments collected. Resume "
                "that run (`resume_from_checkpoint=True`), choose another `replay_dir`, or remove the folder."
            )

    def advance(self, update: int) -> None:
        """Sees to it that the buffer has every round that is due before this update."""
        if self._counts is None:
            self._count()
        for round in range(self.round + 1, self.schedule.rounds_before(update) + 1):
            self._obtain(round)
            self.round = round
            self._count()

    def _obtain(self, round: int) -> None:
        known = self.buffer.round_end(round)
        lacking = [known is None or not known[1]]
        # A resumed process may have a round that another lacks; they play together, or none does.
        if any(lacking if self.num_processes == 1 else gather_object(lacking)):
            self._collect(round)
            known = self.buffer.round_end(round)
        assert known is not None
        # Of an old checkpoint's window nothing may be left: newer play is better than none.
        self.end = known[0] if self.buffer.start(known[0]) < known[0] else self.buffer.end

    def _collect(self, round: int) -> None:
        """Plays a round with the model as it is. Torch's random state is left as it was.

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
        self._count()
        if measured := measure(round, parts):
            self.report(measured)

    @property
    def _other_process(self) -> tuple[int, ...]:
        """What tells this process's random draws from the first one's."""
        return (self.process,) if self.process else ()

    def model_policy(self, model: Any, round: int) -> ModelPolicy:
        return ModelPolicy(
            model,
            self.processing_class,
            temperature=exploration(self.args, "rollout_temperature", self.schedule.turns_before(round)),
            max_completion_length=self.args.max_completion_length,
            batch_size=self.args.rollout_num_envs,
            logprobs=True,
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
            for episode in self.rollouts.play(self._exploring(policy, round), numbers()):
                buffer.append(episode, round=round)
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
        played.responses = getattr(policy, "responses", 0)
        played.retokenized = getattr(policy, "retokenized", 0)
        return played

    def _exploring(self, policy: Policy, round: int) -> Policy:
        epsilon = exploration(self.args, "rollout_epsilon", self.schedule.turns_before(round))
        return ExploringPolicy(policy, self.rollouts.agent_format, epsilon) if epsilon else policy

    # ---- a batch ----

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

    def close(self) -> None:
        """Closes the environments and the buffer."""
        self.rollouts.close()
        self.buffer.close()


class AsyncOnlineData(OnlineData):
    """Collects in a thread, with a copy of the policy, the round after the one that the learner has.

    The learner offers its weights between updates. The copy answers with weights that are at most `max_staleness`
    updates old: where they would be older, it waits for the learner's next offer. The learner waits where a round
    that is due is not complete. Frozen weights are shared with the copy.

    Attributes:
        waits: seconds that the learner has waited before each update.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        learner = getattr(self.model, "pretrained_model", self.model)
        self._copy = copy_of_policy(learner).eval()
        self._source, self._copied = changing(learner), changing(self._copy)
        self._state = threading.Condition()  # guards all that follows
        self._offered: dict[str, Tensor] = {}
        self._offered_update = self._held_update = -1  # of the offer, of the copy
        self._update = 0  # the learner's
        self._wanted = 0  # the newest round that may be collected
        self._needs_offer = self._stopping = False
        self._error: BaseException | None = None
        self._staleness: list[int] = []
        self._reports: list[dict[str, float]] = []
        self._waited, self._since = 0.0, time.perf_counter()
        self.waits: list[float] = []
        self._thread: threading.Thread | None = None

    # ---- the learner's side ----

    def advance(self, update: int) -> None:
        due = self.schedule.rounds_before(update)
        with self._state:
            self._update = update
            # The next round too, unless training ends before it is due.
            self._wanted = min(due + 1, self.schedule.rounds_before(self.args.max_steps - 1)) if due else 0
            if due and self._thread is None and self._error is None:
                self._thread = threading.Thread(target=self._work, name="vlmq-collection", daemon=True)
                self._thread.start()
            if due and (self._needs_offer or update - self._offered_update >= max(1, self.args.max_staleness // 2)):
                self._offer()
            self._state.notify_all()
            start = time.perf_counter()
            while not self._has(due):
                self._raise()
                if self._needs_offer:
                    self._offer()
                self._state.wait(timeout=1.0)
            self.waits.append(time.perf_counter() - start)
            self._waited += self.waits[-1]
            self._raise()
            reports, self._reports = self._reports, []
        self.round, self.end = due, self.buffer.end
        for logs in reports:  # here, since the trainer's log is not for two threads
            self.report(logs)

    def items(self, update: int, number: int, turns: int) -> list[dict[str, Any]]:
        """As `OnlineData.items`; where the thread's commits have evicted what was drawn, it is drawn again."""
        for _ in range(10):
            try:
                return super().items(update, number, turns)
            except LookupError:
                self.end = self.buffer.end
        return super().items(update, number, turns)

    def _has(self, round: int) -> bool:
        known = (0, True) if round == 0 else self.buffer.round_end(round)
        return known is not None and known[1]

    def _offer(self) -> None:
        """Copies the learner's changing weights; between two updates only."""
        with torch.no_grad():
            for name, weight in self._source.items():
                if name in self._offered:
                    self._offered[name].copy_(weight)
                else:
                    self._offered[name] = weight.detach().clone()
        self._offered_update, self._needs_offer = self._update, False
        self._state.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def logs(self) -> dict[str, float]:
        now = time.perf_counter()
        with self._state:
            logs = {**super().logs(), "learner_idle": self._waited / max(now - self._since, 1e-9)}
            if self._staleness:
                logs["staleness_mean"] = float(np.mean(self._staleness))
                logs["staleness_max"] = float(max(self._staleness))
            self._waited, self._since, self._staleness = 0.0, now, []
        return logs

    def close(self) -> None:
        with self._state:
            self._stopping = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join()
        super().close()

    # ---- the thread's side ----

    def _work(self) -> None:
        try:
            round = 1
            while not self._stopping:
                with self._state:
                    if round > self._wanted:
                        self._state.wait(timeout=1.0)
                        continue
                policy = self.policy or _UpToDate(self, self.model_policy(self._copy, round))
                measured = {} if self._has(round) else measure(round, [self.play(round, policy)])
                with self._state:
                    self._reports += [measured] if measured else []
                    self._state.notify_all()
                round += 1
        except _Stopped:
            pass
        except BaseException as error:
            with self._state:
                self._error = error
                self._state.notify_all()

    def refresh(self, requests: int) -> None:
        """Before the copy answers: takes the newest offer, and waits for one if the copy is too old."""
        with self._state:
            while self._offered_update < 0 or self._update - self._offered_update > self.args.max_staleness:
                if self._stopping:
                    raise _Stopped
                self._needs_offer = True
                self._state.notify_all()
                self._state.wait(timeout=1.0)
            if self._stopping:
                raise _Stopped
            if self._offered_update > self._held_update:
                with torch.no_grad():
                    for name, weight in self._offered.items():
                        self._copied[name].copy_(weight)
                self._held_update = self._offered_update
            self._staleness += [self._update - self._held_update] * requests


class _Stopped(Exception):
    """The learner has ended while the thread waited for it."""


@dataclass
class _UpToDate:
    """The copy as a policy: it looks to its age before each answer."""

    data: AsyncOnlineData
    policy: ModelPolicy

    @property
    def responses(self) -> int:
        return self.policy.responses

    @property
    def retokenized(self) -> int:
        return self.policy.retokenized

    def act(self, requests: list[Request]) -> list[Response]:
        self.data.refresh(len(requests))
        return self.policy.act(requests)


@dataclass
class Played:
    """What one process played in a round.

    Attributes:
        episodes: `rollout.measures` of each.
        seconds: that it took.
        responses, retokenized: as `ModelPolicy` counts them.
    """

    episodes: list[tuple[float, int, float]] = field(default_factory=list)
    seconds: float = 0.0
    responses: int = 0
    retokenized: int = 0


def measure(round: int, parts: Sequence[Played]) -> dict[str, float]:
    """What the log says of a round that processes have played; nothing if nothing had to be played."""
    episodes = [episode for part in parts for episode in part.episodes]
    if not episodes:  # the rounds before went over their goal by as much
        return {}
    seconds, turns = max(part.seconds for part in parts), sum(turns for _, turns, _ in episodes)
    logs = {"rollout_round": round, **{f"rollout_{name}": float(x) for name, x in metrics_of(episodes).items()}}
    logs |= {"rollout_seconds": seconds, "rollout_turns_per_second": turns / max(seconds, 1e-9)}
    if responses := sum(part.responses for part in parts):
        logs["rollout_retokenized"] = sum(part.retokenized for part in parts) / responses
    return logs


def fingerprint(args: VLMQConfig, rollouts: Rollouts, buffer: ReplayBuffer, num_processes: int = 1) -> int:
    """Equal for two runs that, started anew, would collect the same."""
    decisive = [
        *(name for name in VLMQConfig.__annotations__ if not name.startswith(("eval_", "replay_dir", "record_"))),
        *("seed", "data_seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("max_steps", "max_grad_norm", "lr_scheduler_type", "weight_decay"),
    ]
    facts = [repr(getattr(args, name)) for name in decisive]
    facts += [rollouts.name, str(buffer.num_offline), *([str(num_processes)] if num_processes > 1 else [])]
    return int.from_bytes(hashlib.sha256("\n".join(facts).encode()).digest()[:6], "big")


def changing(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, and the buffers, by name."""
    return {
        **{name: p for name, p in model.named_parameters() if p.requires_grad},
        **dict(model.named_buffers()),
    }


def copy_of_policy(policy: nn.Module) -> Any:
    """A copy of a model that shares the parameters which training does not change."""
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    copied: Any = copy.deepcopy(policy, shared)
    base = copied.get_base_model() if hasattr(copied, "get_base_model") else copied
    base.__dict__.pop("forward", None)  # TRL's fused one, which is bound to the model that learns
    return copied
