"""A byte-level model in the interface of `transformers`: logits, loss, cache, save and load.

Two things are bytelm's own. A masked position becomes PAD, a position that does not exist, so that rows may be padded
on either side; and the cache holds the ids, so that what is generated with it is what is generated without. They are
read by a decoder wherever one may stand for the model's forward pass, which is what makes generation fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from bytelm.checkpoint import pretrained
from bytelm.errors import CheckpointError, UsageError
from bytelm.hf.cache import ByteCache, generating, over_pads
from bytelm.hf.configuration import BytelmConfig
from bytelm.hf.loop import quick_criteria, quick_output, quick_processors
from bytelm.hf.reader import decodable
from bytelm.lm import LM
from bytelm.transfer import to_device, to_host
from bytelm.units import BOS, PAD, VOCAB

IGNORED = -100  # a label without loss, everywhere in transformers
BLANK = "[More Information Needed]"  # the placeholder of the Hub's model card template


class BytelmForCausalLM(PreTrainedModel, GenerationMixin):
    """Any model of bytes that bytelm has. `model` is the plain `ByteModel`.

    The entropy model is part of it, is not trained, and stays in float32 whatever `dtype` is:
    patch boundaries must not depend on rounding.
    """

    config_class = BytelmConfig
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["patcher"]  # noqa: RUF012  # transformers' own declaration is no ClassVar

    def __init__(self, config: BytelmConfig) -> None:
        """Random weights from `config`. Raises ConfigError for its recipe, UsageError for a token model."""
        super().__init__(config)
        self.model = config.built().build()
        pretrained.refuse_tokens(self.model)
        if self.model.device.type != "meta":  # where `from_pretrained` builds what it will fill
            self.model.init_weights(0)
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
        """What loading leaves undone: some weights are not trained, and a patcher has tables that no file holds."""
        recipe = self.config.built()
        for name, parameter in recipe.build_on_meta().named_parameters():
            self.model.get_parameter(name).requires_grad_(parameter.requires_grad)
        fresh, patcher = recipe.patcher(), self.model.patcher
        if fresh is None or patcher is None:
            return
        for name, table in fresh.named_buffers():
            if name not in fresh.state_dict():
                patcher.get_buffer(name).copy_(table)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `.to`, `.half` and their like do to every tensor: of the patcher they change the device alone."""
        patcher = self.model.patcher
        before = patcher.state_dict() if patcher is not None else {}
        super()._apply(fn, recurse)
        for name, tensor in patcher.state_dict().items() if patcher is not None else ():
            if tensor.dtype != before[name].dtype:
                self.get_parameter_or_buffer(f"model.patcher.{name}").data = before[name].to(tensor.device)
        return self

    def lm(self) -> LM:
        """The same model as an LM, its weights shared: it takes and gives bytes, measures and compresses."""
        recipe = self.config.built()
        modality = recipe.modality.build() if recipe.modality else None
        return LM(self.model, self.config.context, modality, self.config.recipe)

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained weights: the entropy model stays in float32."""
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

    # --- generating ---------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers: its loop, over a cache of ours."""
        theirs: Any = super()
        with generating():
            return theirs.generate(*args, **kwargs)

    @property
    def _is_stateful(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Refuses assisted generation: without a decoder, what candidates were read in vain would be read again."""
        return not decodable(self.model)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The cache is ours: transformers' own would stay empty."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A cache with room for what will be generated, unless none is wanted."""
        theirs: Any = super()
        theirs._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ByteCache(generation_config.max_length)
        elif isinstance(cache, ByteCache):
            cache.expected = max(cache.expected, generation_config.max_length)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers, and `hf.loop`."""
        theirs: Any = super()
        return quick_processors(theirs._get_logits_processor(*args, **kwargs))

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers, and `hf.loop`."""
        theirs: Any = super()
        return quick_criteria(theirs._get_stopping_criteria(*args, **kwargs))

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` takes, of the columns `[batch, read + new]` the new ones.

        A cache that has read all of them goes back by one: something has to be read, or there would be no logits.
        Raises UsageError for rows of no ids.
        """
        new = next_sequence_length
        if not input_ids.shape[1]:
            raise UsageError("a prompt of 0 ids: start it with BOS, as the tokenizer does, or leave it out")
        if new is not None and new < 1:
            if past_key_values is not None:
                past_key_values.crop(new - 1)
            new = 1
        ids = input_ids if new is None else input_ids[:, -new:]
        given = {name: kwargs[name] for name in ("use_cache", "logits_to_keep") if name in kwargs}
        return {"input_ids": ids, "attention_mask": attention_mask, "past_key_values": past_key_values, **given}

    # --- reading ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `[batch, new, 260]` for `input_ids` `[batch, new]`, and with `labels` the loss: mean nats of a byte.

        `attention_mask` `[batch, read + new]`: 0 for a position that does not exist; it takes the logits of the last
        one before it that does, so that the last column is the end of every row. `labels` `[batch, new]` are those of
        the positions themselves and are shifted here; -100 is not learnt, nor is a BOS, which nothing comes before. A
        BOS right after a BOS has probability 1: the two are one, where tools add one each. A `ByteCache` is kept where
        `use_cache` is set or one is given; without gradients and in `eval`, logits that are asked for with it come from
        a decoder, in float32. Raises UsageError for another cache, and for a mask of another shape.
        """
        ids = to_host(input_ids)  # a model plans on the host, so that ids on a GPU are fetched once
        if attention_mask is not None:
            attention_mask = to_host(attention_mask)
            if attention_mask.ndim != 2:
                raise UsageError(
                    f"attention_mask has {attention_mask.ndim} axes: give [batch, read + new]; "
                    "packed documents need no mask, BOS isolates them"
                )
            ids = ids.masked_fill(attention_mask[:, -ids.shape[1] :] == 0, PAD)
        cache = past_key_values
        if cache is None and use_cache:
            cache = ByteCache()
        if cache is None:
            logits = over_pads(self.model(ids)[0], ids)
        elif isinstance(cache, ByteCache):
            logits = cache.read(self.model, ids, logits_to_keep if labels is None else 0)
            if labels is None and return_dict:  # in generation
                return quick_output(logits, cache)
        else:
            raise UsageError(f"a {type(cache).__name__} is not a ByteCache: leave past_key_values out")
        twice = (ids[:, :-1] == BOS) & (ids[:, 1:] == BOS)
        if logits.shape[1] == ids.shape[1] and bool(twice.any()):
            logits = certain_of_bos(logits, twice)
        loss = None
        if labels is not None:
            wanted = to_device(learnt(to_host(labels), ids != PAD), logits)
            loss = ForCausalLMLoss(logits.contiguous(), wanted, VOCAB, **kwargs)
        found = CausalLMOutputWithPast(loss, logits[:, -logits_to_keep:], cache)
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()

    # --- folders ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See transformers; a model card is written too, unless there is one."""
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
    """Labels `[batch, new]` without those that have no loss: of PADs, of BOS, of the first id of a row.

    A position after PADs is predicted from the last one before them, whose logits the PADs bear.
    """
    first = real & (real.cumsum(1) == 1)
    return labels.masked_fill(~real | first | (labels == BOS), IGNORED)


def certain_of_bos(logits: Tensor, which: Tensor) -> Tensor:
    """Logits `[batch, time, 260]`, at the positions `which` `[batch, time - 1]` of nothing but a BOS.

    BOS is never a target in training, so that its logits are noise. The evaluation harness puts one before a text that
    its tokenizer has given one to, and scores the second.
    """
    only = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min)
    only[BOS] = 0.0
    which = to_device(which, logits)
    return torch.cat([torch.where(which[..., None], only, logits[:, :-1]), logits[:, -1:]], 1)
