# SPDX-License-Identifier: Apache-2.0
"""An episode's page: everything is on it, nothing in it runs, and it stands alone. Layout is looked at, not tested."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vlmq_trl.recorder import EpisodeRecorder, episode_page
from vlmq_trl.trajectory import Episode, Turn

PICTURES = [np.full((2, 3, 3), k, np.uint8) for k in range(5)]
VOID = {"meta", "img", "line", "polyline"}


class Page(HTMLParser):
    """The page's tags, texts and pictures; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.pictures = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            data = dict(attrs)["src"].removeprefix("data:image/png;base64,")
            self.pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True)))))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


def message(text, pictures=1, role="user"):
    return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def turn(k, completion="go", reward=0.0, action="go", valid=True, prompt=None):
    return Turn(prompt or [message(f"state {k}")], [PICTURES[k]], completion, reward, action, valid)


def episode(*turns, **kwargs):
    return Episode("e/0", turns, **{"terminated": True, "truncated": False, "env_id": "Env-v0", "seed": 7, **kwargs})


def test_every_turn_is_on_the_page():
    page = Page(episode_page(episode(turn(0, "left", -0.5, "left"), turn(1, "??", 2.0, "", valid=False))))
    assert page.tags.count("section") == 2
    text = " ".join(page.texts)
    for part in ("Env-v0, seed 7", "Success yes", "Return +1.5", "Turns 2", "Valid responses 1 of 2", "terminated"):
        assert part in text
    assert "Turn 0 Prompt <image>\nstate 0 Response left Action ✓ left Reward -0.5 Return so far -0.5" in text
    assert "Turn 1 Prompt <image>\nstate 1 Response ?? Action ✗ none (invalid) Reward +2 Return so far +1.5" in text
    assert [picture.tolist() for picture in page.pictures] == [picture.tolist() for picture in PICTURES[:2]]


def test_a_truncated_episode_shows_what_it_would_have_seen_next():
    ending = {"final_prompt": [message("too late")], "final_images": [PICTURES[4]]}
    page = Page(episode_page(episode(turn(0), terminated=False, truncated=True, **ending)))
    assert "After the last turn Prompt <image>\ntoo late" in " ".join(page.texts)
    assert (page.pictures[-1] == PICTURES[4]).all() and len(page.pictures) == 2


def test_earlier_messages_are_folded_and_their_pictures_are_left_to_their_own_turns():
    prompt = [message("be quick", 0, "system"), message("before"), message("then", 0, "assistant"), message("now", 2)]
    one = Turn(prompt, PICTURES[:3], "go", 0.0, "go")
    page = Page(episode_page(episode(one)))
    assert page.tags.count("details") == 1
    assert "3 earlier messages" in page.texts and "system: be quick\n\nuser: <image>\nbefore" in " ".join(page.texts)
    assert [int(picture.max()) for picture in page.pictures] == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([message("before", 3), message("then", 0, "assistant"), message("now", 0)], []),
        ([message("before", 3), {"role": "user", "content": "now"}], []),
        ([{"role": "user", "content": "before"}, {"role": "user", "content": "now"}], []),
        ([{"role": "system", "content": "play"}, {"role": "user", "content": "now"}], [0, 1, 2]),
        ([message("before", 2), message("now")], [2]),
    ],
)
def test_a_turn_shows_the_pictures_of_its_own_message(prompt, expected):
    page = Page(episode_page(episode(Turn(prompt, PICTURES[:3], "go", 0.0, "go"))))
    assert [int(picture.max()) for picture in page.pictures] == expected


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</pre></section><iframe src=//example.org>",
        "&lt;b&gt; ]]> <!-- ",
        "' onload='alert(1)",
        "\x00\x1b[31m \u2028 🙂 \ud800",
    ],
)
def test_what_a_model_writes_is_text(tmp_path, hostile):
    """Wherever it stands, it adds no tag and no attribute, and reads as it was written."""

    def play(word):
        prompt = [message(word, 0, "system"), message(word)]
        one = Turn(prompt, [PICTURES[0]], word, 1.0, word)
        return Episode(word, (one,), True, False, env_id=word, seed=1)

    plain, page = Page(episode_page(play("word"))), Page(episode_page(play(hostile)))
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert not {"script", "iframe", "object", "link", "form"} & set(page.tags)
    shown = hostile.replace("\x00", "�").strip()
    assert any(shown in text.replace("\x00", "�") for text in page.texts)
    list(EpisodeRecorder(tmp_path, html=True).watch([play(hostile)]))
    assert len(list(tmp_path.glob("*.html"))) == 1


def test_the_page_stands_alone():
    text = episode_page(episode(turn(0), turn(1)))
    assert "default-src 'none'; img-src data:" in text
    assert "http:" not in text and "https:" not in text and "url(" not in text


def test_a_text_environment():
    one = Turn([{"role": "user", "content": "A door."}], [], " ", 0.0, "")
    page = Page(episode_page(episode(one)))
    assert page.pictures == [] and "(empty)" in page.texts and "A door." in page.texts


def test_equal_episodes_give_equal_pages_beside_the_gif(tmp_path):
    for folder in ("a", "b"):
        list(EpisodeRecorder(tmp_path / folder, count=1, html=True).watch([episode(turn(0)), episode(turn(1))]))
    files = [{file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("a", "b")]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["000-e_0.gif", "000-e_0.html", "episodes.jsonl"]


def test_without_html_there_is_no_page(tmp_path):
    list(EpisodeRecorder(tmp_path).watch([episode(turn(0))]))
    assert not list(tmp_path.glob("*.html"))
