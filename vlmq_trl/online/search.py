# SPDX-License-Identifier: Apache-2.0
"""What was done, and what came of it, where the agent said the same before it acted: for search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from typing import Any

import numpy as np

from ..agent_format import AgentFormat, action_of
from ..replay import ReplayBuffer
from ..rollout import Request
from ..trajectory import Episode

# How many turns ahead a state is asked what it is worth; beyond, it counts as unknown.
HORIZON = 100


@dataclass
class _Edge:
    """A state's action: how often it was taken, what the last episode with it had in all, the sum of its rewards, how
    often which state followed."""

    visits: int = 0
    last: float = -math.inf
    rewards: float = 0.0
    following: Counter[bytes] = field(default_factory=Counter)


class VisitedStates:
    """A table of what was done in which state, and what came of it, that tells which actions may still be the best.

    A state is the prompt's text with the response up to its action: the agent's own reading stands for the picture, so
    that pictures which it reads alike are one state (as a hash does in arXiv 1611.04717). Values are optimistic, as in
    R-max (Brafman and Tennenholtz, 2002): an action that was never taken is worth the highest return that any episode
    had (as long as none has succeeded, more than that), one that was taken the mean of its rewards and of its next
    states' values (at most the same), a state as much as its best action. Returns are undiscounted: how far off the
    unknown lies makes no difference.

    Args:
        agent_format: finds the action in a response.
        fraction: of the episodes in which it tells, in [0, 1].
        seed: decides which.
    """

    def __init__(self, agent_format: AgentFormat, fraction: float, seed: int):
        self.agent_format, self.fraction, self.seed = agent_format, fraction, seed
        self._edges: dict[bytes, dict[str, _Edge]] = {}
        self._legal: dict[bytes, tuple[str, ...]] = {}  # in the states that it was asked about, case-folded
        self._lists: dict[tuple[str, ...], tuple[str, ...]] = {}  # each such list once
        self._highest = self._best = -math.inf  # return from some turn on; of a whole episode

    def count(self, buffer: ReplayBuffer) -> None:
        """Begins anew with the turns that the buffer keeps now, the offline ones too."""
        self._edges, self._highest, self._best = {}, -math.inf, -math.inf
        rows = buffer.dataset().select_columns(["episode_id", "prompt", "completion", "reward"])
        for _, turns in groupby(rows, key=lambda row: row["episode_id"]):
            self._add((row["prompt"], "".join(map(_text, row["completion"])), row["reward"]) for row in turns)

    def add(self, episode: Episode) -> None:
        """Adds an episode that has just been played."""
        self._add((turn.prompt, turn.completion, turn.reward) for turn in episode.turns)

    def _add(self, turns: Iterable[tuple[list[dict[str, Any]], str, float]]) -> None:
        following, to_go, turns = None, 0.0, list(turns)
        total = sum(reward for _, _, reward in turns)
        self._best = max(self._best, total)
        for prompt, said, reward in reversed(turns):
            to_go += reward
            self._highest = max(self._highest, to_go)
            state, action = self._state(prompt, said), action_of(self.agent_format, said)
            if action.valid:
                edge = self._edges.setdefault(state, {}).setdefault(action.action.casefold(), _Edge())
                edge.visits, edge.last, edge.rewards = edge.visits + 1, total, edge.rewards + reward
                edge.following.update([] if following is None else [following])
            following = state

    def __call__(self, request: Request, said: str) -> dict[str, int]:
        """What to choose from in this state, and how often each was taken there.

        Those with which the last episode did as well as the best one, if there are such; else the legal actions of the
        highest value. In the other episodes all legal actions, as if there were no table.
        """
        actions = tuple(action.casefold() for action in request.legal_actions)
        state, actions = self._state(request.prompt, said), self._lists.setdefault(actions, actions)
        self._legal[state] = actions
        if np.random.default_rng((self.seed, request.episode, 3)).random() >= self.fraction:
            return dict.fromkeys(request.legal_actions, 0)
        edges, enough = self._edges.get(state, {}), _hope(self._best) - 1e-6
        won = [k for k, action in enumerate(actions) if action in edges and edges[action].last >= enough]
        if won:
            return {request.legal_actions[k]: 0 for k in won}
        values = self._action_values(state, actions, {}, HORIZON)
        best = np.flatnonzero(values >= values.max(initial=-math.inf) - 1e-6)
        return {request.legal_actions[k]: edges.get(actions[k], _Edge()).visits for k in best}

    def _action_values(
        self, state: bytes, actions: tuple[str, ...], known: dict[bytes, float], horizon: int
    ) -> np.ndarray:
        """[n] of the actions in this state. `known` holds, and takes, values of states; one that leads back to itself
        counts as unknown."""
        edges, values = self._edges.get(state, {}), np.full(len(actions), _hope(self._highest))
        for k, edge in enumerate(map(edges.get, actions)):
            if edge is not None:
                to_come = (n * self._state_value(s, actions, known, horizon - 1) for s, n in edge.following.items())
                values[k] = min((edge.rewards + sum(to_come)) / edge.visits, _hope(self._highest))
        return values

    def _state_value(self, state: bytes, actions: tuple[str, ...], known: dict[bytes, float], horizon: int) -> float:
        """`actions`: those of the state before, for one whose own are not known."""
        if state not in known:
            known[state], actions = _hope(self._highest), self._legal.get(state, actions)
            if horizon and all(action in self._edges.get(state, {}) for action in actions):
                known[state] = float(self._action_values(state, actions, known, horizon).max())
        return known[state]

    def _state(self, prompt: list[dict[str, Any]], said: str) -> bytes:
        text = "\n".join([*map(_text, prompt), self.agent_format.replace_action(said, "")])
        return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _hope(best: float) -> float:
    """What the unknown is worth: the best there was, and where that was no success, more."""
    return best if best > 0 else best + 1


def _text(message: Mapping[str, Any]) -> str:
    """As `flatten_content` joins parts, which a buffer of text alone holds."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
