"""What a report shows of a sweep's record: its figures, the health of its cells, and their last samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import common, style
from analysis.answer import Setting
from analysis.page import Html, download, element, picture

if TYPE_CHECKING:
    from mlflow import MlflowClient

HEALTH = {"train/information_cls": "CLS token", "train/information_patch": "patch tokens"}
GRID_PATH = "images/samples~grid+step+"  # where MLflow keeps what was logged as samples/grid
FILES = (".png", ".pdf", ".csv", ".md", ".tex")
MAX_SHOWN = 60  # grids, and lines of a health panel
LEGEND_LENGTH = 40  # letters; the settings of a search are longer than a figure is wide
LOST = 3  # downloads in a row that fail: nobody is there any more
DRAWN = 0.65  # size of a figure on the page: its letters come out as large as the text


def recorded_files(client: MlflowClient, run_id: str, folder: str) -> list[Path]:
    """The figures and tables that a sweep's last command put on its run, fetched into `folder`."""
    names = [file.path for file in client.list_artifacts(run_id) if Path(file.path).suffix in FILES]
    return [Path(client.download_artifacts(run_id, name, folder)) for name in names]


def drawings(files: Sequence[Path]) -> list[Html]:
    """One a name: the picture or the table in text, and its files to save."""
    shown = []
    for stem in dict.fromkeys(path.stem for path in files):
        kinds = {path.suffix: path for path in files if path.stem == stem}
        content = [picture(kinds[".png"].read_bytes(), f"Figure {stem}", DRAWN)] if ".png" in kinds else []
        if ".md" in kinds:
            content.append(element("pre", kinds[".md"].read_text(encoding="utf-8")))
        links = [part for path in kinds.values() for part in (" ", download(path))]
        shown.append(element("figure", *content, element("figcaption", "Files:", *links), class_="drawing"))
    return shown


def _one_seed_first(settings: Sequence[Setting]) -> list[tuple[Setting, dict[str, Any]]]:
    """All cells: the first seed of every setting, then the second of every setting, and so on."""
    ordered = [
        (rank, i, cell)
        for i, setting in enumerate(settings)
        for rank, cell in enumerate(sorted(setting.cells, key=lambda cell: cell["seed"]))
    ]
    return [(settings[i], cell) for _, i, cell in sorted(ordered, key=lambda entry: entry[:2])]


def grids(client: MlflowClient, settings: Sequence[Setting], folder: str) -> tuple[list[Html], int]:
    """The last grids of at most `MAX_SHOWN` cells, in the order of the settings, and how many cells are left out."""
    from mlflow.exceptions import MlflowException

    having = [(s, cell) for s, cell in _one_seed_first(settings) if "mlflow.loggedImages" in cell["tags"]]
    shown, lost = [], 0
    for setting, cell in sorted(having[:MAX_SHOWN], key=lambda pair: (settings.index(pair[0]), pair[1]["seed"])):
        name, content = f"{setting.name}, seed {cell['seed']}", [element("p", "not available", class_="warn")]
        if lost < LOST:
            try:
                paths = [file.path for file in client.list_artifacts(cell["run_id"], "images")]
                steps = {
                    int(path.removeprefix(GRID_PATH).split("+")[0]): path
                    for path in paths
                    if path.startswith(GRID_PATH) and path.endswith(".png")
                }
                step = max(steps)
                file = client.download_artifacts(cell["run_id"], steps[step], folder)
                name += f", step {step:,}"
                content = [picture(Path(file).read_bytes(), f"Samples of {name}")]
                lost = 0
            except (MlflowException, OSError, ValueError):
                lost += 1
        shown.append(element("figure", *content, element("figcaption", name)))
    return shown, len(having) - len(shown)


def health(client: MlflowClient, settings: Sequence[Setting]) -> Html:
    """The information of the discriminative targets over steps, as a figure; nothing where no cell has it."""
    cells = [pair for pair in _one_seed_first(settings) if HEALTH.keys() <= pair[1]["metrics"].keys()][:MAX_SHOWN]
    if not cells:
        return Html()
    series = [(cell["run_id"], metric) for _, cell in cells for metric in HEALTH]
    with ThreadPoolExecutor(8) as pool:
        histories = dict(zip(series, pool.map(lambda pair: client.get_metric_history(*pair), series), strict=True))
    names = list(dict.fromkeys(setting.name for setting in settings))
    colours = dict(zip(names, style.shades(style.COLOURS["sddit"], len(names)), strict=True))
    caption = (
        "Information of the targets of the discriminative loss; near 0 they say nothing. One line a cell; dashed and "
        "red: collapsed."
    )
    with style.context():
        figure, panels = style.panels(len(HEALTH), caption)
        legend = {}
        for panel, (metric, title) in zip(panels, HEALTH.items(), strict=True):
            for setting, cell in cells:
                points = sorted((point.step, point.value) for point in histories[cell["run_id"], metric])
                collapsed = "sddit.collapse" in cell["tags"]
                [line] = panel.plot(
                    [step for step, _ in points], [value for _, value in points], marker=".", linewidth=1.3,
                    color="#C00000" if collapsed else colours[setting.name], linestyle="--" if collapsed else "-",
                )  # fmt: skip
                legend[setting.name + ", collapsed" * collapsed] = line
            panel.set_title(title)
        panels[0].set_ylim(bottom=0)
        style.label_axes(panels, "step", "information (nat)")
        if len(legend) <= 10 and max(map(len, legend)) <= LEGEND_LENGTH:
            figure.legend(legend.values(), legend.keys(), loc="outside right upper")
        figure.savefig(png := io.BytesIO(), format="png", metadata=common.METADATA["png"])
    return element("figure", picture(png.getvalue(), caption, DRAWN), class_="drawing")
