# SPDX-License-Identifier: Apache-2.0
"""Scripted play: expert, random, systematically flawed, and mixtures of them.

A demonstrator reads the state truthfully (`Decision.reading`), says a neutral sentence that follows from that reading
(`Decision.thoughts`, the same whatever is played) and then acts. Only the action differs between the policies. What
the right action is, and the one mistake, is the environment's `Script`.

Uniform noise would not do as bad data: the expert's action stays the most likely one, and an argmax washes it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import gymnasium
import numpy as np

from vlmq_trl.envs.base import Script, TextActionEnv

POLICIES = ("expert", "random", "flawed")


@dataclass(frozen=True)
class Decision:
    """One turn of a demonstrator.

    Attributes:
        action: a legal action of the environment.
        reading: the state read aloud, keys as the environment's `reading_fields`; always true.
        thoughts: a short sentence that follows from the reading and does not depend on the action.
    """

    action: str
    reading: Mapping[str, str]
    thoughts: str


Demonstrator = Callable[[gymnasium.Env, np.random.Generator], Decision]


def make_demonstrator(
    env_id: str | Callable[..., gymnasium.Env], policy: str, flaw_probability: float = 0.6
) -> Demonstrator:
    """A demonstrator for an environment that has a script.

    Args:
        env_id: a registered Gymnasium id, or a function that makes one; the environment is a `TextActionEnv`.
        policy: "expert", "random" (as a rule uniform over the legal actions), "flawed" (expert, but at each action the
            environment's systematic mistake with `flaw_probability`; "flawed:0.3" sets it here), or a mixture with
            weights, "expert=0.5,flawed:0.3=0.5", of which one member is drawn for each episode.
        flaw_probability: in 0..1.

    Returns:
        A function of the environment (wrapped or not, an episode running) and a generator, its only source of
        randomness. It may serve many environments in turn.

    Raises:
        ValueError: the id or the policy is unknown, or a probability or weight is out of range.
        TypeError: `env_id` is neither an id nor a function.
    """
    name = None
    if isinstance(env_id, str):
        name = env_id.rpartition(":")[2]  # Gymnasium's "module:id" imports the module first
        if name not in gymnasium.registry and ":" not in env_id:
            raise ValueError(
                f"no demonstrator for {env_id!r}, which is not registered; `python -m vlmq_trl.envs` lists"
            )
    elif not callable(env_id):
        raise TypeError(
            f"no demonstrator for a {type(env_id).__name__}; give a Gymnasium id, or a function that makes the "
            "environment"
        )
    members = _parse_policy(policy, flaw_probability)
    shares = np.array([member.weight for member in members])
    shares = shares / shares.sum()
    drawn: WeakKeyDictionary[gymnasium.Env, int] = WeakKeyDictionary()

    def demonstrate(env: gymnasium.Env, rng: np.random.Generator) -> Decision:
        game = env.unwrapped
        if not isinstance(game, TextActionEnv):
            raise TypeError(
                f"a demonstrator plays environments that have a script (TextActionEnv), not {type(game).__name__}; "
                "give a function (env, rng) -> Decision as the policy instead of a name"
            )
        if name is not None and env.spec is not None and env.spec.id != name:
            raise TypeError(f"this demonstrator plays {name}, not {env.spec.id}")
        member = members[0]
        if len(members) > 1:
            if game.turns == 0 or game not in drawn:
                drawn[game] = int(rng.choice(len(members), p=shares))
            member = members[drawn[game]]
        action = member.action(game.script, rng)
        return Decision(action, game.state_text(), game.script.thoughts())

    return demonstrate


@dataclass(frozen=True)
class _Member:
    """One player of a mixture."""

    policy: str
    flaw_probability: float
    weight: float

    def action(self, script: Script, rng: np.random.Generator) -> str:
        if self.policy == "random":
            return script.random(rng)
        if self.policy == "flawed":
            return script.mistake() if rng.random() < self.flaw_probability else script.unmistaken()
        return script.expert()


def _parse_policy(policy: str, flaw_probability: float) -> list[_Member]:
    """A policy's members."""
    members = []
    for part in policy.split(","):
        name, has_weight, weight_text = part.partition("=")
        name, has_flaw, flaw_text = name.strip().partition(":")
        try:
            weight = float(weight_text) if has_weight else 1.0
            flaw = float(flaw_text) if has_flaw else float(flaw_probability)
        except ValueError:
            raise ValueError(f"policy {policy!r}: {part.strip()!r} holds a number that does not parse") from None
        if name not in POLICIES or (has_flaw and name != "flawed"):
            raise ValueError(
                f"policy {policy!r}: {part.strip()!r} is not known; use expert, random, flawed, flawed:0.3, "
                "or a mixture such as expert=0.5,random=0.5"
            )
        if not 0.0 <= flaw <= 1.0:
            raise ValueError(f"policy {policy!r}: the flaw probability must lie in 0..1, not {flaw}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"policy {policy!r}: weights must be positive and finite, not {weight}")
        members.append(_Member(name, flaw, weight))
    return members
