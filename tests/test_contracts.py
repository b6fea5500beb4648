"""The house's own rules: public names, which room may use which, and what must work without torch."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import thinker
from thinker import commands

PACKAGE = Path(thinker.__file__).parent

# From the top of the house down: a room uses rooms on its own floor and on floors above it, never below.
FLOORS = (
    {"places", "config", "rope", "compiled", "sampling", "sampling_kernels"}
    | {"tokenizer", "messages", "chat", "plots"},
    {"model", "activations", "attention", "fused", "linear", "moe", "cache", "parameters", "trace", "loss"}
    | {"modality", "data"},
    {"checkpoint", "formats"},
    {"decode", "stop_strings", "generate", "evaluate", "attachments", "answers", "llm"},
    {"train", "doctor", "certificate", "bench", "harness", "serve", "commands"},
)
NETWORK = {"model", "activations", "attention", "linear", "moe", "cache", "trace", "loss"}

# What `thinker generate` needs on a processor. Only the decoder that is made of torch may import it.
WITHOUT_TORCH = (
    "config",
    "rope",
    "places",
    "compiled",
    "sampling",
    "sampling_kernels",
    "tokenizer",
    "chat",
    "data",
    "checkpoint",
    "formats",
    "decode",
    "stop_strings",
    "generate",
    "llm",
)
TORCH_ITSELF = {"thinker.decode.torch_decoder", "thinker.decode.fixed_step"}
COMMANDS = ("thinker.commands", "thinker.commands.generate", "thinker.commands.chat")


def modules() -> dict[str, Path]:
    """Every module's dotted name and file, but for the package's own `__init__` and `__main__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("thinker", "thinker.__main__"):
            found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Modules of this package that a module imports, wherever in its text: at the top, in functions, for types."""
    path = MODULES[name]
    here = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            # `from .a import b` means the module a.b where there is one, else what a says about b.
            known = next((t for t in (target, target.rpartition(".")[0]) if t in MODULES), None)
            if known is not None:
                yield known


def room(name: str) -> str:
    return name.split(".")[1]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


@pytest.mark.parametrize("folder", ["compiled", "decode/native"])
def test_a_folder_s_first_lines_name_every_file_in_it(folder: str) -> None:
    """Catches a plan of the rooms that leaves out the newer ones."""
    plan = (PACKAGE / folder / "__init__.py").read_text()
    files = {path.name for path in (PACKAGE / folder).glob("*.py")} - {"__init__.py"}
    assert files <= set(re.findall(r"`(\w+\.py)`", plan))


def test_public_names() -> None:
    """Catches a public name that was lost, misspelt, or shown to type checkers only."""
    assert {"ThinkerConfig", "ThinkerLM", "load"} <= set(thinker.__all__)
    for name in thinker.__all__:
        assert getattr(thinker, name).__name__ == name
    assert set(thinker.__all__) <= set(dir(thinker))
    typed = {
        alias.name
        for node in ast.walk(ast.parse(Path(thinker.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == set(thinker.__all__)
    with pytest.raises(AttributeError, match="thnker"):
        thinker.thnker  # noqa: B018


def test_version_and_command() -> None:
    """Catches a version that differs between the package and its metadata, and a command that points nowhere."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert thinker.__version__ == project["version"]
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="thinker")
    assert callable(command.load())
    said = subprocess.run([sys.executable, "-m", "thinker", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"{thinker.__version__}\n"


def test_every_room_has_its_floor() -> None:
    """Catches a new file that no rule applies to, and a drawer for everything."""
    assert {room(name) for name in MODULES} <= set().union(*FLOORS)
    assert not [name for name in MODULES if name.rpartition(".")[2] in ("utils", "common", "helpers", "misc")]


def test_imports_point_upward() -> None:
    """Catches a room that leans on a room below it: then neither can be read, or used, alone."""
    wrong = [f"{name} imports {other}" for name in MODULES for other in imports(name) if floor(other) > floor(name)]
    assert wrong == []


def test_the_checker_sees_imports() -> None:
    """Catches the two tests around this one passing because no import was recognised."""
    assert set(imports("thinker.trace")) == {"thinker.attention", "thinker.moe", "thinker.model"}
    assert sum(1 for name in MODULES for _ in imports(name)) > 50


def test_no_room_needs_itself() -> None:
    """Catches a circle of imports, lazy ones included: it works until somebody imports the other end first."""
    uses = {name: set(imports(name)) - {name} for name in MODULES}
    while free := [name for name, used in uses.items() if not used & uses.keys()]:
        for name in free:
            del uses[name]
    # What is left lies on a circle or leads to one.
    assert uses == {}


def test_the_network_knows_no_text_and_no_files() -> None:
    """Catches a model that imports a tokenizer, an optimiser, a sampler or a checkpoint."""
    allowed = NETWORK | {"fused", "config", "rope"}
    wrong = [f"{name} imports {other}" for name in MODULES if room(name) in NETWORK for other in imports(name)]
    assert [line for line in wrong if room(line.rpartition(" ")[2]) not in allowed] == []
    for name in NETWORK:
        text = MODULES[f"thinker.{name}"].read_text()
        assert "torch.optim" not in text
        assert "open(" not in text


def test_the_network_does_not_import_the_compiler() -> None:
    """Catches an import of Numba, half a second for nothing where all kernels are on the disk."""
    script = "import sys, thinker.model; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_must_not_import_torch() -> None:
    """Catches an import of torch, which takes seconds, on the way of a command that decodes natively."""
    rooms = [name for name in MODULES if room(name) in WITHOUT_TORCH and name not in TORCH_ITSELF]
    names = ["thinker", *rooms, *COMMANDS]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name + ' imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {room(name) for name in rooms} == set(WITHOUT_TORCH), "the list above names rooms that don't exist"


def test_no_pickle_on_any_path() -> None:
    """Catches a way to run a stranger's code by opening a stranger's file."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), name
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert getattr(node.value, "value", None) is False, name


def test_the_commands_of_the_readme_are_understood() -> None:
    """Catches a README that shows a flag or a command which was renamed; what is only sketched has an ellipsis."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    (?:cat \S+ \| )?thinker (.+)$", readme, re.MULTILINE)
    lines = [shlex.split(line, comments=True) for line in shown if "…" not in line]
    assert len(lines) > 10
    for name, *arguments in lines:
        commands.parse(importlib.import_module(f"thinker.commands.{name}").Options, name, arguments)
