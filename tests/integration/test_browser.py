"""What a person sees of a sweep in MLflow's own pages, in a real browser on a real server.

SDDIT_SCREENSHOTS=FOLDER keeps pictures of the pages, for a person to look at.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import browser
import pytest
import requests
from commands import environment, sweep
from servers import free_port

from sddit import results
from sddit.orchestration.finish import ui_link

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

QUESTION = "How does FID depend on the mask ratio of SD-DiT's student?"
# A fresh profile opens in another mode, with an assistant over a quarter of the page.
PREFERENCES = """
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
LOADED_IMAGES = (
    "[...document.images].filter(image => image.src.includes('get-artifact') && image.naturalWidth > 0).length"
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A sweep of two cells as it was run: its folder, its own run and its cells."""
    folder = tmp_path_factory.mktemp("sweep")
    done = sweep(cwd=folder, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    uri = f"sqlite:///{folder}/mlflow.db"
    return folder, results.load_sweep("mask_ratio", uri), results.load_cells("mask_ratio", uri)


@pytest.fixture(scope="module")
def server(recorded):
    """The address of a server on the sweep's record."""
    folder, _, _ = recorded
    port = free_port()
    command = [
        Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
    ]  # fmt: skip
    env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    root = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _healthy(root):
            assert time.monotonic() < deadline and process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield root
    finally:
        process.terminate()
        process.wait(30)


def _healthy(root):
    try:
        return requests.get(f"{root}/health", timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture
def page(tmp_path):
    with browser.Browser(tmp_path / "profile") as opened:
        opened.before_every_page(PREFERENCES)
        yield opened
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


def test_the_printed_link_shows_the_cells_with_their_axes_sorted_by_fid(recorded, server, page):
    _, parent, cells = recorded
    page.open(ui_link(server, parent.experiment_id))
    page.wait_for(*cells["name"], "eval/fid", "method.mask_ratio", "sddit.state", "2 matching runs")
    best = min(cells.to_dict("records"), key=lambda cell: cell["metrics"]["eval/fid"])
    other = next(name for name in cells["name"] if name != best["name"])
    assert page.text.index(best["name"]) < page.text.index(other)
    assert str(best["metrics"]["eval/fid"])[:8] in page.text
    assert QUESTION in page.text, "the experiment's note"
    page.screenshot("table")


def test_charts_of_fid_of_the_axes_and_of_the_samples_by_step(recorded, server, page):
    _, parent, _ = recorded
    page.open(f"{ui_link(server, parent.experiment_id)}&compareRunsMode=CHART")
    page.wait_for("eval/fid", "Parallel Coordinates", "Showing all runs", "samples/grid")
    page.wait_for_element(".js-plotly-plot")
    # Both cells' grids at step 0, at which the card opens.
    page.wait_until(lambda opened: opened.evaluate(LOADED_IMAGES) == 2)
    assert page.evaluate("document.images[0].src").count("step%2B0%2B") == 1
    page.screenshot("charts")


def test_cells_compared(recorded, server, page):
    _, parent, cells = recorded
    runs, experiments = (quote(json.dumps(ids)) for ids in (list(cells["run_id"]), [parent.experiment_id]))
    page.open(f"{server}/#/compare-runs?runs={runs}&experiments={experiments}")
    page.wait_for("Comparing 2 Runs", "Parallel Coordinates Plot", "method.mask_ratio", "eval/fid", *cells["name"])
    page.wait_for_element(".js-plotly-plot")
    page.screenshot("compare")


def test_a_cell_has_its_curves_and_its_samples(recorded, server, page):
    _, parent, cells = recorded
    page.open(f"{server}/#/experiments/{parent.experiment_id}/runs/{cells['run_id'][0]}/model-metrics")
    page.wait_for(cells["name"][0], "eval", "samples", "cost")
    page.wait_for_element(".js-plotly-plot")
    headers = "[...document.querySelectorAll('[data-testid=experiment-view-compare-runs-section-header]')]"
    page.evaluate(f"{headers}.find(header => header.innerText.includes('samples')).scrollIntoView()")
    page.wait_until(lambda opened: opened.evaluate(LOADED_IMAGES) == 1)
    page.screenshot("cell")


def test_the_sweeps_run_describes_itself_and_leads_to_the_report(recorded, server, page):
    _, parent, cells = recorded
    page.open(f"{server}/#/experiments/{parent.experiment_id}/runs/{parent.run_id}")
    page.wait_for("Description", QUESTION, "report.html", *cells["name"])
    page.screenshot("sweep")
    links = "[...document.querySelectorAll('a')].filter(link => link.innerText === 'report.html')"
    page.open(page.evaluate(f"{links}[0].href"))
    page.wait_for("Path:", "Lowest mean FID at the last step (6)", "one seed allows no conclusion")
    page.wait_for("Health of the discriminative loss", "How to repeat it")
    page.screenshot("report")


def test_the_report_by_itself(recorded, page, tmp_path):
    folder, _, cells = recorded
    report = tmp_path / "report.html"
    shutil.copy(folder / "figures" / "report-mask_ratio.html", report)
    page.open(report.as_uri())
    page.wait_for(QUESTION, "Settings")
    images = len(cells) + 2  # a figure, the panels, a grid for each cell
    page.wait_until(lambda opened: opened.evaluate("document.images.length") == images)
    page.evaluate("[...document.images].forEach(image => image.loading = 'eager')")
    page.wait_until(lambda opened: opened.evaluate("[...document.images].every(image => image.naturalWidth > 0)"))
    page.screenshot("report-alone")
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    assert not page.evaluate(wide), "on a phone only tables scroll sideways"
    page.screenshot("report-phone")
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.call("Emulation.setEmulatedMedia", features=[dark])
    colours = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert max(map(int, colours[:3])) < 60
    page.screenshot("report-dark")
