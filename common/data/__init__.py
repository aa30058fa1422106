"""Pictures and captions -> Batch: reading, framing, encoding once, the cache."""
