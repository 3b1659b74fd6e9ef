"""bytelm's models in Hugging Face's `transformers`: Auto classes, pipelines, Trainer and peft, without remote code.

    import bytelm.hf                                              # registers what follows
    model = AutoModelForCausalLM.from_pretrained("folder")        # a folder of `LM.save_pretrained`
    tokenizer = AutoTokenizer.from_pretrained("folder")           # ids 0..255 are the bytes

docs/huggingface.md shows each use. A model here is the one of `bytelm.models`, wrapped and not written again.
"""

from __future__ import annotations

from bytelm.errors import MissingExtraError

try:
    import accelerate  # noqa: F401  # pyright: ignore[reportUnusedImport]  # Trainer and device maps need it
    import transformers
except ImportError as error:
    if error.name not in ("accelerate", "transformers"):
        raise
    raise MissingExtraError(error.name, "hf", "bytelm.hf") from None

from bytelm.hf.configuration import BytelmConfig
from bytelm.hf.model import BytelmForCausalLM
from bytelm.hf.tokenizer import ByteTokenizer

__all__ = ["ByteTokenizer", "BytelmConfig", "BytelmForCausalLM"]

transformers.AutoConfig.register(BytelmConfig.model_type, BytelmConfig)
transformers.AutoModelForCausalLM.register(BytelmConfig, BytelmForCausalLM)
transformers.AutoTokenizer.register(BytelmConfig, ByteTokenizer)
