"""Counts what could not be used, by reason; stops a stage that finds too much of it. Imports no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.data.decode import DecodeFault
from pipeline.data.summary import IndexSummary, ShardEntry
from pipeline.errors import UserError

MIN_SAMPLES = 256
"""So many samples must be read before their faulty share says anything."""

_SHOWN_SHARDS = 3


class FaultTally:
    """Samples read, and of them those that were replaced, by the reason."""

    def __init__(self, read: int = 0, by_reason: Mapping[str, int] | None = None) -> None:
        self.read = read
        self.by_reason = Counter(by_reason or {})

    @property
    def faulty(self) -> int:
        """Samples that were replaced."""
        return self.by_reason.total()

    def add(self, read: int, faults: Mapping[DecodeFault, int]) -> None:
        """Count a batch of `read` samples."""
        self.read += read
        for fault, count in faults.items():
            self.by_reason[fault.value] += count

    def metrics(self) -> dict[str, float]:
        """`data/faulty` and `data/faulty_<reason>`, in samples; {} while everything was good."""
        if not self.faulty:
            return {}
        reasons = {f"data/faulty_{reason}": float(count) for reason, count in sorted(self.by_reason.items())}
        return {"data/faulty": float(self.faulty), **reasons}

    def is_over(self, max_share: float) -> bool:
        """Whether more than that share of the samples was faulty, once enough of them were read to say so."""
        return self.read >= MIN_SAMPLES and self.faulty > max_share * self.read


def check_left_out(shards: Sequence[ShardEntry], max_share: float) -> None:
    """Raise `UserError` where more than that share of what the shards hold is no complete sample."""
    summary = IndexSummary(tuple(shards), "")
    left_out = FaultTally(summary.samples + summary.left_out.total(), summary.left_out)
    if left_out.is_over(max_share):
        raise too_many_faults(left_out, max_share, {shard.name: sum(shard.left_out.values()) for shard in shards})


def too_many_faults(tally: FaultTally, max_share: float, faulty_by_shard: Mapping[str, int]) -> UserError:
    """The error that names the reasons and the worst shards."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.by_reason.most_common())
    worst = Counter(faulty_by_shard).most_common(_SHOWN_SHARDS)
    shards = ", ".join(f"{name} ({count:,})" for name, count in worst)
    return UserError(
        f"{tally.faulty:,} of {tally.read:,} samples cannot be used ({reasons}), most in {shards}; replace these "
        f"shards, or allow more than trainer.max_faulty_share={max_share}"
    )
