"""The wheel carries all that a run needs: recipes, the built-in model, and no more than the
package.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from running import environment

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("lit_sft", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
RUN = """
fit --config demo --trainer.max_steps 2 --trainer.check_val_every_n_epoch 1 --trainer.enable_progress_bar false
--model.generation.max_new_tokens 4 --model.evaluation.num_samples 4 --data.max_samples 64 --data.cache_dir cache
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no folder of an earlier build gets into it, and none is left in
    the tree.
    """
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


def pip(*args):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_what_the_tree_has(wheel):
    expected = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "lit_sft").rglob("*")
        if path.is_file()
    }
    expected = {name for name in expected if "__pycache__" not in name}
    expected |= {f"lit_sft/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


@pytest.mark.slow
def test_a_recipe_runs_by_its_name_from_anywhere(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    pip("install", "--no-deps", "--target", site, wheel)
    elsewhere.mkdir()

    def python(*args):
        env = environment(PYTHONPATH=str(site))
        done = subprocess.run(
            [sys.executable, *args], cwd=elsewhere, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    origin = python(
        "-c", "import lit_sft; print(lit_sft.__file__)"
    )  # not an editable install of the tree
    assert Path(origin.strip()).is_relative_to(site)
    python("-m", "lit_sft", *RUN.split())
    assert (elsewhere / "lightning_logs" / "version_0" / "hf" / "model.safetensors").is_file()
