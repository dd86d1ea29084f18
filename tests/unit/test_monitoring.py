"""What monitoring/ asks Prometheus for is what refault tells it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.dashboard import dashboard, expressions, panels
from tests.unit.daemon.pictures import PICTURE

from refault.daemon.telling.metrics import StatusCollector

RULES = (Path(__file__).parents[2] / "monitoring" / "refault.rules.yml").read_text()
RULE_EXPRESSIONS = re.findall(
    r"^        expr: (?:\|-\n)?((?:.|\n)*?)^        \w+:", RULES, flags=re.MULTILINE
)
LABELS_OF_PROMETHEUS = {"instance", "job", "le", "alertname", "alertstate"}


def told() -> dict[str, set[str]]:
    """Each sample's name, with its labels."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: PICTURE))
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def asked_labels(expression: str) -> set[str]:
    matched = re.findall(r"(\w+) *(?:=~|!~|!=|=)\"", expression)
    grouped = re.findall(r"\b(?:by|without|on|ignoring) *\(([^)]*)\)", expression)
    return {*matched, *(name.strip() for names in grouped for name in names.split(","))}


@pytest.mark.parametrize("expression", [*expressions(), *RULE_EXPRESSIONS])
def test_what_is_asked_for_is_told(expression: str) -> None:
    names = told()
    asked = re.findall(r"\brefault_\w+", expression)
    assert asked or expression.startswith("ALERTS")
    assert set(asked) <= set(names)
    labels = LABELS_OF_PROMETHEUS.union(*(names[name] for name in asked))
    assert asked_labels(expression) <= labels


def test_all_rules_are_looked_at() -> None:
    assert len(RULE_EXPRESSIONS) == RULES.count("- alert:") > 3


def test_the_dashboard_is_one_that_grafana_takes_from_a_file() -> None:
    document = dashboard()
    assert {variable["name"]: variable["type"] for variable in document["templating"]["list"]} == {
        "datasource": "datasource",
        "vm": "query",
    }
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert "__inputs" not in document  # those are asked for by hand only
    for panel in panels():
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"


def test_the_panels_lie_beside_each_other() -> None:
    for one, other in combinations((panel["gridPos"] for panel in panels()), 2):
        apart = [
            one[at] + one[size] <= other[at] or other[at] + other[size] <= one[at]
            for at, size in (("x", "w"), ("y", "h"))
        ]
        assert any(apart), (one, other)


def test_legends_name_labels_that_there_are() -> None:
    names = told()
    for panel in panels():
        for target in panel.get("targets", ()):
            shown = set(re.findall(r"{{(\w+)}}", json.dumps(target["legendFormat"])))
            asked = re.findall(r"\brefault_\w+", target["expr"])
            assert shown <= LABELS_OF_PROMETHEUS.union(*(names[name] for name in asked))
