"""The Grafana dashboard: its queries name metrics that there are, under the names that Ray gives them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter

from actors.telemetry import METRICS

DASHBOARD: Any = json.loads((Path(__file__).parents[2] / "cluster" / "grafana" / "sapo.json").read_text())
PANELS: Any = DASHBOARD["panels"]
EXPORTED: dict[str, set[str]] = {
    f"ray_{name}_total" if metric.kind is Counter else f"ray_{name}": {"run", *metric.tags}
    for name, metric in METRICS.items()
}
"""Names that Ray exports to Prometheus, which test_local_cluster.py asks a real one for, and their tags."""
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def names(query: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", query))


def test_every_metric_is_shown_and_no_other() -> None:
    assert set().union(*map(names, QUERIES)) == EXPORTED.keys()
    chosen = [entry["query"]["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
    assert set().union(*map(names, chosen)) <= EXPORTED.keys()


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_read_as_rates_and_grouped_by_tags_that_they_have(query: str) -> None:
    for name in names(query):
        groups = re.findall(rf"by \(([^)]*)\) \((?:(rate|increase)\()?{name}{{run=~\"\$run\"}}", query)
        assert groups
        for tags, change in groups:
            assert set(tags.split(", ")) <= EXPORTED[name]
            assert bool(change) == name.endswith("_total")


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & taken
        taken |= cells
