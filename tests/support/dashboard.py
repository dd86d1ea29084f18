"""The Grafana dashboard of monitoring/ and what it asks Prometheus for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[2] / "monitoring" / "refault.dashboard.json"


def dashboard() -> dict[str, Any]:
    """The document."""
    document: dict[str, Any] = json.loads(_FILE.read_text())
    return document


def panels() -> list[dict[str, Any]]:
    """Its panels, the headings of rows too."""
    found: list[dict[str, Any]] = dashboard()["panels"]
    return found


def expressions() -> list[str]:
    """What it asks for, annotations too, each once, with Grafana's variables in it."""
    annotations = dashboard()["annotations"]["list"]
    targets = [target for panel in panels() for target in panel.get("targets", ())]
    return list(dict.fromkeys(each["expr"] for each in [*targets, *annotations]))
