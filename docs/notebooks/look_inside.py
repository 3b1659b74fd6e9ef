# %% [markdown]
# # Inside a model
#
# What a Byte Latent Transformer does with each byte: where patch boundaries are, what the state of a decode step
# contains, and what the model predicts. This page is `docs/notebooks/look_inside.py`, run as the site was built.

# %%
import sysconfig
from pathlib import Path

import torch
from IPython.display import HTML

import bytelm
from bytelm.evaluate.patches import lengths_by_kind
from bytelm.inspection import view, view_of
from bytelm.nn.state import map_state
from bytelm.report.charts import histogram
from bytelm.report.markup import sheet
from bytelm.report.patches import fragment
from bytelm.units import BOS, bits_per_byte


def show(*pictures: str) -> HTML:
    """Charts or figures of patches, with the style of the reports limited to them."""
    box = ".bytelm { padding: 1rem; border-radius: 8px; background: var(--paper); color: var(--ink); }"
    style = f"<style>.bytelm {{ {sheet().replace(':root', '&')} }} {box}</style>"
    return HTML(f"{style}<div class='bytelm'>{''.join(pictures)}</div>")


# %% [markdown]
# A small model is trained briefly on some modules of the Python standard library.

# %%
library = Path(sysconfig.get_path("stdlib"))
sources = [
    library / f"{name}.py" for name in ("argparse", "ast", "calendar", "csv", "dis", "heapq", "shutil", "textwrap")
]
sets = [
    "model.local_dim=64",
    "model.decoder_layers=1",
    "model.global_dim=64",
    "model.global_layers=1",
    "model.attention_window=32",
]
sets += [
    "model.ngram_rows=1024",
    "entropy_model.rows=8192",
    "train.context_length=128",
    "train.learning_rate=8e-3",
    "train.warmup_steps=20",
]
sets += ["train.eval_bytes=4096", "train.sample_bytes=0"]
bytelm.train(sources, bytelm.configure("blt-tiny", sets=sets, steps=100), "run", quiet=True)
lm = bytelm.load("run")
text = b'def close(self):\n    if self.closed:\n        raise ValueError("already closed")\n'

# %% [markdown]
# ## Patch boundaries
#
# Under each byte is the entropy of its prediction, by a separate small model, the *entropy model* (here an n-gram
# table). A byte starts a patch if its entropy is above the threshold, which was calibrated so that patches have 5 bytes
# on average. Predictable bytes, such as the end of a word, are in one patch, which costs one step of the large model.

# %%
show(fragment(view(lm.model, text), "Patches by entropy"))

# %% [markdown]
# Other schemes need no entropy model. Space patches end after a space or punctuation; fixed patches have a fixed number
# of bytes.

# %%
show(fragment(view_of("space", text), "Patches by space"), fragment(view_of("fixed:5", text), "Patches of five bytes"))

# %% [markdown]
# Patch lengths over a whole file:

# %%
source = (library / "bisect.py").read_bytes()
lengths = lengths_by_kind(lm.model.patcher, [("bisect.py", source)])["bisect.py"]
show(histogram(lengths, "bytes of a patch", "patches", "Lengths of the patches of bisect.py"))

# %% [markdown]
# ## One forward pass, or incrementally
#
# A model is called as `model(ids, state)`, with ids `[batch, new]`: the bytes are the ids 0 to 255, and a document
# begins with BOS. Whether all ids are passed at once or one by one, the logits are equal up to rounding.

# %%
model = lm.model.double()
ids = torch.tensor([[BOS, *text]])
with torch.no_grad():
    whole, _ = model(ids)
    state, rows = model.initial_state(1), []
    for t in range(ids.shape[1]):
        logits, state = model(ids[:, t : t + 1], state)
        rows.append(logits)
print(whole.shape, "largest difference:", float((whole - torch.cat(rows, 1)).abs().max()))

# %% [markdown]
# ## The decoding state
#
# The state of one sequence. The KV caches of the local models (over bytes) hold the 32 bytes of their attention window.
# Only the KV caches of the latent Transformer grow, by one entry per patch.


# %%
def size(state: object) -> int:
    """The numbers that a state holds."""
    counted: list[int] = []
    map_state(lambda tensor: counted.append(tensor.numel()) or tensor, state)
    return sum(counted)


def shapes(cache: object) -> set[tuple[int, ...]]:
    """The shapes of the tensors of a cache."""
    found: set[tuple[int, ...]] = set()
    map_state(lambda tensor: found.add(tuple(tensor.shape)) or tensor, cache)
    return found


for name in ("encoder", "latents", "decoder"):
    print(f"{name:8}", shapes(getattr(state, name)))
print("numbers in all:", size(state), "after", ids.shape[1], "ids and", len(lm.patches(text)), "patches")

# %% [markdown]
# ## When does the latent model run?
#
# The latent Transformer steps only where a patch closes. For a byte inside a patch only the small local models run, and
# that is most of the bytes. The latent model ran in the steps after which its KV cache is longer:

# %%
state, line = model.initial_state(1), ""
with torch.no_grad():
    before = size(state.latents)
    for value in [BOS, *text]:
        _, state = model(torch.tensor([[value]]), state)
        after = size(state.latents)
        line += "●" if after > before else "·"
        before = after
for cut in range(0, len(text), 60):
    print(text[cut : cut + 60].decode().replace("\n", "⏎"))
    print(line[1 + cut : 61 + cut])

# %% [markdown]
# ## Predictions
#
# `logits[:, t]` scores byte t + 1. The most probable bytes after `raise Val`, and the bits per byte of the whole text:

# %%
prompt = text[: text.index(b"ueError")]
with torch.no_grad():
    logits, _ = model(torch.tensor([[BOS, *prompt]]))
best = logits[0, -1].softmax(-1).topk(4)
for probability, value in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"{bytes([value])!r:8}{probability:7.3f}")
nats = -whole[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
print(f"{bits_per_byte(float(nats), len(text)):.3f} bits per byte; by lm.bits {lm.bits(text)[0] / len(text):.3f}")
