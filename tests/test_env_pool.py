# SPDX-License-Identifier: Apache-2.0
"""Environments that misbehave, and their processes: every failure has its kind, and nothing is left behind."""

import ast
import contextlib
import functools
import inspect
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest

import vlmq_trl
from tests.misbehaving_envs import Misbehaving, make_nothing
from vlmq_trl import env_pool
from vlmq_trl.agent_format import JSONCoTFormat, PlainFormat
from vlmq_trl.env_pool import (
    FAILURES,
    EnvFailureError,
    EnvPool,
    Failure,
    Outcome,
    first_look,
    legal_actions_of,
    make_env,
)

ROOT = Path(__file__).parents[1]
NUMBER_LINE = "vlmq_trl/NumberLine-v0"


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids, seconds=20.0):
    """Whether these processes end in time."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def worker_pids():
    return {process.pid for process in multiprocessing.active_children()}


def play(pool, seed, actions=("go", "go", "go")):
    """All answers of environment 0 to a reset and these steps, up to a failure."""
    pool.reset(0, seed)
    answers = [pool.receive()[0]]
    for action in actions:
        if isinstance(answers[-1], Failure):
            break
        pool.step(0, action)
        answers.append(pool.receive()[0])
    return answers


def comparable(answer):
    """All of it; of one that terminated there is no observation."""
    seen = {key: np.asarray(value).tolist() for key, value in answer.observation.items()}
    return seen, *list(vars(answer).values())[1:]


NOT_LEGAL = "raised TypeError: `legal_actions` must be a sequence of strings, such as ['left', 'right'], or None"
FAULTS = {
    "raise": ("raised", "raised KeyError: 'no such door'"),
    "nan": ("reward", "gave the reward nan"),
    "inf": ("reward", "gave the reward np.float32(inf)"),
    "huge": ("reward", "gave the reward 1e+39"),  # not finite in a dataset's float32
    "word": ("reward", "gave the reward '1'"),
    "none": ("reward", "gave the reward None"),
    "float image": ("observation", "gave an image of float64 and shape [4, 5, 3]"),
    "grey image": ("observation", "gave an image of uint8 and shape [4, 5]"),
    "array": ("observation", "gave ndarray as its observation, not a dictionary,"),
    "number as text": ("observation", "gave int as the text of its observation"),
    "text of bytes": ("observation", r"gave the text '\udcff', which is not valid Unicode,"),
    "task of bytes": ("observation", r"gave the task 'go \udcff', which is not valid Unicode,"),
    "object as task": ("observation", "has dict as its `task`, not a string,"),
    "nothing to see": ("observation", "gave an observation with neither image nor text"),
    "numbers to do": ("raised", f"{NOT_LEGAL}, got (0, 1); if it is a method"),
    "letters to do": ("raised", f"{NOT_LEGAL}, got '+-'"),
    "method to do": ("raised", f"{NOT_LEGAL}, got <bound method"),
    "bytes to do": ("observation", r"gave the legal action '\udcff', which is not valid Unicode,"),
}
PROCESS_FAULTS = {
    "function": ("observation", "gave an observation that cannot be sent:"),
    "hang": ("timeout", "gave no answer within 1 s"),
    "deaf": ("timeout", "gave no answer within 1 s"),
    "exit": ("died", "lost its process (exit code 3)"),
    "system exit": ("died", "lost its process (exit code 3)"),
}


@pytest.mark.parametrize(
    ("fault", "workers"), [(f, False) for f in FAULTS] + [(f, True) for f in (*FAULTS, *PROCESS_FAULTS)]
)
def test_every_fault_has_its_kind_and_the_environment_is_made_anew(fault, workers):
    kind, did = (FAULTS | PROCESS_FAULTS)[fault]
    pool = EnvPool(Misbehaving, {"fault": fault, "seeds": (7,)}, num_envs=1, workers=workers, env_timeout=1)
    try:
        reset, first, failure = play(pool, 7)
        assert reset.task == "This is episode 7." and first.valid and not first.terminated
        assert (failure.kind, failure.did[: len(did)]) == (kind, did) and kind in FAILURES
        if fault == "raise":
            assert isinstance(failure.error, KeyError) != workers
            assert ("in answer" in failure.trace) == workers  # the remote traceback's frame
        after = play(pool, 8, ("go", "stay", "go"))
        assert [(a.reward, a.terminated, a.valid) for a in after[1:]] == [
            (0.0, False, True),
            (0.0, False, False),
            (1.0, True, True),
        ]
    finally:
        pool.close()
    untouched = EnvPool(Misbehaving, num_envs=1)
    assert [comparable(a) for a in play(untouched, 8, ("go", "stay", "go"))] == [comparable(a) for a in after]


def test_observations_for_a_format_of_the_users_own():
    class Board(Misbehaving):
        def answer(self):
            return {"board": 1}, super().answer()[1]

    pool = EnvPool(Board, num_envs=1)
    assert [answer.observation for answer in play(pool, 7)][:-1] == [{"board": 1}] * 3
    pool.close()


class SameBuffers(gymnasium.Env):
    """Writes what it shows, and what a right reading says, into the same objects again and again."""

    def __init__(self):
        self.turns, self.seen, self.state = 0, {"text": "", "depth": np.zeros(1)}, {"turn": ""}

    def state_text(self):
        return self.state

    def reset(self, *, seed=None, options=None):
        self.turns = -1
        return self.step("")[0], {}

    def step(self, action):
        self.turns += 1
        self.seen["text"] = self.state["turn"] = str(self.turns)
        self.seen["depth"][:] = self.turns
        return self.seen, 0.0, False, False, {}


@pytest.mark.parametrize("workers", [False, True])
def test_what_was_seen_stays_as_it_was(workers):
    with contextlib.closing(EnvPool(SameBuffers, num_envs=1, workers=workers)) as pool:
        seen = play(pool, 0)
    assert [(x.observation["text"], x.observation["depth"].tolist(), x.reading) for x in seen] == [
        (str(k), [k], {"turn": str(k)}) for k in range(4)
    ]


class EndsWithNothing(gymnasium.Env):
    """Shows nothing at its end, where it cannot say either what could be done."""

    over = False

    @property
    def legal_actions(self):
        if self.over:
            raise RuntimeError("the game is over")
        return ("go",)

    def reset(self, *, seed=None, options=None):
        self.over = False
        return {"text": "go on"}, {}

    def step(self, action):
        self.over = True
        return {}, 1.0, True, False, {}


@pytest.mark.parametrize("workers", [False, True])
def test_an_end_may_show_nothing(workers):
    with contextlib.closing(EnvPool(EndsWithNothing, num_envs=1, workers=workers)) as pool:
        first, last = play(pool, 0, ("go",))
    assert first.legal_actions == ("go",) and last.terminated and last.reward == 1.0


def test_one_of_several_that_cannot_be_made_at_first():
    made = []

    def factory():
        made.append(1)
        return Misbehaving("make" if len(made) == 2 else "")

    with contextlib.closing(EnvPool(factory, num_envs=3)) as pool:
        assert len(made) == 3
        pool.reset(1, 7)
        assert pool.receive()[1].observation["text"] == "seed 7"


def test_an_environment_that_cannot_be_closed(caplog):
    pool = EnvPool(Misbehaving, {"fault": "close"}, num_envs=2)
    assert len(play(pool, 7)) == 4
    pool.close()
    assert [record.getMessage() for record in caplog.records] == [
        "An environment could not be closed: OSError: the browser is gone"
    ] * 2


@pytest.mark.parametrize("workers", [False, True])
def test_a_bar_shows_that_environments_start_where_it_takes_long(workers, monkeypatch, capsys):
    for after in (60.0, 0.0):
        monkeypatch.setattr(env_pool, "SHOWN_AFTER", after)
        EnvPool("vlmq_trl/NumberLine-v0", num_envs=2, workers=workers).close()
        assert ("Starting environments: " in capsys.readouterr().err) == (not after)


def test_the_look_before_an_online_run_is_as_strict():
    def look(fault, **kwargs):
        return first_look(functools.partial(Misbehaving, fault, (7,), turn=-1), 7, **kwargs)

    for fault, (_, did) in FAULTS.items():
        if fault not in ("nan", "inf", "huge", "word", "none"):  # there is no reward yet
            with pytest.raises(EnvFailureError, match=re.escape(did)) as caught:
                look(fault)
            assert "at its first reset, with seed 7" in str(caught.value)
    with pytest.raises(EnvFailureError, match="gave dict from `reset`, not an observation and a dictionary, at its"):
        look("no info")
    with pytest.raises(EnvFailureError, match=r"gave no answer within 0\.5 s at its first reset"):
        look("hang", workers=True, env_timeout=0.5)
    for workers in (False, True):
        seen, own = look("no task", workers=workers)
        assert (seen.task, seen.legal_actions, own) == ("", ("go", "stay"), PlainFormat())


def test_ids_mean_in_processes_what_they_mean_here():
    """With the module that registers them, without a version, and with arguments bound to `gymnasium.make`."""
    gymnasium.register("tests/Bound-v2", "tests.misbehaving_envs:Misbehaving")  # in this process only
    try:
        bound = functools.partial(gymnasium.make, "tests/Bound-v2", fault="nan", seeds=(7,))
        for env in (f"vlmq_trl.envs:{NUMBER_LINE}", "vlmq_trl/NumberLine", "tests/Bound", bound):
            here, there = (EnvPool(env, num_envs=1, workers=workers) for workers in (False, True))
            try:
                answers = [play(pool, 7, ("+", "+", "+")) for pool in (here, there)]
                kinds, others = [[getattr(answer, "kind", "") for answer in given] for given in answers]
                assert kinds == others and ("reward" in kinds) == (env is bound)
                seen = [[(a.task, a.reward) for a in given if isinstance(a, Outcome)] for given in answers]
                assert seen[0] == seen[1] and len(seen[0]) > 1
            finally:
                here.close(), there.close()
    finally:
        del gymnasium.registry["tests/Bound-v2"]
    for env, error in (("vlmq_trl/NoSuchGame", gymnasium.error.NameNotFound), ("no_module:x-v0", ImportError)):
        with pytest.raises(error):
            EnvPool(env, num_envs=1, workers=True)


@pytest.mark.parametrize("listed", [["left"], np.array(["left"]), {"left": 0}.keys(), iter(["left"])])
def test_any_iterable_of_strings_lists_legal_actions(listed):
    env = Misbehaving()
    env.legal_actions = listed
    assert legal_actions_of(env) == ("left",)


@pytest.mark.parametrize("workers", [False, True])
def test_a_fault_at_the_reset(workers):
    pool = EnvPool(Misbehaving, {"fault": "raise", "seeds": (7,), "turn": -1}, num_envs=1, workers=workers)
    (failure,) = play(pool, 7)
    assert failure.kind == "raised" and len(play(pool, 8)) == 4
    pool.close()


def test_environments_work_at_once_and_only_the_failed_one_is_replaced():
    pool = EnvPool(Misbehaving, {"fault": "hang", "seeds": (1, 2)}, num_envs=4, workers=True, env_timeout=3)
    pids = worker_pids()
    assert len(pids) == 4 and pool.env(0) is None
    for k in range(4):
        pool.reset(k, seed=k)
    assert list(pool.receive()) == [0, 1, 2, 3]
    for k in (3, 1, 2, 0):
        pool.step(k, "go")
    pool.receive()
    start = time.monotonic()
    for k in (3, 1, 2, 0):
        pool.step(k, "go")
    answers = pool.receive()
    assert time.monotonic() - start < 6  # the two that hang do so side by side
    assert {k: isinstance(a, Outcome) for k, a in answers.items()} == {3: True, 1: False, 2: False, 0: True}
    assert list(answers) == [3, 1, 2, 0]
    assert len(pids & worker_pids()) == 2
    for k in (1, 2):
        pool.reset(k, seed=5)
    assert all(isinstance(a, Outcome) for a in pool.receive().values())
    assert len(worker_pids()) == 4
    pids |= worker_pids()
    pool.close()
    assert gone(pids)
    pool.close()


def test_a_process_that_is_killed_from_outside():
    """Making the environment anew takes longer than a step may."""
    pool = EnvPool(Misbehaving, {"fault": "slow to make"}, num_envs=1, workers=True, env_timeout=1)
    pool.reset(0, seed=0)
    pool.receive()
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    pool.step(0, "go")
    failure = pool.receive()[0]
    assert (failure.kind, failure.did) == ("died", "lost its process (signal 9)")
    assert len(play(pool, 0)) == 4
    pool.close()


def test_what_a_hanging_environment_started_ends_with_it(tmp_path):
    note = tmp_path / "note"
    kwargs = {"fault": "orphan", "seeds": (7,), "note": str(note)}
    pool = EnvPool(Misbehaving, kwargs, num_envs=1, workers=True, env_timeout=1)
    assert play(pool, 7)[-1].kind == "timeout"
    assert gone([int(note.read_text().split()[0])])
    pool.close()


@pytest.mark.parametrize("workers", [False, True])
def test_environments_are_closed(tmp_path, workers):
    note = tmp_path / "note"
    pool = EnvPool(Misbehaving, {"fault": "raise", "seeds": (7,), "note": str(note)}, num_envs=3, workers=workers)
    play(pool, 7)
    assert note.read_text().split() == ["closed"]
    pool.close()
    assert note.read_text().split() == ["closed"] * 3  # the failed one was not made anew yet


def test_one_that_hangs_is_asked_to_close_before_it_is_killed(tmp_path):
    note = tmp_path / "note"
    kwargs = {"fault": "hang", "seeds": (7,), "note": str(note)}
    pool = EnvPool(Misbehaving, kwargs, num_envs=1, workers=True, env_timeout=1)
    assert play(pool, 7)[-1].kind == "timeout" and note.read_text().split() == ["closed"]
    pool.close()


def test_commands_without_an_answer_are_forgotten():
    for workers in (False, True):
        pool = EnvPool(Misbehaving, num_envs=2, workers=workers)
        for k in range(2):
            pool.reset(k, seed=k)
        with pytest.raises(ValueError, match="Environment 1 has a command already"):
            pool.step(1, "go")
        pool.abandon()
        assert pool.receive() == {}
        assert [a.terminated for a in play(pool, 0)] == [False, False, False, True]
        pool.close()


def test_the_environments_of_this_package():
    pools = [EnvPool(NUMBER_LINE, {"invalid_penalty": 0.5}, num_envs=1, workers=w) for w in (False, True)]
    here, there = ([vars(a) for a in play(pool, 3, ("+", "nonsense"))] for pool in pools)
    assert here[2]["reward"] == -0.5 and here[0]["task"]
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a.pop("observation")["image"], b.pop("observation")["image"]) and a == b
    fields = make_env(NUMBER_LINE).unwrapped.reading_fields
    assert [pool.agent_format for pool in pools] == [JSONCoTFormat(reading_fields=fields)] * 2
    for pool in pools:
        pool.close()


def test_processes_do_not_share_the_global_generator():
    pool = EnvPool(Misbehaving, {"fault": "global generator", "seeds": (7,), "turn": -1}, num_envs=2, workers=True)
    for k in range(2):
        pool.reset(k, seed=7)
    assert len({answer.observation["text"] for answer in pool.receive().values()}) == 2
    pool.close()


def test_ids_that_only_this_process_knows():
    gymnasium.register("tests/Misbehaving-v0", entry_point="tests.misbehaving_envs:Misbehaving")
    try:
        pool = EnvPool("tests/Misbehaving-v0", {"fault": "nan", "seeds": (7,)}, num_envs=1, workers=True)
        assert play(pool, 7)[-1].kind == "reward" and isinstance(pool.agent_format, PlainFormat)
        pool.close()
    finally:
        del gymnasium.registry["tests/Misbehaving-v0"]


@pytest.mark.parametrize(
    ("env", "kwargs", "error", "words"),
    [
        (lambda: Misbehaving(), {}, TypeError, "cannot be sent to a process of its own.*top level of a module"),
        (Misbehaving, {"note": lambda: None}, TypeError, "cannot be sent to a process of its own"),
        (Misbehaving(), {}, TypeError, "a function that makes a new environment, got Misbehaving"),
        (Misbehaving, {"fault": "make"}, EnvFailureError, "could not be made: ImportError: the simulator is missing"),
        (make_nothing, {}, EnvFailureError, "factory returned NoneType"),
        (functools.partial(os._exit, 5), {}, EnvFailureError, "lost its process .exit code 5. while it was made"),
        ("tests/NoSuchGame-v0", {}, gymnasium.error.NamespaceNotFound, "tests"),
    ],
)
def test_what_cannot_become_a_process(env, kwargs, error, words):
    before = worker_pids()
    with pytest.raises(error, match=words):
        EnvPool(env, kwargs, num_envs=2, workers=True)
    assert worker_pids() == before


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        EnvPool(Misbehaving, num_envs=0)
    with pytest.raises(ValueError, match="env_timeout must be above 0"):
        EnvPool(Misbehaving, num_envs=1, env_timeout=0.0)


def run_script(path, text):
    path.write_text(text)
    return subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# No `if __name__ == "__main__"`, as in a short script; a second run of it would print a second line.
SCRIPT = """
import multiprocessing
from tests.misbehaving_envs import Misbehaving
from vlmq_trl import env_pool
from vlmq_trl.env_pool import EnvPool

env_pool.CLOSE_TIMEOUT = 0.5
pool = EnvPool(Misbehaving, {"fault": "deaf", "seeds": (0,), "turn": -1}, num_envs=2, workers=True)
for k in range(2):
    pool.reset(k, k)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""


def test_processes_die_with_the_parent_and_leave_ctrl_c_to_it(tmp_path):
    parent = run_script(tmp_path / "script.py", SCRIPT + "pool.receive()")
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    time.sleep(0.3)  # one of them hangs by now
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert not gone(pids, seconds=0.3)
    parent.kill()
    out, err = parent.communicate(timeout=60)
    assert gone(pids) and (out, err) == ("", "")


def test_a_script_may_forget_to_close(tmp_path):
    parent = run_script(tmp_path / "script.py", SCRIPT + "import time; time.sleep(0.5)  # one of them hangs by then")
    out, err = parent.communicate(timeout=60)
    assert gone([int(pid) for pid in out.split()]) and parent.returncode == 0 and err == ""


def test_factories_of_the_main_module_reach_their_process(tmp_path):
    script = """
from tests.misbehaving_envs import Misbehaving
from vlmq_trl.env_pool import EnvPool

def make():
    return Misbehaving("nan", (7,))

if __name__ == "__main__":
    pool = EnvPool(make, num_envs=1, workers=True)
    pool.reset(0, 7)
    print(pool.receive()[0].task)
    pool.close()
"""
    out, err = run_script(tmp_path / "script.py", script).communicate(timeout=60)
    assert (out, err) == ("This is episode 7.\n", "")
    unguarded = script.replace('if __name__ == "__main__":', "if True:")
    out, err = run_script(tmp_path / "script.py", unguarded).communicate(timeout=60)
    assert "must stand there under `if __name__ == '__main__':`" in err and out == ""
    interactive = subprocess.run(
        [sys.executable, "-"],
        input=script,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "TypeError" in interactive.stderr and "a notebook or an interactive session" in interactive.stderr


def test_an_environments_process_needs_no_torch(tmp_path):
    """And the package's names, which are imported on first use therefore, are all there."""
    code = (
        "import sys, vlmq_trl.env_pool; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert sorted(vlmq_trl.__all__) == sorted(vlmq_trl._HOME_OF) and set(vlmq_trl.__all__) <= set(dir(vlmq_trl))
    for name, home in vlmq_trl._HOME_OF.items():
        assert getattr(vlmq_trl, name).__module__.startswith(f"vlmq_trl.{home}")
    (block,) = (node for node in ast.parse(inspect.getsource(vlmq_trl)).body if isinstance(node, ast.If))
    for_type_checkers = {node.module: [alias.name for alias in node.names] for node in block.body}
    assert for_type_checkers == vlmq_trl._HOMES
    with pytest.raises(AttributeError, match="has no attribute 'VLMQ'"):
        _ = vlmq_trl.VLMQ
