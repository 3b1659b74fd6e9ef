"""Training, from files to a finished run. `bytelm.train(...)` is `finish.train`, also once this package is imported."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    """Importing a package puts it into its parent under its name, here in the place of the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from bytelm.training.finish import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Called
