# SPDX-License-Identifier: Apache-2.0
"""A turn as text and tokens, alike in play and in training: the chat template, its endings, the families' processors.

Contents: `check_chat_template`, `as_messages`, `with_pictures`, `chat_text`, `turn_opening`, `turn_ending`,
`stop_token_ids`, `text_tokens`, `completion_tokens`, `pictures`, `turn_processor`.
"""

from collections.abc import Iterable
from typing import Any

import PIL.Image
import torch
from transformers import BatchFeature, PaliGemmaProcessor, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from .trajectory import flatten_content
from .trajectory.episodes import has_image_parts, without_nulls


def check_chat_template(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Raises ValueError if there is no chat template, as with models that are only pretrained."""
    if getattr(processing_class, "chat_template", "the class renders without") is None:
        raise ValueError(
            f"{type(processing_class).__name__} has no chat template, by which turns become text. Models that are "
            "only pretrained (PaliGemma among them) come without: take an instruction-tuned one, set "
            "`processing_class.chat_template`, or give a `.jinja` file in `VLMQConfig(chat_template_path=...)`."
        )


# Where a processor names the text that stands for a picture (a video, a sound), which it replaces by what it is given.
MARKS = ("image_token", "video_token", "audio_token", "boi_token")


def as_messages(
    messages: Iterable[dict[str, Any]],
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    images: Iterable[Any] = (),
) -> list[dict[str, Any]]:
    """Messages as the processor's chat template takes them, with these images in their places.

    In a text that holds a processor's own mark of a picture, written by an environment or an agent, a space breaks the
    mark ("< image>"): the processor would look for a picture there.
    """
    prepared = with_pictures(messages, images)
    if not isinstance(processing_class, ProcessorMixin):
        return flatten_content(prepared)
    return [
        {
            **message,
            "content": [
                {**part, "text": _without_marks(part["text"], processing_class)} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in prepared
    ]


def with_pictures(messages: Iterable[dict[str, Any]], images: Iterable[Any]) -> list[dict[str, Any]]:
    """TRL's `prepare_multimodal_messages`, but that it adds no pictures to messages that say where theirs stand, and
    leaves out what is null in a part, where TRL and chat templates would take an `image` for one."""
    messages = without_nulls(list(messages)) or []
    if has_image_parts(messages):
        contents = [[{"type": "text", "text": c}] if isinstance(c := m["content"], str) else c for m in messages]
        messages = [{**m, "content": content} for m, content in zip(messages, contents, strict=True)]
    return prepare_multimodal_messages(messages, images=list(images))


def _without_marks(text: str, processor: ProcessorMixin) -> str:
    for mark in {str(getattr(processor, name, None) or "") for name in MARKS} - {""}:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def chat_text(
    example: dict[str, list[dict[str, Any]]], processing_class: ProcessorMixin | PreTrainedTokenizerBase
) -> dict[str, str]:
    """TRL's `apply_chat_template`, but that the `prompt` of a turn is what play generates from.

    The two differ where the generation prompt ends with text that the template leaves out of an answered turn, such as
    `<think>`, and that TRL cuts off. There the completion is its bare text, and what ends a turn.

    Args:
        example: `prompt`, and the `completion` of a turn: one message.
    """
    rendered = apply_chat_template(example, processing_class)
    if "completion" not in example:
        return rendered
    prompt = apply_chat_template({"prompt": example["prompt"]}, processing_class)["prompt"]
    if rendered["prompt"] == prompt:
        return rendered
    content = example["completion"][0]["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"prompt": prompt, "completion": text + turn_ending(processing_class)}


MARKER = "0answer0"  # in no template, as "<answer>" may be


def _answered(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> dict[str, list[dict[str, Any]]]:
    return {
        "prompt": as_messages([{"role": "user", "content": "question"}], processing_class),
        "completion": as_messages([{"role": "assistant", "content": MARKER}], processing_class),
    }


def turn_opening(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """What the chat template puts between the generation prompt and an assistant's text, so that a model learns to say
    it: a space after SmolVLM's "Assistant:", an empty `<think>` block of Qwen3."""
    return chat_text(_answered(processing_class), processing_class)["completion"].partition(MARKER)[0]


def turn_ending(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """What the chat template puts after an assistant's text."""
    return apply_chat_template(_answered(processing_class), processing_class)["completion"].rpartition(MARKER)[2]


def stop_token_ids(processing_class: ProcessorMixin | PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Every token that ends an assistant's turn: the generation config's, the tokenizer's, the chat template's own.

    The template's is read off a rendered turn: many families close an assistant message with a token
    (`<end_of_utterance>`, `<|im_end|>`) that is not their `eos_token`.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    configured = getattr(generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    ending = tokenizer(turn_ending(processing_class), add_special_tokens=False)["input_ids"]
    if ending and ending[0] in tokenizer.all_special_ids:
        ids.add(ending[0])
    return sorted(ids - {None})


def text_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """The tokens of a text-only turn: the prompt's, as play generates from them, and those that follow.

    Some tokenizers (SentencePiece's) begin another text with another token than goes on in the midst of one.
    """
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    return start, tokenizer(completion, add_special_tokens=False)["input_ids"]  # a token would reach over the border


def completion_tokens(processing_class: ProcessorMixin | PreTrainedTokenizerBase, response: str) -> list[int]:
    """The tokens of a response as training sees it, by the chat template, its end token included."""
    example = {
        "prompt": as_messages([{"role": "user", "content": ""}], processing_class),
        "completion": as_messages([{"role": "assistant", "content": response}], processing_class),
    }
    rendered = chat_text(example, processing_class)
    if not isinstance(processing_class, ProcessorMixin):
        return text_tokens(processing_class, **rendered)[1]
    return list(processing_class.tokenizer(rendered["completion"], add_special_tokens=False)["input_ids"])


def pictures(images: Iterable[Any]) -> list[PIL.Image.Image]:
    """Images as processors take them: of an array some refuse to tell rows from channels, some refuse it altogether.

    Args:
        images: PIL images, or uint8 arrays [H, W, 3].
    """
    return [image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image) for image in images]


def turn_processor(processing_class: Any) -> Any:
    """What takes a processor's place where turns become tensors: itself, for all families but PaliGemma."""
    return _PaliGemma(processing_class) if isinstance(processing_class, PaliGemmaProcessor) else processing_class


class _PaliGemma:
    """Its processor as TRL's collator and play call it.

    Its own call wants a picture with every text, completions included, and adds labels. Its model attends to a prompt
    in both directions and to a completion causally: 0 and 1 in `token_type_ids`.

    Raises:
        ValueError: from a call, if a prompt has no picture.
    """

    def __init__(self, processor: PaliGemmaProcessor):
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, text: list[str], images: list[list] | None = None, **kwargs: Any) -> BatchFeature:
        if images is not None:
            if not all(images):
                raise ValueError(
                    f"Row {[len(of_row) for of_row in images].index(0)} of this batch has no picture, and PaliGemma's "
                    "processor takes no prompt without: give every turn a picture, or use another family."
                )
            inputs = self.processor(images=images, text=text, **kwargs)
            del inputs["labels"]
            return inputs
        inputs = self.processor.tokenizer(text, **kwargs)
        return BatchFeature({**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])})
