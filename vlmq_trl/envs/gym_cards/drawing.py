# SPDX-License-Identifier: Apache-2.0
"""Pictures of the Gym Cards games: 300x300 RGB, drawn with Pillow and the font that is embedded in it.

Everything is sized for a model that sees the picture at 128x128: card ranks are at least 60 pixels tall, NumberLine's
digits 115, and every formula entry has a cell of its own at a fixed place. Tiles are drawn once and pasted; a picture
is a function of the state alone.

- `number_line(target, current)`, `points(cards, formula, rows, columns)`, `blackjack(dealer, player)`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIZE = 300
BLANK = "_"  # the entry that an illegal number leaves in a formula

TABLE = (24, 84, 60)
WHITE = (255, 255, 255)
BLACK = (16, 16, 16)
RED = (200, 16, 32)
BACK = (40, 60, 150)
BACK_LINES = (150, 170, 240)

Picture = NDArray[np.uint8]  # (height, width, 3)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "Pillow was built without FreeType, so Gym Cards cannot draw text; install a Pillow wheel from PyPI."
        )
    return font


def _glyphs(text: str, size: int, max_width: int) -> Image.Image:
    """The ink of `text` as a grey mask of mode "L", cropped to the ink and squeezed to `max_width` pixels."""
    left, top, right, bottom = _font(size).getbbox(text)
    mask = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))), 0)
    ImageDraw.Draw(mask).text((-left, -top), text, font=_font(size), fill=255)
    mask = mask.crop(mask.getbbox())
    if mask.width > max_width:
        mask = mask.resize((max_width, mask.height), Image.Resampling.LANCZOS)
    return mask


def _centred(
    image: Image.Image, text: str, box: tuple[int, int, int, int], size: int, colour: tuple[int, int, int]
) -> None:
    """Draws `text` in the middle of `box` (left, top, right, bottom)."""
    left, top, right, bottom = box
    mask = _glyphs(text, size, right - left)
    image.paste(colour, (left + (right - left - mask.width) // 2, top + (bottom - top - mask.height) // 2), mask)


def _suit(draw: ImageDraw.ImageDraw, suit: int, x: int, y: int, size: int) -> None:
    """A small suit sign with its top left corner at (x, y): 0 spades, 1 hearts, 2 clubs, 3 diamonds."""
    s, half, third = size, size // 2, size // 3
    colour = RED if suit % 2 else BLACK
    if suit == 3:
        draw.polygon([(x + half, y), (x + s, y + half), (x + half, y + s), (x, y + half)], fill=colour)
    elif suit == 1:
        draw.ellipse((x, y, x + half, y + half), fill=colour)
        draw.ellipse((x + half, y, x + s, y + half), fill=colour)
        draw.polygon([(x, y + third), (x + s, y + third), (x + half, y + s)], fill=colour)
    else:
        draw.polygon([(x + half, y + half), (x + third, y + s), (x + s - third, y + s)], fill=colour)
        draw.ellipse((x, y + third, x + half, y + third + half), fill=colour)
        draw.ellipse((x + half, y + third, x + s, y + third + half), fill=colour)
        if suit == 0:
            draw.polygon([(x + half, y), (x + s, y + half), (x, y + half)], fill=colour)
        else:
            draw.ellipse((x + third // 2, y, x + s - third // 2, y + half), fill=colour)


def _frozen(image: Image.Image) -> Picture:
    array = np.asarray(image).copy()
    array.setflags(write=False)
    return array


@lru_cache(maxsize=1024)
def _card(rank: str, suit: int, width: int, height: int) -> Picture:
    """One open card, (height, width, 3): the rank as large as the card allows, the suit small below it."""
    image = Image.new("RGB", (width, height), TABLE)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), radius=width // 10, fill=WHITE, outline=BLACK)
    sign = height // 5
    box = (width // 14, 2, width - width // 14, height - sign - 3)
    _centred(image, rank, box, int((box[3] - box[1] - 4) / 0.75), RED if suit % 2 else BLACK)
    _suit(draw, suit, (width - sign) // 2, height - sign - 4, sign)
    return _frozen(image)


@lru_cache(maxsize=16)
def _card_back(width: int, height: int) -> Picture:
    image = Image.new("RGB", (width, height), TABLE)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), radius=width // 10, fill=BACK, outline=WHITE, width=4)
    for offset in range(-height, width, 14):
        draw.line((offset, height - 8, offset + height, -8), fill=BACK_LINES, width=3)
        draw.line((offset, 8, offset + height, height + 8), fill=BACK_LINES, width=3)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), radius=width // 10, outline=WHITE, width=5)
    return _frozen(image)


@lru_cache(maxsize=256)
def _cell(entry: str, width: int, height: int) -> Picture:
    """One formula entry, white on the table; a blank is a low bar."""
    image = Image.new("RGB", (width, height), TABLE)
    if entry == BLANK:
        ImageDraw.Draw(image).rectangle((5, height - 12, width - 6, height - 6), fill=WHITE)
    else:
        size = int(height * (1.7 if entry == "*" else 1.15))
        _centred(image, entry, (2, 0, width - 2, height), size, WHITE)
    return _frozen(image)


@lru_cache(maxsize=4)
def _table(labels: tuple[tuple[str, int, int, int], ...], line: int | None) -> Picture:
    """The empty table with labels (text, x, y, font size) and an optional horizontal line at y = `line`."""
    image = Image.new("RGB", (SIZE, SIZE), TABLE)
    draw = ImageDraw.Draw(image)
    for text, x, y, size in labels:
        draw.text((x, y), text, font=_font(size), fill=WHITE)
    if line is not None:
        draw.line((0, line, SIZE, line), fill=WHITE, width=2)
    return _frozen(image)


def _paste(picture: Picture, tile: Picture, x: int, y: int) -> None:
    picture[y : y + tile.shape[0], x : x + tile.shape[1]] = tile


@lru_cache(maxsize=64)
def _number_line(target: int, current: int) -> Picture:
    image = Image.new("RGB", (SIZE, SIZE), WHITE)
    draw = ImageDraw.Draw(image)
    for label, number, top in (("Target:", target, 0), ("Current:", current, SIZE // 2)):
        draw.text((8, top + 50), label, font=_font(42), fill=BLACK)
        _centred(image, str(number), (180, top + 8, SIZE - 8, top + SIZE // 2 - 8), 160, BLACK)
    draw.line((0, SIZE // 2, SIZE, SIZE // 2), fill=BLACK, width=2)
    return _frozen(image)


def number_line(target: int, current: int) -> Picture:
    """NumberLine's picture: the target above, the current number below. Returns a fresh (300, 300, 3) uint8 array."""
    return _number_line(target, current).copy()


def points(cards: Sequence[str], formula: Sequence[str], rows: int, columns: int) -> Picture:
    """The picture of a points game: its cards in a row, below them the formula in `rows` x `columns` fixed cells.

    Args:
        cards: ranks, "A", "2".."10", "J", "Q", "K"; two or four of them.
        formula: entries, one to a cell, `BLANK` for a blank; at most rows * columns.

    Returns:
        A fresh (300, 300, 3) uint8 array.
    """
    if len(formula) > rows * columns:
        raise ValueError(f"a formula of {len(formula)} entries does not fit {rows} x {columns} cells")
    picture = _table((), None).copy()
    width = SIZE // len(cards) - 5
    height = 112 if rows > 1 else 190
    for slot, rank in enumerate(cards):
        _paste(picture, _card(rank, slot % 4, width, height), 3 + slot * (width + 5), 4)
    top = height + 8
    cell_height = (SIZE - top) // rows
    for index, entry in enumerate(formula):
        row, column = divmod(index, columns)
        cell = _cell(entry, SIZE // columns, cell_height - 4)
        _paste(picture, cell, column * SIZE // columns, top + row * cell_height)
    return picture


def blackjack(dealer: str, player: Sequence[str]) -> Picture:
    """Blackjack's picture: the dealer's open card and a face-down one above, the player's cards below.

    Up to eight cards of the player are drawn at full size; a longer hand (less than one in 1,000) at half size.

    Returns:
        A fresh (300, 300, 3) uint8 array.
    """
    picture = _table((("Dealer", 160, 6, 38), ("Player", 160, 54, 38)), 101).copy()
    _paste(picture, _card(dealer, 0, 70, 95), 3, 3)
    _paste(picture, _card_back(70, 95), 78, 3)
    columns, width, height = (4, 70, 95) if len(player) <= 8 else (8, 34, 62)
    for slot, rank in enumerate(player):
        row, column = divmod(slot, columns)
        _paste(picture, _card(rank, slot % 4, width, height), 3 + column * (width + 3), 105 + row * (height + 3))
    return picture
