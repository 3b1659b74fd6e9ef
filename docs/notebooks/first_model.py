# %% [markdown]
# # A first model
#
# A Byte Latent Transformer learns a small language in some seconds: text is generated, a model is trained on it, and
# then inspected. This page is `docs/notebooks/first_model.py`, run as the site was built.

# %%
import random
from pathlib import Path

from IPython.display import HTML

import bytelm
from bytelm.checkpoint.metrics import read_metrics
from bytelm.inspection import view
from bytelm.report.charts import line_chart
from bytelm.report.markup import sheet
from bytelm.report.patches import fragment


def show(picture: str) -> HTML:
    """A chart or a figure of patches, with the style of the reports limited to it."""
    box = ".bytelm { padding: 1rem; border-radius: 8px; background: var(--paper); color: var(--ink); }"
    style = f"<style>.bytelm {{ {sheet().replace(':root', '&')} }} {box}</style>"
    return HTML(f"{style}<div class='bytelm'>{picture}</div>")


# %% [markdown]
# ## Text
#
# A diary of animal counts, in which every sum is right. Each file is a document, and some of them go to the held-out
# splits.

# %%
rng = random.Random(0)
animals, places = ["sheep", "geese", "snails", "horses", "owls"], ["in the meadow", "behind the barn", "by the river"]


def day(number: int) -> str:
    """What was counted on one day."""
    lines = [f"Day {number}."]
    for animal in rng.sample(animals, 3):
        first, more = rng.randrange(1, 10), rng.randrange(1, 10)
        lines.append(f"Saw {first} {animal} {rng.choice(places)}, then {more} more: {first + more} {animal}.")
    return "\n".join(lines) + "\n"


Path("diary").mkdir()
for month in range(60):
    Path(f"diary/{month:02}.txt").write_text("\n".join(day(month * 20 + number) for number in range(20)))
print(day(1200))

# %% [markdown]
# ## Training
#
# `configure` takes a preset and overrides; `train` does the rest: it packs the files, trains the n-gram entropy model
# that determines patch boundaries, and trains the model. Called again, it would resume from the last checkpoint.

# %%
sets = ["model.local_dim=64", "model.decoder_layers=1", "model.global_dim=64", "model.global_layers=1"]
sets += [
    "model.ngram_rows=1024",
    "entropy_model.rows=4096",
    "train.context_length=128",
    "train.learning_rate=8e-3",
    "train.warmup_steps=20",
]
sets += ["train.eval_every_minutes=0.005", "train.eval_bytes=4096", "train.sample_bytes=0"]
settings = bytelm.configure("blt-tiny", sets=sets, steps=100)
bytelm.train(["diary"], settings, "run", quiet=True).progress

# %% [markdown]
# `metrics.jsonl` in the run has every metric. The curve starts near 8 bits per byte, a uniform prediction.

# %%
lines = read_metrics(Path("run/metrics.jsonl"))
curves = {
    kind: [(line["step"], line["bits_per_byte"]) for line in lines if line["kind"] == kind and line["step"]]
    for kind in ("train", "validation")
}
show(line_chart(curves, "step", "bits per byte", "Learning curves: bits per byte"))

# %% [markdown]
# ## Generation
#
# The model continues a prompt. Are the sums right? After so short a training the form is, and the sums mostly are not.

# %%
lm = bytelm.load("run")
print(lm.generate(b"Day 7.\nSaw 3 geese", max_bytes=200, temperature=0.3).decode(errors="replace"))

# %% [markdown]
# ## Patches
#
# The large model processes patches, not bytes: a patch starts where the next byte is hard to predict (bars: its
# entropy; the dashed line is the threshold). So animals and numbers start patches, and predictable bytes are inside
# one.

# %%
show(fragment(view(lm.model, b"Saw 3 geese by the river, then 5 more: 8 geese.\n")))

# %% [markdown]
# ## Bits per byte
#
# Every byte of a text is scored once, and the sum is divided by its bytes. A text of the same form needs few bits, its
# shuffled letters many. A wrong sum costs about as much as a right one: the model has learned the form of sums, not
# addition.

# %%
texts = {"diary": day(1201).encode()}
texts["right"] = b"Day 7.\nSaw 3 geese by the river, then 5 more: 8 geese.\n"
texts["wrong"] = b"Day 7.\nSaw 3 geese by the river, then 5 more: 9 geese.\n"
texts["shuffled"] = bytes(rng.sample(list(texts["diary"]), len(texts["diary"])))
for name, text in texts.items():
    bits, count = lm.bits(text)
    print(f"{name:10}{bits / count:6.2f} bits per byte")
