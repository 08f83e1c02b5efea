# SPDX-License-Identifier: Apache-2.0
"""Several environments of one kind, in this process or each in a process of its own, that may misbehave.

What an environment does wrong (it raises, hangs, dies, gives a reward or an observation that makes no sense) comes
back as a `Failure`, never as an exception; a failed environment is ended, and made anew at its next reset. Gymnasium's
`AsyncVectorEnv` can neither restart one environment nor bound the time of one environment's step, hence this pool.

Processes come from a fork server, since the parent has threads. They import Gymnasium and this package's environments,
no torch, and not the parent's main module unless the environment is defined there. What they say is pickled by
`multiprocessing`, between processes of one program. They need POSIX.

Contents: `EnvSpec`, `make_env`, `close_env`, `legal_actions_of`, `Outcome`, `Failure`, `FAILURES`, `EnvFailureError`,
`EnvPool`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec as RegisteredSpec
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from tqdm.auto import tqdm

from vlmq_trl.agent_format import AgentFormat, default_format

logger = logging.getLogger(__name__)

EnvSpec = str | Callable[..., gymnasium.Env]

START_TIMEOUT = 600.0  # seconds for a process to come up and make its environment; some start a browser
SHOWN_AFTER = 5.0  # seconds after which a bar shows that environments are starting
CLOSE_TIMEOUT = 5.0  # seconds for environments to close before their processes are terminated
TERMINATE_TIMEOUT = 1.0  # the same for one that failed; also the seconds from SIGTERM to SIGKILL
LARGEST_REWARD = float(np.finfo(np.float32).max)

# What an environment can do wrong, and what to do about it.
FAILURES = {
    "raised": "Mend the environment, or drop such episodes by `max_env_failures`.",
    "timeout": "Raise `env_timeout` if the environment is only slow, or drop such episodes by `max_env_failures`.",
    "reward": "Rewards must be finite numbers, in float32 too; mend the environment, or drop such episodes by "
    "`max_env_failures`.",
    "observation": "Mend the environment, or wrap it so that it returns {'image': uint8 [H, W, 3], 'text': str}.",
    "died": "Mend the environment (or give the machine more memory), or drop such episodes by `max_env_failures`.",
    "start": "Mend what makes the environment: the Gymnasium id, the function, or env_kwargs.",
}


class EnvFailureError(RuntimeError):
    """Environments failed more often in a row than allowed."""


@dataclass(frozen=True)
class Outcome:
    """What an environment gave after a reset or a step."""

    observation: Mapping[str, Any]  # a copy, and so is `reading`: environments may write into the same one again
    task: str  # the task text, which may change from episode to episode
    legal_actions: tuple[str, ...] = ()  # that the environment lists now; () where it lists none
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    valid: bool = True  # info["valid"] where the environment says so
    reading: Mapping[str, str] | None = None  # what a right reading of the observation says, where it is told


@dataclass(frozen=True)
class Failure:
    """What an environment did wrong instead."""

    kind: str  # one of FAILURES
    did: str  # completes the sentence "The environment ..."
    trace: str = ""  # the traceback of what it raised
    error: BaseException | None = None  # the same as an object, if it was raised in this process

    @classmethod
    def of(cls, kind: str, did: str, error: Exception) -> Failure:
        """A failure by `error`, without the object: it may hold anything, and has to pass through a pipe."""
        trace = "".join(traceback.format_exception(error))
        return cls(kind, f"{did} {type(error).__name__}: {error}", trace)


class _Misfit(Exception):
    """An answer that breaks the contract of environments; holds its `Failure`."""

    def __init__(self, kind: str, did: str):
        super().__init__(did)
        self.failure = Failure(kind, did)


def make_env(env: EnvSpec, env_kwargs: Mapping[str, Any] | None = None) -> gymnasium.Env:
    """A new environment from a Gymnasium id or a factory.

    Raises:
        TypeError: `env` is an environment itself (one object cannot run several episodes at once), or not callable.
    """
    kwargs = dict(env_kwargs or {})
    if isinstance(env, str):
        return gymnasium.make(env, **kwargs)
    if isinstance(env, gymnasium.Env) or not callable(env):
        raise TypeError(
            f"env must be a Gymnasium id or a function that makes a new environment, got {type(env).__name__}; "
            "pass for example `lambda: MyEnv()`."
        )
    made = env(**kwargs)
    if not isinstance(made, gymnasium.Env):
        raise TypeError(f"The environment factory returned {type(made).__name__}, not a gymnasium.Env.")
    return made


def close_env(env: gymnasium.Env) -> None:
    """Closes an environment. One that cannot be closed is a warning: what it played is no worse for that."""
    try:
        env.close()
    except Exception as error:
        logger.warning("An environment could not be closed: %s: %s", type(error).__name__, error)


def legal_actions_of(env: gymnasium.Env) -> tuple[str, ...]:
    """The actions that an environment lists as legal now, in its attribute `legal_actions`; () where it lists none.

    Raises:
        TypeError: they are not a sequence of strings.
    """
    listed = env.get_wrapper_attr("legal_actions") if env.has_wrapper_attr("legal_actions") else None
    if listed is None:
        return ()
    actions = tuple(listed) if isinstance(listed, Iterable) and not isinstance(listed, str) else (None,)
    if not all(isinstance(one, str) for one in actions):
        raise TypeError(
            f"`legal_actions` must be a sequence of strings, such as ['left', 'right'], or None, got {listed!r:.100}; "
            "if it is a method, make it a property."
        )
    return actions


def first_look(
    env: EnvSpec, seed: int = 0, *, workers: bool = False, env_timeout: float | None = None
) -> tuple[Outcome, AgentFormat]:
    """What a new environment gives after its reset, and its own format; played where `EnvPool` would play it.

    Raises:
        EnvFailureError: it cannot be made or reset, or gives what makes no sense.
        TypeError, ValueError: as `EnvPool`.
    """
    pool = EnvPool(env, num_envs=1, workers=workers, env_timeout=env_timeout)
    try:
        pool.reset(0, seed)
        (found,) = pool.receive().values()
    finally:
        pool.close()
    if isinstance(found, Failure):
        raise EnvFailureError(
            f"The environment {env!r} {found.did} at its first reset, with seed {seed}. Mend it, or wrap it.\n"
            f"{found.trace}".rstrip()
        ) from found.error
    return found, pool.agent_format


# One environment's work, in either kind of process.


def _outcome(env: gymnasium.Env, observation: Any, **rest: Any) -> Outcome:
    if rest.get("terminated") and not rest.get("truncated"):  # nobody sees it any more
        return Outcome({}, "", **rest)
    if not isinstance(observation, Mapping):
        raise _Misfit("observation", f"gave {type(observation).__name__} as its observation, not a dictionary,")
    image, text = observation.get("image"), observation.get("text")
    if image is not None:
        image = np.array(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise _Misfit("observation", f"gave an image of {image.dtype} and shape {list(image.shape)}")
        observation = {**observation, "image": image}
    if text is not None and not isinstance(text, str):
        raise _Misfit("observation", f"gave {type(text).__name__} as the text of its observation")
    if image is None and text is None and observation.keys() <= {"image", "text"}:  # others are for other formats
        raise _Misfit("observation", "gave an observation with neither image nor text")
    task = env.get_wrapper_attr("task") if env.has_wrapper_attr("task") else None
    if not isinstance(task, str | None):
        raise _Misfit("observation", f"has {type(task).__name__} as its `task`, not a string,")
    legal = legal_actions_of(env)
    for what, said in (("text", text), ("task", task), *(("legal action", action) for action in legal)):
        try:
            (said or "").encode()
        except UnicodeEncodeError:
            raise _Misfit("observation", f"gave the {what} {said!a:.100}, which is not valid Unicode,") from None
    if not (rest.get("terminated") or rest.get("truncated")) and env.has_wrapper_attr("state_text"):
        rest["reading"] = env.get_wrapper_attr("state_text")()
    return Outcome(observation, task or "", legal, **rest)


def _reset(env: gymnasium.Env, seed: int) -> Outcome:
    given = env.reset(seed=seed)
    if not (isinstance(given, tuple) and len(given) == 2):
        raise _Misfit("observation", f"gave {type(given).__name__} from `reset`, not an observation and a dictionary,")
    return _outcome(env, given[0])


def _step(env: gymnasium.Env, action: str) -> Outcome:
    observation, given, terminated, truncated, info = env.step(action)
    try:
        reward = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError):
        reward = math.nan
    if not abs(reward) <= LARGEST_REWARD:
        raise _Misfit("reward", f"gave the reward {given!r:.100}")
    return _outcome(
        env,
        observation,
        reward=reward,
        terminated=bool(terminated),
        truncated=bool(truncated),
        valid=bool(info.get("valid", True)),
    )


Command = tuple[Callable[[gymnasium.Env, Any], Outcome], Any]  # `_reset` and a seed, or `_step` and an action


class _Local:
    """An environment in this process. It works when it is asked for the answer, and cannot be interrupted.

    One command is sent, then its answer is received. `close`, then `end`, is the end of the environment; another
    command makes it anew.
    """

    def __init__(self, make: Callable[[], gymnasium.Env], env: gymnasium.Env | None):
        self.make, self.env = make, env
        self.command: Command

    def send(self, command: Command) -> None:
        self.command = command

    def receive(self) -> Outcome | Failure:
        if self.env is None:
            try:
                self.env = self.make()
            except Exception as error:
                return Failure("start", f"could not be made: {type(error).__name__}: {error}", error=error)
        work, argument = self.command
        try:
            return copy.deepcopy(work(self.env, argument))  # as through a pipe
        except _Misfit as misfit:
            return misfit.failure
        except Exception as error:
            return Failure("raised", f"raised {type(error).__name__}: {error}", error=error)

    def close(self) -> None:
        made, self.env = self.env, None
        if made is not None:
            close_env(made)

    def end(self, deadline: float) -> None:
        """Nothing is left to do."""


class _Remote:
    """An environment in a process of its own, with the methods of `_Local`. `send` never waits."""

    env: gymnasium.Env | None = None

    def __init__(self, env: Any, env_kwargs: dict[str, Any], timeout: float | None, needs_main: bool):
        self.arguments, self.timeout, self.needs_main = (env, env_kwargs), timeout, needs_main
        self.process: Any = None
        self.start()

    def start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        # Imported once for all, if the server is not running yet. Not this package: the server may find another copy.
        context.set_forkserver_preload(["gymnasium", "PIL.ImageFont"])
        self.process = context.Process(
            target=_serve, args=(theirs, *self.arguments), name="vlmq_trl environment", daemon=True
        )
        with _main_module_hidden(not self.needs_main):
            self.process.start()
        theirs.close()
        self.agent_format: AgentFormat | None = None  # known as soon as the environment stands

    def send(self, command: Command) -> None:
        if self.process is None:
            self.start()
        with contextlib.suppress(OSError):  # it is dead, as `receive` will find
            self.pipe.send(command)
        self.sent = time.monotonic()

    def receive(self) -> Outcome | Failure:
        if self.agent_format is None:
            failure = self.wait_until_made()
            if failure is not None:
                return failure
            self.sent = time.monotonic()  # coming up does not count
        return self._answer(None if self.timeout is None else self.sent + self.timeout - time.monotonic())

    def wait_until_made(self) -> Failure | None:
        answer = self._answer(START_TIMEOUT)
        if isinstance(answer, AgentFormat):
            self.agent_format = answer
            return None
        if answer.kind == "start":
            return answer
        return Failure("start", f"{answer.did} while it was made", answer.trace)

    def _answer(self, seconds: float | None) -> Any:
        try:
            if self.pipe.poll(None if seconds is None else max(0.0, seconds)):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(TERMINATE_TIMEOUT)
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return Failure("died", f"lost its process ({how})")
        limit = START_TIMEOUT if self.agent_format is None else self.timeout
        return Failure("timeout", f"gave no answer within {limit:g} s")

    def close(self) -> None:
        """Asks the process to close its environment and to end."""
        self.pipe.close()

    def end(self, deadline: float) -> None:
        """Ends the process; by force, together with what its environment started, when time is up."""
        process, self.process = self.process, None
        if process is None:
            return
        if not wait([process.sentinel], max(0.0, deadline - time.monotonic())):
            process.terminate()
            wait([process.sentinel], TERMINATE_TIMEOUT)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # if it had not yet got as far as to have a group
        process.join()


def registered(env_id: str) -> RegisteredSpec:
    """What `gymnasium.make` would make of an id: "module:name" imports the module, without a version it is the latest.

    Raises:
        gymnasium.error.Error, ImportError: there is none.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    namespace, base, version = parse_env_id(name)
    if version is None:
        version = find_highest_version(namespace, base)
    return gymnasium.spec(get_env_id(namespace, base, version))


@contextlib.contextmanager
def _main_module_hidden(hidden: bool) -> Iterator[None]:
    """Around the start of a process, which then does not run the main module again.

    A training script imports torch, and may lack the `if __name__ == "__main__"` that new processes ask for.
    """
    main = sys.modules["__main__"]
    if hidden:
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection, env: Any, env_kwargs: dict[str, Any]) -> None:
    """The process of one environment: says its agent format, then answers commands until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # closes the environment
    os.setsid()  # a group of its own, which can be killed together with what the environment starts
    np.random.seed()  # the fork server's state is in all its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        made = gymnasium.make(env, **env_kwargs) if isinstance(env, RegisteredSpec) else make_env(env, env_kwargs)
    except Exception as error:
        pipe.send(Failure.of("start", "could not be made:", error))
        return
    with contextlib.closing(made), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(default_format(made))
        while True:
            work, argument = pipe.recv()
            try:
                answer: Outcome | Failure = work(made, argument)
            except _Misfit as misfit:
                answer = misfit.failure
            except Exception as error:
                answer = Failure.of("raised", "raised", error)
            try:
                pipe.send(answer)
            except OSError:
                raise
            except Exception as error:
                pipe.send(Failure.of("observation", "gave an observation that cannot be sent:", error))


def _end_with_parent() -> None:
    """A thread: ends this process and its group when the parent is gone, in whatever the environment hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _shown(starting: Any) -> Any:
    return tqdm(starting, desc="Starting environments", unit="env", delay=SHOWN_AFTER, leave=False)


def _close(members: list[Any], patience: float) -> None:
    """Ends environments side by side, by force those that do not close within `patience` seconds."""
    with contextlib.ExitStack() as stack:  # one that raises does not keep the others from closing
        deadline = time.monotonic() + patience
        for member in members:
            stack.callback(member.end, deadline)
        for member in members:
            stack.callback(member.close)


class EnvPool:
    """`num_envs` environments that are told to reset or step, and asked together for what came of it.

    With `workers` each has a process of its own and all work at once; otherwise they work one after the other, when
    `receive` is called. A process that outlives its time is killed together with what its environment started, and
    all end with this one, however it ends.

    Attributes:
        agent_format: the environments' own (`agent_format.default_format`).

    Args:
        env: a Gymnasium id, or a function that makes a new environment.
        env_kwargs: given to `gymnasium.make` or the function.
        num_envs: at least 1.
        workers: a process for each environment; `env` and `env_kwargs` have to be picklable then. Each imports the
            module of `env`, which takes seconds if that imports torch.
        env_timeout: seconds that an environment may take for a reset or a step; None waits for ever. It needs
            `workers`: an environment in this process cannot be interrupted.

    Raises:
        TypeError, ValueError: `env` is no id and no function, or makes the same object twice, or cannot be sent to a
            process.
        EnvFailureError: no environment could be made in its process.
    """

    def __init__(
        self,
        env: EnvSpec,
        env_kwargs: Mapping[str, Any] | None = None,
        *,
        num_envs: int,
        workers: bool = False,
        env_timeout: float | None = None,
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        if env_timeout is not None and not env_timeout > 0:
            raise ValueError(f"env_timeout must be above 0 seconds, got {env_timeout}.")
        self.workers = workers
        self._sent: list[int] = []
        self._members: list[Any] = []  # `_Local` or `_Remote`
        if workers:  # at exit `multiprocessing` would wait for ever for a process that does not listen
            Finalize(self, _close, args=(self._members, CLOSE_TIMEOUT), exitpriority=0)
        try:
            if workers:
                self._start_workers(env, dict(env_kwargs or {}), num_envs, env_timeout)
            else:
                self._make_here(env, env_kwargs, num_envs)
        except BaseException:
            self.close()
            raise

    def _make_here(self, env: EnvSpec, env_kwargs: Mapping[str, Any] | None, num_envs: int) -> None:
        make, made = partial(make_env, env, env_kwargs), None
        for k in _shown(range(num_envs)):
            try:
                made = make()
            except Exception:
                if k == 0:
                    raise
                made = None  # made at its first reset, or else a failure like others
            if made is not None and any(made is member.env for member in self._members):
                raise ValueError("The environment factory returned the same object twice; make a new one each time.")
            self._members.append(_Local(make, made))
        self.agent_format = default_format(self._members[0].env)

    def _start_workers(self, env: EnvSpec, env_kwargs: dict[str, Any], num_envs: int, timeout: float | None) -> None:
        if isinstance(env, gymnasium.Env) or not (isinstance(env, str) or callable(env)):
            make_env(env)  # which raises
        made_by: Any = env
        if isinstance(made_by, partial) and made_by.func is gymnasium.make and len(made_by.args) == 1:
            env, env_kwargs = made_by.args[0], {**made_by.keywords, **env_kwargs}
        # An id may be registered in this process only.
        sent = registered(env) if isinstance(env, str) else env
        try:
            pickled = bytes(ForkingPickler.dumps((sent, env_kwargs)))
            needs_main = b"__main__" in pickled
            if needs_main and not os.path.isfile(getattr(sys.modules["__main__"], "__file__", "")):
                raise TypeError("it is defined in a notebook or an interactive session")
        except Exception as error:
            raise TypeError(
                f"The environment {env!r} with env_kwargs {env_kwargs!r} cannot be sent to a process of its own: "
                f"{error}. Pass a function that stands at the top level of a module, or a Gymnasium id whose entry "
                "point is 'module:Class', or workers=False."
            ) from error
        for _ in range(num_envs):
            self._members.append(_Remote(sent, env_kwargs, timeout, needs_main))
        for member in _shown(self._members):
            failure = member.wait_until_made()
            if failure is not None:
                todo = FAILURES["start"]
                if needs_main and not failure.trace:
                    todo = (
                        "It is defined in the main script, which each process runs again: all that starts something "
                        "must stand there under `if __name__ == '__main__':`, or the environment in a module."
                    )
                raise EnvFailureError(f"The environment {env!r} {failure.did}. {todo}\n{failure.trace}".rstrip())
        self.agent_format = self._members[0].agent_format

    def __len__(self) -> int:
        return len(self._members)

    def env(self, index: int) -> gymnasium.Env | None:
        """The environment; None if it lives in another process, or has failed."""
        return self._members[index].env

    def reset(self, index: int, seed: int) -> None:
        """Tells environment `index` to begin an episode."""
        self._send(index, (_reset, seed))

    def step(self, index: int, action: str) -> None:
        """Tells environment `index` to play a turn."""
        self._send(index, (_step, action))

    def _send(self, index: int, command: Command) -> None:
        if index in self._sent:
            raise ValueError(f"Environment {index} has a command already; call receive() first.")
        self._sent.append(index)
        self._members[index].send(command)

    def receive(self) -> dict[int, Outcome | Failure]:
        """What came of each command since the last call, in the order in which they were sent."""
        answers: dict[int, Outcome | Failure] = {}
        failed = []
        try:
            while self._sent:
                index = self._sent[0]
                answers[index] = answer = self._members[index].receive()
                if isinstance(answer, Failure):
                    failed.append(self._members[index])
                del self._sent[0]
        finally:
            with contextlib.suppress(Exception):  # they failed before
                _close(failed, TERMINATE_TIMEOUT)
        return answers

    def abandon(self) -> None:
        """Forgets commands that `receive` was kept from answering, by Ctrl-C for example."""
        busy = [self._members[index] for index in self._sent]
        self._sent.clear()
        with contextlib.suppress(Exception):
            _close(busy, 0.0)

    def close(self) -> None:
        """Closes all environments and ends their processes. May be called again."""
        self._sent.clear()
        try:
            _close(self._members, CLOSE_TIMEOUT)
        finally:
            self._members.clear()
