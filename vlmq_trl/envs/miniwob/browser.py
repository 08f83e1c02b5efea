# SPDX-License-Identifier: Apache-2.0
"""One Chromium, BrowserGym's environment in it, and a MiniWoB++ task in that; needs their packages.

Playwright's driver, a process of its own, is shared by all browsers of this process and ends with the last of them.
What is set differently from BrowserGym's own MiniWoB++:

- Chromium is this machine's, is kept from episode to episode (each gets a fresh context, without cookies or caches),
  and takes no more episodes than `EPISODES_PER_BROWSER`;
- no second browser for a chat, no delays, an episode timer of 24 days, language en-US and time zone UTC;
- a page reaches MiniWoB++'s own files and nothing else;
- no caret blinks in text fields, and the address bar's popups are not loaded;
- actions are BrowserGym's functions, called; no text is run.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import browsergym.core
import browsergym.core.env as browsergym_env
import miniwob
import playwright._impl._connection
import playwright._impl._sync_base
from browsergym.core.action import functions
from browsergym.core.action.utils import get_elem_by_bid
from browsergym.miniwob import ALL_MINIWOB_TASKS
from playwright.sync_api import Error as PlaywrightError

from vlmq_trl.envs.miniwob.actions import Call

HTML = (Path(miniwob.__file__).resolve().parent / "html").as_uri() + "/"
EPISODE_MILLISECONDS = 2**31 - 1  # the longest that a page's timer can run
EPISODES_PER_BROWSER = 100
SETTLE_MILLISECONDS = 1000  # the longest wait for a page's animations to end
PAGE_MILLISECONDS = 60_000  # the longest wait for a page to load; BrowserGym's five seconds fail on a busy machine
# The last such flag counts, so Playwright's own come first. The popups of the address bar, which no headless browser
# shows, are pages of their own that load with each window: half of the processor time of episodes of four turns.
DISABLED_FEATURES = (
    "ImprovedCookieControls", "LazyFrameLoading", "GlobalMediaControls", "DestroyProfileOnBrowserClose",
    "MediaRouter", "DialMediaRouteProvider", "AcceptCHFrame", "AutoExpandDetailsElement",
    "CertificateTransparencyComponentUpdater", "AvoidUnnecessaryBeforeUnloadCheckSync", "Translate", "HttpsUpgrades",
    "PaintHolding",
    "WebUIOmniboxPopup", "WebUIOmniboxAimPopup",
)  # fmt: skip
CHROMIUM_FLAGS = (
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--disable-features={','.join(DISABLED_FEATURES)}",
)
_SETTLE = """async limit => {
    const end = Date.now() + limit;
    while (window.jQuery && jQuery.timers.length && Date.now() < end) await new Promise(r => setTimeout(r, 20));
}"""

# A blinking caret would make pictures differ by chance. No element is added, which would shift BrowserGym's numbers.
_NO_CARET = """() => {
    const sheet = new CSSStyleSheet();
    sheet.replaceSync("* { caret-color: transparent !important; }");
    document.adoptedStyleSheets = [sheet];
}"""


class BrowserCrashedError(RuntimeError):
    """The browser died during an episode; the next reset starts another."""


class _Driver:
    """Playwright's driver, shared by this process's browsers, and by BrowserGym's where it has started it.

    Attributes:
        users: browsers that may use it.
        starts: how often it was started; a browser ends with the driver that started it.
    """

    def __init__(self) -> None:
        self.users = 0
        self.starts = 0
        self._thread = 0  # in which it was started here; 0 for not
        self._folder: tempfile.TemporaryDirectory | None = None

    def check_thread(self) -> None:
        """Raises RuntimeError if another thread has it: Playwright would hang, or break in both."""
        if self._thread and self._thread != threading.get_ident():
            raise RuntimeError(
                "MiniWoB's browsers of one process must all be used in one thread, that of the first; play them in "
                "processes of their own: play_episodes(..., workers=True)."
            )

    def get(self) -> Any:
        """Playwright, started if it does not run.

        Raises:
            RuntimeError: an event loop runs in this thread.
        """
        if not self.alive:
            self.stop()
            # For Chromium's profiles, which a driver that ends soon after a killed browser leaves behind. The name is
            # short, since sockets lie in it.
            self._folder = tempfile.TemporaryDirectory(prefix="vlmq_", ignore_cleanup_errors=True)
            try:
                with _temporary_files_in(self._folder.name):
                    browsergym.core._get_global_playwright()
            except PlaywrightError as error:
                raise RuntimeError(
                    "MiniWoB cannot start a browser inside a running event loop (a notebook, for example); play it in "
                    f"processes of its own: play_episodes(..., workers=True). ({_first_line(error)})"
                ) from error
            self.starts += 1
            self._thread = threading.get_ident()
        return browsergym.core._PLAYWRIGHT

    @property
    def alive(self) -> bool:
        """Whether it runs. To be asked before Playwright is called: a call to a dead driver never returns."""
        if browsergym.core._PLAYWRIGHT is None:
            return False
        process = browsergym.core._PLAYWRIGHT._impl_obj._connection._transport._proc
        try:
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # ended, and asyncio knows
            return False

    def stop(self) -> None:
        """Ends the driver, if it was started here."""
        if self._thread:
            playwright, self._thread = browsergym.core._PLAYWRIGHT, 0
            browsergym.core._set_global_playwright(None)
            with contextlib.suppress(Exception):  # it is dead
                playwright.stop()
            if self._folder is not None:
                self._clean(self._folder)

    @staticmethod
    def _clean(folder: tempfile.TemporaryDirectory) -> None:
        """Deletes the profiles. A Chromium that lost its driver ends by itself, and writes until then."""
        for _ in range(50):
            folder.cleanup()
            if not os.path.exists(folder.name):
                return
            time.sleep(0.1)


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Processes that start meanwhile put their temporary files there."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


_DRIVER = _Driver()


class _NoChat:
    """In place of BrowserGym's chat window, which is a browser of its own: the messages only."""

    def __init__(self, **_: Any) -> None:
        self.messages: list[dict[str, Any]] = []

    def add_message(self, role: str, msg: str) -> None:
        self.messages.append({"role": role, "timestamp": 0.0, "message": msg})

    def close(self) -> None:
        """There is nothing to close."""


class Browser:
    """Plays episodes of one task. No browser runs before the first `reset`.

    Args:
        task: a MiniWoB++ task's name, such as "click-test".
        chromium: the path of Chromium.
        delay: seconds between an action and the observation.
        patience: seconds that an element may take to become ready for an action.
    """

    def __init__(self, task: str, chromium: str, delay: float = 0.0, patience: float = 2.0):
        self.chromium, self.patience = chromium, patience
        self._process: Any = None  # Playwright's Browser
        self._pid = 0  # Chromium's
        self._start = 0  # of the driver that started it
        self._episodes = 0
        self._counted = False
        task_class = _local(next(one for one in ALL_MINIWOB_TASKS if one.subdomain == task), self.kill)
        self.env: Any = browsergym_env.BrowserEnv(
            task_class,
            task_kwargs={"base_url": f"{HTML}miniwob/", "episode_max_time": EPISODE_MILLISECONDS},
            locale="en-US",
            timezone_id="UTC",
            pw_context_kwargs={"accept_downloads": False, "offline": True, "service_workers": "block"},
            pre_observation_delay=delay,
        )

    @property
    def alive(self) -> bool:
        """Whether Chromium runs, as far as is known."""
        if self._process is None or self._start != _DRIVER.starts or not _DRIVER.alive:
            return False
        return self._process.is_connected()

    def reset(self, seed: int) -> Mapping[str, Any]:
        """BrowserGym's first observation of a new episode. Starts Chromium anew if it is dead, and then tries again.

        Raises:
            RuntimeError: Chromium does not start, or the page does not load, twice; or no browser can be used here.
        """
        _DRIVER.check_thread()
        for last in (False, True):
            try:
                with _quick_stacks():
                    return self._reset(seed)
            except RuntimeError:
                raise
            except Exception as error:  # Playwright's own errors, and a bare Exception where its driver died
                self.close()
                if last:
                    raise RuntimeError(f"MiniWoB: {self.chromium} does not start or show the task: {error}") from error
        raise AssertionError("unreachable")

    def _reset(self, seed: int) -> Mapping[str, Any]:
        self._end_episode()
        playwright = _DRIVER.get()
        if not self._counted:
            _DRIVER.users += 1
            self._counted = True
        if self._episodes >= EPISODES_PER_BROWSER or not self.alive:
            self._end_process()
        self._episodes += 1
        parts = SimpleNamespace(selectors=playwright.selectors, chromium=SimpleNamespace(launch=self._launch))
        with _in_place_of(browsergym_env, _get_global_playwright=lambda: parts, Chat=_NoChat):
            observation, _ = self.env.reset(seed=seed)
        return observation

    def _launch(self, headless: bool, slow_mo: float, args: list[str], ignore_default_args: list[str]) -> Any:
        """What BrowserGym takes for a new browser: the running one, or a new one with this module's settings."""
        if self._process is None:
            self._process = _DRIVER.get().chromium.launch(
                headless=headless,
                slow_mo=slow_mo,
                args=[*args, *CHROMIUM_FLAGS],
                ignore_default_args=ignore_default_args,
                executable_path=self.chromium,
            )
            self._start = _DRIVER.starts
            told = self._process.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
            self._pid = next(int(one["id"]) for one in told if one["type"] == "browser")
        return self._process

    def kill(self) -> None:
        """Ends Chromium without a call of Playwright, whose driver notices and cleans up."""
        pid, self._pid = self._pid, 0
        if pid and self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def play(self, call: Call) -> tuple[Mapping[str, Any], float, bool]:
        """Plays one action: BrowserGym's observation (with `last_action_error`), reward, and whether the task ended.

        Raises:
            BrowserCrashedError: the browser, or its page, died.
        """
        _DRIVER.check_thread()
        env = self.env
        try:
            with _quick_stacks():
                if not self.alive:
                    raise PlaywrightError("it does not run any more")
                info, _, _ = env.pre_step()
                env.last_action = str(call)
                env.last_action_error = self._call(call)
                self._settle()
                observation, reward, terminated, _, _ = env.post_step(info)
        except Exception as error:  # as in `reset`
            self.close()
            raise BrowserCrashedError(
                f"MiniWoB: the browser died on {call}: {_first_line(error)}. reset() starts another."
            ) from error
        return observation, float(reward), bool(terminated)

    def _call(self, call: Call) -> str:
        """Calls BrowserGym's function in the page; returns what it complained of."""
        arguments = [list(value) if isinstance(value, tuple) else value for value in call.arguments]
        parts = {
            "page": self.env.page,
            "demo_mode": "off",
            "retry_with_force": False,
            "get_elem_by_bid": self._element,
        }
        try:
            with _in_place_of(functions, **parts):
                getattr(functions, call.name)(*arguments)
        except (PlaywrightError, ValueError) as error:
            if not self.alive:
                raise
            return f"{type(error).__name__}: {error}"
        return ""

    def _element(self, page: Any, bid: str, *_: Any) -> _Patient:
        return _Patient(get_elem_by_bid(page, bid), 1000 * self.patience)

    def _settle(self) -> None:
        """Waits for jQuery's animations to end."""
        with contextlib.suppress(PlaywrightError):  # the page changes, and has no animations
            self.env.page.evaluate(_SETTLE, SETTLE_MILLISECONDS)

    def _end_episode(self) -> None:
        env, context = self.env, self.env.context
        # BrowserGym ends nothing then: it would end Chromium, and fail on a dead one.
        env.task = env.chat = env.context = env.browser = env.page = None
        env.page_history = {}
        if context is not None and self.alive:
            with contextlib.suppress(Exception):  # it died
                context.close()

    def _end_process(self) -> None:
        process, alive = self._process, self.alive
        self._process, self._episodes, self._pid = None, 0, 0
        if alive:
            with contextlib.suppress(Exception):
                process.close()

    def close(self) -> None:
        """Ends Chromium, and the driver with the last browser. May be called again; `reset` starts both anew."""
        if not self._counted:
            return
        _DRIVER.check_thread()
        self._end_episode()
        self._end_process()
        self._counted = False
        _DRIVER.users -= 1
        if _DRIVER.users == 0:
            _DRIVER.stop()


@contextlib.contextmanager
def _in_place_of(module: Any, **parts: Any) -> Iterator[None]:
    """A module of BrowserGym with other parts, for a while; its other users see nothing of that."""
    saved = {name: getattr(module, name) for name in parts}
    for name, part in parts.items():
        setattr(module, name, part)
    try:
        yield
    finally:
        for name, part in saved.items():
            setattr(module, name, part)


@contextlib.contextmanager
def _quick_stacks() -> Iterator[None]:
    """Around calls of Playwright, which notes the stack at each, twice, by `inspect.stack()`.

    That looks into every source file and every module, and takes longer than the browser where torch is imported;
    here the notes hold the same but lines of source.
    """
    quick = SimpleNamespace(stack=_stack, FrameInfo=inspect.FrameInfo)
    with _in_place_of(playwright._impl._sync_base, inspect=quick):
        with _in_place_of(playwright._impl._connection, inspect=quick):
            yield


def _stack() -> list[inspect.FrameInfo]:
    frames = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


class _Patient:
    """Playwright's handle of an element, given more time for an action than BrowserGym's half second.

    A busy machine needs it: there the same action would succeed in one episode and fail in the next.
    """

    def __init__(self, locator: Any, milliseconds: float):
        self._locator, self._milliseconds = locator, milliseconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._locator, name)

        def act(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **{**kwargs, "timeout": self._milliseconds})

        return act


def _local(task_class: Any, on_crash: Callable[[], None]) -> Any:
    """A task that does without delays, in a page that reaches MiniWoB++'s own files only.

    Args:
        on_crash: called when the page's process died. Calls to it are never answered then; where the whole browser
            ends, they are.
    """

    class Local(task_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.slow_mo = 0
            self.timeout = PAGE_MILLISECONDS

        def setup(self, page: Any) -> Any:
            page.on("crash", lambda _: on_crash())
            page.context.route(lambda url: not reachable(url), lambda route: route.abort())
            goal, info = super().setup(page)
            page.evaluate(_NO_CARET)
            return goal, info

    return Local


def reachable(url: str) -> bool:
    """Whether a page may load an address: MiniWoB++'s files, and what carries its content with it."""
    return url.startswith((HTML, "data:", "about:", "blob:"))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
