"""Shared by all tests: markers, and where real recordings are found."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: pytest -n 2 fills two cores

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes long; still run by .ci/run (leave out with -m 'not slow')"
    )
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch, whatever the environment says: sums of floats in one order, and no
    quarrel between test workers."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings; tests that use it are skipped where it is absent."""
    folder = Path(os.environ.get("STF_REAL_DATA", ROOT.parent / "shared" / "real-data"))
    if not folder.is_dir():
        pytest.skip(
            f"no real recordings at {folder}; set STF_REAL_DATA to the folder that has them"
        )
    return folder
