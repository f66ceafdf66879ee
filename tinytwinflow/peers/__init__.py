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

Rooms, in reading order: common, consistency, scm, meanflow, shortcut, progressive, vsd, dmd, dmd2, sid, sana_sprint.
May import: method.
"""

from functools import partial

from .consistency import ConsistencyDistillation, ConsistencyTraining
from .dmd import DMD
from .dmd2 import DMD2
from .meanflow import MeanFlow
from .progressive import Progressive
from .sana_sprint import SanaSprint
from .scm import SCM
from .shortcut import Shortcut
from .sid import SiD
from .vsd import VSD

PEERS = {
    "consistency training": ConsistencyTraining,
    "consistency distillation": ConsistencyDistillation,
    "scm": SCM,
    "scm by differences": partial(SCM, derivative="differences"),
    "meanflow": MeanFlow,
    "shortcut": Shortcut,
    "progressive distillation": Progressive,
    "vsd": VSD,
    "dmd": DMD,
    "dmd2": DMD2,
    "sid": SiD,
    "sana-sprint": SanaSprint,
}
