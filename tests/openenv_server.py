# SPDX-License-Identifier: Apache-2.0
"""A guessing game behind an OpenEnv server, for the tests: `python tests/openenv_server.py PORT SESSIONS`.

A secret in 1..9 is shown by the number of white squares in the picture; the text says how the last guess was. Guessing
it gives 1 and ends the episode; other guesses give no reward at all (None). Five guesses truncate it. Guess 10 makes
the environment raise, 11 kill its server, 12 take two seconds; the model of actions refuses what is above 12.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from typing import Any

import numpy as np
from PIL import Image


def squares(secret: int) -> np.ndarray:
    """uint8 [48, 60, 3], a white square for each unit."""
    picture = np.zeros((48, 60, 3), np.uint8)
    for k in range(secret):
        row, column = divmod(k, 3)
        picture[4 + 15 * row : 14 + 15 * row, 4 + 18 * column : 14 + 18 * column] = (255, 255 - 20 * k, 200)
    return picture


def drawn(secret: int, form: str) -> Any:
    """The picture as JSON may hold it."""
    picture = squares(secret)
    if form == "huge":
        return np.zeros((440, 440, 3), np.uint8).tolist()
    if form == "wide":
        picture = np.concatenate([picture, picture], axis=1)
    if form == "lists":
        return picture.tolist()
    if form == "flat":
        return picture.reshape(-1).tolist()
    if form == "float":
        return (picture / 255).tolist()
    if form == "text":
        return "a picture of some squares"
    buffer = io.BytesIO()
    (Image.new("1", (5000, 5000)) if form == "bomb" else Image.fromarray(picture)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/png;base64,{text}" if form == "url" else text


def guesser(url: str, **kwargs: Any) -> Any:
    """The game as an environment; at the top level of a module, so that worker processes can make it."""
    from vlmq_trl.envs.openenv import OpenEnvAdapter

    kwargs = {"text": "hint", "picture": "picture", "task": "Guess the number of squares.", **kwargs}
    return OpenEnvAdapter(url, guess, **kwargs)


def guess(text: str) -> dict[str, int] | None:
    """The server's action."""
    return {"guess": int(text)} if text.isdigit() else None


def serve(port: int, sessions: int) -> None:
    """Runs the server until it is killed."""
    import uvicorn
    from openenv.core import Action, Environment, Observation, State, create_app
    from pydantic import Field

    class Guess(Action):
        guess: int = Field(ge=0, le=12)

    class Seen(Observation):
        hint: str
        picture: Any
        truncated: bool = False

    class Game(Environment[Guess, Seen, State]):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, form: str = "png", **_: Any) -> Seen:
            self.secret = int(np.random.default_rng(seed).integers(1, 10))
            self.form, self.turns = form, 0
            return self.seen("")

        def seen(self, hint: str, **rest: Any) -> Seen:
            dark = self.form == "dark" and rest.get("done")  # shows nothing at the end
            return Seen(hint=hint, picture=None if dark else drawn(self.secret, self.form), **rest)

        def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Seen:
            self.turns += 1
            if action.guess == 10:
                raise ValueError("nobody guesses 10")
            if action.guess == 11:
                os._exit(1)
            if action.guess == 12:
                time.sleep(2)
            if action.guess == self.secret:
                return self.seen("right", reward=1.0, done=True)
            hint = "too low" if action.guess < self.secret else "too high"
            return self.seen(hint, done=self.turns >= 5, truncated=self.turns >= 5)

        @property
        def state(self) -> State:
            return State(step_count=self.turns)

    app = create_app(Game, Guess, Seen, max_concurrent_envs=sessions)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
