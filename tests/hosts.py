"""Two hosts on one machine: each has its own network, hostname, processes and sshd, and a cable joins them.

A host is a set of Linux namespaces around a first process that reads a pipe from pytest. When pytest ends, however it
ends, the pipe does; then the kernel kills whatever runs on the host and takes its network away. So nothing is left
behind, and nothing has a name that another run could meet. Disks are shared, as a cluster's storage is.

Inside, all is as on a real cluster: names are in /etc/hosts, `ssh beta` works with keys from /etc/ssh, the network
card is eth0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psutil

ADDRESSES = {"alpha": "10.213.0.1", "beta": "10.213.0.2"}
PATIENCE_SECONDS = 20.0
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
"""
SSH = """
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
BatchMode yes
ServerAliveInterval 4
"""


class NoHosts(Exception):
    """Why they cannot be made here: the reason for which tests are skipped."""


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """alpha and beta, whose files lie in `folder`. Raises `NoHosts`."""
    key = folder / "key"
    _call(_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    with ExitStack() as stack:
        alpha, beta = (stack.enter_context(closing(Host(name, folder / name))) for name in ADDRESSES)
        ends = [f"name eth0 netns {host.pid}".split() for host in (alpha, beta)]
        _call(_tool("ip"), "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in (alpha, beta):
            host.configure(key)
        yield alpha, beta


class Host:
    def __init__(self, name: str, folder: Path) -> None:
        """Starts with nothing but its first process. Raises `NoHosts`."""
        self.name, self.address, self._folder = name, ADDRESSES[name], folder
        command = [_tool("unshare"), *NAMESPACES, "--mount-proc", "--fork", "cat"]
        self._unshare = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.pid = self._first_process()

    def words(self, *command: str, cwd: Path = Path("/")) -> list[str]:
        """The command line that runs another one here."""
        return [_tool("nsenter"), "--target", str(self.pid), *NAMESPACES, "env", "--chdir", str(cwd), *command]

    def run(self, *command: str) -> str:
        """What a short command said that had to succeed. Raises `NoHosts`."""
        return _call(*self.words(*command))

    def configure(self, key: Path) -> None:
        """Name, address and sshd, once the cable is there. key: opens both hosts. Raises `NoHosts`."""
        self.run("hostname", self.name)
        self.run(_tool("ip"), "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run(_tool("ip"), "link", "set", "lo", "up")
        self.plug()
        hosts, ssh = self._write_files(key)
        self.run("mount", "--bind", str(hosts), "/etc/hosts")
        self.run("mount", "--bind", str(ssh), "/etc/ssh")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        self.run("mkdir", "/run/sshd")
        self.run(_tool("sshd"), "-E", str(self._folder / "sshd.log"))

    def plug(self) -> None:
        self.run(_tool("ip"), "link", "set", "eth0", "up")

    def unplug(self) -> None:
        """The cable, at this end: here the network is unreachable; at the other end, nothing answers any more."""
        self.run(_tool("ip"), "link", "set", "eth0", "down")

    def reach(self, other: Host) -> None:
        """Until ssh gets there: after a cut, a kernel refuses for seconds to ask again who has an address."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.run("ssh", other.name, "true")
                return
            except NoHosts:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def holds(self, process: psutil.Process) -> bool:
        """Whether it runs here, as the kernel sees it."""
        ours, its = (Path(f"/proc/{pid}/ns/net") for pid in (self.pid, process.pid))
        return its.exists() and os.readlink(ours) == os.readlink(its)

    def received_bytes(self) -> int:
        """Over the cable, so far."""
        cards = dict(line.split(":") for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()[2:])
        return int(next(numbers for name, numbers in cards.items() if name.strip() == "eth0").split()[0])

    def close(self) -> None:
        """With every process on it."""
        self._unshare.communicate()  # closes the pipe

    def _first_process(self) -> int:
        """Once it is there. Raises `NoHosts`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._unshare.poll() is None and time.monotonic() < deadline:
            for child in psutil.Process(self._unshare.pid).children():
                if child.name() == "cat":
                    return child.pid
            time.sleep(0.02)
        self._unshare.kill()
        raise NoHosts(f"no namespaces here: {self._unshare.communicate()[1].strip()}")

    def _write_files(self, key: Path) -> tuple[Path, Path]:
        """What becomes /etc/hosts and /etc/ssh."""
        hosts, ssh = self._folder / "hosts", self._folder / "ssh"
        ssh.mkdir(parents=True)
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        hosts.write_text(f"127.0.0.1 localhost\n{names}")
        (ssh / "sshd_config").write_text(SSHD)
        (ssh / "ssh_config").write_text(SSH)
        for file in (key, key.with_suffix(".pub")):
            shutil.copy(file, ssh)
        _call(_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "host_key"))
        return hosts, ssh


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise NoHosts(f"no {name} here")
    return path


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    if done.returncode != 0:
        raise NoHosts(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()}")
    return done.stdout
