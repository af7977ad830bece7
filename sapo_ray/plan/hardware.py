"""The GPUs that a plan can be made for."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """A GPU, by its maker's data sheet, and what an hour of it is taken to cost."""

    name: str
    gib: float
    """Memory in GiB: the data sheet's gigabytes. Driver and CUDA context take some hundred MiB of it."""
    tflops: float
    """Peak dense bf16 FLOPs a second, with sums in fp32, in 10^12."""
    gb_per_second: float
    """Memory bandwidth in 10^9 bytes a second."""
    price: float
    """US dollars an hour: an assumption, within what clouds asked in 2025."""

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.gib * GIB


GPUS = {
    "h100": GPU("H100 SXM", 80, 989, 3350, 3.0),
    "h200": GPU("H200 SXM", 141, 989, 4800, 4.0),
    "a100-80": GPU("A100 SXM 80 GB", 80, 312, 2039, 2.0),
    "a100-40": GPU("A100 SXM 40 GB", 40, 312, 1555, 1.5),
    "l40s": GPU("L40S", 48, 362, 864, 1.2),
    "a10g": GPU("A10G", 24, 70, 600, 1.0),
    "rtx-4090": GPU("GeForce RTX 4090", 24, 165, 1008, 0.5),
}

MOST_GIB = {"H100": 94, "H200": 141, "A100": 80, "L40S": 48, "A10G": 24, "GeForce-RTX-4090": 24}
"""The most memory, in GiB, that a card has which Ray calls by this accelerator type: it does not tell an A100 of 40 GB
from one of 80, nor an H100 SXM from an H100 NVL."""
