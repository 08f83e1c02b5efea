# SPDX-License-Identifier: Apache-2.0
"""An episode as an animated picture.

A frame shows what the agent saw (the turn's last picture, or the prompt where there is none) and, beside it, what it
answered and what that earned; the last frame shows how the episode ended. Drawn with Pillow alone.

Contents: `episode_gif`, `message_text`, `newest_pictures`.
"""

import io
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmq_trl.trajectory import Episode, Turn

LONGEST = 256  # turns that are drawn
TURN_MS, END_MS = 900, 3000
PICTURE = 448  # longest side of a picture: a smaller one is enlarged by whole numbers, a larger one is shrunk
PANEL, HEIGHT, MARGIN, BAR = 380, 336, 20, 4  # the panel's width and least height, the space around, the progress bar
CLIP = 2000  # characters of a text that may be drawn

Colour = tuple[int, int, int]
GROUND, CARD = (21, 23, 28), (33, 37, 46)
WHITE, GREY, GREEN, RED = (236, 238, 242), (142, 150, 165), (88, 208, 138), (255, 112, 112)
AMBER, BLUE = (242, 184, 75), (110, 168, 254)
# The panel's colours: text on both grounds, with three steps at its edges.
PANEL_PALETTE = np.array(
    sorted(
        {
            tuple(round(a + (b - a) * step / 4) for a, b in zip(ground, text, strict=True))
            for ground in (GROUND, CARD)
            for text in (WHITE, GREY, GREEN, RED, AMBER, BLUE)
            for step in range(5)
        }
    ),
    dtype=np.uint8,
)


def episode_gif(episode: Episode) -> bytes:
    """The GIF of an episode of at least one turn; equal episodes give equal bytes."""
    return _gif(_frames(episode))


def message_text(message: Mapping[str, Any]) -> str:
    """A message's content, with `<image>` for a picture."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def newest_pictures(prompt: Sequence[Mapping[str, Any]], images: Iterable | None) -> list:
    """The pictures of a prompt's last message; those of earlier messages belong to their own turns."""
    images = [] if images is None else list(images)
    if not prompt:
        return images
    contents = [message["content"] for message in prompt]
    shown = [0 if isinstance(one, str) else sum(part["type"] == "image" for part in one) for one in contents]
    if any(shown):
        return images[len(images) - shown[-1] :]
    # Without places of their own, pictures stand before the first user message.
    return images if [message["role"] for message in prompt].count("user") <= 1 else []


# ---- frames ----


def _frames(episode: Episode) -> Iterator[tuple[Image.Image, Image.Image | None]]:
    """(panel, picture) of each turn and of the end. All panels of an episode have one size."""
    turns = episode.turns[:LONGEST]
    pictures = [_picture(newest_pictures(turn.prompt, turn.images)) for turn in turns]
    end, end_prompt = pictures[-1], turns[-1].prompt
    if episode.final_prompt is not None:
        end = _picture(newest_pictures(episode.final_prompt, episode.final_images))
        end_prompt = episode.final_prompt
    elif end is not None:  # nobody saw how it ended, so the last picture is shown as a past one
        end = end.point(lambda value: value * 2 // 5)
    shown = [picture for picture in (*pictures, end) if picture is not None]
    width = max([picture.width for picture in shown], default=PANEL)
    height = max([picture.height for picture in shown], default=HEIGHT)
    if len(shown) <= len(pictures):  # some frames show text in the picture's place
        width, height = max(width, PANEL), max(height, HEIGHT)
    total = 0.0
    for k, (turn, picture) in enumerate(zip(turns, pictures, strict=True)):
        total += turn.reward
        page = _Page(width, height, episode, (k + 1) / len(episode.turns))
        if picture is None:
            page.prompt(turn.prompt)
        page.turn(k, turn, total)
        yield page.image, picture
    page = _Page(width, height, episode, 1.0)
    if end is None:
        page.prompt(end_prompt)
    page.outcome(episode)
    yield page.image, end


def _picture(images: list) -> Image.Image | None:
    """The last of a turn's pictures, in the size in which it is shown."""
    if not images:
        return None
    image = images[-1] if isinstance(images[-1], Image.Image) else Image.fromarray(np.asarray(images[-1]))
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > PICTURE:
        size = [max(1, side * PICTURE // longest) for side in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    times = PICTURE // longest
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


class _Page:
    """One frame without its picture: the panel on the right, and the prompt on the left where there is no picture."""

    def __init__(self, width: int, height: int, episode: Episode, progress: float):
        self.left = 2 * MARGIN + width
        self.size = (self.left + PANEL + MARGIN, max(height, HEIGHT) + 2 * MARGIN + BAR)
        self.bottom = self.size[1] - BAR - MARGIN
        self.image = Image.new("RGB", self.size, GROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.rectangle((0, self.size[1] - BAR, self.size[0], self.size[1]), fill=CARD)
        self.draw.rectangle((0, self.size[1] - BAR, round(self.size[0] * progress), self.size[1]), fill=BLUE)
        self.line(self.left, MARGIN, PANEL, episode.env_id or episode.episode_id, 13, GREY)

    def line(self, x: int, y: int, width: int, text: str, size: int, colour: Colour) -> None:
        """One line of text, clipped to `width`."""
        self.draw.text((x, y), _wrapped(text, size, width, 1)[0], font=_font(size), fill=colour)

    def card(self, x: int, y: int, width: int, bottom: int, title: str, text: str, keep_end: bool = False) -> None:
        """A titled box of wrapped text."""
        self.line(x, y, width, title, 12, GREY)
        self.draw.rounded_rectangle((x, y + 18, x + width, bottom), radius=8, fill=CARD)
        lines = _wrapped(text, 15, width - 24, (bottom - y - 38) // 20, keep_end)
        for k, line in enumerate(lines):
            self.draw.text((x + 12, y + 28 + 20 * k), line, font=_font(15), fill=WHITE)

    def prompt(self, prompt: list[dict[str, Any]]) -> None:
        """What the agent read; of a long prompt the end, where the observation stands."""
        text = message_text(prompt[-1]) if prompt else ""
        self.card(MARGIN, MARGIN, self.left - 2 * MARGIN, self.bottom, "PROMPT", text, keep_end=True)

    def numbers(self, y: int, *columns: tuple[str, float | str]) -> None:
        """Titled columns; a number is signed and coloured, a string stands as it is."""
        for k, (title, value) in enumerate(columns):
            x = self.left + k * PANEL // len(columns)
            self.line(x, y, PANEL // len(columns), title, 12, GREY)
            colour, text = WHITE, str(value)
            if isinstance(value, float):
                colour = GREEN if value > 0 else RED if value < 0 else WHITE
                text = f"{value:+.4g}" if value else "0"
            self.line(x, y + 16, PANEL // len(columns), text, 24, colour)

    def mark(self, y: int, good: bool, title: str, text: str) -> None:
        """A tick or a cross, and what it stands for."""
        x, colour = self.left, GREEN if good else RED
        self.draw.ellipse((x, y, x + 22, y + 22), fill=colour)
        strokes = [[(6, 12), (10, 16), (16, 7)]] if good else [[(7, 7), (15, 15)], [(7, 15), (15, 7)]]
        for stroke in strokes:
            self.draw.line([(x + a, y + b) for a, b in stroke], fill=GROUND, width=3, joint="curve")
        self.line(x + 32, y + 5, 64, title, 12, GREY)
        self.line(x + 98, y + 1, PANEL - 98, text, 17, colour)

    def turn(self, k: int, turn: Turn, total: float) -> None:
        """What the agent answered and what that earned, `total` so far."""
        self.line(self.left, MARGIN + 18, PANEL, f"Turn {k}", 26, WHITE)
        response = turn.completion if turn.completion.strip() else "(empty)"
        self.card(self.left, MARGIN + 60, PANEL, self.bottom - 108, "RESPONSE", response)
        action = turn.action if turn.valid else f"{turn.action} (invalid)" if turn.action else "no action (invalid)"
        self.mark(self.bottom - 90, turn.valid, "ACTION", action)
        self.numbers(self.bottom - 46, ("REWARD", float(turn.reward)), ("RETURN", float(total)))

    def outcome(self, episode: Episode) -> None:
        """How the episode ended."""
        how = "Terminated" if episode.terminated else "Truncated"
        self.line(self.left, MARGIN + 18, PANEL, how, 26, WHITE if episode.terminated else AMBER)
        facts = f"{episode.episode_id}\nseed {episode.seed}"
        if len(episode.turns) > LONGEST:
            facts += f"\nThe first {LONGEST} turns are shown."
        self.card(self.left, MARGIN + 60, PANEL, self.bottom - 108, "EPISODE", facts)
        self.mark(self.bottom - 90, episode.success, "SUCCESS", "yes" if episode.success else "no")
        turns = len(episode.turns)
        self.numbers(
            self.bottom - 46,
            ("RETURN", float(episode.return_)),
            ("TURNS", str(turns)),
            ("VALID", f"{sum(turn.valid for turn in episode.turns)}/{turns}"),
        )


# ---- text ----


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


PLAIN = str.maketrans({"—": "-", "–": "-", "‘": "'", "’": "'", "\t": "    ", "\r": None})


@cache
def _drawable(character: str) -> str:
    """`character` if the font has it, else its base letter, else its escape: 🙂 as `\\U0001f642`."""
    font = _font(15)
    if character == " " or (
        character.isprintable() and bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))
    ):
        return character
    base = unicodedata.normalize("NFD", character)[0]
    return base if base.isascii() and base.isprintable() else ascii(character)[1:-1]


def _fitting(text: str, font: Any, width: int) -> int:
    """How many characters, at least one, fit into `width` pixels."""
    return max(1, bisect_right(range(1, len(text) + 1), width, key=lambda n: font.getlength(text[:n])))


def _wrapped(text: str, size: int, width: int, most: int, keep_end: bool = False) -> list[str]:
    """At most `most` lines of at most `width` pixels; what is left out, the end or the start, leaves an ellipsis."""
    font = _font(size)
    cut = len(text) > CLIP
    text = (text[-CLIP:] if keep_end else text[:CLIP]).translate(PLAIN)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        rest = "".join(map(_drawable, paragraph)).rstrip()
        while True:
            fits = _fitting(rest, font, width)
            if fits < len(rest) and " " in rest[1 : fits + 1]:
                fits = rest.rindex(" ", 1, fits + 1)
            lines.append(rest[:fits])
            rest = rest[fits:].lstrip()
            if not rest:
                break
    if len(lines) > most or cut:
        lines = lines[len(lines) - most :] if keep_end else lines[:most]
        k = 0 if keep_end else -1
        lines[k] = _with_ellipsis(lines[k], font, width, keep_end)
    return lines


def _with_ellipsis(line: str, font: Any, width: int, at_start: bool) -> str:
    def marked() -> str:
        return f"… {line.lstrip()}" if at_start else f"{line.rstrip()} …"

    while line and font.getlength(marked()) > width:
        line = line[1:] if at_start else line[:-1]
    return marked()


# ---- the file ----


def _gif(frames: Iterable[tuple[Image.Image, Image.Image | None]]) -> bytes:
    pages = [_indexed(panel, picture) for panel, picture in frames]
    buffer = io.BytesIO()
    pages[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=pages[1:],
        duration=[TURN_MS] * (len(pages) - 1) + [END_MS],
        loop=0,
    )
    return buffer.getvalue()


def _colours(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """An image's distinct colours, uint8 [n, 3], and each pixel's place among them."""
    red, green, blue = np.moveaxis(np.asarray(image, dtype=np.int32), -1, 0)
    codes, where = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8), where


def _indexed(panel: Image.Image, picture: Image.Image | None) -> Image.Image:
    """A frame in 256 colours of its own: the panel's fixed ones, and as many as are left for the picture.

    A picture of few colours, as drawn environments have, stays as it is.
    """
    colours, where = _colours(panel)
    nearest = ((colours[:, None].astype(int) - PANEL_PALETTE.astype(int)) ** 2).sum(2).argmin(1)
    indices = nearest[where].reshape(panel.height, panel.width).astype(np.uint8)
    palette = PANEL_PALETTE.tobytes()
    if picture is not None:
        free = 256 - len(PANEL_PALETTE)
        own, where = _colours(picture)
        if len(own) > free:
            few = picture.quantize(free, kmeans=2)
            own = np.array(few.getpalette(), dtype=np.uint8)
            where = np.asarray(picture.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG))
        space = (panel.height - BAR - picture.height) // 2
        box = (slice(space, space + picture.height), slice(MARGIN, MARGIN + picture.width))
        indices[box] = where.reshape(picture.height, picture.width) + len(PANEL_PALETTE)
        palette += own.tobytes()
    image = Image.fromarray(indices)
    image.putpalette(palette)
    return image
