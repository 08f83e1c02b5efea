# SPDX-License-Identifier: Apache-2.0
"""OpenEnv: the adapter against real servers on the loopback interface, which the tests start, kill and restart."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from PIL import Image

from tests.openenv_server import guess, guesser, squares
from vlmq_trl import JSONFormat, dataset_from_episodes, play_episodes, validate_trajectories
from vlmq_trl.envs.openenv import OpenEnvAdapter, OpenEnvError, decode_picture
from vlmq_trl.rollout import EnvFailureError, Response

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process with the guessing game."""

    def __init__(
        self, sessions: int = 16, script: Path = ROOT / "tests" / "openenv_server.py", port: int | None = None
    ):
        self.port, self.sessions, self.script = port or free_port(), sessions, script
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(self.script), str(self.port), str(self.sessions)])

    def wait(self) -> "Server":
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, "the server has ended"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                assert time.monotonic() < deadline, "the server does not come up"
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def servers():
    """One that stays up, and one that tests kill; each test that does starts it again."""
    both = Server(), Server(sessions=2)
    try:
        yield [server.wait() for server in both]
    finally:
        for server in both:
            server.stop()


@pytest.fixture
def url(servers) -> str:
    return servers[0].url


@pytest.fixture
def mortal(servers):
    yield servers[1]
    if servers[1].process.poll() is not None:
        servers[1].start()
        servers[1].wait()


@pytest.fixture
def make(url):
    """Adapters of the server that stays up, closed after the test."""
    made = []

    def adapter(**kwargs):
        made.append(guesser(kwargs.pop("client", url), **kwargs))
        return made[-1]

    yield adapter
    for one in made:
        one.close()


def count(picture: np.ndarray) -> int:
    """The secret, read off the picture."""
    return next(k for k in range(10) if np.array_equal(picture, squares(k)))


def test_an_episode(make):
    env = make(render_mode="rgb_array")
    seen, info = env.reset(seed=3)
    assert set(seen) == {"image", "text"} and seen["text"] == "" and info == {}
    secret = count(seen["image"])
    assert env.task == "Guess the number of squares." and env.picture_size == (48, 60) and env.legal_actions is None
    seen, reward, terminated, truncated, info = env.step(f" {secret % 9 + 1} ")
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"valid": True, "action": f"{secret % 9 + 1}"} and seen["text"].startswith("too ")
    assert np.array_equal(env.render(), squares(secret))
    seen, reward, terminated, truncated, _ = env.step(f"{secret}")
    assert (reward, terminated, truncated, seen["text"]) == (1.0, True, False, "right")
    with pytest.raises(ResetNeeded):
        env.step("1")


def test_gymnasiums_checker(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r"connect\(\) must be used")  # by OpenEnv's client
        check_env(make(), skip_render_check=True)


def test_equal_seeds_give_equal_episodes(make):
    first, second = make(), make()

    def secrets(env, seeds):
        return [count(env.reset(seed=seed)[0]["image"]) for seed in seeds]

    assert secrets(first, range(8)) == secrets(second, range(8))
    assert len(set(secrets(first, range(8)))) > 2
    # Without a seed the server is told one from `np_random`, so that a whole run follows from its first seed.
    assert secrets(first, [5, None, None, None]) == secrets(second, [5, None, None, None])


def test_two_at_once_do_not_disturb_each_other(make):
    one, other = make(), make()
    a, b = count(one.reset(seed=0)[0]["image"]), count(other.reset(seed=1)[0]["image"])
    assert a != b
    assert other.step(f"{a}")[1] == 0.0 and one.step(f"{a}")[1:3] == (1.0, True)
    assert other.step(f"{b}")[1:3] == (1.0, True)


def test_truncation(make):
    env = make()
    wrong = f"{count(env.reset(seed=0)[0]['image']) % 9 + 1}"
    ends = [env.step(wrong)[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]  # the observation says so
    env = make(truncated=lambda observation: False)
    env.reset(seed=0)
    assert [env.step(wrong)[2:4] for _ in range(5)][-1] == (True, False)
    env = make(max_turns=2)
    env.reset(seed=0)
    assert [env.step(wrong)[2:4] for _ in range(2)] == [(False, False), (False, True)]


def test_invalid_actions_alone_do_not_go_on_for_ever(make):
    """They never reach the server, which would otherwise truncate."""
    env = make()
    env.reset(seed=0)
    ends = [env.step("seven")[2:4] for _ in range(1000)]
    assert set(ends[:-1]) == {(False, False)} and ends[-1] == (False, True)


@pytest.mark.parametrize("bad", ["", "seven", "-1", "\ud800", "9" * 500, "{}", None, 3])
def test_invalid_actions_never_raise(make, bad):
    """A string that the function refuses, and numbers that the server's model of actions refuses."""
    env = make(invalid_penalty=0.25)
    secret = count(env.reset(seed=0)[0]["image"])
    _, reward, terminated, truncated, info = env.step(bad)
    assert (reward, terminated, truncated, info) == (-0.25, False, False, {"valid": False, "action": ""})
    assert env.turns == 1 and env.step(f"{secret}")[1] == 1.0


def test_invalid_actions_may_end_the_episode(make):
    for bad in ("seven", "99"):
        env = make(on_invalid="terminate")
        env.reset(seed=0)
        assert env.step(bad)[1:4] == (0.0, True, False)


def test_a_function_that_raises(make, url):
    env = OpenEnvAdapter(url, lambda text: {"guess": int(text)}, text="hint")
    with pytest.warns(UserWarning, match="The function `action` raised ValueError: invalid literal"):
        env.reset(seed=0)
        assert env.step("seven")[4]["valid"] is False
    env.close()


def test_words(url):
    words = {"One": {"guess": 1}, "two": {"guess": 2}, "many": {"guess": 13}}
    env = OpenEnvAdapter(url, words, lambda observation: f"Guess{observation['hint']}.", picture="picture")
    env.reset(seed=0)
    assert env.legal_actions == ("one", "two", "many") and env.task == "Guess. Actions: one, two, many."
    assert "text" not in env.observation_space.spaces and env.step(" ONE")[4] == {"valid": True, "action": "one"}
    assert env.step("three")[4]["valid"] is False
    with pytest.raises(
        OpenEnvError, match=r"refuses step \{'guess': 13\}; let `action` give what its /schema asks for"
    ):
        env.step("many")
    env.close()
    with pytest.raises(ValueError, match="distinct, not blank"):
        OpenEnvAdapter(url, {"a": 1, "A ": 2}, text="hint")
    with pytest.raises(TypeError, match="words for actions, or a function"):
        OpenEnvAdapter(url, ["a"], text="hint")


@pytest.mark.parametrize("form", ["png", "url", "lists"])
def test_forms_of_pictures(make, form):
    env = make()
    seen, _ = env.reset(seed=4, options={"form": form})
    assert np.array_equal(seen["image"], squares(count(seen["image"]))) and env.observation_space.contains(seen)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ("flat", "is list of shape .* reshape it"),
        ("float", "not integers in 0..255"),
        ("text", "is a string, but not base64"),
        ("bomb", "has 5000 x 5000 pixels"),
        ("wide", "is 48 x 120 pixels, not 48 x 60 as before"),
    ],
)
def test_pictures_that_do_not_decode(make, url, form, problem):
    env = make()
    with pytest.raises(ValueError, match=f"the picture of the environment at {url} .*{problem}.*`picture`"):
        env.reset(seed=0, options={"form": form})
    env.reset(seed=0)  # goes on


def test_an_end_without_a_picture_shows_the_last_one(make):
    env = make()
    seen, _ = env.reset(seed=4, options={"form": "dark"})
    last, reward, terminated, _, _ = env.step(str(count(seen["image"])))
    assert terminated and reward == 1 and np.array_equal(last["image"], seen["image"])


def test_large_messages(make, url):
    """440 x 440 x 3 numbers as JSON are 1.2 MB; the plain client of openenv-core 0.2.1 takes 1 MiB."""
    from openenv.core import GenericEnvClient

    env = make(picture_size=(440, 440))
    seen, _ = env.reset(seed=0, options={"form": "huge"})
    assert seen["image"].shape == (440, 440, 3)
    if not hasattr(GenericEnvClient, "sync"):
        env = make(client=GenericEnvClient(url), picture_size=(440, 440))
        with pytest.raises(OpenEnvError, match=r"more than the client takes in one message .* as PNG in base64"):
            env.reset(seed=0, options={"form": "huge"})


def test_a_client_of_ones_own(make, url):
    """A typed client: actions and observations are its own classes."""
    from dataclasses import dataclass, field

    from openenv.core import EnvClient
    from openenv.core.client_types import StepResult

    @dataclass
    class Seen:
        hint: str
        pixels: list
        metadata: dict = field(default_factory=dict)

    class Client(EnvClient):
        def _step_payload(self, action):
            return {"guess": action}

        def _parse_result(self, payload):
            seen = payload["observation"]
            metadata = {"truncated": seen["truncated"]}
            return StepResult(
                Seen(seen["hint"] + "\ud800", seen["picture"], metadata), payload["reward"], payload["done"]
            )

        def _parse_state(self, payload):
            return payload

    client = Client(url, message_timeout_s=0.5)
    env = OpenEnvAdapter(client, {"one": 1, "two": 2, "slow": 12}, text="hint", picture="pixels")
    assert env.reset(seed=0)[0]["text"] == "?"  # a lone surrogate, which no dataset can hold
    assert [env.step("one")[2:4] for _ in range(5)][-1] == (False, True)
    env.reset(seed=0)
    with pytest.raises(OpenEnvError, match=rf"{client._ws_url} did not answer step in time. Raise message_timeout"):
        env.step("slow")
    with pytest.raises(ResetNeeded):
        env.step("one")
    # The answer to "slow" is not taken for the answer to what is asked next.
    assert count(env.reset(seed=0)[0]["image"]) == count(make().reset(seed=0)[0]["image"])
    missing = OpenEnvAdapter(Client(url), {"one": 1}, text="words")
    with pytest.raises(ValueError, match=r"the observation, a Seen, has no field 'words'"):
        missing.reset(seed=0)
    missing.close()
    env.close()
    assert client._ws is None


def test_errors_of_the_environment(make, url):
    env = make()
    env.reset(seed=0)
    with pytest.raises(OpenEnvError, match=f"at {url} failed in step .*nobody guesses 10.*max_env_failures"):
        env.step("10")
    with pytest.raises(ResetNeeded):
        env.step("1")
    assert env.reset(seed=0)[0]["text"] == ""
    env = make(message_timeout=0.5)
    env.reset(seed=0)
    with pytest.raises(OpenEnvError, match=f"at {url} did not answer step in time"):
        env.step("12")
    with pytest.raises(ValueError, match=r"has no field 'note', but \['hint', 'picture', 'truncated'\]"):
        make(text="note").reset(seed=0)


def test_no_server():
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(
        OpenEnvError, match=f"No OpenEnv server answers at {url} within 0.5 s .*Start it, mend the URL"
    ):
        guesser(url, connect_timeout=0.5)
    assert time.monotonic() - started < 10
    env = guesser(url, connect_timeout=0.5, picture_size=(48, 60))  # connects only when it has to
    with pytest.raises(OpenEnvError, match="No OpenEnv server"):
        env.reset(seed=0)
    env.close()


def test_too_many_sessions(mortal):
    envs = [guesser(mortal.url) for _ in range(2)]
    with pytest.raises(OpenEnvError, match=r"takes no further session .*larger max_concurrent_envs"):
        guesser(mortal.url, connect_timeout=0.5)
    later = threading.Timer(1.0, envs[0].close)
    later.start()
    guesser(mortal.url, connect_timeout=60).close()  # waits for a session that is given back
    later.join()
    envs[1].close()


def test_a_server_that_is_killed_and_started_again(mortal):
    env = guesser(mortal.url, connect_timeout=60)
    env.reset(seed=0)
    with pytest.raises(OpenEnvError, match=f"at {mortal.url} closed the connection in step .*max_env_failures"):
        env.step("11")
    mortal.process.wait()
    mortal.start()
    first = env.reset(seed=0)[0]["image"]  # waits for the server to come up
    assert env.step("1")[4]["valid"]
    mortal.stop()
    mortal.start()
    mortal.wait()
    assert np.array_equal(env.reset(seed=0)[0]["image"], first)  # the dead connection costs no episode
    env.close()


class Player:
    """Guesses at random, except where a function of the number of calls says something else."""

    def __init__(self, instead=lambda call: None):
        self.instead, self.calls = instead, 0

    def act(self, requests):
        self.calls += 1
        special = self.instead(self.calls)
        return [Response(special or f'{{"action": "{request.rng.integers(1, 10)}"}}') for request in requests]


@pytest.mark.parametrize("workers", [False, True])
def test_episodes_are_played(url, workers):
    def play(num_envs, workers):
        episodes = play_episodes(
            guesser,
            Player(),
            episodes=4,
            seed=7,
            agent_format=JSONFormat(history=1),
            num_envs=num_envs,
            env_kwargs={"url": url},
            workers=workers,
            env_timeout=60,
        )
        return dataset_from_episodes(episodes)

    ds = play(2, workers)
    index = validate_trajectories(ds)
    assert len(index) == 4 and ds["seed"][-1] == 10
    assert ds.to_list() == play(1, False).to_list()  # equal however they are played


def test_rollouts_outlive_the_server(mortal):
    """Its death costs the running episode, which is counted and dropped; the others are played."""

    def kill(call):
        if call != 3:
            return None
        mortal.stop()
        mortal.start()
        return '{"action": "1"}'

    failing = Player(kill)
    kwargs = {"url": mortal.url, "connect_timeout": 60}
    options = {"seed": 0, "agent_format": JSONFormat(), "num_envs": 1, "env_kwargs": kwargs}
    played = list(play_episodes(guesser, failing, episodes=3, max_env_failures=1, **options))
    assert len(played) == 2
    with pytest.raises(EnvFailureError, match=r"OpenEnvError: The OpenEnv server at .* failed in step"):
        list(play_episodes(guesser, Player(lambda call: '{"action": "10"}'), episodes=1, **options))


def test_bad_arguments(url):
    for bad in ("localhost:8000", "file:///etc/passwd", "http://", ""):
        with pytest.raises(ValueError, match="is no URL of a server; write for example"):
            OpenEnvAdapter(bad, guess, text="hint")
    with pytest.raises(TypeError, match=r"client must be a URL or an openenv.core.EnvClient, got dict"):
        OpenEnvAdapter({}, guess, text="hint")
    with pytest.raises(ValueError, match="say by `text` or `picture`"):
        OpenEnvAdapter(url, guess)
    for bad in (0, 2.5, None):
        with pytest.raises(ValueError, match=f"max_turns must be a whole number of at least 1, not {bad}"):
            OpenEnvAdapter(url, guess, text="hint", max_turns=bad)
    with pytest.raises(ValueError, match="timeouts must be above 0"):
        OpenEnvAdapter(url, guess, text="hint", connect_timeout=0)
    with pytest.raises(ValueError, match="nothing to render"):
        OpenEnvAdapter(url, guess, text="hint", render_mode="rgb_array")
    with pytest.raises(ValueError, match="on_invalid must be one of"):
        guesser(url, on_invalid="ignore")


# Pictures.


def encoded(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(squares(3)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        squares(3),
        squares(3).tolist(),
        squares(3).astype(np.int64),
        np.dstack([squares(3), np.zeros((48, 60), np.uint8)]),
        Image.fromarray(squares(3)),
        encoded("PNG"),
        encoded("PNG", "RGBA"),
        encoded("BMP"),
        base64.b64encode(encoded("PNG")).decode(),
        "data:image/png;base64," + base64.encodebytes(encoded("PNG")).decode(),
    ],
)
def test_decode_picture(value):
    found = decode_picture(value)
    assert found.dtype == np.uint8 and np.array_equal(found, squares(3)) and found.flags.writeable
    if isinstance(value, np.ndarray):
        assert not np.shares_memory(found, value)


def test_decode_grey():
    grey = squares(3)[..., 0]
    for value in (grey, grey[..., None], grey.tolist(), Image.fromarray(grey)):
        assert np.array_equal(decode_picture(value), np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no base64!", "is a string, but not base64"),
        (base64.b64encode(b"%PDF-1.4 text").decode(), "is no PNG, JPEG, .*begins with b'%PDF-1.4'"),
        (encoded("TIFF"), "is no PNG"),
        (encoded("PNG")[:-60], "is damaged"),
        (encoded("JPEG")[:200], "is damaged"),
        ([[1, 2], [3]], "lists whose lengths differ"),
        ([1, 2, 3], r"is list of shape \[3\]"),
        (squares(3).transpose(2, 0, 1), r"of shape \[3, 48, 60\], not \[H, W, 3\]"),
        (squares(3) / 255, "scale it"),
        (squares(3).astype(int) - 1, r"integers in 0\.\.255"),
        (squares(3).astype(int) + 1, r"integers in 0\.\.255"),
        (np.zeros((0, 5, 3), np.uint8), "of shape"),
        (np.zeros((5000, 5000), np.uint8), "more than 16777216"),
        (None, "is None, of NoneType"),
        ({"a": 1}, "is {'a': 1}, of dict"),
        (Image.new("I;16", (48, 60)), r"more than 8 bits a pixel \(mode I;16\)"),
    ],
)
def test_what_is_no_picture(value, problem):
    with pytest.raises(ValueError, match=problem):
        decode_picture(value)


def test_a_task_that_is_no_text(make):
    with pytest.raises(TypeError, match="`task` gave NoneType, not a string"):
        make(task=lambda observation: None).reset(seed=0)


# The package.


def test_without_the_package():
    """Importing the environments does not import openenv; without it the error gives the line that installs it."""
    code = (
        "import sys, importlib.machinery, vlmq_trl.envs, vlmq_trl.envs.openenv as adapter\n"
        "assert not {'openenv', 'websockets', 'fastapi'} & set(sys.modules)\n"
        "class Hidden(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name == 'openenv' else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Hidden if f is importlib.machinery.PathFinder else f for f in sys.meta_path]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()] + [Hidden]\n"
        "try:\n"
        "    adapter.OpenEnvAdapter('http://localhost:1', {'a': {}}, text='hint')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith('pip install "vlmq_trl[openenv]"'), done.stderr


def test_the_page(tmp_path):
    """Its server and its player, as they stand but for the port."""
    text = (ROOT / "docs" / "openenv.md").read_text()
    server_code, player_code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    assert len(player_code.splitlines()) <= 20
    port = free_port()
    for name, code in (("server.py", server_code), ("play.py", player_code)):
        assert "8000" in code
        (tmp_path / name).write_text(code.replace("8000", str(port)))
    server = Server(script=tmp_path / "server.py", port=port)
    try:
        server.wait()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "play.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("20 episodes, ")
    finally:
        server.stop()
