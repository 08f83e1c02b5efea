# SPDX-License-Identifier: Apache-2.0
"""An environment that misbehaves as it is told; a module of its own, so that other processes can import it."""

import contextlib
import os
import subprocess
import sys
import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Misbehaving(gymnasium.Env):
    """Three turns with a random picture each and the seed as text; reward 1 after the third.

    Args:
        fault: what goes wrong; "" for nothing.
        seeds: in which episodes.
        turn: when, counted from 0; -1 for the reset.
        long: episodes of six turns.
        images: whether it shows the picture.
        note: a file to which the fault "orphan" writes the number of the process that it starts, and `close` a line.
    """

    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (4, 5, 3), np.uint8), "text": spaces.Text(max_length=20)}
    )
    action_space = spaces.Text(max_length=10, min_length=0)

    def __init__(self, fault="", seeds=(), turn=1, long=(), images=True, note=None):
        self.fault, self.seeds, self.turn, self.long, self.note = fault, seeds, turn, long, note
        self.images = images
        if not images:
            self.observation_space = spaces.Dict({"text": self.observation_space["text"]})
        if fault == "make":
            raise ImportError("the simulator is missing")
        if fault == "slow to make":
            time.sleep(1.5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fault == "slow to make":
            time.sleep(0.3)
        self.seed, self.turns = seed, -1
        self.task = f"This is episode {seed}."
        observation = self.answer()[0]
        return observation if self.fault == "no info" and seed in self.seeds else (observation, {})

    def step(self, action):
        observation, reward = self.answer()
        return (
            observation,
            reward,
            self.turns == (6 if self.seed in self.long else 3),
            False,
            {"valid": action == "go"},
        )

    def answer(self):
        """The observation and the reward of this turn; here things go wrong."""
        image = self.np_random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        observation, reward = {"image": image, "text": f"seed {self.seed}"}, float(self.turns == 2)
        fault = self.fault if self.seed in self.seeds and self.turns == self.turn else ""
        self.turns += 1
        if fault == "raise":
            raise KeyError("no such door")
        if fault == "system exit":
            raise SystemExit(3)
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "hang":
            time.sleep(600)
        if fault == "deaf":  # does not even listen to SIGTERM
            while True:
                with contextlib.suppress(BaseException):
                    time.sleep(600)
        if fault == "orphan":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(self.note, "a") as note:
                note.write(f"{child.pid}\n")
            while True:
                with contextlib.suppress(BaseException):
                    time.sleep(600)
        if fault == "exit":
            os._exit(3)
        if fault == "task of bytes":
            self.task = b"go \xff".decode(errors="surrogateescape")
        if fault in ("no task", "object as task"):
            self.task = None if fault == "no task" else {"goal": "go"}
        self.legal_actions = {
            "numbers to do": (0, 1),
            "letters to do": "+-",
            "method to do": self.close,
            "bytes to do": ("go", "\udcff"),
        }.get(fault, ["go", "stay"])
        rewards = {"nan": float("nan"), "inf": np.float32("inf"), "huge": 1e39, "word": "1", "none": None}
        observations = {
            "float image": {"image": image / 255},
            "grey image": {"image": image[..., 0]},
            "array": image,
            "number as text": {"text": 3},
            "text of bytes": {"text": "\udcff"},
            "nothing to see": {"text": None},
            "global generator": {"text": str(np.random.random())},
            "function": {"text": "seed", "extra": lambda: None},
        }
        if not self.images:
            del observation["image"]
        return observations.get(fault, observation), rewards.get(fault, reward)

    def close(self):
        if self.fault == "close":
            raise OSError("the browser is gone")
        if self.note:
            with open(self.note, "a") as note:
                note.write("closed\n")


def make_nothing():
    """A factory that forgets to return its environment."""
