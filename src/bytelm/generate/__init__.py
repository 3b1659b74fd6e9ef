"""Prompts in, bytes out: sampling, stop sequences, and text that is valid UTF-8 on demand."""
