"""What changes to a text cost a model, and what it knows of its characters: one perturbation or task a file.

Each is found by its file name, `bytelm robust RUN --suite noise`; `base.py` has what they are made of. All of them are
likelihoods of bytes after bytes, so that small models score too, and all are made from a seed: the same texts give the
same queries to every model, on every machine. Nothing is downloaded.
"""
