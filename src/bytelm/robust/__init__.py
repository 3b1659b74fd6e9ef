"""`bytelm robust`: models asked the same suites of queries (`evaluate.robustness`), and their answers as figures."""
