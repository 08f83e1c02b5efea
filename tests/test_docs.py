# SPDX-License-Identifier: Apache-2.0
"""The documentation against the code: links, names, defaults, and the README's script, which is run."""

import dataclasses
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gymnasium.utils.env_checker import check_env
from trl import SFTConfig

import vlmq_trl
from tests import tiny_models
from vlmq_trl import VLMQConfig
from vlmq_trl.agent_format import ParsedAction

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        # The benchmark draws this one.
        assert linked.exists() or linked.name == "learning_curves.png", f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "index.md")


def test_the_algorithm_page_names_functions_that_exist():
    text = (ROOT / "docs" / "algorithm.md").read_text()
    modules = "losses|critic|collator|modeling|objective|vlmq_trainer"
    named = set(re.findall(rf"\b((?:{modules})\.[A-Za-z_]\w*(?:\.\w+)?)", text)) - {"losses.py"}
    assert len(named) > 15
    for name in named:
        module, *attributes = name.split(".")
        found = importlib.import_module(f"vlmq_trl.{module}")
        for attribute in attributes:
            found = getattr(found, attribute)
    from vlmq_trl import losses

    public = {
        name for name, f in vars(losses).items() if callable(f) and getattr(f, "__module__", "") == losses.__name__
    }
    assert {f"losses.{name}" for name in public} <= named


def test_the_api_page_has_every_name_and_every_default():
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in vlmq_trl.__all__ if not re.search(rf"`{name}\b", text)]
    assert missing == []
    inherited = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE))
    own = {f.name: f.default for f in dataclasses.fields(VLMQConfig) if f.name not in inherited}
    assert {name: str(default) for name, default in own.items()} == {k: v.strip('"') for k, v in rows.items()}
    changed = {
        f.name for f in dataclasses.fields(VLMQConfig) if f.name in inherited and f.default != inherited[f.name]
    }
    assert changed <= {"max_length", "metric_for_best_model"}


def test_the_own_environment_of_the_page_plays(tmp_path):
    """As it stands: Gymnasium's checker is content, both formats play it, and a model's play is a dataset."""
    first, second = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "environments.md").read_text().partition("## Your own")[2], re.DOTALL
    )
    (tmp_path / "page.py").write_text(first + second.replace("episodes=1000", "episodes=3").replace("=64)", "=2)"))
    model, processor = tiny_models.build("idefics3")
    page = SimpleNamespace(**runpy.run_path(str(tmp_path / "page.py"), {"model": model, "processor": processor}))
    check_env(page.Light(), skip_render_check=True)
    own = page.CallableFormat(parse_fn=page.answer)
    assert own.parse("It is green. Answer: Go") == ParsedAction("go", True) and not own.parse("Answer: ").valid
    assert len(vlmq_trl.validate_trajectories(page.play)) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_data_of_a_chosen_format_is_evaluated_in_it(page):
    text = page.read_text()
    if "agent_format=agent_format)" in text:  # the call that plays
        assert not re.findall(r"`eval_env=\w+(?!\w|, agent_format=agent_format)", text)


def test_the_readmes_script_runs(tmp_path):
    """As it stands, but for a tiny random model and less of everything."""
    model, processor = tiny_models.build("idefics3")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for old, new in (
        ('load_embedded_model(EmbeddedRecipe(games=("NumberLine",)))', f"{str(tmp_path / 'model')!r}"),
        ("episodes=1000", "episodes=4"),
        ("max_steps=400", "max_steps=1, eval_episodes=2"),
        ("per_device_train_batch_size=32", "per_device_train_batch_size=2"),
        ("max_completion_length=48", "max_completion_length=2"),
    ):
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0.0"
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "critic.safetensors").is_file()
