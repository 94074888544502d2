"""``prerl report``: one HTML page on one run or many.

    prerl report runs/dsrl/version_0 -o report.html
    prerl report runs/grpo runs/dsrl -o report.html

The page opens from disk and asks no network: Vega and Vega-Lite come out of the package vl-convert-python, and a
Content-Security-Policy forbids every request and every script but the page's own, by their hashes. Text of a model
reaches it as escaped HTML or as JSON that the script puts into text nodes.
"""

import base64
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from prerl_lightning import __version__
from prerl_lightning.errors import ArgumentParser, InputError
from prerl_lightning.report import background, compare, headline, tables
from prerl_lightning.report.compare import Group
from prerl_lightning.report.figures import Figure, by_rule, families, figures, split_flat
from prerl_lightning.report.folders import expand, passed_over
from prerl_lightning.report.html import figure, tag
from prerl_lightning.report.payload import payload, to_json
from prerl_lightning.report.reading import read_run, superseded
from prerl_lightning.report.runs import Run

log = logging.getLogger(__name__)

SCRIPTS = ("page.js", "charts.js", "draw.js", "samples.js")
NAMES = {
    "accuracy": "Accuracy", "sooner": "Steps to accuracy", "thoughts": "Thoughts", "alignment": "Alignment",
    "health": "Training", "time": "Time", "configuration": "Configuration", "other": "Other columns",
    "samples": "Samples",
}  # fmt: skip


def _arguments() -> ArgumentParser:
    parser = ArgumentParser("prerl report", description="One self-contained HTML page on one run or many.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs/NAME/version_N, or runs/NAME for all its versions")
    parser.add_argument("-o", "--out", default="report.html", help="the file to write (default report.html)")
    return parser


def report(args: Sequence[str]) -> Path:
    """Run the command; returns the file written.

    Raises:
        InputError: a folder that is no run, or an output that cannot be written, before any work.
    """
    own = _arguments().parse_args(args)
    folders = expand(own.runs)
    out = Path(own.out)
    if out.is_dir():
        raise InputError(f"-o {own.out} is a folder. Name a file in it: {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"-o {own.out} does not end in .html. Name the page to write, e.g. {own.out}.html")
    if not out.parent.is_dir():
        raise InputError(f"-o {own.out}: no folder {out.parent}. Make it, or write elsewhere.")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"-o {own.out} cannot be written: no permission. Write elsewhere.")
    vega()  # says so now if the package is missing
    old = superseded(folders)
    runs = [read_run(folder) for folder in folders if folder not in old]
    notes = [f"{folder}: no metrics.csv in it, left out." for folder in passed_over(own.runs)]
    html = page(runs, notes=notes)
    try:
        out.write_text(html, encoding="utf-8", errors="replace")  # of a run's lone surrogates
    except OSError as error:
        raise InputError(f"-o {own.out} cannot be written: {error}") from None
    print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {out.stat().st_size / 1e6:.1f} MB")
    return out


def page(runs: Sequence[Run], now: float | None = None, notes: Sequence[str] = ()) -> str:
    """The page's HTML. Runs whose configurations differ in seeds alone are drawn as one; its head has the ``notes``."""
    return page_of(compare.group(runs), now, notes)


def page_of(
    groups: Sequence[Group],
    now: float | None = None,
    notes: Sequence[str] = (),
    head: Mapping[str, str] | None = None,
    first: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The page on these groups. ``head``: HTML in the place of its own title, lead or summary; ``first``: sections
    before its own, as (id, title, HTML)."""
    now = time.time() if now is None else now
    ordered = [run for group in groups for run in group.runs]
    drawn, flat = split_flat(figures(ordered), ordered)
    base = compare.baseline(groups)
    data, left_out = payload(groups, drawn, by_rule(families(ordered))[0])
    kept = {name for run in data["runs"] for table in run["tables"] for name in table["columns"]}
    drawn = [f for f in drawn if f.of_responses or kept.intersection(f.columns)]
    figures_of = {name: "".join(figure(f) for f in drawn if f.section == name) for name in {f.section for f in drawn}}
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    parts = {
        "title": escape(headline.title(groups)),
        "lead": headline.lead(groups, base),
        "summary": headline.tiles(groups[0]) if len(groups) == 1 else headline.overview(groups),
        "states": headline.states(groups, now),
        "left_out": "".join(tag("p", escape(said), class_="note") for said in [*notes, *left_out]),
        "made": f"prerl report {__version__}, {made}",
        "bodies": "".join(
            _section(name, figures_of.get(name, ""), _flat(name, flat), groups, base, bool(data["samples"]))
            for name in NAMES
        ),
        "css": _asset("page.css"),
        "data": to_json(data),
    } | dict(head or {})  # fmt: skip
    parts["bodies"] = "".join(_framed(*one) for one in first) + parts["bodies"]
    names = {name: text for name, text, _ in first} | NAMES
    parts["contents"] = "".join(
        tag("a", text, href=f"#{name}") for name, text in names.items() if f'id="{name}"' in parts["bodies"]
    )
    scripts = [vega(), *map(_asset, SCRIPTS)]
    parts["scripts"] = "\n".join(tag("script", script) for script in scripts)
    parts["policy"] = policy(scripts)
    return _fill(_asset("page.html"), parts)


def _flat(section: str, flat: Sequence[Figure]) -> str:
    """One line in the place of figures that would show nothing."""
    there = [f for f in flat if f.section == section]
    names = ", ".join(tag("span", escape(f.title), title=f"metrics.csv: {', '.join(f.columns)}") for f in there)
    return tag("p", f"Zero throughout: {names}.", class_="note") if there else ""


def _section(name: str, figures_html: str, flat: str, groups: Sequence[Group], base: Group, samples: bool) -> str:
    before, after = "", ""
    if name == "accuracy":
        after = tables.accuracy_table(groups)
    elif name == "sooner":
        before = tables.ratio_table(groups, base)
    elif name == "alignment":
        before, after = tables.alignment_table(groups), tables.part_table(groups)
    elif name == "time":
        before, after = background.time_table(groups), background.machines(groups)
    elif name == "configuration":
        before = background.configuration(groups)
    elif name == "samples":
        before = _asset("samples.html") if samples else ""
    elif name == "thoughts" and figures_html:
        names = families([run for group in groups for run in group.runs])
        before = "".join(tables.thought_table(groups, rule) for rule in by_rule(names)) + _asset("thoughts.html")
    if not before and not figures_html and not flat and not after:
        return ""
    inner = before + (tag("div", figures_html, class_="figures") if figures_html else "") + flat + after
    if name == "other":
        inner = tag("details", tag("summary", "Columns that no figure above shows") + inner)
    return _framed(name, NAMES[name], inner)


def _framed(name: str, title: str, inner: str) -> str:
    return tag("section", tag("h2", title, id=f"{name}-title") + inner, id=name, aria_labelledby=f"{name}-title")


def _fill(template: str, parts: dict[str, str]) -> str:
    """{{name}} by its part, in one pass: braces within a part stay as they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("prerl_lightning") / "assets" / "report" / name).read_text(encoding="utf-8")


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script without imports."""
    try:
        import vl_convert
    except ImportError:
        raise InputError("prerl report needs the package vl-convert-python: pip install vl-convert-python") from None
    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default
    # within a script element neither may occur; in JavaScript's strings and patterns the escapes mean the same
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r", "")


def policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: these scripts, inline styles, and nothing from anywhere."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
