# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: imports point downwards, every file opens as agreed, nothing unpickles or evaluates text.

Sources are parsed, never imported. Each rule is a function from a tree of files to a list of complaints; each is run
on this repository, where it must find nothing, and on small broken trees, where it must find the fault.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vlmq_trl"
SPDX = "# SPDX-License-Identifier: Apache-2.0"

# Where each module of the package stands. A new module must be placed here before the tests pass.
FLOORS = {
    1: {"losses", "trajectory", "critic", "agent_format", "metrics", "envs", "sharding"},
    2: {
        "modeling",
        "agent",
        "chat",
        "collator",
        "dataset_card",
        "minari",
        "replay",
        "env_pool",
        "rollout",
        "policy",
        "embedded",
        "remote",
        "recorder",
        "vision_cache",
    },
    3: {
        "callbacks",
        "checkpoints",
        "model_card",
        "objective",
        "online",
        "saving",
        "vlmq_config",
        "vlmq_trainer",
        "ppo_config",
        "ppo_trainer",
    },
    4: {"show"},
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}

# What a module may know of the world outside the package.
ONLY = {"losses": {"torch"}}  # beside the standard library
NEVER = {"envs": {"torch", "transformers", "trl", "peft", "accelerate"}}  # environments know no models

UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path, root: Path) -> tuple[str, list[str]]:
    """The top-level module that `path` belongs to ("" for the package's own `__init__`), and its dotted package.

    Example: `vlmq_trl/envs/base.py` belongs to `envs` and lies in package `["vlmq_trl", "envs"]`.
    """
    parts = path.relative_to(root).with_suffix("").parts
    return ("" if parts[1:] == ("__init__",) else parts[1]), list(parts[:-1])


def imports(path: Path, root: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and absolute dotted name of everything that a file imports, inside functions and type-only blocks too.

    `from a import b` yields `a.b`, since b may be a module; relative imports are resolved.
    """
    _, package = module_of(path, root)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, [*base, alias.name]


def floor_complaints(root: Path) -> list[str]:
    """Imports that break the floors, modules that have no floor, and cycles; empty if all is well."""
    complaints, edges = [], {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module, _ = module_of(path, root)
        if not module:
            continue  # the package's public names may come from any floor
        if module not in FLOOR_OF:
            complaints.append(f"{PACKAGE}/{module} stands on no floor: place it in FLOORS")
            continue
        for line, name in imports(path, root):
            where = f"{path.relative_to(root)}:{line}"
            if name[0] != PACKAGE:
                outside = ONLY.get(module)
                if outside is not None and name[0] not in outside and name[0] not in sys.stdlib_module_names:
                    complaints.append(f"{where} imports {name[0]}; {module} may know only {sorted(outside)}")
                if name[0] in NEVER.get(module, ()):
                    complaints.append(f"{where} imports {name[0]}, which {module} must not know")
                continue
            target = name[1] if len(name) > 1 else ""
            if target == module:
                continue
            if target not in FLOOR_OF:
                complaints.append(f"{where} imports {'.'.join(name)}: import the module that defines it")
            elif FLOOR_OF[target] > FLOOR_OF[module]:
                complaints.append(f"{where} imports upwards, from {module} to {target}")
            elif FLOOR_OF[target] == FLOOR_OF[module] == 1:
                complaints.append(f"{where} imports sideways on floor 1, from {module} to {target}")
            edges.setdefault(module, set()).add(target)
    complaints += [f"import cycle through {module}" for module in sorted(edges) if module in reachable(module, edges)]
    return complaints


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """Modules that `start` imports, directly or not; itself only if it lies on a cycle."""
    found: set[str] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def header_complaints(root: Path) -> list[str]:
    """Python files that do not open with the SPDX line (after a `#!` line, if any), then a docstring."""
    complaints = []
    for path in python_files(root):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines()[:2] if not line.startswith("#!")]
        if lines[:1] != [SPDX]:
            complaints.append(f"{path.relative_to(root)}: the first line must be {SPDX!r}")
        if not ast.get_docstring(parse(path)):
            complaints.append(f"{path.relative_to(root)}: no docstring that says what the file is for")
    return complaints


def unsafe_complaints(root: Path) -> list[str]:
    """Calls of the builtins that run text as code, imports that unpickle, and `torch.load` of more than weights."""
    complaints = []
    for path in python_files(root):
        for line, name in imports(path, root):
            if name[0] in UNSAFE_MODULES:
                complaints.append(f"{path.relative_to(root)}:{line} imports {name[0]}; use JSON or safetensors")
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            where = f"{path.relative_to(root)}:{node.lineno}"
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_BUILTINS:
                complaints.append(f"{where} calls {node.func.id}; write a parser")
            if ast.unparse(node.func) == "torch.load" and not any(
                keyword.arg == "weights_only" and getattr(keyword.value, "value", None) is True
                for keyword in node.keywords
            ):
                complaints.append(f"{where} calls torch.load without weights_only=True")
    return complaints


def python_files(root: Path) -> list[Path]:
    return sorted(path for folder in (PACKAGE, "examples", "tests") for path in (root / folder).rglob("*.py"))


@pytest.mark.parametrize("complaints", [floor_complaints, header_complaints, unsafe_complaints])
def test_this_repository(complaints):
    assert (ROOT / PACKAGE / "__init__.py") in python_files(ROOT)
    assert complaints(ROOT) == []


def tree(root: Path, files: dict[str, str]) -> Path:
    """Writes a small package under `root`: paths inside it, and the code that follows a proper header."""
    for name, code in {"__init__.py": "from vlmq_trl.vlmq_trainer import VLMQTrainer", **files}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{SPDX}\n"""Docstring."""\n{code}\n', encoding="utf-8")
    return root


GOOD = {
    "losses.py": "import math\nimport torch",
    "critic.py": "import torch",
    "envs/__init__.py": "import gymnasium\nfrom vlmq_trl.envs.base import TextActionEnv",
    "envs/base.py": "import numpy as np",
    "envs/gym_cards.py": "from .base import TextActionEnv\nfrom . import base",
    "modeling.py": "from vlmq_trl import critic\nfrom vlmq_trl.critic import Critic",
    "vlmq_config.py": "import trl",
    "vlmq_trainer.py": "import vlmq_trl.modeling\nfrom .vlmq_config import VLMQConfig\nfrom .losses import f",
}


def test_good_tree_has_no_complaints(tmp_path):
    root = tree(tmp_path, GOOD)
    assert floor_complaints(root) == header_complaints(root) == unsafe_complaints(root) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("modeling.py", "from vlmq_trl.vlmq_config import VLMQConfig", "upwards, from modeling to vlmq_config"),
        ("modeling.py", "from .vlmq_config import VLMQConfig", "upwards, from modeling to vlmq_config"),
        ("modeling.py", "from vlmq_trl import vlmq_config", "upwards, from modeling to vlmq_config"),
        ("modeling.py", "import vlmq_trl.vlmq_config as c", "upwards, from modeling to vlmq_config"),
        ("modeling.py", "def f():\n    from . import vlmq_config", "upwards, from modeling to vlmq_config"),
        ("modeling.py", "from vlmq_trl import VLMQConfig", "imports vlmq_trl.VLMQConfig: import the module"),
        ("modeling.py", "import vlmq_trl", "imports vlmq_trl: import the module"),
        ("modeling.py", "from vlmq_trl import *", "imports vlmq_trl.*: import the module"),
        ("critic.py", "from vlmq_trl.losses import f", "sideways on floor 1, from critic to losses"),
        ("critic.py", "from vlmq_trl.envs.base import f", "sideways on floor 1, from critic to envs"),
        ("envs/base.py", "from ..losses import f", "sideways on floor 1, from envs to losses"),
        ("envs/base.py", "from ..rollout import f", "upwards, from envs to rollout"),
        ("envs/base.py", "import torch.nn", "imports torch, which envs must not know"),
        ("losses.py", "import numpy as np", "may know only ['torch']"),
        ("vlmq_config.py", "from vlmq_trl.vlmq_trainer import T", "import cycle through vlmq_config"),
        ("helpers.py", "", "vlmq_trl/helpers stands on no floor"),
        ("tools/thing.py", "", "vlmq_trl/tools stands on no floor"),
    ],
)
def test_broken_floors_are_found(tmp_path, file, code, complaint):
    found = floor_complaints(tree(tmp_path, {**GOOD, file: code}))
    assert any(complaint in line and (file in line or "cycle" in line or "no floor" in line) for line in found), found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('"""Docstring."""\n', "the first line must be"),
        (f'"""Docstring."""\n{SPDX}\n', "the first line must be"),
        (f"{SPDX}\nx = 1\n", "no docstring"),
        ("", "the first line must be"),
    ],
)
def test_broken_headers_are_found(tmp_path, text, complaint):
    root = tree(tmp_path, GOOD)
    (root / "examples").mkdir()
    (root / "examples" / "bad.py").write_text(text, encoding="utf-8")
    found = header_complaints(root)
    assert any(complaint in line for line in found) and all("examples/bad.py" in line for line in found)


@pytest.mark.parametrize(
    "code",
    [
        "value = eval" + "('1 + 1')",
        "exec" + "('x = 1')",
        "import pickle",
        "from pickle import loads",
        "import dill as json",
        "import torch\nstate = torch.load('x.pt')",
        "import torch\nstate = torch.load('x.pt', weights_only=False)",
    ],
)
def test_unsafe_code_is_found(tmp_path, code):
    found = unsafe_complaints(tree(tmp_path, {**GOOD, "rollout.py": code}))
    assert len(found) == 1 and "rollout.py" in found[0]


def test_model_eval_and_weights_only_are_allowed(tmp_path):
    code = "import torch\nmodel.eval()\nstate = torch.load('x.pt', weights_only=True)"
    assert unsafe_complaints(tree(tmp_path, {**GOOD, "rollout.py": code})) == []
