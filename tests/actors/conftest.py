from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from prometheus_client.parser import text_string_to_metric_families

Sample = Any
Scrape = Callable[[Iterable[str]], list[Sample]]
LogLines = Callable[[str], list[str]]


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group, one for all modules: DeepSpeed keeps the first that it sees for good."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def process_group(group_of_one: None) -> Iterator[None]:
    """What training needs in the process that it runs in: a group, DeepSpeed's variables, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def scrape() -> Scrape:
    """Waits until Ray's metrics endpoint exports all of some names, and gives every sample of this project."""

    def samples(names: Iterable[str]) -> list[Sample]:
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        wanted = set(names)
        while True:
            lines = urllib.request.urlopen(url, timeout=60).read().decode().splitlines(keepends=True)
            ours = "".join(line for line in lines if "ray_sapo_" in line)
            found = [sample for family in text_string_to_metric_families(ours) for sample in family.samples]
            if wanted <= {sample.name for sample in found}:
                return found
            time.sleep(0.5)

    return samples


@pytest.fixture(scope="session")
def log_lines() -> LogLines:
    """The lines that hold a word, of the log files that Ray keeps of its workers' errors."""

    def lines(word: str) -> list[str]:
        files = Path(ray._private.worker._global_node.get_logs_dir_path()).glob("worker-*.err")
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return [line for text in texts for line in text.splitlines() if word in line]

    return lines
