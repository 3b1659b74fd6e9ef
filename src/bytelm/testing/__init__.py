"""The laws that hold for every architecture and every patching scheme, for whoever writes one.

    from bytelm.testing import check_model, check_patcher

    check_patcher(MyPatcher())                        # raises LawError, or returns the worst difference by law
    check_model(MyModel(...))
    check_decoder(MyModel(...))                       # what generation reads it with

Each law is a function of its own too, in `bytelm.testing.models`, `.patchers` and `.decoders`, and states
itself.
A file that is put into models/ or patching/ is found and held to them by the tests of bytelm itself: see `tiny`.
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
