"""The ladder of `tutorials/ladder.py`: its exact fake velocity, its rectification, and the script from end to end."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow import GaussianMixture
from tinytwinflow.method.draws import draw_for

FOLDER = Path(__file__).parents[1] / "tutorials"


@pytest.fixture(scope="module")
def ladder():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("ladder")


class Linear(torch.nn.Module):
    """A field whose one-step samples are scale * z + shift: fakes of a known law, N(shift, scale^2)."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = scale, torch.nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, z, t, r, cond=None):
        return z - (self.scale * z + self.shift)


def gaussian(scale, shift):
    return GaussianMixture([shift], [[[scale**2, 0.0], [0.0, scale**2]]])


def normals(n, draw):
    return torch.randn(n, 2, generator=draw, dtype=torch.float64)


@given(st.lists(st.tuples(*[st.floats(-2, 2)] * 2), min_size=1, max_size=6), st.floats(0.1, 0.99), st.floats(-2, 2))
def test_points_flow_as_modes_without_width(ladder, points, t, at):
    points, x_t, t = torch.tensor(points).double(), torch.tensor([[at, 0.3]]).double(), torch.tensor([t]).double()
    narrow = GaussianMixture(points, (1e-14 * torch.eye(2)).expand(len(points), 2, 2))
    assert torch.allclose(ladder.of_points(points)(x_t, t, t), narrow.velocity(x_t, t), atol=1e-8, rtol=1e-8)


def test_even_noise_is_normal_and_even(ladder):
    z, chance = ladder.even_noise(4096, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    slices = torch.linspace(0, 1, 17)[1:-1]
    far = (z.quantile(slices, dim=0) - torch.special.ndtri(slices)[:, None]).abs().max()
    assert far < 0.01 < (torch.randn(4096, generator=chance).quantile(slices) - torch.special.ndtri(slices)).abs().max()
    assert torch.allclose(z.T.cov(), torch.eye(2), atol=0.02)


@pytest.mark.parametrize("t", [0.3, 0.6, 0.95])
def test_the_velocity_of_many_fakes_is_that_of_their_law(ladder, t):
    draw, law = torch.Generator().manual_seed(0), gaussian(0.5, (0.4, -0.2))
    fakes = law.sample(20000, draw)
    x_t, t = t * normals(100, draw) + (1 - t) * fakes[:100], torch.full((100,), t).double()
    exact = law.velocity(x_t, t)
    assert (ladder.of_points(fakes)(x_t, t, t) - exact).norm() < 0.06 * exact.norm()


def test_rectification_rests_where_the_fakes_are_the_data_and_leads_there(ladder):
    """The gradient of the fakes' mean: zero at the data's, elsewhere such that a step down goes towards it."""

    def slope(shift):
        net, draw = Linear(0.5, (shift, 0.0)), torch.Generator().manual_seed(1)
        z, z_new, t = normals(1024, draw), normals(1024, draw), torch.rand(1024, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            fake = ladder.of_points(ladder.generate(net, z))
        ladder.rectification(net, z, z_new, t.clamp(min=0.05), gaussian(0.5, (0.0, 0.0)), fake).backward()
        return net.shift.grad[0].item()

    left, rest, right = (slope(shift) for shift in (-0.5, 0.0, 0.5))
    assert right > 0.1 and left < -0.1
    assert math.isclose(right, -left, rel_tol=0.1) and abs(rest) < 0.03 * right


def test_the_informed_gap_leads_to_the_mode(ladder, monkeypatch):
    """Fakes to the left of the data have to move to the right, along -dv, and those to its right back."""
    monkeypatch.setattr(ladder, "DATA", gaussian(0.1, (1.4, 0.0)))
    loss, x = ladder.Informed(share=1.0), torch.zeros(256, 2)
    loss.power = 2
    draws = draw_for(loss, x, torch.Generator().manual_seed(0))
    *_, rows = draws.slices()
    for shift, sign in ((1.2, 1), (1.6, -1)):
        net = Linear(0.1, (shift, 0.0)).float().requires_grad_(False)
        dv = loss._gap_at_fakes(draws, rows, net(draws.z[rows], None, None), net, None)
        assert dv.shape == (128, 2) and -sign * dv[:, 0].mean() > 3 * dv[:, 1].mean().abs()


def test_compared_with_itself_a_velocity_is_right_and_turned_it_is_wrong(ladder):
    draw, fakes = (
        torch.Generator().manual_seed(0),
        0.7 * torch.randn(200, 2, generator=torch.Generator().manual_seed(3)),
    )
    t, exact = torch.full((200,), 0.4), ladder.of_points(fakes)
    same = ladder.compared(fakes, t, ladder.DATA, exact, exact, draw)
    assert same["cosine"] == pytest.approx(1, abs=1e-5)
    assert [same[key] for key in ("error", "real", "fake")] == pytest.approx([0, 0, 0], abs=1e-5)
    turned = ladder.compared(fakes, t, exact, ladder.DATA, exact, draw)  # v and v_fake exchanged: dv has the other sign
    assert turned["cosine"] == pytest.approx(-1, abs=1e-5)
    assert [turned[key] for key in ("error", "real", "fake")] == pytest.approx([2, 1, 1], abs=1e-4)


def test_the_ladder_from_end_to_end(ladder, tmp_path, monkeypatch, capsys):
    """A handful of steps: every rung has figures, what is done is not done again, and other steps are refused."""
    for name, small in {"PAIRS": 64, "FAKES": 600, "POOL": 700, "SAMPLES": 300, "TIMES": (0.1, 0.7)}.items():
        monkeypatch.setattr(ladder, name, small)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["ladder.py", "--out", str(tmp_path), *words])
        ladder.main()
        return capsys.readouterr().out

    said = run("--steps", "3", "--seeds", "4")
    folder = tmp_path / "seed4"
    assert {path.stem for path in folder.glob("*.json")} == {"real", *ladder.RUNGS}
    assert all(words in (tmp_path / "ladder.md").read_text() for words, _ in ladder.RUNGS.values())
    assert said.count("seed 4") == len(ladder.RUNGS)
    kept = {path: path.read_bytes() for path in folder.glob("*") if path.name != "real.json"}
    (folder / "e.json").unlink()
    ladder.climb_all(ladder.Climb(4, 3, folder))
    assert capsys.readouterr().out.count("seed 4") == 1
    assert {path: path.read_bytes() for path in kept} == kept
    assert all((tmp_path / name).stat().st_size > 20000 for name in ("ladder.png", "ladder_maps.png"))  # 4,000 if empty
    with pytest.raises(SystemExit) as ended:
        run("--steps", "4", "--seeds", "4")
    assert ended.value.code == 2 and "of 3 steps, not 4" in capsys.readouterr().err
