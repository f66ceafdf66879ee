"""The tutorials' exercises, a function each.  Write yours into a file and run  python tutorials/exercises.py FILE.py

Tensors in, tensors out; samples are (B, D), times (B,), F(x, t, r) an average velocity as in tutorial 2.

1  score_from_velocity(x_t, t, v)           -> (B, D), the score of x_t, by Eq. 5, from its velocity v
2  joined_jump(F, x_t, t, s, r)             -> (B, D), the average velocity from t to r whose jump lands where that from
                                            t to s and then that from s to r lands
3  gap_of_gaussians(x_t, t, real, fake)     -> (B, D), dv = v - v_fake, if data are N(0, real^2 I), fakes N(0, fake^2 I)
4  kl_weight(t)                             -> w(t), t one number in (0, 1), so that the mean of w dv over noised fakes
                                            x_t is the gradient of KL(p_fake || p_real), both noised to t, as the
                                            fake x moves, of which x_t = t z + (1 - t) x was made
5  intervals(calls, order)                  -> into how many intervals of time a sampler of Euler (order 1) or Heun (2)
                                            divides the way, if it may call the network so often; where one call of
                                            Heun is left over, the last interval is an Euler step
6  diversity_within(features, labels)       -> the mean distance of two different samples of one class, then the mean
                                            over classes; features (n, d), labels (n,), whole numbers
7  expected_rows(batch, share, flow_share)  -> four numbers, rows of any-step, flow, adversarial, rectify: the share of
                                            the batch is the twin's, half each; of the rest flow_share has r = t
8  bytes_of_training(parameters)            -> bytes that so many parameters hold in float32: weights, gradients, both
                                            moments of AdamW, one moving average
9  share_off_data(samples, real)            -> the share of samples (n, D) farther from the nearest of real (m, D) than
                                            the 0.999 quantile of the distances of real ones to their nearest other
"""

import runpy
import sys

import torch

import tinytwinflow as ttf


def near(yours, right, what):
    """Raise AssertionError, in one line, unless two numbers or tensors of one shape agree."""
    yours, right = (torch.as_tensor(value).detach().double() for value in (yours, right))
    if yours.shape != right.shape:
        raise AssertionError(f"{what}: yours has shape {tuple(yours.shape)}, it should be {tuple(right.shape)}")
    wrong = (yours - right).abs() > 1e-5 + 1e-4 * right.abs()
    if wrong.any():
        raise AssertionError(f"{what}: yours is {yours[wrong][0]:.6g} where it should be {right[wrong][0]:.6g}")


def points():
    """A mixture of two Gaussians in the plane, points x_t and times t."""
    draw = torch.Generator().manual_seed(0)
    covs = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]])
    mixture = ttf.GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), covs)
    return mixture, torch.randn(6, 2, generator=draw).double(), torch.linspace(0.15, 0.9, 6).double()


def score_from_velocity(answer):
    mixture, x_t, t = points()
    near(answer(x_t, t, mixture.velocity(x_t, t)), mixture.score(x_t, t), "the score of a mixture")


def joined_jump(answer):
    mixture, x_t, t = points()
    near(answer(mixture, x_t, t, t / 2, t / 8), mixture(x_t, t, t / 8), "one jump for two")


def gap_of_gaussians(answer):
    _, x_t, t = points()
    wide, narrow = (ttf.GaussianMixture(torch.zeros(1, 2), (a**2 * torch.eye(2))[None]) for a in (1.5, 0.5))
    near(answer(x_t, t, 1.5, 0.5), ttf.gap(ttf.Twins(wide, narrow), x_t, t), "the gap")


def kl_weight(answer):
    """KL of the noised Gaussians N(0, A) and N(0, B), A = t^2 + (1 - t)^2 s^2, by s; and the mean of dv z."""
    t, s = torch.linspace(0.1, 0.9, 5).double(), torch.tensor(0.7).double().requires_grad_()
    A, B = t**2 + (1 - t) ** 2 * s**2, t**2 + (1 - t) ** 2
    slope = torch.autograd.grad((0.5 * (A / B - 1 - (A / B).log())).sum(), s, retain_graph=True)
    found = 0.0
    for one in t:
        A, B = one**2 + (1 - one) ** 2 * s.item() ** 2, one**2 + (1 - one) ** 2
        gap = (one - (1 - one)) / B - (one - (1 - one) * s.item() ** 2) / A  # of dv / x_t
        found = found + answer(one) * gap * (1 - one) * s.item()
    near(found, slope[0], "the gradient of KL")


def intervals(answer):
    mixture, _, _ = points()
    z = torch.zeros(1, 2)
    for calls, order in ((1, 1), (4, 1), (4, 2), (5, 2)):
        states = ttf.sample(lambda x, t, r, cond=None: x, z, calls, "multi", order, trajectory=True)
        near(answer(calls, order), len(states) - 1, f"intervals of {calls} calls, order {order}")


def diversity_within(answer):
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 4, generator=draw), torch.arange(30) % 3
    features[labels == 1] *= 0.1
    near(answer(features, labels), ttf.evaluation.metrics.diversity(features, labels), "diversity")


def expected_rows(answer):
    for share, flow_share in ((1 / 3, 0.5), (0.5, 0.2), (0.0, 1.0)):
        rows = [24 * part for part in ttf.TwinFlowLoss(share=share, flow_share=flow_share).shares()]
        near(torch.tensor(answer(24, share, flow_share)), torch.tensor(rows), "rows")


def bytes_of_training(answer):
    net = ttf.nets.MLP(2, width=32)
    state = ttf.training.new_state(net, one_average=True)
    list(ttf.training.train(state, ttf.TwinFlowLoss(), lambda i: (torch.randn(64, 2), None), 1))
    tensors = [*net.parameters(), *state.average.parameters(), *(p.grad for p in net.parameters())]
    tensors += [v for moments in state.optimizer.state.values() for v in moments.values() if v.numel() > 1]
    near(answer(sum(p.numel() for p in net.parameters())), sum(v.numel() * v.element_size() for v in tensors), "bytes")


def share_off_data(answer):
    draw = torch.Generator().manual_seed(0)
    real, samples = torch.randn(2001, 2, generator=draw), 2 * torch.randn(500, 2, generator=draw)
    near(answer(samples, real), ttf.evaluation.metrics.off_data(samples, real), "the share off the data")


CHECKS = (
    score_from_velocity, joined_jump, gap_of_gaussians, kl_weight, intervals, diversity_within, expected_rows,
    bytes_of_training, share_off_data,
)  # fmt: skip


def check(path):
    """Check the answers in a file.  -> name -> None if right, "not there", or what is wrong."""
    there, found = runpy.run_path(path), {}
    for one in CHECKS:
        try:
            found[one.__name__] = one(there[one.__name__]) if one.__name__ in there else "not there"
        except Exception as error:  # whatever an answer gets wrong
            found[one.__name__] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tutorials/exercises.py FILE.py")
    results = check(sys.argv[1])
    for number, (name, wrong) in enumerate(results.items(), 1):
        print(f"{number}  {name}: {wrong or 'right'}")
    sys.exit(any(results.values()))
