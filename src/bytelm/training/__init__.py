"""Training, from files to a finished run: `finish.train`, which is `bytelm.train`."""
