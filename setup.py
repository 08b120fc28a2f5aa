"""Build and install hqsearch: what it is, what it needs, and its extras."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

EXTRAS = {
    "plot": ["matplotlib>=3.8"],
    "faiss": ["faiss-cpu>=1.8"],
    "letters": ["rdata>=0.11"],
    "bench": [
        "matplotlib>=3.8",
        "ortools>=9.10",
        "faiss-cpu>=1.8",
        "hnswlib>=0.8",
        "pynndescent>=0.5.13",
        "rdata>=0.11",
    ],
    "docs": ["matplotlib>=3.8"],
    "tests": [
        "matplotlib>=3.8",
        "faiss-cpu>=1.8",
        "hypothesis>=6.100",
        "mypy>=1.10",
        "ortools>=9.10",
        "pandas>=2.0",
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "rdata>=0.11",
        "ruff>=0.5",
        "setuptools>=69",
    ],
}

setup(
    name="hqsearch",
    version="0.1.0",
    description="Hierarchical sparse hash codes for similarity search, as scikit-learn estimators",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    packages=find_packages(include=["hqsearch", "hqsearch.*"]),
    package_data={"hqsearch": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "numpy>=1.26",
        "scipy>=1.11",
        "scikit-learn>=1.6",
        "joblib>=1.3",
        "networkx>=3.1",
        "numba>=0.60",
        "llvmlite",
        "torch>=2.4",
        "safetensors>=0.4",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
