"""Metadata of the project and what it needs; tool settings are in pyproject.toml.

Editable installs only (docs/decisions/0002-import-names.md): the packages have plain names (`data`,
`kernels`), which is right for a checkout and wrong for a wheel that lands beside other people's.
"""

import sys
from typing import NoReturn

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

PACKAGES = ("kernels", "parallel", "data", "pretrain", "launch")

REQUIRED = [
    "torch>=2.13,<2.14",
    "megatron-core==0.16.1",  # exact: its internals are adapted, docs/decisions/0001-one-engine.md
    "hydra-core>=1.3.8,<1.4",
    "omegaconf>=2.3.1,<2.4",
    "numpy>=2.1,<3",
    "psutil>=5.9",  # megatron-core's checkpoint writer imports it without declaring it
    "tokenizers>=0.23.3,<0.24",
    "matplotlib>=3.10,<4",
    "wandb>=0.31,<1",
]

EXTRAS = {
    # Here and never in REQUIRED: without its compiled parts, `import transformer_engine` raises
    # RuntimeError, which no `except ImportError` catches, so it would break every CPU machine. The
    # range is megatron-core 0.16.1's own. It compiles against the torch that is installed:
    #   pip install --no-build-isolation -c constraints.txt -e ".[gpu]"
    # NVIDIA's apex is not listed: the `apex` on PyPI is another project. It is built from source.
    "gpu": ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12"],
    "data": ["pyarrow>=20", "zstandard>=0.23"],
    # Beside it the package of each kind of URL: s3fs for s3://, gcsfs for gs://.
    "remote": ["fsspec>=2025.5"],
    # What launch/export_hf.py and import_hf.py compare with; the trainer never imports it.
    "hf": ["transformers==5.23.0"],
    # Saves the dashboard in a wandb project; a run and its page do without.
    "dashboard": ["wandb-workspaces>=0.4.13,<0.5"],
    "dev": [
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.170,<7",
        "ruff==0.17.6",
        "pyright[nodejs]==1.1.414",
        # Compiles and interprets the kernels in tests. No extra of the trainer: torch's build for
        # CUDA brings the version it wants, and a CPU runs the plain side (docs/decisions/0031).
        "triton>=3.7,<3.10; platform_system == 'Linux'",
        # Oracles: of the model, with what it needs to read FP8 folders, and of casts to FP8.
        "transformers==5.23.0",
        "accelerate>=1.15,<2",
        "ml_dtypes>=0.6,<1",
        # Writes the pairs of ids that most open corpora come as.
        "datatrove==0.10.1",
        # The dashboard as wandb would be sent it.
        "wandb-workspaces>=0.4.13,<0.5",
    ],
}


REFUSED = (
    "axk1-pretrain runs from its checkout: `make install`, or `pip install -e .`. A wheel would "
    "put packages called data, kernels and launch beside other people's "
    "(docs/decisions/0002-import-names.md)."
)


class EditableOnlyWheel(bdist_wheel):
    """Lets an editable install ask for its tags and refuses to build a wheel of copies."""

    def run(self) -> NoReturn:
        """Refuse, and say what to do instead."""
        sys.exit(REFUSED)


class EditableOnlySource(sdist):
    """Refuses to build an archive, which could only be installed as copies."""

    def run(self) -> NoReturn:
        """Refuse, and say what to do instead."""
        sys.exit(REFUSED)


setup(
    name="axk1-pretrain",
    version="0.1.0",
    description="Pretraining framework for the A.X K1 architecture on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(
        include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]
    ),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    cmdclass={"bdist_wheel": EditableOnlyWheel, "sdist": EditableOnlySource},
)
