"""Tasks: where questions come from and how their answers are judged."""

from sapo_ray.tasks.base import SPLITS, OracleLabels, Split, Task
from sapo_ray.tasks.chain import Chain, ChainConfig

__all__ = ["SPLITS", "Chain", "ChainConfig", "OracleLabels", "Split", "Task", "make_task"]


def make_task(config: ChainConfig) -> Task:
    """The task that a config describes; its class follows from the config's."""
    return Chain(config)
