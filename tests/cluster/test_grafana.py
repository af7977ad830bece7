"""The Grafana dashboard: its queries name metrics that there are, under the names that Ray gives them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

DASHBOARD: Any = json.loads((Path(__file__).parents[2] / "cluster" / "grafana" / "sapo.json").read_text())
PANELS: Any = DASHBOARD["panels"]
COUNTERS = {
    *("sapo_generated_tokens", "sapo_prompt_tokens", "sapo_cached_tokens", "sapo_rollouts", "sapo_labels"),
    *("sapo_retries", "sapo_quarantined", "sapo_scaling_decisions", "sapo_trained_tokens"),
}
GAUGES = {"sapo_queue_depth", "sapo_workers", "sapo_in_flight", "sapo_loss"}
EXPORTED = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
"""As Ray exports them to Prometheus; test_local_cluster.py asks a real one."""
TAGS = {
    **{"ray_sapo_queue_depth": {"pool"}, "ray_sapo_workers": {"pool", "state"}, "ray_sapo_in_flight": {"pool"}},
    **{"ray_sapo_loss": {"stage"}, "ray_sapo_scaling_decisions_total": {"pool", "direction"}},
}
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def names(query: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", query))


def test_every_metric_is_shown_and_no_other() -> None:
    assert set().union(*map(names, QUERIES)) == EXPORTED
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    assert set().union(*map(names, variables)) <= EXPORTED


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_read_as_rates_and_grouped_by_tags_that_they_have(query: str) -> None:
    for name in names(query):
        groups = re.findall(rf"by \(([^)]*)\) \((?:(rate|increase)\()?{name}{{run=~\"\$run\"}}", query)
        assert groups
        for tags, change in groups:
            assert set(tags.split(", ")) <= {"run"} | TAGS.get(name, set())
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
