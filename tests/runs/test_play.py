"""The page to play with, in a real browser: it computes what torch computes, shows it, and reads nothing from outside.

The networks are tiny ones, trained here for a second. The page's answers are held against torch with the rounded
weights, its samples against `ttf.sample`; what moves on the screen is looked at in screenshots.
"""

import base64
import copy
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import tinytwinflow as ttf
from tinytwinflow.cli.commands import main
from tinytwinflow.evaluation.metrics import off_data, sliced_wasserstein, strays
from tinytwinflow.method.path import interpolate
from tinytwinflow.method.twin import gap, generate
from tinytwinflow.runs import play
from tinytwinflow.runs.folder import trained
from tinytwinflow.runs.settings import method_of, mode_of

SMALL = ["width=30", "depth=3", "batch_size=128", "steps=300", "warmup_steps=40", "base_steps=20", "eval_samples=64"]
FOLDERS = ("", "base-alone", "flow-matching")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSERS += ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
ONE, FLOW, FAKE = (0xD1, 0x49, 0x5B), (0x2E, 0x6F, 0x95), (0xE6, 0x9F, 0x00)


def made(folder, *settings, data="8gaussians"):
    assert main(["train", "toy", "--data", data, "--set", *SMALL, *settings, "--out", str(folder), "--unmeasured"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its page, and both networks that stand beside it."""
    folder = made(tmp_path_factory.mktemp("runs") / "toy")
    assert main(["play", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("these tests drive a browser: apt install chromium, or install Google Chrome", pytrace=False)
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu-compositing"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page, on a screen of one's choice; at the end nothing has been said, and nothing asked from outside."""
    contexts, said, asked = [], [], []

    def visit(path, **screen):
        context = browser.new_context(
            **{"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"} | screen
        )
        context.set_default_timeout(200_000)
        page = context.new_page()
        contexts.append(context)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == [] and len(asked) == len(contexts) and all(url.startswith("file:") for url in asked)


def rounded_net(folder, page):
    """A run's network with the weights that its page has."""
    own, bits = trained(folder), page.evaluate("run.bits")
    weights = own.net.state_dict()
    for name, w in weights.items():
        codes, scale = play.rounded(w, bits if w.ndim > 1 else play.MOST_BITS)
        weights[name] = torch.from_numpy(codes * scale[:, None]).float().view_as(w)
    net = copy.deepcopy(own.net)
    net.load_state_dict(weights)
    return net, own.config


def answers(page, number, x, t, r, labels=None):
    code = """async ([number, x, t, r, labels]) =>
        Array.from(await work("asked",
            forward(run.networks[number], Float32Array.from(x), t, r, labels)))"""
    return torch.tensor(page.evaluate(code, [number, x.flatten().tolist(), t, r, labels])).view(-1, 2)


def walked(page, number, z, n, labels=None):
    """All states of samples of the page's network."""
    code = """async ([number, z, n, labels]) =>
        Array.from(await work("asked",
            walk(run.networks[number], Float32Array.from(z), n, labels)))"""
    states = page.evaluate(code, [number, z.flatten().tolist(), n, labels])
    return torch.tensor(states).view(n + 1, -1, 2)


def check_forward(page, number, net, labels=None, cond=None, twin=True):
    generator = torch.Generator().manual_seed(number)
    x = 2 * torch.randn(50, 2, generator=generator)
    for _ in range(4):
        t, r = sorted(torch.rand(2, generator=generator).tolist(), reverse=True)
        for times in [(t, r), (t, t), (1.0, 0.0), *([(-t, -t)] if twin else [])]:
            t32 = torch.tensor(times).expand(len(x), 2)
            wanted = net(x, t32[:, 0], t32[:, 1], cond)
            got = answers(page, number, x, *t32[0].tolist(), labels)
            assert (got - wanted).abs().max() < 1e-4, times
            assert wanted.abs().max() > 0.1


def test_the_page_computes_what_torch_does(run, visit):
    """Both signs of time; a network that never learnt a twin answers as if time had no sign, there too."""
    page = visit(run / "play.html")
    assert page.evaluate("run.networks.map(net => net.name)") == ["TwinFlow", "base alone", "flow matching"]
    assert page.evaluate("run.networks.map(net => net.twin)") == ["sign", None, None]
    for number, name in enumerate(FOLDERS):
        check_forward(page, number, rounded_net(run / name, page)[0])


@pytest.mark.parametrize("number", range(3))
def test_samples_are_those_of_the_sampler_from_the_same_noise(run, visit, number):
    """And the noise is that of `sample` with the run's seed."""
    page = visit(run / "play.html")
    net, config = rounded_net(run / FOLDERS[number], page)
    z = torch.tensor(page.evaluate("Array.from(noise.z)")).view(-1, 2)
    assert torch.equal(z, torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)))
    mode = mode_of(config)
    times = config["time_shape"] if mode == "any" else (1.0, 1.0, 1.0)
    for nfe in (1, 2, 4, 100):
        wanted = ttf.sample(net, z[:200], nfe, mode, shape=times, trajectory=True)
        assert (walked(page, number, z[:200], nfe) - wanted).abs().max() < 1e-4 * max(1, nfe / 4)


def test_rounding_moves_no_sample_far(run, visit):
    page = visit(run / "play.html")
    model, z = ttf.load(run), torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    for nfe in (1, 4):
        moved = (walked(page, 0, z, nfe)[-1] - model.sample(2000, nfe, seed=0)).norm(dim=1)
        assert moved.median() < 2e-4 and moved.max() < 5e-3
    assert page.evaluate("run.bits") == 16


def test_as_many_bits_as_fit_into_the_page(tmp_path, monkeypatch):
    """Three large networks get fewer bits, not more bytes; where eight are too many it is said."""
    folder = made(tmp_path / "wide", "width=288", "depth=4", "steps=3", "warmup_steps=1", "base_steps=1")
    path = play.play(trained(folder))
    page = path.read_text()
    assert 0.9 * play.LARGEST_PAGE < path.stat().st_size < play.LARGEST_PAGE
    assert int(re.search(r'"bits":(\d+)', page)[1]) == 8
    monkeypatch.setattr(play, "LARGEST_PAGE", 1_100_000)
    with pytest.raises(ValueError, match="3 networks of .* weights do not fit into a page of 1.1 MB at 8 bits"):
        play.play(trained(folder))
    assert path.read_text() == page


def test_rounded_weights_are_nearest_to_their_own():
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    codes, scale = play.rounded(w, 10)
    assert np.abs(codes).max() == 511 and (np.abs(codes).max(1) == [511, 511, 511, 0, 511]).all()
    assert (np.abs(codes * scale[:, None] - w.numpy()) <= 0.501 * scale[:, None]).all()


def shown(page):
    """What the screen shows, once it has come to rest."""
    page.wait_for_function(
        "() => document.getElementById('busy').hidden && document.getElementById('numbers').children.length"
    )
    page.wait_for_timeout(700)  # the paths fade
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)


def amount(page, picture, color, x, radius=0.25):
    """Pixels of a colour near points of the plane (n, 2)."""
    box = page.locator("#plane").bounding_box()
    middle, half = page.evaluate("[middle, half]")
    count = 0
    for a, b in x:
        i, j = ((a - middle[0] + half) / (2 * half), (half - b + middle[1]) / (2 * half))
        reach = radius / (2 * half) * box["width"]
        left, top = box["x"] + i * box["width"], box["y"] + j * box["height"]
        part = picture[int(top - reach) : int(top + reach), int(left - reach) : int(left + reach)]
        count += (np.abs(part - color).max(-1) < 40).sum()
    return count


def test_the_slider_of_steps_changes_what_is_shown(run, visit):
    """By keyboard and by mouse: one step of flow matching is a heap in the middle, a hundred are eight modes."""
    page = visit(run / "play.html")
    modes = ttf.data.toys.mixture("8gaussians").means.tolist()
    page.get_by_label("flow matching").check()
    page.get_by_label("paths").uncheck()
    page.wait_for_function("() => state.samples?.nfe === 1")
    heap = shown(page)
    page.locator("#nfe").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => state.samples.nfe === 4")
    assert page.locator("#nfe-shown").inner_text() == "4"
    box = page.locator("#nfe").bounding_box()
    page.mouse.move(box["x"] + 12, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"], box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    page.wait_for_function("() => state.samples.nfe === 100")
    spread = shown(page)
    assert amount(page, heap, FLOW, [[0, 0]], 0.4) > 20 * amount(page, spread, FLOW, [[0, 0]], 0.4)
    assert amount(page, spread, FLOW, modes) > 10 * amount(page, heap, FLOW, modes)
    assert amount(page, spread, ONE, modes) == 0


def test_figures_are_those_of_the_samples_that_are_shown(run, visit):
    page = visit(run / "play.html")
    page.wait_for_function("() => state.samples?.nfe === 1")
    x = torch.tensor(page.evaluate("Array.from(state.samples.states.slice(-4000))")).view(-1, 2)
    real, _ = ttf.data.Points("8gaussians", 1).fresh(2000)
    count = int(strays(x, ttf.data.toys.mixture("8gaussians")).sum())
    text = page.locator("#numbers").inner_text()
    assert f"{100 * count / 2000:.1f} % {count:,} of 2,000" in text and 20 < count < 1900
    distance = float(re.search(r"sliced W2\s+(\d\.\d+)", text)[1])
    assert distance == pytest.approx(sliced_wasserstein(x, real, 2000), rel=0.02)


def test_time_is_dragged_and_the_gap_is_that_of_the_twin(run, visit):
    page = visit(run / "play.html")
    page.get_by_label("Time", exact=True).check()
    page.wait_for_function("() => state.field?.t === 0.5")
    before = shown(page)
    box = page.locator("#time").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    by_mouse = page.evaluate("state.time")
    assert 0.75 < by_mouse < 0.85
    page.locator("#time").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("t => Math.abs(state.field.t - t) < 1e-6", arg=by_mouse + 0.01)
    assert page.locator("#time-shown").inner_text() == f"{by_mouse + 0.01:.2f}"
    net, _ = rounded_net(run, page)
    z, again = (torch.tensor(page.evaluate(f"Array.from(noise.{name})")).view(-1, 2) for name in ("z", "again"))
    t = torch.full((400,), page.evaluate("state.field.t"))
    dv = gap(net, interpolate(generate(net, z), again, t[0])[:400], t)
    got = torch.tensor(page.evaluate("Array.from(state.field.gap)")).view(-1, 2)
    assert (got - dv).abs().max() < 2e-4 and dv.abs().max() > 1e-2
    assert f"{dv.square().sum(1).mean().sqrt():.3f}" in page.locator("#numbers").inner_text()
    drawn = """() => {
        const own = arrow, seen = [];
        arrow = (on, x, y, dx, dy) => seen.push([dx, dy]);
        paint();
        arrow = own;
        paint();
        return seen.slice(-400);
    }"""
    arrows = torch.tensor(page.evaluate(drawn))
    clear = dv.norm(dim=1) > 0.02
    assert clear.sum() > 100
    assert torch.cosine_similarity(arrows, -dv)[clear].min() > 0.99  # the way that fakes must move
    corner = [[page.evaluate("middle[0] - 0.8 * half"), page.evaluate("middle[1] + 0.8 * half")]]
    after = shown(page)
    assert amount(page, before, FAKE, corner) > 20 and amount(page, after, FAKE, corner) > 20
    assert (before != after).any(-1).mean() > 0.02
    page.get_by_label("twin velocity").uncheck()
    assert amount(page, shown(page), FAKE, corner) == 0


def test_a_click_puts_noise_and_both_ends_are_torchs(run, visit):
    page = visit(run / "play.html")
    page.get_by_label("One point").check()
    box = page.locator("#plane").bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.4 * box["height"])
    middle, half = page.evaluate("[middle, half]")
    put = [middle[0] + 0.4 * half, middle[1] + 0.2 * half]
    assert page.evaluate("state.point") == pytest.approx(put, abs=1e-2)
    page.keyboard.press("ArrowUp")
    point = page.evaluate("state.point")
    assert point == pytest.approx([put[0], put[1] + half / 50], abs=1e-2)
    page.wait_for_function("() => Math.abs(state.track?.z[1] - state.point[1]) < 1e-6")
    net, config = rounded_net(run, page)
    ends = [ttf.sample(net, torch.tensor([point]), n, shape=config["time_shape"])[0] for n in (1, 100)]
    text = page.locator("#numbers").inner_text().replace("−", "-")
    said = [tuple(map(float, pair)) for pair in re.findall(r"\((-?\d\.\d\d), (-?\d\.\d\d)\)", text)]
    assert said[1:] == [pytest.approx(end.tolist(), abs=6e-3) for end in ends]
    assert amount(page, shown(page), ONE, [ends[0].tolist()], 0.08) > 10


def test_dark_screens_phones_and_reduced_motion(run, visit):
    page = visit(run / "play.html", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert shown(page)[3, 3].tolist() == [21, 23, 26]
    small = visit(run / "play.html", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert small.evaluate("document.documentElement.scrollWidth") <= 360
    small.get_by_label("One point").check()
    box = small.locator("#plane").bounding_box()
    small.touchscreen.tap(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert small.evaluate("(state.point[0] - middle[0]) / half") == pytest.approx(-0.5, abs=0.02)


def test_points_walk_from_noise_to_data_while_frames_are_drawn(run, visit):
    page = visit(run / "play.html", reduced_motion="no-preference")
    page.wait_for_function("() => state.samples && began === null")
    page.evaluate("frames = 0, own = tick, tick = now => { frames += 1; own(now); }, 0")
    page.get_by_role("button", name="New noise").click()
    page.wait_for_function("() => began !== null")
    page.wait_for_function("() => began === null")
    assert page.evaluate("frames") > 5 and page.evaluate("shown") == 1
    noise, ends = (page.evaluate(f"Array.from(placesAt({share}))") for share in (0, 1))
    half = page.evaluate("Array.from(placesAt(0.5))")
    assert noise == page.evaluate("Array.from(noise.z)") and ends == page.evaluate(
        "Array.from(state.samples.states.slice(-4000))"
    )
    assert np.allclose(half, (np.array(noise) + ends) / 2, atol=1e-5)


def test_marks_are_spoken_of_where_there_are_some(run, visit):
    page = visit(run / "play.html")
    for off in (0, 1, 499, 500):
        page.evaluate(f"() => {{ offData = x => new Uint8Array(x.length / 2).fill(1, 0, {off}); reset(); }}")
        page.wait_for_function("() => state.samples && document.getElementById('busy').hidden")
        spoken = ["a marked point" in page.locator("#caption").inner_text()]
        spoken.append("off the data" in page.locator("#legend").inner_text())
        assert spoken == 2 * [0 < off < 500]


def test_a_fault_is_said_on_the_page(run, browser):
    page = browser.new_page()
    page.goto((run / "play.html").as_uri())
    page.evaluate("() => { readBack = function* () { throw Error('no memory'); }; reset(); }")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == "The page has failed (no memory): load it again."
    assert page.locator("#busy").is_hidden()
    page.close()


def test_a_label_is_held_against_its_own_real_points(tmp_path, visit):
    settings = ["conditional=true", "method=meanflow", "steps=60", "base_steps=0", "sharp=false"]
    folder = made(tmp_path / "run", *settings, data="moons")
    assert main(["play", str(folder)]) == 0
    page = visit(folder / "play.html")
    (real, labels), (again, labels_again) = (ttf.data.Points("moons", 1).fresh(2000, draw) for draw in (0, 1))
    for chosen in ("1", "-1"):
        page.locator("#label").select_option(chosen)
        page.wait_for_function("() => state.samples")
        some = [x[of == 1] if chosen == "1" else x for x, of in ((real, labels), (again, labels_again))]
        n = min(map(len, some))
        ends = torch.tensor(page.evaluate("Array.from(state.samples.states.slice(-4000))")).view(-1, 2)
        text = page.locator("#numbers").inner_text()
        distance, floor = map(float, re.search(r"sliced W2\s+(\d\.\d+) real data (\d\.\d+)", text).groups())
        assert floor == pytest.approx(sliced_wasserstein(some[0][:n], some[1][:n]), abs=6e-4)
        assert distance == pytest.approx(sliced_wasserstein(ends[:n], some[0][:n]), rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        ["method=apex", "shifted=true", "conditional=true"],
        ["predicts=data", "sharp=false"],
        ["method=dmd"],
        ["method=consistency training"],
    ],
    ids=["shifted, labels", "predicts data, smooth", "one step only", "few"],
)
def test_other_networks_and_methods(tmp_path, visit, settings):
    """Shifted conditions, labels, a network that predicts data, methods with one step or with noise between steps."""
    folder = made(
        tmp_path / "run",
        *settings,
        "steps=60",
        "base_steps=0" if "method=" in settings[0] else "base_steps=5",
        data="moons",
    )
    assert main(["play", str(folder)]) == 0
    page = visit(folder / "play.html")
    net, config = rounded_net(folder, page)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    labels = [i % 2 for i in range(30)] if config["conditional"] else None
    cond = None if labels is None else torch.tensor(labels)
    t = torch.full((30,), 0.625)
    assert (answers(page, 0, x, 0.625, 0.25, labels) - net(x, t, t * 0.4, cond)).abs().max() < 1e-4
    if config["shifted"]:
        wanted = net(x, t, t, {"cond": cond, "shift": torch.ones(30, dtype=torch.long)})
        assert (answers(page, 0, x, 0.625, 0.625, [k + 3 for k in labels]) - wanted).abs().max() < 1e-4
    one = ttf.sample(net, x, 1, mode_of(config) or "any", cond=cond)
    assert (walked(page, 0, x, 1, labels)[-1] - one).abs().max() < 1e-4
    assert page.locator("#nfe").is_disabled() == (mode_of(config) is None)
    velocity = page.get_by_label("Time", exact=True)
    assert velocity.is_visible() == (mode_of(config) == "any")
    page.get_by_label("flow matching").check()
    velocity.check()
    page.get_by_label(method_of(config)).check()
    assert page.get_by_label("Samples", exact=True).is_checked() == (mode_of(config) != "any")
    page.get_by_label("One point").check()
    page.wait_for_function("() => state.track")
    seen = page.locator("#caption").inner_text(), page.locator("#numbers").inner_text()
    assert ["from the same noise" in seen[0], "apart" in seen[1]] == 2 * [mode_of(config) == "any"]
    page.get_by_label("Samples", exact=True).check()
    if mode_of(config) == "few":  # the first jump is the same, then comes noise of the page's own
        states = walked(page, 0, x, 2)
        assert (states[1] - 0.5 * one).std() == pytest.approx(0.5, rel=0.4)
    page.wait_for_function("() => state.samples")
    ends = torch.tensor(page.evaluate("Array.from(state.samples.states.slice(-4000))")).view(-1, 2)
    near = json.loads(re.search(r'"near":(\{.*?\})', (folder / "play.html").read_text())[1])
    real = np.frombuffer(base64.b64decode(near["points"]), "<i2").reshape(-1, 2) * np.array(near["scale"])
    share = off_data(ends, torch.from_numpy(real))
    assert f"{round(share * 2000):,} of 2,000" in page.locator("#numbers").inner_text() and len(real) == 20_000


def test_an_unfinished_run_is_not_shown_beside_finished_ones(run, tmp_path):
    own = trained(run)
    with pytest.raises(ValueError, match=r"is at step 40 of 300: .*train toy --out .*toy --resume first$"):
        play.play(own._replace(saved=own.saved | {"step": 40}), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_fault_in_making_the_page_is_no_note_of_the_main_command(tmp_path, monkeypatch, capsys):
    """A run that has no page says so and ends well; where one could be made, what goes wrong ends as everywhere."""
    np.save(tmp_path / "solid.npy", np.random.default_rng(0).normal(size=(400, 3)))
    short = ["--set", *SMALL, "steps=3", "warmup_steps=1", "base_steps=1"]
    assert main([*short, "--data", str(tmp_path / "solid.npy"), "--out", str(tmp_path / "solid")]) == 0
    assert "no page to play with: a page to play with is of points in the plane" in capsys.readouterr().out
    monkeypatch.setattr(play, "LARGEST_PAGE", 1000)
    assert main([*short, "--out", str(tmp_path / "plane")]) == 2
    assert "do not fit into a page" in capsys.readouterr().err


def test_wrong_uses_say_what_is_wrong_in_one_line(run, tmp_path, capsys):
    np.save(tmp_path / "solid.npy", np.random.default_rng(0).normal(size=(400, 3)))
    solid = made(tmp_path / "solid", "steps=3", "warmup_steps=1", "base_steps=1", data=str(tmp_path / "solid.npy"))
    (tmp_path / "there.html").mkdir()
    capsys.readouterr()
    for args, message in [
        ([solid], "points of 3 numbers"),
        ([tmp_path / "nothing"], "is no run folder"),
        ([run, "--out", tmp_path / "there.html"], "there.html, a folder"),
        ([run, "--out", tmp_path / "page.txt"], "--out takes FILE.html"),
    ]:
        assert main(["play", *map(str, args)]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.glob("*.html/*")) and not (tmp_path / "page.txt").exists()
    assert not (solid / "flow-matching").exists()
