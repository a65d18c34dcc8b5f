"""Finds the checkpoint that `--ckpt_path` names."""

from __future__ import annotations

import logging
from pathlib import Path

from lit_sft.checkpoint import files
from lit_sft.errors import UserError
from lit_sft.files import target

log = logging.getLogger(__name__)


def find_checkpoint(ckpt_path: str | None, logs: Path, subcommand: str) -> str | None:
    """Returns the path of the checkpoint to resume from or to evaluate.

    Args:
        ckpt_path: The path of a checkpoint or of a run's folder. `last` is the newest intact
            checkpoint of all runs, `best` the best checkpoint of the same run (not for `fit`).
        logs: The folder `lightning_logs`.
        subcommand: The command.

    Returns:
        The path; None if `ckpt_path` is None.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last" or (ckpt_path == "best" and subcommand != "fit"):
        return str(_find_by_name(ckpt_path, logs, subcommand))
    found = _find_by_path(ckpt_path)
    files.check(found)
    return str(found)


def _find_by_name(name: str, logs: Path, subcommand: str) -> Path:
    last = find_last(logs)
    if last is None:
        remedy = "run `fit` first"
        if subcommand == "fit":
            remedy = "leave it out for a new run"
        raise UserError(
            f"--ckpt_path {name}: there is no intact checkpoint below {logs}; {remedy}, or give a"
            " path"
        )
    _warn_of_newer_runs(logs, last)
    return _best_beside(last) if name == "best" else last


def _find_by_path(ckpt_path: str) -> Path:
    found = Path(ckpt_path)
    if (found / files.FOLDER).is_dir():
        run = found.absolute()
        last = find_last(run.parent, run.name)
        if last is None:
            raise UserError(f"--ckpt_path {ckpt_path}: this run has no intact checkpoint")
        found = last
    if not found.exists():
        raise UserError(f"--ckpt_path {ckpt_path}: there is no such checkpoint")
    if found.name in (files.LAST, files.BEST):
        return found.with_name(target(found) or found.name)
    return found


def find_last(logs: Path, run: str | None = None) -> Path | None:
    """Returns the last intact checkpoint of the run that saved last, or of one run.

    Torn checkpoints are skipped with a warning.

    Args:
        logs: The folder `lightning_logs`.
        run: Name of a run's folder; None searches all runs.
    """
    runs = [logs / run] if run else sorted(files.runs_below(logs), key=_last_save, reverse=True)
    for folder in runs:
        for path in files.latest_first(folder):
            if files.is_intact(path):
                return path
            log.warning("%s is torn: passed over", path)
    return None


def _last_save(run: Path) -> int:
    """Returns when a run last saved a checkpoint, in nanoseconds; 0 if it never did."""
    return max(map(files.modified, files.own_checkpoints(run / files.FOLDER)), default=0)


def _best_beside(last: Path) -> Path:
    """Returns the best checkpoint of the run that a checkpoint belongs to.

    Raises:
        UserError: The run has no intact best checkpoint.
    """
    folder = last.parent
    name = target(folder / files.BEST)
    if name is None or not files.is_intact(folder / name):
        raise UserError(
            f"--ckpt_path best: {folder} holds no intact {files.BEST}, which a run makes with"
            " data.validation or data.val_size; take last, or give a path"
        )
    return folder / name


def _warn_of_newer_runs(logs: Path, found: Path) -> None:
    """Warns of newer runs that are skipped because they stopped before their first save."""
    run = found.parent.parent
    newer = []
    for folder in files.runs_below(logs):
        if _is_newer_without_checkpoint(folder, found):
            newer.append(folder.name)
    if newer:
        log.warning(
            "%s: no checkpoint yet, passed over for the older %s", ", ".join(sorted(newer)), run
        )


def _is_newer_without_checkpoint(folder: Path, found: Path) -> bool:
    run = found.parent.parent
    if _number(folder) <= _number(run):
        return False
    settings = folder / "config.yaml"
    if not settings.is_file() or settings.stat().st_mtime <= found.stat().st_mtime:
        return False
    return not any((folder / files.FOLDER).glob("step=*.ckpt"))


def _number(run: Path) -> int:
    return int(run.name.removeprefix("version_"))
