"""The house itself: which room may import which, what must not be loaded, what a package holds."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "mambacompress"

# A module may import modules of its own level (itself included, passes excepted) and of every level before.
LEVELS = (
    ("errors", "nm", "numerics", "kernels"),
    ("models",),
    ("schema", "pass_schema", "recipe", "data", "images", "distill_recipe", "passes", "training", "demo"),
    ("storage", "calibration", "card", "workdir", "artifact"),
    ("pipeline",),
    ("hf", "export"),
    ("api",),
    ("eval", "bench"),
    ("pretraining", "sparsifying", "souping", "distilling"),
    ("__init__", "cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
IMPORTS_TRANSFORMERS = ("models/families", "hf.py", "training/hf_callback", "training/scratch", "data.py", "eval",
                        "bench")
# What these may import although it stands later: pure file helpers, nothing that knows models.
LEAVES = {"storage"}


NO_COMPILER = "no-such-compiler"  # as $CXX: an install must go on without one, and does not spend a minute on it
INSTALL = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")


def run(*command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> None:
    """Run a command; what it said is in the failure."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def sources() -> list[Path]:
    found = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]
    for room in ("kernels", "eval"):  # links: rglob does not follow them on every Python
        found += [PACKAGE / room / path.relative_to(REPOSITORY / room) for path in (REPOSITORY / room).rglob("*.py")]
    return sorted(set(found))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and top_level_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        queue += ast.iter_child_nodes(node)


def test_every_module_has_its_level():
    unknown = {room(path) for path in sources()} - set(LEVEL)
    assert not unknown, f"say in LEVELS where {unknown} stand"


def test_imports_go_one_way():
    wrong = []
    for path in sources():
        own = room(path)
        for line, name in imports(path):
            if not name.startswith("mambacompress."):
                continue
            other = name.split(".")[1]
            if other not in LEVEL:  # a name of the package itself
                other = "__init__"
            if LEVEL[other] > LEVEL[own] and other not in LEAVES:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} ({own}) imports {name} ({other})")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_nothing_of_ours():
    wrong = [f"{path}:{line} imports {name}" for path in sources() if room(path) == "kernels"
             for line, name in imports(path)
             if name.startswith("mambacompress.") and not name.startswith("mambacompress.kernels")]
    assert not wrong, "\n".join(wrong)


def test_passes_do_not_import_one_another():
    """Shared ground (base, and helpers that define no pass) may be imported; a file that holds a pass may not."""
    files = {path.stem: path for path in sources() if room(path) == "passes" and path.stem not in ("__init__", "base")}
    holds_pass = {stem for stem, path in files.items()
                  if any(isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Pass" for base in node.bases)
                         for node in ast.parse(path.read_text(encoding="utf-8")).body)}
    wrong = [f"passes/{stem}.py:{line} imports {name}" for stem in holds_pass for line, name in imports(files[stem])
             if name.startswith("mambacompress.passes.") and name.split(".")[2] in holds_pass]
    assert not wrong, "\n".join(wrong)


def test_only_these_rooms_import_transformers():
    wrong = []
    for path in sources():
        inside = path.relative_to(PACKAGE).as_posix()
        if not inside.startswith(IMPORTS_TRANSFORMERS):
            wrong += [f"{inside}:{line}" for line, name in imports(path) if name.split(".")[0] == "transformers"]
    assert not wrong, f"transformers is imported at {wrong}"


def test_kernels_is_no_package():
    """With the repository on sys.path, transformers would take it for Hugging Face's own ``kernels``."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, '.'); from transformers import MambaForCausalLM"
    run(sys.executable, "-c", code)


@pytest.mark.parametrize("name", ["kernels", "recipes", "eval"])
def test_rooms_are_relative_links(name: str):
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink().as_posix() == f"../{name}"
    assert (REPOSITORY / name).is_dir()


def test_importing_the_package_loads_nothing_heavy():
    code = ("import sys, mambacompress as mc; dir(mc); mc.UserError, mc.load_recipe\n"
            "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules); assert not heavy, heavy")
    run(sys.executable, "-c", code)


def test_evaluating_a_model_loads_only_what_it_needs():
    """Neither what rotates nor what other commands and the tasks of lm-eval need; before a model is read, no host."""
    code = ("import sys, mambacompress as mc, mambacompress.cli.evaluate\n"
            "def loaded(*names): return set(names) & set(sys.modules)\n"
            "mc.evaluate, mc.load\n"
            "assert not loaded('transformers', 'scipy'), loaded('transformers', 'scipy')\n"
            "mc.load('demo'), mc.load_tokenizer('demo')\n"
            "idle = loaded('datasets', 'lm_eval', 'matplotlib', 'plotly', 'pandas', 'sklearn', 'torchvision')\n"
            "assert not idle, idle")
    run(sys.executable, "-c", code)


def test_public_names_are_all_there():
    import mambacompress as mc

    assert set(mc.__all__) <= set(dir(mc))
    for name in mc.__all__:
        assert getattr(mc, name).__doc__, f"mambacompress.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        mc.quantise  # noqa: B018


def test_sources_are_short_and_explain_themselves():
    """Every file can be read in one sitting and says what it is."""
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{path.relative_to(PACKAGE)} is longer than 400 lines"
        assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"{path.relative_to(PACKAGE)} has no docstring"


# -- packages --------------------------------------------------------------------------------------------------------


def project_files(*folders: str) -> list[str]:
    """Names of the project's files, tracked or about to be; skips where there is no git to ask."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard", *folders], cwd=REPOSITORY,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(REPOSITORY / name)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A fresh copy of the project, links kept as links."""
    return copied(tmp_path / "project")


def copied(target: Path) -> Path:
    for name in project_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the project, and the wheel built from that sdist."""
    root = tmp_path_factory.mktemp("build")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", copied(root / "project"),
        **quick_compiler(root))
    return root / "dist"


def quick_compiler(folder: Path) -> dict[str, str]:
    """The compiler without its optimizer, which takes minutes and is none of these tests' business."""
    found = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if found is None:
        return {}
    script = folder / "compiler"
    script.write_text(f'#!/bin/bash\nexec {found} "${{@/#-O3/-O0}}"\n', encoding="utf-8")
    script.chmod(0o755)
    return {"CXX": str(script)}


def expected_files() -> set[str]:
    """Everything below the package that an installed copy needs, by the name it has there."""
    kinds = {".py", ".yaml", ".cpp", ".h", ".html", ".json", ".safetensors", ".typed"}
    return {name if name.startswith("mambacompress/") else f"mambacompress/{name}"
            for name in project_files("mambacompress", "kernels", "recipes", "eval") if Path(name).suffix in kinds}


@pytest.mark.slow
@pytest.mark.xdist_group("packages")  # one worker builds
def test_the_wheel_and_the_sdist_hold_every_room(built: Path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        missing = expected_files() - set(wheel.namelist())
        assert not missing, f"the wheel lacks {sorted(missing)}"
        assert "mambacompress/kernels/__init__.py" not in wheel.namelist()
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
        if any(map(shutil.which, ("g++", "clang++", "c++"))):
            assert "mambacompress/_native.so" in wheel.namelist()
            assert next(built.glob("*.whl")).name.split("-")[2:4] == ["py3", "none"]
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        missing = expected_files() - names
        assert not missing, f"the sdist lacks {sorted(missing)}"


@pytest.mark.slow
@pytest.mark.xdist_group("packages")
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_an_installed_copy_works_away_from_the_source(built: Path, kind: str, tmp_path: Path):
    """The wheel brings its native library; the sdist installs without a compiler too."""
    run(*INSTALL, "--target", tmp_path / "site", next(built.glob(kind)), CXX=NO_COMPILER)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import mambacompress as mc\n"
            "assert mc.__file__.startswith(sys.argv[1]), mc.__file__\n"
            "from mambacompress.kernels import native, registry\n"
            "from mambacompress.recipe import load_recipe, recipe_names\n"
            "assert [load_recipe(name) for name in recipe_names()]\n"
            "import mambacompress.models.mixers, mambacompress.cli\n"
            "print('native' if native.library() else native.why_not())")
    run(sys.executable, "-c", code, str(tmp_path / "site"), cwd=tmp_path)


@pytest.mark.slow
def test_an_editable_install_sees_the_rooms(copy: Path, tmp_path: Path):
    """In an environment of its own, the dependencies borrowed from this one."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    run(*INSTALL, "--prefix", environment, "-e", copy, CXX=NO_COMPILER)
    code = ("import mambacompress.recipe as r, mambacompress.kernels.registry as k; assert r.recipe_names()\n"
            "import sys; assert r.__file__.startswith(sys.argv[1]), r.__file__")
    run(environment / "bin" / "python", "-c", code, str(copy), cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))
