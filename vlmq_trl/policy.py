# SPDX-License-Identifier: Apache-2.0
"""A model as a policy: requests answered by one batched `generate`, and its evaluation in an environment.

Contents: `render`, `OwnGenerationConfig`, `ModelPolicy`, `ActionLogits`, `TokenLogProbs`, `format_with_actions`,
`evaluate_model`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl.data_utils import apply_chat_template

from .agent_format import AgentFormat, action_of, taking
from .chat import as_messages, completion_tokens, pictures, stop_token_ids, turn_opening, turn_processor
from .env_pool import EnvFailureError, first_look
from .recorder import EpisodeRecorder
from .rollout import EnvSpec, Request, Response, measures, metrics_of, play_episodes
from .sharding import ready_to_generate

# Of a request and what its response says before the action: the actions to choose from, and how often each was taken.
Choices = Callable[[Request, str], Mapping[str, int]]

RARITY_POWER = 2  # how fast an action that is taken loses weight: with 1 what the policy is sure of hardly gives way


def render(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase, request: Request
) -> tuple[str, list[np.ndarray]]:
    """A request's prompt as text, by the chat template, and its images."""
    prompt = as_messages(request.prompt, processing_class, request.images)
    return apply_chat_template({"prompt": prompt}, processing_class)["prompt"], list(request.images)


class OwnGenerationConfig(GenerationConfig):
    """Takes nothing from the model's own generation config, which `generate` merges into the one it is given: a policy
    is the softmax of the logits."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        if allow_custom_entries:  # as in that merge alone
            return kwargs
        return super().update(defaults_only=defaults_only, **kwargs)


class ModelPolicy:
    """Answers requests with a model's generations, of the logits as they are: the most likely token, or a sample from
    the softmax; of the model's own generation config only the end tokens count. What the chat template puts before an
    answer (`turn_opening`) is no part of a response: the template puts it there again.

    Greedy answers are deterministic, so equal requests are generated once and remembered for this object's life: make
    a new one when the weights change.

    Args:
        model: anything with `generate`.
        processing_class: its processor, or tokenizer for text-only models.
        temperature: 0 is greedy.
        max_completion_length: longest response in tokens.
        batch_size: largest number of rows in one `generate`.
        logprobs: give each response its tokens' log-probabilities under the sampling distribution, softmax of the
            logits over the temperature. Only sampling has them.
        action_temperature: of the tokens once the response has come to its action, in place of `temperature`: what
            explores then is the action, not the reading and the thoughts before it. Where the environment lists its
            legal actions it is one of them.
        legal_actions_only: once a response has come to its action, this is one of those that the environment lists as
            legal now (where it lists any), the most likely or a sample among them.
        choices: of a request and what its response says before the action: those of the legal actions that may be
            taken, of which the response then takes one, and how often each was taken there. The policy is
            pi(a|s) / (1 + N(s, a))^2 then, so that among these what is rare comes up.
        agent_format: tells where that is.

    Attributes:
        responses, retokenized: with `logprobs`, how many responses there were, and how many of them without
            log-probabilities: their text is tokenised otherwise than it was sampled (a word in two pieces), so that
            training will see other tokens than those that were drawn.

    Raises:
        ValueError: `logprobs` or `action_temperature` with temperature 0; `action_temperature` or
            `legal_actions_only` or `choices` without `agent_format`.
        FloatingPointError: from `act`, if the model's logits are not numbers.
    """

    def __init__(
        self,
        model: Any,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        temperature: float = 0.0,
        max_completion_length: int = 256,
        batch_size: int = 64,
        logprobs: bool = False,
        action_temperature: float | None = None,
        legal_actions_only: bool = False,
        choices: Choices | None = None,
        agent_format: AgentFormat | None = None,
    ):
        if logprobs and not temperature:
            raise ValueError("`logprobs=True` needs a temperature above 0: a greedy answer has no distribution.")
        if action_temperature is not None and (not temperature or agent_format is None):
            raise ValueError("`action_temperature` needs a temperature above 0, and `agent_format`.")
        if (legal_actions_only or choices is not None) and agent_format is None:
            name = "legal_actions_only" if legal_actions_only else "choices"
            raise ValueError(f"`{name}` needs `agent_format`, which tells where a response's action begins.")
        self.model, self.processing_class, self.batch_size = model, processing_class, batch_size
        self.temperature, self.logprobs = temperature, logprobs
        self.action_temperature, self.agent_format = action_temperature, agent_format
        self.legal_actions_only, self.choices = legal_actions_only, choices
        self.responses = self.retokenized = 0
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.opening = turn_opening(processing_class)
        # `generate` would sample from the 50 likeliest tokens.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        self.generation_config = OwnGenerationConfig(
            **sampling,
            max_new_tokens=max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=stop_token_ids(processing_class, model.generation_config),
            use_cache=True,
        )
        self.stop_tokens = set(self.generation_config.eos_token_id)
        self.memory: dict[Any, Response] | None = None if temperature else {}

    def act(self, requests: list[Request]) -> list[Response]:
        """Answers all requests."""
        rows = [(*render(self.processing_class, request), request) for request in requests]
        if self.memory is None:
            return self._generate_all(rows)
        keys = [
            (text, request.legal_actions, *((image.shape, sha256(image.tobytes()).digest()) for image in images))
            for text, images, request in rows
        ]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self.memory}
        self.memory.update(zip(new, self._generate_all(list(new.values())), strict=True))
        return [self.memory[key] for key in keys]

    def _generate_all(self, rows: list[tuple[str, list[np.ndarray], Request]]) -> list[Response]:
        return [
            response
            for start in range(0, len(rows), self.batch_size)
            for response in self._generate(rows[start : start + self.batch_size])
        ]

    @torch.no_grad()
    def _generate(self, rows: list[tuple[str, list[np.ndarray], Request]]) -> list[Response]:
        images = [pictures(images) for _, images, _ in rows]
        kwargs = {"images": images} if any(images) else {}
        inputs = turn_processor(self.processing_class)(
            text=[text for text, _, _ in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
            **kwargs,
        ).to(self.model.device)
        start = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([_check_logits])
        if self.agent_format is not None and (
            self.action_temperature is not None or self.legal_actions_only or self.choices is not None
        ):
            processors.append(
                ActionLogits(
                    self.agent_format,
                    self.tokenizer,
                    start,
                    [request for _, _, request in rows],
                    self.stop_tokens,
                    temperature=self.temperature,
                    action_temperature=self.action_temperature,
                    choices=self.choices or _all_legal,
                    opening=self.opening,
                )
            )
        recorder = TokenLogProbs(self.temperature) if self.logprobs else None
        if recorder is not None:
            processors.append(recorder)
        # Each process plays at its own pace. Under ZeRO-3 `generate` would go on until all have finished, and wait for
        # ever for one that plays no more; with whole weights (`ready_to_generate`) it need not.
        sequences = self.model.generate(
            **inputs, generation_config=self.generation_config, logits_processor=processors, synced_gpus=False
        )
        tokens = sequences[:, start:]
        opening = _decoded(self.tokenizer, self.opening)
        texts = [t.removeprefix(opening) for t in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        if recorder is None:
            return [Response(text) for text in texts]
        log_probs = recorder.finish(tokens).tolist()
        return [
            Response(text, self._aligned(text, row, values))
            for text, row, values in zip(texts, tokens.tolist(), log_probs, strict=True)
        ]

    def _aligned(self, text: str, tokens: list[int], log_probs: list[float]) -> list[float] | None:
        """The log-probabilities of the sampled tokens, end token included, if `text` has these very tokens again when
        it is a completion in training; else None.

        Args:
            tokens, log_probs: of one row, padded after its end.
        """
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        learned = completion_tokens(self.processing_class, text)
        self.responses += 1
        if learned[:end] == tokens[:end]:
            return log_probs[:end]
        self.retokenized += 1
        return None


def _decoded(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as it comes back from its tokens, without the special ones."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def _all_legal(request: Request, said: str) -> Mapping[str, int]:
    return dict.fromkeys(request.legal_actions, 0)


def _check_logits(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor: a broken model would answer nonsense greedily, and sampling says nothing of the cause."""
    if not torch.isfinite(scores.amax(-1)).all():
        raise FloatingPointError(
            "The model's logits are not finite: its weights are broken, as by an update with too high a "
            "`learning_rate`. Lower it, or `max_grad_norm`, and go on from a checkpoint of before."
        )
    return scores


class ActionLogits(LogitsProcessor):
    """Gives each row that has come to its action a temperature of its own from there on and, where the environment
    lists its legal actions, only these to choose from, by their tokens.

    Args:
        agent_format: tells whether a text has come to its action, and how an action ends it.
        tokenizer: gives the text, and the tokens.
        start: of the responses, as a position in `input_ids`.
        requests: that the rows answer.
        stop_tokens: that may follow an action of the list.
        temperature: that `generate` applies after this processor.
        action_temperature, choices: as `ModelPolicy`; what several actions begin with was taken as often as they were.
        opening: what comes before a response (`turn_opening`).
    """

    def __init__(
        self,
        agent_format: AgentFormat,
        tokenizer: PreTrainedTokenizerBase,
        start: int,
        requests: list[Request],
        stop_tokens: set[int],
        *,
        temperature: float = 0.0,
        action_temperature: float | None = None,
        choices: Choices = _all_legal,
        opening: str = "",
    ):
        self.agent_format, self.tokenizer, self.start = agent_format, tokenizer, start
        self.opening, self.decoded_opening = opening, _decoded(tokenizer, opening)
        self.requests, self.stop_tokens, self.choices = requests, stop_tokens, choices
        self.temperature = temperature
        self.factor = 1.0 if action_temperature is None else temperature / action_temperature
        # A row that has come to its action: how its tokens may go on, by its tokens, and how often they have; what is
        # not there is free.
        self.ways: dict[int, dict[tuple[int, ...], Counter[int]]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(input_ids[:, self.start :].tolist()):
            if row not in self.ways:
                text = self._said(tokens)
                if not self.agent_format.reaches_action(text):
                    continue
                self.ways[row] = self._ways(text, tokens, self.choices(self.requests[row], text))
            scores[row] *= self.factor
            if ways := self.ways[row].get(tuple(tokens)):
                allowed = sorted(ways)
                rarity = [RARITY_POWER * math.log1p(ways[token]) * self.temperature for token in allowed]
                kept = scores[row, allowed] - scores.new_tensor(rarity)
                scores[row] = -torch.inf
                scores[row, allowed] = kept
        return scores

    def _said(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(self.decoded_opening)

    def _ways(self, text: str, tokens: list[int], choices: Mapping[str, int]) -> dict[tuple[int, ...], Counter[int]]:
        """For each beginning of a response that takes one of these actions, from `tokens` on: the tokens that go on,
        and how often the actions that they lead to were taken."""
        ways: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for action, taken in choices.items():
            said = taking(self.agent_format, action, self.agent_format.replace_action(text, action))
            whole = self.tokenizer(self.opening + said, add_special_tokens=False)["input_ids"]
            if whole[: len(tokens)] != tokens:  # so far it is spelt otherwise, or in other tokens
                rest = self.agent_format.rest_of(text, action) or ""
                whole = tokens + self.tokenizer(rest, add_special_tokens=False)["input_ids"]
                found = action_of(self.agent_format, self._said(whole))
                if not rest or found.action.casefold() != action.strip().casefold():
                    continue
            for end in range(len(tokens), len(whole)):
                ways[tuple(whole[:end])][whole[end]] += taken
            ways[tuple(whole)].update(dict.fromkeys(self.stop_tokens, taken))
        return ways


class TokenLogProbs(LogitsProcessor):
    """Records log pi(a_t|s_t) of the tokens that `generate` samples, keeping one step's [B, V] at a time.

    Args:
        temperature: of the sampling, which `generate` applies after this processor.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.previous: torch.Tensor | None = None  # [B, V] of the token that is sampled next
        self.taken: list[torch.Tensor] = []  # [B] a token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids[:, -1])
        self.previous = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def _take(self, tokens: torch.Tensor) -> None:
        if self.previous is not None:
            self.taken.append(self.previous.gather(1, tokens[:, None])[:, 0])

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] log-probabilities of all generated `tokens` [B, T]; what follows a row's end means nothing."""
        self._take(tokens[:, -1])
        return torch.stack(self.taken, dim=1)


def format_with_actions(
    env: EnvSpec, agent_format: AgentFormat | None, *, workers: bool = False, env_timeout: float | None = None
) -> AgentFormat:
    """`agent_format`, or the environment's own, of an agent with `legal_actions_only`.

    Raises:
        ValueError: the environment lists no legal actions, or the format cannot write them.
    """
    seen, own = first_look(env, workers=workers, env_timeout=env_timeout)
    if not seen.legal_actions:
        raise ValueError(
            "`legal_actions_only` needs to know what can be done: give the environment an attribute "
            "`legal_actions`, a sequence of strings."
        )
    fmt = own if agent_format is None else agent_format
    taking(fmt, seen.legal_actions[0], fmt.replace_action("", seen.legal_actions[0]))
    return fmt


def evaluate_model(
    model: Any,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    env: EnvSpec,
    *,
    episodes: int = 200,
    seed: int = 1_000_000,
    temperature: float = 0.0,
    num_envs: int = 64,
    max_completion_length: int = 256,
    legal_actions_only: bool = False,
    agent_format: AgentFormat | None = None,
    workers: bool = False,
    env_timeout: float | None = None,
    max_env_failures: int = 0,
    recorder: EpisodeRecorder | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Plays episodes with a model and measures them (`metrics.EpisodeMetrics`).

    The model is put into evaluation mode and back; torch's random state is left as it was, so that evaluating more or
    less often does not change a training run.

    Args:
        model: anything with `generate`.
        env, episodes, seed, num_envs, agent_format, workers, env_timeout, max_env_failures, progress: as
            `rollout.play_episodes`; the episodes that failures cost are not in the measures.
        temperature, max_completion_length, legal_actions_only: as `ModelPolicy`.
        recorder: writes the first episodes down, to be looked at; give it to one process only.
        distributed: the processes of a distributed run each play a part of the episodes, and all get the result; each
            must call. Weights that ZeRO-3 has split are gathered once, so that then too each must call.

    Raises:
        ValueError: `legal_actions_only` in an environment that lists none.
    """
    if legal_actions_only:
        agent_format = format_with_actions(env, agent_format, workers=workers, env_timeout=env_timeout)
    policy = ModelPolicy(
        model,
        processing_class,
        temperature=temperature,
        max_completion_length=max_completion_length,
        batch_size=num_envs,
        legal_actions_only=legal_actions_only,
        agent_format=agent_format,
    )
    state = PartialState() if distributed else None
    share = (0, 1) if state is None else (state.process_index, state.num_processes)
    was_training = model.training
    model.eval()  # which suspends activation checkpointing too, and so leaves the cache on
    device = torch.device(model.device)
    try:
        with ready_to_generate(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + share[0])
            played = play_episodes(
                env,
                policy,
                episodes=episodes,
                seed=seed,
                agent_format=agent_format,
                num_envs=num_envs,
                workers=workers,
                env_timeout=env_timeout,
                max_env_failures=max_env_failures,
                share=share,
                progress=progress,
            )
            rows = [measures(episode) for episode in (played if recorder is None else recorder.watch(played))]
        rows = rows if state is None else gather_object(rows)
        if not rows:
            raise EnvFailureError(
                f"None of the {episodes} episodes of {env!r} came to its end, and so few are no more than "
                f"`max_env_failures={max_env_failures}` allows. The warnings before say what the environment did."
            )
        return metrics_of(rows)
    finally:
        model.train(was_training)
