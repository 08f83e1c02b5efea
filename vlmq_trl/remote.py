# SPDX-License-Identifier: Apache-2.0
"""A policy behind an OpenAI-compatible chat endpoint (vLLM, SGLang, `transformers serve`), with images.

HTTP is the standard library's. `huggingface_hub.InferenceClient` would do two things that must not happen here: it
refuses every address, this machine's own too, where `HF_HUB_OFFLINE` is set, as it is on many clusters; and without a
key it sends the user's Hub token to whatever address it is given.

Contents: `ChatError`, `ChatPolicy`.
"""

import base64
import io
import ipaddress
import json
import logging
import math
import random
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener
from urllib.request import Request as HTTPRequest
from warnings import warn

import numpy as np
import PIL.Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .chat import completion_tokens, with_pictures
from .rollout import Request, Response

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds before the first repetition, which doubles, and before any
REMEMBERED_IMAGES = 512
SHOWN = 500  # characters of a server's text in an error
OWN_FIELDS = {"model", "messages", "stream", "n"}  # of a request, not to be set through `extra`

_spread = random.Random()  # of repetitions; the global generator belongs to the training run


class ChatError(RuntimeError):
    """The endpoint cannot be reached, refuses a request, or answers something else than a chat completion."""


class _Failure(Exception):
    """One attempt failed.

    Args:
        status: None: no answer.
        busy: worth another attempt whatever the status.
    """

    def __init__(self, status: int | None, text: str, retry_after: float | None = None, busy: bool = False):
        super().__init__(status, text)
        self.status, self.text, self.retry_after, self.busy = status, text, retry_after, busy

    @property
    def transient(self) -> bool:
        return self.busy or self.status is None or self.status == 429 or self.status >= 500


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key to another address, so it ends as an error."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _root(base_url: str) -> str:
    """`base_url` without its last slash, with "/v1" where it has no path.

    >>> _root("http://localhost:8000/")
    'http://localhost:8000/v1'
    """
    parts = urlsplit(base_url)
    if "@" in base_url or parts.query or parts.fragment:
        raise ValueError("base_url must hold no user, password, query or fragment; give the key as `api_key`.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must look like 'http://localhost:8000/v1', got {base_url!r}.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _is_near(base_url: str) -> bool:
    """Whether its host is this machine or on a private network, by its address or by a name without a dot.

    >>> [_is_near(f"http://{host}/v1") for host in ("localhost", "gpu-7:8000", "10.0.0.7", "[::1]", "example.org")]
    [True, True, True, True, False]
    """
    host = urlsplit(base_url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        return "." not in host or host.endswith(".localhost")


def _advice(status: int | None) -> str:
    if status is None:
        return "Check that the server runs and that this machine reaches it; raise `timeout` if it is slow."
    if status < 400:
        return "Check that `base_url` is the root of an OpenAI-compatible API (it ends with /v1 on most servers)."
    if status in (401, 403):
        return "Check `api_key`."
    if status == 404:
        return "Check `model` and `base_url` (which ends with /v1 on most servers)."
    if status == 429:
        return "Lower `max_concurrency` or raise `retries`."
    if status < 500:
        return "Check `model`, `extra`, the prompt's length, and whether the model sees images."
    return "Look into the server's log."


class ChatPolicy:
    """Answers requests through an OpenAI-compatible chat endpoint, all requests of a tick at once.

    Images travel as PNG inside the messages. No answer, status 429 and 5xx are tried again, with growing delays or the
    server's own `Retry-After`; any other refusal is an error at once, with the server's text. An answer without
    content is an empty response.

    Sampling is the server's. Unlike `ModelPolicy`, some apply the cut-offs and penalties of the model's own generation
    config: vLLM unless it is started with `--generation-config vllm`, and `transformers serve`, which samples only
    where that config says `do_sample`.

    Args:
        base_url: the API's root, such as "http://localhost:8000/v1".
        model: the name under which the endpoint serves the model.
        api_key: sent as bearer token, to `base_url` only; shown nowhere. None sends none: neither environment
            variables nor a saved login are read, since the endpoint may be anybody's. A proxy that `http_proxy` or
            `https_proxy` names passes requests on, unless the host is this machine or on a private network (see
            also `no_proxy`); over plain http it sees them, the key too.
        temperature: 0 is greedy.
        max_completion_length: longest response in tokens.
        top_p: None leaves it to the server.
        timeout: seconds without a byte from the server after which an attempt has failed.
        max_concurrency: most requests under way at once.
        retries: how often a request is tried again.
        logprobs: ask for the log-probabilities of the server's tokens, as `Response.behavior_logprobs` (None where
            the server gives none, or they do not belong to the text, or `processing_class` has other tokens for it).
        processing_class: with `logprobs`, the processor or tokenizer of the model that learns from the responses: the
            server's tokens have to be those that it makes of the text.
        seeded: send a seed with each request, drawn from its episode's generator, so that on a server that heeds it
            sampled episodes repeat.
        extra: more fields of each request, such as `{"top_k": -1}`; they overwrite, and None takes a field out:
            `{"max_tokens": None, "max_completion_tokens": 256}`.

    Attributes:
        responses, retokenized: with `logprobs`, how many responses there were, and how many of them without
            log-probabilities because their text is tokenised otherwise than it was sampled, as in `ModelPolicy`.

    Raises:
        ValueError: an argument that makes no sense, or `logprobs` without `processing_class`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        temperature: float = 1.0,
        max_completion_length: int = 256,
        top_p: float | None = 1.0,
        timeout: float = 120.0,
        max_concurrency: int = 64,
        retries: int = 3,
        logprobs: bool = False,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        seeded: bool = False,
        extra: Mapping[str, Any] | None = None,
    ):
        extra = dict(extra or {})
        for name, value, least in (
            ("temperature", temperature, 0),
            ("max_completion_length", max_completion_length, 1),
            ("max_concurrency", max_concurrency, 1),
            ("retries", retries, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, got {timeout}.")
        if OWN_FIELDS & extra.keys():
            raise ValueError(f"extra must not set {sorted(OWN_FIELDS & extra.keys())}; ChatPolicy does.")
        if logprobs and (temperature != 1 or top_p not in (None, 1)):
            raise ValueError(
                "logprobs=True needs temperature=1 and top_p=1: servers report the model's own probabilities, which "
                f"are not those of a policy with temperature={temperature} and top_p={top_p}."
            )
        if logprobs and processing_class is None:
            raise ValueError(
                "logprobs=True needs `processing_class`, the processor or tokenizer of the model that learns: only it "
                "tells whether training will see the tokens that the server sampled."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("api_key must be printable ASCII; look for a line break at its end.")
        self.base_url, self.model = _root(base_url), model
        self.timeout, self.max_concurrency, self.retries = float(timeout), max_concurrency, retries
        self.logprobs, self.processing_class, self.seeded, self.extra = logprobs, processing_class, seeded, extra
        self.responses = self.retokenized = 0
        self.fields: dict[str, Any] = {  # as Python's own numbers, since JSON has no others
            "max_tokens": int(max_completion_length),
            "temperature": float(temperature),
            "top_p": None if top_p is None else float(top_p),
        }
        if logprobs:
            self.fields["logprobs"] = True
        self._api_key = api_key.strip() if api_key else None
        self._opener = build_opener(_NoRedirect, *([ProxyHandler({})] if _is_near(self.base_url) else []))
        self._data_urls: dict[Any, str] = {}
        self._checked = self._warned = False

    def __repr__(self) -> str:
        return f"ChatPolicy({self.base_url!r}, {self.model!r})"

    def check(self) -> None:
        """Asks for a one-token answer; the first `act` does it by itself.

        Raises:
            ChatError: nothing answers, or the endpoint refuses, with the models that it lists.
        """
        body = self._body([{"role": "user", "content": "Hello"}], max_tokens=1)
        try:
            self._text(self._chat(body, threading.Event()))
        except ChatError as error:
            listed = self._listed()
            if not listed:
                raise
            raise ChatError(f"{error} The endpoint lists these models: {', '.join(listed)}.") from None
        self._checked = True

    def act(self, requests: list[Request]) -> list[Response]:
        """One response for each request, in order.

        Raises:
            ChatError: a request failed for good; requests under way are given up.
        """
        if not requests:
            return []
        if not self._checked:
            self.check()
        bodies = []
        for request in requests:
            seed = {"seed": int(request.rng.integers(2**31))} if self.seeded else {}
            bodies.append(self._body(self._messages(request), **seed))
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.max_concurrency, len(bodies)), thread_name_prefix="chat")
        try:
            calls = [pool.submit(self._chat, body, stop) for body in bodies]
            for call in as_completed(calls):
                call.result()  # the first failure, whichever request's it is
            return [self._response(call.result()) for call in calls]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- requests ----

    def _body(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        body = {"model": self.model, "messages": messages, **self.fields, **fields, **self.extra}
        return {name: value for name, value in body.items() if value is not None}

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        """The prompt with its images as data URLs; a message of one text is a string, which every server takes."""
        messages = []
        for message in with_pictures(request.prompt, request.images):
            parts: Any = [
                {"type": "image_url", "image_url": {"url": self._data_url(part["image"])}}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ]
            if len(parts) == 1 and parts[0]["type"] == "text":
                parts = parts[0]["text"]
            messages.append({**message, "content": parts})
        return messages

    def _data_url(self, image: np.ndarray) -> str:
        """A picture as PNG; the last few distinct ones are remembered, since environments repeat pictures."""
        key = (image.shape, sha256(image.tobytes()).digest())
        if key not in self._data_urls:
            buffer = io.BytesIO()
            PIL.Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
            if len(self._data_urls) >= REMEMBERED_IMAGES:
                self._data_urls.pop(next(iter(self._data_urls)))
            self._data_urls[key] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        return self._data_urls[key]

    # ---- HTTP ----

    def _chat(self, body: dict[str, Any], stop: threading.Event) -> Any:
        """The endpoint's answer, which may take several attempts; `stop` ends the wait between two."""
        attempts = 0
        while True:
            attempts += 1
            try:
                return self._send("/chat/completions", body)
            except _Failure as failure:
                error = self._error(failure, attempts)
                if not failure.transient or attempts > self.retries:
                    raise error from None
                delay = failure.retry_after
                if delay is None:
                    delay = FIRST_DELAY * 2 ** (attempts - 1) * _spread.uniform(1, 1.5)
                delay = min(delay, LONGEST_DELAY)
                logger.warning("%s: %s; trying again in %.1f s", self.base_url, _what(failure), delay)
                if stop.wait(delay):
                    raise error from None

    def _send(self, path: str, body: Any = None) -> Any:
        """One attempt: the parsed JSON, or `_Failure`, whose text holds no key."""
        headers = {"Content-Type": "application/json", "User-Agent": "vlmq_trl"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = HTTPRequest(self.base_url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                raw = answer.read()
        except HTTPError as error:
            with error:
                after = error.headers.get("Retry-After", "")
                try:
                    text = error.read().decode("utf-8", "replace")
                except (OSError, HTTPException):
                    text = ""
            retry_after = float(after) if after.isdecimal() else None
            raise _Failure(error.code, self._without_key(text or error.reason), retry_after) from None
        except (OSError, HTTPException, UnicodeError) as error:  # the last: a host that is no name
            reason = error.reason if isinstance(error, URLError) else error
            raise _Failure(None, self._without_key(f"{type(error).__name__}: {reason}")) from None
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise _Failure(200, "no JSON: " + self._without_key(raw.decode("utf-8", "replace"))) from None
        if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
            # So say gateways that what is behind them failed.
            raise _Failure(200, self._without_key(json.dumps(answer["error"])), busy=True)
        return answer

    def _without_key(self, text: str) -> str:
        """Servers like to repeat a key that they do not know."""
        return text.replace(self._api_key, "***") if self._api_key else text

    def _error(self, failure: _Failure, attempts: int) -> ChatError:
        tries = f" on {attempts} attempts" if attempts > 1 else ""
        return ChatError(
            f"The chat endpoint {self.base_url} (model {self.model!r}) failed{tries}: {_what(failure)}. "
            f"{_advice(500 if failure.busy else failure.status)}"
        )

    def _listed(self) -> list[str]:
        """The models that the endpoint lists; none where it lists nothing."""
        try:
            return [str(entry["id"]) for entry in self._send("/models")["data"]]
        except (_Failure, LookupError, TypeError):
            return []

    # ---- answers ----

    def _text(self, answer: Any) -> str:
        """The answer's text, as valid Unicode."""
        try:
            text = answer["choices"][0]["message"].get("content")
            if text is None:
                return ""
            if isinstance(text, list):  # of parts
                text = "".join(part["text"] for part in text if part.get("type") == "text")
            return text.encode("utf-8", "replace").decode()
        except (LookupError, TypeError, AttributeError):
            text = self._without_key(json.dumps(answer))
            raise self._error(_Failure(200, f"no chat completion: {text}"), 1) from None

    def _response(self, answer: Any) -> Response:
        text = self._text(answer)
        if not self.logprobs:
            return Response(text)
        self.responses += 1
        sampled = _log_probs(answer["choices"][0], text)
        if sampled is None:
            if not self._warned:
                self._warned = True
                warn(
                    f"{self.base_url} gave no log-probabilities of a response's tokens, so its `behavior_logprobs` is "
                    "None (said once). Some servers give none at all.",
                    stacklevel=3,
                )
            return Response(text)
        return Response(text, self._aligned(text, *sampled))

    def _aligned(self, text: str, tokens: list[bytes], log_probs: list[float]) -> list[float] | None:
        """The log-probabilities of the sampled tokens if `text` has these very tokens again when it is a completion in
        training; else None. An end token may be nameless."""
        assert self.processing_class is not None
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        learned = [tokenizer.decode([token]) for token in completion_tokens(self.processing_class, text)]
        # A piece of a character reads as U+FFFD on both sides.
        sampled = [token.decode("utf-8", "replace") for token in tokens]
        named = sampled if sampled[-1] else sampled[:-1]
        if len(sampled) <= len(learned) and learned[: len(named)] == named:
            return log_probs
        self.retokenized += 1
        return None


def _what(failure: _Failure) -> str:
    """What went wrong, in a line."""
    text = " ".join(failure.text.split())
    text = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
    return f"no answer ({text})" if failure.status is None else f"status {failure.status}, {text}"


def _log_probs(choice: Any, text: str) -> tuple[list[bytes], list[float]] | None:
    """Each generated token and its log-probability, or None if they are missing or not this text's.

    The tokens must spell the text, up to an end token and to white space, which some servers trim. A server that takes
    a chain of thought out of the text still lists its tokens, whose values would be taken for the text's.
    """
    try:
        entries = choice["logprobs"]["content"]
        values = [float(entry["logprob"]) for entry in entries]
        # Tokens may cut a character in two, so that bytes are compared.
        tokens = [
            entry["token"].encode() if entry.get("bytes") is None else bytes(entry["bytes"]) for entry in entries
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    spelled = {b"".join(b"".join(part).split()) for part in (tokens, tokens[:-1])}
    if not values or b"".join(text.encode().split()) not in spelled or not all(map(math.isfinite, values)):
        return None
    return tokens, values
