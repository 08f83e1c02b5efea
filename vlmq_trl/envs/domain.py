# SPDX-License-Identifier: Apache-2.0
"""What a domain of environments consists of and what it needs. Nothing of that is imported to know it.

Contents: `Domain`, `EnvEntry`, `install_line`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium


@dataclass(frozen=True)
class EnvEntry:
    """One environment: the class that it is made from, and that class's arguments."""

    entry_point: str  # "module:Class"
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Domain:
    """Environments of one kind. Its module can be imported whatever is installed.

    Attributes:
        name: for people, such as "BabyAI".
        summary: one line.
        envs: Gymnasium id -> how it is made.
        extra: the package's extra that installs what it needs; None for nothing.
        modules: what has to be importable.
        also_missing: says what else this machine lacks (a browser, data) and how to get it; "" for nothing.
        heavy: whether each environment runs programs of its own that take hundreds of MB: play few at once, each in a
            process of its own.
    """

    name: str
    summary: str
    envs: Mapping[str, EnvEntry]
    extra: str | None = None
    modules: tuple[str, ...] = ()
    also_missing: Callable[[], str] = _nothing
    heavy: bool = False

    def missing(self) -> str:
        """What this machine lacks to run it, and how to get it; "" for nothing."""
        absent = [name for name in self.modules if not _importable(name)]
        if absent:
            return f"{', '.join(absent)} not installed: {install_line(self.extra)}"
        return self.also_missing()

    def require(self) -> None:
        """Raises ImportError, with the line that installs it, if anything is missing."""
        if missing := self.missing():
            raise ImportError(f"The {self.name} environments cannot run here. {missing}")

    def register(self) -> None:
        """Registers its environments with Gymnasium, those that cannot run here too; may be called again."""
        for env_id, entry in self.envs.items():
            if env_id not in gymnasium.registry:
                gymnasium.register(env_id, entry_point=entry.entry_point, kwargs=dict(entry.kwargs))


def install_line(extra: str | None) -> str:
    """The command that installs an extra of this package."""
    return f'pip install "vlmq_trl[{extra}]"'


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
