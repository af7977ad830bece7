"""The sandbox's benchmark, with few programs: its line of JSON."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks import sandbox


def test_the_line_of_json_holds_its_figures() -> None:
    arguments = ["--kind=process", "--programs=3", "--workers=2", "--json"]
    figures = json.loads(CliRunner().invoke(sandbox.main, arguments, catch_exceptions=False).stdout)
    assert (figures["kind"], figures["workers"]) == ("process", 2)
    assert 0 < figures["median_seconds"] <= figures["p95_seconds"]
    assert figures["programs_per_second"] > 0
