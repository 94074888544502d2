"""A run's folder, with the steps of the runs that it was resumed from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prerl_lightning.errors import InputError
from prerl_lightning.report.files import (
    is_held_out,
    is_measured,
    is_sample,
    last_written,
    read_config,
    read_info,
    read_json_lines,
    run_name,
)
from prerl_lightning.report.metrics import MetricsFile
from prerl_lightning.report.runs import Run, run_seconds


def read_run(folder: Path) -> Run:
    """One folder; a run that was resumed gets its predecessor's rows.

    Raises:
        InputError: no metrics.csv.
    """
    if not (folder / "metrics.csv").is_file():
        raise InputError(f"{folder}: no metrics.csv in it. Give the folder of a run, e.g. runs/dsrl/version_0.")
    return _read(folder, ())


def read_begun(folder: Path) -> Run:
    """As `read_run`, also of a run that has no rows yet."""
    return _read(folder, ())


def superseded(folders: Sequence[Path]) -> set[Path]:
    """Those that another one was resumed from, directly or over others: it holds their steps."""
    found: set[Path] = set()
    for folder in folders:
        before = _predecessor(folder)
        while before is not None and before not in found and before != folder.resolve():
            found.add(before)
            before = _predecessor(before)
    return {folder for folder in folders if folder.resolve() in found}


def _read(folder: Path, after: tuple[Path, ...]) -> Run:
    """``after``: folders that are read with this one as their predecessor."""
    metrics = MetricsFile(folder / "metrics.csv")
    metrics.read()
    rows = metrics.rows
    info, notes = read_info(folder)
    config, text, more = read_config(folder)
    notes += more
    samples, bad_samples = read_json_lines(folder / "samples.jsonl", is_sample)
    alignment, bad_alignment = read_json_lines(folder / "alignment.jsonl", is_measured)
    held_out, bad_held_out = read_json_lines(folder / "held_out.jsonl", is_held_out)
    if not rows.training and not rows.validation:
        notes.append("metrics.csv has no rows")
    elif not rows.numbered:
        notes.append("made by an older version without optim/step: steps are told from Lightning's column")
    if rows.training and not any("time/since_start" in row for row in rows.training.values()):
        notes.append("no time/since_start: wall time is the sum of time/step, without validation")
    if rows.cut_off:
        notes.append("metrics.csv ends within a line, which is left out")
    if rows.unreadable:
        notes.append(
            f"lines of metrics.csv that do not fit its header, or have no step, and are left out: {rows.unreadable}"
        )
    lines = {"samples.jsonl": bad_samples, "alignment.jsonl": bad_alignment, "held_out.jsonl": bad_held_out}
    for file, bad in lines.items():
        if bad:
            notes.append(f"lines of {file} that are cut off or of an unknown form, and are left out: {bad}")
    missing = [file for file in ("config.yaml", "run.json", "samples.jsonl") if not (folder / file).is_file()]
    if missing:
        notes.append(f"no {', '.join(missing)}")
    training, validation = (dict(sorted(r.items())) for r in (rows.training, rows.validation))
    run = Run(
        folder, *run_name(folder, info), info, config, text, training, validation, run_seconds(training),
        samples, alignment, last_written(folder, bool(training)), tuple(notes),
        {line["step"]: line for line in held_out},
    )  # fmt: skip
    before = _predecessor(folder)
    if before is not None and before not in after:
        return _with_predecessor(run, _read(before, (*after, folder.resolve())))
    if not info.get("resumed_from"):
        return run
    lost = f"resumed from {info['resumed_from']}, which is not there: earlier steps are missing"
    return replace(run, notes=(*run.notes, lost))


def _with_predecessor(run: Run, earlier: Run) -> Run:
    """Up to this run's first step the rows are the predecessor's; what that did after its checkpoint is left out."""
    first = min(run.training, default=earlier.steps + 1)
    offset = earlier.seconds.get(first - 1, max(earlier.seconds.values(), default=0.0))
    lost = f" (its steps {first:,} to {earlier.steps:,} are left out)" if earlier.steps >= first else ""
    notes = [f"steps 1 to {first - 1:,} are of {earlier.folder}, from which it was resumed{lost}"]
    notes += [f"{earlier.folder.name}: {note}" for note in earlier.notes]
    return replace(
        run,
        training={s: r for s, r in earlier.training.items() if s < first} | dict(run.training),
        validation={s: r for s, r in earlier.validation.items() if s < first} | dict(run.validation),
        seconds={s: t for s, t in earlier.seconds.items() if s < first}
        | {s: t + offset for s, t in run.seconds.items() if s >= first},
        samples=(*(s for s in earlier.samples if s["step"] < first), *run.samples),
        alignment=(*(s for s in earlier.alignment if s["step"] < first), *run.alignment),
        notes=(*run.notes, *notes),
        held_out={s: line for s, line in earlier.held_out.items() if s < first} | dict(run.held_out),
    )


def _predecessor(folder: Path) -> Path | None:
    """Of .../version_0/checkpoints/last.ckpt, which run.json names. A relative path is tried from above the run's
    folder, the nearest first; of an absolute one that is gone, as runs were moved or renamed, that beside it."""
    info = read_info(folder)[0]
    source = info.get("resumed_from")
    if not source:
        return None
    before, here = Path(source).parent.parent, folder.resolve()
    if not before.is_absolute():
        candidates = [base / before for base in here.parents]
    else:
        moved = [here.parent / before.name] if before.parent.name in (here.parent.name, info.get("name")) else []
        candidates = [before, *moved]
    for found in candidates:
        if found.name and (found / "metrics.csv").is_file() and found.resolve() != here:
            return found.resolve()
    return None
