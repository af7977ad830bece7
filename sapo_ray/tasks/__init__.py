"""Tasks: where questions come from and how their answers are judged."""

from sapo_ray.tasks.base import SPLITS, OracleLabels, Split, Task
from sapo_ray.tasks.chain import Chain, ChainConfig
from sapo_ray.tasks.code import Code, CodeConfig
from sapo_ray.tasks.custom import CustomConfig, make_custom
from sapo_ray.tasks.mathematics import Math, MathConfig

TaskConfig = ChainConfig | MathConfig | CodeConfig | CustomConfig

__all__ = [
    "SPLITS",
    "Chain",
    "ChainConfig",
    "Code",
    "CodeConfig",
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
    match config:
        case ChainConfig():
            return Chain(config)
        case MathConfig():
            return Math(config)
        case CodeConfig():
            return Code(config)
    return make_custom(config)
