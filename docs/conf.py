"""Sphinx: `make docs`. The reference is `prerl help`'s, put in the place of markers when a page is read."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from prerl_lightning import __version__  # noqa: E402
from prerl_lightning.manual import page  # noqa: E402

project, release, html_title = "prerl-lightning", __version__, f"prerl-lightning {__version__}"
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
exclude_patterns = ["_build", "figures.py"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
KINDS = (
    *(
        "objectives",
        "terms",
        "axes",
        "bases",
        "adapters",
        "keys",
        "values",
        "problems",
        "engines",
        "rewards",
        "callbacks",
    ),
    *("strategies", "trainer", "metrics"),
)
FLAGS = "<!-- Lightning's flags -->"


def fill(app: object, name: str, source: list[str]) -> None:
    for kind in KINDS:
        marker = f"<!-- prerl help: {kind} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, page(kind))
    if FLAGS in source[0]:  # run as a file: its package imports torch
        flags = ROOT / "prerl_lightning" / "objectives" / "trainer_arguments.py"
        source[0] = source[0].replace(FLAGS, runpy.run_path(str(flags))["table"]())


def setup(app) -> None:
    app.connect("source-read", fill)
