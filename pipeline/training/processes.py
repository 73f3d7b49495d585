"""Lightning's view of the processes of a stage: chosen by their launcher rather than guessed."""

from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from typing_extensions import override

from pipeline.launch.identity import ProcessIdentity, this_process


def process_environment(world_size: int) -> ClusterEnvironment:
    """Where the first process starts the others, and where it is alone, Lightning's own."""
    process = this_process()
    return LightningEnvironment() if process.world_size is None or world_size == 1 else LaunchedProcesses(process)


class LaunchedProcesses(ClusterEnvironment):
    """Processes that a launcher has started, one for each device."""

    def __init__(self, process: ProcessIdentity) -> None:
        super().__init__()
        self._process = process

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return self._process.address

    @property
    @override
    def main_port(self) -> int:
        return self._process.port

    @staticmethod
    @override
    def detect() -> bool:
        return False  # never guessed

    @override
    def world_size(self) -> int:
        assert self._process.world_size is not None, "a launcher that starts all processes knows how many"
        return self._process.world_size

    @override
    def set_world_size(self, size: int) -> None:
        assert size == self.world_size(), f"{size} processes are wanted and {self.world_size()} were started"

    @override
    def global_rank(self) -> int:
        return self._process.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        assert rank == self._process.rank, f"process {self._process.rank} is taken for {rank}"

    @override
    def local_rank(self) -> int:
        return self._process.local_rank

    @override
    def node_rank(self) -> int:
        return self._process.node_rank
