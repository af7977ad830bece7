from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from pyarrow import fs

from sapo_ray.sandbox import bubblewrap
from tests.architectures import ARCHITECTURES, save_architecture
from tests.disks import Disk

# A shell without job control has its background jobs ignore SIGINT, by which a lost lease, for one, ends a driver.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# How long an example takes says nothing about whether it is right.
settings.register_profile("sapo", deadline=None)
settings.load_profile("sapo")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node's cache, away from the user's own."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["SAPO_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def data() -> Path:
    """Real data sets, which are no part of the project: in `SAPO_DATA`, or beside it."""
    path = Path(os.environ.get("SAPO_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; SAPO_DATA says where it is")
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the paper's models, without their weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        save_architecture(name, folder / name)
    return folder


@pytest.fixture(scope="session")
def needs_bubblewrap() -> None:
    if fault := bubblewrap.fault():
        pytest.skip(f"bubblewrap: {fault[0]}; to mend it: {fault[1]}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a bucket, with `{}` for the path in it, on an S3 server: a process on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The server keeps everything in memory; what it prints goes to a file.
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    keys = {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        while not _answers(port):
            assert server.poll() is None, "the S3 server did not start"
            time.sleep(0.1)
        parameters = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        bucket, _ = fs.FileSystem.from_uri(f"s3://bucket?{parameters}&allow_bucket_creation=true")
        bucket.create_dir("bucket")
        yield f"s3://bucket/{{}}?{parameters}"
    server.kill()
    server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of 8 MiB."""
    disk = Disk(tmp_path / "disk")
    disk.path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={disk.size}", "tmpfs", str(disk.path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", str(disk.path)], check=True)


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new folder may be made: once a local path, once in an object store."""
    if request.param == "local":
        return str(tmp_path / "folder")
    return str(request.getfixturevalue("s3")).format(tmp_path.name)
