"""Where the twin pays: from one flow-matching run, what one step gives against what the training for it costs."""

import json
import time
from pathlib import Path
from statistics import mean

from ..backbones import lora
from ..evaluation import pictures
from ..evaluation.tables import paying_table, summary
from ..files import write_json
from ..nets import DiT
from ..peers import PEERS
from ..runs.build import data_of, first_net
from ..runs.evaluate import rows_of, yardstick
from ..runs.folder import read_config, trained
from ..runs.methods import ON, TUNED, known_methods, named, row_of
from ..runs.recipes import OF_LOSS, RECIPES, configured
from ..runs.settings import loss_of, method_of
from .calls import calls_of
from .compare import train_and_measure, work_off

LENGTHS = (50, 100, 200, 400, 800)
AS_PRINTED = "order=2 one_step_share=0 jump_c=None"  # the paper's base but for gain, clip and twin weights
SHORT = {
    "twinflow on the paper's base": f"twinflow {AS_PRINTED}",
    "the paper's base": f"rcgm {AS_PRINTED}",
    "dmd with few pairs": 'dmd peer={"regression":1.0,"pairs":4096}',  # all 16,384 cost more than a fine-tuning
}
OURS = ("twinflow", "rcgm", "twinflow on the paper's base", "the paper's base")
COMPARED = (*OURS, "meanflow", "shortcut", "consistency distillation", "dmd with few pairs", "dmd2")
SCHEDULE = {"steps": None, "warmup_steps": 0, "base_steps": 0}
SHOWN = {"sliced_wasserstein": ("sliced W2", ".3f"), "off_data": ("off data", ".2%"), "frechet": ("Frechet", ".3f")}


def fine_tuned(text, run, steps, changes=()):
    """Settings of one line: a method, and settings of its own after it, that goes on from a flow-matching run.

    text: as `methods.entry` takes it, or a name in SHORT. run: its folder. All is the run's but for the loss, which is
    its recipe's or, of a peer, that found for it in TUNED, first and last step. Raises ValueError for an unknown method
    or setting.
    """
    name, own = named(text)
    if name not in (*SHORT, *known_methods()):
        raise ValueError(f"unknown method {name!r}: choose from {', '.join((*SHORT, *known_methods()))}")
    name, printed = named(SHORT.get(name, name))
    found = TUNED.get(name.removeprefix(ON), ())
    tuned = [change for change in found if change.partition("=")[0] not in ("lr", "warmup_steps")]
    texts = [*tuned, *printed, *changes, *own]
    before = read_config(run)
    for key, value in getattr(PEERS.get(name), "needs", {}).items():
        if before[key] != value:
            raise ValueError(f"{name} goes on from a run with {key}={value}, {run} has {before[key]}")
    kept = before | {key: RECIPES[before["recipe"]][key] for key in OF_LOSS}
    kept |= {"method": "twinflow", "peer": {}, "init_from": str(Path(run).resolve())}
    kept |= {"muon_lr": None, "checkpoint_every": steps, **row_of(name), **SCHEDULE, "steps": steps}
    given = {change.partition("=")[0] for change in texts}
    for key in sorted(given & {"data", "init_from", "seed", *SCHEDULE}):
        raise ValueError(f"{key} is no setting with --from, where RUN, --steps and --seeds say it")
    kept = {key: value for key, value in kept.items() if key not in {"recipe", *given}}
    return configured(before["recipe"], texts, **kept)


def cost_of(config, adapters=0):
    """The training of a run in flow-matching steps of its batch, which are three forward calls of all rows.

    A backward pass is two forward calls, and one where the weights are frozen but for adapters.
    """
    made = calls_of(loss_of(config), config["batch_size"], config["seed"], config["conditional"], config["steps"])
    rows = sum(call.rows * ((2 if adapters else 3) if call.gradient else 1) for call in made)
    return rows / (3 * config["batch_size"])


def adapted(config, rank):
    """A run's DiT with its first weights frozen: adapters on its linear layers, the embedders of r and twin in full."""
    net = first_net(config, data_of(config))
    if not isinstance(net, DiT):
        raise ValueError(f"--adapters are for a dit, this run has net {config['net']!r}")
    lora.add(net, ["blocks.*", "final_layer.*"], rank, also=("times.r", "times.twin"), seed=config["seed"])
    return net


def fine_tune(folder, config, method, judged_in, adapters=0):
    """Train and measure one run at one call; the result, with its cost, is left in its folder."""
    net = adapted(config, adapters) if adapters else None
    more = {"steps": config["steps"], "cost": cost_of(config, adapters)}
    train_and_measure(folder, config, method, (1,), judged_in, net, more)


def compare_from(run, lengths, methods, seeds, changes, out, jobs=None, adapters=0):
    """Fine-tune a flow-matching run by every method for every number of steps, each with a schedule of its own, and
    measure one step; write metrics.json, table.md, pays.png.

    methods: see `fine_tuned`. seeds: of batches, noise and networks beside it; the run is one. adapters: their rank; 0
    trains all weights. Stopped and called again with the same arguments it goes on where it was. Raises ValueError if
    `run` is no flow-matching run, for an unknown method or setting, or if `out` was made with other settings.
    """
    began, out, before = time.perf_counter(), Path(out), read_config(run)
    if method_of(before) != "flow matching":
        raise ValueError(f"{run} is a run of {method_of(before)}: --from takes one of flow matching")
    if adapters:
        adapted(before, adapters)
    todo = []
    for seed in seeds:
        for method in methods:
            for steps in lengths:
                config = fine_tuned(method, run, steps, changes) | {"seed": seed}
                name = "-".join(method.replace("'", "").replace("/", " ").split())
                name += f"-adapters-{adapters}" if adapters else ""
                folder = out / name / f"steps-{steps}" / f"seed-{seed}"
                todo.append((folder, config, method, out, adapters))
    data = data_of(before)
    out.mkdir(parents=True, exist_ok=True)
    lines = measured_once(run, before, data, out / "pretrained.json")
    results = work_off(todo, {before["data"]: data}, fine_tune, jobs)
    rows = []
    for steps in lengths:
        own = [result for result in results if result["steps"] == steps]
        for row in summary(own, [before["data"]], methods):
            if row["nfe"] == 1:
                cost = mean(result["cost"] for result in own if result["method"] == row["method"])
                rows.append({"steps": steps, "cost": cost, **row})
    images = "frechet" in lines["real data"]
    shown = {metric: SHOWN[metric] for metric in (["frechet"] if images else ["sliced_wasserstein", "off_data"])}
    text = paying_table(rows, lines, methods, lengths, shown)
    print(text)
    content = {"from": str(run), "seeds": list(seeds), "adapters": adapters, "device": "cpu", "lines": lines}
    content |= {"seconds": round(time.perf_counter() - began), "training_seconds": sum(r["seconds"] for r in results)}
    write_json(out / "metrics.json", content | {"rows": rows})
    (out / "table.md").write_text(text + "\n")
    pictures.draw_costs(out / "pays.png", rows, lines, methods, shown)
    print(f"\n{out}/table.md  {out}/pays.png  {out}/metrics.json")


def measured_once(run, config, data, path):
    """The run itself at 1 and 100 calls and other real data, by the metrics; measured once and kept in a file."""
    if not path.exists():
        yard = yardstick(config, data, path.parent)
        rows, _ = rows_of(trained(run), (1, 100), yard)
        lines = {f"flow matching, {row['nfe']} NFE": row for row in rows}
        write_json(path, lines | {"real data": yard.floor})
    return json.loads(path.read_text())
