"""A model of bytes under the interface of `transformers`: logits, loss, cache and folder are as its users know them.

Two things are bytelm's own. A masked position becomes PAD, a position that does not exist, so that rows may be padded
on either side; and the cache is the model's state, so that what is generated with it is what is generated without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from bytelm.checkpoint import pretrained
from bytelm.errors import CheckpointError, UsageError
from bytelm.hf.configuration import BytelmConfig
from bytelm.lm import LM
from bytelm.models.base import ByteModel
from bytelm.nn.state import take_rows
from bytelm.units import BOS, PAD, VOCAB

IGNORED = -100  # a label that is not learnt, everywhere in transformers
BLANK = "[More Information Needed]"  # what the Hub's form for model cards says wherever nobody has written anything


class StateCache(Cache):
    """The state of a `ByteModel` as what `generate` hands from step to step. Like every Cache it is written to."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Nothing read."""
        self.state: Any = None
        self.rows = -1
        self.length = 0

    def read(self, model: ByteModel, ids: Tensor) -> Tensor:
        """The logits of `ids` `[batch, new]` after what was read before, PADs among them."""
        logits, self.state = model(ids, model.begin(len(ids)) if self.state is None else self.state)
        self.rows, self.length = len(ids), self.length + ids.shape[1]
        return logits

    @property
    def batch_size(self) -> int:
        """Rows; -1 before anything was read."""
        return self.rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read, PADs among them: columns of the attention mask that are behind us."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order and as often: what beam search asks for."""
        self.state, self.rows = take_rows(self.state, beam_idx), len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same by its other name."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UsageError: a state does not go back."""
        raise UsageError("bytelm's state does not go back: generate without an assistant, or keep a copy of the cache")


class BytelmForCausalLM(PreTrainedModel, GenerationMixin):
    """Any model of bytes that bytelm has. `model` is the plain `ByteModel`.

    The scorer that cuts patches is part of it, is not trained, and stays in float32 whatever `dtype` is asked for:
    where a patch opens must not depend on rounding.
    """

    config_class = BytelmConfig
    supports_gradient_checkpointing = True
    _is_stateful = True  # refuses assisted generation
    _keep_in_fp32_modules_strict = ["patcher"]  # noqa: RUF012  # transformers' own declaration is no ClassVar

    def __init__(self, config: BytelmConfig) -> None:
        """Random weights from `config`. Raises ConfigError for its recipe, UsageError for a model of tokens."""
        super().__init__(config)
        self.model = config.built().assemble()
        pretrained.refuse_tokens(self.model)
        if self.model.device.type != "meta":  # where `from_pretrained` builds what it will fill
            self.model.initialise(0)
        self.gradient_checkpointing = False
        self.generation_config = GenerationConfig.from_dict(pretrained.GENERATION)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the model was initialised by itself, and a folder that lacks a weight is refused."""

    @classmethod
    def from_lm(cls, lm: LM) -> BytelmForCausalLM:
        """The model of an LM, its weights shared. Raises UsageError for one whose recipe is not known, or of tokens."""
        with torch.device("meta"):
            wrapped = cls(BytelmConfig(**pretrained.config(lm.known_recipe(), lm.context)))
        wrapped.model = lm.model
        return wrapped.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers; weights that are missing or unknown, which it would make up or pass over, are refused.

        Raises CheckpointError for those, and ConfigError for a recipe that cannot be used.
        """
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        faults = [f"{len(info[kind])} {kind.removesuffix('_keys')}" for kind in KINDS if info[kind]]
        if faults:
            names = sorted(str(name) for kind in KINDS for name in info[kind])
            raise CheckpointError(
                f"{model.name_or_path} does not hold the weights of this model: {', '.join(faults)}, "
                f"such as {names[0]}: save the model again, or copy the whole folder"
            )
        model.settle()
        return (model, info) if wanted else model

    def settle(self) -> None:
        """What loading leaves undone: a patcher is not trained, and has tables that no file holds."""
        fresh = self.config.built().patcher()
        patcher = getattr(self.model, "patcher", None)
        if fresh is None or patcher is None:
            return
        patcher.requires_grad_(False)
        for name, table in fresh.named_buffers():
            if name not in fresh.state_dict():
                patcher.get_buffer(name).copy_(table)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `.to`, `.half` and their like do to every tensor: of the patcher they change the device alone."""
        patcher = getattr(self.model, "patcher", None)
        before = patcher.state_dict() if patcher is not None else {}
        super()._apply(fn, recurse)
        for name, tensor in patcher.state_dict().items() if patcher is not None else ():
            if tensor.dtype != before[name].dtype:
                self.get_parameter_or_buffer(f"model.patcher.{name}").data = before[name].to(tensor.device)
        return self

    def lm(self) -> LM:
        """The same model as an LM, its weights shared: the faster way to generate, and to measure."""
        recipe = self.config.built()
        modality = recipe.modality.build() if recipe.modality else None
        return LM(self.model, self.config.context, modality, self.config.recipe)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is trained: the scorer, which stays in float32, is not asked."""
        return next(p.dtype for name, p in self.named_parameters() if ".patcher." not in name)

    def get_input_embeddings(self) -> nn.Module:
        """The table of the bytes, or the first of them."""
        tables = ((name, part) for name, part in self.model.named_modules() if isinstance(part, nn.Embedding))
        return next(table for name, table in tables if table.num_embeddings == VOCAB and "patcher." not in name)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Activation checkpointing is bytelm's own, in each stack of layers."""
        self.gradient_checkpointing = enable
        for stage in self.model.stages(1, 1):
            stage.stack.recompute = enable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The first step makes the cache: transformers' own would stay empty."""
        return False

    # --- reading ------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, new, 260]` for `input_ids` `[batch, new]`, and with `labels` the loss: mean nats of a byte.

        `attention_mask` `[batch, read + new]`: 0 for a position that does not exist; it takes the logits of the last
        one before it that does, so that the last column is the end of every row. `labels` `[batch, new]` are those of
        the positions themselves and are shifted here; -100 is not learnt, nor is a BOS, which nothing comes before. A
        BOS right after a BOS has probability 1: the two are one, where tools add one each. A `StateCache` is kept
        where `use_cache` is set or one is given. Raises UsageError for another cache, and for a mask of another shape.
        """
        ids = input_ids
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise UsageError(
                    f"attention_mask has {attention_mask.ndim} axes: give [batch, read + new]; "
                    "documents in one row need no mask, a BOS parts them"
                )
            ids = ids.masked_fill(attention_mask[:, -ids.shape[1] :] == 0, PAD)
        cache = past_key_values
        if cache is None and use_cache:
            cache = StateCache()
        if cache is None:
            logits, _ = self.model(ids)
        elif isinstance(cache, StateCache):
            logits = cache.read(self.model, ids)
        else:
            raise UsageError(f"a {type(cache).__name__} cannot hold bytelm's state: leave past_key_values out")
        real = ids != PAD
        if not bool(real.all()):
            slots = torch.arange(ids.shape[1], device=ids.device)
            newest = torch.where(real, slots, -1).cummax(1).values
            logits = logits.take_along_dim(newest.clamp(min=0)[..., None], 1)
        twice = (ids[:, :-1] == BOS) & (ids[:, 1:] == BOS)
        if bool(twice.any()):
            logits = certain_of_bos(logits, twice)
        loss = None if labels is None else ForCausalLMLoss(logits.contiguous(), learnt(labels, real), VOCAB, **kwargs)
        return CausalLMOutputWithPast(loss, logits[:, -logits_to_keep:], cache)

    # --- folders ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See transformers; a model card is written beside the weights, unless someone has written one there."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.write_card(Path(save_directory))

    def write_card(self, folder: Path) -> None:
        """The model card, unless someone has written one there."""
        path = folder / pretrained.CARD
        ours = pretrained.card(self.config.recipe or {}, self.config.context, self.model)
        there = path.read_text(encoding="utf-8") if path.exists() else BLANK
        # A card that says what another model measured was `LM.save_pretrained`'s; these weights may be others by now.
        if BLANK in there or pretrained.unmeasured(there) == ours:
            path.write_text(ours, encoding="utf-8")

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Where the Hub has no card yet, transformers puts a blank form in its place."""
        self.write_card(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)


KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def learnt(labels: Tensor, real: Tensor) -> Tensor:
    """Labels `[batch, new]` without those that nothing is learnt from: of PADs, of BOS, of the first id of a row.

    A position after PADs is predicted from the last one before them, whose logits the PADs bear.
    """
    first = real & (real.cumsum(1) == 1)
    return labels.masked_fill(~real | first | (labels == BOS), IGNORED)


def certain_of_bos(logits: Tensor, which: Tensor) -> Tensor:
    """Logits `[batch, time, 260]`, at the positions `which` `[batch, time - 1]` of nothing but a BOS.

    No BOS is ever learnt, so that what a model says of one is noise. The evaluation harness puts one before a text that
    its tokenizer has given one to, and scores the second.
    """
    only = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min)
    only[BOS] = 0.0
    return torch.cat([torch.where(which[..., None], only, logits[:, :-1]), logits[:, -1:]], 1)
