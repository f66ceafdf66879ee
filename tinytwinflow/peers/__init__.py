"""The methods the paper compares with, each a loss on the same velocity field and the same path.

    loss = peers.MeanFlow()
    out = loss(net, x, teacher=average)                   # out.total.backward()
    loss = peers.DMD2()
    out = loss(net, x, original=flow_model, fake=fake, critic=critic)

The contract of a loss: it is called with net, the data x (B, *D), cond (None or a tensor of B rows), a generator,
turns (another one, on the CPU, for what decides which calls are made, see `draws.split`), progress (how far training
is, 0 to 1), and the networks that it needs beside net, by name. `helpers` says which:
"average", the moving average of net; "frozen", the flow model that training began with; "trained", an auxiliary one
that begins as that flow model; "critic", an auxiliary one that begins anew. All get gradient from their own terms only.
"features", what images are compared by, is no network of that kind: a classifier of another seed than the one that
judges, with a function features(x); for points there is none. `needs`, if it has one, are settings of the network.
`refill`, if it has one, says at which progress the frozen ones are filled anew. It returns a named tuple of scalars,
`total` and its terms. `mode` is how its model samples in several steps: "any", "few" or "multi", see `samplers`, None
where it learns the step from noise to data alone. One of your own, which `training.train` takes as it takes these; as
an entry of PEERS it has a name too, for `fit(x, method="halfway")` and, written here, for `compare`:

>>> from tinytwinflow.method.draws import normal, uniform
>>> from tinytwinflow.method.path import interpolate, velocity
>>> from tinytwinflow.peers.common import terms
>>> class Halfway:
...     helpers, mode = {"teacher": "average"}, "multi"
...     def __call__(self, net, x, cond=None, teacher=None, generator=None, **_):
...         z, t = normal(x, generator), uniform(x, generator)
...         error = net(interpolate(x, z, t), t, t, cond) - velocity(x, z)
...         return terms(flow=error.square().mean())

Rooms, in reading order: common, consistency, scm, meanflow, improved_meanflow, pixel_meanflow, euler_mean_flow,
alpha_flow, soflow, shortcut, progressive, vsd, dmd, dmd2, self_distillation, sid, sana_sprint, freeflow, drifting,
apex.
May import: method, ranges.
"""

from functools import partial

from .alpha_flow import AlphaFlow
from .apex import APEX
from .consistency import ConsistencyDistillation, ConsistencyTraining
from .dmd import DMD
from .dmd2 import DMD2
from .drifting import Drifting
from .euler_mean_flow import EulerMeanFlow
from .freeflow import FreeFlow
from .improved_meanflow import ImprovedMeanFlow
from .meanflow import MeanFlow
from .pixel_meanflow import PixelMeanFlow
from .progressive import Progressive
from .sana_sprint import SanaSprint
from .scm import SCM
from .self_distillation import SelfDistillation
from .shortcut import Shortcut
from .sid import SiD
from .soflow import SoFlow
from .vsd import VSD

PEERS = {
    "consistency training": ConsistencyTraining,
    "consistency distillation": ConsistencyDistillation,
    "scm": SCM,
    "scm by differences": partial(SCM, derivative="differences"),
    "meanflow": MeanFlow,
    "improved meanflow": ImprovedMeanFlow,
    "pixel meanflow": PixelMeanFlow,
    "euler mean flow": EulerMeanFlow,
    "alpha-flow": AlphaFlow,
    "soflow": SoFlow,
    "shortcut": Shortcut,
    "progressive distillation": Progressive,
    "vsd": VSD,
    "dmd": DMD,
    "dmd with own fakes": partial(DMD, own_fakes=True),
    "dmd2": DMD2,
    "adversarial self-distillation": SelfDistillation,
    "sid": SiD,
    "sana-sprint": SanaSprint,
    "freeflow": FreeFlow,
    "drifting": Drifting,
    "apex": APEX,
}
PEER_FAMILIES = {
    "consistency": ("consistency training", "consistency distillation", "scm", "scm by differences"),
    "any-step": (
        "meanflow", "improved meanflow", "pixel meanflow", "euler mean flow", "alpha-flow", "soflow", "shortcut",
        "progressive distillation",
    ),
    "distribution matching": ("vsd", "dmd", "dmd with own fakes", "sid", "freeflow"),
    "adversarial": ("dmd2", "adversarial self-distillation", "sana-sprint"),
    "drifting": ("drifting",),
    "self-adversarial": ("apex",),
}  # fmt: skip
# what the twin can stand on in place of the any-step base: those that need no network beside the average, nor another
BASES = tuple(
    name
    for name, make in PEERS.items()
    if not set(make().helpers.values()) - {"average"} and not hasattr(make(), "needs")
)
