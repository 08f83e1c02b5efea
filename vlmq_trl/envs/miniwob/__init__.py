# SPDX-License-Identifier: Apache-2.0
"""MiniWoB++: small tasks in web pages, played in a real Chromium by way of BrowserGym.

- `env`: the environment
- `actions`: the strict parser of action strings
- `browser`: Chromium and BrowserGym (the only module that needs their packages)
- `page`: what a page shows, as elements and as text
- `scripts`: scripted players
"""

from __future__ import annotations

import os
import shutil

from vlmq_trl.envs.domain import Domain, EnvEntry

CHROMIUM_VARIABLE = "VLMQ_TRL_CHROMIUM"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")

TASKS: tuple[str, ...] = tuple(
    """
ascending-numbers bisect-angle book-flight book-flight-nodelay buy-ticket choose-date choose-date-easy
choose-date-medium choose-date-nodelay choose-list circle-center click-button click-button-sequence
click-checkboxes click-checkboxes-large click-checkboxes-soft click-checkboxes-transfer click-collapsible
click-collapsible-2 click-collapsible-2-nodelay click-collapsible-nodelay click-color click-dialog click-dialog-2
click-link click-menu click-menu-2 click-option click-pie click-pie-nodelay click-scroll-list click-shades
click-shape click-tab click-tab-2 click-tab-2-easy click-tab-2-hard click-tab-2-medium click-test click-test-2
click-test-transfer click-widget copy-paste copy-paste-2 count-shape count-sides daily-calendar drag-box
drag-circle drag-cube drag-items drag-items-grid drag-shapes drag-shapes-2 drag-single-shape drag-sort-numbers
draw-circle draw-line email-inbox email-inbox-delete email-inbox-forward email-inbox-forward-nl
email-inbox-forward-nl-turk email-inbox-important email-inbox-nl-turk email-inbox-noscroll email-inbox-reply
email-inbox-star-reply enter-date enter-password enter-text enter-text-2 enter-text-dynamic enter-time
find-greatest find-midpoint find-word focus-text focus-text-2 form-sequence form-sequence-2 form-sequence-3
generate-number grid-coordinate guess-number highlight-text highlight-text-2 hot-cold identify-shape login-user
login-user-popup multi-layouts multi-orderings navigate-tree number-checkboxes odd-or-even order-food phone-book
read-table read-table-2 resize-textarea right-angle scroll-text scroll-text-2 search-engine sign-agreement
simple-algebra simple-arithmetic social-media social-media-all social-media-some stock-market terminal text-editor
text-transform tic-tac-toe unicode-test use-autocomplete use-autocomplete-nodelay use-colorwheel use-colorwheel-2
use-slider use-slider-2 use-spinner visual-addition
""".split()  # noqa: SIM905
)

# Their menu opens 0.3 s after the last key; the picture is taken after that.
MENU_DELAY = 0.4
MENU_TASKS = ("book-flight", "book-flight-nodelay", "use-autocomplete", "use-autocomplete-nodelay")


def find_chromium() -> str | None:
    """The path of Chromium: `VLMQ_TRL_CHROMIUM` if it is set, else the first of `CHROMIUM_NAMES` on PATH, or None."""
    chosen = os.environ.get(CHROMIUM_VARIABLE)
    if chosen:
        return shutil.which(chosen)
    return next((path for path in map(shutil.which, CHROMIUM_NAMES) if path), None)


def _also_missing() -> str:
    if find_chromium():
        return ""
    chosen = os.environ.get(CHROMIUM_VARIABLE)
    if chosen:
        return f"{CHROMIUM_VARIABLE} is {chosen!r}, which is not a program; set it to Chromium's path or unset it"
    return (
        f"No Chromium on PATH ({', '.join(CHROMIUM_NAMES)}): `apt-get install chromium`, or set {CHROMIUM_VARIABLE} "
        "to its path"
    )


def _arguments(task: str) -> dict[str, object]:
    """Of the environment, where they differ from its defaults."""
    if task == "use-spinner":  # ten steps up or down, a click, and one to spare
        return {"task": task, "max_turns": 12}
    return {"task": task, "delay": MENU_DELAY} if task in MENU_TASKS else {"task": task}


DOMAIN = Domain(
    name="MiniWoB++",
    summary="125 small web tasks in a real browser, by way of BrowserGym",
    envs={
        f"vlmq_trl/MiniWoB-{task}-v0": EnvEntry("vlmq_trl.envs.miniwob.env:MiniWoB", _arguments(task))
        for task in TASKS
    },
    extra="miniwob",
    modules=("browsergym.miniwob", "miniwob", "playwright"),
    also_missing=_also_missing,
    heavy=True,
)

__all__ = ["DOMAIN", "TASKS", "find_chromium"]
