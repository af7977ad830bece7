"""What DeepSpeed holds of a training, counted in its own processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sapo_ray.plan.memory import training_memory
from sapo_ray.training import TrainConfig
from tests.sapo_ray.plan.test_memory import BILLION

ROOT = Path(__file__).parents[3]
COUNT = """
import gc, sys
import deepspeed, torch
from sapo_ray.training import TrainConfig, deepspeed_config

deepspeed.ops.__compatible_ops__ = {}
deepspeed.init_distributed("gloo", verbose=False)
model = torch.nn.Sequential(*[torch.nn.Linear(400, 400, bias=False) for _ in range(16)])
config = deepspeed_config(TrainConfig(dtype="bf16", zero_stage=int(sys.argv[1])))
engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
for update in range(2):
    for last in (False, True):
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(engine(torch.ones(1, 400, dtype=torch.bfloat16)).float().sum())
    if update == 0:
        engine.step()
gc.collect()
tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
print(sum(size for size in sizes.values() if size < 5e8) / (16 * 400 * 400))  # a bucket has 10^9 bytes
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_states_are_what_deepspeed_holds_on_two_workers(stage: int) -> None:
    """Bytes a weight in bf16, of all tensors that are alive after a backward pass, but for the buckets (and the last
    gradient on its way). Matrices are large enough for ZeRO 3 to cut them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT, str(stage)],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate(timeout=140)[0] for rank in ranks]
    states = training_memory(BILLION, "sft", TrainConfig(dtype="bf16", zero_stage=stage), workers=2).states
    for output in outputs:
        assert float(output.split()[-1]) == pytest.approx(states / 1e9, rel=0.02)
