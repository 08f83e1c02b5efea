# SPDX-License-Identifier: Apache-2.0
"""Agent formats: prompts, rendering, and parsers that are total over any string."""

import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmq_trl.agent_format import (
    AgentFormat,
    CallableFormat,
    Exchange,
    JSONCoTFormat,
    JSONFormat,
    ParsedAction,
    PlainFormat,
    action_of,
    default_format,
    make_format,
    parse_json_action,
    prompt_of,
)

IMAGE = np.zeros((4, 6, 3), dtype=np.uint8)
FIELDS = ("current number", "target number")
FORMATS = [PlainFormat(), JSONFormat(), JSONCoTFormat(reading_fields=FIELDS)]
INVALID = ParsedAction("", False)

# Any code point, lone surrogates too; and text made of the pieces that the JSON parser looks at.
anything = st.text(alphabet=st.characters(exclude_categories=()))
pieces = st.lists(
    st.sampled_from(['{"action": "', '"action":', "'action' :", '"}', "{", "}", '"', "\\", "\\u", "\\ud800", "[", ","])
    | st.sampled_from(["null", "1e999", "NaN", "12", "\n", " ", "+", "hit", '{"thoughts": "'])
    | st.text(max_size=3),
    max_size=40,
).map("".join)
actions = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).map(str.strip).filter(bool)
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(response=anything | pieces)
def test_parsing_is_total(fmt, response):
    parsed = fmt.parse(response)
    assert isinstance(parsed, ParsedAction)
    assert parsed.valid == bool(parsed.action)
    assert parsed.action == parsed.action.strip()
    parsed.action.encode("utf-8")


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(action=actions, first=words, second=words, thoughts=words)
def test_what_is_rendered_parses_back(fmt, action, first, second, thoughts):
    response = fmt.render(action, dict(zip(FIELDS, (first, second), strict=True)), thoughts)
    assert fmt.parse(response) == ParsedAction(action, True)


@given(action=actions, before=st.text("abc {}:,'\n"), after=st.text("abc }:,'\n"))
def test_json_is_found_inside_other_text(action, before, after):
    response = before + JSONFormat().render(action) + after
    assert parse_json_action(response) == ParsedAction(action, True)


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ('{"action": "+"}', "+"),
        ('  {"thoughts": "a", "action": " hit "}\n', "hit"),
        ('{"action": 10}', "10"),
        ('{"action": Infinity}', None),
        ('{"action": 1e999}', "1e999"),
        ('{"action": -0.50}', "-0.50"),
        ('{"action": "a"} then {"action": "b"}', "b"),
        ('{"action": "a", "more": {"action": "b"}}', "a"),
        ('{"more": {"action": "b"}}', "b"),
        ('{"action": "a"} {"thoughts": "no action here"}', "a"),
        ('{"action": "a", "action": "b"}', "b"),
        ('```json\n{\n  "action": "("\n}\n```', "("),
        ('{"action": "}"}', "}"),
        ('{"thoughts": "say \\"action\\": \\"x\\"", "action": "y"}', "y"),
        ('{"action": "caf\\u00e9"}', "café"),
        ('use { as a brace: {"action": "+"}', "+"),
        # not valid JSON: the text after the last "action":
        ('{"thoughts": "cut off", "action": "+', "+"),
        ('{"thoughts": "an unescaped " quote", "action": "-"}', "-"),
        ("{'action': 'hit'}", "hit"),
        ('"action": hit}', "hit"),
        ('"action": 7, "more": 1', "7"),
        ('"action" : "a\\"b"', 'a"b'),
        ('{"a": "x", "action": "stand",}', "stand"),
        # invalid
        ("", None),
        ("hit", None),
        ("{}", None),
        ('{"action": ""}', None),
        ('{"action": "   "}', None),
        ('{"action": null}', None),
        ('{"action": true}', None),
        ('{"action": ["+"]}', None),
        ('{"action": {"name": "+"}}', None),
        ('{"action": NaN}', None),
        ('"action": ', None),
        ('"action": null', None),
        ('"action": [', None),
        ('{"actions": "+"}', None),
        ('{"action": "\\ud800"}', None),
        ('[{"thoughts": 1}]', None),
    ],
)
def test_json_cases(response, action):
    assert parse_json_action(response) == (INVALID if action is None else ParsedAction(action, True))


@pytest.mark.parametrize(
    "response",
    [
        '{"a":' * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        "{" * 100_000 + "}" * 100_000,
        '{"action": ' + "1" * 200_000 + "}",
        '"action":' * 50_000,
        '"action"' + " " * 200_000,
        '"action": "' + "\\" * 200_001,
        '{"action": "' + "[" * 200_000,
    ],
)
def test_time_is_linear(response):
    start = time.perf_counter()
    parse_json_action(response)
    assert time.perf_counter() - start < 5


def test_plain():
    fmt = PlainFormat()
    assert fmt.render("hit") == "hit"
    assert fmt.parse(" hit\n") == ParsedAction("hit", True)
    assert fmt.parse(" \n") == INVALID
    assert fmt.parse("\ud800") == INVALID


def test_chain_of_thought_reads_before_it_acts():
    fmt = JSONCoTFormat(reading_fields=FIELDS)
    reading = {"target number": "4", "current number": "2"}
    assert fmt.render("+", reading, "2 is low") == (
        '{"current number": "2", "target number": "4", "thoughts": "2 is low", "action": "+"}'
    )
    with pytest.raises(ValueError, match="lacks \\['target number'\\]"):
        fmt.render("+", {"current number": "2"}, "")
    with pytest.raises(ValueError, match="belong to the format"):
        JSONCoTFormat(reading_fields=("action",))


def test_whether_it_reads_the_state_as_it_is():
    fmt = JSONCoTFormat(reading_fields=("cards", "formula"))
    state = {"cards": "[2, K]", "formula": '2 "+"'}
    right = fmt.render("+", state, "so")
    assert fmt.reads(right, state) is True and fmt.reads(right[: right.index('"thoughts"')], state) is True
    assert fmt.reads(fmt.render("+", {**state, "cards": "[2, Q]"}), state) is False
    assert fmt.reads('{"action": "+"}', state) is False
    assert fmt.reads(right, {"cards": "[2, K]"}) is None  # the environment does not tell
    assert JSONCoTFormat().reads(right, state) is None and PlainFormat().reads("+", state) is None
    assert CallableFormat(base=fmt).reads(right, state) is True
    assert CallableFormat(base=fmt, render_fn=lambda action, reading, thoughts: action).reads(right, state) is None


def test_prompt_without_history():
    messages, images = PlainFormat().build_prompt("Play.", {"image": IMAGE, "text": "You see a door."})
    parts = [{"type": "image"}, {"type": "text", "text": "Play.\nYou see a door."}]
    assert messages == [{"role": "user", "content": parts}]
    assert len(images) == 1 and images[0] is IMAGE


def test_prompt_with_history_keeps_the_last_turns_and_images_in_order():
    pictures = [np.full((2, 2, 3), k, dtype=np.uint8) for k in range(4)]
    past = [Exchange({"image": picture}, f"answer {k}") for k, picture in enumerate(pictures[:3])]
    fmt = JSONFormat(history=2, system_prompt="Be brief.")
    messages, images = fmt.build_prompt("Play.", {"image": pictures[3]}, past)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [int(image[0, 0, 0]) for image in images] == [1, 2, 3]
    assert messages[1]["content"][1]["text"] == 'Play.\nAnswer as JSON with the key "action".'
    assert messages[2]["content"] == [{"type": "text", "text": "answer 1"}]
    assert messages[-1]["content"] == [{"type": "image"}]
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    assert placeholders == len(images)


def test_text_only_prompt():
    messages, images = PlainFormat().build_prompt("", {"text": "look"})
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "look"}]}]
    assert images == []


@pytest.mark.parametrize(
    ("observation", "error", "words"),
    [
        (IMAGE, TypeError, "must be a mapping"),
        ({"image": IMAGE.astype(float)}, TypeError, r"uint8 of shape \[H, W, 3\], got float64"),
        ({"image": IMAGE[..., 0]}, TypeError, r"got uint8 of shape \[4, 6\]"),
        ({"text": b"left"}, TypeError, "observation\\['text'\\] must be a string, got bytes"),
        ({}, ValueError, "neither 'image' nor 'text'; its keys are \\[\\]"),
        ({"rgb": IMAGE}, ValueError, "neither 'image' nor 'text'; its keys are \\['rgb'\\]"),
        ({"image": None, "text": None}, ValueError, "neither 'image' nor 'text'"),
    ],
)
def test_bad_observations(observation, error, words):
    """A task's text does not make up for them: the agent would play blind."""
    with pytest.raises(error, match=words):
        PlainFormat().build_prompt("Play.", observation)


def test_an_observation_may_say_nothing():
    messages, _ = PlainFormat().build_prompt("Play.", {"text": ""})
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "Play."}]}]
    with pytest.raises(ValueError, match="Nothing to show the agent"):
        PlainFormat().build_prompt("", {"text": ""})


def test_make_format():
    assert make_format("plain", history=1) == PlainFormat(history=1)
    assert make_format("json") == JSONFormat()
    assert make_format("json_cot", reading_fields=list(FIELDS)) == JSONCoTFormat(reading_fields=FIELDS)
    with pytest.raises(ValueError, match="Unknown agent format 'xml'"):
        make_format("xml")
    with pytest.raises(ValueError, match="history must be >= 0"):
        make_format("plain", history=-1)
    for history in ("2", 1.5, None):
        with pytest.raises(TypeError, match="history must be a whole number of turns, got"):
            make_format("plain", history=history)


def test_default_format_follows_the_environment():
    class Env:
        reading_fields = FIELDS

        @property
        def unwrapped(self):
            return self

    assert default_format(Env()) == JSONCoTFormat(reading_fields=FIELDS)
    Env.reading_fields = ()
    assert default_format(Env()) == PlainFormat()


def test_callable_format():
    fmt = CallableFormat(
        prompt_fn=lambda task, observation, history: ([{"role": "user", "content": task}], []),
        parse_fn=lambda response: str(int(response)) if response != "none" else None,
        render_fn=lambda action, reading, thoughts: f"<{action}>",
    )
    assert isinstance(fmt, AgentFormat)
    assert fmt.build_prompt("t", {}) == ([{"role": "user", "content": "t"}], [])
    assert fmt.render("a") == "<a>"
    assert fmt.parse("07") == ParsedAction("7", True)
    assert fmt.parse("none") == INVALID
    with pytest.warns(UserWarning, match="parse function raised ValueError"):
        assert fmt.parse("seven") == INVALID
    fallback = CallableFormat(base=JSONFormat())
    assert fallback.parse('{"action": "a"}') == ParsedAction("a", True)
    assert fallback.render("a") == '{"action": "a"}'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CallableFormat(parse_fn=lambda r: ParsedAction(" a ", True)).parse("") == ParsedAction("a", True)
        assert CallableFormat(parse_fn=lambda r: ParsedAction("a", False)).parse("") == INVALID
        assert CallableFormat(parse_fn=lambda r: 3).parse("") == INVALID
        for wrong in (None, 5):
            assert CallableFormat(parse_fn=lambda r, wrong=wrong: ParsedAction(wrong, True)).parse("") == INVALID


def test_a_callable_format_shows_as_much_as_its_base():
    past = [Exchange({"text": str(k)}, f"answer {k}") for k in range(3)]
    plain = PlainFormat(history=2, system_prompt="Play.")
    expected = plain.build_prompt("task", {"text": "now"}, past)
    inherited = CallableFormat(base=plain)
    own = CallableFormat(history=2, system_prompt="Play.", parse_fn=str.upper)
    for fmt in (inherited, own):
        assert fmt.build_prompt("task", {"text": "now"}, past) == expected
        assert (fmt.history, fmt.system_prompt) == (2, "Play.")
    assert len(CallableFormat(history=1, base=plain).build_prompt("task", {"text": "now"}, past)[0]) == 4


# ---- another action ----


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (
            '{"current number": "2", "thoughts": "up", "action": "+"}',
            '{"current number": "2", "thoughts": "up", "action": "-"}',
        ),
        ('{"thoughts": "up", "action": "up and aw', '{"thoughts": "up", "action": "-"}'),
        ('{"thoughts": "up"}', '{"action": "-"}'),
        ('{"action": "+"} or {"action": "*"}', '{"action": "+"} or {"action": "-"}'),
        ("", '{"action": "-"}'),
    ],
)
def test_another_action_in_a_response(response, expected):
    """What stands before the action stays."""
    assert JSONCoTFormat().replace_action(response, "-") == JSONFormat().replace_action(response, "-") == expected


def test_where_the_action_begins():
    own = CallableFormat(parse_fn=lambda text: text, base=JSONFormat())
    for fmt in (JSONFormat(), JSONCoTFormat(), own):
        assert not fmt.reaches_action('{"thoughts": "an action: up", "action')
        assert fmt.reaches_action('{"thoughts": "up", "action": ')
        assert fmt.reaches_action('{"thoughts": "up", "action": "u')
    assert PlainFormat().reaches_action("") and CallableFormat().reaches_action("")


@given(st.text() | st.text(alphabet="{}\"':,\\action "), st.sampled_from(["+", "turn left", 'say "hi"', "9", "é"]))
def test_the_new_action_is_read_back(response, action):
    render = CallableFormat(parse_fn=lambda text: text[1:], render_fn=lambda action, reading, thoughts: "!" + action)
    for fmt in (PlainFormat(), JSONFormat(), JSONCoTFormat(), CallableFormat(base=JSONFormat()), render):
        assert fmt.parse(fmt.replace_action(response, action)) == ParsedAction(action, True)


# ---- formats of a user's own ----


@pytest.mark.parametrize("parsed", [None, "left", ("left", True), ParsedAction(3, True)])
def test_a_format_that_gives_something_else_than_an_action(parsed):
    class Own(AgentFormat):
        def parse(self, response):
            return parsed

    with pytest.raises(TypeError, match=r"method Own\.parse gave .* It must give a ParsedAction for any text"):
        action_of(Own(), "go")


def test_a_format_that_raises():
    class Own(AgentFormat):
        def parse(self, response):
            return ParsedAction(response.split(":")[1], True)

    assert action_of(Own(), "action:left") == ParsedAction("left", True)
    with pytest.raises(
        RuntimeError, match=r"Own\.parse raised IndexError: .*, given 'go'\. It must give a ParsedAction"
    ):
        action_of(Own(), "go")


@pytest.mark.parametrize("made", [[], [{"role": "user"}] * 2, ("Go", []), None, ([], [], [])])
def test_a_format_that_gives_no_messages_and_images(made):
    fmt = CallableFormat(prompt_fn=lambda task, observation, history: made)
    with pytest.raises(TypeError, match=r"method CallableFormat\.build_prompt gave .* It must give two lists"):
        prompt_of(fmt, "Play.", {})
