# SPDX-License-Identifier: Apache-2.0
"""The contract that every environment keeps, whatever its domain: one suite, some environments of each domain.

Each domain's own tests say what its rules are; here stands only what all have in common.
"""

import string
import warnings
from contextlib import closing
from dataclasses import dataclass, field

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from vlmq_trl.agent_format import default_format
from vlmq_trl.envs import DOMAINS, VLMAgentWrapper, make_demonstrator

FROZEN_LAKE = "vlmq_trl_tests/FrozenLake-v0"


@dataclass(frozen=True)
class Case:
    """An environment, and how much of it a test may play."""

    env_id: str
    kwargs: dict = field(default_factory=dict)
    episodes: int = 6
    strings: int = 2000  # that are played; 10,000 are parsed
    policies: tuple[str, ...] = ("expert", "flawed:0.5", "random")
    equal_pictures: bool = True  # a browser may draw a page a moment later: docs/miniwob.md, "Seeds"

    def make(self, **kwargs):
        return gymnasium.make(self.env_id, **{**self.kwargs, **kwargs})


CASES = [
    *(Case(env_id) for env_id in DOMAINS[0].envs),
    Case("vlmq_trl/BabyAI-GoToLocal-v0"),
    Case("vlmq_trl/BabyAI-PutNextLocal-v0", {"view": "full", "effects": True, "tile_size": 8}, 4, 500),
    Case("vlmq_trl/BabyAI-UnlockPickup-v0", {"tile_size": 16}, episodes=3, strings=500),
    Case("vlmq_trl/ALFWorld-Pick-v0", episodes=4, strings=500),
    Case("vlmq_trl/ALFWorld-v0", {"picture": False, "admissible": False, "unseen": True}, episodes=2, strings=200),
    Case("vlmq_trl/MiniWoB-click-test-2-v0", episodes=2, strings=30, equal_pictures=False),
    Case("vlmq_trl/MiniWoB-enter-text-v0", {"marks": True, "action_space": "both"}, 2, 20, equal_pictures=False),
    Case(FROZEN_LAKE, strings=300, policies=("random",)),
]


@pytest.fixture(scope="module", autouse=True)
def frozen_lake():
    def make(**kwargs):
        lake = gymnasium.make("FrozenLake-v1", render_mode="rgb_array")
        return VLMAgentWrapper(lake, {"left": 0, "down": 1, "right": 2, "up": 3}, "Reach the gift.", **kwargs)

    gymnasium.register(FROZEN_LAKE, entry_point=make)
    yield
    del gymnasium.registry[FROZEN_LAKE]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.env_id)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def env(case):
    """One environment for a case's tests: some start a browser."""
    made = case.make()
    yield made
    made.close()


def play(env, policy, seed, case):
    """The trace of one episode: all that an agent could notice."""
    demonstrate, rng = make_demonstrator(case.env_id, policy), np.random.default_rng(seed)

    def noticed(observation):
        image = observation.get("image") if case.equal_pictures else None
        return None if image is None else image.tobytes(), observation.get("text")

    observation, _ = env.reset(seed=seed)
    trace, done = [], False
    while not done:
        trace.append((noticed(observation), env.unwrapped.task, tuple(env.unwrapped.state_text().items())))
        decision = demonstrate(env, rng)
        observation, reward, terminated, truncated, info = env.step(decision.action)
        trace.append((decision, reward, terminated, truncated, info["action"], info["valid"]))
        done = terminated or truncated
    return [*trace, noticed(observation)]


def test_every_domain_is_here():
    covered = {domain.name for domain in DOMAINS for case in CASES if case.env_id in domain.envs}
    assert covered == {domain.name for domain in DOMAINS}
    assert [domain.missing() for domain in DOMAINS] == [""] * len(DOMAINS)


def test_gymnasiums_checker_is_content(case):
    with closing(case.make(render_mode="rgb_array")) as made, warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)  # which closes another one


def test_equal_seeds_give_equal_episodes_and_others_differ(case, env):
    traces = {}
    for policy in case.policies:
        for seed in range(case.episodes // 2):
            traces[policy, seed] = play(env, policy, seed, case)
            assert traces[policy, seed] == play(env, policy, seed, case)
    assert len({str(trace[0]) for trace in traces.values()}) > 1 or case.episodes < 4 or case.env_id == FROZEN_LAKE


def test_what_a_demonstrator_says_is_true_and_what_it_does_is_valid(case, env):
    agent_format = default_format(env)
    for policy in case.policies:
        demonstrate, rng = make_demonstrator(case.env_id, policy), np.random.default_rng(0)
        for seed in range(case.episodes):
            env.reset(seed=seed)
            done = False
            while not done:
                decision = demonstrate(env, rng)
                assert decision.reading == env.unwrapped.state_text()
                assert tuple(decision.reading) == env.unwrapped.reading_fields
                response = agent_format.render(decision.action, decision.reading, decision.thoughts)
                assert agent_format.parse(response).action == decision.action
                _, _, terminated, truncated, info = env.step(decision.action)
                assert info["valid"], decision
                done = terminated or truncated


def test_the_expert_succeeds_and_a_flaw_costs_something(case, env):
    if "expert" not in case.policies:
        pytest.skip("no expert is scripted")

    def returns(policy):
        traces = [play(env, policy, seed, case) for seed in range(100, 100 + 2 * case.episodes)]
        return [sum(step[1] for step in trace[1::2]) for trace in traces]

    expert, flawed = returns("expert"), returns("flawed:1")
    assert np.mean(np.array(expert) > 0) > np.mean(np.array(flawed) > 0)


def hostile_strings(env, count, seed=0):
    """Random strings: noise, and pieces of what the environment's actions look like."""
    rng = np.random.default_rng(seed)
    legal = [*(env.unwrapped.legal_actions or ()), "click('13')", "go to", "stand", "noop()"]
    pieces = [*legal, *string.printable, "１", "é", "\x00", "😀", "\ud800", "None", "__import__('os')", "'" * 40, "("]
    for _ in range(count):
        yield "".join(rng.choice(np.array(pieces, dtype=object), size=rng.integers(0, 6)))


def test_ten_thousand_strings_are_parsed(env):
    env.reset(seed=0)
    for action in hostile_strings(env, 10_000):
        env.unwrapped.parse_env(action)
    for other in (None, 3, b"left", ["left"], float("nan")):
        assert env.unwrapped.parse_env(other) is None


def test_any_string_may_be_played(case, env):
    env.reset(seed=0)
    for action in hostile_strings(env, case.strings, seed=1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        assert np.isfinite(reward)
        assert isinstance(info["valid"], bool) and isinstance(info["action"], str)
        assert info["valid"] or not info["action"]
        assert not (terminated and truncated)
        if terminated or truncated:
            env.reset()


def test_invalid_actions_cost_the_penalty_and_end_in_truncation(case):
    """Nothing but invalid actions: the limit of turns holds, and none is a success or a termination."""
    made = case.make(invalid_penalty=0.25)
    try:
        made.reset(seed=0)
        for _ in range(5000):
            _, reward, terminated, truncated, info = made.step("\x00 no such action")
            assert (terminated, info["valid"], info["action"]) == (False, False, "")
            assert reward == -0.25
            if truncated:
                break
        assert truncated
    finally:
        made.close()


def test_an_invalid_action_may_end_the_episode(case):
    made = case.make(on_invalid="terminate")
    try:
        made.reset(seed=0)
        assert made.step("\x00 no such action")[2:4] == (True, False)
        with pytest.raises(ResetNeeded):
            made.unwrapped.step("anything")
    finally:
        made.close()


def test_a_bad_option_is_refused(case):
    for kwargs, text in (
        ({"on_invalid": "explode"}, "on_invalid must be one of"),
        ({"invalid_penalty": -1.0}, "invalid_penalty must be finite"),
        ({"render_mode": "ansi"}, "render_mode must be None or 'rgb_array'"),
    ):
        with pytest.raises(ValueError, match=text):
            case.make(**kwargs)


def test_nothing_is_left_after_close(case, env):
    env.close()  # what it started would come and go beside what is looked for
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    made = case.make()
    made.reset(seed=0)
    made.close()
    made.close()  # twice is harmless
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert alive == []
