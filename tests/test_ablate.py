"""The table of mappings: its orders are orders, and the README shows what was measured."""

from pathlib import Path

import ablate
import torch

from config import Config
from modules import CodeMap

ROOT = Path(__file__).parent.parent


def some_codes():
    draw = torch.Generator().manual_seed(0)
    codebook, counts = torch.randn(60, 8, generator=draw), torch.arange(60) * 10
    return CodeMap.fit(codebook, counts, "pc1", 1), codebook, counts


def length(used, codebook):
    return codebook[used].diff(dim=0).norm(dim=1).sum().item()


def test_the_salesman_goes_to_every_used_code_on_a_shorter_way():
    fitted, codebook, counts = some_codes()
    used, points = ablate.salesman_order(fitted, codebook, counts)
    assert sorted(used.tolist()) == sorted(fitted.used.tolist()) == list(range(1, 60))
    assert length(used, codebook) < 0.8 * length(fitted.used, codebook)
    maps = torch.arange(1, 60)[None, None]
    code_map = CodeMap(used, points, 60)
    assert torch.equal(code_map.decode(code_map.encode(maps)), maps)


def test_every_row_is_a_valid_configuration():
    for _, changes in ablate.ROWS.values():
        Config(**changes)


def test_the_readme_shows_the_table_of_the_csv():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- ablation -->")[1].split("<!-- /ablation -->")[0]
    assert shown.strip() == ablate.table()
