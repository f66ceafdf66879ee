"""DiT: a transformer over the patches of an image or latent, steered by time and class (arXiv 2212.09748).

At r = t it is the network of DiT and SiT, parameter for parameter, so their published weights load.
"""

import math

import torch
from torch import nn
from torch.nn import functional as f

from ..files import check_weights, read_weights
from .times import Times, check_image, check_labels, check_times

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads
PATCHES = (2, 4, 8)


def modulate(x, shift, scale):
    """x (B, T, D) scaled and shifted by what the condition says, (B, D) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(f.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates begin at zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), FeedForward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(f.layer_norm(x, x.shape[-1:], eps=1e-6), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(f.layer_norm(x, x.shape[-1:], eps=1e-6), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(f.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


def positions(width, side):
    """Sines and cosines of a patch's column and row.  -> (1, side * side, width)."""
    k = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [axis.reshape(-1, 1) * k for axis in (column, row)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)[None].float()


class DiT(nn.Module):
    """Velocity field for images.  net(x, t, r, cond) : (B, C, H, H), (B,), (B,), (B,) -> (B, C, H, H), float32.

    t and r lie in [-1, 1]; see `Times` for how they enter. With `classes`, cond holds labels in
    [0, classes]; the last one is the null label. A new network is zero (adaLN-Zero) but for epsilon=True.

    epsilon: the weights are those of a DiT of Peebles and Xie, which predicts the noise of another path
    at steps 0..999; forward then translates, see `from_epsilon`. Raises ValueError for a size,
    shape, label or time that does not fit.
    """

    def __init__(self, size=32, channels=4, classes=0, width=384, depth=12, heads=6, patch=2, epsilon=False):
        super().__init__()
        if size % patch or width % heads or width % 4:
            raise ValueError(f"size {size} must be a multiple of patch {patch}, width {width} of 4 and heads {heads}")
        self.size, self.channels, self.classes, self.patch, self.epsilon = size, channels, classes, patch, epsilon
        self.x_embedder = nn.Conv2d(channels, width, patch, patch)
        self.register_buffer("pos_embed", positions(width, size // patch))
        self.times = Times(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.initialise()

    def initialise(self):
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and not name.startswith("times"):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.view(len(self.x_embedder.weight), -1))
        nn.init.zeros_(self.x_embedder.bias)
        if self.classes:
            nn.init.normal_(self.label.weight, std=0.02)
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, r, cond=None):
        check_image(x, self.channels, self.size)
        check_times(x, t, r)
        labels = check_labels(cond, len(x), self.classes)
        if not self.epsilon:
            return self.backbone(x, self.times(t, r), labels)
        return from_epsilon(lambda x, step: self.backbone(x, self.times(t, r, shown=step), labels), x.float(), t)

    def backbone(self, x, c, labels):
        """The transformer, given the embedded times c.  (B, C, H, H), (B, width), (B,) -> (B, C, H, H)."""
        B, p, side, dtype = len(x), self.patch, self.size // self.patch, self.x_embedder.weight.dtype
        c = c.to(dtype) if labels is None else (c + self.label(labels)).to(dtype)
        h = self.x_embedder(x.to(dtype)).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c).view(B, side, side, p, p, self.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape).float()


def dimensions(name):
    """Width, depth, heads, patch of a published size, "s-2" to "xl-8": letter, then patch. ValueError for others."""
    letter, _, patch = name.partition("-")
    if letter not in SIZES or patch not in map(str, PATCHES):
        known = ", ".join(f"{letter}-{patch}" for letter in SIZES for patch in PATCHES)
        raise ValueError(f"unknown DiT {name!r}: choose from {known}")
    return *SIZES[letter], int(patch)


def dit(name, size=32, channels=4, classes=1000, epsilon=False):
    """A DiT of a published size, see `dimensions`."""
    return DiT(size, channels, classes, *dimensions(name), epsilon)


def from_epsilon(predict, x_t, t):
    """Velocity on the straight path from a noise prediction on the variance-preserving path of DDPM.

    x_t / sqrt(t^2 + (1 - t)^2) lies on that path, at the step of equal signal-to-noise ratio. With the
    predicted noise as z, v = (z - x_t) / (1 - t). Its last step, 999, is t = 0.9937; that value stands
    in for larger t, where the division would fail.
    """
    exact = torch.float32 if x_t.device.type == "mps" else torch.float64
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=exact, device=x_t.device)
    alpha = (1 - beta).cumprod(0)
    ratio = (alpha / (1 - alpha)).sqrt()  # (1 - t) / t at each step, falling
    t = t.abs().to(exact).clamp(1 / (1 + ratio[0]), 1 / (1 + ratio[-1]))
    wanted, falling = ((1 - t) / t).log(), ratio.log()
    after = torch.searchsorted(-falling, -wanted).clamp(1, 999)
    step = after - (wanted - falling[after]) / (falling[after - 1] - falling[after])
    t, length = (a.float().view(-1, 1, 1, 1) for a in (t, (t**2 + (1 - t) ** 2).sqrt()))
    return (predict(x_t / length, step.float()) - x_t) / (1 - t)


def load_published(net, path, kind):
    """Put a published checkpoint into a DiT: kind "sit" (velocity) or "dit" (noise; needs epsilon=True).

    The second half of the output, a learned variance, is left out. SiT's time runs from noise to data
    and its velocity points the same way; both signs are folded into the weights, exactly: that of
    the velocity into the last layer, and t -> 1 - t into the first layer of the time embedding, whose
    sines and cosines it only mixes. The embeddings of r and of the twin, which no published weights
    have, stay as they are.  -> what was taken of the file, in words, if it is not all. Raises ValueError if the file is
    missing, no such checkpoint, or of another size.
    """
    if kind not in ("sit", "dit") or net.epsilon != (kind == "dit"):
        raise ValueError(f"kind is 'sit', for a net with epsilon=False, or 'dit', with epsilon=True; got {kind!r}")
    weights, said = read_weights(path)
    names = {"x_embedder.proj.": "x_embedder.", "t_embedder.": "times.t.", "y_embedder.embedding_table.": "label."}
    found = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        found[name] = value
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        own = net.state_dict()[name]
        if torch.is_tensor(found.get(name)) and len(found[name]) == 2 * len(own):
            found[name] = found[name].unflatten(0, (-1, 2 * net.channels))[:, : net.channels].flatten(0, 1)
    own = {name: w for name, w in net.state_dict().items() if not name.startswith(("times.r.", "times.twin."))}
    check_weights(own, found, path)
    if kind == "sit":
        found["final_layer.linear.weight"] = -found["final_layer.linear.weight"]
        found["final_layer.linear.bias"] = -found["final_layer.linear.bias"]
        weight = found["times.t.mlp.0.weight"].double()
        k = torch.exp(-math.log(10000) / (weight.shape[1] // 2) * torch.arange(weight.shape[1] // 2)).double()
        cos, sin = weight.chunk(2, dim=1)
        found["times.t.mlp.0.weight"] = torch.cat([cos * k.cos() + sin * k.sin(), cos * k.sin() - sin * k.cos()], 1)
    net.load_state_dict({**net.state_dict(), **found})
    return said
