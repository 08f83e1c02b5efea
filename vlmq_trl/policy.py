# SPDX-License-Identifier: Apache-2.0
"""A model as a policy: requests answered by one batched `generate`, and its evaluation in an environment.

Contents: `stop_token_ids`, `ModelPolicy`, `evaluate_model`.
"""

from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from .agent_format import AgentFormat
from .rollout import EnvSpec, Request, Response, episode_metrics, play_episodes
from .trajectory import flatten_content


def stop_token_ids(processing_class: ProcessorMixin | PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Every token that ends an assistant's turn: the generation config's, the tokenizer's, the chat template's own.

    The template's is read off a rendered turn: many families close an assistant message with a token
    (`<end_of_utterance>`, `<|im_end|>`) that is not their `eos_token`.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    configured = getattr(generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    multimodal = isinstance(processing_class, ProcessorMixin)
    marker = "answer"

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if multimodal else text}

    example = {"prompt": [message("user", "question")], "completion": [message("assistant", marker)]}
    completion = apply_chat_template(example, processing_class)["completion"]
    ending = tokenizer(completion.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
    if ending and ending[0] in tokenizer.all_special_ids:
        ids.add(ending[0])
    return sorted(ids - {None})


# What a model's own generation config may hold and `generate` would add: the policy is the softmax of the logits.
UNTOUCHED_LOGITS = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
FULL_SUPPORT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


class ModelPolicy:
    """Answers requests with a model's generations, of the logits as they are: the most likely token, or a sample from
    the softmax; penalties and cut-offs of the model's own generation config do not count.

    Greedy answers are deterministic, so equal requests are generated once and remembered for this object's life: make
    a new one when the weights change.

    Args:
        model: anything with `generate`.
        processing_class: its processor, or tokenizer for text-only models.
        temperature: 0 is greedy.
        max_completion_length: longest response in tokens.
        batch_size: largest number of rows in one `generate`.
    """

    def __init__(
        self,
        model: Any,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        temperature: float = 0.0,
        max_completion_length: int = 256,
        batch_size: int = 64,
    ):
        self.model, self.processing_class, self.batch_size = model, processing_class, batch_size
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        sampling = {"do_sample": True, "temperature": temperature, **FULL_SUPPORT} if temperature else {}
        self.generation_config = GenerationConfig(
            **{"do_sample": False, **UNTOUCHED_LOGITS, **sampling},
            max_new_tokens=max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=stop_token_ids(processing_class, model.generation_config),
            use_cache=True,
        )
        self.memory: dict[Any, str] | None = None if temperature else {}

    def act(self, requests: list[Request]) -> list[Response]:
        """Answers all requests, each with the text of its response."""
        rows = [self._render(request) for request in requests]
        if self.memory is None:
            texts = self._generate_all(rows)
        else:
            keys = [
                (text, *((image.shape, sha256(image.tobytes()).digest()) for image in images)) for text, images in rows
            ]
            new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self.memory}
            self.memory.update(zip(new, self._generate_all(list(new.values())), strict=True))
            texts = [self.memory[key] for key in keys]
        return [Response(text=text) for text in texts]

    def _render(self, request: Request) -> tuple[str, list[np.ndarray]]:
        prompt = prepare_multimodal_messages(request.prompt, images=list(request.images))
        if not isinstance(self.processing_class, ProcessorMixin):
            prompt = flatten_content(prompt)
        return apply_chat_template({"prompt": prompt}, self.processing_class)["prompt"], list(request.images)

    def _generate_all(self, rows: list[tuple[str, list[np.ndarray]]]) -> list[str]:
        return [
            text
            for start in range(0, len(rows), self.batch_size)
            for text in self._generate(rows[start : start + self.batch_size])
        ]

    @torch.no_grad()
    def _generate(self, rows: list[tuple[str, list[np.ndarray]]]) -> list[str]:
        images = [images for _, images in rows]
        kwargs = {"images": images} if any(images) else {}
        inputs = self.processing_class(
            text=[text for text, _ in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
            **kwargs,
        ).to(self.model.device)
        tokens = self.model.generate(**inputs, generation_config=self.generation_config)
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


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
    agent_format: AgentFormat | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Plays episodes with a model and measures them (`metrics.EpisodeMetrics`).

    The model is put into evaluation mode and back; torch's random state is left as it was, so that evaluating more or
    less often does not change a training run.

    Args:
        model: anything with `generate`.
        env, episodes, seed, num_envs, agent_format, progress: as `rollout.play_episodes`.
        temperature, max_completion_length: as `ModelPolicy`.
    """
    policy = ModelPolicy(
        model,
        processing_class,
        temperature=temperature,
        max_completion_length=max_completion_length,
        batch_size=num_envs,
    )
    was_training = model.training
    model.eval()  # which suspends activation checkpointing too, and so leaves the cache on
    device = torch.device(model.device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return episode_metrics(
                play_episodes(
                    env,
                    policy,
                    episodes=episodes,
                    seed=seed,
                    agent_format=agent_format,
                    num_envs=num_envs,
                    progress=progress,
                )
            )
    finally:
        model.train(was_training)
