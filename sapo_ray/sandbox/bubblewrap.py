"""The command that puts a process into a sandbox of bubblewrap.

It gets namespaces of its own (user, pid, network, ipc, uts, mounts), no capability and no way to more of either, the
system's libraries and the interpreter read-only, an empty /tmp of limited size, and no /proc. Root takes two steps: as
the unprivileged user that it becomes could not always reach the interpreter (in /root, say), a first bubblewrap shows
that at another place. Being another user than root matters: limits on processes do not hold for root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_NOBODY = "65534"
_REACHABLE = "/tmp/python"
_OLDEST = (0, 8)
"""The first version with --disable-userns."""


def interpreter() -> str:
    """The Python under the virtual environment that this process may run in."""
    return os.path.realpath(sys.executable)


def command(file_mib: int) -> list[str]:
    """What to write before a command to run it in a sandbox."""
    bwrap, prefix = shutil.which("bwrap") or "bwrap", sys.base_prefix
    before, source = [], prefix
    if os.geteuid() == 0:
        # The end of a parent that is another user kills nobody: the first bubblewrap's pid namespace does it instead.
        before = [bwrap, "--die-with-parent", "--unshare-pid", "--dev-bind", "/", "/", "--proc", "/proc"]
        before += ["--tmpfs", "/tmp", "--ro-bind", prefix, _REACHABLE]
        setpriv = shutil.which("setpriv") or "setpriv"
        before += ["--", setpriv, "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups", "--"]
        source = _REACHABLE
    python = [] if Path(prefix).is_relative_to("/usr") else ["--ro-bind", source, prefix]
    return [
        *before,
        bwrap,
        *("--unshare-all", "--unshare-user", "--disable-userns", "--uid", _NOBODY, "--gid", _NOBODY),
        *("--cap-drop", "ALL", "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session", "--as-pid-1"),
        *("--ro-bind", "/usr", "/usr", "--ro-bind-try", "/lib", "/lib", "--ro-bind-try", "/lib64", "/lib64"),
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", *python),
        *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
        *("--size", str(file_mib * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"),
        "--",
    ]


def fault() -> tuple[str, str] | None:
    """Why bubblewrap does not work here, and what mends it; None where it works."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "none", "apt-get install -y bubblewrap"
    said = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    version = re.search(r"([0-9]+)\.([0-9]+)", said)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST:
        return f"{said or 'its version'} is too old", "install bubblewrap 0.8 or newer (Debian 12, Ubuntu 24.04)"
    trial = subprocess.run(
        [*command(1), interpreter(), "-S", "-c", ""], env={}, capture_output=True, text=True, check=False, cwd="/"
    )
    if trial.returncode:
        reason = (trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"])[-1]
        return reason, "allow user namespaces here (docs/sandbox.md says how)"
    return None
