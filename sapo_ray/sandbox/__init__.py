"""Where model-written programs run and are judged: see docs/sandbox.md."""

from sapo_ray.sandbox.config import SandboxConfig
from sapo_ray.sandbox.program import Program, Verdict, asserts_program, humaneval_program, mbpp_program
from sapo_ray.sandbox.sandbox import Sandbox, SandboxError

__all__ = [
    "Program",
    "Sandbox",
    "SandboxConfig",
    "SandboxError",
    "Verdict",
    "asserts_program",
    "humaneval_program",
    "mbpp_program",
]
