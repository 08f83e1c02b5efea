# SPDX-License-Identifier: Apache-2.0
"""OpenEnv environments, which run on a server, as environments of this package.

Contents: `OpenEnvAdapter`, `OpenEnvError`, `decode_picture`.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlmq_trl.envs.base import MAX_TURNS, OnInvalid, TextActionEnv, check_counts, checked_reward
from vlmq_trl.envs.domain import Domain

Action = Mapping[str, Any] | Callable[[str], Any | None]
FromObservation = str | Callable[[Any], Any]

DOMAIN = Domain("OpenEnv", "environments behind a server", envs={}, extra="openenv", modules=("openenv",))
PAUSE = 0.25  # seconds between attempts to connect
MAX_MESSAGE = 100 * 2**20  # bytes
MAX_PIXELS = 2**24
PICTURE_FILES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class OpenEnvError(RuntimeError):
    """The server cannot be reached, does not answer in time, or answers with an error; names its URL and what to do.

    The episode is lost; `reset` connects anew."""


@dataclass(frozen=True)
class _Chosen:
    """What a function made of the model's string."""

    text: str
    action: Any

    def __str__(self) -> str:
        return self.text


class OpenEnvAdapter(TextActionEnv):
    """An environment behind an OpenEnv server, acted on with words and seen as pictures or text.

        env = OpenEnvAdapter(
            "http://localhost:8000",
            action={"left": {"move": 0}, "right": {"move": 1}},
            task="Reach the goal.",
            text="message",
            picture=lambda observation: observation["screenshot"],
        )

    Each adapter has a connection, and so a session on the server, of its own; only the server that it was given is
    ever contacted. What the server sends is read as JSON and pictures, never executed. `reset` hands seed and options
    on (without a seed, one from `np_random`), so that equal seeds give equal episodes where the server's environment
    makes use of them. A reward of None counts 0; `done` terminates, unless the observation says that it is a
    truncation.

    Args:
        client: the server's URL (http, https, ws or wss), to which actions are sent as dictionaries; or an
            `openenv.core.EnvClient`, with whose own types and timeouts it is played. No other adapter may use that
            client; this one closes it.
        action: words for actions, or a function (the model's string, stripped) -> the client's action, or None if it
            is none. The function may raise: that too is an invalid action, and a warning. An action of the function's
            that the server refuses as malformed is invalid as well.
        task: what to do, for the prompt, or a function (first observation) -> that; words are listed behind it.
        text: a field of the observation, or a function of it, shown as text; longer ones lose their end.
        picture: a field of the observation, or a function of it, that `decode_picture` takes.
        picture_size: height and width of the pictures; None looks at one, for which it connects at once.
        text_length: the longest text, in characters.
        truncated: (observation) -> whether this is a truncation; by default, where the observation or its metadata has
            a true "truncated" or "TimeLimit.truncated".
        max_turns: turns after which an episode is truncated, since invalid actions alone would never end one: the
            server does not see them.
        connect_timeout: seconds for which a reset tries to reach the server, one that is starting for example.
        message_timeout: seconds for an answer of the server; for a URL only.
        invalid_penalty, on_invalid: as in `TextActionEnv`. The penalty is 0 here: what is little beside a reward
            depends on the environment.

    Raises:
        ImportError: openenv-core is missing.
        TypeError, ValueError: a bad argument, or a picture that does not decode.
        OpenEnvError: the server does not answer as it should; from `reset` and `step`, too.
    """

    reset_options = None  # the server's own

    def __init__(
        self,
        client: Any,
        action: Action,
        task: str | Callable[[Any], str] = "",
        *,
        text: FromObservation | None = None,
        picture: FromObservation | None = None,
        picture_size: tuple[int, int] | None = None,
        text_length: int = 4096,
        truncated: Callable[[Any], bool] | None = None,
        max_turns: int = MAX_TURNS,
        connect_timeout: float = 10.0,
        message_timeout: float = 60.0,
        render_mode: str | None = None,
        invalid_penalty: float = 0.0,
        on_invalid: OnInvalid = "noop",
    ) -> None:
        if text is None and picture is None:
            raise ValueError("OpenEnvAdapter: say by `text` or `picture` what of the observation the agent sees")
        check_counts("OpenEnvAdapter", max_turns=max_turns)
        if not (connect_timeout > 0 and message_timeout > 0):
            raise ValueError(f"OpenEnvAdapter: timeouts must be above 0, got {connect_timeout} and {message_timeout}")
        if render_mode is not None and picture is None:
            raise ValueError("OpenEnvAdapter: without `picture` there is nothing to render")
        self.actions = None if callable(action) else _checked_words(action)
        self.legal_actions = None if self.actions is None else tuple(self.actions)
        self._action_of = action if callable(action) else None
        self._task_of, self._text_of, self._picture_of = task, text, picture
        self._truncated_of = truncated or _says_truncated
        self.task = self._task(None) if isinstance(task, str) else ""
        self.max_turns, self.connect_timeout = int(max_turns), connect_timeout
        self.text_length = text_length if text is not None else 0
        self.picture_size = picture_size if picture is not None else None
        self._seen: Any = None  # the server's last observation
        self._decoded: NDArray[np.uint8] | None = None  # its picture
        self._refused = False  # the last action, by the server
        self.client, self.url = _client(client, connect_timeout, message_timeout)
        self._takes_seed = _takes(self.client.reset, "seed")
        try:
            if picture is not None and picture_size is None:
                self._see(self._reset_server({"seed": 0} if self._takes_seed else {}))
                height, width = self._decode().shape[:2]
                self.picture_size = height, width
            super().__init__(render_mode, invalid_penalty, on_invalid)
        except BaseException:
            self.close()
            raise

    # The game.

    def parse_env(self, action: Any) -> Any | None:
        """The action's word; without words, what the function makes of the string."""
        if self._action_of is None:
            return super().parse_env(action)
        if not isinstance(action, str):
            return None
        action = action.strip()
        try:
            made = self._action_of(action)
        except Exception as error:
            warnings.warn(
                f"The function `action` raised {type(error).__name__}: {error}. The action counts as invalid; let the "
                "function return None for such strings.",
                stacklevel=3,
            )
            return None
        return None if made is None else _Chosen(action, made)

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        if self._takes_seed:
            options["seed"] = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        self._running = False  # if the server fails
        result = self._reset_server(options)
        if result.done:
            raise OpenEnvError(f"The environment at {self.url} is done already after a reset; mend it.")
        self._see(result)
        self.task = self._task(result.observation)

    def step(self, action: str) -> Any:
        self._refused = False
        observation, reward, terminated, truncated, info = super().step(action)
        if self._refused:
            info |= {"valid": False, "action": ""}
        return observation, reward, terminated, truncated, info

    def _play(self, action: Any) -> tuple[float, bool, bool]:
        native = action.action if isinstance(action, _Chosen) else (self.actions or {})[action]
        try:
            result = self.client.step(native)
        except Exception as error:
            if _server_code(error) == "VALIDATION_ERROR" and isinstance(action, _Chosen):
                self._refused = True  # and its state is what it was
                return -self.invalid_penalty, self.on_invalid == "terminate", False
            raise self._lost("step", error, native) from error
        before = self._decoded
        self._see(result)
        if result.done and before is not None and _part(self._seen, self._picture_of) is None:
            self._decoded = before  # of an end that shows nothing, the last picture there was
        truncated = bool(self._truncated_of(result.observation))
        reward = 0.0 if result.reward is None else checked_reward(result.reward)
        return reward, bool(result.done) and not truncated, truncated

    def _see(self, result: Any) -> None:
        self._seen, self._decoded = result.observation, None

    def _task(self, observation: Any) -> str:
        task = self._task_of if isinstance(self._task_of, str) else self._task_of(observation)
        if not isinstance(task, str):
            raise TypeError(f"`task` gave {type(task).__name__}, not a string")
        words = f"Actions: {', '.join(self.legal_actions)}." if self.legal_actions else ""
        return " ".join(part for part in (task.strip(), words) if part)

    def _text(self) -> str:
        text = _part(self._seen, self._text_of)
        if not isinstance(text, str):
            raise ValueError(f"the text of the environment at {self.url} is {text!r:.100}, no string; see to `text`")
        text = text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates
        return text[: self.text_length]

    def _picture(self) -> NDArray[np.uint8]:
        return self._decode().copy()

    def _decode(self) -> NDArray[np.uint8]:
        if self._decoded is None:
            value = _part(self._seen, self._picture_of)
            try:
                self._decoded = decode_picture(value)
            except ValueError as error:
                raise ValueError(f"the picture of the environment at {self.url} {error}; see to `picture`") from error
        size = self._decoded.shape[:2]
        if self.picture_size is not None and size != tuple(self.picture_size):
            raise ValueError(
                f"the picture of the environment at {self.url} is {size[0]} x {size[1]} pixels, not "
                f"{self.picture_size[0]} x {self.picture_size[1]} as before; let `picture` give one size"
            )
        return self._decoded

    # The connection.

    def _reset_server(self, options: dict[str, Any]) -> Any:
        """Resets. Connects anew once, if the connection had died, and for `connect_timeout` seconds while the server
        is full: a session that was closed is free a moment later."""
        deadline = time.monotonic() + self.connect_timeout
        died = False
        while True:
            self._connect()
            try:
                return self.client.reset(**options)
            except Exception as error:
                lost = self._lost("reset", error)
                if not (time.monotonic() < deadline if _is_full(error) else _is_cut(error) and not died):
                    raise lost from error
                died = died or not _is_full(error)
            time.sleep(PAUSE)

    def _connect(self) -> None:
        """Connects, if there is no connection; tries for `connect_timeout` seconds."""
        deadline = time.monotonic() + self.connect_timeout
        while True:
            try:
                self.client.connect()
                return
            except Exception as error:
                if time.monotonic() + PAUSE > deadline:
                    raise OpenEnvError(
                        f"No OpenEnv server answers at {self.url} within {self.connect_timeout:g} s "
                        f"({_said(error)}). Start it, mend the URL, or raise connect_timeout."
                    ) from error
            time.sleep(PAUSE)

    def _lost(self, did: str, error: Exception, action: Any = None) -> OpenEnvError:
        """Gives up the session, since an answer may be under way still; the error to raise."""
        self._running = False
        self._disconnect()
        code, what = _server_code(error), f"The OpenEnv server at {self.url}"
        drop = "drop such episodes by `max_env_failures`"
        if did == "reset" and _is_full(error):
            return OpenEnvError(
                f"{what} takes no further session ({_said(error)}). Start it with a larger max_concurrent_envs, or "
                "play with a smaller num_envs."
            )
        if code == "VALIDATION_ERROR":
            return OpenEnvError(f"{what} refuses {did} {action!r:.200}; let `action` give what its /schema asks for.")
        if code is not None:
            return OpenEnvError(f"{what} failed in {did} ({_said(error)}). Mend the environment, or {drop}.")
        if isinstance(error, TimeoutError):
            return OpenEnvError(f"{what} did not answer {did} in time. Raise message_timeout, or {drop}.")
        if "1009" in str(error) or "too big" in str(error):
            return OpenEnvError(
                f"{what} sent more than the client takes in one message ({_said(error)}). Let it send pictures as PNG "
                "in base64, or make the client with a larger max_message_size_mb."
            )
        if _is_cut(error):
            return OpenEnvError(f"{what} closed the connection in {did} ({_said(error)}). Look at its log, or {drop}.")
        return OpenEnvError(f"{what} and the client do not understand each other in {did} ({_said(error)}).")

    def _disconnect(self) -> None:
        try:
            self.client.disconnect()
        except Exception:  # it is lost anyway
            pass

    def close(self) -> None:
        """Closes the client, and what it started (a container, for one made by `from_docker_image`)."""
        self._running = False
        self.client.close()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def decode_picture(value: Any) -> NDArray[np.uint8]:
    """A picture as JSON brings it, as uint8 [H, W, 3].

    Args:
        value: a PNG, JPEG, WebP, GIF or BMP as bytes, in base64, or as a data URL in base64; a PIL image; or nested
            lists or an array of integers in 0..255, [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. What is transparent
            becomes opaque.

    Raises:
        ValueError: none of that, or more than 2 ** 24 pixels; the message continues "the picture ...".
    """
    if isinstance(value, str):
        _, is_url, data = value.partition(";base64,")
        try:
            value = base64.b64decode("".join((data if is_url else value).split()), validate=True)
        except binascii.Error as error:
            raise ValueError(f"is a string, but not base64 ({error})") from None
    if isinstance(value, bytes | bytearray | memoryview):
        value = _opened(bytes(value))
    if isinstance(value, PIL.Image.Image):
        if value.mode.startswith(("I", "F")):
            raise ValueError(f"has more than 8 bits a pixel (mode {value.mode}); scale it to 0..255")
        return np.array(value.convert("RGB"))
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("is lists whose lengths differ") from None
    if array.dtype == object and array.ndim == 0:
        raise ValueError(f"is {value!r:.100}, of {type(value).__name__}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"is {type(value).__name__} of shape {list(array.shape)}, not [H, W, 3]; reshape it")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ValueError(f"has {array.shape[0]} x {array.shape[1]} pixels, more than {MAX_PIXELS}")
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
        raise ValueError(f"has values that are not integers in 0..255 ({array.dtype}); scale it")
    colours = array[..., :3] if array.shape[2] > 1 else array.repeat(3, axis=2)
    return np.array(colours, dtype=np.uint8)


def _opened(data: bytes) -> PIL.Image.Image:
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=PICTURE_FILES)
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"has {picture.height} x {picture.width} pixels, more than {MAX_PIXELS}")
        picture.load()
    except PIL.UnidentifiedImageError:
        raise ValueError(f"is no {', '.join(PICTURE_FILES)}: it begins with {data[:8]!r}") from None
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"is damaged ({error})") from None
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Clients and observations
# ---------------------------------------------------------------------------------------------------------------------


def _client(client: Any, connect_timeout: float, message_timeout: float) -> tuple[Any, str]:
    """A client whose methods wait for their answers, and the name of its server."""
    if isinstance(client, str):
        if urlsplit(client).scheme not in ("http", "https", "ws", "wss") or not urlsplit(client).hostname:
            raise ValueError(f"{client!r} is no URL of a server; write for example 'http://localhost:8000'")
        DOMAIN.require()
        url, client = client, _generic_client(client, connect_timeout, message_timeout)
    else:
        url = str(getattr(client, "_ws_url", None) or type(client).__name__)
    if hasattr(client, "sync"):  # openenv-core 0.2.2 and later: the client itself is asynchronous
        client = client.sync()
    missing = [name for name in ("connect", "reset", "step", "disconnect", "close") if not hasattr(client, name)]
    if missing:
        raise TypeError(f"client must be a URL or an openenv.core.EnvClient, got {type(client).__name__}")
    return client, url


def _generic_client(url: str, connect_timeout: float, message_timeout: float) -> Any:
    from openenv.core import GenericEnvClient

    class Client(GenericEnvClient):
        """Takes large messages in openenv-core 0.2.1 too, whose limit is 1 MiB: pictures as lists are larger."""

        def connect(self) -> Any:
            connected = super().connect()
            if not inspect.isawaitable(connected):
                self._ws.protocol.max_message_size = MAX_MESSAGE
            return connected

    return Client(url, connect_timeout_s=connect_timeout, message_timeout_s=message_timeout)


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _server_code(error: Exception) -> str | None:
    """The code of an error that the server sent; None for any other."""
    found = re.fullmatch(r"Server error: .*\(code: (\w+)\)", str(error), re.DOTALL)
    return found[1] if found and isinstance(error, RuntimeError) else None


def _is_full(error: Exception) -> bool:
    """Whether the server takes no further session: it says so and closes, which may be seen before what it says."""
    return _server_code(error) == "CAPACITY_REACHED" or type(error).__name__ == "ConnectionClosedOK"


def _is_cut(error: Exception) -> bool:
    """Whether the connection is gone."""
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] == "websockets"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _checked_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """The words in lower case."""
    if not isinstance(words, Mapping):
        raise TypeError(f"action must be words for actions, or a function, got {type(words).__name__}")
    checked = {str(word).strip().lower(): action for word, action in words.items()}
    if not checked or "" in checked or len(checked) < len(words):
        raise ValueError(f"the words of `action` must be distinct, not blank, whatever their case; got {list(words)}")
    return checked


def _part(observation: Any, wanted: FromObservation | None) -> Any:
    """A field of an observation, or what a function makes of it."""
    if callable(wanted):
        return wanted(observation)
    assert wanted is not None
    if isinstance(observation, Mapping):
        if wanted not in observation:
            raise ValueError(f"the observation has no field {wanted!r}, but {sorted(map(str, observation))}")
        return observation[wanted]
    if not hasattr(observation, wanted):
        raise ValueError(f"the observation, a {type(observation).__name__}, has no field {wanted!r}")
    return getattr(observation, wanted)


def _says_truncated(observation: Any) -> bool:
    """Whether the observation, or its metadata, says that the episode was cut off."""

    def says(holder: Any) -> bool:
        fields = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
        return any(fields.get(name) is True for name in ("truncated", "TimeLimit.truncated"))

    metadata = (
        observation.get("metadata") if isinstance(observation, Mapping) else getattr(observation, "metadata", {})
    )
    return says(observation) or says(metadata)
