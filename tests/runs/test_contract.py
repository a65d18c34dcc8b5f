"""What users, their scripts and their files rely on: keys and defaults, scalar tags, JSON keys,
files, exit codes.

The snapshot in `records/contract.json` is compared whole. A change of it is a change for users: it
belongs into CHANGELOG, and a new snapshot is written by

    python tests/runs/test_contract.py
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))
from running import (  # noqa: E402
    REPOSITORY,
    arguments,
    chat_rows,
    environment,
    version,
    write_rows,
)
from tiny import save_tiny  # noqa: E402

SNAPSHOT = Path(__file__).parents[1] / "records" / "contract.json"
COMMANDS = ("fit", "validate", "test", "predict", "preview", "doctor")
SETTINGS = {
    "data__val_size": 4,
    "data__packing": True,
    "data__questions": ["abc"],
    "model__evaluation": {},
}


def command(*args: str) -> tuple[int, str]:
    """Exit code and stdout of `python -m lit_sft ARGS`, in this process."""
    from lit_sft.cli.main import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            main([*args])
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
    return 0, output.getvalue()


def exit_code(*args: str) -> int:
    """Exit code of `python -m lit_sft ARGS`, as a shell sees it."""
    command = [sys.executable, "-m", "lit_sft", *args]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True
    ).returncode


def flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their defaults; an empty mapping is a default."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


def defaults(name: str, *args: str) -> dict[str, Any]:
    code, config = command(name, *args, "--print_config")
    assert code == 0
    return dict(flat(yaml.safe_load(config)))


def files(folder: Path) -> list[str]:
    """Names below a folder; what carries a time or a process number is cut off."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(
        {
            name.split(".tfevents")[0] + ".tfevents" if ".tfevents" in name else name
            for name in names
        }
    )


def observe(folder: Path) -> dict[str, Any]:
    """Runs every command once on a tiny model and writes down what it leaves."""
    model, root = save_tiny(folder / "model"), folder / "run"
    rows = write_rows(folder / "train.jsonl", chat_rows(24))
    base = arguments(model, rows, root, **SETTINGS)
    lines = {}
    for name in ("fit", "validate", "predict"):
        more = (
            []
            if name == "fit"
            else [f"--ckpt_path={root}/lightning_logs/version_0/checkpoints/last.ckpt"]
        )
        assert command(name, *base, *more)[0] == 0
    fine, doctor = command("doctor", *base, "--output=json")
    _, preview = command("preview", *base, "--output=json", "--num_rows=2")
    _, certificate = command("preview", *base, "--output=json", "--certify")
    run = version(root)
    with (run / "metrics.csv").open() as file:
        columns = sorted(csv.DictReader(file).fieldnames or [])
    events = EventAccumulator(str(run)).Reload()
    predictions = root.glob("lightning_logs/version_*/predictions.jsonl")
    lines["predictions"] = next(predictions).read_text().splitlines()[0]
    lines["evaluation"] = (run / "evaluation.jsonl").read_text().splitlines()[0]
    lines["preview"] = preview.splitlines()[0]
    lines["certificate"] = certificate.splitlines()[0]
    lines["certificate of a shape"] = json.dumps(json.loads(certificate)["results"][0])
    lines["doctor"] = doctor.splitlines()[-1]
    checkpoint = run / "checkpoints" / "last.ckpt"
    return {
        "config": {name: defaults(name) for name in COMMANDS},
        "config of export": sorted(defaults("export", f"--ckpt_path={checkpoint}")),
        "json": {name: sorted(dict(flat(json.loads(line)))) for name, line in lines.items()},
        "metrics.csv": columns,
        "scalars": sorted(events.Tags()["scalars"]),
        "texts": sorted(events.Tags()["tensors"]),
        "files": files(run),
        "checkpoint": checkpoint_keys(checkpoint),
        "exit": {
            "no command": exit_code(),
            "unknown key": exit_code("fit", "--modle.lora.r=4"),
            "wrong value": command("fit", "--trainer.max_epochs=two")[0],
            "no such file": command("fit", *base, "--data.train=nowhere.jsonl")[0],
            "no checkpoint": command("export", "--ckpt_path=nowhere.ckpt")[0],
            "fine": fine,
        },
    }


def checkpoint_keys(path: Path) -> list[str]:
    """Entries of a checkpoint down to the states of callbacks, which an older run must find
    again.
    """
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    inside = {"callbacks": checkpoint["callbacks"], "SFTDataModule": checkpoint["SFTDataModule"]}
    return sorted(
        [*checkpoint, *(f"{group}.{name}" for group, values in inside.items() for name in values)]
    )


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(json.dumps(observe(tmp_path_factory.mktemp("contract"))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", sorted(json.loads(SNAPSHOT.read_text())) if SNAPSHOT.exists() else []
)
def test_the_contract_is_kept(observed, part):
    assert observed[part] == json.loads(SNAPSHOT.read_text())[part]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        SNAPSHOT.write_text(json.dumps(observe(Path(scratch)), indent=1, sort_keys=True) + "\n")
