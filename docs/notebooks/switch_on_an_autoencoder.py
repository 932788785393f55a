# %% [markdown]
# # A switch on an autoencoder
#
# An autoencoder spends the same work on a clean stroke as on a scrawl. A switch behind its encoder sends codes that are
# easy to decode through a light decoder, the library's own cut of the full one. There is no class to be right about
# here, so the guarantee is about the reconstruction. Some seconds on one CPU core.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn

import swan_surgery as swan


torch.manual_seed(0)
images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
images = images[torch.randperm(len(images))]
train, held_out, test = images[:900], images[900:1500], images[1500:]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.ReLU(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x):
        return self.decode(self.encode(x))


def train_on(parameters, loss_of, epochs):
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(100):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


model = Autoencoder()
train_on(model.parameters(), lambda x: nn.functional.mse_loss(model(x), x), epochs=40)
print(f"mean squared error {nn.functional.mse_loss(model(test), test):.4f}")

# %% [markdown]
# ## The switch
# Behind `encode`: what the code looks like decides. The light decoder does a tenth of the full one's work. Until a
# threshold is set, the outputs are bitwise the given model's.

# %%
batches = train.split(100)
routed = swan.add_switch(model, "encode", example_inputs=train[:4], light=0.1, batches=batches)
assert torch.equal(routed(test), model(test))
train_on([p for p in routed.parameters() if p.requires_grad], routed.loss, epochs=20)

# %% [markdown]
# ## A threshold with a guarantee
# Harm is ours to say: a reconstruction that is visibly worse than the full decoder's, by more than 0.008 in mean squared
# error. On at most a twentieth of all inputs, with 90 % confidence over the draw of the held-out images.


# %%
def visibly_worse(light, full, truth):
    def error(y):
        return (y - truth).square().mean(1)

    return (error(light) - error(full) > 0.008).float()


certificate = swan.calibrate_switch(
    routed.eval(), [(held_out, held_out)], harm=0.05, loss=visibly_worse
)
print(certificate)

# %% [markdown]
# ## On images that nobody has seen

# %%
with torch.no_grad():
    routed_to, full = routed(test), model(test)
worse = visibly_worse(routed_to, full, test).mean()
print(f"visibly worse: {100 * worse:.1f} % of the test images")
print(f"mean squared error {nn.functional.mse_loss(routed_to, test):.4f}")
print(f"MACs: {100 * certificate.macs:.0f} % of the given model's")
