# SPDX-License-Identifier: Apache-2.0
"""Broken datasets, episodes and responses, each with its error text or its defined handling."""

import io

import datasets
import gymnasium
import numpy as np
import pytest
from PIL import Image

import vlmq_trl.envs  # noqa: F401  registers the environments
from vlmq_trl.agent_format import make_format
from vlmq_trl.trajectory import (
    FEATURES,
    Episode,
    TrajectoryError,
    Turn,
    dataset_from_episodes,
    episodes_from_dataset,
    validate_trajectories,
)

RGB = np.zeros((4, 6, 3), dtype=np.uint8)
NOISE = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)


def picture(file_format: str, pixels: np.ndarray = RGB) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=file_format)
    return {"bytes": buffer.getvalue(), "path": None}


def png() -> dict:
    return picture("PNG")


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


IMAGE_PART, TEXT_PART = {"type": "image", "text": None}, {"type": "text", "text": "go"}


def good_rows() -> list[dict]:
    """Rows 0-2: an episode that terminates; rows 3-4: one that is truncated."""
    rows = []
    for name, turns, truncated in (("a", 3, False), ("b", 2, True)):
        for k in range(turns):
            final = truncated and k == turns - 1
            rows.append(
                {
                    "prompt": user(IMAGE_PART, TEXT_PART),
                    "images": [png()],
                    "completion": [{"role": "assistant", "content": "x"}],
                    "episode_id": name,
                    "turn": k,
                    "reward": 0.5,
                    "terminated": not truncated and k == turns - 1,
                    "truncated": final,
                    "final_prompt": user(IMAGE_PART, TEXT_PART) if final else None,
                    "final_images": [png()] if final else None,
                    "action": "x",
                    "valid": True,
                    "behavior_logprobs": [-0.5, -0.25],
                    "env_id": "env",
                    "seed": 0,
                }
            )
    return rows


def test_the_good_dataset_is_good():
    assert len(validate_trajectories(datasets.Dataset.from_list(good_rows(), features=FEATURES), "all")) == 2


def put(row, **columns):
    """A change of one row."""

    def change(rows):
        rows[row].update(columns)

    return change


def drop(*rows_to_drop):
    def change(rows):
        rows[:] = [row for k, row in enumerate(rows) if k not in rows_to_drop]

    return change


def swap(one, other):
    def change(rows):
        rows[one], rows[other] = rows[other], rows[one]

    return change


def rename(row, name):
    return put(row, episode_id=name)


BROKEN_PNG = {"bytes": png()["bytes"][:40], "path": None}
BROKEN_JPEG = {"bytes": picture("JPEG")["bytes"][:-200], "path": None}

# (change of the rows, row, column, part of the message)
BROKEN_ROWS = {
    "gap in turn": (drop(1), 1, "turn", "turn 2 of episode 'a' where turn 1 belongs: a gap"),
    "first turn missing": (drop(3), 3, "turn", "turn 1 of episode 'b' where turn 0 belongs"),
    "unordered turns": (swap(0, 1), 0, "turn", "turn 1 of episode 'a' where turn 0 belongs"),
    "repeated turn": (put(1, turn=0), 1, "turn", "a repeated or unordered turn"),
    "negative turn": (put(0, turn=-1), 0, "turn", "turn -1 of episode 'a' where turn 0 belongs"),
    "null turn": (put(2, turn=None), 2, "turn", "null; every row needs an integer"),
    "interleaved episodes": (swap(2, 3), 3, "episode_id", "continues here after another episode"),
    "id used again": (lambda rows: rows.append({**rows[0]}), 5, "episode_id", "do not shuffle rows"),
    "null id": (put(1, episode_id=None), 1, "episode_id", "null; every row needs a string"),
    "nan reward": (put(1, reward=float("nan")), 1, "reward", "the reward is nan; rewards must be finite"),
    "infinite reward": (put(4, reward=float("-inf")), 4, "reward", "the reward is -inf"),
    "null reward": (put(0, reward=None), 0, "reward", "null; every row needs a number"),
    "two terminal rows": (put(1, terminated=True), 1, "terminated", "true before the episode's last row"),
    "truncated too early": (put(3, truncated=True), 3, "truncated", "true before the episode's last row"),
    "cut off in the middle": (drop(2), 1, "terminated", "the episode stops here with neither"),
    "cut off at the end": (drop(4), 3, "terminated", "mark it truncated and give its final observation"),
    "null flag": (put(0, truncated=None), 0, "truncated", "null; every row needs a bool"),
    "no final observation": (put(4, final_prompt=None), 4, "final_prompt", "to bootstrap from; record it"),
    "early final observation": (
        put(0, final_prompt=user(TEXT_PART), final_images=[]),
        0,
        "final_prompt",
        "set before the episode's last row",
    ),
    "final images missing": (put(4, final_images=[]), 4, "final_prompt", "1 image parts for 0 images in `final_im"),
    "final images null": (
        put(4, final_prompt=user(TEXT_PART), final_images=None),
        4,
        "final_images",
        "null where the turn shows pictures",
    ),
    "no images": (put(2, images=[]), 2, "prompt", "1 image parts for 0 images in `images`"),
    "too many images": (put(2, images=[png(), png()]), 2, "prompt", "1 image parts for 2 images"),
    "null images": (put(2, images=None), 2, "images", "null; write an empty list"),
    "null image": (put(1, images=[None]), 1, "images", "an image is null"),
    "empty image": (put(3, images=[{"bytes": None, "path": None}]), 3, "images", "an image is null"),
    "cut-off image": (put(3, images=[BROKEN_PNG]), 3, "images", "image 0 does not decode"),
    "not an image": (put(0, images=[{"bytes": b"hello", "path": None}]), 0, "images", "does not decode (Unidentified"),
    "image file is gone": (put(1, images=[{"bytes": None, "path": "/gone.png"}]), 1, "images", "(FileNotFoundError"),
    "final image broken": (put(4, final_images=[BROKEN_PNG]), 4, "final_images", "image 0 does not decode"),
    "null prompt": (put(1, prompt=None), 1, "prompt", "null; every turn needs its prompt"),
    "empty prompt": (put(1, prompt=[], images=[]), 1, "prompt", "there is no message"),
    "unknown role": (
        put(0, prompt=[{"role": "bot", "content": [IMAGE_PART]}]),
        0,
        "prompt",
        "role is unknown or null",
    ),
    "null content": (put(0, prompt=[{"role": "user", "content": None}]), 0, "prompt", "content is null"),
    "unknown part": (put(0, prompt=user({"type": "video", "text": None})), 0, "prompt", "a content part is neither"),
    "text part without text": (put(0, prompt=user({"type": "text", "text": None})), 0, "prompt", "neither {'type'"),
    "prompt ends with the answer": (
        put(2, prompt=[*user(IMAGE_PART), {"role": "assistant", "content": [TEXT_PART]}]),
        2,
        "prompt",
        "the last message is not the user's",
    ),
    "null completion": (put(1, completion=None), 1, "completion", "null; every turn needs its response"),
    "empty completion": (put(1, completion=[]), 1, "completion", "expected exactly one message"),
    "two messages": (
        put(0, completion=[{"role": "assistant", "content": "x"}] * 2),
        0,
        "completion",
        "past turns belong in `prompt`",
    ),
    "completion by the user": (
        put(0, completion=[{"role": "user", "content": "x"}]),
        0,
        "completion",
        "not 'assistant'",
    ),
    "null response": (put(3, completion=[{"role": "assistant", "content": None}]), 3, "completion", "write '' for"),
    "positive logprob": (put(2, behavior_logprobs=[0.5]), 2, "behavior_logprobs", "not finite or positive"),
    "nan logprob": (put(2, behavior_logprobs=[float("nan")]), 2, "behavior_logprobs", "null, not finite"),
    "null valid": (put(2, valid=None), 2, "valid", "null; every row needs a bool"),
    "null action": (put(2, action=None), 2, "action", "null; every row needs a string"),
}


@pytest.mark.parametrize(("change", "row", "column", "words"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_broken_rows(change, row, column, words):
    rows = good_rows()
    change(rows)
    ds = datasets.Dataset.from_list(rows, features=FEATURES)
    with pytest.raises(TrajectoryError) as caught:
        validate_trajectories(ds, check_images="all")
    assert (caught.value.row, caught.value.column) == (row, column)
    assert str(caught.value).startswith(f"row {row}, column `{column}`: ")
    assert words in str(caught.value)


def test_what_messages_hold_beside_role_and_content(monkeypatch):
    """Nulls are what `datasets` puts where another row has something."""
    rows = good_rows()
    for row in rows:
        for message in row["prompt"]:
            message["tool_calls"] = None
    del rows[4]["final_prompt"], rows[4]["final_images"]
    rows[4] |= {"terminated": True, "truncated": False}
    keys = {"role": datasets.Value("string"), "content": FEATURES["prompt"].feature["content"]}
    other = {**FEATURES, "prompt": datasets.List({**keys, "tool_calls": datasets.Value("string")})}
    features = datasets.Features({k: v for k, v in other.items() if not k.startswith("final")})
    rows = [{k: v for k, v in row.items() if not k.startswith("final")} for row in rows]
    validate_trajectories(datasets.Dataset.from_list(rows, features=features))
    rows[1]["prompt"][0]["tool_calls"] = "f()"
    with pytest.raises(TrajectoryError, match="row 1, column `prompt`: a message's tool_calls would be lost"):
        validate_trajectories(datasets.Dataset.from_list(rows, features=features))
    rows = [{k: v for k, v in row.items() if k != "prompt"} | {"prompt": user(IMAGE_PART, TEXT_PART)} for row in rows]
    rows[2]["completion"][0]["reasoning"] = None
    validate_trajectories(datasets.Dataset.from_list(rows).cast_column("images", FEATURES["images"]))
    rows[3]["completion"][0]["reasoning"] = "so"
    with pytest.raises(TrajectoryError, match="row 3, column `completion`: the message's reasoning would be lost"):
        validate_trajectories(datasets.Dataset.from_list(rows).cast_column("images", FEATURES["images"]))


def test_what_parts_hold_beside_type_and_text():
    """A null is what `datasets` puts where another part has something; a picture would be shown twice."""
    rows = good_rows()
    for row in rows:
        for prompt in (row["prompt"], row["final_prompt"] or []):
            for message in prompt:
                message["content"] = [{"image": None, **part} for part in message["content"]]
    part = {name: datasets.Value("string") for name in ("type", "text", "image")}
    prompt = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    features = datasets.Features({**FEATURES, "prompt": prompt, "final_prompt": prompt})
    validate_trajectories(datasets.Dataset.from_list(rows, features=features))
    rows[1]["prompt"][0]["content"][0]["image"] = "a.png"
    with pytest.raises(TrajectoryError, match="row 1, column `prompt`: a content part is neither"):
        validate_trajectories(datasets.Dataset.from_list(rows, features=features))


def retype(column, feature):
    return lambda ds: ds.cast_column(column, feature)


def replace(column, values):
    return lambda ds: ds.remove_columns(column).add_column(column, values)


# (change of the dataset, column, part of the message)
BROKEN_COLUMNS = {
    "no reward": (lambda ds: ds.remove_columns("reward"), "reward", "the dataset has no such column"),
    "no prompt": (lambda ds: ds.rename_column("prompt", "messages"), "prompt", "Rename or add it"),
    "no rows": (lambda ds: ds.select([]), None, "the dataset has no rows"),
    "a stream": (lambda ds: ds.to_iterable_dataset(), None, "validation needs random access, got IterableDataset"),
    "several splits": (lambda ds: datasets.DatasetDict(train=ds), None, "got DatasetDict"),
    "reward as text": (retype("reward", datasets.Value("string")), "reward", "expected a number, found string"),
    "turn as float": (retype("turn", datasets.Value("float32")), "turn", "expected an integer, found float"),
    "flag as integer": (retype("terminated", datasets.Value("int8")), "terminated", "expected a bool, found int8"),
    "id as integer": (replace("episode_id", [0, 0, 0, 1, 1]), "episode_id", "expected a string, found int64"),
    "prompt as text": (replace("prompt", ["go"] * 5), "prompt", "wrap plain text in a user message"),
    "completion as text": (replace("completion", ["x"] * 5), "completion", "expected a list with one assistant"),
    "other keys": (replace("prompt", [[{"from": "human", "value": "go"}]] * 5), "prompt", "found ['from', 'value']"),
    "one image a row": (replace("images", [png()] * 5), "images", "expected a list of images"),
    "image parts, no images": (
        lambda ds: ds.remove_columns("images"),
        "prompt",
        "an image part, but the dataset has no `images`",
    ),
    "tools": (
        lambda ds: ds.add_column("tools", [None, "[]", None, None, None]),
        "tools",
        "row 1, column `tools`: the chat template would get this in training alone",
    ),
    "template's arguments": (
        lambda ds: ds.add_column("chat_template_kwargs", [{"enable_thinking": False}] * 5),
        "chat_template_kwargs",
        "Set it in the template, for both",
    ),
    "a single picture": (
        lambda ds: ds.remove_columns(["images", "final_images"]).add_column("image", [png()] * 5),
        "image",
        "put it into `images`, a list",
    ),
    "pictures of no feature": (
        lambda ds: ds.cast_column(
            "images", datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
        ),
        "images",
        "expected a list of images",
    ),
    "seed as text": (replace("seed", ["one"] * 5), "seed", "expected an integer (-1 where there is none)"),
    "no final pictures": (lambda ds: ds.remove_columns("final_images"), "final_images", "would be seen blind"),
    "no final column": (lambda ds: ds.remove_columns("final_prompt"), "final_prompt", "needs the observation after"),
}


@pytest.mark.parametrize(("change", "column", "words"), BROKEN_COLUMNS.values(), ids=BROKEN_COLUMNS)
def test_broken_columns(change, column, words):
    ds = change(datasets.Dataset.from_list(good_rows(), features=FEATURES))
    with pytest.raises(TrajectoryError) as caught:
        validate_trajectories(ds)
    assert caught.value.column == column
    assert words in str(caught.value)


def test_columns_with_other_names_are_left_alone():
    ds = datasets.Dataset.from_list(good_rows(), features=FEATURES)
    ds = ds.add_column("note", ["x"] * 5).add_column("tools", [None] * 5)
    assert len(validate_trajectories(ds)) == 2


def test_every_picture_is_checked_and_not_a_sample_only():
    rows = [row for k in range(40) for row in good_rows()]
    for k, row in enumerate(rows):
        row["episode_id"] = f"{row['episode_id']}{k // 5}"
    for wrong in (BROKEN_PNG, {"bytes": png()["bytes"].replace(b"IDAT", b"IDAX"), "path": None}, BROKEN_JPEG):
        rows[102]["images"] = [wrong]
        ds = datasets.Dataset.from_list(rows, features=FEATURES)
        with pytest.raises(TrajectoryError, match="row 102, column `images`: image 0 does not decode"):
            validate_trajectories(ds)
        validate_trajectories(ds, "sample")  # row 102 is not in it


def test_a_transform_is_refused():
    """Training reads the rows as they are: it would not be applied."""
    changed = datasets.Dataset.from_list(good_rows(), features=FEATURES).with_transform(lambda batch: batch)
    with pytest.raises(TrajectoryError, match=r"the dataset has a transform .* Change the rows with `map`"):
        validate_trajectories(changed)
    validate_trajectories(changed.with_format(None))


def test_checking_pictures_can_be_left_out():
    rows = good_rows()
    rows[1]["images"] = [BROKEN_PNG]
    ds = datasets.Dataset.from_list(rows, features=FEATURES)
    validate_trajectories(ds, check_images="none")
    with pytest.raises(ValueError, match="must be 'all', 'sample' or 'none'"):
        validate_trajectories(ds, check_images="some")


def test_final_observations_can_be_left_out():
    rows = good_rows()
    rows[4].update(final_prompt=None, final_images=None)
    ds = datasets.Dataset.from_list(rows, features=FEATURES)
    assert len(validate_trajectories(ds, require_final_observation=False)) == 2


def turn(**changes) -> Turn:
    return Turn(**{"prompt": user(IMAGE_PART), "images": [RGB], "completion": "x", "reward": 0.0, **changes})


def episode(*turns: Turn, **changes) -> Episode:
    return Episode(**{"episode_id": "e", "turns": turns, "terminated": True, "truncated": False, **changes})


# (episodes, row, column, part of the message)
BROKEN_EPISODES = {
    "no episodes": ([], None, None, "there are no episodes"),
    "no turns": ([episode()], 0, "turn", "episode 'e' has no turns"),
    "id twice": ([episode(turn()), episode(turn())], 1, "episode_id", "'e' occurs twice"),
    "id is a number": ([episode(turn(), episode_id=3)], 0, "episode_id", "expected a string, got int"),
    "never ends": ([episode(turn(), terminated=False)], 0, "terminated", "neither terminated nor truncated"),
    "nan reward": ([episode(turn(), turn(reward=float("nan")))], 1, "reward", "the reward is nan"),
    "reward is nothing": ([episode(turn(reward=None))], 0, "reward", "the reward is a NoneType"),
    "reward beyond float32": ([episode(turn(reward=1e39))], 0, "reward", "finite, in float32 too"),
    "seed is nothing": ([episode(turn(), seed=None)], 0, "seed", "expected an int64"),
    "seed beyond int64": ([episode(turn(), seed=2**70)], 0, "seed", "expected an int64"),
    "surrogate in env_id": ([episode(turn(), env_id="\ud800")], 0, "env_id", "a lone surrogate"),
    "content is a number": ([episode(turn(prompt=[{"role": "user", "content": 5}]))], 0, "prompt", "list of parts"),
    "part is a string": ([episode(turn(prompt=user("hi")))], 0, "prompt", "list of parts"),
    "unread broken image": (
        [episode(turn(images=[Image.open(io.BytesIO(picture("PNG", NOISE)["bytes"][:500]))]))],
        0,
        "images",
        "the image does not decode",
    ),
    "prompt is text": ([episode(turn(prompt="go"))], 0, "prompt", "wrap plain text in a user message"),
    "empty prompt": ([episode(turn(prompt=[], images=[]))], 0, "prompt", "there is no message"),
    "unknown role": ([episode(turn(prompt=[{"role": "bot", "content": "x"}]))], 0, "prompt", "unknown role 'bot'"),
    "no content": ([episode(turn(prompt=[{"role": "user"}]))], 0, "prompt", "the keys 'role' and 'content'"),
    "image count": ([episode(turn(images=[]))], 0, "prompt", "1 image parts for 0 images"),
    "inline image": (
        [episode(turn(prompt=user({"type": "image", "image": RGB})))],
        0,
        "prompt",
        "put it into the turn's `images`",
    ),
    "ends with the assistant": (
        [episode(turn(prompt=[*user(IMAGE_PART), {"role": "assistant", "content": "x"}]))],
        0,
        "prompt",
        "the last message is the assistant's",
    ),
    "float image": ([episode(turn(images=[RGB / 255]))], 0, "images", "got float64 of shape [4, 6, 3]"),
    "channels first": ([episode(turn(images=[RGB.transpose(2, 0, 1)]))], 0, "images", "a uint8 array [H, W, 3]"),
    "CMYK image": (
        [episode(turn(images=[Image.new("CMYK", (4, 4))]))],
        0,
        "images",
        "convert it to 8 bits, as 'L' or 'RGB'",
    ),
    "16 bits of grey": ([episode(turn(images=[Image.new("I;16", (4, 4))]))], 0, "images", "16-bit grey becomes white"),
    "picture of a tool": (
        [episode(turn(prompt=[*user(TEXT_PART), {"role": "tool", "content": [IMAGE_PART]}], images=[RGB]))],
        0,
        "prompt",
        "an image part in a tool message, where TRL shows no picture",
    ),
    "tool calls": (
        [episode(turn(prompt=[{"role": "assistant", "content": "", "tool_calls": ["f()"]}, *user(TEXT_PART)]))],
        0,
        "prompt",
        "a message's 'tool_calls' would be lost",
    ),
    "response is no text": ([episode(turn(completion=None))], 0, "completion", "expected a string, got NoneType"),
    "lone surrogate": ([episode(turn(completion="a\ud800"))], 0, "completion", "a lone surrogate at position 1"),
    "surrogate in prompt": (
        [episode(turn(prompt=user(IMAGE_PART, {"type": "text", "text": "\udfff"})))],
        0,
        "prompt",
        "decode responses with errors='replace'",
    ),
    "final image count": (
        [episode(turn(), truncated=True, final_prompt=user(IMAGE_PART))],
        0,
        "final_prompt",
        "1 image parts for 0 images",
    ),
}


@pytest.mark.parametrize(("episodes", "row", "column", "words"), BROKEN_EPISODES.values(), ids=BROKEN_EPISODES)
def test_broken_episodes(episodes, row, column, words, tmp_path):
    with pytest.raises(TrajectoryError) as caught:
        dataset_from_episodes(episodes, cache_dir=tmp_path)
    assert (caught.value.row, caught.value.column) == (row, column)
    assert words in str(caught.value)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(1), "row 1, column `turn`: turn 2 of episode 'a' stands where turn 1 belongs"),
        (drop(2), "row 1, column `terminated`: episode 'a' stops here"),
        (drop(4), "row 3, column `terminated`: episode 'b' stops here"),
    ],
)
def test_broken_streams(change, words):
    rows = good_rows()
    change(rows)
    stream = datasets.Dataset.from_list(rows, features=FEATURES).to_iterable_dataset()
    with pytest.raises(TrajectoryError) as caught:
        list(episodes_from_dataset(stream))
    assert words in str(caught.value)


# Responses: (response, does it parse as JSON, what the environment plays with on_invalid="noop")
RESPONSES = {
    "legal": ('{"action": "+"}', True, "+"),
    "upper case and space": ('{"action": " Hit "}', True, ""),
    "an action of another game": ('{"action": "stand"}', True, ""),
    "two actions": ('{"action": "+ -"}', True, ""),
    "several objects": ('{"action": "-"} {"action": "+"}', True, "+"),
    "cut off": ('{"thoughts": "I', False, ""),
    "cut off inside the action": ('{"action": "+', True, "+"),
    "empty": ("", False, ""),
    "bare action": ("+", False, ""),
    "null": ('{"action": null}', False, ""),
    "list": ('{"action": ["+"]}', False, ""),
    "blank": ('{"action": "  "}', False, ""),
    "not text": ("\x00\ud800\uffff", False, ""),
    "surrogate": ('{"action": "\\ud800"}', False, ""),
    "very long": ('{"action": "' + "+" * 100_000 + '"}', True, ""),
    "deeply nested": ('{"action":' * 5_000, False, ""),
    "a formula": ("{\"action\": \"__import__('os').system('true')\"}", True, ""),
}


@pytest.mark.parametrize(("response", "parses", "played"), RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("on_invalid", ["noop", "random", "terminate"])
def test_responses(response, parses, played, on_invalid):
    parsed = make_format("json").parse(response)
    assert parsed.valid == parses
    env = gymnasium.make("vlmq_trl/NumberLine-v0", on_invalid=on_invalid)
    env.reset(seed=0)
    before = env.unwrapped.state_text()
    _, reward, terminated, _, info = env.step(parsed.action)
    assert info["valid"] == bool(played)
    if played:
        assert info["action"] == played
    elif on_invalid == "random":
        assert info["action"] in ("+", "-") and reward in (-2.0, -1.0, 0.0)
    else:
        assert (info["action"], reward, terminated) == ("", -1.0, on_invalid == "terminate")
        assert env.unwrapped.state_text() == before
