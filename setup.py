"""Package metadata, read from settings.ini (which nbdev reads as well)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class BuildWithNetworks(build_py):
    "Puts data/weights, the networks that predict uses, into a wheel; a checkout has them."

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            self.copy_tree(str(here / "data/weights"), f"{self.build_lib}/stf/weights")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["stf", "stf.*"]),
    package_dir={"": "."},  # an editable install adds this folder to the path, as a plain line
    package_data={"stf": ["*.json", "*.txt", "*.mplstyle", "*.npz"]},
    cmdclass={"build_py": BuildWithNetworks},
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
