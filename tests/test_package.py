"""The package: what is in the wheel, that it works without the repository, what importing it costs, and what its files say of it."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import nettrim

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("cvxpy", "osqp", "scipy", "sklearn", "pandas", "matplotlib", "transformers", "distributed", "yaml", "PIL", "onnx", "onnxruntime")


def python(*arguments: str, **options) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built offline, from a copy: setuptools leaves files where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nettrim", source / "nettrim", ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source))
    (built,) = out.iterdir()
    return built


class TestWheel:
    def test_holds_the_package_and_nothing_else(self, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nettrim").rglob("*.py")}
        assert modules | {"nettrim/py.typed"} <= names
        assert {name.split("/")[0] for name in names} == {"nettrim", f"nettrim-{nettrim.__version__}.dist-info"}
        assert any(name.endswith("licenses/LICENSE") for name in names)

    def test_works_without_the_repository(self, wheel, tmp_path):
        """The demo from the unpacked wheel, in a folder of its own; the libraries are those that are installed here."""
        python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "installed"), str(wheel))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
        where = python("-c", "import nettrim; print(nettrim.__file__, nettrim.__version__)", cwd=tmp_path, env=environment)
        assert where.split() == [str(tmp_path / "installed" / "nettrim" / "__init__.py"), nettrim.__version__]
        printed = python("-m", "nettrim", "demo", "--out", "out", cwd=tmp_path, env=environment)
        assert printed.count(" holds ") == 4 and (tmp_path / "out" / "report.json").is_file()
        script = zipfile.ZipFile(wheel).read(f"nettrim-{nettrim.__version__}.dist-info/entry_points.txt").decode()
        assert "nettrim = nettrim.cli:main" in script


class TestImport:
    def test_loads_nothing_that_it_may_not_need(self):
        code = "import sys, nettrim; print(*(name for name in sys.argv[1:] if name in sys.modules))"
        assert python("-c", code, *HEAVY).split() == []

    def test_nor_does_a_first_call(self):
        """A computer algebra system and a compiler are what torch imports for some of its calls, which takes a second and more."""
        code = (
            "import sys, torch, nettrim; model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3));"
            "nettrim.prune(model, torch.rand(50, 8), sparsity=0.5); nettrim.prune(model, torch.rand(50, 8), budget=0.5);"
            "block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True); model = torch.nn.TransformerEncoder(block, 2);"
            "nettrim.prune(model, torch.rand(50, 4, 8), sparsity=0.5, fidelity='diagonal', allocation='uniform');"
            "print(*(name for name in ('sympy', 'torch._dynamo', 'torch._inductor') if name in sys.modules))"
        )
        assert python("-c", code).split() == []

    def test_is_little(self):
        """Beyond torch's own: a library of hundreds of modules would be felt."""
        code = "import sys, torch; before = set(sys.modules); import nettrim; print(*(set(sys.modules) - before))"
        loaded = python("-c", code, cwd=ROOT).split()
        assert "nettrim.pipeline" in loaded
        assert sum(not name.startswith("nettrim") for name in loaded) < 40


class TestFiles:
    def test_one_version(self):
        assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == nettrim.__version__
        assert f"## {nettrim.__version__}" in (ROOT / "CHANGELOG.md").read_text()

    def test_the_papers_are_cited(self):
        cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        numbers = {identifier["value"] for reference in cited["references"] for identifier in reference["identifiers"]}
        assert numbers == {"arXiv:1611.05162", "arXiv:1806.06457"}
        for number in numbers:
            assert number in (ROOT / "README.md").read_text()

    def test_every_library_that_is_imported_is_asked_for(self):
        """Of the package's own imports: a dependency, or one of an extra."""
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        lines = "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()]).split()
        asked = {re.split(r"[<>=\[;]", line)[0].lower() for line in lines}
        names = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
        imported = set()
        for path in (ROOT / "nettrim").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.split(".")[0] for name in found}
        imported -= set(sys.stdlib_module_names) | {"nettrim"}
        assert {names.get(name, name) for name in imported} - asked == set()
