"""Full-parameter training where neither gradients nor float32 copies of the weights fit.

The optimiser runs inside the backward pass: each parameter takes its step, and its gradient is freed, as soon as
that gradient is complete. Weights may be bfloat16 alone, because they are rounded at random: a step far smaller than
the distance to the next bfloat16 number is then not lost but taken now and then, right in the mean.
"""

from functools import partial

import torch

from ..method.draws import seeded


def stochastic_round(x, generator=None):
    """Round to one of the two nearest bfloat16 numbers, the nearer the likelier, so that the mean is x.

    x float32 of any shape -> bfloat16. What bfloat16 holds exactly, NaN and infinity stay as they are. Past the
    largest bfloat16 number the neighbour is infinity. generator: on the device of x. ValueError for another dtype.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"stochastic_round takes float32, got {x.dtype}")
    low = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    # a bfloat16 is the upper half of a float32: the sum carries into it with probability lower half / 2^16
    up = low.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(x.isfinite(), up, x).bfloat16()


def in_backward(parameters, lr, make_optimizer=torch.optim.Adafactor, seed=0):
    """Let `loss.backward()` train: each parameter steps, and loses its gradient, in the midst of it.  -> InBackward

    parameters: pairs of name and parameter, as net.named_parameters() gives them, all trainable, float32 or bfloat16;
    after FSDP2 has sharded them, if it does. make_optimizer([parameter], lr=lr) makes an optimiser for one of them.
    seed: of the rounding, see `InBackward`. Raises ValueError for other parameters.

    One backward is one step: gradients can be neither accumulated nor clipped, nor averaged by DDP, which would come
    too late. `check` tells whether all gradients were finite; the weights have moved by then: go on from a checkpoint.
    """
    parameters = list(parameters)
    for name, p in parameters:
        if p.dtype not in (torch.float32, torch.bfloat16) or not p.requires_grad:
            kind = p.dtype if p.requires_grad else "frozen"
            raise ValueError(f"{name} is {kind}: training inside backward takes trainable float32 or bfloat16")
    optimizer = InBackward(parameters, lr, make_optimizer, seed)
    for number, (_, p) in enumerate(parameters):
        optimizer.hooks.append(p.register_post_accumulate_grad_hook(partial(optimizer.update, number)))
    return optimizer


class InBackward:
    """As many optimisers as parameters, which look like one to a training loop. Made by `in_backward`.

    param_groups: one group, whose lr holds from the next backward on. step and zero_grad have nothing left to do.

    An optimiser sees a float32 stand-in, which exists only during its step: of a float32 parameter the parameter's
    own memory, of a bfloat16 one a copy, written back with `stochastic_round`. Of a parameter sharded by FSDP2 it sees
    this process's piece, so Adafactor's statistics of rows and columns are those of the piece. A convolution's weight
    (out, in, *kernel) is shown, and its state saved, as the matrix (out, in * kernel), see `as_matrix`.

    What a rounding draws depends on the seed, the parameter's number and how many steps it took, and on nothing else:
    a resumed run repeats it, whatever the order of the parameters in backward.

    Nothing in a step waits for an accelerator.
    """

    def __init__(self, parameters, lr, make_optimizer, seed=0):
        self.names, everything = [name for name, _ in parameters], [p for _, p in parameters]
        self.param_groups = [{"params": everything, "lr": lr, "initial_lr": lr}]
        self.stand_ins = [torch.nn.Parameter(torch.empty(0, dtype=torch.float32, device=p.device)) for p in everything]
        self.optimizers = [make_optimizer([stand_in], lr=lr) for stand_in in self.stand_ins]
        self.seed, self.steps, self.hooks = seed, [0] * len(everything), []
        self.generators = {p.device: torch.Generator(p.device) for p in everything}
        self.keys = self.keys_of_rounding()
        self.finite = [True] * len(everything)  # whether all its gradients were, a tensor of one bool

    @torch.no_grad()
    def update(self, number, p):
        """Take the step of one parameter and free its gradient."""
        weight, grad = local(p), local(p.grad)
        self.finite[number] = grad.isfinite().all() & self.finite[number]
        self.steps[number] += 1
        if weight.numel():  # a process may hold no row of a small parameter
            stand_in, optimizer = self.stand_ins[number], self.optimizers[number]
            stand_in.data, stand_in.grad = as_matrix(weight.float()), as_matrix(grad.float())
            p.grad = grad = None
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()
            stepped = stand_in.data
            if weight.dtype == torch.bfloat16:
                stepped = stochastic_round(stepped, self.reseeded(number, weight.device))
            if stepped.data_ptr() != weight.data_ptr():  # where a float32 weight is shown as it lies, it has moved
                weight.copy_(stepped.view(weight.shape))
            stand_in.data, stand_in.grad = torch.empty(0, device=weight.device), None
        p.grad = None

    def check(self):
        """Raise FloatingPointError if a gradient was not finite since the last state was loaded. It waits for steps."""
        known = {name: finite for name, finite in zip(self.names, self.finite) if torch.is_tensor(finite)}
        if known:
            answers = torch.stack([finite.to(self.stand_ins[0].device) for finite in known.values()]).tolist()
            if not all(answers):
                name = list(known)[answers.index(False)]
                raise FloatingPointError(f"the gradient of {name} is not finite; lower lr")

    def reseeded(self, number, device):
        return self.generators[device].manual_seed((self.keys[number] + self.steps[number]) % 2**63)

    def keys_of_rounding(self):
        return [seeded(self.seed, number).initial_seed() for number in range(len(self.names))]

    def stop(self):
        """Let backward passes be. Until then Python frees no parameter: their hooks hold them, where it cannot see."""
        for hook in self.hooks:
            hook.remove()

    def step(self):
        """Nothing: backward has taken the step."""

    def zero_grad(self):
        """Nothing: backward has freed the gradients."""

    def state_dict(self):
        """Tensors, numbers and names: what the optimisers know of this process's pieces, the steps taken, lr."""
        states = {name: optimizer.state_dict() for name, optimizer in zip(self.names, self.optimizers)}
        group = {key: self.param_groups[0][key] for key in ("lr", "initial_lr")}
        return {"states": states, "steps": list(self.steps), "seed": self.seed, **group}

    def load_state_dict(self, saved):
        """Go on where `state_dict` was taken, bit for bit. Raises ValueError if it is of other parameters."""
        if list(saved["states"]) != self.names:
            odd = sorted(set(saved["states"]) ^ set(self.names)) or ["their order"]
            raise ValueError(f"the optimiser's state is of other parameters (first difference: {odd[0]})")
        for name, optimizer in zip(self.names, self.optimizers):
            optimizer.load_state_dict(saved["states"][name])
        self.steps, self.seed = list(saved["steps"]), saved["seed"]
        self.keys, self.finite = self.keys_of_rounding(), [True] * len(self.names)
        self.param_groups[0].update(lr=saved["lr"], initial_lr=saved["initial_lr"])


def as_matrix(x):
    """A tensor of more than two dimensions as a matrix, its first dimension the rows; any other as it is.

    Adafactor keeps a number for each row and column of the last two dimensions: two for each weight of a 1 x 1
    convolution, where AdamW keeps no more.
    """
    return x.flatten(1) if x.ndim > 2 else x


def local(p):
    """This process's piece of a tensor that FSDP2 has sharded; any other tensor itself."""
    return p.to_local() if hasattr(p, "to_local") else p
