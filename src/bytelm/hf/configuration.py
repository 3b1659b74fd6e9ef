"""The configuration of a model, for `transformers`: the recipe, as in checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from bytelm.checkpoint import pretrained
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build
from bytelm.errors import ConfigError
from bytelm.units import VOCAB


class BytelmConfig(PreTrainedConfig):
    """`recipe`: model, patching, entropy model and modality, as `config.to_mapping` gives a `Recipe`. `context`: bytes.

    The ids are those of `bytelm.units` for every model, whatever is passed for them.
    """

    model_type = pretrained.TYPE
    attribute_map = {"max_position_embeddings": "context"}  # noqa: RUF012  # where tools read a model's context length

    def __init__(self, recipe: dict[str, Any] | None = None, context: int = 0, **kwargs: Any) -> None:
        self.recipe = recipe
        self.context = context
        fixed: dict[str, Any] = {**pretrained.SPECIALS, "tie_word_embeddings": False}
        super().__init__(**{**kwargs, **fixed})
        self.vocab_size = VOCAB

    def built(self) -> Recipe:
        """The recipe. Raises ConfigError for none, and for one that cannot be used."""
        if self.recipe is None:
            raise ConfigError("BytelmConfig has no recipe: pass one, or take the configuration of a saved model")
        return build(Recipe, self.recipe, "recipe")
