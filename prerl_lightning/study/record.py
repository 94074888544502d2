"""study.json: what was claimed when, the runs, what tuning chose, and the verdicts."""

import json
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prerl_lightning.errors import InputError
from prerl_lightning.secrets import hide
from prerl_lightning.study.design import Study, digest


class Record:
    """The file, read at the start of each call and written whenever something in it changes.

    ``registration`` holds, for each claim and for the design (arms, files, settings, seeds, tuning), what was last
    written, its SHA-256, since when, and how many runs of the study were finished then; ``history`` holds what it
    replaced or removed. What is put back as it was keeps its time, and says since when it stands ``again``.
    ``finished``: the folders of all runs that ever were, also of an earlier design.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"format": 1, "registration": {}, "history": [], "finished": []}
        if path.is_file():
            try:
                self.data |= json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(
                    f"{path} cannot be read: {error}. Restore it, or move it away to register anew."
                ) from None

    def register(self, study: Study, finished: Collection[str], dry_run: bool = False) -> list[str]:
        """Register what the file says and is not registered; returns the names of what is new, another or removed.

        ``finished``: folders of its runs that are. ``dry_run``: the time is left open, and `write` must not follow.
        """
        self.finish(finished)
        registered: dict[str, Any] = self.data["registration"]
        said = {f"claim {claim.name}": claim.registered for claim in study.claims} | {"design": study.registered}
        now = {"time": None if dry_run else _now(), "runs_finished": len(self.data["finished"])}
        gone = [name for name in registered if name not in said]
        for name in gone:
            self.data["history"].append({"what": f"{name} removed", **now, "before": registered.pop(name)})
        other = {n: c for n, c in said.items() if n not in registered or registered[n]["sha256"] != digest(c)}
        anew = not registered
        for name, canonical in other.items():
            before, counts = registered.get(name), self._that_counts(name)
            if counts and counts["sha256"] == digest(canonical):
                kind, again = "put back", {"again": {**now, "was": "changed" if before else "removed"}}
                registered[name] = counts | again
            else:
                kind, how = "changed", {"changed": True} if before else {} if anew else {"added": True}
                registered[name] = {"sha256": digest(canonical), "said": hide(json.loads(canonical)), **now, **how}
            if before:
                self.data["history"].append({"what": f"{name} {kind}", **now, "before": before})
        return [*other, *gone]

    def _that_counts(self, name: str) -> dict[str, Any] | None:
        """What ``name`` was when the first run was finished, or, of what was written down later, at first."""
        entries = [one["before"] for one in self.data["history"] if one["what"].startswith(f"{name} ")]
        entries += [self.data["registration"][name]] if name in self.data["registration"] else []
        return next((one for one in reversed(entries) if not one["runs_finished"]), entries[0] if entries else None)

    def finish(self, folders: Collection[str]) -> None:
        self.data["finished"] = sorted({*self.data["finished"], *folders})

    def write(self, **parts: Any) -> None:
        self.data |= parts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def standing(self, what: str) -> str:
        """Of a claim, or of the design: as registered, or since when it is another, in words."""
        return standing(self.data["registration"][what])


def standing(entry: Mapping[str, Any]) -> str:
    """ "registered 2026-11-26 00:43 UTC, before any run was finished"."""
    flag = "CHANGED" if entry.get("changed") else "ADDED" if entry.get("added") else "registered"
    said = f"{flag if entry['runs_finished'] else 'registered'} {_when(entry)}"
    again = entry.get("again")
    return f"{said}; {again['was']} after that, and put back as it was {_when(again)}" if again else said


def _when(entry: Mapping[str, Any]) -> str:
    done, time = entry["runs_finished"], entry["time"]
    at = "now" if time is None else f"{time[:10]} {time[11:16]} UTC"
    runs = f"after {done} run{'s were' if done > 1 else ' was'}" if done else "before any run was"
    return f"{at}, {runs} finished"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
