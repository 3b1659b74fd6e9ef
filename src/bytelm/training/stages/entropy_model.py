"""The stage that trains the entropy model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bytelm.checkpoint import store
from bytelm.data.corpus import Corpus
from bytelm.device import fitting
from bytelm.interfaces.model import ByteModel
from bytelm.patching.entropy import EntropyModel
from bytelm.training.config import TrainConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from bytelm.training.stages.base import Count, Stage, sampled
from bytelm.training.stop import Interrupted
from bytelm.training.windows import WindowsOf
from bytelm.transfer import HOST

COUNTED = 1 << 25  # bytes that are counted at most


class TrainableEntropyModel(EntropyModel, Protocol):
    """An entropy model built by the module `entropy_model` of an architecture."""

    @property
    def weights(self) -> nn.Module:
        """The module that checkpoints contain."""
        ...

    def fit(self, documents: Callable[[], Sequence[NDArray[np.uint8]]], train: Callable[[ByteModel], None]) -> None:
        """Count the documents, or train a byte model with `train`."""
        ...


@dataclass
class EntropyModelStage(Stage[TrainableEntropyModel]):
    """The entropy model of `config`, in a separate run; trained by `train`, logged to `journal`."""

    name = "fitting entropy model"
    path: Path
    config: Any
    train: TrainConfig
    seed: int
    corpus: Corpus
    journal: Journal
    aligned: bool = False
    device: torch.device = HOST
    dist: DistContext = SINGLE_PROCESS

    def done(self) -> bool:
        """See `Stage`: whether the budget is used up. A checkpoint without bytes is of counts."""
        if not store.checkpoints(self.path):
            return False
        state = store.read_state(store.newest_good(self.path)[0])
        try:
            reached = (state[key] for key in ("step", "bytes", "seconds"))
            return "bytes" not in state or self.train.budget.fraction(*reached) >= 1
        except (KeyError, TypeError):
            return False  # not a checkpoint of ours: the training reports it

    def load(self) -> TrainableEntropyModel:
        """See `Stage`."""
        model: TrainableEntropyModel = self.config.build()
        path, _ = store.newest_good(self.path)
        tensors = store.read_tensors(path, "model")
        store.check_keys(model.weights.state_dict(), tensors, str(path))
        model.weights.load_state_dict(tensors)
        model.weights.to(self.device)
        return model

    def make(self, count: Count) -> TrainableEntropyModel:
        """See `Stage`."""
        self.path.mkdir(exist_ok=True)
        model: TrainableEntropyModel = self.config.build()
        model.fit(lambda: sampled(self.corpus, COUNTED, count), self.trained)
        if not store.checkpoints(self.path):
            store.save(self.path, 1, {"model": model.weights.state_dict()}, {})
        return self.load()

    def trained(self, model: ByteModel) -> None:
        """Train a byte model, or resume from its newest checkpoint. Raises Interrupted."""
        train = self.train
        model.init_weights(self.seed)
        model.to(self.device)
        windows = WindowsOf(self.corpus, train.context_length, self.aligned)
        sampler, valid = windows.training(train.batch, train.seed, limited=False), windows.held_out()
        trainer = Trainer(model, train, sampler, self.path, self.journal, valid=valid, dist=self.dist.alone())
        half = f"--set entropy_model_train.batch={max(1, train.batch // 2)} halves it"
        with fitting(self.device, "a step of the entropy model", lambda: half):
            outcome = trainer.fit()
        if outcome.signal is not None:
            raise Interrupted(outcome.signal)
