"""Settings: each documented, each named in a document real, a wrong one named when it stops a command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.credentials import CallSettings
from features.settings import Settings, SettingsError, load_settings
from server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
# Read by the loader itself or by the tests, and so no fields of a settings class.
RESERVED = {"CONCORD_CONFIG_FILE", "CONCORD_TEST_DATA"}
FIELDS = ServerSettings.model_fields | CallSettings.model_fields
KNOWN = {f"CONCORD_{name.upper()}" for name in FIELDS} | RESERVED | set(Settings().feast_environment())
# Named as a thing that must not be set.
WARNED_OF = {"CONCORD_SERVICE_HOST"}


def texts() -> list[Path]:
    prose = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Dockerfile", ".ci/run")]
    folders = [*(ROOT / "docs").glob("*.md"), *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
    code = [
        path for room in ("cli", "features", "server", "training") for path in (ROOT / room).rglob("*") if path.suffix in {".py", ".yaml"}
    ]
    return [*prose, *folders, *code]


def run(*words: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        cwd=cwd,
        env=clean | {"COLUMNS": "300", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A concord.toml of the person who runs the tests must not be read; nor may the stores that are named change a default."""
    monkeypatch.chdir(tmp_path)
    for name in ("CONCORD_POSTGRES_DSN", "CONCORD_REDIS_URL", "CONCORD_TEST_DATA"):
        monkeypatch.delenv(name, raising=False)


def test_every_setting_is_described():
    bare = [name for name, field in FIELDS.items() if not (field.description or "").endswith(".")]
    assert bare == []


def test_every_duration_and_size_says_its_unit():
    units = {"_seconds": "second", "_bytes": "bytes"}
    for name, field in FIELDS.items():
        for suffix, unit in units.items():
            assert not name.endswith(suffix) or unit in (field.description or "") or "time" in (field.description or ""), name


def test_every_variable_named_anywhere_exists():
    named = {(path.relative_to(ROOT), name) for path in texts() for name in re.findall(r"\bCONCORD_[A-Z][A-Z_]*[A-Z]\b", path.read_text())}
    assert {name for _, name in named} & KNOWN
    assert {(str(path), name) for path, name in named if name not in KNOWN | WARNED_OF} == set()


def test_concord_settings_lists_every_one(tmp_path):
    done = run("settings", cwd=tmp_path, CONCORD_PORT="50123")
    assert done.returncode == 0, done.stderr
    assert [
        name for name in KNOWN - RESERVED if name not in done.stdout and not name.startswith("CONCORD_FEAST_") and name != "FEAST_USAGE"
    ] == []
    assert "50123" in done.stdout
    assert "postgresql://" not in done.stdout  # addresses may hold passwords


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"CONCORD_PROT": "1"}, "CONCORD_PROT"),
        ({"CONCORD_PORT": "many"}, "CONCORD_PORT"),
        ({"CONCORD_CHANNELS": "web,Web Shop"}, "CONCORD_CHANNELS"),
        ({"CONCORD_POSTGRES_DSN": "no connection string"}, "CONCORD_POSTGRES_DSN"),
        ({"CONCORD_REDIS_URL": "http://cache"}, "CONCORD_REDIS_URL"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=named):
        load_settings(ServerSettings)


def test_a_wrong_setting_stops_the_command_in_one_line(tmp_path):
    done = run("migrate", cwd=tmp_path, CONCORD_PROT="1")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: unknown setting CONCORD_PROT; see `concord settings` for the ones there are"]


def test_a_bad_address_is_not_repeated(monkeypatch):
    monkeypatch.setenv("CONCORD_POSTGRES_DSN", "hunter2 is my password")
    with pytest.raises(SettingsError) as raised:
        load_settings(Settings)
    assert "hunter2" not in str(raised.value)


def test_one_environment_and_one_file_serve_every_command(tmp_path, monkeypatch):
    """A command that needs no server's settings accepts them all the same: images and shells set them once."""
    (tmp_path / "concord.toml").write_text('project = "ours"\nmetrics_port = 9999\n')
    monkeypatch.setenv("CONCORD_PORT", "50123")
    assert load_settings(Settings).project == "ours"
    server = load_settings(ServerSettings)
    assert (server.project, server.metrics_port, server.port) == ("ours", 9999, 50123)
    done = run(
        "migrate", cwd=tmp_path, CONCORD_PORT="50123", CONCORD_POSTGRES_DSN="host=/nonexistent", CONCORD_REDIS_URL="redis://127.0.0.1:1"
    )
    assert (done.returncode, "cannot reach a store" in done.stderr) == (2, True), done.stderr


def test_an_unknown_key_of_the_file_is_named(tmp_path):
    (tmp_path / "concord.toml").write_text("prot = 1\n")
    for kind in (Settings, ServerSettings):
        with pytest.raises(SettingsError, match="PROT"):
            load_settings(kind)


def test_the_environment_wins_over_the_file(tmp_path, monkeypatch):
    other = tmp_path / "other.toml"
    other.write_text("port = 1\nslate_size = 10\n")
    monkeypatch.setenv("CONCORD_CONFIG_FILE", str(other))
    monkeypatch.setenv("CONCORD_PORT", "2")
    settings = load_settings(ServerSettings)
    assert (settings.port, settings.slate_size) == (2, 10)
