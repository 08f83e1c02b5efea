# SPDX-License-Identifier: Apache-2.0
"""The two commands that show things: the list of environments, and episodes to look at."""

import json
import subprocess
import sys
from functools import partial

import gymnasium
import pytest

from tests import tiny_models
from vlmq_trl import envs
from vlmq_trl.envs import DOMAINS, Domain, EnvEntry
from vlmq_trl.envs import __main__ as listing
from vlmq_trl.envs.gym_cards import EZPoints
from vlmq_trl.rollout import Response
from vlmq_trl.show import main, show_episodes

# ---- python -m vlmq_trl.envs ----


def test_the_summary_names_every_domain_and_what_it_needs(capsys):
    listing.main([])
    text = capsys.readouterr().out
    for domain in DOMAINS:
        assert f" {domain.name}: {domain.summary}" in text
        assert (domain.missing() or "needs: ") in text
        if domain.extra:
            assert f'pip install "vlmq_trl[{domain.extra}]"' in text
    assert "✓ Gym Cards" in text and "vlmq_trl/Blackjack-v0" in text and "python -m vlmq_trl.show" in text


def test_words_list_every_id_that_contains_one(capsys):
    listing.main(["points"])
    assert capsys.readouterr().out.split() == ["Gym", "Cards", "vlmq_trl/EZPoints-v0", "vlmq_trl/Points24-v0"]
    listing.main(["GYM CARDS"])
    assert len(capsys.readouterr().out.splitlines()) == 5
    listing.main(["chess", "go!"])
    assert capsys.readouterr().out == "No environment has 'chess' or 'go!' in its name.\n"


def test_a_domain_that_is_not_installed(capsys, monkeypatch):
    chess = Domain(
        "Chess", "kings and queens", {"chess/A-v0": EnvEntry("chess:A")}, "chess", ("no_such_module.inside", "numpy")
    )
    monkeypatch.setattr(listing, "DOMAINS", (chess,))
    listing.main([])
    line = 'no_such_module.inside not installed: pip install "vlmq_trl[chess]"'
    assert f"✗ Chess: kings and queens\n  missing here: {line}" in capsys.readouterr().out
    with pytest.raises(ImportError, match=r"Chess environments cannot run here\. no_such_module"):
        chess.require()
    here = Domain("Chess", "", {}, "chess", ("numpy",), also_missing=lambda: "no board: buy one")
    assert here.missing() == "no board: buy one"


def test_every_id_is_registered():
    ids = [env_id for domain in DOMAINS for env_id in domain.envs]
    assert len(ids) == len(set(ids))
    assert set(ids) <= set(gymnasium.registry)
    envs.register_envs()


def test_the_list_imports_no_domains_packages():
    """It says what is missing; and a process that plays one domain does not pay for the others."""
    code = (
        "import sys\nfrom vlmq_trl.envs.__main__ import main\nmain([])\n"
        "heavy = {'minigrid', 'browsergym.core', 'playwright', 'alfworld', 'textworld', 'openenv', 'minari'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


# ---- python -m vlmq_trl.show ----


def rows(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_a_demonstrators_episodes(tmp_path, capsys):
    command = ["vlmq_trl/EZPoints-v0", "--policy", "expert", "--episodes", "2", "--seed", "5"]
    main([*command, "--output", str(tmp_path), "--option", "invalid_penalty=0.5", "--option", "on_invalid=terminate"])
    text = capsys.readouterr().out
    assert "vlmq_trl/EZPoints-v0/5: return +10, 4 turns, terminated" in text and str(tmp_path) in text
    names = sorted(file.name for file in tmp_path.iterdir())
    stems = ["000-vlmq_trl_EZPoints-v0_5", "001-vlmq_trl_EZPoints-v0_6"]
    assert names == [*(f"{stem}.{kind}" for stem in stems for kind in ("gif", "html")), "episodes.jsonl"]
    assert json.loads(rows(tmp_path)[0]["response"])["cards"] == "[10, 2]"


def test_a_saved_model_answers_in_its_own_format(tmp_path):
    """That of its card, which need not be the environment's; unless another is asked for."""
    for part in tiny_models.build("idefics3", 0):
        part.save_pretrained(tmp_path / "model")
    card = {"env_id": None, "agent_format": {"name": "plain"}, "max_completion_length": 3}
    (tmp_path / "model" / "agent.json").write_text(json.dumps(card))
    command = ["vlmq_trl/NumberLine-v0", "--model", str(tmp_path / "model"), "--max_turns", "1"]
    for options, asks in ([], False), (["--agent_format", "json"], True):
        main([*command, *options, "--output", str(tmp_path / f"out{asks}")])
        assert ('the key "action"' in rows(tmp_path / f"out{asks}")[0]["prompt"]) == asks


def test_a_saved_models_episodes(tmp_path):
    model, processor = tiny_models.build("idefics3", 0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["vlmq_trl/NumberLine-v0", "--model", str(tmp_path / "model"), "--max_completion_length", "4"]
    main([*command, "--agent_format", "json", "--max_turns", "2", "--output", str(tmp_path / "out")])
    assert len(rows(tmp_path / "out")) == 2
    assert 'the key "action"' in rows(tmp_path / "out")[0]["prompt"]


def test_a_policy_on_a_function(tmp_path):
    class Equals:
        def act(self, requests):
            return [Response('{"action": "="}') for _ in requests]

    (played,) = show_episodes(partial(EZPoints, invalid_penalty=0.0), Equals(), tmp_path)
    assert played.return_ == -1 and len(rows(tmp_path)) == 1
    (played,) = show_episodes(EZPoints, "expert", tmp_path)
    assert played.return_ == 10


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["vlmq_trl/Chess-v0"], "not registered"),
        (["vlmq_trl/EZPoints-v0", "--policy", "epert"], "'epert' is not known"),
        (["vlmq_trl/EZPoints-v0", "--option", "x"], "of the form key=value, not 'x'"),
        (["vlmq_trl/EZPoints-v0", "--option", "no_such=1"], "no_such"),
        (["vlmq_trl/MiniWoB-bisect-angle-v0"], "no script plays bisect-angle, only random play"),
        (["vlmq_trl/EZPoints-v0", "--episodes", "0"], "episodes must be at least 1"),
        (["vlmq_trl/EZPoints-v0", "--policy", "expert", "--model", "m"], "not allowed with"),
        (["vlmq_trl/EZPoints-v0", "--temperature", "0.5"], "--temperature is a model's, and no --model is given"),
    ],
)
def test_bad_arguments_end_with_a_line(tmp_path, capsys, arguments, text):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--output", str(tmp_path)])
    said = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert text in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["file", "file/inside/it", "closed/folder"])
def test_an_output_that_can_be_no_folder_is_refused_first(tmp_path, capsys, monkeypatch, output):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "closed").mkdir()
    # Root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "closed")
    with pytest.raises(SystemExit) as stopped:
        main(["vlmq_trl/EZPoints-v0", "--model", "no/such_model", "--output", str(tmp_path / output)])
    culprit = output.partition("/")[0]
    assert isinstance(stopped.value.code, str) and "name another folder" in stopped.value.code
    assert str(tmp_path / culprit) in stopped.value.code and "\n" not in stopped.value.code
    assert capsys.readouterr().out == "" and (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_fills_up_ends_the_play_with_an_error(tmp_path, capsys, disk_full_at):
    disk_full_at("001")
    with pytest.warns(UserWarning, match="no longer recorded"), pytest.raises(SystemExit) as stopped:
        main(["vlmq_trl/EZPoints-v0", "--episodes", "3", "--output", str(tmp_path)])
    assert f"only 1 of 3 episodes were written to {tmp_path}: [Errno 28] No space" in stopped.value.code
    assert capsys.readouterr().out == "" and len(list(tmp_path.glob("*.gif"))) == 1


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "vlmq_trl.show", "vlmq_trl/Blackjack-v0", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "vlmq_trl/Blackjack-v0/0: return" in run.stdout and (tmp_path / "episodes.jsonl").is_file()
