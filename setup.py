"""Hands the metadata in settings.ini to setuptools."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithRuns(build_py):
    "A wheel brings the run notebooks and recipes along, so that `salt` works outside a checkout."

    def run(self):
        if self.editable_mode:
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # files that an earlier build put there would go along
        super().run()
        shutil.copytree("nbs/runs", Path(self.build_lib, "saltlib/runs"), ignore=shutil.ignore_patterns(".*"))


config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    license={"apache2": "Apache-2.0"}[settings["license"]],
    cmdclass={"build_py": BuildWithRuns},
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
)
