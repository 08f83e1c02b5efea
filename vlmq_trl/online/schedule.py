# SPDX-License-Identifier: Apache-2.0
"""When to collect, and how what is collected and drawn changes with time."""

import math
from dataclasses import dataclass
from typing import Any

from ..vlmq_config import VLMQConfig


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


def exploration(args: VLMQConfig, name: str, turns: int) -> Any:
    """`rollout_temperature`, `rollout_action_temperature` or `rollout_epsilon` of a round before which so many turns
    were collected: a line from where it starts, over `rollout_annealing_turns`, then constant."""
    start, end = getattr(args, f"{name}_start"), getattr(args, name)
    if start is None or turns >= args.rollout_annealing_turns:
        return end
    return start + turns / args.rollout_annealing_turns * (end - start)
