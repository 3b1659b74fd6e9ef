"""A causal model of `transformers`, with its tokenizer, in the interface of ours: for evaluation.

    model, context = load_foreign("hf:folder")
    judge(model, documents, context)            # bits per byte in our windows, beside compressors

Its ids come after ours (own id = VOCAB + theirs), and PAD, BOS and EOS have no probability. A BOS at the beginning of a
row stands for whatever the tokenizer has in its place (`encoding.Start`): a token that the tokenizer puts before every
text comes before every window too, and costs nothing; without any, the first token is predicted uniformly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bytelm.data.names import after_prefix
from bytelm.device import fitting
from bytelm.errors import CheckpointError, DataError, UsageError
from bytelm.exchange.files import check_folder, first_line
from bytelm.hf.encoding import TextTokens
from bytelm.interfaces.model import ByteModel
from bytelm.nn.state import align_right
from bytelm.patching.layout import Rows
from bytelm.transfer import to_device
from bytelm.units import BOS, VOCAB

CONTEXT = 1024  # tokens of a window, where the model has positions for as many
AT_ONCE = 1 << 27  # logits of a batch, of which some copies are made
PROBED = 8  # ids that a model is tried with
ROUNDING = 1e-5  # of the largest logit: what others of a batch may change, as in a mixture of experts


class Foreign(ByteModel):
    """A model of `transformers`. It cannot be trained here; a state holds the ids, which are read again."""

    def __init__(self, model: Any, tokens: TextTokens) -> None:
        """`model(input_ids=ids)` has `logits` `[batch, time, ids]`, which do not depend on what follows."""
        super().__init__()
        self.model = model
        self._tokens = tokens
        self.start = tokens.start

    @property
    def tokens(self) -> TextTokens:
        """Its tokens."""
        return self._tokens

    @property
    def vocabulary(self) -> int:
        """Ours, and all that the model gives a probability to."""
        return self._tokens.vocabulary

    @property
    def positions(self) -> int | None:
        """The most tokens that it has positions for; None if it has no limit."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(text, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def longest(self) -> int | None:
        """The longest window: positions without those of what comes before it; None if there is no limit."""
        before = len(self.start.ids) if self.start.always else 0
        return None if self.positions is None else self.positions - before

    def context(self, asked: int | None = None) -> int:
        """The window that is asked for, or the default. Raises UsageError for none, and for one beyond the positions.

        The default is CONTEXT tokens, and no more than there are positions for.
        """
        if asked is not None and asked < 1:
            raise UsageError(f"--context {asked}: give at least 1 token")
        if self.longest is None:
            return asked or CONTEXT
        if asked is not None and asked > self.longest:
            raise UsageError(
                f"--context {asked}: this model has positions for {self.longest} tokens: take at most that"
            )
        return asked or min(self.longest, CONTEXT)

    def batch(self, context: int) -> int:
        """How many windows of `context` tokens are read at once: 8, and fewer of a large vocabulary."""
        return max(1, min(8, AT_ONCE // (self.vocabulary * max(1, context))))

    def init_weights(self, seed: int) -> None:
        """Raises UsageError: it is evaluated only."""
        raise UsageError("a model of transformers is evaluated here, and not trained: train it with transformers")

    def initial_state(self, batch: int) -> Any:
        """The ids of each row `[batch, most]`, the last on the right, and how many they are: none."""
        return torch.zeros(batch, 0, dtype=torch.long), torch.zeros(batch, dtype=torch.long)

    def flops(self, ids: int, patches: int) -> int:
        """Two for each parameter and id: an estimate, attention left out."""
        return 2 * ids * sum(parameter.numel() for parameter in self.parameters())

    def byte_lengths(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The number of bytes of each id in the middle of a text, where that is known: 0 for a special."""
        return torch.from_numpy(self._tokens.sizes)[ids]

    def forward(
        self, ids: Int[Tensor, "batch new"], state: Any = None, boundaries: Bool[Tensor, "batch new"] | None = None
    ) -> tuple[Float[Tensor, "batch new vocab"], Any]:
        """See `ByteModel`. Raises UsageError for bytes, for a BOS inside of a row, and beyond the model's positions."""
        rows = Rows.of(ids)
        new = [row[:length] for row, length in zip(rows.ids, rows.lengths.tolist(), strict=True)]
        before, lengths = state or self.initial_state(len(new))
        olds = (old[len(old) - length :] for old, length in zip(before, lengths.tolist(), strict=True))
        read = [torch.cat([old, own]) for old, own in zip(olds, new, strict=True)]
        inputs = [self.inputs(row) for row in read]
        logits = self.logits(inputs)
        found = logits.new_zeros(len(new), ids.shape[1], self.vocabulary)
        found[..., :VOCAB] = float("-inf")
        for row, (theirs, own) in enumerate(zip(inputs, new, strict=True)):
            # Theirs and ours end with the same id; a first id of ours that nothing stands for is predicted uniformly.
            at = len(theirs) - len(own)
            skipped = max(0, -at)
            found[row, skipped : len(own), VOCAB:] = logits[row, at + skipped : len(theirs)]
        if state is None:
            return rows.restore(found), None
        return rows.restore(found), (torch.cat(align_right([row[None] for row in read])), lengths + rows.lengths)

    def inputs(self, own: Int[Tensor, " ids"]) -> Int[Tensor, " theirs"]:
        """Their ids of a row of ours, with what comes before."""
        opened = bool(len(own) and own[0] == BOS)
        theirs = own[opened:] - VOCAB
        if len(theirs) and int(theirs.min()) < 0:
            raise UsageError(
                f"id {int(theirs.min()) + VOCAB} is no token of this model: encode documents with its tokens"
            )
        prefix = self.start.ids if len(own) and (opened or self.start.always) else ()
        return torch.cat([torch.tensor(prefix, dtype=torch.long), theirs])

    def logits(self, inputs: Sequence[Int[Tensor, "..."]]) -> Float[Tensor, "batch time theirs"]:
        """Their logits of rows of their ids, padded on the right: what follows changes nothing (`check_causal`)."""
        padded = pad_sequence(list(inputs), batch_first=True, padding_value=0)
        if not padded.shape[1]:
            return torch.zeros(len(inputs), 0, self._tokens.width, device=self.device)
        if self.positions is not None and padded.shape[1] > self.positions:
            raise UsageError(
                f"{padded.shape[1]} tokens at once: this model has positions for {self.positions}: take shorter windows"
            )
        with torch.inference_mode():
            return self.called(padded).logits

    def called(self, ids: Int[Tensor, "batch time"], **cache: Any) -> Any:
        """What the model returns for their ids; with a `cache` it reads on from there. Raises UsageError."""
        options = cache or {"use_cache": False}
        try:
            return self.model(input_ids=to_device(ids, self.device), return_dict=True, **options)
        except IndexError as error:
            raise UsageError(f"the model cannot read {ids.shape[1]} tokens: take a smaller --context") from error


# --- loading --------------------------------------------------------------------------------------------------------


def load_foreign(name: str, device: str | torch.device = "cpu") -> tuple[Foreign, int]:
    """The model of a folder or of a name on the Hugging Face hub, in float32, and its default context in tokens.

    `name` may begin with "hf:". No code of the folder is run, and weights are read from safetensors only. A folder is
    not looked for elsewhere; a name is looked for in the local cache, and on the hub where the network is there.

    Raises CheckpointError for a folder or name without a causal language model, without weights for all of it, without
    a tokenizer or with one of another vocabulary; ResourceError where the model does not fit into memory.
    """
    rest = after_prefix(name)
    source = name if rest is None else rest
    there = Path(source).is_dir()
    if not there and (source.count("/") > 1 or source.startswith((".", "/", "~")) or not source):
        check_folder(Path(source))
    device = torch.device(device)
    with quietly(), fitting(device, f"the model of {source}", lambda: "take a smaller one"):
        tokenizer = tokenizer_of(source, there)
        model = model_of(source, there).to(device).eval()
        probed = check_causal(model, source)
    tokens = TextTokens(tokenizer, probed)
    check_vocabulary(tokens, source)
    found = Foreign(model, tokens).eval()
    return found, found.context()


def tokenizer_of(source: str, there: bool) -> Any:
    """The tokenizer. Raises CheckpointError."""
    try:
        found: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=there)
    except Exception as error:  # whatever is in the folder
        raise CheckpointError(f"{source} has no tokenizer that can be read: {first_line(error)}") from error
    if len(found.get_vocab()) <= len(found.added_tokens_decoder):  # of a folder without one, some kinds are made empty
        raise CheckpointError(f"{source} has no tokenizer: add the files that its save_pretrained writes")
    if dropout := getattr(getattr(getattr(found, "backend_tokenizer", None), "model", None), "dropout", None):
        raise CheckpointError(
            f"{source} has a tokenizer with dropout {dropout}, which encodes at random: set it to null"
        )
    return found


def model_of(source: str, there: bool) -> Any:
    """The model in float32. Raises CheckpointError, also where weights are missing, which would be made up."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=there,
            dtype=torch.float32,
            output_loading_info=True,
        )
        model, info = loaded
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever is in the folder
        raise CheckpointError(f"{source} cannot be read as a causal language model: {first_line(error)}") from error
    if missing := sorted(map(str, info["missing_keys"])):
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of a causal language model, such as {missing[0]}: "
            "it is of another kind, or damaged"
        )
    return model


@torch.inference_mode()
def check_causal(model: Any, source: str) -> int:
    """The width of the logits. Raises CheckpointError unless they are finite, and independent of what follows."""
    table = model.get_input_embeddings()
    ids = torch.arange(PROBED) % (table.weight.shape[0] if table is not None else PROBED)
    other = torch.cat([ids[: PROBED // 2], ids[: PROBED // 2].flip(0)])
    where = next(model.parameters()).device
    try:
        one, two = (
            model(input_ids=row[None].to(where), use_cache=False, return_dict=True).logits for row in (ids, other)
        )
    except Exception as error:  # whatever a model of another kind needs
        raise CheckpointError(f"{source} is not a causal language model over tokens: {first_line(error)}") from error
    if not bool(one.isfinite().all()):
        raise CheckpointError(f"{source} gives probabilities that are not finite: its weights are damaged")
    before = slice(0, PROBED // 2)
    apart = (one[:, before] - two[:, before]).abs().max()
    if apart > ROUNDING * one.abs().max():
        raise CheckpointError(
            f"{source} is not causal: its predictions depend on the tokens that follow, "
            f"as those of {type(model).__name__} do unless its config.json says otherwise"
        )
    return one.shape[-1]


def check_vocabulary(tokens: TextTokens, source: str) -> None:
    """Raises CheckpointError if tokens have ids beyond those of the model, and where the tokenizer cannot encode."""
    beyond = {
        symbol: token
        for token, symbol in tokens.tokenizer.get_vocab().items()
        if symbol >= tokens.width and symbol not in tokens.specials
    }
    if beyond:
        symbol = max(beyond)
        raise CheckpointError(
            f"{source} has a tokenizer of ids up to {symbol} ({beyond[symbol]!r}) and a model of {tokens.width}: "
            "take the model's own tokenizer"
        )
    try:
        tokens.start  # noqa: B018  # encodes
    except DataError as error:
        raise CheckpointError(f"{source}: {error}") from error


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """Without the progress bars and warnings of `transformers`: what matters is checked."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # critical
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
