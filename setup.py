"""Package metadata, read from settings.ini (which nbdev reads as well)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=[*find_packages(include=["stf", "stf.*"]), "stf.weights"],
    package_dir={"stf.weights": "data/weights"},  # of a checkout: the networks that predict uses
    package_data={"stf": ["*.json", "*.txt", "*.mplstyle", "*.npz"],
                  "stf.weights": ["*/*.safetensors"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name.removesuffix("_requirements"): cfg[name].split()
                    for name in cfg if name.endswith("_requirements")},
    entry_points={
        "console_scripts": ["stf=stf.cli:main"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
