"""The README says what the code does, and the tree holds what it should."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import PRESETS, Config
from modules import architecture_table, make_vqvae
from stages.stage import COLUMNS

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "EXPERIMENTS.md", "benchmarks/README.md",
)}  # fmt: skip
README = PAGES["README.md"]
SCRIPTS = sorted(ROOT.glob("*.py"))


def test_the_architecture_table_is_the_one_that_the_code_prints():
    shown = README.split("<!-- architecture -->")[1].split("<!-- /architecture -->")[0]
    assert shown.strip() == architecture_table(make_vqvae(Config()))


# Of Slurm, torchrun and pip.
FOREIGN = {
    "--array", "--requeue", "--signal", "--gres", "--mem", "--time", "--nodes", "--ntasks",
    "--nproc", "--standalone", "--upgrade",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_on_a_page_exists(page):
    known = {"--" + f.name.replace("_", "-") for f in fields(Config)}
    known |= {"--n", "--stage", "--help", "--level", "--volume"} | FOREIGN
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGES[page]))
    assert shown <= known, shown - known


def test_the_readme_names_every_file_preset_and_column():
    for name in [path.name for path in SCRIPTS] + list(PRESETS) + list(COLUMNS):
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("page", PAGES)
def test_local_links_and_pictures_exist(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PAGES[page]):
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), target
        if heading:
            lines = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            assert heading in map(anchor, lines), heading


def anchor(heading: str) -> str:
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_presets_are_valid_and_differ_from_the_default():
    default = Config()
    for name, changes in PRESETS.items():
        made = Config(preset=name, **changes)
        assert all(getattr(default, k) != v for k, v in changes.items()), name
        assert Config.from_dict(made.to_dict()) == made


ORDER = [
    "config", "embedded", "decoding", "modules", "optimizers", "metrics", "figures",
    "processes", "runtime", "sources", "dataset", "train", "evaluation", "report", "sharing",
    "results", "predict", "driver",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    plain = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import)]
    return {n.module for n in nodes} | {a.name for n in plain for a in n.names}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_file_imports_only_what_stands_to_its_left(path):
    left = ORDER[: ORDER.index(path.stem)]
    assert imports(path) & set(ORDER) <= set(left)


FORBIDDEN = {
    "pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml",  # objects of files
    "urllib", "requests", "http", "ftplib", "smtplib", "socketserver", "ssl", "asyncio",
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [*SCRIPTS, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("images/*.py")],
    ids=lambda p: p.stem,
)  # fmt: skip
def test_nothing_unsafe_is_called(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), path
        # imread returns half a JPEG without a word, and fails on some names.
        assert name not in ("cv2.imread", "cv2.imwrite", "socket.socket"), path
        assert not name.startswith(("torch.hub", "nilearn.datasets.fetch")), path
        assert given.get("shell", "False") == "False", path
        assert name != "torch.load" or given.get("weights_only") == "True", path
        assert "allow_pickle" not in given, path
    assert not {module.partition(".")[0] for module in imports(path)} & FORBIDDEN, path


def test_importing_does_nothing(tmp_path):
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "" and list(tmp_path.iterdir()) == []


def test_no_data_or_weights_are_tracked():
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if name]
    assert names
    bad = (".pt", ".pth", ".npy", ".npz", ".nii", ".gz", ".hdr", ".img", ".safetensors")
    assert not [name for name in names if name.endswith(bad)]
    assert not [name for name in names if (ROOT / name).stat().st_size > 1_500_000]
