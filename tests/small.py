"""Settings of trainings that take a second: `--set` texts over a preset."""

BLT = [
    "model.local_dim=16",
    "model.local_heads=2",
    "model.cross_heads=2",
    "model.global_dim=32",
    "model.global_heads=2",
    "model.global_layers=1",
    "model.decoder_layers=1",
    "model.attention_window=16",
    "model.ngram_rows=64",
    "entropy_model.layers=1",
    "entropy_model.dim=16",
    "entropy_model.attention_window=16",
    "entropy_model_train.steps=3",
    "entropy_model_train.context_length=64",
    "entropy_model_train.batch=2",
]
TRAINED = [
    "train.context_length=64",
    "train.batch=2",
    "train.warmup_steps=2",
    "train.precision=float32",
    "train.sample_bytes=0",
]
