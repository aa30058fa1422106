"""Batch -> adapter: assembly, one step, the loop, checkpoints, the report, the results."""
