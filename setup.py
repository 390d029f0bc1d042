"""One distribution, two packages: `navit_kernels` (the ops) and `navit` (model, data, command line on top of them)."""

from pathlib import Path

from setuptools import find_packages, setup

KERNELS = ["torch>=2.10", "triton>=3.6; platform_system == 'Linux'"]  # all that navit_kernels imports
MODEL = [
    "numpy>=1.26",
    "pillow>=10.1",
    "safetensors>=0.4.3",
    "typer>=0.12",
    "rich>=13.7",
    "matplotlib>=3.8",
]  # added by navit
TEST = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]

setup(
    name="navit-kernels",
    version="0.1.0",
    description="NaViT: vision transformer for images of any resolution and aspect ratio, with its Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["navit_kernels", "navit_kernels.*", "navit", "navit.*"]),
    package_data={"navit_kernels": ["py.typed"], "navit": ["py.typed"]},
    install_requires=KERNELS + MODEL,
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff==0.17.6", "mypy==2.4.1"],
        "fa": ["flash-attn-4>=4.0.0b30"],
        "timm": ["timm>=1.0.29"],
        "transformers": ["transformers>=5.17,<6"],
        "vit-pytorch": ["vit-pytorch>=1.23"],
    },
    entry_points={"console_scripts": ["navit = navit.cli:main"]},
)
