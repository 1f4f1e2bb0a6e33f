"""The package as a wheel, installed apart from the checkout, with all that it needs at run time."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stf.synthetic import SyntheticConfig, write_synthetic

ROOT = Path(__file__).resolve().parent.parent
DEMO = """
from stf.experiments import demo
from stf.synthetic import SyntheticConfig
from stf.train import Config

config = Config.preset("synthetic", name="demo", widths=(6, 6, 6), gcn_scales=2, g3d_scales=2,
                       length=12, epochs=1, stf_epochs=1, device="cpu")
people = SyntheticConfig(actions=(23, 44), subjects=(1, 2, 3, 4), cameras=(1,))
demo("demo", config, people, progress=False)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "Runs Python outside the checkout with the wheel's contents; gives what it prints."
    folder = tmp_path_factory.mktemp("wheel")
    own = {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}

    def python(*args):
        done = subprocess.run([sys.executable, *args], cwd=folder, env={**os.environ, **own},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("nbs/", "tests/", "data/results/")) and (ROOT / name).is_file():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "src" / name)
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", "./src")
    (wheel,) = folder.glob("*.whl")
    python(*pip, "install", "--no-deps", "--no-index", "--target", "site", str(wheel))
    shutil.rmtree(folder / "src")
    few = SyntheticConfig(actions=(23,), subjects=(27,), cameras=(1,))
    write_synthetic(folder / "raw", few, progress=False)
    assert str(folder / "site") in python("-c", "import stf; print(stf.__file__)")
    return python


@pytest.mark.slow
def test_an_installed_wheel_predicts_with_the_shipped_networks(installed):
    raw = installed("-c", "import glob; print(sorted(glob.glob('raw/*.skeleton'))[0])").strip()
    assert "hand waving" in installed("-m", "stf.cli", "predict", raw)


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demo(installed):
    assert "Table 5" in installed("-c", DEMO)


def test_a_folder_of_the_packages_name_does_not_hide_it(tmp_path):
    "As where the clone is called stf, and Python starts beside it."
    (tmp_path / "stf").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", "import stf.train"], cwd=tmp_path, env=env, check=True)
