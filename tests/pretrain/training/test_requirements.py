"""Which versions are supported is what setup.py says, and setuptools reads it the same way."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.training.requirements import find_packages

ROOT = Path(__file__).resolve().parents[3]
BY_SETUPTOOLS = """
import json, setuptools
from distutils.core import run_setup
dist = run_setup("setup.py", stop_after="init")
print(json.dumps([dist.install_requires, dist.extras_require, str(dist.python_requires)]))
"""
SETUP = """
REQUIRED = ["numpy>=1,<999", "nothing-like-it>=1"]
EXTRAS = {{"gpu": ["numpy<0.1"], "dev": ["pytest"]}}
setup(python_requires="{python}", name=NAME)
"""


def test_every_package_is_one_that_setuptools_reads_there() -> None:
    words = [sys.executable, "-W", "ignore", "-c", BY_SETUPTOOLS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    required, extras, python = json.loads(done.stdout)
    found = find_packages()
    expected = {("python", "required")} | {(text, "required") for text in required}
    expected |= {(text, extra) for extra in extras if extra != "dev" for text in extras[extra]}
    stems = {(text.partition("[")[0].rstrip("<>=!,.0123456789"), extra) for text, extra in expected}
    assert {(package.name, package.extra) for package in found} == stems
    assert set(found[0].supported.split(",")) == set(python.split(","))


def test_versions_in_and_out_of_range_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text(SETUP.format(python=">=3.11"))
    python, numpy, absent, old = find_packages(tmp_path / "setup.py")
    assert python.version == platform.python_version()
    assert python.is_supported
    assert (numpy.version, numpy.is_supported) == (importlib.metadata.version("numpy"), True)
    assert (absent.version, absent.is_supported, absent.is_required) == ("", False, True)
    assert (old.is_supported, old.is_required, old.extra) == (False, False, "gpu")


def test_a_python_out_of_range_is_not_supported(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text(SETUP.format(python="<3.0"))
    assert not find_packages(tmp_path / "setup.py")[0].is_supported


def test_a_setup_that_does_not_say_it_plainly_is_refused(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("REQUIRED = compute()\nsetup(python_requires='>=3')\n")
    with pytest.raises(ValueError, match="names no REQUIRED"):
        find_packages(tmp_path / "setup.py")
