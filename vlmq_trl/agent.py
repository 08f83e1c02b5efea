# SPDX-License-Identifier: Apache-2.0
"""`VLMAgent`: a saved model, its processor, the way it sees and answers and, where there is one, its critic, as
something that plays.

Contents: `VLMAgent`, `Answer`, `TokenValue`, `BestOfPolicy`; `agent_card`, which says how a model was taught to see.

Axes: B rows, T tokens, A response tokens of all rows, N critics.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .agent_format import (
    AgentFormat,
    Exchange,
    action_of,
    default_format,
    format_arguments,
    make_format,
    prompt_of,
)
from .chat import check_chat_template
from .collator import VLMQDataCollator
from .critic import Critic
from .env_pool import close_env
from .modeling import (
    AutoModelForImageTextToTextWithValueHead,
    existing,
    find_file,
    has_critic,
    hub_arguments,
    load_pretrained,
    load_processor,
)
from .policy import ModelPolicy
from .rollout import EnvSpec, Request, Response, make_env, play_episodes
from .trajectory import Episode

CARD_NAME = "agent.json"
# What a card says of a format that JSON cannot hold: the user has to give it again.
CUSTOM_FORMAT = {"name": "custom"}


@dataclass(frozen=True)
class Answer:
    """What the agent does.

    Attributes:
        response: its whole text.
        action: read from that, "" if there is none.
        valid: whether the response follows the format.
        value: the critic's Q of the response, in units of return; None without a critic, or where it was not asked.
    """

    response: str
    action: str
    valid: bool
    value: float | None = None


@dataclass(frozen=True)
class TokenValue:
    """One token of a response as policy and critic see it; values in units of return.

    Attributes:
        token: its text.
        log_prob: log pi(a_t|s_t).
        q: Q(s_t, a_t), mean over the ensemble.
        v: V(s_t).
    """

    token: str
    log_prob: float
    q: float
    v: float

    @property
    def advantage(self) -> float:
        """Q - V. The filter of the training looked at the Q of the target heads, which follow these slowly."""
        return self.q - self.v


class VLMAgent:
    """An agent that plays.

    ```python
    >>> agent = VLMAgent.from_pretrained("user/repo")
    >>> agent.act(observation).action  # and `task`, where each episode has its own
    >>> episodes = agent.play("vlmq_trl/NumberLine-v0", episodes=10)
    >>> agent.token_values(observation, response)  # with a critic
    ```

    Args:
        model: a model, adapter or `AutoModelForImageTextToTextWithValueHead`; it is put into evaluation mode.
        processing_class: its processor, or tokenizer for text-only models.
        agent_format: how observations become messages and responses actions; None for each environment's own, unless
            the model was trained with functions of the user's own: then it has to be given.
        env: what it was trained in; `play`'s default.
        temperature: of its answers; 0 is greedy.
        max_completion_length: longest response in tokens.
        legal_actions_only: hold it to the actions that the environment lists as legal.

    Raises:
        ValueError: `processing_class` has no chat template.
    """

    def __init__(
        self,
        model: Any,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        agent_format: AgentFormat | None = None,
        *,
        env: EnvSpec | None = None,
        temperature: float = 0.0,
        max_completion_length: int = 256,
        legal_actions_only: bool = False,
    ):
        check_chat_template(processing_class)
        self.model, self.processing_class = model.eval(), processing_class
        self.agent_format, self.env = agent_format, env
        self.temperature, self.max_completion_length = temperature, max_completion_length
        self.legal_actions_only = legal_actions_only
        self._needs_format = False  # the card says so
        self._defaults: tuple[EnvSpec, AgentFormat, str] | None = None  # of `env`, which may be slow to make

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        agent_format: AgentFormat | None = None,
        env: EnvSpec | None = None,
        temperature: float = 0.0,
        max_completion_length: int | None = None,
        legal_actions_only: bool | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "VLMAgent":
        """Opens what a trainer saved or pushed: a whole model or an adapter, its critic if there is one, and the card
        that says how it sees, unless the arguments say otherwise.

        Args:
            name: a folder, or a repository on the Hub.
            device: default the GPU where there is one.
            **kwargs: go to the model class' `from_pretrained` (`dtype`, `revision`, `token`, ...).

        Raises:
            TypeError: `name` is no name.
            OSError: there is no model, or only in a pickle; half a critic.
            ValueError: a card or a critic that does not fit.
        """
        name, hub_kwargs = existing(name), hub_arguments(kwargs)
        card = _read_card(name, hub_kwargs)
        opened = AutoModelForImageTextToTextWithValueHead if has_critic(name, **hub_kwargs) else None
        model = opened.from_pretrained(name, **kwargs) if opened else load_pretrained(name, **kwargs)
        if max_completion_length is None:
            max_completion_length = card.get("max_completion_length", 256)
        if legal_actions_only is None:
            legal_actions_only = bool(card.get("legal_actions_only"))
        known = card.get("agent_format")
        custom = known == CUSTOM_FORMAT
        agent = cls(
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            load_processor(name, model.config, **hub_kwargs, trust_remote_code=kwargs.get("trust_remote_code", False)),
            agent_format if agent_format is not None else make_format(**known) if known and not custom else None,
            env=_env_of(card) if env is None else env,
            temperature=temperature,
            max_completion_length=max_completion_length,
            legal_actions_only=legal_actions_only,
        )
        agent._needs_format = custom
        return agent

    @property
    def critic(self) -> Critic | None:
        return self.model.critic if isinstance(self.model, AutoModelForImageTextToTextWithValueHead) else None

    # ---- acting ----

    def act(
        self,
        observation: Mapping[str, Any],
        task: str | None = None,
        history: Sequence[Exchange] = (),
        *,
        best_of: int = 1,
        legal_actions: Sequence[str] = (),
    ) -> Answer:
        """Answers one observation, a mapping with "image" (uint8 [H, W, 3]), "text" or both.

        Args:
            task: the environment's task text; default that of the environment that it was trained in, where it is the
                same in all episodes. "": none.
            history: earlier turns of the episode, oldest first, where the format wants them.
            best_of: samples as many responses and takes the one that the critic values most.
            legal_actions: what it may do, with `legal_actions_only`.

        Raises:
            TypeError, ValueError: an observation that does not fit, no task or format, `best_of` without a critic, or
                `legal_actions_only` and no `legal_actions`.
        """
        if self.legal_actions_only and not legal_actions:
            raise ValueError("The agent takes legal actions only: say which there are, by `legal_actions`.")
        fmt = self._format()
        prompt, images = prompt_of(fmt, self._task(task), observation, history)
        request = Request(None, prompt, images, np.random.default_rng(0), tuple(legal_actions))
        policy = self.policy(best_of=best_of)
        (response,) = policy.act([request])
        parsed = action_of(fmt, response.text)
        value = policy.values[0] if isinstance(policy, BestOfPolicy) else None
        return Answer(response.text, parsed.action, parsed.valid, value)

    def play(
        self, env: EnvSpec | None = None, *, episodes: int = 1, seed: int = 0, best_of: int = 1, **kwargs: Any
    ) -> list[Episode]:
        """Plays episodes; `episode_metrics` measures them.

        Args:
            env: default what it was trained in.
            **kwargs: as `play_episodes` (`num_envs`, `env_kwargs`, `max_turns`, `workers`, `progress`, ...).

        Raises:
            ValueError: no environment is known, or not how the agent sees and answers.
        """
        env = self.env if env is None else env
        if env is None:
            raise ValueError("Which environment? Give `env`: the agent's card names none.")
        fmt = kwargs.get("agent_format") or self.own_format()
        if fmt is None and self.legal_actions_only:
            fmt, _ = _defaults_of(env)
        kwargs["agent_format"] = fmt  # None for the environment's
        policy = self.policy(best_of=best_of, agent_format=fmt)
        return list(play_episodes(env, policy, episodes=episodes, seed=seed, **kwargs))

    def policy(self, best_of: int = 1, agent_format: AgentFormat | None = None) -> "ModelPolicy | BestOfPolicy":
        """The agent as a `Policy`, for `play_episodes`, `show_episodes` and their kin.

        Args:
            agent_format: in which it will play, with `legal_actions_only`; default its own.
        """
        if best_of < 1 or (best_of > 1 and self.critic is None):
            raise ValueError(f"`best_of={best_of}`: it must be at least 1, and above 1 it needs a critic.")
        if best_of > 1:
            return BestOfPolicy(self, best_of, agent_format)
        return self._model_policy(self.temperature, agent_format)

    def _model_policy(self, temperature: float, agent_format: AgentFormat | None) -> ModelPolicy:
        return ModelPolicy(
            self.model,
            self.processing_class,
            temperature=temperature,
            max_completion_length=self.max_completion_length,
            legal_actions_only=self.legal_actions_only,
            agent_format=(agent_format or self._format()) if self.legal_actions_only else None,
        )

    def own_format(self) -> AgentFormat | None:
        """The agent's format; None where it answers in each environment's own.

        Raises:
            ValueError: it was trained with functions of the user's own, and they were not given.
        """
        if self.agent_format is None and self._needs_format:
            raise ValueError(
                "How does it see and answer? It was trained with functions of your own, which are not saved with it. "
                "Give `agent_format`."
            )
        return self.agent_format

    def _format(self) -> AgentFormat:
        """`own_format`, or else the default of the environment that it was trained in."""
        own = self.own_format()
        if own is not None:
            return own
        if self.env is None:
            raise ValueError("How does it see and answer? Give `agent_format`: the agent's card names none.")
        return self._of_env()[0]

    def _task(self, given: str | None) -> str:
        if given is not None:
            return given
        if self.env is None:
            raise ValueError("What is it to do? Give `task`: the agent's card names no environment.")
        task = self._of_env()[1]
        if not task:
            raise ValueError("What is it to do? Give `task`: its environment has none before an episode begins.")
        return task

    def _of_env(self) -> tuple[AgentFormat, str]:
        """Format and task of the environment that it was trained in."""
        assert self.env is not None
        if self._defaults is None or self._defaults[0] is not self.env:
            self._defaults = self.env, *_defaults_of(self.env)
        return self._defaults[1:]

    # ---- the critic ----

    def token_values(
        self,
        observation: Mapping[str, Any],
        response: str,
        task: str | None = None,
        history: Sequence[Exchange] = (),
    ) -> list[TokenValue]:
        """What policy and critic make of each token of a response, its end token included.

        Raises:
            TypeError: the response is no string.
            ValueError: there is no critic, or no task or format is known.
        """
        prompt, images = prompt_of(self._format(), self._task(task), observation, history)
        (values,) = self.score([Request(None, prompt, images, np.random.default_rng(0))], [response])
        return values

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], responses: Sequence[str], batch_size: int = 32
    ) -> list[list[TokenValue]]:
        """`token_values` of many responses, one to each request.

        Raises:
            TypeError: a response is no string.
            ValueError: there is no critic; or not one response to each request.
        """
        critic = self.critic
        if critic is None:
            raise ValueError("There is no critic beside this model; only a VLMQ run saves one.")
        if len(requests) != len(responses):
            raise ValueError(f"{len(responses)} responses to {len(requests)} requests: give one to each.")
        for response in responses:
            if not isinstance(response, str):
                raise TypeError(f"A response must be a string, such as `Answer.response`, got {response!r:.100}.")
        found: list[list[TokenValue]] = []
        for start in range(0, len(requests), batch_size):
            turns = zip(requests[start : start + batch_size], responses[start : start + batch_size], strict=True)
            inputs = VLMQDataCollator(self.processing_class).tokenize(
                [
                    (request.prompt, list(request.images), [{"role": "assistant", "content": response}])
                    for request, response in turns
                ]
            )
            tokens = [labels[labels != -100].tolist() for labels in inputs["labels"]]
            output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
            v = output.target_state_values if output.state_values is None else output.state_values
            mean, std = critic.target_mean, critic.target_std
            columns = [output.log_probs, output.q_values.mean(-1) * std + mean, v.mean(-1) * std + mean]
            values = torch.stack([column.float() for column in columns], dim=1).split([len(row) for row in tokens])
            for ids, own in zip(tokens, values, strict=True):
                texts = [self._tokenizer.decode([token]) for token in ids]
                found.append([TokenValue(text, *row) for text, row in zip(texts, own.tolist(), strict=True)])
        return found

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processing_class, "tokenizer", self.processing_class)


class BestOfPolicy:
    """Samples n responses to each request, at temperature 1 unless the agent has another, and gives the one whose last
    token the critic values most: Q of the whole response.

    Attributes:
        values: of the responses of the last `act`, in units of return.
    """

    def __init__(self, agent: VLMAgent, n: int, agent_format: AgentFormat | None = None):
        self.agent, self.n = agent, n
        self.values: list[float] = []
        self._policy = agent._model_policy(agent.temperature or 1.0, agent_format)

    def act(self, requests: list[Request]) -> list[Response]:
        repeated = [request for request in requests for _ in range(self.n)]
        responses = self._policy.act(repeated)
        scores = [values[-1].q for values in self.agent.score(repeated, [response.text for response in responses])]
        best = [max(range(k, k + self.n), key=scores.__getitem__) for k in range(0, len(repeated), self.n)]
        self.values = [scores[k] for k in best]
        return [Response(responses[k].text) for k in best]


def agent_card(
    env: EnvSpec | None, agent_format: AgentFormat | None, max_completion_length: int, legal_actions_only: bool = False
) -> dict[str, Any]:
    """What `agent.json` says, so that an agent opens with no argument: `env_id` (None for a user's own factory),
    `env_kwargs` (of `functools.partial(gymnasium.make, env_id, ...)`), `agent_format` (`CUSTOM_FORMAT` for a user's
    own functions, None where none is known), `max_completion_length`, `legal_actions_only`."""
    env_id, env_kwargs = env, {}
    if isinstance(env, partial) and env.func is gymnasium.make and len(env.args) == 1 and _is_json(env.keywords):
        env_id, env_kwargs = env.args[0], env.keywords
    return {
        "env_id": env_id if isinstance(env_id, str) else None,
        "env_kwargs": env_kwargs,
        "agent_format": None if agent_format is None else format_arguments(agent_format) or CUSTOM_FORMAT,
        "max_completion_length": max_completion_length,
        "legal_actions_only": legal_actions_only,
    }


def _is_json(values: Mapping[str, Any]) -> bool:
    try:
        return json.loads(json.dumps(values)) == values
    except TypeError:
        return False


def _env_of(card: Mapping[str, Any]) -> EnvSpec | None:
    env_id, env_kwargs = card.get("env_id"), card.get("env_kwargs")
    return partial(gymnasium.make, env_id, **env_kwargs) if env_id and env_kwargs else env_id


def _defaults_of(env: EnvSpec) -> tuple[AgentFormat, str]:
    """The environment's format, and its task; "" if that is not known before an episode begins."""
    made = make_env(env)
    try:
        return default_format(made), str(made.get_wrapper_attr("task") or "") if made.has_wrapper_attr("task") else ""
    finally:
        close_env(made)


def _read_card(name: str, hub_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    path = find_file(name, CARD_NAME, **hub_kwargs)
    if path is None:
        return {}
    try:
        card = json.loads(Path(path).read_text())
        if not isinstance(card, dict):
            raise TypeError("it is no object")
        if not isinstance(card.get("env_kwargs", {}), dict):
            raise TypeError("`env_kwargs` is no object")
        if card.get("agent_format") not in (None, CUSTOM_FORMAT):
            make_format(**card["agent_format"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CARD_NAME} of {name} is not an agent's card: {error}") from None
    return card
