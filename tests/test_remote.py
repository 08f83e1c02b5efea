# SPDX-License-Identifier: Apache-2.0
"""`ChatPolicy` against a real server (`transformers serve` with tiny models), and against one that misbehaves."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests import tiny_models
from vlmq_trl import remote
from vlmq_trl.agent_format import make_format
from vlmq_trl.policy import ModelPolicy
from vlmq_trl.remote import ChatError, ChatPolicy
from vlmq_trl.rollout import Request, play_episodes

TOKENS = 12
SECRET = "sk-do-not-show-me"
IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def request(prompt, images=(), seed=0):
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": [*[IMAGE] * len(images), text(prompt)]}]
    return Request(None, prompt, list(images), np.random.default_rng(seed))


# ---- a real server ----

# Serves until its standard input closes, which it does however the test process ends.
SERVE = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from transformers.cli.transformers import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved tiny models, by name."""
    root = tmp_path_factory.mktemp("models")
    for name in ("idefics3", "llama"):
        model, processor = tiny_models.build(name)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The root of a running `transformers serve`, which loads the model that a request names."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):  # another process may take the free port first
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-c", SERVE, "serve", "--device", "cpu", "--host", "127.0.0.1", "--port", port]
        with open(log, "wb") as sink:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
            )
        try:
            if answers(process, f"http://127.0.0.1:{port}/health"):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-3000:]}")


def answers(process, url):
    """Whether the server has come up."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return process.poll() is None
        except OSError:
            time.sleep(0.1)
    return False


def local(name, **kwargs):
    model, processor = tiny_models.build(name)
    # One row at a time, as the server does: padding may change a sum's last digit.
    return ModelPolicy(model.eval(), processor, max_completion_length=TOKENS, batch_size=1, **kwargs)


def served(server, folder, name, **kwargs):
    settings = {"temperature": 0.0, "max_completion_length": TOKENS, **kwargs}
    return ChatPolicy(server, str(folder / name), **settings)


def test_answers_are_the_models_own(server, folder):
    first, second = picture(1), picture(2)
    conversation = [
        {"role": "system", "content": [text("You play.")]},
        {"role": "user", "content": [IMAGE, text("up or down?")]},
        {"role": "assistant", "content": [text("up")]},
        {"role": "user", "content": [text("now"), IMAGE]},
    ]
    requests = [
        request("what colour?", [first]),
        request("what colour?", [second]),
        request("what colour?", [first]),
        request("two", [first, second]),
        request("two", [second, first]),
        request(conversation, [first, second]),
        request([{"role": "user", "content": "left or right?"}], [first]),
        request("no picture"),
        request([{"role": "user", "content": "no picture"}]),
    ]
    responses = served(server, folder, "idefics3").act(requests)
    assert responses == local("idefics3").act(requests)
    texts = [response.text for response in responses]
    assert texts[0] == texts[2] != texts[1] and texts[3] != texts[4] and texts[7] == texts[8]


def test_answers_of_a_text_only_model(server, folder):
    requests = [request("up"), request([{"role": "system", "content": "play"}, {"role": "user", "content": "down"}])]
    responses = served(server, folder, "llama").act(requests)
    assert responses == local("llama").act(requests)
    assert responses[0].text and responses[0] != responses[1]


def test_episodes_through_the_server(server, folder):
    settings = {"episodes": 3, "num_envs": 2, "max_turns": 4, "agent_format": make_format("plain", history=2)}
    remotely = list(play_episodes("vlmq_trl/NumberLine-v0", served(server, folder, "idefics3"), **settings))
    locally = list(play_episodes("vlmq_trl/NumberLine-v0", local("idefics3"), **settings))
    completions = [[turn.completion for turn in episode.turns] for episode in remotely]
    assert completions == [[turn.completion for turn in episode.turns] for episode in locally]
    assert len({one for episode in completions for one in episode}) > 5


def test_the_server_gives_no_log_probabilities(server, folder, tokenizer):
    policy = served(server, folder, "llama", temperature=1.0, logprobs=True, processing_class=tokenizer)
    with pytest.warns(UserWarning, match="gave no log-probabilities") as warned:
        responses = policy.act([request("up"), request("down")])
    assert [response.behavior_logprobs for response in responses] == [None, None]
    assert len(warned) == 1


def test_a_field_that_the_server_does_not_know(server, folder):
    with pytest.raises(
        ChatError, match=r"status 422, .*Unexpected fields in the request.*top_k.*Check `model`, `extra`"
    ):
        served(server, folder, "llama", extra={"top_k": -1}).check()


# ---- a server that does what it is told ----


class Endpoint:
    """Answers POSTs with the next of `script`, then with `chat("ok")`; keeps what it was sent.

    An entry is (status, headers, body), or a function of the request's body that returns one.
    """

    def __init__(self):
        self.script, self.bodies, self.keys, self.times = [], [], [], []
        self.models = None  # what a GET answers with
        self.closing = threading.Event()
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(*((404, {}, "") if endpoint.models is None else (200, {}, json.dumps(endpoint.models))))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.bodies.append(body)
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint.times.append(time.monotonic())
                    answer = endpoint.script.pop(0) if endpoint.script else chat("ok")
                answer = answer(body) if callable(answer) else answer
                if answer is not None:
                    self.reply(*answer)

            def reply(self, status, headers, body):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):  # a client that gave up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def policy(self, **kwargs):
        """A policy that has already been checked."""
        policy = ChatPolicy(self.url, "m", **kwargs)
        policy.check()
        self.bodies.clear()
        self.keys.clear()
        self.times.clear()
        return policy

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def chat(content, **choice):
    message = {"role": "assistant", "content": content}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": message, **choice}]})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    made = Endpoint()
    yield made
    made.close()


def texts(policy, *requests):
    return [response.text for response in policy.act(list(requests) or [request("go")])]


def test_a_request_in_full(endpoint):
    policy = endpoint.policy(max_completion_length=7, extra={"top_k": -1})
    image = np.array([[[255, 0, 0]]], dtype=np.uint8)
    texts(policy, request("go", [image]))
    (body,) = endpoint.bodies
    (message,) = body.pop("messages")
    assert body == {"model": "m", "max_tokens": 7, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
    shown, said = message["content"]
    assert message["role"] == "user" and said == text("go") and shown["type"] == "image_url"
    with urllib.request.urlopen(shown["image_url"]["url"]) as opened:
        assert opened.read().startswith(b"\x89PNG")


def test_a_message_of_one_text_is_a_string(endpoint):
    texts(endpoint.policy(), request("go"))
    assert endpoint.bodies[0]["messages"] == [{"role": "user", "content": "go"}]


def test_equal_pictures_are_encoded_once(endpoint, monkeypatch):
    policy = endpoint.policy()
    encoded = []
    original = remote.PIL.Image.fromarray
    monkeypatch.setattr(remote.PIL.Image, "fromarray", lambda array: encoded.append(1) or original(array))
    for _ in range(2):
        texts(policy, request("a", [picture(1)]), request("b", [picture(1).copy(), picture(2)]))
    assert len(encoded) == 2
    tall = np.zeros((4, 2, 3), np.uint8)
    assert policy._data_url(tall) != policy._data_url(tall.reshape(2, 4, 3))  # equal bytes, another picture


def test_all_at_once_and_in_order(endpoint):
    policy = endpoint.policy()
    together = threading.Barrier(8)

    def answer(body):
        together.wait(20)  # passes when 8 requests are under way
        time.sleep(0.02 * (7 - int(body["messages"][0]["content"])))  # the first answers last
        return chat("answer " + body["messages"][0]["content"])

    endpoint.script = [answer] * 8
    assert texts(policy, *[request(str(i)) for i in range(8)]) == [f"answer {i}" for i in range(8)]


def test_never_more_than_max_concurrency(endpoint):
    policy = endpoint.policy(max_concurrency=2)
    lock, now, most = threading.Lock(), [0], [0]

    def answer(body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return chat("ok")

    endpoint.script = [answer] * 6
    texts(policy, *[request(str(i)) for i in range(6)])
    assert most == [2]


def test_seeds_come_from_the_episode(endpoint):
    texts(endpoint.policy(seeded=True), request("a", seed=3), request("b", seed=4), request("c", seed=3))
    seeds = {body["messages"][0]["content"]: body["seed"] for body in endpoint.bodies}
    assert seeds["a"] == seeds["c"] == int(np.random.default_rng(3).integers(2**31)) != seeds["b"]


def test_fields_can_be_taken_out(endpoint):
    texts(endpoint.policy(top_p=None, extra={"max_tokens": None, "max_completion_tokens": 9}))
    assert set(endpoint.bodies[0]) == {"model", "messages", "temperature", "max_completion_tokens"}


# ---- what goes wrong ----


@pytest.mark.parametrize("status", [500, 503, 429])
def test_trouble_that_passes(endpoint, status, caplog):
    policy = endpoint.policy()
    endpoint.script = [(status, {}, "busy"), (status, {}, "busy")]
    assert texts(policy) == ["ok"]
    assert len(endpoint.bodies) == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert f"status {status}, busy" in caplog.text


def test_trouble_that_stays(endpoint):
    policy = endpoint.policy(retries=2)
    endpoint.script = [(500, {}, "out of memory")] * 3
    expected = (
        f"{endpoint.url} (model 'm') failed on 3 attempts: status 500, out of memory. Look into the server's log."
    )
    with pytest.raises(ChatError, match=re.escape(expected)):
        policy.act([request("go")])


def test_retry_after_is_heeded(endpoint):
    policy = endpoint.policy()
    endpoint.script = [(429, {"Retry-After": "1"}, "slow down"), (429, {"Retry-After": "tomorrow"}, "slow down")]
    assert texts(policy) == ["ok"]
    assert endpoint.times[1] - endpoint.times[0] >= 1


def test_a_refusal_is_an_error_at_once(endpoint):
    policy = endpoint.policy()
    endpoint.script = [(400, {}, '{"error": {"message": "This model sees\\nno images"}}')]
    with pytest.raises(
        ChatError, match=r"failed: status 400, .*This model sees.*no images.*whether the model sees images"
    ):
        policy.act([request("go")])
    assert len(endpoint.bodies) == 1


def test_one_failure_ends_the_tick(endpoint):
    """Neither the requests that wait nor those under way are waited for."""
    policy = endpoint.policy(max_concurrency=2)

    def answer(body):
        if body["messages"][0]["content"] == "1":
            return 400, {}, "no"
        endpoint.closing.wait(20)

    endpoint.script = [answer] * 20
    start = time.monotonic()
    with pytest.raises(ChatError, match="status 400"):
        policy.act([request(str(i)) for i in range(20)])
    assert time.monotonic() - start < 10 and len(endpoint.bodies) <= 4


def test_a_server_that_hangs(endpoint):
    policy = endpoint.policy(timeout=0.2, retries=1)
    endpoint.script = [lambda body: endpoint.closing.wait(20) and None] * 2
    with pytest.raises(
        ChatError, match=r"failed on 2 attempts: no answer \(TimeoutError: timed out\).*raise `timeout`"
    ):
        policy.act([request("go")])
    assert len(endpoint.bodies) == 2


def test_an_answer_that_is_cut_off(endpoint):
    policy = endpoint.policy()
    endpoint.script = [(200, {"Content-Length": "1000"}, '{"choices": ['), lambda body: None]
    assert texts(policy) == ["ok"] and len(endpoint.bodies) == 3


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "[" * 100_000, "", "null", "[]", '{"choices": []}'])
def test_an_answer_that_is_no_chat_completion(endpoint, body):
    policy = endpoint.policy()
    endpoint.script = [(200, {}, body)]
    with pytest.raises(ChatError, match=r"status 200, no (JSON|chat completion).*Check that `base_url` is the root"):
        policy.act([request("go")])
    assert len(endpoint.bodies) == 1


def test_no_picture_is_added_to_messages_that_show_theirs(endpoint):
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "go"}]}
    history = [{"role": "user", "content": "rules"}, {"role": "assistant", "content": "ok"}, shown]
    picture = np.zeros((4, 4, 3), np.uint8)
    endpoint.policy().act([Request(None, history, [picture], np.random.default_rng(0))])
    first, second, last = endpoint.bodies[-1]["messages"]
    assert (first["content"], second["content"]) == ("rules", "ok")
    assert [part["type"] for part in last["content"]] == ["image_url", "text"]


def test_an_error_that_comes_as_an_answer_is_tried_again(endpoint):
    policy = endpoint.policy(retries=1)
    overloaded = (200, {}, '{"error": {"message": "overloaded"}}')
    endpoint.script = [overloaded]
    assert texts(policy) == ["ok"] and len(endpoint.bodies) == 2
    endpoint.script = [overloaded] * 2
    with pytest.raises(ChatError, match="overloaded") as raised:
        policy.act([request("go")])
    assert "base_url" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("", ""),
        ("  up\n", "  up\n"),
        ("\ud83d!", "?!"),
        ("🙂", "🙂"),
        (
            [{"type": "text", "text": "go "}, {"type": "refusal", "refusal": "no"}, {"type": "text", "text": "up"}],
            "go up",
        ),
    ],
)
def test_any_content_is_a_response(endpoint, content, expected):
    policy = endpoint.policy()
    endpoint.script = [chat(content)]
    assert texts(policy) == [expected]


def test_no_content_at_all(endpoint):
    policy = endpoint.policy()
    endpoint.script = [(200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "tool_calls": []}}]}))]
    assert texts(policy) == [""]


def test_a_redirect_is_not_followed(endpoint):
    other = Endpoint()
    try:
        policy = endpoint.policy(api_key=SECRET)
        for status in (301, 302, 307, 308):
            endpoint.script = [(status, {"Location": other.url + "/chat/completions"}, "over there")]
            with pytest.raises(ChatError, match=f"status {status}, over there. Check that `base_url`"):
                policy.act([request("go")])
        assert other.bodies == []
    finally:
        other.close()


def test_nobody_there():
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        policy = ChatPolicy(address, "m", retries=0)
        with pytest.raises(ChatError, match=rf"{address}/v1 .*no answer.*refused.*Check that the server runs"):
            policy.check()


def test_a_host_that_cannot_be():
    with pytest.raises(ChatError, match=r"no answer .UnicodeError.*Check that the server runs"):
        ChatPolicy(f"http://{'a' * 64}.com", "m", retries=0).check()


def test_a_model_that_is_not_served(endpoint):
    endpoint.script = [(404, {}, "The model `m` does not exist.")]
    endpoint.models = {"object": "list", "data": [{"id": "qwen"}, {"id": "llava"}]}
    expected = r"status 404, The model `m` does not exist.*Check `model` and.* lists these models: qwen, llava\.$"
    with pytest.raises(ChatError, match=expected):
        ChatPolicy(endpoint.url, "m").act([request("go")])
    assert len(endpoint.bodies) == 1  # the check; the request itself was not sent


def test_the_check_is_made_once(endpoint):
    policy = ChatPolicy(endpoint.url, "m", max_completion_length=50)
    for _ in range(2):
        texts(policy)
    assert [body["max_tokens"] for body in endpoint.bodies] == [1, 50, 50]
    assert policy.act([]) == []


# ---- the key ----


def test_the_key_is_sent_and_never_shown(endpoint, caplog):
    caplog.set_level(logging.DEBUG)
    policy = endpoint.policy(api_key=SECRET + " ", retries=1)
    assert texts(policy) == ["ok"] and endpoint.keys == [f"Bearer {SECRET}"]
    assert SECRET not in repr(policy) + str(policy)
    shouted = f"Incorrect API key provided: {SECRET}"
    long_one = "x" * (remote.SHOWN - 5) + SECRET
    for answers in (
        [(401, {}, shouted)],
        [(500, {}, shouted)] * 2,
        [(401, {}, long_one)],
        [(200, {}, shouted)],
        [(200, {}, json.dumps({"error": shouted}))] * 2,
    ):
        endpoint.script = list(answers)
        with pytest.raises(ChatError) as raised:
            policy.act([request("go")])
        error, seen = raised.value, ""
        while error is not None:
            seen, error = seen + repr(error), error.__cause__ or error.__context__
        assert SECRET not in seen and "sk-do" not in seen
    assert "trying again" in caplog.text and "sk-do" not in caplog.text


def test_no_key_is_taken_from_the_surroundings(endpoint, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    assert texts(endpoint.policy()) == ["ok"] and endpoint.keys == [None]


@pytest.mark.parametrize(("host", "near"), [("localhost", True), ("127.0.0.1", True), ("model.example.org", False)])
def test_the_key_goes_past_a_proxy_to_a_host_nearby(endpoint, monkeypatch, host, near):
    proxy = Endpoint()
    try:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        ChatPolicy(endpoint.url.replace("127.0.0.1", host), "m", api_key=SECRET).check()
        assert (len(endpoint.keys), len(proxy.keys)) == ((1, 0) if near else (0, 1))
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("host", "near"),
    [
        *[(host, True) for host in ("localhost", "a.localhost", "gpu-7", "10.1.2.3", "192.168.0.9", "172.16.0.1")],
        *[(host, True) for host in ("[::1]", "[fd00::7]", "169.254.1.1", "100.64.0.1")],
        *[(host, False) for host in ("api.openai.com", "8.8.8.8", "[2001:4860:4860::8888]", "localhost.example.org")],
    ],
)
def test_what_is_nearby(host, near):
    assert remote._is_near(f"http://{host}:8000/v1") is near


def test_a_key_with_a_line_break_is_not_shown():
    with pytest.raises(ValueError, match="api_key must be printable ASCII") as raised:
        ChatPolicy("http://localhost:1", "m", api_key=SECRET + "\n")
    assert SECRET not in str(raised.value)


# ---- log-probabilities ----


def entries(*tokens, **more):
    return {"logprobs": {"content": [{"token": token, "logprob": -0.5 - i, **more} for i, token in enumerate(tokens)]}}


@pytest.fixture(scope="module")
def tokenizer():
    """Knows "action" and " up" whole, and "up" as two letters."""
    return tiny_models.build("llama")[1]


@pytest.mark.parametrize(
    ("content", "choice", "expected"),
    [
        ("up!", entries("u", "p", "!"), [-0.5, -1.5, -2.5]),
        ("up!", entries("u", "p", "!", "<|im_end|>"), [-0.5, -1.5, -2.5, -3.5]),
        ("up!", entries("u", "p", "!", ""), [-0.5, -1.5, -2.5, -3.5]),  # an end token without a name
        (" up", entries(" up", ""), [-0.5, -1.5]),
        ("", entries("<|im_end|>"), [-0.5]),
        (None, entries("<|im_end|>"), [-0.5]),
        ("up", entries("think", "ing", "u", "p"), None),  # values of tokens that are not in the text
        ("up", entries("u"), None),
        ("up", entries(), None),
        ("up", {}, None),
        ("up", {"logprobs": None}, None),
        ("up", {"logprobs": {"content": None}}, None),
        ("up", {"logprobs": {"content": [{"token": "up"}]}}, None),
        ("up", {"logprobs": {"content": [{"token": "up", "logprob": float("-inf")}]}}, None),
        ("up", {"logprobs": {"content": [{"token": "up", "logprob": None}]}}, None),
        ("up", {"logprobs": {"content": [{"token": "up", "logprob": -1, "bytes": [999]}]}}, None),
        (
            "é",
            {"logprobs": {"content": [{"token": "\ufffd", "logprob": -1, "bytes": [b]} for b in "é".encode()]}},
            [-1, -1],
        ),
    ],
)
def test_log_probabilities(endpoint, tokenizer, recwarn, content, choice, expected):
    policy = endpoint.policy(logprobs=True, processing_class=tokenizer)
    endpoint.script = [chat(content, **choice)]
    (response,) = policy.act([request("go")])
    assert endpoint.bodies[0]["logprobs"] is True
    assert response.behavior_logprobs == expected and response.text == (content or "")
    assert len(recwarn) == (expected is None) and (policy.responses, policy.retokenized) == (1, 0)


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("up", ["up"]),  # one token, where training will see two
        ("action", ["act", "ion"]),  # two, where it will see one
        ("up!", ["up", "!", ""]),
        ("up!", ["u", "p!", "", ""]),
        ("up", [" up"]),  # the server trims
        ("up", ["u", "p", "\n"]),
        ("up", ["u", "p", "<|endoftext|>"]),  # another end than the chat template's
    ],
)
def test_tokens_that_training_will_not_see(endpoint, tokenizer, recwarn, content, tokens):
    policy = endpoint.policy(logprobs=True, processing_class=tokenizer)
    endpoint.script = [chat(content, **entries(*tokens)), chat("up", **entries("u", "p"))]
    assert [policy.act([request("go")])[0].behavior_logprobs for _ in range(2)] == [None, [-0.5, -1.5]]
    assert (policy.responses, policy.retokenized, len(recwarn)) == (2, 1, 0)


# ---- arguments ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must look like 'http://localhost:8000/v1', got 'localhost:8000'"),
        ({"base_url": "http://me:word@host/v1"}, "no user, password"),
        ({"base_url": "me:word@host/v1"}, "no user, password"),
        ({"base_url": "http://host/v1?key=word"}, "no user, password"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"extra": {"stream": True}}, r"extra must not set \['stream'\]"),
        ({"logprobs": True, "temperature": 0.7}, "needs temperature=1 and top_p=1"),
        ({"logprobs": True, "top_p": 0.9}, "needs temperature=1 and top_p=1"),
        ({"logprobs": True}, "logprobs=True needs `processing_class`, the processor or tokenizer of the model that"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message) as raised:
        ChatPolicy(**{"base_url": "http://host/v1", "model": "m", **kwargs})
    assert "word@" not in str(raised.value) and "=word" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host/", "http://host/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/api/v3", "https://host/api/v3"),
        ("http://[::1]:8000/v1/chat/completions", "http://[::1]:8000/v1"),
    ],
)
def test_the_root(given, root):
    assert ChatPolicy(given, "m").base_url == root


def test_numbers_may_be_numpys(endpoint):
    policy = endpoint.policy(
        temperature=np.float32(0.5), top_p=np.float32(0.25), max_completion_length=np.int64(7), timeout=np.float32(30)
    )
    assert texts(policy) == ["ok"]
    (body,) = endpoint.bodies
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.25, 7)


def test_pictures_that_do_not_fit_the_prompt(endpoint):
    with pytest.raises(ValueError, match="Number of images"):
        endpoint.policy().act([request([{"role": "user", "content": [text("go")]}], [picture(0)])])
