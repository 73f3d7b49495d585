"""From shards to batches. Every draw is a function of (seed, epoch, sample)."""
