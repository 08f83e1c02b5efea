# SPDX-License-Identifier: Apache-2.0
"""Episodes that one can look at: as an animated picture, as a page, and their turns as JSON lines.

Contents: `EpisodeRecorder`; `gif.episode_gif` and `page.episode_page` make the files.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from warnings import warn

from vlmq_trl.recorder import gif
from vlmq_trl.recorder.gif import episode_gif, message_text
from vlmq_trl.recorder.page import episode_page
from vlmq_trl.trajectory import Episode

__all__ = ["EpisodeRecorder", "episode_gif", "episode_page"]


class EpisodeRecorder:
    """Records episodes while they pass by.

    The folder, made when it is needed, gets `000-<episode id>.gif`, `001-...`, with `html` a page of the same name for
    each, and `episodes.jsonl` with one line per turn: `episode_id`, `env_id`, `seed`, `turn`, `prompt`, `response`,
    `action`, `valid`, `reward`, `terminated`, `truncated`, `return` so far, and the turn's `frame` in `gif` (null
    after the first 256 turns). Equal episodes give equal files; a new recording takes the place of an earlier one in
    the same folder, whose files of these names are removed when the first episode is written.

    Args:
        folder: where the files go.
        count: how many episodes, the first ones, are recorded.
        html: also write each as a page that stands alone (`page.episode_page`).

    Attributes:
        error: what ended the recording early; None if nothing did.
    """

    def __init__(self, folder: str | os.PathLike, count: int = 4, html: bool = False):
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}.")
        self.folder, self.count, self.html = Path(folder), count, html
        self.error: OSError | None = None
        self._begun = False  # whether this recording has taken the place of an earlier one

    def watch(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """Yields all episodes as they are. Where the disk does not take a file, one warning ends the recording."""
        self.error = None
        self._begun = False
        for number, episode in enumerate(episodes):
            if self.error is None and number < self.count and episode.turns:
                try:
                    self._record(number, episode)
                except OSError as error:
                    self.error = error
                    warn(f"Episodes are no longer recorded into {self.folder}: {error}", stacklevel=2)
            yield episode

    def _record(self, number: int, episode: Episode) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._begun:
            for old in (*self.folder.glob("*-*.gif"), *self.folder.glob("*-*.html")):
                if re.match(r"\d{3,}-", old.name):
                    old.unlink()
            (self.folder / "episodes.jsonl").unlink(missing_ok=True)
            self._begun = True
        name = f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', episode.episode_id)[:80]}"
        (self.folder / f"{name}.gif").write_bytes(episode_gif(episode))
        if self.html:
            (self.folder / f"{name}.html").write_text(episode_page(episode), encoding="utf-8", errors="replace")
        with open(self.folder / "episodes.jsonl", "a", encoding="ascii") as lines:
            for row in _rows(episode, f"{name}.gif"):
                lines.write(json.dumps(row) + "\n")


def _rows(episode: Episode, gif_name: str) -> Iterator[dict[str, Any]]:
    last = len(episode.turns) - 1
    total = 0.0
    for k, turn in enumerate(episode.turns):
        total += float(turn.reward)
        yield {
            "episode_id": episode.episode_id,
            "env_id": episode.env_id,
            "seed": int(episode.seed),
            "turn": k,
            "prompt": "\n".join(f"{message['role']}: {message_text(message)}" for message in turn.prompt),
            "response": turn.completion,
            "action": turn.action,
            "valid": bool(turn.valid),
            "reward": float(turn.reward),
            "terminated": bool(episode.terminated and k == last),
            "truncated": bool(episode.truncated and k == last),
            "return": total,
            "gif": gif_name,
            "frame": k if k < gif.LONGEST else None,
        }
