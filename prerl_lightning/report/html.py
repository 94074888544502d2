"""Pieces of HTML: elements, tables, swatches."""

from collections.abc import Iterable, Sequence
from html import escape

from prerl_lightning.metrics.glossary import column
from prerl_lightning.report.compare import Group
from prerl_lightning.report.figures import Figure

COLOURS, DASHES = 7, ("", "6 3", "2 2", "8 3 2 3")  # as in page.js
NONE, TIMES = "\u2013", "\u00d7"  # for no value, and the sign of multiplication


def tag(name: str, content: str, **attributes: str) -> str:
    """Content is HTML already; attributes are not."""
    said = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{said}>{content}</{name}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, source: str = "") -> str:
    """Cells are HTML; the first of a row is its header. Wide tables scroll by themselves."""
    top = "".join(tag("th", cell, scope="col") for cell in head)
    body = "".join(
        tag("tr", tag("th", row[0], scope="row") + "".join(tag("td", cell) for cell in row[1:])) for row in rows
    )
    said = tag(
        "p", escape(caption) + (tag("span", escape(source), class_="source") if source else ""), class_="caption"
    )
    whole = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    # the caption stays outside, where it does not scroll away with a wide table
    return said + tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def swatch(index: int) -> str:
    dash = DASHES[index // COLOURS % len(DASHES)]
    return (
        '<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><line x1="1" y1="4" x2="21" y2="4" '
        f'style="stroke:var(--g{index % COLOURS})" stroke-width="2.5" stroke-dasharray="{dash}"/></svg>'
    )


def named(groups: Sequence[Group], group: Group) -> str:
    return swatch(groups.index(group)) + escape(group.name)


def figure(item: Figure) -> str:
    """An empty figure that the page's script fills when it comes into view."""
    files = (
        "alignment.jsonl: cosine, reward, tokens" if item.of_responses else f"metrics.csv: {', '.join(item.columns)}"
    )
    columns = files if len(files) < 160 else f"metrics.csv: {item.columns[0]}, …"
    meant = dict.fromkeys(f"{c.name}: {c.text} ({c.unit})" for c in map(column, item.columns) if c)
    note = tag("span", escape(item.note), class_="unit") if item.note else ""
    head = tag("figcaption", tag("span", escape(item.title), class_="title") + note)
    plot = tag("div", "", class_="plot", role="img", tabindex="0", aria_label=f"{item.title}; figures follow")
    return tag(
        "figure", head + plot + tag("p", escape(columns), class_="source", title="\n".join([files, *meant])),
        class_="wide" if item.wide else "", data_figure=item.key,
    )  # fmt: skip
