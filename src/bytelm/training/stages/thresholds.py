"""The stage that calibrates thresholds on training documents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bytelm.checkpoint import legacy
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, dump_toml, load_toml, to_mapping
from bytelm.data.corpus import Corpus
from bytelm.data.files import write_whole
from bytelm.data.selection import sample_evenly
from bytelm.evaluate.calibrate import calibrate
from bytelm.patching import entropy
from bytelm.patching.entropy import EntropyModel
from bytelm.training.stages.base import Count, Stage

SAMPLE = 1 << 20  # bytes for calibration


@dataclass
class ThresholdStage(Stage[Recipe]):
    """The recipe with its missing thresholds; unless `kept`, it is made each time."""

    name = "calibrating thresholds"
    path: Path
    recipe: Recipe
    entropy_model: EntropyModel
    corpus: Corpus
    kept: bool = True

    def done(self) -> bool:
        """See `Stage`."""
        return self.kept and super().done()

    def load(self) -> Recipe:
        """See `Stage`."""
        return build(Recipe, legacy.current(load_toml(self.path)), str(self.path))

    def make(self, count: Count) -> Recipe:
        """See `Stage`."""
        recipe = self.recipe
        if isinstance(recipe.patching, entropy.Config) and not recipe.patching.calibrated:
            sample = [data for _, data in sample_evenly(self.corpus, "train", SAMPLE)]
            self.total = sum(map(len, sample))
            recipe = replace(recipe, patching=calibrate(recipe.patching, self.entropy_model, sample, count))
        if self.kept:
            keep_recipe(self.path, recipe)
        return recipe


def keep_recipe(path: Path, recipe: Recipe) -> None:
    """Write the recipe."""
    write_whole(path, dump_toml(to_mapping(recipe)).encode())
