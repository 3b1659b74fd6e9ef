"""The configuration of a model, as `transformers` keeps it: the recipe that checkpoints hold, and no second one."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from bytelm.checkpoint import pretrained
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build
from bytelm.errors import ConfigError
from bytelm.units import BOS, EOS, PAD, VOCAB


class BytelmConfig(PreTrainedConfig):
    """`recipe`: model, patching, scorer and modality, as `config.to_mapping` gives a `Recipe`. `context`: bytes.

    The ids are those of `bytelm.units` for every model, whatever is passed for them.
    """

    model_type = pretrained.TYPE

    recipe: dict[str, Any] | None = None
    context: int = 0
    vocab_size: int = VOCAB
    pad_token_id: int | None = PAD
    bos_token_id: int | None = BOS
    eos_token_id: int | list[int] | None = EOS
    tie_word_embeddings: bool = False

    def built(self) -> Recipe:
        """The recipe. Raises ConfigError for none, and for one that cannot be used."""
        if self.recipe is None:
            raise ConfigError("BytelmConfig has no recipe: pass one, or take the configuration of a saved model")
        return build(Recipe, self.recipe, "recipe")
