# SPDX-License-Identifier: Apache-2.0
"""An episode as one HTML page that stands alone: picture, prompt, response, parsed action and reward of each turn.

All text is escaped and the page loads and runs nothing, so that whatever a model wrote can be looked at.

Contents: `episode_page`.
"""

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from vlmq_trl.recorder.gif import message_text, newest_pictures
from vlmq_trl.trajectory import Episode, Turn

STYLE = """
:root { color-scheme: dark; --ground: #15171c; --card: #21252e; --line: #333946; --text: #eceef2; --dim: #8e96a5;
  --good: #58d08a; --bad: #ff7070; --mark: #6ea8fe; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 20px 60px; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 22px; }
h2 { margin: 0 0 10px; font-size: 15px; color: var(--dim); font-weight: 600; }
dl { display: flex; flex-wrap: wrap; gap: 6px 30px; margin: 12px 0 0; }
dt { color: var(--dim); font-size: 12px; }
dd { margin: 0; font-size: 18px; font-weight: 600; }
svg { display: block; width: 100%; height: 64px; margin: 18px 0 4px; }
.turn { display: grid; grid-template-columns: minmax(0, 340px) minmax(0, 1fr); gap: 18px; margin-top: 18px;
  padding: 18px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.turn:target { border-color: var(--mark); }
.pictures img { display: block; width: 100%; margin-bottom: 8px; border-radius: 6px; image-rendering: auto; }
.pictures img.small { image-rendering: pixelated; }
pre { margin: 4px 0 12px; padding: 10px 12px; max-height: 320px; overflow: auto; background: var(--ground);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
summary, .label { color: var(--dim); font-size: 12px; }
summary { cursor: pointer; margin-bottom: 8px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.figures { display: flex; flex-wrap: wrap; gap: 6px 30px; }
.figures b { font-size: 17px; }
@media (max-width: 720px) { .turn { grid-template-columns: 1fr; } }
"""
SMALL = 200  # pixels: a picture whose longer side is shorter is enlarged without smoothing


def episode_page(episode: Episode) -> str:
    """The page of an episode of at least one turn, as HTML. Equal episodes give equal pages."""
    title = f"{episode.env_id or 'Episode'}, seed {episode.seed}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        "'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _summary(episode),
        _return_curve(episode),
        *_turns(episode),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(episode: Episode) -> str:
    valid = sum(bool(turn.valid) for turn in episode.turns)
    facts = [
        ("Success", '<span class="good">yes</span>' if episode.success else '<span class="bad">no</span>'),
        ("Return", _signed(episode.return_)),
        ("Turns", str(len(episode.turns))),
        ("Valid responses", f"{valid} of {len(episode.turns)}"),
        ("End", "terminated" if episode.terminated else "truncated"),
        ("Episode", escape(episode.episode_id)),
    ]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts) + "</dl>"


def _signed(value: float) -> str:
    """A reward in its colour; zero has none."""
    text = f"{float(value):+.4g}" if value else "0"
    return f'<span class="{"good" if value > 0 else "bad"}">{text}</span>' if value else text


def _return_curve(episode: Episode) -> str:
    """The return so far against turns, each turn a link to its place below."""
    totals = np.cumsum([0.0, *(float(turn.reward) for turn in episode.turns)])
    low, high = float(totals.min()), float(totals.max())
    span = high - low or 1.0
    x = np.linspace(1, 99, len(totals))
    y = 92 - 84 * (totals - low) / span if high > low else np.full(len(totals), 50.0)
    line = " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))
    zero = 92 - 84 * (0 - low) / span if high > low else 50.0
    links = "".join(
        f'<a href="#turn-{k}"><rect x="{x[k]:.2f}" y="0" width="{x[k + 1] - x[k]:.2f}" height="100" '
        f'fill="transparent"><title>turn {k}, return {totals[k + 1]:+.4g}</title></rect></a>'
        for k in range(len(episode.turns))
    )
    return (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="return so far by turn">'
        f'<line x1="0" x2="100" y1="{zero:.2f}" y2="{zero:.2f}" stroke="#333946" vector-effect="non-scaling-stroke"/>'
        f'<polyline points="{line}" fill="none" stroke="#6ea8fe" stroke-width="2" vector-effect="non-scaling-stroke"/>'
        f"{links}</svg>"
    )


def _turns(episode: Episode) -> Iterator[str]:
    total = 0.0
    for k, turn in enumerate(episode.turns):
        total += float(turn.reward)
        yield _section(f"Turn {k}", turn.prompt, turn.images, _answer(turn, total), f' id="turn-{k}"')
    if episode.final_prompt is not None:
        yield _section("After the last turn", episode.final_prompt, episode.final_images or [])


def _section(title: str, prompt: list[dict[str, Any]], images: list, answer: str = "", mark: str = "") -> str:
    pictures = "".join(map(_picture, newest_pictures(prompt, images)))
    seen = f'<div class="pictures"><h2>{title}</h2>{pictures}</div>'
    return f'<section class="turn"{mark}>{seen}<div>{_prompt(prompt)}{answer}</div></section>'


def _picture(image: Any) -> str:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    small = ' class="small"' if max(picture.size) < SMALL else ""
    return f'<img{small} alt="what the agent saw" src="data:image/png;base64,{data}">'


def _prompt(prompt: list[dict[str, Any]]) -> str:
    if not prompt:
        return ""
    *earlier, last = prompt
    shown = f'<div class="label">Prompt</div><pre>{escape(message_text(last))}</pre>'
    if earlier:
        texts = "\n\n".join(f"{message['role']}: {message_text(message)}" for message in earlier)
        word = "message" if len(earlier) == 1 else "messages"
        shown = f"<details><summary>{len(earlier)} earlier {word}</summary><pre>{escape(texts)}</pre></details>{shown}"
    return shown


def _answer(turn: Turn, total: float) -> str:
    response = escape(turn.completion) if turn.completion.strip() else "(empty)"
    mark = '<span class="good">✓</span>' if turn.valid else '<span class="bad">✗</span>'
    action = escape(turn.action) or "none"
    return (
        f'<div class="label">Response</div><pre>{response}</pre><div class="figures">'
        f'<div><div class="label">Action</div><b>{mark} {action}{"" if turn.valid else " (invalid)"}</b></div>'
        f'<div><div class="label">Reward</div><b>{_signed(turn.reward)}</b></div>'
        f'<div><div class="label">Return so far</div><b>{_signed(total)}</b></div></div>'
    )
