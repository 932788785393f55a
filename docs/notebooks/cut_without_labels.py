# %% [markdown]
# # Cut a pretrained network without labels
#
# You have a trained network, images like those it will see, and no labels for them. This trains a small one on
# scikit-learn's handwritten digits, to have something trained, and cuts it to a quarter of its multiply-adds.
# Some seconds on one CPU core.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn

import swan_surgery as swan


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1300], order[1300:]

# %% [markdown]
# ## A trained network
# Yours instead. Nothing below knows how it was trained.

# %%
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(8):
    for batch in train[torch.randperm(len(train))].split(100):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()


def accuracy(network):
    with torch.no_grad():
        right = network.eval()(images[test]).argmax(1) == labels[test]
    return f"{100 * right.float().mean():.1f} % of the test images"


accuracy(model)

# %% [markdown]
# ## The cut
# Batches of images alone. A unit counts by how much it moves the model's own outputs; after the cut, weights are solved
# for with which what stayed gives what the layers gave before.

# %%
batches = images[train].split(100)
done = swan.compress(model, batches, macs=0.25, progress=False)
print(done)

# %%
accuracy(done.model)

# %% [markdown]
# To compare, what is often done: units scored by the size of their weights, cut to the same budget, and batch-norm
# statistics measured anew.

# %%
gated = swan.swanify(model, images[:1])
scores = swan.importance(gated, "magnitude")
plain = swan.prune_by_score(gated, scores, macs=0.25)
swan.calibrate(plain, batches)
accuracy(plain)

# %% [markdown]
# The given model is untouched; the smaller one is of the same class, and nothing of this library is needed to run it.

# %%
print(swan.report(model, done.model, images[:1]))

# %% [markdown]
# From here: `finetune=500` trains on, toward the given model's outputs; `swan.export(done.model, "small.onnx",
# images[:1])` writes a file that was run and compared. All of it from a terminal: `swan-surgery compress`.
