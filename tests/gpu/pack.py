"""One archive of what the GPU checks need beside torch 2.11, for a machine with CUDA 13 and Python 3.12 that
reaches no package index.

    python tests/gpu/pack.py site.tar.xz            # here: minutes, 38 MiB
    mkdir SITE && tar -xf site.tar.xz -C SITE       # there
    PYTHONPATH=TREE:SITE python -m pytest -m gpu tests/gpu

Taken from the machine are torch and what `MACHINE` lists. The archive's packages come first in the path, so
that its transformers and tokenizers hide newer ones. vLLM and flash-attn are not in it: what needs them is
skipped, and packed rows go through torch's own kernel. Versions are those of docker/requirements-cpu.txt,
where the extras of pyproject.toml do not name others.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKED = (
    *("verl", "tensordict", "pyvers", "torchdata", "TransferQueue", "pyzmq", "msgspec", "orjson"),
    *("codetiming", "dill", "hydra-core", "importlib_metadata", "pylatexenc"),
    *("fastapi", "starlette", "uvicorn", "sniffio"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("ray", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
    *("transformers", "tokenizers", "peft", "datasets", "multiprocess", "trl"),
    *("omegaconf", "antlr4-python3-runtime", "math-verify", "latex2sympy2_extended", "latex2mathml"),
)
MACHINE = (
    *("accelerate", "aiohttp", "click", "cloudpickle", "filelock", "fsspec", "huggingface_hub>=1.31"),
    *("hypothesis", "jinja2", "matplotlib", "mpmath", "msgpack", "numpy", "packaging", "pandas"),
    *("protobuf", "psutil", "pyarrow>=24", "pybind11", "pytest", "pyyaml", "regex", "requests", "rich"),
    *("safetensors", "sympy", "tensorboard", "tqdm", "typing_extensions", "xxhash", "zipp"),
)
# Of ray: Java, the dashboard's pages and the libraries above its core. verl imports none of them.
UNUSED = (
    *("bin", "ray/jars", "ray/dashboard/client"),
    *(f"ray/{library}" for library in ("data", "llm", "rllib", "serve", "train", "tune")),
)
PLATFORMS = ("2_28", "2_27", "2_26", "2_24", "2_17")


def pins() -> list[str]:
    """`PACKED`, each with its version."""
    listed = (ROOT / "docker" / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*listed, *extras["optional-dependencies"]["gpu"], *extras["optional-dependencies"]["bench"]]
    versions = {}
    for line in lines:
        if exact := re.fullmatch(r"([\w.-]+)==([\w.+]+)", line.strip()):
            versions[normal(exact[1])] = exact[2]
    return [f"{name}=={versions[normal(name)]}" for name in PACKED]


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="the file to write, .tar.xz")
    archive = parser.parse_args().archive
    with tempfile.TemporaryDirectory() as directory:
        wheels, site = Path(directory, "wheels"), Path(directory, "site")
        there = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
        there += [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
        there += ["--platform=manylinux2014_x86_64"]
        source = [pin for pin in pins() if pin.startswith("antlr4")]  # pure Python, published without a wheel
        pip("wheel", "--no-deps", f"--wheel-dir={wheels}", *source)
        built = [pin for pin in pins() if pin not in source]
        pip("download", "--no-deps", *there, f"--dest={wheels}", *built)
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        pip("install", "--no-deps", "--no-index", "--no-compile", *there, f"--target={site}", *files)
        for name in UNUSED:
            shutil.rmtree(site / name)
        for tests in [path for path in site.rglob("tests") if path.is_dir()]:
            shutil.rmtree(tests)
        with tarfile.open(archive, "w:xz") as packed:
            for path in sorted(site.iterdir()):
                packed.add(path, path.name)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB, {len(files)} packages")


if __name__ == "__main__":
    main()
