# SPDX-License-Identifier: Apache-2.0
"""Messages from observations, and actions from responses.

An agent format is the contract between an environment and a language model:

- `AgentFormat.build_prompt` turns the task text, an observation and the last turns into TRL's conversational messages;
- `AgentFormat.render` writes a demonstrator's decision as the response that a model should learn to give;
- `AgentFormat.replace_action` puts another action into a response, to explore;
- `AgentFormat.parse` reads the action out of any response. It is total: any string gives a `ParsedAction`, in time
  linear in the string's length, and nothing is ever raised.

Parsing is syntactic: whether an action is legal is the environment's business.

Contents: `ParsedAction`, `Exchange`, `AgentFormat`, `PlainFormat` (the response is the action), `JSONFormat`
(`{"action": ...}`), `JSONCoTFormat` (the state read aloud, thoughts, then the action, as in RL4VLM, arXiv 2405.10292),
`CallableFormat` (a user's own functions), `make_format`, `default_format`.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image

Message = dict[str, Any]


@dataclass(frozen=True)
class ParsedAction:
    """What a response asks for."""

    action: str  # stripped of surrounding white space; "" when not valid
    valid: bool  # whether the response follows the format


@dataclass(frozen=True)
class Exchange:
    """One past turn: what the agent saw and what it answered."""

    observation: Mapping[str, Any]  # {"image": uint8 [H, W, 3], "text": str}, either key may be missing
    response: str


INVALID = ParsedAction("", False)
FORMAT_SAMPLE = 64  # rows of a data set that show in which format they answer


def _accept(action: str) -> ParsedAction:
    """`action` as a parsed action; invalid when blank or not encodable as UTF-8 (a lone surrogate)."""
    action = action.strip()
    if not action:
        return INVALID
    try:
        action.encode("utf-8")
    except UnicodeEncodeError:
        return INVALID
    return ParsedAction(action, True)


def _observation_parts(
    observation: Mapping[str, Any], text: str = "", may_be_empty: bool = False
) -> tuple[list[Message], list[np.ndarray]]:
    """Content parts of one user message, image first, then `text` and the observation's own text in one part.

    Args:
        may_be_empty: something was told before, the task for instance.

    Raises:
        TypeError: the observation is not a mapping, its image is not a uint8 array [H, W, 3], or its text is no text.
        ValueError: it has neither an image nor a text, or there is nothing at all to show.
    """
    if not isinstance(observation, Mapping):
        raise TypeError(
            f"An observation must be a mapping with the keys 'image' and/or 'text', got {type(observation).__name__}. "
            "Wrap the environment so that it returns {'image': uint8 [H, W, 3], 'text': str}."
        )
    parts: list[Message] = []
    images: list[np.ndarray] = []
    image, said = observation.get("image"), observation.get("text")
    if image is None and said is None:  # the task's text alone would have the agent play blind
        raise ValueError(
            f"The observation has neither 'image' nor 'text'; its keys are {list(observation)}. Wrap the environment "
            "so that it returns {'image': uint8 [H, W, 3], 'text': str}, or use a `CallableFormat(prompt_fn=...)`."
        )
    if said is not None and not isinstance(said, str):
        raise TypeError(f"observation['text'] must be a string, got {type(said).__name__}.")
    if image is not None:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise TypeError(
                f"observation['image'] must be uint8 of shape [H, W, 3], got {array.dtype} of shape "
                f"{list(array.shape)}. Convert it in an observation wrapper."
            )
        images.append(array)
        parts.append({"type": "image"})
    lines = [line for line in (text, said) if line]
    if lines or (may_be_empty and not parts):
        parts.append({"type": "text", "text": "\n".join(lines)})
    if not parts:
        raise ValueError("Nothing to show the agent: the observation's text is empty, and there is no task text.")
    return parts, images


@dataclass(frozen=True)
class AgentFormat:
    """Base of all formats, and the prompt that they share."""

    history: int = 0  # past turns shown before the current observation
    system_prompt: str | None = None  # an optional system message

    name = "base"

    def __post_init__(self) -> None:
        if not isinstance(self.history, int):
            raise TypeError(f"history must be a whole number of turns, got {self.history!r}.")
        if self.history < 0:
            raise ValueError(f"history must be >= 0, got {self.history}.")

    def instruction(self) -> str:
        """The line that asks for this format, appended to the task text ("" for none)."""
        return ""

    def build_prompt(
        self, task: str, observation: Mapping[str, Any], history: Sequence[Exchange] = ()
    ) -> tuple[list[Message], list[np.ndarray]]:
        """TRL conversational messages for the agent's next answer.

        The first user message carries the task text and the format's instruction; the last `self.history` exchanges
        come as user and assistant messages before the current observation. Every message but the system's has a list
        of parts as its content, `{"type": "image"}` or `{"type": "text", "text": ...}`.

        Returns:
            messages: the conversation, ending with a user message.
            images: uint8 arrays [H, W, 3], in the order of the image parts.

        Raises:
            TypeError, ValueError: an observation that is not `{"image": uint8 [H, W, 3], "text": str}`, of which one
                may be missing.
        """
        messages: list[Message] = []
        images: list[np.ndarray] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        past = list(history)[-self.history :] if self.history else []
        header = "\n".join(line for line in (task, self.instruction()) if line)
        told = bool(header)
        for exchange in past:
            parts, shown = _observation_parts(exchange.observation, header, told)
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": exchange.response}]})
            images.extend(shown)
            header = ""
        parts, shown = _observation_parts(observation, header, told)
        messages.append({"role": "user", "content": parts})
        images.extend(shown)
        return messages, images

    def render(self, action: str, reading: Mapping[str, str] | None = None, thoughts: str = "") -> str:
        """The response in which a demonstrator takes `action`; `parse` gives the action back."""
        raise NotImplementedError

    def parse(self, response: str) -> ParsedAction:
        """The action in `response`. Total: never raises, linear time."""
        raise NotImplementedError

    def reads(self, response: str, reading: Mapping[str, str]) -> bool | None:
        """Whether `response` reads the state aloud as `reading` has it; None where the format reads nothing aloud."""
        return None

    def reaches_action(self, response: str) -> bool:
        """Whether a response that has come so far has come to its action: where `action_temperature` and
        `legal_actions_only` begin, and the scope "action" of filter and critic."""
        return True

    def rest_of(self, response: str, action: str) -> str | None:
        """What may follow a response that has come to its action, for it to take `action`; None: nothing is known."""
        whole = self.replace_action(response, action)
        return whole[len(response) :] if whole.startswith(response) else None

    def replace_action(self, response: str, action: str) -> str:
        """A response that takes `action`, and keeps of `response` what stands before its action where the format has
        such a thing. For exploration and `legal_actions_only`; takes any string."""
        return self.render(action)


@dataclass(frozen=True)
class PlainFormat(AgentFormat):
    """The response is the action itself."""

    name = "plain"

    def render(self, action: str, reading: Mapping[str, str] | None = None, thoughts: str = "") -> str:
        return action

    def parse(self, response: str) -> ParsedAction:
        return _accept(response)


_ACTION_KEY = re.compile(r"[\"']action[\"']\s*:\s*")
_MAX_JSON_CANDIDATES = 16
_NO_ACTIONS = ("null", "true", "false", "None", "True", "False", "NaN", "Infinity", "-Infinity")


def _balanced_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each balanced `{...}` in `text`, by increasing end; quotes count inside braces only."""
    spans, starts = [], []
    in_string = escaped = False
    for i, char in enumerate(text):
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == "{":
            starts.append(i)
        elif char == "}":
            if starts:
                spans.append((starts.pop(), i + 1))
        elif char == '"' and starts:
            in_string = True
    return spans


def _reject_constant(token: str) -> None:
    raise ValueError(token)


def _after_action_key(text: str) -> ParsedAction:
    """The value after the last `"action":` of a text that is not valid JSON."""
    end = -1
    for match in _ACTION_KEY.finditer(text):
        end = match.end()
    if end < 0:
        return INVALID
    rest = text[end:]
    quote = rest[:1]
    if quote in ('"', "'") and quote:
        body = re.match(r"(?:[^\\\n" + quote + r"]|\\.)*", rest[1:])
        value = body.group() if body else ""
        if quote == '"' and "\\" in value:
            try:
                value = json.loads(f'"{value}"')
            except (ValueError, RecursionError):
                return INVALID
        return _accept(value)
    value = re.split(r"[,}\n]", rest, maxsplit=1)[0].strip()
    if value[:1] in ("[", "{", '"', "'") or value in _NO_ACTIONS:
        return INVALID
    return _accept(value)


def parse_json_action(response: str) -> ParsedAction:
    """The `"action"` of a JSON answer that may stand inside other text, or be cut off.

    The last syntactically valid JSON object with the key "action" decides (an object before the objects inside it);
    its value must be a string that is not blank, or a number. Without such an object, the text after the last
    `"action":` counts, up to the closing quote, or for a bare word up to a comma, brace or line end. At most 16
    objects are tried, so that time stays linear in the length.

    >>> parse_json_action('Sure! {"thoughts": "2 < 4", "action": "+"}')
    ParsedAction(action='+', valid=True)
    >>> parse_json_action('{"thoughts": "2 < 4", "action": "+')
    ParsedAction(action='+', valid=True)
    >>> parse_json_action('{"thoughts": "2 < 4"}')
    ParsedAction(action='', valid=False)
    """
    spans = _balanced_spans(response)
    for start, end in spans[: -_MAX_JSON_CANDIDATES - 1 : -1]:
        try:  # numbers stay as they are written: no overflow, no rounding
            value = json.loads(
                response[start:end], parse_int=str, parse_float=str, parse_constant=_reject_constant, strict=False
            )
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and "action" in value:
            action = value["action"]
            return _accept(action) if isinstance(action, str) else INVALID
    return _after_action_key(response)


def replace_json_action(response: str, action: str) -> str:
    """The JSON answer `response` with another action; whatever follows its last `"action":` is left out.

    >>> replace_json_action('{"thoughts": "2 < 4", "action": "up!', "+")
    '{"thoughts": "2 < 4", "action": "+"}'
    """
    written = f'"action": {json.dumps(action, ensure_ascii=False)}}}'
    keys = list(_ACTION_KEY.finditer(response))
    replaced = response[: keys[-1].start()] + written if keys else "{" + written
    # A text that is no JSON may read in another way with the new end.
    return replaced if parse_json_action(replaced) == _accept(action) else "{" + written


def rest_of_json_action(response: str, action: str) -> str | None:
    """What may follow a JSON answer that has come to its action, however it has spelt its key and begun the value.

    >>> rest_of_json_action('{"action" : "', "up")
    'up"}'
    """
    keys = list(_ACTION_KEY.finditer(response))
    begun = response[keys[-1].end() :] if keys else ""
    for written in (json.dumps(action, ensure_ascii=False), f"'{action}'"):
        rest = written[len(begun) :] + "}"
        if written.startswith(begun) and parse_json_action(response + rest) == _accept(action):
            return rest
    return None


@dataclass(frozen=True)
class JSONFormat(AgentFormat):
    """The response is `{"action": ...}` and nothing else is asked for."""

    name = "json"

    def instruction(self) -> str:
        return 'Answer as JSON with the key "action".'

    def render(self, action: str, reading: Mapping[str, str] | None = None, thoughts: str = "") -> str:
        return json.dumps({"action": action}, ensure_ascii=False)

    def parse(self, response: str) -> ParsedAction:
        return parse_json_action(response)

    def reaches_action(self, response: str) -> bool:
        return _ACTION_KEY.search(response) is not None

    def rest_of(self, response: str, action: str) -> str | None:
        return rest_of_json_action(response, action)

    def replace_action(self, response: str, action: str) -> str:
        return replace_json_action(response, action)


@dataclass(frozen=True)
class JSONCoTFormat(AgentFormat):
    """The response reads the state aloud, says a thought, and ends with the action (RL4VLM's chain of thought).

    >>> JSONCoTFormat(reading_fields=("current number",)).render("+", {"current number": "2"}, "2 is low")
    '{"current number": "2", "thoughts": "2 is low", "action": "+"}'
    """

    reading_fields: tuple[str, ...] = ()  # keys of the reading, in order

    name = "json_cot"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reading_fields", tuple(self.reading_fields))
        clash = {"thoughts", "action"} & set(self.reading_fields)
        if clash:
            raise ValueError(f"reading_fields must not contain {sorted(clash)}: these keys belong to the format.")

    def instruction(self) -> str:
        keys = ", ".join(f'"{key}"' for key in (*self.reading_fields, "thoughts", "action"))
        return f"Answer as JSON with the keys {keys}."

    def render(self, action: str, reading: Mapping[str, str] | None = None, thoughts: str = "") -> str:
        reading = reading or {}
        missing = [key for key in self.reading_fields if key not in reading]
        if missing:
            raise ValueError(f"The reading lacks {missing}; this format needs {list(self.reading_fields)}.")
        answer = {key: str(reading[key]) for key in self.reading_fields}
        return json.dumps({**answer, "thoughts": thoughts, "action": action}, ensure_ascii=False)

    def parse(self, response: str) -> ParsedAction:
        return parse_json_action(response)

    def reads(self, response: str, reading: Mapping[str, str]) -> bool | None:
        if not self.reading_fields or not all(key in reading for key in self.reading_fields):
            return None
        pairs = (json.dumps({key: str(reading[key])}, ensure_ascii=False)[1:-1] for key in self.reading_fields)
        return all(pair in response for pair in pairs)

    def reaches_action(self, response: str) -> bool:
        return _ACTION_KEY.search(response) is not None

    def rest_of(self, response: str, action: str) -> str | None:
        return rest_of_json_action(response, action)

    def replace_action(self, response: str, action: str) -> str:
        return replace_json_action(response, action)


@dataclass(frozen=True)
class CallableFormat(AgentFormat):
    """A format from a user's own functions; what is not given, `history` and `system_prompt` too, is as in `base`."""

    # (task, observation, history) -> (messages, images)
    prompt_fn: Callable[..., tuple[list[Message], list[np.ndarray]]] | None = None
    # response -> the action, or None when the response does not follow the format, or a ParsedAction
    parse_fn: Callable[[str], str | ParsedAction | None] | None = None
    # (action, reading, thoughts) -> response
    render_fn: Callable[[str, Mapping[str, str], str], str] | None = None
    base: AgentFormat = field(default_factory=PlainFormat)

    name = "callable"

    def __post_init__(self) -> None:
        super().__post_init__()
        history = self.history or self.base.history
        system_prompt = self.base.system_prompt if self.system_prompt is None else self.system_prompt
        object.__setattr__(self, "history", history)
        object.__setattr__(self, "system_prompt", system_prompt)
        base = copy.copy(self.base)  # not `replace`: a user's format may have an `__init__` of its own
        object.__setattr__(base, "history", history)
        object.__setattr__(base, "system_prompt", system_prompt)
        object.__setattr__(self, "base", base)

    def build_prompt(
        self, task: str, observation: Mapping[str, Any], history: Sequence[Exchange] = ()
    ) -> tuple[list[Message], list[np.ndarray]]:
        if self.prompt_fn is None:
            return self.base.build_prompt(task, observation, history)
        return self.prompt_fn(task, observation, history)

    def render(self, action: str, reading: Mapping[str, str] | None = None, thoughts: str = "") -> str:
        if self.render_fn is None:
            return self.base.render(action, reading, thoughts)
        return self.render_fn(action, reading or {}, thoughts)

    def parse(self, response: str) -> ParsedAction:
        """As `AgentFormat.parse`: an exception in the user's function is an invalid response, and a warning."""
        if self.parse_fn is None:
            return self.base.parse(response)
        try:
            parsed = self.parse_fn(response)
        except Exception as error:
            warnings.warn(
                f"The agent format's parse function raised {type(error).__name__}: {error}. "
                "The response counts as invalid; let the function return None for such responses.",
                stacklevel=2,
            )
            return INVALID
        if isinstance(parsed, ParsedAction):
            parsed = parsed.action if parsed.valid else None
        return _accept(parsed) if isinstance(parsed, str) else INVALID

    def reads(self, response: str, reading: Mapping[str, str]) -> bool | None:
        return self.base.reads(response, reading) if self.render_fn is None else None

    def reaches_action(self, response: str) -> bool:
        return self.base.reaches_action(response)

    def rest_of(self, response: str, action: str) -> str | None:
        return self.base.rest_of(response, action) if self.render_fn is None else super().rest_of(response, action)

    def replace_action(self, response: str, action: str) -> str:
        if self.render_fn is None:
            return self.base.replace_action(response, action)
        return self.render_fn(action, {}, "")


def make_format(
    name: str, *, reading_fields: Sequence[str] = (), history: int = 0, system_prompt: str | None = None
) -> AgentFormat:
    """The format called `name`: "plain", "json" or "json_cot" (the only one that uses `reading_fields`).

    Raises:
        ValueError: an unknown name.
    """
    if name == "plain":
        return PlainFormat(history, system_prompt)
    if name == "json":
        return JSONFormat(history, system_prompt)
    if name == "json_cot":
        return JSONCoTFormat(history, system_prompt, tuple(reading_fields))
    raise ValueError(f"Unknown agent format {name!r}: use 'plain', 'json' or 'json_cot', or pass an AgentFormat.")


def format_arguments(agent_format: AgentFormat) -> dict[str, Any] | None:
    """The arguments by which `make_format` makes it again; None if it cannot (a user's own class or functions)."""
    fields = getattr(agent_format, "reading_fields", ())
    arguments: dict[str, Any] = {"name": agent_format.name, "history": agent_format.history}
    arguments |= {"system_prompt": agent_format.system_prompt, "reading_fields": list(fields)}
    try:
        return arguments if make_format(**arguments) == agent_format else None
    except ValueError:
        return None


def prompt_of(
    agent_format: AgentFormat, task: str, observation: Mapping[str, Any], history: Sequence[Exchange] = ()
) -> tuple[list[Message], list[np.ndarray]]:
    """`agent_format.build_prompt`, which may be a user's own.

    Raises:
        TypeError: it does not return messages and images.
    """
    made = agent_format.build_prompt(task, observation, history)
    pair = isinstance(made, tuple | list) and len(made) == 2
    if not pair or not all(isinstance(part, tuple | list) for part in made):
        raise TypeError(
            f"The agent format's method {type(agent_format).__name__}.build_prompt gave {made!r:.100}. It must give "
            "two lists, `(messages, images)`, the second empty where there is no picture."
        )
    messages, images = made
    return messages, [np.asarray(x.convert("RGB")) if isinstance(x, PIL.Image.Image) else x for x in images]


def action_of(agent_format: AgentFormat, response: str) -> ParsedAction:
    """`agent_format.parse`, which may be a user's own.

    Raises:
        RuntimeError: it raises.
        TypeError: it does not return a `ParsedAction`.
    """
    method = f"The agent format's method {type(agent_format).__name__}.parse"
    wanted = "It must give a ParsedAction for any text, ParsedAction('', valid=False) where that makes no sense."
    try:
        parsed = agent_format.parse(response)
    except Exception as error:
        raise RuntimeError(
            f"{method} raised {type(error).__name__}: {error}, given {response!r:.100}. {wanted}"
        ) from error
    if not (isinstance(parsed, ParsedAction) and isinstance(parsed.action, str)):
        raise TypeError(f"{method} gave {parsed!r:.100}. {wanted}")
    return parsed


def taking(agent_format: AgentFormat, action: str, response: str) -> str:
    """`response`, which the format has written to take this action; a blank one may make no sense to it.

    Raises:
        ValueError: the format does not find that action in it, so that the environment would never be given it.
    """
    found = action_of(agent_format, response)
    if action.strip() and found.action.casefold() != action.strip().casefold():
        reads = repr(found.action) if found.valid else "no action at all"
        own = "a `render_fn`" if isinstance(agent_format, CallableFormat) else "`render` and `replace_action`"
        raise ValueError(
            f"The agent format {agent_format.name!r} writes the action {action!r} as {response!r:.100}, and finds "
            f"{reads} in it. Give it {own} that writes what its parser reads, or take another action or format."
        )
    return response


def warn_of_another_format(agent_format: AgentFormat, dataset: Any) -> None:
    """Says so if the format that will read the agent's answers finds no action in those that it learns from."""
    if "action" not in dataset.column_names:
        return
    columns = [name for name in ("completion", "action", "valid") if name in dataset.column_names]
    rows = dataset.with_format(None).select_columns(columns).select(range(min(FORMAT_SAMPLE, len(dataset))))
    valid = [row for row in rows if row["action"] and row.get("valid", True)]
    told = [(row["completion"][0]["content"], row["action"]) for row in valid]
    read = [(action_of(agent_format, response).action, action) for response, action in told]
    if read and not any(found.strip().casefold() == action.strip().casefold() for found, action in read):
        response, action = told[0]
        warnings.warn(
            f"{type(agent_format).__name__}, in which the agent will play, finds the action in none of the first "
            f"{len(told)} valid responses of the training data, {action!r} in {response!r:.100} for instance. Give "
            "the trainer the `agent_format` that the data was made with.",
            stacklevel=3,
        )


def check_format(agent_format: Any) -> None:
    """Raises TypeError unless it is an `AgentFormat`, or None (the environment's own)."""
    if agent_format is not None and not isinstance(agent_format, AgentFormat):
        hint = f"make_format({agent_format!r})" if isinstance(agent_format, str) else "CallableFormat(parse_fn=...)"
        raise TypeError(f"agent_format must be an AgentFormat, got {agent_format!r}; pass for example {hint}.")


def default_format(env: Any) -> AgentFormat:
    """The environment's own format: "json_cot" with its `reading_fields` where it has any, else "plain"."""
    fields = tuple(getattr(env.unwrapped, "reading_fields", ()))
    return make_format("json_cot", reading_fields=fields) if fields else make_format("plain")
