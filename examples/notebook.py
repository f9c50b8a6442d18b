# ruff: noqa: B018  (a cell's last value is what the notebook shows)
# %% [markdown]
# # A model of handwritten digits, looked at from all sides
#
# `scripts/quickstart.sh` makes what this reads, in some minutes on a laptop: the code store `data/digits` and the run
# `runs/digits`. Each `# %%` begins a cell in VS Code, PyCharm, Spyder and Jupyter (by jupytext); `python
# examples/notebook.py` runs them all.

# %%
import matplotlib.pyplot as plt
import torch

import star_fast
from star_fast.data.codes import CodeStore
from star_fast.evaluation.probe_training import linear_probe

model = star_fast.load("runs/digits", dtype=torch.float32)  # exact features; leave dtype out for the fastest drawing
print(model)

# %% [markdown]
# ## Drawing
# Classes go by name or number. The same seed gives the same images, here and in `star-fast sample`.

# %%
images = model.sample(model.class_names, n=4, guidance=2.0, seed=0)
images.save("digits.png", columns=4)
images

# %% [markdown]
# Guidance trades variety for likeness: the same seed at three scales.

# %%
for guidance in (1.0, 2.0, 4.0):
    model.sample(model.class_names[0], n=8, guidance=guidance, seed=1).save(f"guidance-{guidance:g}.png", columns=8)

# %% [markdown]
# ## Codes
# The tokenizer turns an image into codes and back; what the way loses is the tokenizer's share of any fault.

# %%
codes = model.codes(images)
again = model.decode(codes)
lost = (images.pixels.float() - again.pixels.float()).abs().mean().item()
print(
    f"{tuple(codes.shape)} codes of a codebook of {model.transformer.config.vocab}; there and back changes a "
    f"pixel by {lost:.1f} of 255"
)

# %% [markdown]
# ## What the model knows, position by position
# Features of real digits, the model being told no class; a linear layer at eight positions learns to name the class
# (the paper's Figure 4, in small).

# %%
store = CodeStore.open("data/digits")
learn, judge, judged_on = store.judging()
learn = learn[:1000]
places = torch.linspace(0, store.positions - 1, 9).long()[1:]
known, unseen = (model.features(store.codes(rows, [store.plain_view])[:, 0])[:, places] for rows in (learn, judge))
shares = linear_probe(known, store.labels[learn], unseen, store.labels[judge], epochs=20)
plt.plot(places, shares, marker="o")
plt.xlabel("position")
plt.ylabel(f"share of {judged_on} whose class is named")
plt.savefig("probe.png")

# %% [markdown]
# ## Training
# A few steps of ST-AR from these weights, in this process. Longer runs, and many GPUs: `deepspeed star_fast/train.py`.

# %%
config = star_fast.run_config(
    "tiny",
    {"data.codes": "data/digits", "train.max_steps": 20, "train.save_every_steps": 20, "train.validate_every_steps": 0},
)
run = star_fast.train(config, "runs/more", init="runs/digits/model")
star_fast.load(run).sample(model.class_names, n=4).save("after.png", columns=4)
