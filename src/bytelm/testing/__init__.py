"""Invariant tests of architectures and patching schemes, for their authors.

    from bytelm.testing import check_model, check_patcher

    check_patcher(MyPatcher())                        # raises InvariantError, or returns the worst differences
    check_model(MyModel(...))
    check_decoder(MyModel(...))                       # its decoder

Each invariant is a function in `bytelm.testing.models`, `.patchers` or `.decoders`, whose docstring states it.
bytelm's own tests run them on every file in models/ and patching/: see `tiny`.
"""

from bytelm.testing.decoders import DECODER_INVARIANTS, check_decoder
from bytelm.testing.invariant import InvariantError
from bytelm.testing.models import MODEL_INVARIANTS, check_model
from bytelm.testing.patchers import PATCHER_INVARIANTS, check_patcher
from bytelm.testing.tiny import ScriptedEntropyModel, UniformModel, tiny_models, tiny_patchers

__all__ = [
    "DECODER_INVARIANTS",
    "MODEL_INVARIANTS",
    "PATCHER_INVARIANTS",
    "InvariantError",
    "ScriptedEntropyModel",
    "UniformModel",
    "check_decoder",
    "check_model",
    "check_patcher",
    "tiny_models",
    "tiny_patchers",
]
