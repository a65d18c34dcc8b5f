"""The command `recipes`."""

import re
import subprocess
import sys

import pytest
from running import REPOSITORY, environment

from lit_sft.cli import front_door
from lit_sft.recipes import recipes


def test_every_recipe_is_listed_with_a_sentence(capsys):
    assert front_door.answer(["recipes"]) == 0
    bare = capsys.readouterr().out
    assert front_door.answer(["recipes", "list"]) == 0
    assert capsys.readouterr().out == bare
    names = [line for line in bare.splitlines() if re.fullmatch(r"\w+", line)]
    assert names == sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
    texts = re.split(r"^\w+$", bare.partition("\n\n")[0], flags=re.MULTILINE)[1:]
    assert all(text.strip().endswith(".") and len(text.split()) > 4 for text in texts)


def test_show_and_copy_give_the_text_of_the_file(tmp_path, capsys):
    text = (REPOSITORY / "configs" / "demo.yaml").read_text()
    assert front_door.answer(["recipes", "show", "demo"]) == 0
    assert capsys.readouterr().out == text
    mine = tmp_path / "mine.yaml"
    assert front_door.answer(["recipes", "copy", "demo", str(mine)]) == 0
    assert mine.read_text() == text and f"--config {mine}" in capsys.readouterr().out


@pytest.mark.parametrize("action", [["show"], ["copy"]])
def test_an_unknown_recipe(action, tmp_path, capsys):
    more = [str(tmp_path / "mine.yaml")] if action == ["copy"] else []
    assert front_door.answer(["recipes", *action, "demmo", *more]) == 2
    assert capsys.readouterr().err == "error: there is no recipe demmo: did you mean demo?\n"


def test_nothing_is_replaced(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    assert front_door.answer(["recipes", "copy", "demo", str(mine)]) == 1
    assert mine.read_text() == "mine" and f"{mine} exists" in capsys.readouterr().err
    gone = tmp_path / "gone" / "mine.yaml"
    assert front_door.answer(["recipes", "copy", "demo", str(gone)]) == 1
    assert (
        capsys.readouterr().err == f"error: {gone} cannot be written: No such file or directory\n"
    )


def test_nothing_heavy_is_imported():
    code = "import sys; from lit_sft.cli import front_door; front_door.answer(['recipes']);"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and recipes()
