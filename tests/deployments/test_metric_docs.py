"""Documentation and dashboard name the metrics that there are, with the labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from deployments.observability.catalog import METRICS, NEWS_AGE, NEWS_DELAY, ROUTING_DECISIONS

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "examples" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboard.json").read_text())
OF_SERVE = {"deployment", "replica", "application"}
OF_PROCESSES = (ROUTING_DECISIONS, NEWS_DELAY, NEWS_AGE)
SERIES = {
    f"ray_{metric.name}{part}": {
        *metric.labels,
        *(() if metric in OF_PROCESSES else OF_SERVE),
        *(["le"] if part == "_bucket" else ()),
    }
    for metric in METRICS
    for part in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


def panels(of):
    for panel in of["panels"]:
        yield panel
        yield from panels(panel) if "panels" in panel else ()


def expressions():
    return [(panel["title"], target["expr"]) for panel in panels(DASHBOARD) for target in panel.get("targets", ())]


def test_every_metric_is_documented_with_its_type_and_labels_and_none_that_there_is_not():
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `(lorafleet_\w+)` \| (\w+) \| ?([^|]*)\|", text, re.MULTILINE)
    told = {name: (kind, tuple(re.findall(r"(?:^|; )`([a-z_]+)`", labels))) for name, kind, labels in rows}
    assert told == {metric.name: (metric.kind, metric.labels) for metric in METRICS}
    assert len(rows) == len(METRICS)


def test_names_say_their_unit_and_are_told_once():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"lorafleet_[a-z_]+", metric.name) and metric.meaning.endswith(".")
        assert metric.name.endswith("_total") is (metric.kind == "counter")
        assert metric.kind != "histogram" or metric.name.endswith(("_seconds", "_rows"))


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_a_panel_asks_for_series_that_there_are_by_labels_that_they_have(title, expression):
    named = set(re.findall(r"\bray_\w+", expression))
    assert named and named <= SERIES.keys(), title
    for group, name in re.findall(r"\bby \(([^)]*)\) \((?:\w+\()?(ray_\w+)", expression):
        assert set(group.split(", ")) <= SERIES[name], title
    for name, matchers in re.findall(r"\b(ray_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers)) <= SERIES[name], title
    counters = [name for name in named if name.endswith(("_total", "_bucket", "_sum", "_count"))]
    assert all(re.search(rf"(rate|increase)\({name}\b", expression) for name in counters), title


def test_the_dashboard_shows_what_an_operator_looks_for():
    asked = " ".join(expression for _, expression in expressions())
    for name in (
        *("adapter_requests_total", "requests_cut_total", "ttft_seconds_bucket", "inter_token_seconds_bucket"),
        *("tokens_total", "step_rows_sum", "requests", "adapter_hits_total", "adapter_slots", "adapters_pinned"),
        *("adapter_load_seconds_bucket", "routing_decisions_total", "kv_pages", "tenant_tokens_total"),
    ):
        assert f"ray_lorafleet_{name}" in asked
    ids = [panel["id"] for panel in panels(DASHBOARD)]
    assert len(ids) == len(set(ids))


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in panels(DASHBOARD):
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_provisioning_and_scraping_agree():
    scrape = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    variable = next(one for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource")
    assert variable["query"] == sources["datasources"][0]["type"] == "prometheus"
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "lorafleet.yml").read_text())["providers"]
    composed = yaml.safe_load((GRAFANA / "compose.yml").read_text())["services"]["grafana"]
    mounted = [volume.split(":") for volume in composed["volumes"]]
    assert provider["options"]["path"] in [target for _, target, *_ in mounted]
    assert all((GRAFANA / source).exists() for source, *_ in mounted)
