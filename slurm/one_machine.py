"""A real Slurm cluster on this machine: to try `unclip submit`, and for the tests.

    python slurm/one_machine.py
    python slurm/one_machine.py -- unclip submit

The first lasts until Ctrl-C and prints what to export, the second is for one command.

Two nodes of four CPUs and two pretended GPUs each, in a private directory, as the user who starts it, with nothing
under /etc and no systemd. Memory limits hold where the memory cgroup (version 1) can
be written, as root. The partition `main` can be preempted by `high`. `sacct` works where slurmdbd and MariaDB are
installed. Other clusters on the machine do not disturb it: ports and job ids are its own. Everything ends with this
process: on Ctrl-C, SIGTERM, at the end of its standard input when that is a pipe, and with the jobs that run.

Debian and Ubuntu: `sudo apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge`, and for
`sacct` slurmdbd mariadb-server-core mariadb-client-core.
"""

import argparse
import ctypes
import getpass
import os
import random
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from string import Template
from types import FrameType

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
FOR_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
PACKAGES = "slurmctld slurmd slurm-client munge"
CONFIGURATION = Path(__file__).with_suffix(".conf")
SECONDS_TO_START = 180.0
SECONDS_BEFORE_A_RESTART = 5.0
PORTS = range(30000, 32768)
"""Below those that the kernel gives to outgoing connections, any of which could take a port before its daemon does."""
MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
_PR_SET_CHILD_SUBREAPER = 36
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A running cluster in `directory`, which must be short enough for a socket's path (about 80 characters)."""

    def __init__(self, directory: Path, nodes: int = 2) -> None:
        self.directory = directory
        self.conf = directory / "slurm.conf"
        self._nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.conf)}
        self._is_stopping = threading.Event()
        self._ports = random.sample(PORTS, len(PORTS))
        self._has_accounting = all(map(_find, FOR_ACCOUNTING))
        self._limits_memory = os.access(MEMORY_CGROUP, os.W_OK)

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("run", "log", "state", *(f"spool/{node}" for node in self._nodes)):
            (self.directory / name).mkdir(parents=True, mode=0o755)
        self._start_munge()
        database_port = self._start_database() if self._has_accounting else None
        self._write_configuration(database_port)
        self._start("slurmctld", "-D")
        for node in self._nodes:
            threading.Thread(target=self._keep_node, args=(node,), daemon=True).start()
        self._wait("the nodes", lambda: self._done("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"])

    def _keep_node(self, node: str) -> None:
        """A node's daemon, started again when it dies, as an init system would."""
        while not self._is_stopping.is_set():
            daemon = self._start("slurmd", "-D", "-N", node, log=node)
            while psutil.pid_exists(daemon.pid) and not _is_dead(psutil.Process(daemon.pid)):
                if self._is_stopping.wait(1.0):
                    return
            self._is_stopping.wait(SECONDS_BEFORE_A_RESTART)

    def stop(self) -> None:
        """Kill every process of the cluster, its jobs too."""
        self._is_stopping.set()
        _kill(psutil.Process().children(recursive=True))
        for node in self._nodes if self._limits_memory else ():
            for left, _, _ in os.walk(MEMORY_CGROUP / f"slurm_{node}", topdown=False):
                with suppress(OSError):  # one that another cluster has jobs in
                    Path(left).rmdir()

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        run = self.directory / "run"
        self._start(
            "munged", "--foreground", "--force", f"--socket={run}/munge.sock", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--seed-file={run}/munge.seed", f"--log-file={self.directory}/log/munged",
        )  # fmt: skip
        self._wait("munged", (run / "munge.sock").exists)

    def _start_database(self) -> int:
        data, client = self.directory / "database", self.directory / "run" / "mariadb.sock"
        port, dbd_port = self._free_port(), self._free_port()
        me = getpass.getuser()
        self._run(
            "mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={me}", "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )  # fmt: skip
        self._start(
            "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={client}", f"--user={me}",
            "--bind-address=127.0.0.1", f"--port={port}", f"--pid-file={self.directory}/run/mariadb.pid",
        )  # fmt: skip
        self._wait("mariadbd", client.exists)
        account = "create user slurm@'127.0.0.1' identified by 'slurm'; grant all on *.* to slurm@'127.0.0.1'"
        self._run("mariadb", "--no-defaults", f"--socket={client}", "--user=root", "-e", account)
        conf = self.directory / "slurmdbd.conf"
        conf.touch(mode=0o600)
        conf.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.directory}/run/munge.sock\nDbdHost={_host()}\n"
            f"DbdAddr=127.0.0.1\nDbdPort={dbd_port}\nSlurmUser={me}\nPidFile={self.directory}/run/slurmdbd.pid\n"
            f"LogFile={self.directory}/log/slurmdbd\nStorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={port}\nStorageUser=slurm\nStoragePass=slurm\nStorageLoc=slurm_accounting\n"
        )
        return dbd_port

    def _write_configuration(self, database_port: int | None) -> None:
        here, me, host = self.directory, getpass.getuser(), _host()
        accounting = (
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={database_port}\nAccountingStoragePass={here}/run/munge.sock"
            if database_port is not None
            else f"JobCompType=jobcomp/filetxt\nJobCompLoc={here}/log/jobcomp.txt"
        )
        loopback = (
            "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
            if socket.gethostbyname(socket.gethostname()).startswith("127.")
            else ""
        )
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._free_port()} CPUs=4 Sockets=1 "
            "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=16384 Gres=gpu:2 State=UNKNOWN"
            for node in self._nodes
        )
        task_plugin = "task/none"
        if self._limits_memory:
            task_plugin = "task/cgroup"
            (here / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\nConstrainSwapSpace=yes\n")
        template = Template(CONFIGURATION.read_text(encoding="utf-8"))
        configuration = template.substitute(
            host=host, me=me, here=here, port=self._free_port(), first_job=random.randrange(1, 60000),
            task_plugin=task_plugin, loopback=loopback, accounting=accounting, nodes=nodes,
        )  # fmt: skip
        self.conf.write_text(configuration)
        names = f"node[1-{len(self._nodes)}]"
        (here / "gres.conf").write_text(
            f"NodeName={names} Name=gpu File=/dev/null\nNodeName={names} Name=gpu File=/dev/zero\n"
        )
        if database_port is not None:
            self._start("slurmdbd", "-D")
            self._wait("slurmdbd", lambda: _is_open(database_port))
            self._wait("accounting", lambda: self._succeeds("sacctmgr", "-i", "add", "cluster", "one_machine"))

    def _free_port(self) -> int:
        """A port that nobody has, and no other daemon of this cluster will have."""
        while True:
            port = self._ports.pop()
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("", port))
                return port

    def _start(self, program: str, *arguments: str, log: str | None = None) -> subprocess.Popen[bytes]:
        command = [_find(program) or program, *arguments]
        with (self.directory / "log" / f"{log or program}.out").open("w") as output:
            # Sessions of their own: a Ctrl-C at the terminal is for this process, which ends them in order.
            return subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=self._environment,
                start_new_session=True,
            )  # fmt: skip

    def _run(self, *command: str) -> None:
        done = self._done(*command)
        if done.returncode != 0:
            raise SystemExit(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")

    def _succeeds(self, *command: str) -> bool:
        done = self._done(*command)
        return done.returncode == 0 or "already exists" in done.stdout + done.stderr

    def _done(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)

    def _wait(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_there():
            if time.monotonic() > deadline:
                raise SystemExit(f"{what} did not come up in {SECONDS_TO_START:.0f} s; see {self.directory}/log")
            time.sleep(0.05)


def main() -> int:
    """Start the cluster, run the command or wait, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs="*", help="a command to run; without one, wait")
    options = parser.parse_args()
    missing = [name for name in NEEDED if _find(name) is None]
    if missing:
        print(f"{', '.join(missing)} are not installed; sudo apt-get install -y {PACKAGES}", file=sys.stderr)
        return 2
    # Slurm's steps detach themselves: as their reaper this process still sees them, and can end them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _exit)
    threading.Thread(target=_reap, daemon=True).start()
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    cluster = Cluster(directory, options.nodes)
    try:
        cluster.start()
        return _serve(cluster, options.command)
    except KeyboardInterrupt:
        return 0
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _serve(cluster: Cluster, command: list[str]) -> int:
    if command:
        return subprocess.run(command, check=False, env={**os.environ, "SLURM_CONF": str(cluster.conf)}).returncode
    print(f"export SLURM_CONF={cluster.conf}", flush=True)
    if sys.stdin.isatty() or not stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        signal.pause()
    select.select([sys.stdin], [], [])
    return 0


def _exit(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _reap() -> None:
    """Collect the dead steps that were handed to this process.

    Only those that were dead at the last look too: a command that somebody waits for is collected by its waiter.
    """
    seen: set[int] = set()
    while True:
        time.sleep(0.5)
        dead = {child.pid for child in psutil.Process().children() if _is_dead(child)}
        for pid in dead & seen:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        seen = dead


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    """Kill processes and whatever they leave behind, until nothing is left."""
    while processes:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        processes = [each for each in psutil.Process().children(recursive=True) if not _is_dead(each)]


def _find(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _host() -> str:
    return socket.gethostname().partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
