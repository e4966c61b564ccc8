"""The demo page in a browser: choose a video, move the slider, read the result."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from helpers.videos import write_clip

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.data.synthetic import DIRECTIONS
from everest_hf.inference import read_window
from everest_hf.video import probe

pytest.importorskip("gradio", reason="the page needs the extra `demo`")
httpx = pytest.importorskip("httpx", reason="it comes with gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds
# The words of elements that take more than one line.
BROKEN_WORDS = """elements => elements.flatMap(element => {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), broken = [];
    while (walker.nextNode())
        for (const word of walker.currentNode.data.matchAll(/\\S+/g)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) broken.push(word[0]);
        }
    return broken;
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint, two clips and a file that is not a video."""
    folder = tmp_path_factory.mktemp("demo")
    config = tiny_config(id2label={i: f"class {i}" for i in range(5)}, label2id={f"class {i}": i for i in range(5)})
    model = EverestForVideoClassification(config)
    model.classifier.bias.data[0] = 4.0  # so that a timeline has a segment
    model.save_pretrained(folder / "model")
    EverestVideoProcessor.from_config(config, frame_step=1).save_pretrained(folder / "model")
    write_clip(folder / "upload.mp4", num_frames=20)
    write_clip(folder / "long.mp4", num_frames=60)
    write_clip(folder / "upload.avi", num_frames=20, codec="mpeg4")  # as those of UCF101 and HMDB51
    (folder / "tmp").mkdir()
    write_clip(folder / "examples" / "moving.mp4", num_frames=20, seed=1)
    (folder / "examples" / "README.md").write_text("where they come from")
    (folder / "text.mp4").write_text("this is not a video\n" * 20)
    return folder


def temporary_folders(folder) -> list[Path]:
    return list((folder / "tmp").glob("everest-*"))


@pytest.fixture(scope="module")
def address(folder):
    """The page's address, served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "app.py"),
        "--model",
        str(folder / "model"),
        "--examples",
        "examples",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*"}
    environment["TMPDIR"] = str(folder / "tmp")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(960):
            assert server.poll() is None, (folder / "server.log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait(20)
    assert temporary_folders(folder) == []


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Classify").wait_for()
    yield page
    page.close()


def tokens_shown(page) -> list[int]:
    """Tokens with the keep ratio and dense, as the table on the page has them."""
    row = page.locator("table", has_text="GFLOPs").locator("tr", has_text="tokens")
    return [int(cell) for cell in row.locator("td").all_inner_texts()[1:]]


def place(slider, keep_ratio: float) -> dict[str, float]:
    """Where on the slider a keep ratio is, in pixels."""
    box = slider.bounding_box()
    low, high = (float(slider.get_attribute(name)) for name in ("min", "max"))
    return {"x": box["width"] * (keep_ratio - low) / (high - low), "y": box["height"] / 2}


def test_upload_classify_and_move_the_slider(page, folder):
    page.locator("input[type=file]").first.set_input_files(folder / "upload.mp4")
    page.locator("video").first.wait_for()
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("as fast as dense").wait_for()
    assert tokens_shown(page) == [27, 60]
    assert page.get_by_text("class 0").count() >= 2  # beside each other: sparse and dense
    assert page.get_by_text("The model looked at 12 frames, from 0.16 s to 0.60 s.").count() == 1
    slider = page.locator("input[type=range]")
    slider.drag_to(slider, source_position=place(slider, 0.45), target_position=place(slider, 0.9))
    page.get_by_text("keep ratio 0.9").wait_for()
    assert tokens_shown(page) == [54, 60]
    kept = page.locator("video").last
    kept.scroll_into_view_if_needed()
    assert kept.evaluate("video => video.videoWidth") > 3 * 40  # it plays: panels side by side
    page.screenshot(path=os.environ.get("EVEREST_SCREENSHOT", folder / "page.png"), full_page=True)


def test_a_timeline_shows_segments_and_a_frame_of_the_chosen_one(page, folder):
    page.locator("input[type=file]").first.set_input_files(folder / "long.mp4")
    page.locator("video").first.wait_for()
    page.get_by_role("button", name="Timeline").click()
    page.get_by_text("Choose a segment").wait_for()
    pictures = page.locator(".image-frame img")
    assert pictures.count() == 1  # the frame is not chosen yet
    page.get_by_text("class 0", exact=True).locator("visible=true").last.click()
    pictures.nth(1).wait_for()
    width = pictures.last.evaluate("async image => { await image.decode(); return image.naturalWidth; }")
    assert width == probe(folder / "long.mp4").width
    page.screenshot(path=os.environ.get("EVEREST_SCREENSHOT_TIMELINE", folder / "timeline.png"), full_page=True)


def test_nothing_is_wider_than_a_telephone(browser, address, folder):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator("input[type=file]").first.set_input_files(folder / "upload.mp4")
    page.locator("video").first.wait_for()
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("as fast as dense").wait_for()
    page.wait_for_function("document.querySelectorAll('video').length == 2")
    narrow = os.environ.get("EVEREST_SCREENSHOT_NARROW", folder / "narrow.png")
    page.screenshot(path=narrow, full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    title = page.locator("p", has_text=str(folder / "model"))
    assert title.evaluate("e => [...e.querySelectorAll('*'), e].every(c => c.scrollWidth <= c.clientWidth)")
    cells = page.locator("table", has_text="GFLOPs").locator("td, th")
    assert cells.count() == 12
    assert cells.evaluate_all(BROKEN_WORDS) == []
    assert cells.evaluate_all("cells => Math.max(...cells.map(c => c.getBoundingClientRect().right))") <= 390
    page.close()


def test_a_measurement_leaves_the_warm_up_out(folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import app

    demo = app.Demo(str(folder / "model"))
    seconds = iter([90.0, 80.0, 0.004, 0.002, 0.6, 0.003, 0.005, 0.001])
    monkeypatch.setattr(demo, "_timed", lambda clip, ratio: (demo.model(clip, keep_ratio=ratio), next(seconds)))
    monkeypatch.setattr(app, "ENOUGH_SECONDS", 0)
    sparse, dense = demo._measure(read_window(demo.processor, str(folder / "upload.mp4")).pixel_values, (0.5, 1.0))
    assert (sparse["milliseconds"], dense["milliseconds"]) == pytest.approx((5, 2))
    said = app._table(sparse, dense)
    assert "| | keep ratio 0.5 | dense |" in said
    assert "| tokens | 30 | 60 |" in said
    assert "| milliseconds | 5 | 2 |" in said
    assert "**0.40 × as fast as dense**, by the medians of 3 runs each on this clip." in said
    assert said.endswith(" Here it takes longer to select the tokens than dropping the others saves.")


def test_a_format_that_browsers_do_not_play_is_shown_and_classified(page, folder):
    before = temporary_folders(folder)
    page.locator("input[type=file]").first.set_input_files(folder / "upload.avi")
    page.locator("video").first.wait_for()
    page.wait_for_function("document.querySelector('video').videoWidth == 64")
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("as fast as dense").wait_for()
    assert temporary_folders(folder) == before  # what was written for the page is gone


def test_a_file_that_is_too_large_is_refused(address, folder):
    with (folder / "large.mp4").open("wb") as file:
        file.truncate(201 * 2**20)
    with (folder / "large.mp4").open("rb") as file:
        answer = httpx.post(f"{address}gradio_api/upload", files={"files": file}, timeout=60)
    assert answer.status_code == 413


def test_requests_are_limited(folder, monkeypatch):
    """In their time, and in how many wait; a message says so, and files are deleted some time later."""
    monkeypatch.syspath_prepend(ROOT)
    import app

    demo = app.Demo(str(folder / "model"))
    page = app.build_page(demo, {})
    assert page._queue.max_size == 20
    assert page.delete_cache == (600, 3600)
    monkeypatch.setattr(app, "REQUEST_SECONDS", 1e-4)
    (answer,) = demo.run(str(folder / "upload.mp4"), 0.5)
    assert answer == (None, None, None, "This takes longer than 0.0001 seconds; choose a shorter or smaller video.")
    ((shown, _),) = app.show(str(folder / "upload.avi"))
    assert shown is None


def test_an_example_can_be_chosen(page):
    page.get_by_text("moving.mp4").first.click()
    page.locator("video").first.wait_for()
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("as fast as dense").wait_for()


def test_examples_are_videos_and_there_are_some_without_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import app

    assert app.example_videos(folder / "examples", tmp_path) == {"moving.mp4": str(folder / "examples" / "moving.mp4")}
    offered = app.example_videos(tmp_path / "nowhere", tmp_path)
    assert sorted(offered) == sorted(DIRECTIONS)
    assert all(probe(path).num_frames == 12 for path in offered.values())


def test_a_file_that_is_no_video_gets_a_message(page, folder):
    page.locator("input[type=file]").first.set_input_files(folder / "text.mp4")
    page.get_by_text("not a video that can be read").wait_for()
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("not a video that can be read").wait_for()
    for word in ("Traceback", "Error"):
        assert page.get_by_text(word, exact=True).count() == 0


def test_nothing_chosen_gets_a_message(page):
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("Choose a video first").wait_for()
    assert page.get_by_text("Error", exact=True).count() == 0
