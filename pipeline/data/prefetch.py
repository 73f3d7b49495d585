"""Streams remote shards to the cache before they are read. Imports no torch."""

import queue
import threading
from collections.abc import Sequence

from pipeline.data.reader import SampleReader
from pipeline.data.shards import is_url
from pipeline.errors import UserError

_THREADS = 4


class ShardPrefetch:
    """Fetches remote shards in the background, in the order in which they are wanted.

    A shard that cannot be fetched is left to the reader, who says why.
    """

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader
        self._remote = {number for number, shard in enumerate(reader.index.shards) if is_url(shard.name)}
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._wanted: frozenset[int] = frozenset()
        self._is_running = False
        self._stopped = threading.Event()

    @property
    def is_needed(self) -> bool:
        """Whether any shard is remote."""
        return bool(self._remote)

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these shards (numbers in the index), unless they were wanted the last time."""
        if not self._is_running:  # late, since threads do not survive the fork of loader workers
            self._is_running = True
            for _ in range(_THREADS):
                threading.Thread(target=self._fetch, daemon=True).start()
        for shard in shards:
            if shard in self._remote and shard not in self._wanted:
                self._queue.put(shard)
        self._wanted = frozenset(shards)

    def _fetch(self) -> None:
        while (shard := self._queue.get()) is not None:
            try:
                if not self._stopped.is_set():
                    self._reader.fetch(shard)
            except (UserError, OSError) as error:  # the reader meets it too, and raises it where it is seen
                print(f"warning: {self._reader.index.shards[shard].name} was not fetched ahead ({error})", flush=True)
            finally:
                self._queue.task_done()

    def stop(self) -> None:
        """Fetch nothing more; what is being fetched is finished."""
        self._stopped.set()
        if self._is_running:
            for _ in range(_THREADS):
                self._queue.put(None)

    def wait(self) -> None:
        """Wait until everything that was wanted is there, or was tried."""
        self._queue.join()
