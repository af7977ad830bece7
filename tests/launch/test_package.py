"""What a job is made of, and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from launch import package
from launch.package import pack
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError

ROOT = Path(__file__).parents[2]


def unpacked(config: Path, folder: Path) -> tuple[Path, str]:
    """Where the package of a config lies unpacked, and the config's path in it."""
    name = pack(config, folder / "package.zip")
    with zipfile.ZipFile(folder / "package.zip") as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked", name


def test_a_package_holds_the_packages_and_the_configs(tmp_path: Path) -> None:
    folder, name = unpacked(ROOT / "tests" / "configs" / "tiny.yaml", tmp_path)
    assert name == "tests/configs/tiny.yaml"
    assert {path.name for path in folder.iterdir()} == {"launch", "actors", "sapo_ray", "configs", "tests"}
    assert [str(path.relative_to(folder)) for path in (folder / "tests").rglob("*.*")] == [name]
    for source in ("launch", "actors", "sapo_ray", "configs"):
        here = {path.relative_to(ROOT) for path in (ROOT / source).rglob("*.*")}
        there = {path.relative_to(folder) for path in (folder / source).rglob("*.*")}
        assert there == {path for path in here if "__pycache__" not in path.parts}


@pytest.mark.parametrize("directory", ["mine", "mine/deeper"])
def test_a_config_from_elsewhere_comes_with_all_that_it_extends(tmp_path: Path, directory: str) -> None:
    own, base = tmp_path / directory / "own.yaml", tmp_path / "base" / "base.yaml"
    own.parent.mkdir(parents=True)
    base.parent.mkdir()
    up = "../" * len(own.parent.relative_to(tmp_path).parts)
    own.write_text(f"extends: {up}base/middle.yaml\nrounds: 7\n")
    (base.parent / "middle.yaml").write_text("extends: base.yaml\nseed: 5\n")
    base.write_text("seed: 4\nsft.epochs: ${rounds}\n")
    folder, name = unpacked(own, tmp_path)
    assert name.startswith("config/")
    config = load_config(RunConfig, folder / name)
    assert (config.rounds, config.seed, config.sft.epochs) == (7, 5, 7)
    assert config == load_config(RunConfig, own)


def test_a_config_that_extends_the_checkouts_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(f"extends: {Path(*['..'] * 20)}{ROOT}/configs/chain.yaml\nseed: 3\n")
    folder, name = unpacked(Path("own.yaml"), tmp_path)
    assert load_config(RunConfig, folder / name) == load_config(RunConfig, "own.yaml")


def test_an_absolute_path_is_not_extended(tmp_path: Path) -> None:
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("seed: 4\n")
    own.write_text(f"extends: {base}\n")
    with pytest.raises(SapoError, match=rf"own\.yaml: extends {base}; a job needs it as a path relative to "):
        pack(own, tmp_path / "package.zip")


def test_a_package_over_the_limit_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "UPLOAD_LIMIT", 2**14)
    with pytest.raises(SapoError, match=r"the job's package has 0\.\d MiB, more than the 0\.015625 MiB that Ray takes"):
        pack(ROOT / "configs" / "local.yaml", tmp_path / "package.zip")


def test_the_package_is_far_below_the_limit(tmp_path: Path) -> None:
    pack(ROOT / "configs" / "local.yaml", tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < package.UPLOAD_LIMIT / 100
