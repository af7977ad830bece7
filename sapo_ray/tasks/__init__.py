"""Tasks: where questions come from and how their answers are judged."""

from sapo_ray.tasks.base import SPLITS, OracleLabels, Split, Task
from sapo_ray.tasks.chain import Chain, ChainConfig
from sapo_ray.tasks.custom import CustomConfig, make_custom
from sapo_ray.tasks.mathematics import Math, MathConfig

TaskConfig = ChainConfig | MathConfig | CustomConfig

__all__ = [
    "SPLITS",
    "Chain",
    "ChainConfig",
    "CustomConfig",
    "Math",
    "MathConfig",
    "OracleLabels",
    "Split",
    "Task",
    "TaskConfig",
    "make_task",
]


def make_task(config: TaskConfig) -> Task:
    """The task that a config describes; its class follows from the config's."""
    if isinstance(config, ChainConfig):
        return Chain(config)
    return Math(config) if isinstance(config, MathConfig) else make_custom(config)
