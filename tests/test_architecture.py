"""Who may import whom: read from the sources, nothing is imported."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "monai"}
PROJECT = {"weakmedsam", "data_modules", "benchmarks", "tests"}
CONTRACTS = "weakmedsam.contracts"
FILES_WRITER = "weakmedsam.files"
NOTES = "weakmedsam.notes"
SETS = "data_modules"
MODELS = {"weakmedsam.classify", "weakmedsam.segment"}
TORCH_FREE_DATA = [
    *("store", "splits", "cases", "volumes", "frames", "index", "prepare", "phantom_drawing", "new_scans"),
    *("nifti", "nifti_files", "sources", "tables", "case_tables", "wholeness"),
]

# PAM: formulas, then what puts them together.
PAM: dict[str, tuple[str, ...]] = {
    "affinity": ("cam",),
    "voting": (),
    "prompts": ("cam", "affinity"),
    "volume_walk": ("affinity",),
    "refinement": ("affinity", "prompts", "volume_walk", "voting"),
    "answers": ("affinity", "prompts", "refinement", "backbones"),
    "erasing": ("cam", "answers", "pseudo_labels"),
    "refine": (
        *("cam", "affinity", "voting", "prompts", "volume_walk", "erasing"),
        *("refinement", "answers", "pseudo_labels", "backbones"),
    ),
}

# Files -> (what of the project they may import, what else they must not); the first pattern that fits counts.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "src/weakmedsam/contracts.py": (set(), HEAVY),
    "src/weakmedsam/files.py": ({CONTRACTS}, HEAVY),
    "src/weakmedsam/yaml_files.py": ({CONTRACTS}, HEAVY),
    "src/weakmedsam/notes.py": ({CONTRACTS, FILES_WRITER, "weakmedsam.yaml_files"}, HEAVY),
    "src/weakmedsam/marks.py": ({CONTRACTS}, HEAVY),
    **{
        f"src/weakmedsam/{name}.py": ({"weakmedsam"}, HEAVY)
        for name in ("results", "resuming", "sweep_run", "sweep_local")
    },
    "src/weakmedsam/pseudo_labels.py": (
        {CONTRACTS, FILES_WRITER, "weakmedsam.cam", "weakmedsam.affinity"},
        {"lightning"},
    ),
    **{
        f"src/weakmedsam/{name}.py": (
            {CONTRACTS, *(f"weakmedsam.{other}" for other in others)},
            {"lightning"},
        )
        for name, others in PAM.items()
    },
    **{
        f"src/weakmedsam/{formula}.py": ({CONTRACTS}, {"lightning"})
        for formula in ("cam", "local", "clustering", "metrics", "frames")
    },
    "src/weakmedsam/cluster_number.py": ({CONTRACTS, "weakmedsam.clustering"}, {"lightning"}),
    "src/weakmedsam/subclasses.py": (
        {CONTRACTS, "weakmedsam.clustering", "weakmedsam.cluster_number"},
        {"lightning"},
    ),
    "src/weakmedsam/scores.py": ({CONTRACTS, FILES_WRITER, "weakmedsam.metrics"}, {"lightning"}),
    **{
        f"src/weakmedsam/backbones/{name}.py": ({CONTRACTS, FILES_WRITER, "weakmedsam.backbones"}, HEAVY)
        for name in ("checkpoints", "fetching", "transfer")  # `make weights` starts without torch
    },
    "src/weakmedsam/backbones/*": ({CONTRACTS, "weakmedsam.backbones"}, {"lightning"}),
    **{
        f"src/weakmedsam/{name}.py": ({"weakmedsam", SETS}, HEAVY)
        for name in (
            *("pipeline", "predict", "run_network", "stages", "rounds", "options", "inputs"),
            *("refusals", "messages"),
        )
    },
    "src/weakmedsam/report*.py": ({"weakmedsam", SETS}, HEAVY),
    "src/weakmedsam/callbacks/*": ({"weakmedsam"}, set()),
    "src/weakmedsam/*": ({"weakmedsam", SETS}, set()),
    **{
        f"data_modules/{name}.py": ({CONTRACTS, FILES_WRITER, NOTES, SETS}, HEAVY) for name in TORCH_FREE_DATA
    },
    "data_modules/*": ({CONTRACTS, FILES_WRITER, SETS}, set()),
}


def imports(source: str, while_loading: bool) -> set[str]:
    """Modules a source imports; ``while_loading`` leaves out functions and TYPE_CHECKING blocks."""

    def walk(node: ast.AST) -> set[str]:
        if while_loading and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return set()
        if while_loading and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return set().union(*map(walk, node.orelse))
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # `from package import module` names a module; `from module import name` does no harm so.
            return {f"{node.module}.{alias.name}" for alias in node.names}
        return set().union(*map(walk, ast.iter_child_nodes(node)))

    return walk(ast.parse(source))


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(path: str, source: str) -> list[str]:
    """What a file imports against the rules."""
    allowed, forbidden = next(rule for pattern, rule in RULES.items() if fnmatch(path, pattern))
    everything, loading = imports(source, while_loading=False), imports(source, while_loading=True)
    found = {name for name in everything if within(name, PROJECT) and not within(name, allowed)}
    found |= {name for name in loading if within(name, forbidden)}
    if path != "src/weakmedsam/cli.py" and any(within(name, MODELS) for name in everything):
        found |= {name for name in everything if within(name, {SETS})}
    return sorted(found)


FILES = sorted(
    str(p.relative_to(ROOT)) for room in ("src", "data_modules") for p in (ROOT / room).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES)
def test_imports_keep_to_the_rooms(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("src/weakmedsam/contracts.py", "import torch"),
        ("src/weakmedsam/contracts.py", "if TYPE_CHECKING:\n    from weakmedsam.cam import x"),
        ("src/weakmedsam/files.py", "from weakmedsam.stages import STAGES"),
        ("src/weakmedsam/refine.py", "from lightning import LightningModule"),
        ("src/weakmedsam/refine.py", "from weakmedsam.classify import Activation"),
        ("src/weakmedsam/callbacks/mine.py", "from data_modules.base import SliceDataModule"),
        ("src/weakmedsam/cam.py", "from lightning import Trainer"),
        ("src/weakmedsam/affinity.py", "from weakmedsam import pseudo_labels"),
        ("src/weakmedsam/metrics.py", "def f():\n    from data_modules.store import Entry"),
        ("src/weakmedsam/scores.py", "from weakmedsam import segment"),
        ("src/weakmedsam/backbones/pocket.py", "import weakmedsam.classify"),
        ("src/weakmedsam/backbones/checkpoints.py", "import torch"),
        ("src/weakmedsam/pipeline.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
        ("src/weakmedsam/report.py", "import torch"),
        ("src/weakmedsam/predict.py", "import data_modules\nfrom weakmedsam import classify"),
        ("data_modules/store.py", "class A:\n    import lightning"),
        ("data_modules/brats.py", "from weakmedsam.cam import compute_cam"),
        ("data_modules/base.py", "from tests import test_base"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert violations(path, source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("src/weakmedsam/contracts.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("src/weakmedsam/pseudo_labels.py", "from weakmedsam.affinity import random_walk\nimport torch"),
        ("src/weakmedsam/refine.py", "from weakmedsam.backbones.base import Backbone\nimport torch"),
        ("src/weakmedsam/pipeline.py", "def run():\n    import torch"),
        ("src/weakmedsam/cli.py", "from data_modules import base\nfrom weakmedsam import classify"),
        ("data_modules/base.py", "import lightning\nfrom weakmedsam.contracts import SliceBatch"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
