# SPDX-License-Identifier: Apache-2.0
"""MiniWoB++ in a real browser: actions, observations, scripts, crashes, and what a page cannot reach."""

import contextlib
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium.error import ResetNeeded

from vlmq_trl import PlainFormat, collect_demonstrations, embedded, play_episodes
from vlmq_trl.envs import make_demonstrator
from vlmq_trl.envs.miniwob import CHROMIUM_VARIABLE, DOMAIN, TASKS, find_chromium, page
from vlmq_trl.envs.miniwob.actions import ACTION_SPACES, SIGNATURES, ActionError, parse
from vlmq_trl.envs.miniwob.env import MiniWoB
from vlmq_trl.envs.miniwob.scripts import PLANS
from vlmq_trl.rollout import Response

ROOT = Path(__file__).parents[1]


def browsers():
    """Running processes below this one that belong to browsers."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() in ("node", "chromium", "chrome") and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def chromium():
    """The main process of the only running Chromium."""
    (main,) = [one for one in browsers() if one.name() != "node" and "--type=" not in " ".join(one.cmdline())]
    return main


@pytest.fixture(scope="module")
def play():
    """Environments by task, each started once and closed at the end; `play(task, seed)` resets it."""
    made = {}

    def play(task, seed=0, **kwargs):
        key = (task, *kwargs.items())
        if key not in made:
            for other in made.values():
                other.close()  # one browser at a time
            made.clear()
            made[key] = gymnasium.make(f"vlmq_trl/MiniWoB-{task}-v0", **kwargs).unwrapped
        made[key].reset(seed=seed)
        return made[key]

    yield play
    for env in made.values():
        env.close()
    assert browsers() == []


# Registration.


def test_every_task_of_browsergym_is_registered():
    from browsergym.miniwob import ALL_MINIWOB_TASKS

    assert sorted(TASKS) == sorted(task.subdomain for task in ALL_MINIWOB_TASKS)
    assert len(set(TASKS)) == len(TASKS) == len(DOMAIN.envs) == 125
    assert set(DOMAIN.envs) <= set(gymnasium.registry)
    assert set(PLANS) <= set(TASKS)


def test_importing_the_domain_imports_none_of_its_packages():
    code = (
        "import sys, vlmq_trl.envs, vlmq_trl.envs.miniwob.env, vlmq_trl.envs.miniwob.scripts; "
        "assert not {'browsergym', 'playwright', 'miniwob'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_chromium_is_searched_for(monkeypatch, tmp_path):
    monkeypatch.delenv(CHROMIUM_VARIABLE, raising=False)
    assert DOMAIN.missing() == "" and find_chromium()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_chromium() is None
    with pytest.raises(ImportError, match="apt-get install chromium"):
        MiniWoB("click-test")
    program = tmp_path / "google-chrome"
    program.write_text("")
    program.chmod(0o755)
    assert find_chromium() == str(program)
    monkeypatch.setenv(CHROMIUM_VARIABLE, "/no/such/program")
    with pytest.raises(ImportError, match=f"{CHROMIUM_VARIABLE} is '/no/such/program', which is not a program"):
        MiniWoB("click-test")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"task": "click-tset"}, "no task 'click-tset'"),
        ({"action_space": "html"}, "action_space must be one of bid, coord, both, not 'html'"),
        ({"text_budget": 99}, "text_budget and reading_budget must be at least 100"),
        ({"max_turns": 0}, "max_turns at least 1"),
        ({"delay": -1}, "delay at least 0"),
        ({"patience": 0}, "patience above 0"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of"),
    ],
)
def test_bad_settings(kwargs, text):
    with pytest.raises(ValueError, match=text):
        MiniWoB(**{"task": "click-test", **kwargs})


# Actions.


@pytest.mark.parametrize(
    ("action", "canonical"),
    [
        ("click('13')", "click('13')"),
        (' click( "13", ) \n', "click('13')"),
        ("click(bid='13')", "click('13')"),
        ("click('13', button='left', modifiers=[])", "click('13')"),
        ("click('a13', modifiers=['Shift'])", "click('a13', 'left', ['Shift'])"),
        ("fill('13', 'it\\'s')", "fill('13', \"it's\")"),
        ("fill('13', 'two\\nlines')", "fill('13', 'two\\nlines')"),
        ("fill('13', '#no comment')", "fill('13', '#no comment')"),
        ("fill('13', 'é😀')", "fill('13', 'é😀')"),
        ("fill('13', 'x', True)", "fill('13', 'x', True)"),
        ("select_option('13', ['a', 'b'])", "select_option('13', ['a', 'b'])"),
        ("press('13', 'Control+a')", "press('13', 'Control+a')"),
        ("scroll(0, -100.5)", "scroll(0, -100.5)"),
        ("mouse_click(12, y=3.5, button='right')", "mouse_click(12, 3.5, 'right')"),
        ("noop()", "noop()"),
        ("noop(wait_ms=0)", "noop(0)"),
    ],
)
def test_actions_and_their_canonical_spelling(action, canonical):
    assert str(parse(action)) == canonical
    assert parse(canonical) == parse(action)


REFUSED = [
    "",
    "13",
    "click",
    "click(13)",
    "click()",
    "click('13', '14', [], 1)",
    "click('13', colour='red')",
    "click('13', bid='13')",
    "click('13', button='any')",
    "click('13', modifiers='Shift')",
    "click('13'); click('14')",
    "click('13')\nclick('14')",
    "click('13') click('14')",
    "click('13'), click('14')",
    "click('13') # then\n",
    "(click('13'))",
    "[click('13')]",
    "click('13').x",
    "click(*['13'])",
    "click(**{'bid': '13'})",
    "click(f'{13}')",
    "click('1' + '3')",
    "click(str(13))",
    "click((lambda: '13')())",
    "click('__import__(\"os\")')",
    "click('13\\'); import os; (\\'')",
    "click('１３')",
    "click('-1')",
    "click('')",
    "fill('13', b'x')",
    "fill('13', None)",
    "fill('13', '\\ud800')",
    "fill('13', ['x'])",
    "fill('13', 'x', 1)",
    "press('13', '\\n')",
    "press('13', '')",
    "scroll(1e999, 0)",
    "scroll(True, 0)",
    "scroll(10**99, 0)",
    "scroll(1j, 0)",
    "mouse_click(99999, 1)",
    "noop(-1)",
    "noop(1e9)",
    "goto('file:///etc/passwd')",
    "new_tab()",
    "go_back()",
    "tab_close()",
    "upload_file('13', '/etc/passwd')",
    "mouse_upload_file(1, 1, '/etc/passwd')",
    "send_msg_to_user('hello')",
    "report_infeasible('no')",
    "page.goto('http://localhost')",
    "__import__('os').system('true')",
    "eval('1')",
    "print(1)",
    "x = click('13')",
    "(x := click('13'))",
    "await click('13')",
    "click('13') if 1 else 2",
    "not click('13')",
    "\x00click('13')",
    "click('13')\x00",
    "click('" + "1" * 600 + "')",
    "(" * 300 + ")" * 300,
    "-" * 511,
    "click(" + "[" * 200 + "]" * 200 + ")",
    "\ud800",
]


@pytest.mark.parametrize("action", REFUSED, ids=range(len(REFUSED)))
def test_all_else_is_refused(action):
    with pytest.raises(ActionError):
        parse(action)


def test_the_action_spaces_are_kept_apart():
    assert {name for space in ("bid", "coord") for name in ACTION_SPACES[space]} == set(ACTION_SPACES["both"])
    assert set(ACTION_SPACES["bid"]) & set(ACTION_SPACES["coord"]) == {"noop"}
    with pytest.raises(ActionError, match="no action 'mouse_click'; there are click"):
        parse("mouse_click(1, 2)", ACTION_SPACES["bid"])
    with pytest.raises(ActionError, match="no action 'click'"):
        parse("click('13')", ACTION_SPACES["coord"])


def test_the_functions_are_browsergyms():
    import inspect

    from browsergym.core.action import functions

    for name, parameters in SIGNATURES.items():
        theirs = inspect.signature(getattr(functions, name)).parameters.values()
        assert [parameter.name for parameter in theirs] == [parameter.name for parameter in parameters]


PIECES = [
    *SIGNATURES, "click('13')", "noop()", "scroll(1, 2)", "fill('14', '", "goto('http://localhost/')",
    "__import__('os')", "page.", "eval(", "(", ")", "[", "]", "{", "}", "'", '"', ",", "=", "*", "**", ":", ";", "\n",
    "\t", " ", "#", "\\", "13", "'13'", "1e9", "lambda", "f'", "b'", "None", "True", "\x00", "é", "１", "😀", "\ud800",
    "...", "@", ":=",
]  # fmt: skip


def strings(count, seed=0):
    """Random strings out of pieces of actions and of what might be dangerous."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield "".join(PIECES[index] for index in rng.integers(len(PIECES), size=rng.integers(0, 9)))


def test_ten_thousand_strings_are_one_plain_call_or_refused():
    taken = 0
    for text in strings(10_000):
        try:
            call = parse(text)
        except ActionError as error:
            assert str(error)
            continue
        taken += 1
        assert call.name in SIGNATURES and parse(str(call)) == call
        for value in call.arguments:
            assert isinstance(value, (str, int, float, bool, tuple))
    assert taken > 20


# What is seen.


def test_the_observation(play):
    env = play("click-button")
    observation, info = env.reset(seed=4)
    assert observation in env.observation_space and info == {}
    assert observation["image"].shape == (321, 498, 3) and len(np.unique(observation["image"])) > 20
    assert observation["text"].startswith("Goal: Click on the ")
    assert env.goal in observation["text"]
    assert all(f"[{one.bid}] {one.role} " in observation["text"] for one in env.elements if one.usable)
    assert "file:" not in observation["text"]
    reading = env.state_text()
    assert tuple(reading) == env.reading_fields == ("goal", "elements")
    for element in env.elements:
        assert (str(element) in reading["elements"]) == element.usable
    assert 0 < len(env.task) < 300


def test_options_of_the_observation():
    assert set(MiniWoB("click-test", image=False).observation_space) == {"text"}
    env = MiniWoB("click-button", tree=False, marks=True)
    try:
        observation, _ = env.reset(seed=4)
        assert observation["text"] == f"Goal: {env.goal}"
        plain = env.seen["screenshot"]
        changed = (observation["image"] != plain).any(axis=2)
        assert changed.any()
        near = np.zeros_like(changed)
        for element in env.elements:
            if element.usable and element.visible:
                left, top, width, height = map(int, element.box)
                near[max(0, top - 25) : top + height + 4, max(0, left - 4) : left + max(width, 40) + 4] = True
                assert changed[max(0, top - 25) : top + height + 4, left : left + width].any(), element
        assert not (changed & ~near).any()
    finally:
        env.close()


def test_a_failed_action_is_told_in_one_line(play):
    env = play("login-user")
    _, password, button = (one.bid for one in env.elements if one.usable)
    observation, reward, terminated, truncated, info = env.step(f"fill('{button}', 'x')")
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"valid": True, "action": f"fill('{button}', 'x')"}
    assert observation["text"].splitlines()[-1].startswith("The last action failed: Error: ")
    assert "not an <input>" in observation["text"]
    observation, reward, _, _, info = env.step("click('9999')")
    assert (reward, info["valid"]) == (-0.05, False)
    assert observation["text"].endswith("The last action failed: not an action: no element has the number 9999")
    observation, _, _, _, info = env.step(f"fill('{password}', 'x')")
    assert info["valid"] and "failed" not in observation["text"] and "•" in observation["text"]


def test_an_invalid_action_does_not_touch_the_page(play):
    env = play("click-test-2")
    before = env._observation()
    after, reward, terminated, truncated, info = env.step("goto('http://localhost/')")
    assert (reward, terminated, truncated, info) == (-0.05, False, False, {"valid": False, "action": ""})
    np.testing.assert_array_equal(before["image"], after["image"])
    assert after["text"].startswith(before["text"]) and "no action 'goto'" in after["text"]


def test_a_covered_element_is_waited_for(play):
    env = play("click-test-2", patience=1.5)
    cover = "() => document.body.insertAdjacentHTML('beforeend', '<p id=cover style=position:fixed;inset:0>')"
    env.browser.env.page.evaluate(cover)
    observation, reward, *_ = env.step("click('13')")
    assert reward == 0.0 and "intercepts pointer events" in observation["text"].splitlines()[-1]
    env.browser.env.page.evaluate("() => { setTimeout(() => document.getElementById('cover').remove(), 800); }")
    assert env.step("click('13')")[1:3] == (1.0, True)


def test_an_element_that_is_not_drawn_fails_at_once(play):
    env = play("choose-list")
    option = next(one for one in env.elements if one.role == "option")
    observation, reward, _, _, info = env.step(f"click('{option.bid}')")
    assert (reward, info["valid"]) == (0.0, True)
    assert observation["text"].endswith(f"The last action failed: element {option.bid} is not drawn")


def element(bid, role="button", visible=True, usable=True, **kwargs):
    rest = {"name": "ok", "value": "", "states": frozenset(), "parent": "", "box": (0.0, 0.0, 9.0, 9.0), **kwargs}
    return page.Element(bid=bid, role=role, visible=visible, usable=usable, **rest)


def tree(*rows):
    """An observation with one node a row: (bid or None, role, name)."""
    nodes = [{"nodeId": "0", "role": {"value": "RootWebArea"}, "name": {"value": "page"}}]
    nodes[0]["childIds"] = [str(index + 1) for index in range(len(rows))]
    for index, (bid, role, name) in enumerate(rows):
        node = {"nodeId": str(index + 1), "role": {"value": role}, "name": {"value": name}, "childIds": []}
        nodes.append(node if bid is None else {**node, "browsergym_id": bid})
    return {"axtree_object": {"nodes": nodes}}


def test_a_long_tree_keeps_what_matters_and_says_what_it_lost():
    rows = [(None, "StaticText", f"text number {index}") for index in range(40)]
    rows[10] = ("5", "button", "far below")
    rows[20] = ("6", "heading", "in view")
    rows[30] = ("7", "button", "use me")
    shown = [
        element("5", visible=False, usable=False),
        element("6", "heading", usable=False),
        element("7"),
    ]
    whole = page.tree_text(tree(*rows), shown, 5000)
    assert len(whole.splitlines()) == 40 and "[5] button 'far below', out of view" in whole
    for budget in (100, 150, 300, 700):
        text = page.tree_text(tree(*rows), shown, budget)
        lines = text.splitlines()
        assert len(text) <= budget
        assert "[7] button 'use me'" in lines and "[6] heading 'in view'" in lines
        assert "far below" not in text
        assert lines[-1] == f"({40 - len(lines) + 1} of 40 lines left out)"
        assert lines[:-1] == [line for line in whole.splitlines() if line in lines]  # still in order


def test_a_long_line_loses_its_middle():
    text = page.tree_text(tree((None, "StaticText", "begin " + "x" * 900 + " end")), [], 200)
    assert len(text) <= 100 and text.startswith("StaticText 'begin") and "..." in text and text.endswith(" end'")


def test_complaints_become_one_line():
    log = "TimeoutError: Timeout 500ms exceeded.\nCall log:\n  - waiting\n  -   <p>x</p> intercepts pointer events\n"
    assert page.one_line(log) == "TimeoutError: Timeout 500ms exceeded. (<p>x</p> intercepts pointer events)"
    assert page.one_line("ValueError: no") == "ValueError: no" and page.one_line("") == ""


def test_readings_keep_to_their_budget(play):
    env = play("social-media", reading_budget=100)
    said = env.state_text()["elements"]
    usable = sum(one.usable for one in env.elements)
    assert len(said) <= 100 and usable > 5
    assert said.endswith(f"; {usable - said.count('; ')} more")


# Rules.


def test_equal_seeds_give_equal_starts(play):
    env = play("click-checkboxes")
    starts = []
    for seed in (1, None, 1, None):  # one without a seed follows from the last seed
        observation, _ = env.reset(seed=seed)
        starts.append((env.goal, observation["text"], observation["image"].tobytes()))
    assert starts[:2] == starts[2:] and starts[0] != starts[1]


def test_there_is_no_time_limit_and_no_decay(play):
    env = play("click-test")
    assert env.browser.env.page.evaluate("core.EPISODE_MAX_TIME") == 2**31 - 1
    assert env.browser.env.page.evaluate("core.EP_TIMER !== null")
    env.browser.env.page.evaluate("core.ept0 -= 2**30")  # it began twelve days ago
    assert env.step(env.script.expert())[1:4] == (1.0, True, False)
    with pytest.raises(ResetNeeded):
        env.step("noop(0)")


def test_turns_are_limited_and_penalties_cannot_outweigh_success(play):
    env = play("click-test")
    outcomes = [env.step("no")[1:4] for _ in range(10)]
    assert outcomes == [(-0.05, False, False)] * 9 + [(-0.05, False, True)]
    env.reset(seed=0)
    total = sum(env.step("no")[1] for _ in range(9)) + env.step(env.script.expert())[1]
    assert total == pytest.approx(0.55)


def test_coordinates_are_pixels_of_the_picture(play):
    env = play("click-test-2", action_space="coord")
    box = next(one.box for one in env.elements if one.name == "ONE")
    assert env.parse_env("click('13')") is None
    action = f"mouse_click({round(box[0] + box[2] / 2)}, {round(box[1] + box[3] / 2)})"
    assert env.step(action)[1:4] == (1.0, True, False)


# What a page reaches.


@contextlib.contextmanager
def server():
    """A local web server; yields its address and the list of the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            """Silence."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"127.0.0.1:{web.server_port}", asked
        web.shutdown()
        thread.join()


def test_a_page_that_tries_reaches_nothing_outside(play, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    env = play("click-test")
    tries = """async ([address, file]) => {
        const said = [];
        for (const url of [`http://${address}/fetch`, `https://${address}/tls`, file])
            await fetch(url).then(() => said.push(url), () => null);
        await new Promise(done => {
            const image = new Image(); image.onload = image.onerror = done; image.src = `http://${address}/image`;
        });
        await new Promise(done => {
            const frame = document.createElement('iframe'); frame.onload = frame.onerror = done;
            frame.src = `http://${address}/frame`; document.body.append(frame);
        });
        await new Promise(done => {
            const socket = new WebSocket(`ws://${address}/socket`); socket.onopen = () => said.push('socket');
            socket.onclose = socket.onerror = done;
        });
        navigator.sendBeacon(`http://${address}/beacon`);
        return said;
    }"""
    with server() as (address, asked):
        subprocess.run(  # the server works
            [sys.executable, "-c", f"import urllib.request as u; u.urlopen('http://{address}/works')"], check=True
        )
        secret = (tmp_path / "secret.txt").as_uri()
        assert env.browser.env.page.evaluate(tries, [address, secret]) == []
        link = "([url]) => { const b = document.querySelector('button'); b.outerHTML = `<a href='${url}'>go</a>`; }"
        for url in (f"http://{address}/link", secret):
            env.reset(seed=0)
            env.browser.env.page.evaluate(link, [url])
            env.step("noop(0)")
            (go,) = [one for one in env.elements if one.name == "go"]
            observation, reward, terminated, _, _ = env.step(f"click('{go.bid}')")
            assert (reward, terminated) == (0.0, True)
            assert "secret" not in observation["text"].partition("\n")[2].replace("secret.txt", "")
        assert asked == ["/works"]


# Scripts.


@pytest.mark.parametrize("task", ["click-checkboxes", "enter-password", "enter-time", "choose-list"])
def test_scripts(play, task):
    """The expert succeeds, sure mistakes never do, and what is said does not depend on who plays."""
    env_id = f"vlmq_trl/MiniWoB-{task}-v0"
    players = {policy: make_demonstrator(env_id, policy) for policy in ("expert", "flawed:1", "random")}
    for policy in ("expert", "flawed:1"):
        env, rng, total, done = play(task, 1, max_turns=5), np.random.default_rng(0), 0.0, False
        while not done:
            decisions = {name: player(env, rng) for name, player in players.items()}
            assert len({(str(one.reading), one.thoughts) for one in decisions.values()}) == 1
            assert decisions["expert"].reading == env.state_text()
            assert decisions["expert"].action != decisions["flawed:1"].action
            _, reward, terminated, truncated, info = env.step(decisions[policy].action)
            assert info == {"valid": True, "action": decisions[policy].action} and env.error == ""
            total, done = total + reward, terminated or truncated
        assert total == (1.0 if policy == "expert" else 0.0)


def test_a_task_without_a_script_plays_at_random_only(play):
    env = play("click-shape")
    assert "click-shape" not in PLANS
    for ask in (env.script.expert, env.script.mistake, env.script.unmistaken):
        with pytest.raises(NotImplementedError, match="no script plays click-shape, only random play"):
            ask()
    assert env.parse_env(env.script.random(np.random.default_rng(0))) is not None


def test_scripts_need_elements():
    env = MiniWoB("click-test", action_space="coord")
    env.elements = [element("13")]
    with pytest.raises(NotImplementedError, match="action_space='bid' or 'both'"):
        env.script.expert()
    drawn = {env.script.random(np.random.default_rng(seed)).partition("(")[0] for seed in range(40)}
    assert drawn == {"mouse_click", "keyboard_type"}
    assert all(env.parse_env(env.script.random(np.random.default_rng(seed))) for seed in range(40))


def test_demonstrations_are_collected():
    before = browsers()
    data = collect_demonstrations(
        "vlmq_trl/MiniWoB-click-test-v0", policy="expert", episodes=2, num_envs=1, progress=False
    )
    assert len(data) == 2 and browsers() == before


def test_reading_lessons_end_with_random_play(play, monkeypatch):
    """What they show is expert and flawed play."""
    players = []

    def make(env_id, policy):
        players.append(policy)
        return make_demonstrator(env_id, policy)

    monkeypatch.setattr(embedded, "make_demonstrator", make)
    play("click-test-2").close()  # one browser at a time
    rows = embedded._states("vlmq_trl/MiniWoB-click-option-v0", 24, seed=0)
    commands = [parse(row["command"]) for row in rows]
    assert len(set(commands)) > 4 and {command.name for command in commands} == {"click"}
    for row, command in zip(rows, commands, strict=True):
        assert all(f"[{bid}]" in row["prompt"] for bid in command.bids)
        assert row["reading"].endswith('"action": "')
    assert players == ["expert", "flawed"]


# Processes.


def test_a_killed_browser_is_said_and_replaced(play):
    env = play("click-test-2")
    chromium().send_signal(signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"MiniWoB: the browser died on click\('13'\): .*reset\(\) starts another"):
        env.step("click('13')")
    with pytest.raises(ResetNeeded):
        env.step("click('13')")
    env.reset(seed=0)
    assert env.step(env.script.expert())[1:3] == (1.0, True)
    chromium().send_signal(signal.SIGKILL)  # between two episodes
    env.reset(seed=0)
    for renderer in browsers():
        if "--type=renderer" in " ".join(renderer.cmdline()):
            renderer.send_signal(signal.SIGKILL)  # the page's process alone
    with pytest.raises(RuntimeError, match="the browser died"):
        env.step("click('13')")
    env.reset(seed=0)
    assert env.step(env.script.expert())[1:3] == (1.0, True)


def test_a_page_that_loads_slowly_is_waited_for(play):
    env = play("click-test")
    main = chromium()
    main.suspend()
    threading.Timer(8, main.resume).start()  # BrowserGym would have waited for five seconds
    env.reset(seed=1)
    assert chromium().pid == main.pid


def test_the_popups_of_the_address_bar_are_not_loaded(play):
    """Each would be a page of its own in each new window, which takes the processor's time."""
    session = play("click-test-2").browser._process.new_browser_cdp_session()
    shown = [target["url"] for target in session.send("Target.getTargets")["targetInfos"]]
    assert any(url.endswith("/click-test-2.html") for url in shown) and not any("omnibox" in url for url in shown)


def test_features_that_playwright_disables_stay_disabled():
    """Chromium heeds the last such flag alone, which is this package's."""
    import playwright

    from vlmq_trl.envs.miniwob.browser import DISABLED_FEATURES

    switches = Path(playwright.__file__).parent / "driver/package/lib/server/chromium/chromiumSwitches.js"
    (own,) = re.findall(r"--disable-features=([\w,]+)", switches.read_text())
    assert set(own.split(",")) < set(DISABLED_FEATURES)


def test_a_killed_driver_is_replaced(play):
    env = play("click-test-2")
    (profile,) = [part for part in chromium().cmdline() if part.startswith("--user-data-dir=")]
    profile = Path(profile.removeprefix("--user-data-dir="))
    assert profile.exists() and profile.parent.name.startswith("vlmq_")
    (driver,) = [one for one in browsers() if one.name() == "node"]
    driver.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # a driver that dies within a call takes the call along
    with pytest.raises(RuntimeError, match="it does not run any more"):
        env.step("click('13')")
    assert not profile.parent.exists()
    env.reset(seed=0)
    assert env.step(env.script.expert())[1:3] == (1.0, True)


def test_close_leaves_nothing_and_reset_starts_anew(play):
    env = play("click-test-2")
    other = MiniWoB("click-test")
    other.reset(seed=0)
    other.close()
    assert env.step("hover('13')")[1:4] == (0.0, False, False)  # the driver was not the other's alone
    env.close()
    env.close()
    assert browsers() == []
    env.reset(seed=0)
    assert env.step(env.script.expert())[1:3] == (1.0, True)


class Same:
    """A policy that gives the same answer always."""

    def __init__(self, answer):
        self.answer = answer

    def act(self, requests):
        return [Response(self.answer) for _ in requests]


def test_in_processes_of_their_own():
    before = browsers()
    episodes = list(
        play_episodes(
            "vlmq_trl/MiniWoB-click-test-v0",
            Same("click('13')"),
            episodes=3,
            num_envs=1,
            workers=True,
            env_timeout=60,
            agent_format=PlainFormat(),
        )
    )
    assert [(one.return_, one.terminated, len(one.turns)) for one in episodes] == [(1.0, True, 1)] * 3
    assert browsers() == before


def test_one_thread_and_no_event_loop():
    code = """
import asyncio, threading
from vlmq_trl.envs.miniwob.env import MiniWoB
env = MiniWoB("click-test")
def refused(text):
    try:
        env.reset(seed=0)
    except RuntimeError as error:
        assert text in str(error) and "workers=True" in str(error), error
        print("refused")
async def inside():
    refused("running event loop")
asyncio.run(inside())
env.reset(seed=0)
thread = threading.Thread(target=refused, args=("one thread",))
thread.start(); thread.join()
env.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("refused\nrefused\n", "")


def test_chromium_dies_with_its_process():
    code = """
import time
from vlmq_trl.envs.miniwob.env import MiniWoB
env = MiniWoB("click-test")
env.reset(seed=0)
print("ready", flush=True)
time.sleep(600)
"""
    before = browsers()
    folder = tempfile.mkdtemp()  # `tmp_path` is too long for Chromium's socket
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": folder},
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            below = [one for one in browsers() if one not in before]
            assert len(below) > 2
        finally:
            process.kill()
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
    shutil.rmtree(folder)


# Slow: all scripts, all tasks, and many crashes.


@pytest.mark.slow
@pytest.mark.parametrize("task", PLANS)
def test_experts_succeed(play, task):
    seeds = range(int(os.environ.get("MINIWOB_EPISODES", "50")))
    won, lost = 0, []
    for seed in seeds:
        env, done = play(task, seed), False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.script.expert())
            done = terminated or truncated
        won += reward > 0
        if reward <= 0:
            lost.append(seed)
    print(f"{task}: {won} of {len(seeds)}, lost seeds {lost}")
    assert won >= 0.95 * len(seeds), lost


@pytest.mark.slow
@pytest.mark.parametrize("task", PLANS)
def test_sure_mistakes_never_succeed(play, task):
    for seed in range(3):
        env, done = play(task, seed), False
        while not done:
            right, wrong = env.script.unmistaken(), env.script.mistake()
            assert right != wrong and env.parse_env(right)
            _, reward, terminated, truncated, info = env.step(wrong)
            assert reward == 0.0 and info["valid"]
            done = terminated or truncated


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_starts_and_plays_at_random(play, task):
    env, rng = play(task, 1, marks=True), np.random.default_rng(0)
    assert env.goal and env._observation() in env.observation_space
    for _ in range(2):
        observation, reward, terminated, truncated, info = env.step(env.script.random(rng))
        assert observation in env.observation_space and info["valid"] and reward in (0.0, 1.0)
        if terminated or truncated:
            break


@pytest.mark.slow
def test_hundreds_of_strings_in_the_browser(play):
    env = play("login-user", max_turns=10_000)
    url = env.browser.env.page.url
    numbers = [f"'{one.bid}'" for one in env.elements]
    rng = np.random.default_rng(1)
    valid = 0
    for text in strings(400, seed=2):
        if rng.random() < 0.5:  # most strings are refused; half of these are calls
            name = str(rng.choice(["click", "fill", "press", "select_option", "hover", "focus", "clear", "scroll"]))
            values = [rng.choice(numbers), rng.choice(["'x'", "'\\x00'", "'Escape'", "'Control+w'", "'Alt+F4'", "7"])]
            text = f"{name}({', '.join(values[: int(rng.integers(1, 3))])})"
        known = env.parse_env(text) is not None
        observation, _, terminated, truncated, info = env.step(text)
        assert observation in env.observation_space and info["valid"] == known
        valid += info["valid"]
        assert terminated or env.browser.env.page.url == url
        if terminated or truncated:
            env.reset(seed=valid)
            numbers = [f"'{one.bid}'" for one in env.elements]
    assert valid > 50


@pytest.mark.slow
def test_hundreds_of_episodes_with_browsers_killed():
    """Every episode ends with its result or says that its browser died, and memory stays."""
    env, rng = MiniWoB("click-test"), np.random.default_rng(0)
    episodes = int(os.environ.get("MINIWOB_KILLED_EPISODES", "200"))
    results, memory, due = [], {}, -1
    try:
        for seed in range(episodes):
            env.reset(seed=seed)
            if seed % 20 == 0:
                due = seed + int(rng.integers(20))
            if seed % 100 == 50:
                memory[seed] = psutil.Process().memory_info().rss / 1e6
            if seed == due:
                chromium().send_signal(signal.SIGKILL)
            try:
                results.append(env.step(env.script.expert())[1])
            except RuntimeError as error:
                assert "the browser died" in str(error)
                results.append(None)
    finally:
        env.close()
    print(f"{results.count(1.0)} won, {results.count(None)} told as lost; MB {memory}")
    lost = episodes // 20
    assert (len(results), results.count(1.0), results.count(None)) == (episodes, episodes - lost, lost)
    assert max(memory.values()) < memory[50] + 100
    assert browsers() == []
