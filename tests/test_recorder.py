# SPDX-License-Identifier: Apache-2.0
"""What the recorded files hold. Layout is looked at, not tested; that the picture is in the frame is."""

import json
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from vlmq_trl.agent_format import make_format
from vlmq_trl.recorder import EpisodeRecorder, gif
from vlmq_trl.recorder.gif import BAR, MARGIN, PANEL_PALETTE
from vlmq_trl.rollout import Response, play_episodes
from vlmq_trl.trajectory import Episode, Turn

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "go"}]}]
TEXT_PROMPT = [
    {"role": "system", "content": "You play."},
    {"role": "user", "content": [{"type": "text", "text": "A door is to the north."}]},
]
RED, BLUE = np.uint8([[[255, 0, 0]]]), np.uint8([[[0, 0, 255]]])
COLOURS = np.random.default_rng(0).integers(0, 256, (150, 3), dtype=np.uint8)


def turn(image=RED, completion="+", reward=1.0, action="+", valid=True):
    return Turn(PROMPT, [np.asarray(image)], completion, reward, action, valid)


def episode(*turns, name="e/0", terminated=True, **kwargs):
    return Episode(name, turns or (turn(),), terminated, not terminated, env_id="Env-v0", seed=7, **kwargs)


def record(folder, *episodes, count=4):
    return list(EpisodeRecorder(folder, count).watch(iter(episodes)))


def frames(folder, number=0):
    (path,) = Path(folder).glob(f"{number:03d}-*.gif")
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "episodes.jsonl").read_bytes().splitlines()]


def shown(frame, height, width):
    """The picture's place in a frame: left, and in the middle of the height."""
    top = (frame.shape[0] - BAR - height) // 2
    return frame[top : top + height, MARGIN : MARGIN + width]


def panel(frame, height, width):
    """The frame without its picture."""
    rest = frame.copy()
    shown(rest, height, width)[:] = 0
    return rest


def test_played_episodes_pass_unchanged(tmp_path):
    class Plus:
        def act(self, requests):
            return [Response("+") for _ in requests]

    def play():
        return play_episodes("vlmq_trl/NumberLine-v0", Plus(), episodes=5, agent_format=make_format("plain"))

    recorded = list(EpisodeRecorder(tmp_path / "new" / "folder", 2).watch(play()))
    assert [(e.episode_id, e.return_, len(e.turns)) for e in recorded] == [
        (e.episode_id, e.return_, len(e.turns)) for e in play()
    ]
    files = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert files == ["000-vlmq_trl_NumberLine-v0_0.gif", "001-vlmq_trl_NumberLine-v0_1.gif", "episodes.jsonl"]
    for number, one in enumerate(recorded[:2]):
        drawn = frames(tmp_path / "new" / "folder", number)
        assert len(drawn) == len(one.turns) + 1
        for frame, played in zip(drawn, one.turns, strict=False):
            # Its letters' soft edges have more greys than there is room for.
            assert np.abs(shown(frame, 300, 300).astype(int) - played.images[0]).max() <= 8


def test_it_streams(tmp_path):
    """An endless source is read as far as it is asked for, and an episode is on disk when it comes out."""
    watched = EpisodeRecorder(tmp_path, 2).watch(episode(name=f"e/{i}") for i in count())
    for expected in (1, 2, 2):
        next(watched)
        assert len(list(tmp_path.glob("*.gif"))) == expected


def test_each_frame_shows_its_turn(tmp_path):
    few = COLOURS[np.arange(64 * 48).reshape(48, 64) % len(COLOURS)]  # 150 colours, 64 x 48
    record(tmp_path, episode(turn(RED), turn(few), turn(Image.fromarray(few[:, ::-1]))))
    drawn = frames(tmp_path)
    assert len(drawn) == 4 and len({frame.shape for frame in drawn}) == 1
    assert (shown(drawn[0], 448, 448) == RED).all()  # one pixel, 448 times as large
    enlarged = few.repeat(7, axis=0).repeat(7, axis=1)  # 448 // 64 = 7
    assert (shown(drawn[1], 336, 448) == enlarged).all()
    assert (shown(drawn[2], 336, 448) == enlarged[:, ::-1]).all()
    # Nobody saw the terminal state: the last picture again, at two fifths of its brightness.
    assert (shown(drawn[3], 336, 448) == enlarged[:, ::-1].astype(int) * 2 // 5).all()
    panels = [panel(frame, 448, 448) for frame in drawn]
    assert not any((one == other).all() for i, one in enumerate(panels) for other in panels[:i])
    for one in panels:
        colours = {tuple(colour) for colour in one.reshape(-1, 3)} - {(0, 0, 0)}
        assert colours <= {tuple(colour) for colour in PANEL_PALETTE}


def test_a_large_photograph_is_shrunk(tmp_path):
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)
    photo = np.stack([np.broadcast_to(ramp, (500, 1000)), *[np.broadcast_to(ramp[:500, None], (500, 1000))] * 2], -1)
    record(tmp_path, episode(turn(photo)))
    small = np.asarray(Image.fromarray(photo).resize((448, 224), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(shown(frames(tmp_path)[0], 224, 448) - small).mean() < 8


def test_a_truncated_episode_ends_with_its_final_picture(tmp_path):
    record(tmp_path, episode(turn(RED), terminated=False, final_prompt=PROMPT, final_images=[RED, BLUE]))
    first, last = frames(tmp_path)
    assert (shown(first, 448, 448) == RED).all() and (shown(last, 448, 448) == BLUE).all()


def test_the_newest_picture_is_shown(tmp_path):
    record(tmp_path, episode(Turn(PROMPT, [RED, BLUE], "+", 0.0)))
    assert (shown(frames(tmp_path)[0], 448, 448) == BLUE).all()


def test_an_earlier_turns_picture_is_not_shown_as_this_ones(tmp_path):
    """Where the newest message has none, its text stands in the picture's place."""
    history = [*PROMPT, {"role": "assistant", "content": "go"}]
    shown_then = [Turn([*history, {"role": "user", "content": text}], [RED], "+", 0.0) for text in ("one", "two")]
    final = {"final_prompt": [*history, *TEXT_PROMPT], "final_images": [RED]}
    record(tmp_path, episode(turn(RED), *shown_then, terminated=False, **final))
    picture, one, two, end = (shown(frame, 448, 448) for frame in frames(tmp_path))
    assert (picture == RED).all() and not any((frame == RED).all(-1).any() for frame in (one, two, end))
    assert (one != two).any() and (two != end).any()


def test_the_rows(tmp_path):
    first = episode(turn(), turn(completion="go\n", reward=-0.25, action="", valid=False), name="a")
    second = episode(Turn(TEXT_PROMPT, [], "open", 0.5, "open"), name="b", terminated=False)
    record(tmp_path, first, second)
    shared = {"episode_id": "a", "env_id": "Env-v0", "seed": 7, "prompt": "user: <image>\ngo", "gif": "000-a.gif"}
    ending = {"terminated": True, "truncated": False}
    assert rows(tmp_path) == [
        {
            **shared,
            "turn": 0,
            "response": "+",
            "action": "+",
            "valid": True,
            "reward": 1.0,
            **{"terminated": False, "truncated": False},
            "return": 1.0,
            "frame": 0,
        },
        {
            **shared,
            "turn": 1,
            "response": "go\n",
            "action": "",
            "valid": False,
            "reward": -0.25,
            **ending,
            "return": 0.75,
            "frame": 1,
        },
        {
            "episode_id": "b",
            "env_id": "Env-v0",
            "seed": 7,
            "prompt": "system: You play.\nuser: A door is to the north.",
            "gif": "001-b.gif",
            "turn": 0,
            "response": "open",
            "action": "open",
            "valid": True,
            "reward": 0.5,
            **{"terminated": False, "truncated": True},
            "return": 0.5,
            "frame": 0,
        },
    ]


def test_text_in_the_place_of_a_picture(tmp_path):
    def text_turn(text):
        return Turn([{"role": "user", "content": text}], [], "open", 0.0, "open")

    record(
        tmp_path,
        episode(text_turn("one"), text_turn("two")),
        episode(turn(np.zeros((100, 50, 3), np.uint8)), text_turn("two")),
        episode(text_turn("one"), terminated=False, final_prompt=TEXT_PROMPT, final_images=[]),
    )
    one, two, end = (shown(frame, 336, 380) for frame in frames(tmp_path, 0))
    assert (one != two).any() and (two == end).all()
    with_picture, without, _ = frames(tmp_path, 1)
    assert with_picture.shape == without.shape and (shown(with_picture, 400, 200) == 0).all()
    assert with_picture.shape[1] == frames(tmp_path, 0)[0].shape[1]  # room for the text
    seen, final = (shown(frame, 336, 380) for frame in frames(tmp_path, 2))
    assert (seen != final).any()


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n ",
        "\n" * 500,
        "x" * 100_000,
        "word " * 20_000,
        "\ud800",
        "🙂 你好 \x00\x1b[31m\u2028",
        "a\tb\r\nc",
        "\u0301",
    ],
)
def test_any_response_can_be_drawn(tmp_path, response):
    hard = turn(completion=response, action=response.strip(), valid=False)
    prompt = [{"role": "user", "content": response}]
    record(tmp_path, episode(hard, Turn(prompt, [], response, 0.0), name=response, terminated=False))
    assert len(frames(tmp_path)) == 3
    first, second = rows(tmp_path)
    assert first["response"] == response and second["prompt"] == f"user: {response}"


def test_text_stays_in_its_box():
    font = gif._font(15)
    for text in ("word " * 1000, "x" * 5000, "a " + "W" * 80 + " b", "🙂" * 100, "i\n" * 30, "é" * 500):
        for keep_end in (False, True):
            lines = gif._wrapped(text, 15, 200, 5, keep_end)
            assert len(lines) == 5 and all(font.getlength(line) <= 200 for line in lines)
            assert lines[0].startswith("…") if keep_end else lines[-1].endswith("…")
    assert gif._wrapped("one two\n\nthree", 15, 200, 5) == ["one two", "", "three"]
    first, *others = gif._wrapped("a " + "W" * 9, 15, 100, 5)
    assert first == "a" and len(others) == 2 and "".join(others) == "W" * 9
    assert gif._wrapped("é — ’½🙂\ud800", 15, 500, 5) == ["e - '\\xbd\\U0001f642\\ud800"]


def test_names_are_safe(tmp_path):
    names = ["a/b\\c:*?", "../../x", "", "e" * 300, "a/b|c:*?", "con\n"]
    record(tmp_path, *[episode(name=name) for name in names], count=6)
    files = sorted(file.name for file in tmp_path.glob("*"))
    assert files[:3] == ["000-a_b_c_.gif", "001-.._.._x.gif", "002-.gif"] and len(files) == 7
    assert max(map(len, files)) < 100 and [row["gif"] for row in rows(tmp_path)] == files[:6]
    assert [row["episode_id"] for row in rows(tmp_path)] == names


def test_equal_episodes_give_equal_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)  # more colours than a GIF holds
    one = episode(turn(noise), turn(), terminated=False, final_prompt=PROMPT, final_images=[noise])
    for folder in ("a", "b", "b"):  # a second recording overwrites the first
        record(tmp_path / folder, one, episode(name="e/1"))
    files = [{file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 3


def test_a_new_recording_takes_the_place_of_an_earlier_one(tmp_path):
    """All of it, whichever episode is the first that can be drawn; what else lies there stays."""
    (tmp_path / "notes.gif").write_bytes(b"mine")
    earlier = [episode(name=f"a/{i}") for i in range(3)]
    list(EpisodeRecorder(tmp_path, html=True).watch(earlier))
    record(tmp_path, Episode("none", (), True, False), episode(name="b"), episode(name="c"))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "001-b.gif",
        "002-c.gif",
        "episodes.jsonl",
        "notes.gif",
    ]
    assert [row["episode_id"] for row in rows(tmp_path)] == ["b", "c"]
    record(tmp_path, Episode("none", (), True, False))  # which records nothing
    assert len(rows(tmp_path)) == 2


def test_a_long_episode_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gif, "LONGEST", 3)
    record(tmp_path, episode(*[turn()] * 5))
    assert len(frames(tmp_path)) == 4
    assert [row["frame"] for row in rows(tmp_path)] == [0, 1, 2, None, None]


def test_a_very_long_episode(tmp_path, monkeypatch):
    """The progress of one turn is less than a pixel."""
    monkeypatch.setattr(gif, "LONGEST", 2)
    record(tmp_path, episode(*[turn()] * 5000))
    assert len(frames(tmp_path)) == 3 and len(rows(tmp_path)) == 5000


def test_numbers_may_be_numpys(tmp_path):
    one = Turn(PROMPT, [RED], "+", np.float32(0.5), "+", np.True_)
    record(tmp_path, Episode("e", (one,), np.True_, np.False_, seed=np.int64(3)))
    (row,) = rows(tmp_path)
    assert (row["reward"], row["valid"], row["terminated"], row["seed"]) == (0.5, True, True, 3)


def test_timing(tmp_path):
    record(tmp_path, episode(turn(), turn(BLUE)))
    with Image.open(next(tmp_path.glob("*.gif"))) as image:
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.info["loop"] == 0
    assert times == [gif.TURN_MS, gif.TURN_MS, gif.END_MS]


# ---- when it cannot be recorded ----


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    recorder = EpisodeRecorder(tmp_path / "file")
    with pytest.warns(UserWarning, match="no longer recorded into .*file") as warned:
        passed = list(recorder.watch([episode(), episode(name="e/1")]))
    assert len(passed) == 2 and len(warned) == 1 and isinstance(recorder.error, FileExistsError)


def test_a_disk_that_fills_up(tmp_path, disk_full_at):
    disk_full_at("001")
    with pytest.warns(UserWarning, match="No space left on device") as warned:
        passed = record(tmp_path, *[episode(name=f"e/{i}") for i in range(4)])
    assert [one.episode_id for one in passed] == ["e/0", "e/1", "e/2", "e/3"] and len(warned) == 1
    assert len(list(tmp_path.glob("*.gif"))) == 1 and [row["episode_id"] for row in rows(tmp_path)] == ["e/0"]


def test_nothing_to_record(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert record(tmp_path / "a", episode(), count=0) and record(tmp_path / "b") == []
        empty = Episode("e", (), True, False)
        assert record(tmp_path / "c", empty) == [empty]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="count must be at least 0"):
        EpisodeRecorder(tmp_path, -1)
