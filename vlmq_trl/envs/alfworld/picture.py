# SPDX-License-Identifier: Apache-2.0
"""A drawing of what the agent has observed of a household: 300x300 RGB, by Pillow and the font embedded in it.

A box for each receptacle, with its name and what was seen in it; "?" where the agent has not looked, brown where it is
closed. A red frame where the agent stands; at the bottom, what it carries.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vlmq_trl.envs.alfworld.memory import Memory

SIZE = 300
_STRIP = 40  # the height of what is carried

_BACK, _INK, _WHITE, _RED = (222, 226, 230), (20, 20, 24), (255, 255, 255), (214, 24, 36)
_HEAD, _UNSEEN, _CLOSED = (44, 74, 124), (184, 188, 196), (168, 122, 76)
_LARGEST, _SMALLEST = 17, 8  # font sizes


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _lines(words: list[str], size: int, width: int) -> list[str]:
    """The items, as many to a line as fit."""
    lines = [words[0]]
    for word in words[1:]:
        joined = f"{lines[-1]}, {word}"
        if _width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _fitted(words: list[str], width: int, height: int) -> tuple[list[str], int]:
    """The items as lines and the font's size, the largest that fits; what does not fit at the smallest is counted."""
    for size in range(_LARGEST, _SMALLEST - 1, -1):
        lines = _lines(words, size, width)
        if len(lines) * (size + 1) <= height and all(_width(line, size) <= width for line in lines):
            return lines, size
    room = max(1, height // (_SMALLEST + 1))
    for kept in range(len(words), 0, -1):
        more = [f"+{len(words) - kept}"] if kept < len(words) else []
        lines = _lines(words[:kept] + more, _SMALLEST, width)
        if len(lines) <= room:
            break
    return lines[:room], _SMALLEST


@lru_cache(maxsize=2048)
def _box(
    name: str, words: tuple[str, ...], colour: tuple[int, int, int], here: bool, width: int, height: int
) -> NDArray[np.uint8]:
    """One receptacle, uint8 [height, width, 3], read-only."""
    image = Image.new("RGB", (width, height), colour)
    draw = ImageDraw.Draw(image)
    head = max(11, min(22, height // 3))
    draw.rectangle((0, 0, width, head), fill=_RED if here else _HEAD)
    (title, *_), size = _fitted([name], width - 8, head + 1)
    draw.text((5, head // 2), title, font=_font(size), fill=_WHITE, anchor="lm")
    lines, size = _fitted(list(words), width - 10, height - head - 5)
    for row, line in enumerate(lines):
        draw.text((5, head + 1 + row * (size + 1)), line, font=_font(size), fill=_INK)
    draw.rectangle((0, 0, width - 1, height - 1), outline=_RED if here else _HEAD, width=3 if here else 1)
    array = np.asarray(image).copy()
    array.setflags(write=False)
    return array


def _columns(count: int) -> int:
    return 2 if count <= 8 else 3 if count <= 15 else 4 if count <= 24 else 5


def draw(memory: Memory) -> NDArray[np.uint8]:
    """The picture, a fresh uint8 array [300, 300, 3]; a function of what was observed alone."""
    image = Image.new("RGB", (SIZE, SIZE), _BACK)
    strip = ImageDraw.Draw(image)
    carried = memory.label(memory.carrying) if memory.carrying else "nothing"
    lines, size = _fitted([f"carrying: {carried}"], SIZE - 12, _STRIP - 4)
    strip.text((6, SIZE - _STRIP // 2), lines[0], font=_font(size), fill=_INK, anchor="lm")
    if not memory.here:
        strip.rectangle((0, SIZE - _STRIP, SIZE - 1, SIZE - 1), outline=_RED, width=3)
    picture = np.asarray(image).copy()
    columns = _columns(len(memory.places))
    rows = max(1, math.ceil(len(memory.places) / columns))
    width, height = SIZE // columns, (SIZE - _STRIP) // rows
    for index, (name, place) in enumerate(memory.places.items()):
        row, column = divmod(index, columns)
        words = tuple(memory.labels(name))
        if place.closed:
            colour, words = _CLOSED, ("closed", *words)
        elif not place.looked:
            colour, words = _UNSEEN, (*words, "?")
        else:
            colour, words = _WHITE, words or ("empty",)
        box = _box(name, words, colour, name in memory.here, width - 2, height - 2)
        picture[row * height + 1 :, column * width + 1 :][: height - 2, : width - 2] = box
    return picture
