"""Gaussian mixtures, for which everything the method learns is known exactly.

A mixture sum_k w_k N(m_k, S_k) pushed along the straight path stays a mixture: at time t its
components are N((1 - t) m_k, C_k) with C_k = (1 - t)^2 S_k + t^2 I. So the marginal density, score
and velocity have closed forms, and the flow map is one accurate ODE solve away. These are the
oracles of the tests: an exact field has the same interface as a network.
"""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp

from .conditions import take
from .path import check_time, expand


class GaussianMixture:
    """Exact velocity field of a Gaussian mixture.  mixture(x, t, r) : (B, D), (B,), (B,) -> (B, D).

    means (K, D); covs (K, D, D), symmetric positive definite; weights (K,), positive, default equal.
    Calling it gives the average velocity from t to r, the velocity where r = t; times lie in [0, 1].
    Density, score and velocity are differentiable and computed in the dtype of x; the flow map is
    a float64 ODE solve without gradient. Raises ValueError for arguments that do not fit.
    """

    def __init__(self, means, covs, weights=None):
        means, covs = (torch.as_tensor(np.asarray(a), dtype=torch.float64) for a in (means, covs))
        if means.ndim != 2 or covs.shape != (*means.shape, means.shape[1]):
            raise ValueError(f"means must be (K, D) and covs (K, D, D), got {tuple(means.shape)}, {tuple(covs.shape)}")
        if not torch.allclose(covs, covs.mT) or not (torch.linalg.eigvalsh(covs) > 0).all():
            raise ValueError("every covariance must be symmetric and positive definite")
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(np.asarray(weights))
        if weights.shape != means.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights must be {len(means)} positive numbers, got {weights.tolist()}")
        self.means, self.covs = means, covs
        self.weights = weights.double() / weights.sum()

    def sample(self, n, generator=None, dtype=torch.float64, labels=False):
        """Draw n points (n, D); with labels=True also the component (n,) of each."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        x = self.means[k] + (torch.linalg.cholesky(self.covs)[k] @ noise[..., None])[..., 0]
        return (x.to(dtype), k) if labels else x.to(dtype)

    def _posterior(self, x, t):
        """For each component: log of weight * density at x_t, C^-1 (x_t - mean), and S C^-1 (x_t - mean)."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, this mixture takes (B, {self.means.shape[1]})")
        check_time(t)
        means, covs, weights = (a.to(x) for a in (self.means, self.covs, self.weights))
        t = expand(t, x).reshape(-1, 1, 1)
        eye = torch.eye(x.shape[1]).to(x)
        C = (1 - t[..., None]) ** 2 * covs + t[..., None] ** 2 * eye
        L = torch.linalg.cholesky(C)
        error = x[:, None] - (1 - t) * means
        white = torch.linalg.solve_triangular(L, error[..., None], upper=False)
        a = torch.linalg.solve_triangular(L.mT, white, upper=True)
        log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_p = -0.5 * (white[..., 0].square().sum(-1) + log_det + x.shape[1] * math.log(2 * math.pi))
        return weights.log() + log_p, a[..., 0], (covs @ a)[..., 0]

    def log_density(self, x, t=0.0):
        """Log-density of the marginal at time t.  (B, D), t in [0, 1] -> (B,)."""
        return self._posterior(x, t)[0].logsumexp(-1)

    def score(self, x, t=0.0):
        """Score of the marginal, the gradient of its log-density in x.  (B, D) -> (B, D)."""
        log_p, a, _ = self._posterior(x, t)
        return -(log_p.softmax(-1)[..., None] * a).sum(1)

    def velocity(self, x, t):
        """Marginal velocity E[z - x | x_t].  (B, D), t in [0, 1] -> (B, D).

        Given the component, E[z | x_t] = t C^-1 (x_t - (1 - t) m) and
        E[x | x_t] = m + (1 - t) S C^-1 (x_t - (1 - t) m).
        """
        log_p, a, Sa = self._posterior(x, t)
        t = expand(t, x).reshape(-1, 1, 1)
        v = t * a - self.means.to(x) - (1 - t) * Sa
        return (log_p.softmax(-1)[..., None] * v).sum(1)

    @torch.no_grad()
    def flow(self, x, t, r, tolerance=1e-10):
        """Flow map: where the trajectory through x at time t is at time r.  (B, D), (B,), (B,) -> (B, D).

        All rows are one ODE in s in [0, 1], each at its own time t + s (r - t).
        """
        check_time(t)
        check_time(r, name="r")
        x64 = x.detach().double().cpu()
        t, r = (expand(a, x).double().cpu().expand(len(x), 1) for a in (t, r))

        def slope(s, y):
            y = torch.from_numpy(y).view_as(x64)
            return ((r - t) * self.velocity(y, (t + s * (r - t))[:, 0].clamp(0, 1))).flatten().numpy()

        # a step longer than a quarter may pass its error test by chance and be off by 1e-6
        how = {"rtol": tolerance, "atol": tolerance, "max_step": 0.25}
        path = solve_ivp(slope, (0, 1), x64.flatten().numpy(), "DOP853", **how)
        return torch.from_numpy(path.y[:, -1]).view_as(x64).to(x)

    def __call__(self, x, t, r, cond=None):
        """Average velocity from t to r; its limit, the velocity, in the rows where r = t."""
        v = self.velocity(x, t)
        far = (t - r).abs() > 1e-6
        if far.any():
            x_far, t_far, r_far = x[far], t[far], r[far]
            average = (x_far - self.flow(x_far, t_far, r_far)) / (t_far - r_far)[:, None]
            v = v.masked_scatter(far[:, None], average)
        return v


class Twins:
    """Exact twin field: `real` answers times t >= 0, `fake` answers negative ones at |t|, |r|.

    Both are velocity fields, mixtures in the tests. What an ideally trained network would be:
    Twins(real, fake)(x, -t, -r) is the fake's average velocity from t to r.
    """

    def __init__(self, real, fake):
        self.real, self.fake = real, fake

    def __call__(self, x, t, r, cond=None):
        fake = torch.signbit(t)
        if not fake.any():
            return self.real(x, t, r, cond)
        out = torch.zeros_like(x)
        for rows, field in ((~fake, self.real), (fake, self.fake)):
            if rows.any():
                answer = field(x[rows], t[rows].abs(), r[rows].abs(), take(cond, rows))
                out = out.masked_scatter(rows[:, None], answer)
        return out
