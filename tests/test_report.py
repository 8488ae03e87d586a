"""report.html: one file, every part there, hostile names harmless, alive in a real browser."""

import base64
import re
import shlex
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import modules
import predict
from config import Config
from dataset import PRIVATE, BrainSlices, Data
from scores import evaluation, figures, report
from stages.decoder import make_sharper_vqvae
from stages.denoiser import make_denoiser
from stages.stage import COLUMNS
from support import endings, files
from support.cli import Parser, add_options, config_from

HOSTILE = "<script>alert(1)</script>.png"
SECTIONS = {
    "runs", "generated", "between", "reconstructions", "scores", "codebook", "training",
    "data",
}  # fmt: skip
CONFIG = Config(
    preset="smoke", codes=16, widths=(4, 4, 4, 4), gan_widths=(4, 4), subjects=(10, 2, 2),
    vqvae_kimg=1.0, gan_kimg=2.0, samples=64, cache="the cache", axis=2,
    decoder_widths=(4, 4), residual_blocks=0,
)  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text between them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str, name: str = "", value: str | None = None) -> list[dict]:
        found = [a for t, a in self.tags if t == tag and (not name or name in a)]
        return [a for a in found if value is None or value in a[name].split()]


def a_run(folder, conditional: bool = True) -> predict.TrainedRun:
    """Networks with random weights, as `load_run` gives them, and what a run leaves behind."""
    crop = modules.Crop(4, 8, 56, 48)
    vqvae = make_sharper_vqvae(CONFIG)
    generator = modules.make_generator(CONFIG, crop.size)
    denoiser = make_denoiser(CONFIG)
    draw = torch.Generator().manual_seed(0)
    for network in (vqvae, generator):
        network.eval().requires_grad_(False)
        for weight in [*network.parameters(), vqvae.quantizer.codebook]:
            weight.copy_(torch.randn(weight.shape, generator=draw))  # as made, all is black
    for weight in denoiser.eval().requires_grad_(False).parameters():
        weight.copy_(0.05 * torch.randn(weight.shape, generator=draw))
    counts = torch.arange(16) * 10
    code_map = modules.CodeMap.fit(
        vqvae.quantizer.codebook, counts, CONFIG.order, 4, crop=crop, background=1
    )
    denoiser.fit(code_map, counts)
    folder.mkdir(parents=True)
    files.write_json(folder / "metrics.json", result())
    files.write_json(folder / "config.json", {"config": CONFIG.to_dict()})
    (folder / "figures").mkdir()
    for name in ("reconstructions", "code_histogram", "curves_vqvae", "curves_dcgan"):
        picture = figures.png(np.zeros((4, 4)))
        (folder / "figures" / f"{name}.png").write_bytes(picture)
    log = files.Log(folder / "log.csv", COLUMNS)
    log.keep("vqvae", 0)
    for stage in ("vqvae", "dcgan", "denoiser"):
        log.add(stage=stage, nimg=32, loss=0.5, g_loss=1.0, fd_validation=3.0)
    levels = torch.linspace(0, 1, 1024) if conditional else torch.zeros(0)
    networks = {"vqvae": vqvae, "generator": generator, "denoiser": denoiser}
    return predict.TrainedRun(
        folder, CONFIG, 0, "f", "", torch.device("cpu"), **networks, code_map=code_map,
        levels=levels, counts=counts,
    )  # fmt: skip


def result() -> dict:
    """A metrics.json in which every score has a number of its own."""
    kinds = (*evaluation.KINDS, "unseen_people")
    scores = {
        name: {kind: i + k / 10 for k, kind in enumerate(kinds)}
        for i, name in enumerate(evaluation.LABELS)
    }
    images = {name: {"mean": 0.5, "sd": 0.1} for name in evaluation.IMAGE_LABELS}
    codebook = {"codes": 16, "used": 15, "perplexity": 7.5, "bits_per_pixel": 0.25}
    return {
        "generation": {"n": 64, **scores},
        "reconstruction": {"n": 12, **images},
        "codebook": codebook,
    }


@pytest.fixture(scope="module")
def drawn():
    return torch.rand(60, 1, 256, 256, generator=torch.Generator().manual_seed(0))


def the_data(images: np.ndarray, stamp: str = "", **found) -> Data:
    """Data whose training slices are the uint8 `images`; a third of them is tested on, too."""
    n = len(images)
    names = [f"s{i}" for i in range(n)]
    splits = [
        BrainSlices(images, range(size), names[:size], np.linspace(0, 1, size))
        for size in (n, n // 3, n // 3)
    ]
    counts = dict(zip(("train", "validation", "test"), (n, n // 3, n // 3), strict=True))
    found = {
        "source": "embedded set", "root": "", "split": "by subject", "notes": [], "ignored": {},
        "skipped": [], "subjects": counts, "slices": counts, "fingerprint": "f", **found,
    }  # fmt: skip
    return Data(*splits, images, "f", stamp, found)


def done(seed: int, rank: int, score: float) -> dict:
    test = dict.fromkeys(("ssim", "fd_test", "recall"), score / 10)
    row = {"seed": seed, "folder": f"seed-{seed}", "status": "done", "rank": rank}
    return {**row, "validation": {"fd_validation": score}, "test": test}


WAITING = {"seed": 3, "folder": "seed-3", "rank": None, "status": "unfinished"}
FAILED = {**WAITING, "seed": 1, "folder": "seed-1", "status": "diverged", "why": "loss <nan>"}


def write_results(folder, rows: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    best = next((row["folder"] for row in rows if row["rank"] == 1), None)
    tests = [row["test"] for row in rows if row["status"] == "done"]
    spread = {
        name: {"mean": float(np.mean([t[name] for t in tests])), "sd": 0.125}
        for name in (tests[0] if tests else {})
    }
    values = {"best": best, "why": "lowest fd_validation", "runs": rows, "test_mean_sd": spread}
    files.write_json(folder / "results.json", values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn):
    """A page of four seeds, one of which failed, on data with hostile names."""
    folder = tmp_path_factory.mktemp("work") / "a <b>run"
    run = a_run(folder / "seed-0")
    write_results(folder, [done(0, 2, 5.0), FAILED, done(2, 1, 4.0), WAITING])
    skipped = [{"file": HOSTILE, "reason": "<img src=http://x onerror=alert(1)>"}] * 120
    root = '"><script>alert(2)</script>'
    data = the_data(figures.as_bytes(drawn[:, 0].numpy()), PRIVATE, skipped=skipped, root=root)
    html = report.page(folder, run, data)
    (folder / "report.html").write_text(html, encoding="utf-8")
    return SimpleNamespace(folder=folder, run=run, data=data, html=html, page=Page(html))


def test_the_page_needs_no_other_file_and_no_network(whole):
    assert len(whole.html) < 6e6
    addresses = [a["src"] for _, a in whole.page.tags if a.get("src")]
    assert len(addresses) > 100 and all(a.startswith("data:image/") for a in addresses)
    links = [a["href"] for _, a in whole.page.tags if "href" in a]
    assert {link[1:] for link in links} == SECTIONS and all(k[0] == "#" for k in links)
    assert not whole.page.all("link") and not re.search(r"@import|url\(", whole.html)
    (policy,) = whole.page.all("meta", "http-equiv")
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_every_part_is_there(whole):
    page = whole.page
    assert {section["id"] for section in page.all("section")} == SECTIONS
    assert len(page.all("div", "class", "sample")) == report.SAMPLES
    curves = {f"training curves of the {name}" for name in ("VQ-VAE", "DCGAN")}
    assert curves | {"reconstructions", "histogram of codes"} <= set(pictures(whole.html))
    assert len(page.all("img", "data-label")) == sum(report.FRAMES.values())
    assert [film["max"] for film in page.all("input", "type", "range")] == ["31", "23"]
    for name, label in (evaluation.LABELS | evaluation.IMAGE_LABELS).items():
        assert label in page.text and report.reading(name) in page.text, name
    last = len(evaluation.LABELS) - 1
    assert f"{last}.300" in page.text  # the unseen people of the last score


def test_every_score_has_its_sentence():
    scores = {name.removeprefix("layout_") for name in evaluation.LABELS}
    assert set(evaluation.READING) == scores | set(evaluation.IMAGE_LABELS)


def test_names_of_files_stay_text(whole):
    assert len(whole.page.all("script")) == 1 and "<b>" not in whole.html
    assert not [a for _, a in whole.page.tags if "onerror" in a]
    shown = whole.page.text
    assert shown.count(HOSTILE) == report.SKIPPED and "and 20 more" in shown
    assert "<script>alert(2)</script>" in shown and "loss <nan>" in shown
    assert "a <b>run" in shown


def test_runs_stand_in_the_order_of_their_rank_with_mean_and_sd(whole):
    table = whole.html.split('id="runs"')[1].split("</table>")[0]
    assert re.findall(r'scope="row">([^<]+)<', table) == [
        "1. seed-2", "2. seed-0", "seed-1", "seed-3", "mean (sd)",
    ]  # fmt: skip
    assert table.count('class="best"') == 1 and "0.450 (0.125)" in table
    assert "diverged: loss &lt;nan&gt;" in table and "unfinished" in table


def test_the_stamp_stands_at_the_top_and_at_the_end(whole):
    assert len(whole.page.all("p", "class", "stamp")) == 2
    assert whole.page.text.count(PRIVATE) == 2


def test_pictures_are_those_of_the_run(whole):
    shown = pictures(whole.html)
    images = whole.run.sample(report.SAMPLES)[1]
    for i, image in enumerate(images[:, 0].numpy()):
        np.testing.assert_array_equal(shown[f"generated slice {i}"][0], figures.as_bytes(image))
    level, swept = whole.run.sweep(report.FRAMES["sweep"])
    assert level[0] == 0 and level[-1] == 1
    for image, frame in zip(swept[:, 0].numpy(), frames(shown, "level sweep"), strict=True):
        np.testing.assert_array_equal(frame, figures.as_bytes(image))
    walked = whole.run.walk(report.FRAMES["walk"], level=0.5)[1]
    for image, frame in zip(walked[:, 0].numpy(), frames(shown, "interpolation"), strict=True):
        np.testing.assert_array_equal(frame, figures.as_bytes(image))


def pictures(html: str) -> dict[str, list[np.ndarray]]:
    """alt -> the pixels of each picture of that name, in order."""
    found = {}
    for image in Page(html).all("img", "alt"):
        if image.get("src", "").startswith("data:image/png;base64,"):
            blob = np.frombuffer(base64.b64decode(image["src"].partition(",")[2]), np.uint8)
            pixels = cv2.imdecode(blob, cv2.IMREAD_UNCHANGED)
            found.setdefault(image["alt"], []).append(pixels)
    return found


def frames(shown: dict, title: str) -> list[np.ndarray]:
    return [images[0] for name, images in shown.items() if name.startswith(title)]


def test_a_copied_training_slice_is_shown_at_distance_0(tmp_path, drawn):
    run = a_run(tmp_path / "out/seed-0")
    write_results(tmp_path / "out", [done(0, 1, 5.0)])
    images = figures.as_bytes(drawn[:, 0].numpy())
    copies = figures.as_bytes(run.sample(report.SAMPLES)[1][:, 0].numpy())
    assert len({copy.tobytes() for copy in copies}) == report.SAMPLES
    images[-report.SAMPLES :] = copies
    html = report.page(tmp_path / "out", run, the_data(images))
    for copy, near in zip(copies, pictures(html)["nearest training slice"], strict=True):
        np.testing.assert_array_equal(near, copy)
    distances = [a["data-distance"] for a in Page(html).all("div", "data-distance")]
    assert len(distances) == report.SAMPLES and max(map(float, distances)) < 0.1


def test_one_run_without_slice_levels(tmp_path, drawn):
    run = a_run(tmp_path / "out/seed-0", conditional=False)
    write_results(tmp_path / "out", [done(0, 1, 5.0)])
    data = the_data(figures.as_bytes(drawn[:, 0].numpy()))
    page = Page(report.page(tmp_path / "out", run, data))
    assert [film["max"] for film in page.all("input", "type", "range")] == ["23"]
    assert "not conditioned" in page.text and "One run does not show" in page.text
    for ask in (
        lambda: run.sample(1, level=0.5),
        lambda: run.sweep(2),
        lambda: run.walk(2, 0, 0.5),
    ):
        with pytest.raises(ValueError, match="not conditioned"):
            ask()
    assert not page.all("tfoot") and not page.all("p", "class", "stamp")


def test_a_folder_in_which_every_run_failed_has_its_page_too(tmp_path, drawn):
    write_results(tmp_path / "out", [FAILED, WAITING])
    data = the_data(figures.as_bytes(drawn[:, 0].numpy()))
    page = Page(report.page(tmp_path / "out", None, data))
    assert {s["id"] for s in page.all("section")} == {"runs", "data"}
    assert "Every run failed" in page.text and "loss <nan>" in page.text


def test_the_command_makes_the_same_run_again(whole):
    words = shlex.split(Page(re.search("<code>(python .*)</code>", whole.html)[1]).text)
    parser = Parser("")
    add_options(parser)
    assert words[:2] == ["python", "driver.py"]
    config = config_from(parser.parse_args(words[2:]))
    assert config.identity() == CONFIG.identity() and config.cache == "the cache"


def test_a_report_that_fails_is_a_warning(tmp_path, capsys):
    write_results(tmp_path, [done(0, 1, 5.0)])
    predict.save_report(tmp_path, None, "cpu")  # no such seed in the folder
    said = capsys.readouterr().err
    assert said.startswith("warning: writing report.html failed") and "seed-0" in said
    with pytest.raises(endings.Interrupted), files.warning_only("x"):
        raise endings.Interrupted(15)


# --- in a browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, the system's or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            program = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as problem:
            pytest.skip(f"no Chromium: {str(problem).splitlines()[0]}")
        yield program
        program.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def opened(request, browser, whole):
    """The page, opened from disk; at the end nothing may have been complained about."""
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.goto((whole.folder / "report.html").as_uri())
    yield page
    context.close()
    assert complaints == []


def test_in_a_browser_a_click_shows_the_nearest_slice_and_sliders_move(opened, whole):
    page = opened
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    broken = "[...document.querySelectorAll('img[src]')].filter(i => !i.naturalWidth).length"
    assert page.evaluate(broken) == 0
    shown = pictures(whole.html)
    assert not page.locator("dialog").is_visible()
    page.locator(".sample button").nth(3).click()
    for number, turn in ((3, "ArrowRight"), (4, "ArrowLeft"), (3, "Escape")):
        assert page.inner_text("#which") == f"Sample {number}"
        near = page.locator("dialog .nearest").get_attribute("src")
        cells = page.locator(".detail .nearest")
        assert near == cells.nth(number).get_attribute("src") and len(near) > 1000
        distance = page.locator(".detail").nth(number).get_attribute("data-distance")
        assert page.inner_text("dialog .distance") == distance
        page.keyboard.press(turn)
    assert not page.locator("dialog").is_visible()
    page.locator(".sample button").nth(0).click()
    page.get_by_label("previous sample").click()
    assert page.inner_text("#which") == f"Sample {report.SAMPLES - 1}"
    page.get_by_role("button", name="Close").click()
    assert not page.locator("dialog").is_visible()
    for title in ("level sweep", "interpolation"):
        film = page.locator(".film").filter(has=page.get_by_label(title, exact=True))
        slider = film.locator("input")
        for value in (0, 7):
            slider.fill(str(value))
            assert film.locator("img:visible").count() == 1
            label = film.locator("img").nth(value).get_attribute("data-label")
            assert film.locator("img:visible").get_attribute("data-label") == label
            assert film.locator("output").inner_text() == label
        slider.press("ArrowRight")
        assert film.locator("img").nth(8).is_visible()
    assert len(frames(shown, "level sweep")) == report.FRAMES["sweep"]
