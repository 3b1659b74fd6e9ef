"""Invariant tests of architectures and patching schemes, for their authors.

    from bytelm.testing import check_model, check_patcher

    check_patcher(MyPatcher())                        # raises LawError, or returns the worst difference by invariant
    check_model(MyModel(...))
    check_decoder(MyModel(...))                       # its decoder

Each invariant is a function in `bytelm.testing.models`, `.patchers` or `.decoders`, whose docstring states it.
bytelm's own tests run them on every file in models/ and patching/: see `tiny`.
"""

from bytelm.testing.decoders import DECODER_LAWS, check_decoder
from bytelm.testing.law import LawError
from bytelm.testing.models import MODEL_LAWS, check_model
from bytelm.testing.patchers import PATCHER_LAWS, check_patcher
from bytelm.testing.tiny import ScriptedScorer, UniformModel, tiny_models, tiny_patchers

__all__ = [
    "DECODER_LAWS",
    "MODEL_LAWS",
    "PATCHER_LAWS",
    "LawError",
    "ScriptedScorer",
    "UniformModel",
    "check_decoder",
    "check_model",
    "check_patcher",
    "tiny_models",
    "tiny_patchers",
]
