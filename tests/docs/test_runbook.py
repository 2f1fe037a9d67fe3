"""Dashboard, alerts and runbook name only what exists: metrics, labels, commands, settings, sections."""

import json
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from typer.main import get_command

from cli.main import app
from server.audit.metrics import write_metrics
from server.audit.report import KINDS, AuditReport
from server.health import DEPENDENCIES, NEEDS
from server.metrics import INGEST_STAGES, STAGES, Metrics
from server.workers.metrics import WorkerMetrics

ROOT = Path(__file__).parents[2]
RUNBOOK, GUIDE = ROOT / "docs" / "runbook.md", ROOT / "docs" / "observability.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "concord.json"
ALERTS, SCRAPE = ROOT / "deploy" / "prometheus" / "alerts.yaml", ROOT / "deploy" / "prometheus" / "prometheus.yaml"
_METRIC = re.compile(r"\b((?:concord|process)_[a-z_]+[a-z])\b")
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}


def metrics() -> dict[str, set[str]]:
    """The samples that servers and audits expose, with their labels."""
    registry = CollectorRegistry()
    Metrics(registry)
    WorkerMetrics(registry, dict)
    found: dict[str, set[str]] = {}
    for collector in registry._collector_to_names:
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            for suffix in _SUFFIXES[family.type]:
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    process = ("process_cpu_seconds_total", "process_resident_memory_bytes")  # described by nobody where /proc is not
    return found | {name: set() for name in process} | audit_metrics()


def audit_metrics() -> dict[str, set[str]]:
    """The gauges of an audit, as it writes them to its file."""
    report = AuditReport("run", datetime(2026, 1, 1, tzinfo=UTC))
    with tempfile.TemporaryDirectory() as folder:
        write_metrics(report, Path(folder) / "audit.prom")
        text = (Path(folder) / "audit.prom").read_text()
    types = re.findall(r"^# TYPE (concord_audit_[a-z_]+) gauge$", text, re.MULTILINE)
    return {name: set(re.findall(r"([a-z]+)=\"", " ".join(re.findall(rf"^{name}{{(.*)}}", text, re.MULTILINE)))) for name in types}


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def alerts() -> list[Any]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    variables = [variable["query"]["query"] for variable in dashboard()["templating"]["list"] if variable["type"] == "query"]
    annotations = [annotation["expr"] for annotation in dashboard()["annotations"]["list"]]
    return [*panels, *variables, *annotations, *(rule["expr"] for rule in alerts())]


def commands(text: str) -> set[str]:
    """Every ``concord ...`` in code, as far as its words name a command."""
    code = re.findall(r"`([^`\n]+)`", text) + [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    return {words for line in code for words in re.findall(r"\bconcord ([a-z]+(?: [a-z]+)?)", line)}


def exists(words: str) -> bool:
    command: Any = get_command(app)
    for word in words.split():
        if not hasattr(command, "commands"):
            return True  # what follows a command is its argument
        if word not in command.commands:
            return False
        command = command.commands[word]
    return True


def test_every_metric_that_is_named_is_exposed() -> None:
    known = metrics()
    named = {name for text in (*expressions(), RUNBOOK.read_text(), GUIDE.read_text()) for name in _METRIC.findall(text)}
    short = {name.removesuffix("_bucket") for name in known}  # prose names a histogram as a whole
    assert named > {"concord_stage_seconds_bucket", "concord_dependency_up", "concord_answers_total"}
    assert {name for name in named if name not in set(known) | short} == set()


def test_every_label_in_an_expression_is_one_of_its_metric() -> None:
    known = metrics()
    wrong = []
    for expression in expressions():
        for name, matchers in re.findall(r"\b(concord_[a-z_]+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)\"", matchers))
            wrong += [(name, label) for label in labels - {"instance", "job"} if label not in known[name]]
    assert wrong == []


def test_stages_dependencies_and_services_in_the_guide_are_all_there_are() -> None:
    guide = GUIDE.read_text()
    assert [name for name in (*STAGES, *INGEST_STAGES[1:]) if f"`{name}`" not in guide] == []
    assert set(re.findall(r"`concord\.dependency\.([a-z]+)`", guide)) == set(DEPENDENCIES)
    assert set(re.findall(r"`(concord\.v1\.[A-Za-z]+)`", guide)) == set(NEEDS)


def test_the_dashboard_is_one_grafana_can_draw() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 25
    assert next(panel["title"] for panel in panels if panel["type"] == "row") == "The promise"
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or all(target["expr"] and target["refId"] for target in panel["targets"])


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_balanced(expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


def test_every_alert_says_what_why_and_where_to_read_on() -> None:
    sections = {_anchor(title) for title in re.findall(r"^###? (.+)$", RUNBOOK.read_text(), re.MULTILINE)}
    for rule in alerts():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        page, _, section = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / page).is_file()
        assert section in sections, rule["alert"]
        assert rule["alert"] in RUNBOOK.read_text(), rule["alert"]
    assert len({rule["alert"] for rule in alerts()}) == len(alerts()) > 12


def test_the_runbook_names_only_alerts_that_exist() -> None:
    named = set(re.findall(r"\bConcord[A-Z][A-Za-z]+", RUNBOOK.read_text()))
    assert named <= {rule["alert"] for rule in alerts()}


def test_the_scrape_example_loads_the_alerts_and_the_servers_port() -> None:
    scrape = yaml.safe_load(SCRAPE.read_text())
    assert all((SCRAPE.parent / name).is_file() for name in scrape["rule_files"])
    assert {job["job_name"] for job in scrape["scrape_configs"]} >= {"concord"}
    assert "concord:9464" in scrape["scrape_configs"][0]["static_configs"][0]["targets"]


def test_links_inside_the_runbook_lead_somewhere() -> None:
    sections = {_anchor(title) for title in re.findall(r"^###? (.+)$", RUNBOOK.read_text(), re.MULTILINE)}
    assert set(re.findall(r"\(#([a-z0-9-]+)\)", RUNBOOK.read_text())) <= sections


def test_every_command_exists() -> None:
    named = commands(RUNBOOK.read_text()) | commands(GUIDE.read_text())
    assert "health" in {words.split()[0] for words in named}
    assert {words.split()[0] for words in named if not exists(words)} == set()


def test_the_runbook_knows_every_kind_of_violation() -> None:
    section = RUNBOOK.read_text().partition("### Audit violations")[2].partition("\n### ")[0]
    assert [kind for kind in KINDS if f"`{kind}`" not in section] == []


def test_the_runbook_covers_what_can_happen() -> None:
    rows = [line for line in RUNBOOK.read_text().splitlines() if line.startswith("| ") and not line.startswith("| symptom")]
    assert len(rows) >= 20
    assert all(line.count("|") == 4 for line in rows), [line for line in rows if line.count("|") != 4]


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
