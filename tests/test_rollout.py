# SPDX-License-Identifier: Apache-2.0
"""Rollouts: order and seeds, batching, truncation, history, invalid responses, rounds, misbehaviour, errors."""

import errno
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
from collections import Counter

import datasets
import gymnasium
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from gymnasium import spaces
from PIL import Image

from examples.benchmarks import rollout as rollout_benchmark
from tests.misbehaving_envs import Misbehaving
from vlmq_trl.agent_format import CallableFormat, JSONCoTFormat, JSONFormat, PlainFormat
from vlmq_trl.env_pool import EnvFailureError
from vlmq_trl.envs import Decision, make_demonstrator
from vlmq_trl.metrics import wilson_interval
from vlmq_trl.rollout import (
    AHEAD,
    DemonstratorPolicy,
    ExploringPolicy,
    Request,
    Response,
    Rollouts,
    _env_name,
    collect_demonstrations,
    episode_metrics,
    make_env,
    play_episodes,
)
from vlmq_trl.trajectory import (
    Episode,
    TrajectoryError,
    Turn,
    concatenate_trajectories,
    dataset_from_episodes,
    episodes_from_dataset,
    validate_trajectories,
)
from vlmq_trl.trajectory import episodes as episodes_module

NUMBER_LINE = "vlmq_trl/NumberLine-v0"


class Countdown(gymnasium.Env):
    """Starts at 1..6 by seed; "down" counts down, 0 terminates with reward 1; `limit` turns truncate."""

    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (2, 2, 3), np.uint8), "text": spaces.Text(max_length=20)}
    )
    action_space = spaces.Text(max_length=10, min_length=0)
    task = "Say down."

    def __init__(self, limit=4, reward=1.0, images=True):
        self.limit, self.reward, self.images = limit, reward, images

    def observe(self):
        text = {"text": f"{self.count} left"}
        return {"image": np.full((2, 2, 3), self.count, dtype=np.uint8), **text} if self.images else text

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.turns = int(self.np_random.integers(1, 7)), 0
        return self.observe(), {}

    def step(self, action):
        self.turns += 1
        valid = action == "down"
        self.count -= valid
        done = self.count == 0
        reward = self.reward if done else -0.5 * (not valid)
        return self.observe(), reward, done, not done and self.turns >= self.limit, {"valid": valid}


SHARED = Countdown()


class Blind(Countdown):
    """Its picture has another name."""

    def observe(self):
        return {"rgb": super().observe()["image"]}


class Scripted:
    """Answers from the prompt and the episode's generator, and keeps the batch sizes."""

    def __init__(self, answers=("down",), logprobs=False):
        self.answers, self.logprobs, self.batches = answers, logprobs, []

    def act(self, requests):
        self.batches.append(len(requests))
        return [Response(str(r.rng.choice(self.answers)), [-0.5] if self.logprobs else None) for r in requests]


def summary(episode: Episode):
    return (
        episode.episode_id,
        episode.seed,
        episode.terminated,
        episode.truncated,
        [
            (t.completion, t.reward, t.valid, t.prompt, [(i.shape, i.tobytes()) for i in t.images])
            for t in episode.turns
        ],
        None if episode.final_images is None else [image.tobytes() for image in episode.final_images],
    )


def test_episodes_come_in_order_and_do_not_depend_on_the_number_of_environments():
    results = []
    for num_envs in (1, 3, 20):
        policy = Scripted(("down", "up"))
        results.append(list(play_episodes(Countdown, policy, episodes=12, seed=7, num_envs=num_envs)))
        assert policy.batches[0] == min(num_envs, 12)
    assert [e.seed for e in results[0]] == list(range(7, 19))
    assert [e.episode_id for e in results[0]][:2] == ["Countdown/7", "Countdown/8"]
    assert {e.truncated for e in results[0]} == {False, True}
    for other in results[1:]:
        assert [summary(e) for e in other] == [summary(e) for e in results[0]]


def test_a_finished_environment_takes_the_next_episode_at_once():
    policy = Scripted()
    played = list(play_episodes(Countdown, policy, episodes=40, num_envs=4))
    turns = sum(len(episode.turns) for episode in played)
    assert sum(policy.batches) == turns
    assert all(size == 4 for size in policy.batches[: turns // 4 - 4])


@pytest.mark.parametrize("fails", [False, True])
def test_a_slow_episode_does_not_fill_the_memory(fails):
    """What has ended meanwhile waits for it, so no more than so many are begun; also if it fails in the end."""

    class FirstIsLong(Countdown):
        begun, ahead = 0, 0

        def reset(self, *, seed=None, options=None):
            FirstIsLong.begun += 1
            observation, info = super().reset(seed=seed)
            self.count = 200 if seed == 0 else 1
            self.limit = 300
            return observation, info

        def step(self, action):
            stepped = super().step(action)
            if stepped[2] and self.turns == 200:
                FirstIsLong.ahead = FirstIsLong.begun
                if fails:
                    raise RuntimeError("so late")
            return stepped

    episodes = list(play_episodes(FirstIsLong, Scripted(), episodes=150, num_envs=2, max_env_failures=1))
    assert [episode.seed for episode in episodes] == list(range(fails, 150))
    assert fails or len(episodes[0].turns) == 200
    assert AHEAD * 2 <= FirstIsLong.ahead <= AHEAD * 2 + 2


def test_it_streams():
    policy = Scripted()
    first = next(play_episodes(Countdown, policy, episodes=10**9, num_envs=2))
    assert first.seed == 0 and len(policy.batches) < 10


def test_truncation_records_the_final_observation():
    played = list(play_episodes(Countdown, Scripted(), episodes=20, num_envs=5))
    for episode in played:
        assert episode.truncated != episode.terminated
        start = int(episode.turns[0].images[0][0, 0, 0])
        assert episode.truncated == (start > 4)
        if episode.truncated:
            assert int(episode.final_images[0][0, 0, 0]) == start - 4
            assert f"{start - 4} left" in episode.final_prompt[-1]["content"][-1]["text"]
        else:
            assert episode.final_prompt is None and episode.final_images is None
            assert episode.turns[-1].reward == 1.0 and episode.success
    index = validate_trajectories(dataset_from_episodes(played), "all")
    assert index.returns.tolist() == [episode.return_ for episode in played]


def test_max_turns():
    episode = next(play_episodes(lambda: Countdown(limit=10**6), Scripted(("up",)), episodes=1, max_turns=3))
    assert len(episode.turns) == 3 and episode.truncated and episode.final_prompt is not None


def test_responses_that_do_not_parse_cost_a_turn():
    episode = next(play_episodes(Countdown, Scripted(("down",)), episodes=1, agent_format=JSONFormat()))
    assert len(episode.turns) == 4 and episode.truncated
    for turn in episode.turns:
        assert (turn.completion, turn.action, turn.valid, turn.reward) == ("down", "", False, -0.5)
    illegal = next(play_episodes(Countdown, Scripted(("up",)), episodes=1))
    assert [(turn.action, turn.valid) for turn in illegal.turns] == [("up", False)] * 4
    penalties = list(play_episodes(NUMBER_LINE, Scripted(("nonsense",)), episodes=2))
    assert all(episode.return_ == -10.0 and episode.valid_rate == 0.0 for episode in penalties)


def test_history_shows_the_last_turns():
    fmt = PlainFormat(history=2)
    episode = next(play_episodes(Countdown, Scripted(("down", "up")), episodes=1, seed=1, agent_format=fmt))
    assert [len(turn.images) for turn in episode.turns[:4]] == [1, 2, 3, 3][: len(episode.turns)]
    last = episode.turns[-1]
    answers = [m["content"][0]["text"] for m in last.prompt if m["role"] == "assistant"]
    assert answers == [turn.completion for turn in episode.turns[:-1]][-2:]
    assert last.prompt[0]["content"][1]["text"].startswith("Say down.\n")


class OneBuffer(Countdown):
    """Draws every picture into the same array."""

    buffer = np.zeros((2, 2, 3), dtype=np.uint8)

    def observe(self):
        self.buffer[:] = self.count
        return {"image": self.buffer}


def test_pictures_are_kept_when_an_environment_draws_over_them():
    fmt = PlainFormat(history=1)
    episode = next(play_episodes(OneBuffer, Scripted(), episodes=1, seed=1, agent_format=fmt))
    shown = [[int(image[0, 0, 0]) for image in turn.images] for turn in episode.turns]
    first = shown[0][0]
    assert first > 1
    assert shown == [[first]] + [[count + 1, count] for count in range(first - 1, first - len(shown), -1)]


def test_text_only_environments_and_log_probabilities():
    played = list(play_episodes(lambda: Countdown(images=False), Scripted(logprobs=True), episodes=3))
    ds = dataset_from_episodes(played)
    assert "images" not in ds.column_names
    assert ds[0]["behavior_logprobs"] == [-0.5]
    validate_trajectories(ds)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"episodes": 0}, ValueError, "episodes must be at least 1"),
        ({"episodes": 2.0}, TypeError, "episodes must be a whole number, got 2.0"),
        ({"episodes": "3"}, TypeError, "episodes must be a whole number, got '3'"),
        ({"seed": "1"}, TypeError, "seed must be a whole number, got '1'"),
        ({"max_turns": True}, TypeError, "max_turns must be a whole number, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"num_envs": 0}, ValueError, "num_envs must be at least 1"),
        ({"max_turns": 0}, ValueError, "max_turns must be at least 1"),
        ({"max_env_failures": -1}, ValueError, "max_env_failures must be at least 0"),
        ({"workers": True, "env_timeout": -1}, ValueError, "env_timeout must be above 0"),
        ({"agent_format": "json"}, TypeError, "pass for example make_format\\('json'\\)"),
        ({"agent_format": str.strip}, TypeError, "pass for example CallableFormat"),
        ({"policy": make_demonstrator(NUMBER_LINE, "expert")}, TypeError, "becomes one by `DemonstratorPolicy"),
        ({"policy": Scripted}, TypeError, "The policy is the class Scripted; pass an instance"),
        ({"env": Blind}, ValueError, "neither 'image' nor 'text'; its keys are \\['rgb'\\]"),
        ({"env": Countdown()}, TypeError, "a function that makes a new environment, got Countdown"),
        ({"env": lambda: SHARED}, ValueError, "returned the same object twice"),
        ({"env": lambda: "text"}, TypeError, "factory returned str"),
        (
            {"env": lambda: Countdown(reward=float("nan"))},
            EnvFailureError,
            "gave the reward nan on turn 2 of .* seed 1",
        ),
        ({"env": "vlmq_trl/NoSuchGame-v0"}, gymnasium.error.NameNotFound, "NoSuchGame"),
    ],
)
def test_refuses(kwargs, error, words):
    kwargs = {"env": Countdown, "policy": Scripted(), "episodes": 3, **kwargs}
    with pytest.raises(error, match=words):
        list(play_episodes(kwargs.pop("env"), kwargs.pop("policy"), **kwargs))


@pytest.mark.parametrize(
    "answer",
    [
        lambda requests: ["down" for _ in requests],
        lambda requests: (Response("down") for _ in requests),
        lambda requests: [Response(None) for _ in requests],
        lambda requests: None,
    ],
    ids=["strings", "generator", "no text", "nothing"],
)
def test_a_policy_must_answer_with_responses(answer):
    class Own:
        def act(self, requests):
            return answer(requests)

    for policy in (Own(), ExploringPolicy(Own(), PlainFormat(), 0.5)):
        with pytest.raises(TypeError, match=r"must give a list with one Response\(text\) for each request, got"):
            list(play_episodes(Countdown, policy, episodes=2))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda env, rng: "down", "The demonstrator gave 'down'; it must give a Decision"),
        (
            lambda env: Decision("down", {}, ""),
            r"a function with the arguments \(env\) \(too many positional arguments",
        ),
        (None, "The policy is None; it must be a function"),
        (["random"], "The policy is \\['random'\\]; it must be a function"),
        (Decision, "The policy is <class .*Decision'>; it must be a function"),
        (Scripted, "The policy is the class Scripted; pass an instance"),
    ],
)
def test_policies_that_are_none(policy, words):
    with pytest.raises(TypeError, match=words):
        collect_demonstrations(Countdown, policy=policy, episodes=2, progress=False)


@pytest.mark.parametrize("kept", [True, False], ids=["cache_dir", "temporary"])
def test_a_failure_leaves_what_has_been_collected(kept, tmp_path):
    """Eight episodes in two environments; the sixth fails, at the reset: those before it have ended."""

    def collect(**kwargs):
        return collect_demonstrations(
            Misbehaving, policy=Scripted(("go",)), num_envs=2, cache_dir=tmp_path if kept else None, **kwargs
        )

    env_kwargs = {"fault": "raise", "seeds": (5,), "turn": -1}
    with pytest.raises(EnvFailureError, match="with seed 5") as caught:
        collect(episodes=8, env_kwargs=env_kwargs, progress=False)
    (note,) = caught.value.__notes__
    file = re.match(r"The 4 episodes that had ended, the last with the seed 3, lie in (\S+?\.arrow)", note)[1]
    assert ("until this process ends" in note) != kept
    assert not kept or [str(path) for path in tmp_path.iterdir()] == [file]
    there = datasets.Dataset.from_file(file)
    assert validate_trajectories(there, "all").episode_ids.tolist() == [f"Misbehaving/{seed}" for seed in range(4)]
    rest = collect(episodes=2, seed=6, progress=False)
    assert len(validate_trajectories(concatenate_trajectories([there, rest]))) == 6
    with pytest.raises(EnvFailureError) as caught:  # nothing had ended
        collect(episodes=2, env_kwargs={**env_kwargs, "seeds": (0,)}, progress=False)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError], ids=["Ctrl-C", "a policy that raises"])
def test_an_interruption_leaves_what_has_been_collected(error, tmp_path):
    """Eight episodes at once, of which those of one or two turns have ended at the third call."""

    class Interrupted(Scripted):
        def act(self, requests):
            if len(self.batches) == 2:
                raise error
            return super().act(requests)

    common = {"episodes": 8, "num_envs": 8, "seed": 20, "cache_dir": tmp_path, "progress": False}
    whole = collect_demonstrations(Countdown, policy=Scripted(), **common)
    turns = Counter(whole["episode_id"])
    with pytest.raises(error) as caught:
        collect_demonstrations(Countdown, policy=Interrupted(), **common)
    there = datasets.Dataset.from_file(re.search(r"lie in (\S+?\.arrow)", caught.value.__notes__[0])[1])
    short = [name for name, count in turns.items() if count <= 2]
    assert validate_trajectories(there, "all").episode_ids.tolist() == short
    assert 0 < len(short) < 8 and short != list(turns)[: len(short)], "one that began later has ended earlier"


@pytest.mark.parametrize("where", ["encoding", "writing", "finishing"])
def test_ctrl_c_outside_of_play_leaves_what_has_been_collected(where, tmp_path, monkeypatch):
    """A signal, as the terminal sends it, while an episode is encoded or written, or the file finished."""
    calls = Counter()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it

    def interrupting(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            calls[where] += 1
            if calls[where] == {"encoding": 30, "writing": 30, "finishing": 1}[where]:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return call

    names = {"encoding": (episodes_module, "_structured"), "writing": (ArrowWriter, "write")}
    owner, name = names.get(where, (ArrowWriter, "finalize"))
    monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            collect_demonstrations(Countdown, policy=Scripted(), episodes=20, cache_dir=tmp_path, progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    number, file = re.search(r"The (\d+) episodes .* lie in (\S+?\.arrow)", caught.value.__notes__[0]).groups()
    assert [str(path) for path in tmp_path.iterdir()] == [file]
    kept = validate_trajectories(datasets.Dataset.from_file(file), "all").episode_ids.tolist()
    assert kept == [f"Countdown/{seed}" for seed in range(int(number))]
    assert len(kept) == 20 if where == "finishing" else 3 < len(kept) < 20


def test_an_answer_that_cannot_be_stored_leaves_what_came_before(tmp_path):
    class Surrogate(Scripted):
        def act(self, requests):
            answers = super().act(requests)
            return answers if len(self.batches) < 6 else [Response("down\ud800") for _ in requests]

    with pytest.raises(TrajectoryError, match="a lone surrogate at position 4") as caught:
        collect_demonstrations(
            Countdown, policy=Surrogate(), episodes=20, num_envs=2, cache_dir=tmp_path, progress=False
        )
    (file,) = tmp_path.iterdir()
    assert str(file) in caught.value.__notes__[0] and len(validate_trajectories(datasets.Dataset.from_file(str(file))))


@pytest.mark.parametrize("stays_full", [True, False])
def test_a_full_disk_leaves_what_has_reached_it(stays_full, tmp_path, monkeypatch):
    flush, calls = ArrowWriter.write_examples_on_file, []

    def until_it_is_full(self):
        calls.append(self)
        if len(calls) > 2 if stays_full else len(calls) == 3:
            self.stream.write(b"half a batch")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(self)

    monkeypatch.setattr(episodes_module, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(ArrowWriter, "write_examples_on_file", until_it_is_full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        collect_demonstrations(Countdown, policy=Scripted(), episodes=20, cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    assert str(file) in caught.value.__notes__[0]
    assert 10 <= len(datasets.Dataset.from_file(str(file))) < 20
    assert len(validate_trajectories(datasets.Dataset.from_file(str(file)), "all")) >= 2


def test_a_policy_must_answer_everything():
    class Lazy:
        def act(self, requests):
            return []

    with pytest.raises(ValueError, match="0 responses to 2 requests"):
        list(play_episodes(Countdown, Lazy(), episodes=2))


def test_environments_are_closed():
    closed = []

    class Closing(Countdown):
        def close(self):
            closed.append(self)

    episodes = play_episodes(Closing, Scripted(), episodes=5, num_envs=2)
    next(episodes)
    episodes.close()
    assert len(closed) == 2


def test_make_env_passes_arguments():
    assert make_env(NUMBER_LINE, {"invalid_penalty": 0.25}).unwrapped.invalid_penalty == 0.25
    assert make_env(Countdown, {"limit": 2}).limit == 2


@pytest.mark.parametrize("game", ["NumberLine", "EZPoints", "Points24", "Blackjack"])
def test_collect_demonstrations(game):
    env_id = f"vlmq_trl/{game}-v0"
    ds = collect_demonstrations(env_id, policy="flawed:0.5", episodes=6, seed=3, progress=False)
    index = validate_trajectories(ds, "all")
    assert len(index) == 6 and index.episode_ids[0] == f"{env_id}/3"
    assert all(ds["valid"]) and set(ds["env_id"]) == {env_id}
    again = collect_demonstrations(env_id, policy="flawed:0.5", episodes=6, seed=3, num_envs=1, progress=False)
    assert again["completion"][:] == ds["completion"][:]
    assert again.with_format("arrow")["images"].to_pylist() == ds.with_format("arrow")["images"].to_pylist()
    fields = make_env(env_id).unwrapped.reading_fields
    fmt = JSONCoTFormat(reading_fields=fields)
    for episode in episodes_from_dataset(ds):
        for turn in episode.turns:
            assert list(json.loads(turn.completion)) == [*fields, "thoughts", "action"]
            assert fmt.parse(turn.completion).action == turn.action


def test_collect_with_other_formats_and_players(tmp_path):
    plain = collect_demonstrations(
        NUMBER_LINE, policy="expert", episodes=5, agent_format=PlainFormat(), progress=False, cache_dir=tmp_path
    )
    assert set(plain["action"]) <= {"+", "-"}
    assert [message["content"] for (message,) in plain["completion"]] == plain["action"][:]
    assert validate_trajectories(plain).success.all()
    assert len(list(tmp_path.iterdir())) == 1
    own = collect_demonstrations(
        NUMBER_LINE,
        policy=lambda env, rng: Decision("+", env.unwrapped.state_text(), ""),
        episodes=2,
        progress=False,
    )
    assert set(own["action"]) == {"+"}
    policy = DemonstratorPolicy(make_demonstrator(NUMBER_LINE, "random"), PlainFormat())
    assert len(
        collect_demonstrations(NUMBER_LINE, policy=policy, episodes=2, agent_format=PlainFormat(), progress=False)
    )


@pytest.mark.parametrize("workers", [False, True])
def test_readings_are_compared_with_the_state_before_the_action(workers):
    said = {"current number": "1", "target number": "3"}
    fmt = JSONCoTFormat(reading_fields=tuple(said))

    class Reads:
        def act(self, requests):
            return [Response(fmt.render("+", said, "")) for _ in requests]

    episodes = list(play_episodes(NUMBER_LINE, Reads(), episodes=30, seed=0, num_envs=4, workers=workers))
    env, right = gymnasium.make(NUMBER_LINE).unwrapped, []
    for episode in episodes:
        env.reset(seed=episode.seed)
        for turn in episode.turns:
            assert turn.read_right == (env.state_text() == said)
            right.append(turn.read_right)
            env.step("+")
    assert 0 < sum(right) < len(right)
    assert episode_metrics(episodes)["reading_rate"] == pytest.approx(sum(right) / len(right))
    expert = DemonstratorPolicy(make_demonstrator(NUMBER_LINE, "flawed"), fmt)
    assert episode_metrics(play_episodes(NUMBER_LINE, expert, episodes=5))["reading_rate"] == 1
    plain = play_episodes(NUMBER_LINE, expert, episodes=5, agent_format=PlainFormat())
    assert "reading_rate" not in episode_metrics(plain)


def test_episode_metrics():
    def episode(rewards, valid):
        turns = tuple(Turn([], [], "", reward, "", ok) for reward, ok in zip(rewards, valid, strict=True))
        return Episode("e", turns, True, False)

    results = episode_metrics([episode([0.0, 1.0], [True, False]), episode([-1.0], [True])])
    assert results["success_rate"] == 0.5 and results["mean_turns"] == 1.5 and results["episodes"] == 2
    assert results["valid_rate"] == pytest.approx(2 / 3)
    assert (results["success_rate_low"], results["success_rate_high"]) == wilson_interval(1, 2)
    with pytest.raises(ValueError, match="no episodes"):
        episode_metrics([])


def misbehaving(fault="", seeds=(), turn=1, long=(), **kwargs):
    env_kwargs = {"fault": fault, "seeds": seeds, "turn": turn, "long": long}
    return Rollouts(Misbehaving, env_kwargs=env_kwargs, **kwargs)


def by_seed(episodes):
    return {episode.seed: summary(episode) for episode in episodes}


@pytest.mark.parametrize("fmt", [PlainFormat(), PlainFormat(history=2)])
def test_processes_change_nothing(fmt):
    results = []
    for env, kwargs in ((Misbehaving, {}), (NUMBER_LINE, {"max_turns": 4})):
        for workers in (False, True):
            policy = Scripted(("go", "stay", "+", "-"))
            played = play_episodes(
                env, policy, episodes=7, seed=5, num_envs=3, agent_format=fmt, workers=workers, **kwargs
            )
            results.append(([summary(episode) for episode in played], policy.batches))
        assert results[-1] == results[-2] and len(results[-1][0]) == 7
    assert results[0] != results[2]


@pytest.mark.parametrize(
    ("fault", "turn", "kind", "workers"),
    [
        ("raise", 1, "raised", False),
        ("raise", -1, "raised", False),
        ("nan", 2, "reward", False),
        ("grey image", 0, "observation", False),
        ("raise", 1, "raised", True),
        ("raise", -1, "raised", True),
        ("nan", 2, "reward", True),
        ("grey image", 0, "observation", True),
        ("hang", 1, "timeout", True),
        ("exit", 1, "died", True),
    ],
)
def test_the_run_goes_on_without_the_failed_episodes(fault, turn, kind, workers, caplog):
    with misbehaving() as rollouts:
        expected = by_seed(rollouts.play(Scripted(("go", "stay")), range(9)))
        assert rollouts.failures == {} and sorted(expected) == list(range(9))
    with misbehaving(fault, (2, 6), turn, num_envs=3, workers=workers, env_timeout=1, max_env_failures=2) as rollouts:
        played = by_seed(rollouts.play(Scripted(("go", "stay")), range(9)))
        assert rollouts.failures == {kind: 2} and sorted(rollouts.dropped) == [2, 6]
    assert played == {seed: one for seed, one in expected.items() if seed not in (2, 6)}
    when = "at the reset" if turn == -1 else f"on turn {turn}"
    assert f"{when} of the episode with seed 6; the episode is dropped ({kind})" in caplog.text


def test_a_killed_process_costs_one_episode():
    class Killer(Scripted):
        """Kills one of the environments in the third batch."""

        def act(self, requests):
            if len(self.batches) == 2:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            return super().act(requests)

    with misbehaving(num_envs=3, workers=True, max_env_failures=1) as rollouts:
        played = by_seed(rollouts.play(Killer(("go",)), range(8)))
        assert rollouts.failures == {"died": 1} and len(played) == 7
    with misbehaving() as rollouts:
        expected = by_seed(rollouts.play(Scripted(("go",)), range(8)))
    assert played.items() < expected.items()


@pytest.mark.parametrize("workers", [False, True])
def test_too_many_failures_in_a_row_end_the_run(workers):
    """Episodes of three turns, two environments: 0 and 1 end together, then 2 and 3 fail in their second turn."""
    played = []
    with misbehaving("raise", (2, 3, 4, 6, 7, 8), num_envs=2, workers=workers, max_env_failures=2) as rollouts:
        with pytest.raises(EnvFailureError) as caught:
            for episode in rollouts.play(Scripted(("go",)), itertools.count()):
                played.append(episode.seed)
        # 2 and 3 fail, then 4 fails beside 5, which was begun with it and goes on: three in a row.
        assert played == [0, 1] and rollouts.failures == {"raised": 3} and rollouts.turns_running == 0
        assert all(
            words in str(caught.value)
            for words in (
                "Misbehaving raised KeyError: 'no such door' on turn 1 of the episode with seed 4. Mend the env",
                "These are 3 failures in a row; all by kind: {'raised': 3}.",
            )
        )
        if workers:
            assert 'raise KeyError("no such door")' in str(caught.value)
        else:
            assert isinstance(caught.value.__cause__, KeyError)
    with misbehaving("raise", (2, 4, 6, 7), num_envs=1, workers=workers, max_env_failures=1) as rollouts:
        with pytest.raises(EnvFailureError, match="seed 7"):  # one in a row is allowed, again and again
            played = [episode.seed for episode in rollouts.play(Scripted(("go",)), range(8))]
        assert rollouts.failures == {"raised": 4}


def test_what_ended_comes_before_the_error():
    """Four environments; in the tick in which 0, 1 and 3 end, 2 gives a bad reward."""
    played = []
    with misbehaving("nan", (2,), turn=2) as rollouts:
        with pytest.raises(EnvFailureError, match="gave the reward nan on turn 2 of the episode with seed 2"):
            for episode in rollouts.play(Scripted(("go",)), range(4)):
                played.append(episode.seed)
    assert played == [0, 1, 3]
    # In order, two environments: while 0 takes six turns, 1 ends, then 2 raises.
    kwargs = {"fault": "raise", "seeds": (2,), "long": (0,)}
    in_order = play_episodes(Misbehaving, Scripted(("go",)), episodes=5, num_envs=2, env_kwargs=kwargs)
    played = []
    with pytest.raises(EnvFailureError, match="on turn 1 of the episode with seed 2"):
        for episode in in_order:
            played.append(episode.seed)
    assert played == [1]


@pytest.mark.parametrize("seeds", [(0,), (2, 3), (9,), ()])
def test_playing_in_order_passes_over_the_dropped(seeds):
    policy = Scripted(("go",))
    kwargs = {"fault": "raise", "seeds": seeds}
    played = play_episodes(Misbehaving, policy, episodes=10, num_envs=3, env_kwargs=kwargs, max_env_failures=2)
    first = next(played)
    assert len(policy.batches) < 6  # it waits for none of them
    assert [first.seed, *(e.seed for e in played)] == [seed for seed in range(10) if seed not in seeds]


def test_playing_in_order_goes_on_where_nothing_is_left_to_wait_for():
    """The long first episode fails, and so does the only one that is begun after it."""

    class Unlucky(Misbehaving):
        def __init__(self):
            super().__init__("raise", (0, 2 * AHEAD + 1))

        def step(self, action):
            if self.seed:
                return {"text": "x"}, 1.0, True, False, {}
            self.turn, self.left = 0, getattr(self, "left", 5 * AHEAD) - 1
            if self.left:
                return {"text": "x"}, 0.0, False, False, {}
            return super().step(action)

        def reset(self, *, seed=None, options=None):
            self.turn = -1
            return super().reset(seed=seed)

    played = list(play_episodes(Unlucky, Scripted(("go",)), episodes=200, num_envs=2, max_env_failures=9))
    assert [e.seed for e in played] == [n for n in range(200) if n not in (0, 2 * AHEAD + 1)]


class SaysNothingOnce(Misbehaving):
    """Of episode 1 the second observation is of no use to the agent."""

    task = "Say go."

    def __init__(self, nothing):
        super().__init__(images=False)
        self.nothing = nothing

    def answer(self):
        observation, reward = super().answer()
        return (self.nothing if (self.seed, self.turns) == (1, 1) else observation), reward


def test_an_observation_that_cannot_be_shown():
    """It costs its episode alone, or ends the play after what had ended; with a task text before, "" can be shown."""
    history, env = PlainFormat(history=1), functools.partial(SaysNothingOnce, {"text": ""})
    played = list(play_episodes(env, Scripted(("go",)), episodes=3, num_envs=3, agent_format=history))
    assert [e.seed for e in played] == [0, 1, 2]
    assert played[1].turns[1].prompt[-1]["content"] == [{"type": "text", "text": ""}]

    env = functools.partial(SaysNothingOnce, {"text": None, "depth": 1})
    played = play_episodes(env, Scripted(("go",)), episodes=3, num_envs=3, max_env_failures=1)
    assert [e.seed for e in played] == [0, 2]
    ended = []
    with pytest.raises(ValueError, match="The observation has neither 'image' nor 'text'"):
        for e in play_episodes(env, Scripted(("go",)), episodes=3, num_envs=1):
            ended.append(e.seed)
    assert ended == [0]


def test_pictures_of_the_users_own_prompts_may_be_pil():
    def prompt(task, observation, history):
        picture = Image.fromarray(observation["image"]).resize((8, 8)).convert("L")
        return [{"role": "user", "content": [{"type": "image"}]}], [picture]

    fmt = CallableFormat(prompt_fn=prompt)
    (episode,) = play_episodes(Misbehaving, Scripted(("go",)), episodes=1, agent_format=fmt)
    assert all(image.shape == (8, 8, 3) and image.dtype == np.uint8 for turn in episode.turns for image in turn.images)


def test_names_of_environments():
    assert _env_name(functools.partial(gymnasium.make, "Own-v0", level=2)) == "Own-v0"
    assert _env_name(functools.partial(Misbehaving, "raise")) == _env_name(Misbehaving) == "Misbehaving"


def test_a_failed_reset_is_followed_by_another():
    with misbehaving("raise", (0, 1), turn=-1, num_envs=1, max_env_failures=2) as rollouts:
        assert [episode.seed for episode in rollouts.play(Scripted(("go",)), range(4))] == [2, 3]


def test_failures_of_the_restart_count():
    made = []

    def factory():
        made.append(1)
        return Misbehaving("raise" if len(made) == 1 else "make" if len(made) == 2 else "", (0,))

    with Rollouts(factory, num_envs=1, max_env_failures=2) as rollouts:
        assert [episode.seed for episode in rollouts.play(Scripted(("go",)), range(3))] == [2]
        assert rollouts.failures == {"raised": 1, "start": 1}


@pytest.mark.parametrize("workers", [False, True])
def test_rounds(workers):
    """A generator that is closed early drops what is running, and the same environments play the next round."""
    with misbehaving(num_envs=3, workers=workers, seed=10, id_prefix="round", long=(11,)) as rollouts:
        pids = {process.pid for process in multiprocessing.active_children()}
        first = rollouts.play(Scripted(("go",)), itertools.count())
        episode = next(first)
        # The third ended in the same tick; of the second, six turns long, three are played.
        assert (episode.episode_id, episode.seed, rollouts.turns_running) == ("round/10", 10, 3)
        assert next(first).seed == 12
        with pytest.raises(RuntimeError, match="playing already"):
            next(rollouts.play(Scripted(("go",)), [7]))
        first.close()
        assert rollouts.turns_running == 0
        second = list(rollouts.play(Scripted(("go",)), [100, 3, 50, 3]))
        assert [episode.seed for episode in second] == [110, 13, 60, 13]
        assert summary(second[1]) == summary(second[3])
        assert list(rollouts.play(Scripted(), [])) == []
        assert {process.pid for process in multiprocessing.active_children()} == pids and rollouts.failures == {}
    with pytest.raises(ValueError, match="closed"):
        rollouts.play(Scripted(("go",)), [1])


def test_a_policy_that_raises_leaves_the_environments_usable():
    class Broken(Scripted):
        def act(self, requests):
            raise RuntimeError("out of memory")

    with misbehaving(num_envs=2, workers=True) as rollouts:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(rollouts.play(Broken(), range(3)))
        assert len(list(rollouts.play(Scripted(("go",)), range(3)))) == 3


def test_ctrl_c_within_a_step_leaves_the_environments_usable():
    with misbehaving("interrupt", (1,), num_envs=3) as rollouts:
        with pytest.raises(KeyboardInterrupt):
            list(rollouts.play(Scripted(("go",)), range(3)))
        assert [episode.seed for episode in rollouts.play(Scripted(("go",)), [5, 6, 7, 8])] == [5, 6, 7, 8]


def test_numbers_are_drawn_when_an_environment_is_free():
    """Countdown's episodes are of unequal length; the caller stops as soon as 20 turns are played or under way."""
    log = []
    played = []
    with Rollouts(Countdown, num_envs=3, env_kwargs={"limit": 10}) as rollouts:

        def numbers():
            for number in itertools.count():
                turns = sum(len(episode.turns) for episode in played)
                log.append((number, len(played), rollouts.turns_running))
                if turns + rollouts.turns_running >= 20:
                    return
                yield number

        for episode in rollouts.play(Scripted(), numbers()):
            played.append(episode)
    assert log[:3] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]  # three are free
    # One environment is free for each episode that has ended, so number n is drawn when n - 2 have.
    assert all(number - 2 <= ended for number, ended, _ in log[3:])
    assert sum(len(episode.turns) for episode in played) >= 20 and len(played) == log[-1][0]
    lengths = [len(episode.turns) for episode in sorted(played, key=lambda episode: episode.seed)]
    # By hand: with 3 environments, the first to end is the shortest of the first three episodes.
    assert log[3] == (3, 1 + lengths[:3].count(min(lengths[:3])) - 1, 2 * min(lengths[:3]))


def test_a_demonstrator_cannot_play_in_another_process():
    with pytest.raises(TypeError, match="reads the environment's state"):
        collect_demonstrations(NUMBER_LINE, policy="expert", episodes=2, workers=True)
    player = DemonstratorPolicy(make_demonstrator(NUMBER_LINE, "expert"), PlainFormat())
    with misbehaving(workers=True, num_envs=1) as rollouts:
        with pytest.raises(TypeError, match="reads the environment's state"):
            rollouts.play(player, [0])

    class Hidden(Scripted):
        def act(self, requests):
            return player.act(requests)

    with pytest.raises(TypeError, match="reads the environment's state"):
        list(play_episodes(NUMBER_LINE, Hidden(), episodes=1, workers=True))


def test_demonstrations_of_a_policy_in_processes():
    def collected(workers):
        policy = Scripted(("+", "-"))
        return collect_demonstrations(
            NUMBER_LINE, policy=policy, episodes=3, agent_format=PlainFormat(), workers=workers, progress=False
        ).to_list()

    assert collected(True) == collected(False)


def test_the_benchmark(monkeypatch):
    monkeypatch.setattr(rollout_benchmark, "GRID", (1, 3))
    measured = rollout_benchmark.measure(Scripted(("+", "-")), repetitions=3, turns=40, grid_turns=8)
    assert all(pair["ratio"] == pair["batch"] / pair["loop"] for pair in measured["pairs"])
    assert [(row["num_envs"], row["workers"]) for row in measured["grid"]] == [
        (1, False),
        (1, True),
        (3, False),
        (3, True),
    ]
    assert all(0 < row["outside_policy"] < 1 for row in measured["grid"])
    result = {
        "command": "python",
        "machine": {"cpu": "CPU", "cores": 2, "memory_gb": 8, "gpu": None, "threads": 2},
        "load_average": 0.0,
        "versions": {"vlmq_trl": "1"},
        "pairs": [{"loop": 2.0, "batch": 2 * ratio, "ratio": ratio} for ratio in (5.0, 7.0, 6.5)],
        "ratio": 6.5,
        "grid": [
            {"num_envs": 16, "workers": w, "turns_per_second": 9.0, "outside_policy": 0.5} for w in (False, True)
        ],
    }
    text = rollout_benchmark.section(result)
    assert "| 3 | 2.00 turns/s | 13.00 turns/s | **6.50** (5.00–7.00) | reached |" in text
    assert "| 16 | 9.00 (50.0 %) | 9.00 (50.0 %) |" in text and "shared" not in text
    assert "missed" in rollout_benchmark.section({**result, "ratio": 5.9, "load_average": 2.0})


# ---- exploring ----


def test_exploring():
    """Answers without a legal action are always replaced, others in the share epsilon; by the episode's generator."""

    class Says:
        def act(self, requests):
            return [Response(word, [-0.1]) for word in ("+", "fly", "- ", "")]

    def explore(epsilon, seed):
        requests = [Request(None, [], [], np.random.default_rng((seed, k)), ("-", "+")) for k in range(4)]
        return ExploringPolicy(Says(), PlainFormat(), epsilon).act(requests)

    rounds = [explore(0.0, seed) for seed in range(40)]
    assert all((r[0], r[2]) == (Response("+", [-0.1]), Response("- ", [-0.1])) for r in rounds)
    for k in (1, 3):
        assert {(r[k].text, r[k].behavior_logprobs) for r in rounds} == {("-", None), ("+", None)}
    explored = [explore(0.25, seed)[0] for seed in range(400)]
    # Half of the random actions are "+" again.
    assert 60 < sum(r.behavior_logprobs is None for r in explored) < 140
    assert 25 < sum(r.text == "-" for r in explored) < 75
    assert explore(0.25, 3) == explore(0.25, 3)
    assert all(r.behavior_logprobs is None for r in explore(1.0, 0))


@pytest.mark.parametrize("workers", [False, True])
def test_exploring_where_the_legal_actions_change(workers):
    """The random action is one of the present turn's, in ALFWorld the admissible commands."""

    class Mute:
        def act(self, requests):
            return [Response("") for _ in requests]

    def play(policy):
        return play_episodes("vlmq_trl/ALFWorld-Pick-v0", policy, episodes=2, max_turns=8, num_envs=2, workers=workers)

    explored = list(play(ExploringPolicy(Mute(), JSONFormat(), 0.5)))
    turns = [turn for episode in explored for turn in episode.turns]
    assert len(turns) == 16 and all(turn.valid for turn in turns)
    assert len({turn.action for turn in turns}) > 4


def test_nothing_is_explored_where_no_action_is_listed():
    class Says:
        def act(self, requests):
            return [Response("fly") for _ in requests]

    request = Request(None, [], [], np.random.default_rng(0))
    assert ExploringPolicy(Says(), PlainFormat(), 1.0).act([request]) == [Response("fly")]
