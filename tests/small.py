"""Settings of trainings that take a second: `--set` texts over a preset."""

BLT = [
    "model.local_dim=16",
    "model.local_heads=2",
    "model.cross_heads=2",
    "model.global_dim=32",
    "model.global_heads=2",
    "model.global_layers=1",
    "model.decoder_layers=1",
    "model.window=16",
    "model.ngram_rows=64",
    "scorer.layers=1",
    "scorer.dim=16",
    "scorer.window=16",
    "scorer_train.steps=3",
    "scorer_train.window=64",
    "scorer_train.batch=2",
]
TRAINED = ["train.window=64", "train.batch=2", "train.warmup=2", "train.precision=float32", "train.sample_bytes=0"]
