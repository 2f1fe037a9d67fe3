"""The documents hold: paths exist, commands parse, the Python example runs, grpcurl's bodies are accepted, tables name what is there."""

import asyncio
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from google.protobuf import json_format

from cli.main import app
from features.settings import Settings
from tests.edge import serving
from tests.fakes import Fakes

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "deploy" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GRPCURL = re.compile(r"grpcurl -plaintext -d '([^']*)'[\s\\]+\S+ concord\.v1\.(\w+)/(\w+)")
# The folders a person names in prose; with a slash and without a space, a token that starts so is a path.
_ROOMS = {path.name for path in ROOT.iterdir()} - {".venv", ".data"}


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(text) if kind == language]


def paths_in(text: str) -> list[str]:
    prose = _BLOCK.sub("", text)
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in target]
    names = [name for name in re.findall(r"`([^`\s]+)`", prose) if "/" in name and name.split("/")[0] in _ROOMS]
    suffixed = re.findall(r"`([\w./-]+\.(?:md|py|toml|yaml|proto|txt))`", prose)
    return links + names + [name for name in suffixed if name != "concord.toml"]


def commands_in(text: str) -> list[str]:
    lines = [line for body in blocks(text, "sh") for line in body.replace("\\\n", " ").splitlines()]
    found = [match[1] for line in lines if (match := re.search(r"(?:^|run --rm(?: -v \S+)? )(concord .*)$", line))]
    return found + re.findall(r"`(concord [^`]+)`", _BLOCK.sub("", text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_mentioned_exists(document):
    places = (ROOT, document.parent)
    assert [name for name in paths_in(document.read_text()) if not any((place / name).exists() for place in places)] == []


def test_paths_are_found_where_they_stand():
    text = "See `server/rpc/`, [this](docs/architecture.md) and `gone/nowhere.py`.\n```sh\n`server/not.py`\n```\n"
    assert sorted(paths_in(text)) == ["docs/architecture.md", "gone/nowhere.py", "server/rpc/"]
    assert "server/recommend/recommender.py" in paths_in(README)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_parses(document):
    group = typer.main.get_command(app)
    for line in commands_in(document.read_text()):
        words = shlex.split(line, comments=True)[1:]
        command = group.commands.get(words[0])
        assert command is not None, line
        if words[1:]:  # prose may name a command alone
            command.make_context(words[0], words[1:]).close()  # raises on an unknown option or a missing argument


def test_every_command_of_the_walk_through_is_read_from_the_readme():
    named = {line.split()[1] for line in commands_in(README)}
    assert {"import", "apply", "materialize", "train", "evaluate", "export", "publish", "activate", "serve", "settings"} <= named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_exists(document):
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make ([a-z-]+)`", text) + [
        t for body in blocks(text, "sh") for t in re.findall(r"^make ([a-z-]+)", body, re.MULTILINE)
    ]
    assert set(named) <= targets


async def test_the_python_example_runs(tmp_path):
    (example,) = blocks(README, "python")
    async with serving(Fakes()) as edge:
        program = tmp_path / "example.py"
        program.write_text(example.replace("127.0.0.1:50051", f"127.0.0.1:{edge.server.port}"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", str(program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert (process.returncode, err.decode()) == (0, "")
        recorded, asked = edge.fakes.recorder.calls[0], edge.fakes.recommender.calls[0]
    assert "Title i1  19.99 EUR" in out.decode()
    assert (recorded[0].channel, recorded[0].action, asked.channel) == ("store", "purchase", "app")
    assert asked.token.user_id == asked.subject.user_id == "u-card-1234"


def _request(service: str, method: str):
    for module in (
        "articles",
        "assistant",
        "catalog",
        "events",
        "features",
        "identity",
        "models",
        "profile",
        "recommendation",
        "search",
        "understanding",
    ):
        contract = importlib.import_module(f"concord.v1.{module}_pb2")
        if service in contract.DESCRIPTOR.services_by_name:
            return getattr(contract, contract.DESCRIPTOR.services_by_name[service].methods_by_name[method].input_type.name)
    raise AssertionError(f"no service {service}")


async def test_the_grpcurl_examples_are_accepted():
    examples = _GRPCURL.findall(README)
    assert len(examples) == README.count("grpcurl -plaintext") >= 5
    async with serving(Fakes()) as edge:
        for body, service, method in examples:
            request = json_format.Parse(body, _request(service, method)())
            await edge.raw(f"/concord.v1.{service}/{method}", request.SerializeToString(), timeout=10)
        (event,) = edge.fakes.recorder.calls[0]
    assert (event.action, event.value, event.quantity) == ("purchase", 39.8, 2)


def test_the_json_of_the_prose_is_a_subject():
    (body,) = re.findall(r"`\{\"subject\": (\{[^`]*\})\}`", README)
    assert json_format.Parse(body, importlib.import_module("concord.v1.common_pb2").Subject()).user_id == "12347"


def test_architecture_lists_every_table_and_key():
    sql = "".join(path.read_text() for path in sorted((ROOT / "features" / "schema" / "versions").glob("*.sql")))
    tables = set(re.findall(r"^CREATE (?:TABLE|VIEW) (\w+)", sql, re.MULTILINE))
    keys = {kind for path in (ROOT / "server").rglob("*.py") for kind in re.findall(r'f"concord:\{[\w.]+\}:(\w+)', path.read_text())}
    assert tables
    assert keys
    assert {table for table in tables if f"| `{table}` |" not in ARCHITECTURE} == set()
    assert {key for key in keys if f"`concord:<project>:{key}" not in ARCHITECTURE} == set()
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", ARCHITECTURE.partition("## PostgreSQL tables")[2], re.MULTILINE))
    assert listed == tables


def test_the_architecture_covers_the_whole_promise():
    assert re.findall(r"^\| (C\d) \|", ARCHITECTURE, re.MULTILINE) == ["C1", "C2", "C3", "C4", "C5", "C6"]


def test_one_version_and_one_licence_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
    version = project["version"]
    assert client["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"image: concord:{version}" in (ROOT / "deploy" / "compose.yaml").read_text()
    assert f'version="{version}"' in (ROOT / "Dockerfile").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert project["license"] == client["license"] == "Apache-2.0"
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_no_document_leaves_something_to_fill_in():
    assert [path.name for path in DOCUMENTS if re.search(r"\b(TODO|TBD|FIXME|XXX)\b", path.read_text())] == []


def test_the_readme_says_what_there_is_not():
    absent = README.partition("## Not yet")[2]
    assert "GPU" in absent


def test_the_table_of_settings_gives_the_real_defaults():
    from server.settings import ServerSettings

    rows = re.findall(r"^\| `CONCORD_(\w+)` \| `([^`]*)` \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for name, shown in rows:
        default = ServerSettings.model_fields[name.lower()].default
        assert shown == (",".join(default) if isinstance(default, tuple) else str(default)), name
    assert issubclass(ServerSettings, Settings)
