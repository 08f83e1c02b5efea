# SPDX-License-Identifier: Apache-2.0
"""Count-based exploration: what has been done how often where the agent said the same before it acted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..agent_format import AgentFormat, action_of
from ..replay import ReplayBuffer
from ..rollout import Request


class ActionCounts:
    """Counts a buffer's actions by state, and tells them in some of the episodes.

    A state is the prompt's text with the response up to its action: the agent's own reading stands for the picture, so
    that pictures which it reads alike are one state (as a hash does in arXiv 1611.04717).

    Args:
        agent_format: finds the action in a response.
        fraction: of the episodes, in [0, 1].
        seed: decides which.
    """

    def __init__(self, agent_format: AgentFormat, fraction: float, seed: int):
        self.agent_format, self.fraction, self.seed = agent_format, fraction, seed
        self._counts: dict[str, Counter[str]] = {}

    def count(self, buffer: ReplayBuffer) -> None:
        """Counts the turns that the buffer keeps now, the offline ones too."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in buffer.dataset().select_columns(["prompt", "completion"]):
            said = "".join(map(_text, row["completion"]))
            action = action_of(self.agent_format, said)
            if action.valid:
                counts[self._state(row["prompt"], said)][action.action.casefold()] += 1
        self._counts = dict(counts)

    def __call__(self, request: Request, said: str) -> Mapping[str, int]:
        """How often each action, in lower case, was taken in this state; none in the other episodes."""
        if np.random.default_rng((self.seed, request.episode, 3)).random() >= self.fraction:
            return {}
        return self._counts.get(self._state(request.prompt, said), {})

    def _state(self, prompt: list[dict[str, Any]], said: str) -> str:
        return "\n".join([*map(_text, prompt), self.agent_format.replace_action(said, "")])


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
