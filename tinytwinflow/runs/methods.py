"""Methods by name, with the settings that were found for each: what a row of a table of methods is trained with."""

from .. import peers
from .recipes import configured

OF_TWINFLOW = {"method": "twinflow", "base": "any-step", "peer": {}}
FLOW_MATCHING = {**OF_TWINFLOW, "order": 0, "share": 0.0, "warmup_steps": 0, "base_steps": 0}
RCGM = {"share": 0.0}
TWIN_ALONE = {"share": 1.0, "base_steps": 0}  # after flow matching; no base holds the mass or the real velocity
ON = "twin on "  # a base, of `peers.BASES`
TWIN = "self-adversarial"  # the family
# the network is a smooth one, for sCM and MeanFlow differentiate it in time, and so learns at a higher rate
EQUAL = ("steps=3000", "batch_size=256", "lr=4e-3", "eval_samples=20000", "checkpoint_every=1000", "sharp=false")
EQUAL += ("muon_lr=None", "flow_share=0.5", "one_step_share=0.3", "jump_c=None", "time_shape=[1,1,1]")  # as in trials
TUNED = {  # by seven trials a method, on checkerboard with seed 100; see tutorials/peers.md
    "consistency training": ("lr=1e-3", "warmup_steps=750", 'peer={"c":null}'),
    "consistency distillation": ("lr=4e-3", "warmup_steps=750", "teacher_ema=0.9", 'peer={"steps":12}'),
    "scm": ("lr=1e-3", "warmup_steps=0"),
    "scm by differences": ("lr=1e-3", "warmup_steps=0"),
    "meanflow": ("lr=1e-3", "warmup_steps=0", 'peer={"power":0.5}'),
    "improved meanflow": ("lr=4e-3", "warmup_steps=750"),
    "pixel meanflow": ("lr=1e-3", "warmup_steps=0"),
    "euler mean flow": ("lr=4e-3", "warmup_steps=750", 'peer={"power":0.5}'),
    "alpha-flow": ("lr=4e-3", "warmup_steps=0", 'peer={"power":0.5}'),
    "soflow": ("lr=4e-3", "warmup_steps=0", 'peer={"power":0.5}'),
    "shortcut": ("lr=4e-3", "warmup_steps=750", "teacher_ema=0.9"),
    "progressive distillation": ("lr=4e-3", "warmup_steps=750", "ema=0.99"),
    "vsd": ("lr=4e-3", "warmup_steps=1500"),
    "dmd": ("lr=4e-3", "warmup_steps=1500", 'peer={"regression":1.0}'),
    "dmd with own fakes": ("lr=4e-3", "warmup_steps=2000", 'peer={"regression":1.0}'),
    "dmd2": ("lr=4e-3", "warmup_steps=1500", 'peer={"gan":0.3}'),
    "adversarial self-distillation": ("lr=1e-3", "warmup_steps=1500", 'peer={"gan":0.01,"most":1}'),
    "sid": ("lr=4e-3", "warmup_steps=750"),
    "sana-sprint": ("lr=1e-3", "warmup_steps=1500", 'peer={"warm_up":0.5}'),
    "freeflow": ("lr=4e-3", "warmup_steps=1500", 'peer={"alpha":0.3}'),
    "drifting": ("lr=4e-3", "warmup_steps=0", 'peer={"temperatures":[0.05,0.2]}'),
    "apex": ("lr=4e-3", "warmup_steps=750", 'peer={"mixing":0.2}'),
    "twin alone": ("lr=1e-3", "warmup_steps=1500", "rectify_clip=1"),
}


def known_methods():
    """The names that a row of a table of methods may have, in the order of its rows."""
    return ("flow matching", "rcgm", *peers.PEERS, "twin alone", *(ON + name for name in peers.BASES), "twinflow")


def compared_methods():
    """The rows of a table of methods where none are named: of the bases that the twin can stand on, two."""
    left_out = {ON + name for name in peers.BASES} - {ON + "meanflow", ON + "shortcut"}
    return tuple(name for name in known_methods() if name not in left_out)


def method_family(text):
    """The family of one line of a table of methods, see `peers.PEER_FAMILIES`."""
    name = named(text)[0]
    own = {"flow matching": "flow matching", "rcgm": "any-step", "twin alone": TWIN, "twinflow": TWIN}
    families = {method: family for family, methods in peers.PEER_FAMILIES.items() for method in methods}
    return TWIN if name.startswith(ON) else (own | families).get(name, "-")


def row_of(name):
    """The settings that the name of a row stands for, those of recipes but for these."""
    if name in peers.PEERS:
        return {"method": name}
    if name.startswith(ON):
        return {"base": name.removeprefix(ON)}
    return {"flow matching": FLOW_MATCHING, "rcgm": RCGM, "twin alone": TWIN_ALONE}.get(name, {})


def named(text):
    """A line's method and the settings after it.  "dmd2 lr=1e-3" -> "dmd2", ["lr=1e-3"]."""
    words = text.split()
    return " ".join(word for word in words if "=" not in word), [word for word in words if "=" in word]


def entry(text, changes=()):
    """Settings of one line of the table: a method's name, and settings of its own after it.

    text: "dmd2" or "dmd2 lr=1e-3 warmup_steps=1500". changes: those for all. Later ones win: EQUAL, TUNED, changes,
    own. Raises ValueError for an unknown method or setting.
    """
    name, own = named(text)
    if name not in known_methods():
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(known_methods())}")
    of_row = row_of(name)
    for key in sorted({text.partition("=")[0] for text in own} & of_row.keys()):
        raise ValueError(f"{name!r} says itself what {key} is: choose another method, or leave {key} out")
    steps = configured("toy", [change for change in (*EQUAL, *changes, *own) if change.startswith("steps=")])["steps"]
    given = [*EQUAL, *tuned(name, steps), *changes, *own]
    if name in peers.PEERS:
        given = [change for change in given if not change.startswith("base_steps=")]  # only TwinFlow has that phase
    return configured("toy", given, **of_row)


def tuned(name, steps):
    """The settings found for a method, with flow matching at its beginning for the same share of the steps."""
    of_trials = configured("toy", EQUAL)["steps"]
    for change in TUNED.get(name.removeprefix(ON), ()):
        key, _, value = change.partition("=")
        yield f"{key}={round(int(value) * steps / of_trials)}" if key == "warmup_steps" else change
