# %% [markdown]
# # A first model
#
# A Byte Latent Transformer learns a small language in some seconds: text is made, a model is trained on it, and then
# the model is looked at. This page is `docs/notebooks/first_model.py`, run as the site was built.

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
    """A chart or a picture of patches, with the colours of the reports and of nothing else on the page."""
    box = ".bytelm { padding: 1rem; border-radius: 8px; background: var(--paper); color: var(--ink); }"
    style = f"<style>.bytelm {{ {sheet().replace(':root', '&')} }} {box}</style>"
    return HTML(f"{style}<div class='bytelm'>{picture}</div>")


# %% [markdown]
# ## Text
#
# A diary of somebody who counts: every sum in it is right, and nothing else is to be learnt. Files are documents, and
# some of them are held out.

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
# `configure` takes a preset and whatever is to be different; `train` does the rest: it packs the files, counts
# n-grams of which the patches are cut, and goes down the loss. Called again it would go on from what it saved.

# %%
sets = ["model.local_dim=64", "model.decoder_layers=1", "model.global_dim=64", "model.global_layers=1"]
sets += ["model.ngram_rows=1024", "scorer.rows=4096", "train.window=128", "train.learning_rate=8e-3", "train.warmup=20"]
sets += ["train.valid_minutes=0.005", "train.valid_bytes=4096", "train.sample_bytes=0"]
settings = bytelm.configure("blt-tiny", sets=sets, steps=100)
bytelm.train(["diary"], settings, "run", quiet=True).progress

# %% [markdown]
# `metrics.jsonl` in the run has every figure. One bit is one question with a yes or a no; the curve begins where a
# byte costs eight of them.

# %%
lines = read_metrics(Path("run/metrics.jsonl"))
curves = {
    kind: [(line["step"], line["bits_per_byte"]) for line in lines if line["kind"] == kind and line["step"]]
    for kind in ("train", "valid")
}
show(line_chart(curves, "step", "bits per byte", "Bits per byte while the model learns"))

# %% [markdown]
# ## What it learnt
#
# The model goes on after a prompt. Are the sums right? After so short a training the form is, and the sums mostly are
# not.

# %%
lm = bytelm.load("run")
print(lm.generate(b"Day 7.\nSaw 3 geese", max_bytes=200, temperature=0.3).decode(errors="replace"))

# %% [markdown]
# ## Patches
#
# The model reads patches, not bytes: a patch opens where the next byte is hard to predict (bars; the dashed line is
# the threshold). So animals and numbers begin patches, and what follows of itself lies inside one.

# %%
show(fragment(view(lm.model, b"Saw 3 geese by the river, then 5 more: 8 geese.\n")))

# %% [markdown]
# ## Bits by file
#
# Every byte of a file is scored once, and the sum is divided by its bytes. A text of the same form is cheap, and its
# letters shuffled are not. A sum that is wrong costs about as much as one that is right: the model has learnt how sums
# look, and not to add.

# %%
texts = {"diary": day(1201).encode()}
texts["right"] = b"Day 7.\nSaw 3 geese by the river, then 5 more: 8 geese.\n"
texts["wrong"] = b"Day 7.\nSaw 3 geese by the river, then 5 more: 9 geese.\n"
texts["shuffled"] = bytes(rng.sample(list(texts["diary"]), len(texts["diary"])))
for name, text in texts.items():
    bits, count = lm.bits(text)
    print(f"{name:10}{bits / count:6.2f} bits per byte")
