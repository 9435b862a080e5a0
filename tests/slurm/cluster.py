"""A SLURM of two nodes on this machine: its own MUNGE, one slurmctld, two slurmd."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.runs import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/slurmd-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(what: str, is_there: Callable[[], bool], seconds: float = 600) -> None:
    """Waits until something holds; a test's own limit, no timing claim."""
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Cluster:
    """The daemons, and the commands that speak to them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        host = socket.gethostname().split(".")[0]
        config = CONFIG.format(host=host, folder=folder, ports=free_ports(3))
        (folder / "slurm.conf").write_text(config)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        (self.folder / "ctld").mkdir()
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        socket_path = self.folder / "munge.socket"
        self._spawn(
            "munged", "--foreground", "--force", *munge, f"--key-file={key}",
            f"--socket={socket_path}",
        )  # fmt: skip
        wait_for("munged", socket_path.exists)
        self._spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            (self.folder / f"slurmd-{node}").mkdir()
            self._spawn("slurmd", "-D", "-N", node)
        wait_for("two idle nodes", lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D") == "2")

    def stop(self) -> None:
        """Cancels what a failed test has left, then ends the daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        with suppress(AssertionError):
            wait_for("an empty queue", lambda: not self("squeue", "-h"), 60)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(timeout=30)

    def _spawn(self, *command: str) -> None:
        program = shutil.which(command[0]) or command[0]
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen([program, *command[1:]], env=self.environment,
                                 stdout=log, stderr=log)
            )  # fmt: skip

    def __call__(self, *command: str, **more: str) -> str:
        """Standard output of a SLURM command, which must succeed unless the daemons still start."""
        done = subprocess.run(
            command, env={**self.environment, **more}, cwd=ROOT, text=True, capture_output=True
        )
        assert done.returncode == 0 or command[0] in ("sinfo", "squeue"), done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> Mapping[str, str]:
        """Fields of `scontrol show job`."""
        fields = self("scontrol", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def log(self) -> str:
        """What the daemons say, for a failing test."""
        return "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
