"""report.html: one file, every part there, hostile names harmless, alive in a real browser."""

import base64
import re
import shlex
import shutil
from functools import partial
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
from scores import evaluation, figures, report, results
from stages.decoder import make_sharper_vqvae
from stages.denoiser import make_denoiser
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
        self.html, self.tags, self.text = html, [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str, name: str = "", value: str | None = None) -> list[dict]:
        found = [a for t, a in self.tags if t == tag and (not name or name in a)]
        return [a for a in found if value is None or value in a[name].split()]

    def pictures(self, name: str) -> np.ndarray:
        """The pixels of all pictures whose names begin with `name`, in order."""
        found = [a["src"] for a in self.all("img", "src") if a["alt"].startswith(name)]
        blobs = [base64.b64decode(src.partition(",")[2]) for src in found]
        coded = [np.frombuffer(blob, np.uint8) for blob in blobs]
        return np.stack([cv2.imdecode(png, cv2.IMREAD_UNCHANGED) for png in coded])


def a_run(folder, conditional: bool = True) -> predict.TrainedRun:
    """Networks with random weights, as `load_run` gives them; scores and figures on disk."""
    crop = modules.Crop(4, 8, 56, 48)
    vqvae, denoiser = make_sharper_vqvae(CONFIG), make_denoiser(CONFIG)
    generator = modules.make_generator(CONFIG, crop.size)
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
    (folder / "figures").mkdir()
    for name in ("reconstructions", "code_histogram", "curves_vqvae", "curves_dcgan"):
        (folder / "figures" / f"{name}.png").write_bytes(figures.png(np.zeros((4, 4))))
    levels = torch.linspace(0, 1, 1024) if conditional else torch.zeros(0)
    return predict.TrainedRun(
        folder, CONFIG, 0, "f", "", torch.device("cpu"), vqvae, generator, denoiser, code_map,
        levels, counts,
    )  # fmt: skip


def result() -> dict:
    """A metrics.json in which every score has a number of its own."""
    kinds = (*evaluation.KINDS, "unseen_people")
    scores = {
        name: {kind: i + k / 10 for k, kind in enumerate(kinds)}
        for i, name in enumerate(evaluation.LABELS)
    }
    images = {name: {"mean": 0.5, "sd": 0.1} for name in evaluation.IMAGE_LABELS}
    return {
        "generation": {"n": 64, **scores}, "reconstruction": {"n": 12, **images},
        "codebook": {"codes": 16, "used": 15, "perplexity": 7.5, "bits_per_pixel": 0.25},
    }  # fmt: skip


@pytest.fixture(scope="module")
def noise():
    """60 slices, uint8."""
    return np.random.default_rng(0).integers(0, 256, (60, 256, 256), np.uint8)


def the_data(images: np.ndarray, stamp: str = "", **found) -> Data:
    """Data whose training slices are the uint8 `images`; a third of them is tested on, too."""
    n = len(images)
    names = [f"s{i}" for i in range(n)]
    counts = {"train": n, "validation": n // 3, "test": n // 3}
    splits = [
        BrainSlices(images, range(size), names[:size], np.linspace(0, 1, size))
        for size in counts.values()
    ]
    found = {
        "source": "embedded set", "root": "", "split": "by subject", "notes": [], "ignored": {},
        "skipped": [], "subjects": counts, "slices": counts, "fingerprint": "f", **found,
    }  # fmt: skip
    return Data(*splits, images, "f", stamp, found)


def done(score: float) -> dict:
    test = dict.fromkeys(("ssim", "fd_test", "recall"), score / 10)
    return {"status": "done", "validation": {"fd_validation": score}, "test": test}


WAITING = {"status": "unfinished"}
FAILED = {"status": "diverged", "why": "loss <nan>"}


def page_of(folder, run, data: Data, *rows: dict) -> Page:
    """The page of seeds 0, 1, ... with these rows in results.json."""
    results.write(folder, dict(enumerate(rows)))
    return Page(report.page(folder, run, data))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, noise):
    """A page of four seeds, one of which failed, on data with hostile names."""
    folder = tmp_path_factory.mktemp("work") / "a <b>run"
    run = a_run(folder / "seed-0")
    skipped = [{"file": HOSTILE, "reason": "<img src=http://x onerror=alert(1)>"}] * 120
    data = the_data(noise, PRIVATE, skipped=skipped, root='"><script>alert(2)</script>')
    page = page_of(folder, run, data, done(5.0), FAILED, done(4.0), WAITING)
    (folder / "report.html").write_text(page.html, encoding="utf-8")
    return SimpleNamespace(folder=folder, run=run, html=page.html, page=page)


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
    names = {image["alt"] for image in page.all("img", "src")}
    assert names >= curves | {"reconstructions", "histogram of codes"}
    assert len(page.all("img", "data-label")) == sum(report.FRAMES.values())
    assert [film["max"] for film in page.all("input", "type", "range")] == ["31", "23"]
    for name, label in (evaluation.LABELS | evaluation.IMAGE_LABELS).items():
        assert label in page.text and report.reading(name) in page.text, name
    last = len(evaluation.LABELS) - 1
    assert f"{last}.300" in page.text  # the unseen people of the last score


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
    assert table.count('class="best"') == 1 and "0.450 (0.071)" in table
    assert "diverged: loss &lt;nan&gt;" in table and "unfinished" in table


def test_the_stamp_stands_at_the_top_and_at_the_end(whole):
    assert len(whole.page.all("p", "class", "stamp")) == 2
    assert whole.page.text.count(PRIVATE) == 2


def test_pictures_are_those_of_the_run(whole):
    run = whole.run
    level, swept = run.sweep(report.FRAMES["sweep"])
    assert level[0] == 0 and level[-1] == 1
    for name, images in (
        ("generated slice", run.sample(report.SAMPLES)[1]), ("level sweep", swept),
        ("interpolation", run.walk(report.FRAMES["walk"], level=0.5)[1]),
    ):  # fmt: skip
        pixels = figures.as_bytes(images[:, 0].numpy())
        np.testing.assert_array_equal(whole.page.pictures(name), pixels)


def test_a_copied_training_slice_is_shown_at_distance_0(tmp_path, noise):
    run = a_run(tmp_path / "out/seed-0")
    copies = figures.as_bytes(run.sample(report.SAMPLES)[1][:, 0].numpy())
    assert len({copy.tobytes() for copy in copies}) == report.SAMPLES
    images = np.concatenate([noise[: -report.SAMPLES], copies])
    page = page_of(tmp_path / "out", run, the_data(images), done(5.0))
    np.testing.assert_array_equal(page.pictures("nearest training slice"), copies)
    distances = [a["data-distance"] for a in page.all("div", "data-distance")]
    assert len(distances) == report.SAMPLES and max(map(float, distances)) < 0.1


def test_one_run_without_slice_levels(tmp_path, noise):
    run = a_run(tmp_path / "out/seed-0", conditional=False)
    page = page_of(tmp_path / "out", run, the_data(noise), done(5.0))
    assert [film["max"] for film in page.all("input", "type", "range")] == ["23"]
    assert "not conditioned" in page.text and "One run does not show" in page.text
    for draw in (partial(run.sample, level=0.5), run.sweep, partial(run.walk, level=0.5)):
        with pytest.raises(ValueError, match="not conditioned"):
            draw(2)
    assert not page.all("tfoot") and not page.all("p", "class", "stamp")


def test_a_folder_in_which_every_run_failed_has_its_page_too(tmp_path, noise):
    page = page_of(tmp_path, None, the_data(noise), FAILED, WAITING)
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
    results.write(tmp_path, {0: done(5.0)})
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


def test_in_a_browser_a_click_shows_the_nearest_slice_and_sliders_move(opened):
    page = opened
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    broken = "[...document.querySelectorAll('img[src]')].filter(i => !i.naturalWidth).length"
    assert page.evaluate(broken) == 0
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
            frame = film.locator("img").nth(value)
            assert frame.is_visible() and film.locator("img:visible").count() == 1
            assert film.locator("output").inner_text() == frame.get_attribute("data-label")
        slider.press("ArrowRight")
        assert film.locator("img").nth(8).is_visible()
