"""The tree holds what it should, files import in one direction, the pages fit the code."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from config import PRESETS
from stages.stage import COLUMNS
from support.cli import FIELDS, flag_of

CORE = "driver.py", "modules.py", "dataset.py", "train.py", "predict.py", "config.py"
FOLDERS = "stages", "loading", "scores", "support"
TOP = {
    *CORE, *FOLDERS, "docs", "images", "benchmarks", "tests", ".ci", ".gitignore", "README.md",
    "requirements.txt", "requirements-dev.txt", "pyproject.toml", "LICENSE",
}  # fmt: skip
OPTIONAL = {"pretrained", "CONTRIBUTING.md", "CHANGELOG.md"}
SOURCE = [ROOT / name for name in CORE] + [
    path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
]
OTHERS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("images/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXT["README.md"]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# --- files --------------------------------------------------------------------------------


def files_of_git() -> list[str]:
    """Files that are in the repository, or would be after `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def test_the_top_folder_holds_the_core_and_a_few_folders():
    assert {name.partition("/")[0] for name in files_of_git()} - OPTIONAL == TOP


def test_no_data_or_weights_are_in_the_repository():
    bad = (".pt", ".pth", ".npy", ".npz", ".nii", ".gz", ".hdr", ".img", ".safetensors")
    names = [name for name in files_of_git() if not name.startswith("pretrained/")]
    assert names and not [name for name in names if name.endswith(bad)]
    assert not [name for name in names if (ROOT / name).stat().st_size > 1_500_000]


def lines_of(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_files_functions_and_the_readme_are_short(capsys):
    """Budgets of whole folders are printed only."""
    words = len(README.split())
    with capsys.disabled():
        core, source, tests = map(lines_of, (SOURCE[: len(CORE)], SOURCE, TESTS))
        print(
            f"\nlines (budget): core {core} (2,300), source {source} (6,800), tests {tests} "
            f"(6,500); words of the README: {words} (2,500)"
        )
    assert [short(path) for path in SOURCE if lines_of([path]) > 700] == []
    for path in SOURCE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{short(path)}: {node.name}"
    assert words <= 2_500


# --- imports ------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path): path for path in SOURCE}
ORDER = (
    "config", "support", "loading", "scores.metrics dataset", "modules", "stages", "train",
    "scores", "predict", "driver",
)  # fmt: skip
RANK = {name: place for place, names in enumerate(ORDER) for name in names.split()}


def rank(module: str) -> int:
    """The place of a module in ORDER; a module's own name counts before that of its folder."""
    return RANK[module if module in RANK else module.partition(".")[0]]


def imports(path: Path) -> set[str]:
    """The full names of all imported modules, also those inside functions."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}
    return found


@pytest.mark.parametrize("path", SOURCE, ids=short)
def test_a_file_imports_only_what_comes_before_it(path):
    mine = module_of(path)
    for other in imports(path) & set(MODULES):
        assert rank(other) <= rank(mine), f"{mine} imports {other}"


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


FORBIDDEN = {
    "pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml",  # run code of files
    "urllib", "requests", "http", "ftplib", "smtplib", "socketserver", "ssl", "asyncio",
}  # fmt: skip


@pytest.mark.parametrize("path", [*SOURCE, *OTHERS], ids=short)
def test_nothing_unsafe_is_called(path):
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), path
        # imread returns half a JPEG without an error, and fails on some names.
        assert name not in ("cv2.imread", "cv2.imwrite", "socket.socket"), path
        assert not name.startswith(("torch.hub", "nilearn.datasets.fetch")), path
        assert given.get("shell", "False") == "False", path
        assert name != "torch.load" or given.get("weights_only") == "True", path
        assert "allow_pickle" not in given, path
    assert not {module.partition(".")[0] for module in imports(path)} & FORBIDDEN, path


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert list(tmp_path.iterdir()) == []


# What may stand outside of `Config`: purposes of random numbers, sizes that the architecture or
# a file format fixes, and what changes no result.
CONSTANTS = {
    "WEIGHTS", "ORDER", "CROP", "REVIVE", "NOISE", "JITTER", "START", "MONITOR", "DENOISE",
    "SHARPEN", "SAMPLE", "GRAIN", "MAP", "PIXELS", "STEP", "LEAST", "LEVEL_FEATURES",
    "PLACE_FEATURES", "DRAW_BATCH", "CHECKPOINT_EVERY_S", "MIN_SLICES",
}  # fmt: skip


def test_training_has_no_constants_outside_the_configuration():
    found = set()
    for path in (ROOT / "modules.py", ROOT / "train.py", *(ROOT / "stages").glob("*.py")):
        for node in tree(path).body:
            parts = list(ast.walk(node)) if isinstance(node, ast.Assign) else []
            values = [part.value for part in parts if isinstance(part, ast.Constant)]
            if any(isinstance(value, int | float) for value in values):
                found |= {part.id for part in parts if isinstance(part, ast.Name)}
    assert {name for name in found if name.isupper()} - CONSTANTS == set()


# --- pages --------------------------------------------------------------------------------

# Of Slurm, torchrun and pip.
FOREIGN = {
    "--array", "--requeue", "--signal", "--gres", "--mem", "--time", "--nodes", "--ntasks",
    "--nproc", "--standalone", "--upgrade",
}  # fmt: skip


def known_flags() -> set[str]:
    """All flags of `Config` and of every `add_argument` in the repository."""
    code = "".join(path.read_text(encoding="utf-8") for path in [*SOURCE, *OTHERS])
    known = {flag_of(f) for f in FIELDS.values() if f.metadata["flag"]} | {"--help"} | FOREIGN
    return known | set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', code))


@pytest.mark.parametrize("page", TEXT)
def test_every_flag_and_field_on_a_page_exists(page):
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT[page])) <= known_flags()
    assert set(re.findall(r"--set (\w+)=", TEXT[page])) <= set(FIELDS)


def test_the_file_map_names_every_source_file_and_no_other():
    names = {path.name for path in SOURCE if path.name != "__init__.py"}
    file_map = README.partition("## File map")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(?:\w+/)*(\w+\.py)`", file_map))
    assert names <= named <= names | {path.name for path in OTHERS}


def test_presets_and_columns_of_the_log_are_explained():
    presets = README + TEXT["docs/quality.md"]
    assert [name for name in PRESETS if f"`{name}`" not in presets] == []
    assert [name for name in COLUMNS if f"`{name}`" not in TEXT["docs/faults.md"]] == []


@pytest.mark.parametrize("page", TEXT)
def test_local_links_and_pictures_exist(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXT[page]):
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), target
        if heading:
            lines = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            assert heading in map(anchor, lines), heading


def anchor(heading: str) -> str:
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_continuous_integration_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements-dev.txt && pytest"
    assert command in README and f'bash -c "{command}"' in (ROOT / ".ci/run").read_text()
