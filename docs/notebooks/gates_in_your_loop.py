# %% [markdown]
# # Gates in your own loop
#
# Your training loop stays: gates go in, and the loss gets one more term. In the end a plain, smaller network
# comes out that computes what the gated one computed. Some seconds on one CPU core.

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


class Net(nn.Module):
    """Yours instead."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.inner = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.down = nn.Sequential(nn.Conv2d(24, 48, 3, 2, padding=1), nn.BatchNorm2d(48))
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.inner(x)).relu()  # a shortcut: both convolutions keep the same channels
        return self.head(self.down(x).relu().mean((2, 3)))


model = Net()

# %% [markdown]
# ## Gates in
# `model` is untouched. What has a gate, what stays, and why:

# %%
gated = swan.swanify(model, images[:1])
print(gated.channels.explain())

# %% [markdown]
# ## The loop, with one more term
# The budget falls along a ramp to half of the multiply-adds; the *hard* gates meet it at every step.

# %%
epochs = 8
objective = swan.Objective(gated, macs=0.5, ramp=swan.CosineRamp(delay=1, length=4))
optimizer = torch.optim.AdamW(swan.parameter_groups(gated, lr=3e-3, gate_lr=1e-2))
for epoch in range(epochs):
    for batch in train[torch.randperm(len(train))].split(100):
        loss = nn.functional.cross_entropy(gated(images[batch]), labels[batch]) + objective(epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"epoch {epoch}: {swan.hard_macs(gated) / swan.count_macs(model, images[:1]):.0%} of the MACs"
    )

# %% [markdown]
# ## Channels out
# Batch-norm statistics are measured under the hard gates. Without a budget `prune` then removes exactly what is closed, so
# that the outputs are the same but for rounding.

# %%
swan.calibrate(gated, images[train].split(100))
small = swan.prune(gated)
with torch.no_grad():
    wide, narrow = gated.eval()(images[test]), small.eval()(images[test])
print(f"{(wide - narrow).abs().max():.1e} apart at most, of outputs up to {wide.abs().max():.1f}")
print(f"{100 * (narrow.argmax(1) == labels[test]).float().mean():.1f} % of the test images")
small

# %% [markdown]
# From here: train on with `small` as with any network; `swan.save(small, "small.swan")` keeps it, and
# `swan.load("small.swan", Net())` brings it back bitwise.
