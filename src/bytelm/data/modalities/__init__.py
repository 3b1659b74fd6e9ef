"""Modalities: what the bytes of documents represent. One per file, found by its name."""
