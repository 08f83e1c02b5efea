# SPDX-License-Identifier: Apache-2.0
"""Rounds of play in a thread, beside the updates."""

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..rollout import Policy, Request, Response
from .data import OnlineData, measure


class AsyncOnlineData(OnlineData):
    """Collects in a thread, with a copy of the policy, the round after the one that the learner has.

    The learner offers its weights between updates. The copy answers with weights that are at most `max_staleness`
    updates old: where they would be older, it waits for the learner's next offer. The learner waits where a round
    that is due is not complete. Frozen weights are shared with the copy.

    Attributes:
        waits: seconds that the learner has waited before each update.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        learner = getattr(self.model, "pretrained_model", self.model)
        self._copy = copy_of_policy(learner).eval()
        self._source, self._copied = changing(learner), changing(self._copy)
        self._state = threading.Condition()  # guards all that follows
        self._offered: dict[str, Tensor] = {}
        self._offered_update = self._held_update = -1  # of the offer, of the copy
        self._update = 0  # the learner's
        self._wanted = 0  # the newest round that may be collected
        self._needs_offer = self._stopping = False
        self._answering = self._paused = False
        self._error: BaseException | None = None
        self._staleness: list[int] = []
        self._reports: list[dict[str, float]] = []
        self._waited, self._since = 0.0, time.perf_counter()
        self.waits: list[float] = []
        self._thread: threading.Thread | None = None

    # ---- the learner's side ----

    def advance(self, update: int) -> None:
        due = self.schedule.rounds_before(update)
        with self._state:
            self._update = update
            # The next round too, unless training ends before it is due.
            self._wanted = min(due + 1, self.schedule.rounds_before(self.args.max_steps - 1)) if due else 0
            if due and self._thread is None and self._error is None:
                self._thread = threading.Thread(target=self._work, name="vlmq-collection", daemon=True)
                self._thread.start()
            if due and (self._needs_offer or update - self._offered_update >= max(1, self.args.max_staleness // 2)):
                self._offer()
            self._state.notify_all()
            start = time.perf_counter()
            while not self._has(due):
                self._raise()
                if self._needs_offer:
                    self._offer()
                self._state.wait(timeout=1.0)
            self.waits.append(time.perf_counter() - start)
            self._waited += self.waits[-1]
            self._raise()
            reports, self._reports = self._reports, []
        self.round, self.end = due, self.buffer.end
        for logs in reports:  # here, since the trainer's log is not for two threads
            self.report(logs)

    def items(self, update: int, number: int, turns: int) -> list[dict[str, Any]]:
        """As `OnlineData.items`; where the thread's commits have evicted what was drawn, it is drawn again."""
        for _ in range(10):
            try:
                return super().items(update, number, turns)
            except LookupError:
                self.end = self.buffer.end
        return super().items(update, number, turns)

    def _has(self, round: int) -> bool:
        known = (0, True) if round == 0 else self.buffer.round_end(round)
        return known is not None and known[1]

    def _offer(self) -> None:
        """Copies the learner's changing weights; between two updates only."""
        with torch.no_grad():
            for name, weight in self._source.items():
                if name in self._offered:
                    self._offered[name].copy_(weight)
                else:
                    self._offered[name] = weight.detach().clone()
        self._offered_update, self._needs_offer = self._update, False
        self._state.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def logs(self) -> dict[str, float]:
        now = time.perf_counter()
        with self._state:
            logs = {**super().logs(), "learner_idle": self._waited / max(now - self._since, 1e-9)}
            if self._staleness:
                logs["staleness_mean"] = float(np.mean(self._staleness))
                logs["staleness_max"] = float(max(self._staleness))
            self._waited, self._since, self._staleness = 0.0, now, []
        return logs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The thread's policy does not answer meanwhile: what is done then has torch's random state for itself."""
        with self._state:
            self._paused = True
            self._state.wait_for(lambda: not self._answering)
        try:
            yield
        finally:
            with self._state:
                self._paused = False
                self._state.notify_all()

    def close(self) -> None:
        with self._state:
            self._stopping = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join()
        super().close()

    # ---- the thread's side ----

    def _work(self) -> None:
        try:
            round = 1
            while not self._stopping:
                with self._state:
                    if round > self._wanted:
                        self._state.wait(timeout=1.0)
                        continue
                policy = _Answering(self, self.policy or self.model_policy(self._copy, round))
                measured = {} if self._has(round) else measure(round, [self.play(round, policy)])
                with self._state:
                    self._reports += [measured] if measured else []
                    self._state.notify_all()
                round += 1
        except _Stopped:
            pass
        except BaseException as error:
            with self._state:
                self._error = error
                self._state.notify_all()

    @contextmanager
    def answering(self, requests: int) -> Iterator[None]:
        """While the policy answers. Before, the copy takes the newest offer, and waits for one if it is too old.

        Raises:
            _Stopped: the learner has ended.
        """
        with self._state:
            if self.policy is None:
                self._refresh(requests)
            self._state.wait_for(lambda: self._stopping or not self._paused)
            if self._stopping:
                raise _Stopped
            self._answering = True
        try:
            yield
        finally:
            with self._state:
                self._answering = False
                self._state.notify_all()

    def _refresh(self, requests: int) -> None:
        while self._offered_update < 0 or self._update - self._offered_update > self.args.max_staleness:
            if self._stopping:
                raise _Stopped
            self._needs_offer = True
            self._state.notify_all()
            self._state.wait(timeout=1.0)
        if self._offered_update > self._held_update:
            with torch.no_grad():
                for name, weight in self._offered.items():
                    self._copied[name].copy_(weight)
            self._held_update = self._offered_update
        self._staleness += [self._update - self._held_update] * requests


class _Stopped(Exception):
    """The learner has ended while the thread waited for it."""


@dataclass
class _Answering:
    """A policy that answers when the learner lets it: the copy, or a user's own."""

    data: AsyncOnlineData
    policy: Policy

    @property
    def responses(self) -> int:
        return getattr(self.policy, "responses", 0)

    @property
    def retokenized(self) -> int:
        return getattr(self.policy, "retokenized", 0)

    def act(self, requests: list[Request]) -> list[Response]:
        with self.data.answering(len(requests)):
            return self.policy.act(requests)


def changing(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, and the buffers, by name."""
    return {
        **{name: p for name, p in model.named_parameters() if p.requires_grad},
        **dict(model.named_buffers()),
    }


def copy_of_policy(policy: nn.Module) -> Any:
    """A copy of a model that shares the parameters which training does not change."""
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    copied: Any = copy.deepcopy(policy, shared)
    base = copied.get_base_model() if hasattr(copied, "get_base_model") else copied
    base.__dict__.pop("forward", None)  # TRL's fused one, which is bound to the model that learns
    return copied
