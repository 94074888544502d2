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
    replaced. ``finished``: the folders of all runs that ever were, also of an earlier design.
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

    def register(self, study: Study, finished: Collection[str]) -> None:
        """``finished``: folders of its runs that are. Registers what the file says and is not registered yet."""
        self.finish(finished)
        registered: dict[str, Any] = self.data["registration"]
        said = {f"claim {claim.name}": claim.registered for claim in study.claims} | {"design": study.registered}
        now, done = _now(), len(self.data["finished"])
        for name in [n for n in registered if n not in said]:
            self.data["history"].append({"what": f"{name} removed", "time": now, "runs_finished": done,
                                         "before": registered.pop(name)})  # fmt: skip
        anew = not registered
        for name, canonical in said.items():
            before = registered.get(name)
            if before and before["sha256"] == digest(canonical):
                continue
            entry = {
                "sha256": digest(canonical),
                "said": hide(json.loads(canonical)),
                "time": now,
                "runs_finished": done,
            }
            if before:
                kept = {"what": f"{name} changed", "time": now, "runs_finished": done, "before": before}
                self.data["history"].append(kept)
                # by what was known when it became another, the first time that something was
                entry["changed"] = True
            registered[name] = entry | ({} if before or anew else {"added": True})

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
    done, time = entry["runs_finished"], f"{entry['time'][:10]} {entry['time'][11:16]} UTC"
    if not done:
        return f"registered {time}, before any run was finished"
    how = "CHANGED" if entry.get("changed") else "ADDED" if entry.get("added") else "registered"
    return f"{how} {time}, after {done} run{'s were' if done > 1 else ' was'} finished"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
