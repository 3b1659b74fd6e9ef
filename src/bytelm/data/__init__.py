"""From any files to batches: sources, packed shards, recorded boundaries, sampled windows. NumPy only, no torch."""
