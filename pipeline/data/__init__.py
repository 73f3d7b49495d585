"""From shards to batches: index, splits, order, decoding, loading. Every draw is a function of (seed, epoch, sample)."""
