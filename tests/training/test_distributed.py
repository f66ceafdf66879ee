"""Many processes: their mean gradient is that of one process, and a checkpoint belongs to no number of them.

Processes are real ones, on the CPU, joined by gloo. `launched` starts a function of a test file in each of them and
plays torchrun, whose own processes would import for seconds what these have at once.
"""

import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ended, fresh, full_at
from torch import distributed as dist

import tinytwinflow as ttf
from tinytwinflow.cli.commands import main
from tinytwinflow.data.points import Points
from tinytwinflow.method.draws import draw_for
from tinytwinflow.runs.build import state_of
from tinytwinflow.runs.folder import trained
from tinytwinflow.runs.recipes import configured
from tinytwinflow.training import distributed as scale
from tinytwinflow.training import sharded
from tinytwinflow.training.checkpoints import keep_state
from tinytwinflow.training.loop import autocast, loss_of_batch, train
from tinytwinflow.training.state import new_state

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], *sys.path))),
}
LOSS = ttf.TwinFlowLoss.paper(flow_share=0.5, guidance=0.5, guidance_range=(0.0, 0.4), gain=4.0)


def torchrun(processes, *command, **options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*launcher, *map(str, command)]
    run = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    weakref.finalize(run, run.stdout.close)
    return run


def launched(size, folder, function, *args, machines=1):
    """Start a function in so many processes, told of each other as torchrun does.  -> processes, the store they meet in

    What process 0 says comes to be in the file said-0 of the folder.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size)}
    env |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    local, processes = size // machines, []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
        processes.append(fresh(folder / f"said-{rank}", env | own, function, *args))
    return processes, store


def work(function, folder):
    """What a process that `together` started does."""
    with scale.joined("cpu", seed=7) as world:
        world.folder = folder
        torch.save(function(world), folder / f"{function.__name__}-{world.rank}.pt")


def together(size, function, folder):
    """Run a function of a test file, given its World, in so many processes.  -> what each returned."""
    processes, _store = launched(size, folder, work, function, folder)
    assert ended(processes, 100) == [0] * size, [(folder / f"said-{rank}").read_text() for rank in range(size)]
    return [torch.load(folder / f"{function.__name__}-{rank}.pt") for rank in range(size)]


def placed_state(build, world, parallel="ddp", weights=True, make=new_state, **how):
    """The State of a network on its processes; build(weights) makes the network."""
    place = partial(scale.prepare, world=world, parallel=parallel, **how)
    if parallel == "ddp":
        state = make(build(True), place=place)
        state.call = scale.as_copies(state.net, "cpu")
        return state
    with scale.without_weights():
        net = build(False)
    state = make(net, place=place)
    if weights:
        scale.deal_out(state.net, build(True).state_dict() if world.rank == 0 else {})
        state.restart()
    return state


def small_net(weights=True):
    """A DiT with no zero weights, so that every part of the loss has a gradient."""
    torch.manual_seed(0)
    net = ttf.nets.DiT(size=4, channels=1, classes=3, width=16, depth=2, heads=2, patch=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def moved(net):
    """The same network with other weights, to be told apart from it."""
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.mul_(0.9 + 0.01 * i)
    return net


def batch_of(rank, step=0, n=6):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, 1, 4, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def whole_gradients(net):
    return {name: whole(parameter.grad) for name, parameter in net.named_parameters()}


def mean_gradients(size, parts=1, n=6, precision="float32", step=0):
    """What `size` processes should find, from one: the mean of the gradients of their losses."""
    world = [scale.World(rank, size, "cpu", seed=7) for rank in range(size)]
    net, teacher = small_net(), moved(small_net())
    for one in world:
        generator = torch.Generator()
        same = one.reseed(generator, step)
        x, label = batch_of(one.rank, n=n)
        for rows in torch.arange(n).chunk(parts):
            with autocast("cpu", precision):
                out = LOSS(net, x[rows], label[rows], teacher, torch.tensor([3]), None, generator, same)
            (out.total / parts / size).backward()
    return whole_gradients(net)


def gradients(world, parallel, parts=1, n=6, step=0, **how):
    """What one process of many finds."""
    state = placed_state(small_net, world, parallel=parallel, make=new_state, **how)
    state.teacher.load_state_dict(state.net.state_dict())
    with torch.no_grad():
        for i, parameter in enumerate(state.teacher.parameters()):
            parameter.mul_(0.9 + 0.01 * i)
    same = world.reseed(state.generator, step)
    x, label = batch_of(world.rank, n=n)
    for k, rows in enumerate(torch.arange(n).chunk(parts)):
        world.sync(state.call or state.net, last=k == parts - 1)
        with autocast("cpu", how.get("precision", "float32")):
            out = loss_of_batch(LOSS, state, x[rows], label[rows], torch.tensor([3]), 0.0, same)
        (out.total / parts).backward()
    return whole_gradients(state.net)


def close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    size = max(value.abs().max() for value in b.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * size, name


def all_gradients(world):
    own, graphs = torch.compile, []
    torch.compile = lambda forward: own(forward, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    compiled = {
        "fsdp compiled": gradients(world, "fsdp", compile="default"),
        "ddp compiled": gradients(world, "ddp", compile="default"),
        "fsdp compiled, recomputed": gradients(world, "fsdp", compile="default", recompute=True),
    }
    assert graphs, "torch has traced them"
    return compiled | {
        "ddp": gradients(world, "ddp"),
        "fsdp": gradients(world, "fsdp"),
        "fsdp in parts": gradients(world, "fsdp", parts=3),
        "ddp in parts": gradients(world, "ddp", parts=3),
        "fsdp recomputed": gradients(world, "fsdp", recompute=True),
        "ddp recomputed": gradients(world, "ddp", recompute=True),
        **{f"fsdp, a row each, step {step}": gradients(world, "fsdp", n=1, step=step) for step in (0, 4, 5)},
        "hsdp": gradients(replace(world, local=1), "hsdp"),
        "fsdp bf16": gradients(world, "fsdp", precision="bf16"),
    }


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """grad of DDP and FSDP2 = mean over processes of grad of each one's loss: one batch or summed in parts,
    activations kept or computed again, blocks compiled or not, and with a row on each.
    """
    found = together(2, all_gradients, tmp_path)
    expected, in_parts = mean_gradients(2), mean_gradients(2, parts=3)
    halves = mean_gradients(2, precision="bf16")
    assert max((expected[name] - in_parts[name]).abs().max() for name in expected) > 1e-3
    for mine in found:
        for kind in ("ddp", "fsdp", "hsdp", "fsdp recomputed", "ddp recomputed"):
            close(mine[kind], expected)
        for kind in ("fsdp compiled", "ddp compiled", "fsdp compiled, recomputed"):
            close(mine[kind], expected)
        for kind in ("fsdp in parts", "ddp in parts"):
            close(mine[kind], in_parts)
        for step in (0, 4, 5):
            close(mine[f"fsdp, a row each, step {step}"], mean_gradients(2, n=1, step=step))
        close(mine["fsdp bf16"], halves, 0.03)
        assert any(not torch.equal(mine["fsdp bf16"][name], mine["fsdp"][name]) for name in expected)


def test_processes_have_their_own_noise_and_the_same_turns():
    """z differs between processes and between steps, the turns that parts take only between steps."""
    noise, turns = [], set()
    for rank in range(3):
        for step in range(4):
            generator = torch.Generator()
            turns.add((step, scale.World(rank, 3, "cpu", seed=1).reseed(generator, step).initial_seed()))
            noise.append(tuple(draw_for(LOSS, torch.zeros(2, 2), generator).z.flatten().tolist()))
    assert len(set(noise)) == 12 and len(turns) == len({seed for _, seed in turns}) == 4


def trained_in_pieces(world):
    """Three steps sharded; the record, all weights, and weights of the average."""
    state = placed_state(small_net, world, parallel="fsdp")
    records = list(train(state, LOSS, lambda i: batch_of(world.rank, i), 3, null=3, world=world, clip_norm=1.0))
    sharded.save_pieces(world.folder, state, {"shape": [1, 4, 4]})
    again = placed_state(small_net, world, parallel="fsdp", weights=False)
    data = sharded.load_pieces(sharded.newest(world.folder), again)
    weights = {f"{kind}.{k}": whole(v) for kind, part in state.weights().items() for k, v in part.items()}
    loaded = {f"{kind}.{k}": whole(v) for kind, part in again.weights().items() for k, v in part.items()}
    moments = [whole(again.optimizer.state[p]["exp_avg"]) for p in again.net.parameters()]
    return {"records": records, "weights": weights, "loaded": loaded, "moments": moments, "data": data}


def loaded_again(world):
    state = placed_state(small_net, world, parallel="fsdp", weights=False)
    sharded.load_pieces(sharded.newest(world.folder), state)
    weights = {f"{kind}.{k}": whole(v) for kind, part in state.weights().items() for k, v in part.items()}
    return {"weights": weights, "moments": [whole(state.optimizer.state[p]["exp_avg"]) for p in state.net.parameters()]}


def one_process_like(size, state=None, batch_of=batch_of, null=None, ema=0.999):
    """The same three steps by one process: the mean of the gradients of what each process would do."""
    state, null, records = state or new_state(small_net()), null or torch.tensor([3]), []
    peak = state.optimizer.param_groups[0]["lr"]
    worlds = [scale.World(rank, size, "cpu", seed=7) for rank in range(size)]
    for step in range(3):
        state.optimizer.param_groups[0]["lr"] = peak * ttf.training.loop.learning_rate(step, 3)
        state.optimizer.zero_grad()
        totals = []
        for world in worlds:
            same = world.reseed(state.generator, step)
            x, cond = batch_of(world.rank, step)
            out = loss_of_batch(LOSS, state, x, cond, null, 0.0, same)
            (out.total / size).backward()
            totals.append(out.total.item())
        torch.nn.utils.clip_grad_norm_(state.net.parameters(), 1.0)
        state.optimizer.step()
        state.follow(ema, 0.99)
        state.step += 1
        records.append(sum(totals) / size)
    return state, records


def test_training_in_pieces_is_training_and_its_checkpoint_loads_on_any_number(tmp_path):
    """Two sharded processes = one process fed with both parts: records, weights and both averages. What they saved
    on 2 loads on 1 without torchrun, on 2 and on 3, tensor for tensor, with the optimiser's moments."""
    found = together(2, trained_in_pieces, tmp_path)
    state, totals = one_process_like(2)
    for mine in found:
        assert [record["total"] for record in mine["records"]] == pytest.approx(totals, rel=1e-4)
        for part, tensors in state.weights().items():
            for name, value in tensors.items():
                torch.testing.assert_close(mine["weights"][f"{part}.{name}"], value, rtol=1e-3, atol=2e-5)
        assert all(torch.equal(mine["weights"][name], mine["loaded"][name]) for name in mine["weights"])
        assert mine["data"] == {"shape": [1, 4, 4]}
    alone = new_state(moved(small_net()))
    sharded.load_pieces(sharded.newest(tmp_path), alone)
    assert alone.step == 3
    for part, tensors in alone.weights().items():
        for name, value in tensors.items():
            assert torch.equal(value, found[0]["weights"][f"{part}.{name}"])
    for other in together(3, loaded_again, tmp_path):
        assert all(torch.equal(other["weights"][name], value) for name, value in found[0]["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(other["moments"], found[0]["moments"]))
        for a, p in zip(other["moments"], alone.net.parameters()):
            assert torch.equal(a, alone.optimizer.state[p]["exp_avg"]) and a.abs().max() > 0


def backbone(weights=True):
    """A tiny SD3 in bfloat16 with adapters in float32; those of the student and its average are not zero."""
    import diffusers
    from test_velocity import TINY

    from tinytwinflow.backbones import states as large
    from tinytwinflow.backbones.velocity import Velocity

    torch.manual_seed(0)
    net = Velocity(diffusers.SD3Transformer2DModel(**TINY["SD3Transformer2DModel"])).bfloat16()
    large.adapt(net, 3)
    for name, parameter in net.named_parameters():
        if weights and name.endswith("_B.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
    return net


def of_adapters(net, place):
    from tinytwinflow.backbones import states as large

    return large.backbone_state(net, {"lora_rank": 3, "lr": 0.1, "seed": 0}, place)


def prompts_of(rank, step=0):
    draw = torch.Generator().manual_seed(100 * step + rank)
    words = {"prompt_embeds": torch.randn(6, 5, 12, generator=draw), "pooled": torch.randn(6, 10, generator=draw)}
    return torch.randn(6, 4, 8, 8, generator=draw), words


NULL = {"prompt_embeds": torch.zeros(1, 5, 12), "pooled": torch.zeros(1, 10)}


def adapters_in_pieces(world):
    """Three steps of adapters in float32 on pieces of bfloat16; the record and all weights."""
    state = placed_state(backbone, world, parallel="fsdp", make=of_adapters, recompute=True)
    batch = partial(prompts_of, world.rank)
    records = list(train(state, LOSS, batch, 3, ema=0.9, null=NULL, world=world, clip_norm=1.0))
    return {"records": records, "weights": {name: whole(value) for name, value in state.net.state_dict().items()}}


def test_adapters_in_float32_learn_on_pieces_of_bfloat16(tmp_path):
    """Two sharded processes, their blocks computed again in the backward pass = one process fed with both parts, but
    for roundings, which AdamW makes a part of a step; the backbone stays in bfloat16 and where it was."""
    pytest.importorskip("diffusers")
    found = together(2, adapters_in_pieces, tmp_path)
    state, began = of_adapters(backbone(), lambda net: net), backbone().state_dict()
    state.restart()
    state, totals = one_process_like(2, state, prompts_of, NULL, ema=0.9)
    learnt = {name for name, p in state.net.named_parameters() if p.requires_grad}
    for mine in found:
        assert [record["total"] for record in mine["records"]] == pytest.approx(totals, rel=1e-3)
        here = state.net.state_dict()
        wrong = sum((mine["weights"][name] - here[name]).square().sum() for name in learnt)
        assert wrong < 0.03**2 * sum((here[name] - began[name]).square().sum() for name in learnt)
        assert {mine["weights"][name].dtype for name in learnt} == {torch.float32}
        still = [name for name in began if name not in learnt and "average" not in name]
        assert all(torch.equal(mine["weights"][name], began[name]) for name in still)
        assert sum(began[name].dtype == torch.bfloat16 for name in still) > 30


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    state = new_state(small_net())
    sharded.save_pieces(tmp_path, state, {})
    other = new_state(ttf.nets.DiT(size=4, channels=1, classes=3, width=32, depth=2, heads=2, patch=2))
    with pytest.raises(ValueError, match=r"holds another network \(blocks.0.* is \(96,\) there, \(192,\) here\)"):
        sharded.load_pieces(sharded.newest(tmp_path), other)
    piece = next(sharded.newest(tmp_path).glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        sharded.load_pieces(sharded.newest(tmp_path), state)
    (sharded.newest(tmp_path) / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        sharded.load_pieces(sharded.newest(tmp_path), state)
    (sharded.newest(tmp_path) / "about.json").write_text("{")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        sharded.load_pieces(sharded.newest(tmp_path), state)


def test_a_checkpoint_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    """Stopped while it writes, or weights not finite: the last checkpoint is there and loads."""
    state = new_state(small_net())
    sharded.save_pieces(tmp_path, state, {})
    state.step = 1
    with monkeypatch.context() as patch:
        patch.setattr(sharded, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sharded.save_pieces(tmp_path, state, {})
    assert sharded.newest(tmp_path).name == "checkpoint-000000"
    sharded.save_pieces(tmp_path, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    state.step = 2
    with torch.no_grad():
        next(state.net.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 2: weight net.*not finite; the last checkpoint stays"):
        sharded.save_pieces(tmp_path, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def full_on_one(world):
    """The disk of one of two processes is full while they write a checkpoint; then there is room."""
    state, said = placed_state(small_net, world, parallel="fsdp"), {}
    for name, rank in (("ddp", 0), ("fsdp", 1), ("fsdp index", 0)):
        folder, pieces = world.folder / name, name != "ddp"
        state.step = 0
        keep_state(folder, state if pieces else new_state(small_net()), {}, pieces, world)
        state.step = 1
        room = {"fsdp index": 20000}.get(name, 300) if world.rank == rank else 10**7
        with full_at(room):
            try:
                keep_state(folder, state if pieces else new_state(moved(small_net())), {}, pieces, world)
            except OSError as error:
                said[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
        said[f"{name} left"] = sorted(path.name for path in folder.iterdir())
        dist.barrier()
        keep_state(folder, state if pieces else new_state(small_net()), {}, pieces, world)
    return said


def test_a_full_disk_on_one_process_is_told_by_all_and_leaves_the_last_checkpoint(tmp_path):
    for name in ("ddp", "fsdp", "fsdp index"):
        (tmp_path / name).mkdir()
    for said in together(2, full_on_one, tmp_path):
        assert said["ddp left"] == ["checkpoint.pt"]
        assert said["fsdp left"] == said["fsdp index left"] == ["checkpoint-000000"]
        for name in ("ddp", "fsdp", "fsdp index"):
            assert "File too large" in said[name] and len(said[name].splitlines()) == 1, said[name]
            assert str(tmp_path / name) in said[name]
    assert [path.name for path in (tmp_path / "fsdp").iterdir()] == ["checkpoint-000001"]


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_no_pieces(tmp_path, room):
    state = new_state(small_net())
    sharded.save_pieces(tmp_path, state, {"mean": torch.tensor([0.1]), "std": None})
    state.step = 1
    with full_at(room), pytest.raises(OSError, match="File too large") as error:
        sharded.save_pieces(tmp_path, state, {})
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000"]
    assert torch.equal(sharded.load_pieces(sharded.newest(tmp_path), state)["mean"], torch.tensor([0.1]).double())


def test_batches_of_processes_are_the_parts_of_the_whole(tmp_path):
    """The rows of all processes, one after the other, are those of the run with one; uneven parts are refused."""
    path = tmp_path / "points.csv"
    path.write_text("".join(f"{i},{i * i % 7}\n" for i in range(50)))
    for name in ("8gaussians", str(path)):
        one = Points(name, 12, seed=3).batch(5)[0]
        parts = [Points(name, 12, seed=3, part=(rank, 3)).batch(5)[0] for rank in range(3)]
        assert torch.equal(torch.cat(parts), one)
        with pytest.raises(ValueError, match="batch_size 12 must be a multiple of the 5 processes"):
            Points(name, 12, part=(0, 5)).batch(0)


STEPS, DEATH = 20, 12


def command(out, *more):
    changes = [f"steps={STEPS}", "batch_size=48", "width=16", "checkpoint_every=5", "eval_samples=100"]
    return ["train", "toy", "--out", str(out), "--set", *changes, *more]


def line(argv, death=None):
    """The command line; the second process kills itself with -9 where the noise of step `death` is drawn."""
    reseed = scale.World.reseed

    def dying(world, generator, step):
        if world.rank == 1 and step == death:
            os.kill(os.getpid(), signal.SIGKILL)
        return reseed(world, generator, step)

    scale.World.reseed = dying
    sys.exit(main(argv))


def run_of_two(folder, argv, machines=1, death=None):
    """The command line in two processes.  -> their exit statuses, what the first said"""
    processes, _store = launched(2, folder, line, argv, death, machines=machines)
    return ended(processes), (folder / "said-0").read_text()


@pytest.mark.parametrize("parallel, machines", [("ddp", 1), ("fsdp", 1), ("hsdp", 2)])
def test_killing_one_process_ends_the_run_and_it_resumes_bit_for_bit(tmp_path, parallel, machines):
    """A run on two processes, one of them killed with -9 in the middle: the other ends with one line, the last
    checkpoint is whole, and going on from it gives the weights of a run left alone."""
    quiet, hurt = tmp_path / "quiet", tmp_path / "hurt"
    statuses, said = run_of_two(tmp_path, command(hurt, f"parallel={parallel}"), machines, DEATH)
    assert statuses == [2, -signal.SIGKILL]
    assert said.splitlines()[-1] == "tinytwinflow: process 0: another process of the run has ended"
    assert "Traceback" not in said and trained(hurt)[2]["step"] == 10
    for argv in (command(quiet, f"parallel={parallel}"), [*command(hurt), "--resume"]):
        statuses, said = run_of_two(tmp_path, argv, machines)
        assert statuses == [0, 0], said
    a, b = trained(quiet), trained(hurt)
    assert a[2]["step"] == b[2]["step"] == STEPS
    assert all(torch.equal(x, y) for x, y in zip(a[0].state_dict().values(), b[0].state_dict().values()))
    logs = [(folder / "log.jsonl").read_text() for folder in (quiet, hurt)]
    records = [[json.loads(line)["total"] for line in log.splitlines()] for log in logs]
    assert records[0] == records[1] and len(records[0]) == STEPS


def test_torchrun_ends_a_run_one_of_whose_processes_is_killed(tmp_path):
    """The launcher's error names the signal, the last checkpoint is whole, and one process alone goes on from it."""
    run = torchrun(2, __file__, *command(tmp_path / "run"))
    said = run.communicate(timeout=120)[0]
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert trained(tmp_path / "run")[2]["step"] == 10


def test_wrong_uses_are_refused(tmp_path):
    """What two processes cannot do, from how many they are said to be; and the command line says so in one line."""
    world = scale.World(0, 2, "cpu")
    for change, what in (("method=dmd", "dmd trains on one process"), ("optimizer=adafactor", "parallel=fsdp")):
        with pytest.raises(ValueError, match=what):
            state_of(configured("toy") | dict([change.split("=")]), Points("moons", 8), "cpu", world)
    with pytest.raises(ValueError, match="recompute needs a network with blocks, MLP has none"):
        scale.prepare(ttf.nets.MLP(2), recompute=True)
    statuses, said = run_of_two(tmp_path, command(tmp_path / "run", "batch_size=47"))
    assert statuses == [2, 2] and said.startswith("tinytwinflow: ") and len(said.splitlines()) == 1
    assert "batch_size 47 must be a multiple of the 2 processes" in said


if __name__ == "__main__":
    line(sys.argv[1:], DEATH)
