"""What bytes stand for where a document is not simply a file: one modality a file, found by its name."""
