"""Who may import whom: read from the sources, nothing is imported."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "monai"}
PROJECT = {"weakmedsam", "data_modules", "benchmarks", "tests"}
CONTRACTS = "weakmedsam.contracts"
FILES_WRITER = "weakmedsam.system.atomic_io"
NOTES = "weakmedsam.system.json_files"
SETS = "data_modules"
MODELS = {"weakmedsam.classification.module", "weakmedsam.segmentation.module"}
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
    "src/weakmedsam/system/atomic_io.py": ({CONTRACTS}, HEAVY),
    "src/weakmedsam/system/yaml_files.py": ({CONTRACTS}, HEAVY),
    "src/weakmedsam/system/json_files.py": ({CONTRACTS, FILES_WRITER, "weakmedsam.system.yaml_files"}, HEAVY),
    "src/weakmedsam/system/fingerprints.py": ({CONTRACTS}, HEAVY),
    **{
        f"src/weakmedsam/{name}.py": ({"weakmedsam"}, HEAVY)
        for name in (
            "results",
            "resuming",
            "sweep/agent",
            "sweep/definition",
            "sweep/local_runner",
            "sweep/trials",
        )
    },
    "src/weakmedsam/pam/pseudo_label_io.py": (
        {CONTRACTS, FILES_WRITER, "weakmedsam.classification.cam", "weakmedsam.pam.affinity"},
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
    "src/weakmedsam/sce/cluster_count.py": ({CONTRACTS, "weakmedsam.sce.kmeans"}, {"lightning"}),
    "src/weakmedsam/sce/subclasses.py": (
        {CONTRACTS, "weakmedsam.sce.kmeans", "weakmedsam.sce.cluster_count"},
        {"lightning"},
    ),
    "src/weakmedsam/metrics/case_summary.py": (
        {CONTRACTS, FILES_WRITER, "weakmedsam.metrics.overlap_surface"},
        {"lightning"},
    ),
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
        ("src/weakmedsam/contracts.py", "if TYPE_CHECKING:\n    from weakmedsam.classification.cam import x"),
        ("src/weakmedsam/system/atomic_io.py", "from weakmedsam.run.stages import STAGES"),
        ("src/weakmedsam/pam/refiner.py", "from lightning import LightningModule"),
        ("src/weakmedsam/pam/refiner.py", "from weakmedsam.classification.module import Activation"),
        ("src/weakmedsam/callbacks/pam.py", "from data_modules.base import SliceDataModule"),
        ("src/weakmedsam/classification/cam.py", "from lightning import Trainer"),
        ("src/weakmedsam/pam/affinity.py", "from weakmedsam import pseudo_labels"),
        ("src/weakmedsam/metrics/overlap_surface.py", "def f():\n    from data_modules.store import Entry"),
        ("src/weakmedsam/metrics/case_summary.py", "from weakmedsam import segment"),
        ("src/weakmedsam/backbones/pocket.py", "import weakmedsam.classification.module"),
        ("src/weakmedsam/backbones/checkpoints.py", "import torch"),
        ("src/weakmedsam/run/pipeline.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
        ("src/weakmedsam/report/cli.py", "import torch"),
        ("src/weakmedsam/run/predict.py", "import data_modules\nfrom weakmedsam import classify"),
        ("data_modules/store.py", "class A:\n    import lightning"),
        ("data_modules/brats.py", "from weakmedsam.classification.cam import compute_cam"),
        ("data_modules/base.py", "from tests import test_base"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert violations(path, source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("src/weakmedsam/contracts.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        (
            "src/weakmedsam/pam/pseudo_label_io.py",
            "from weakmedsam.pam.affinity import random_walk\nimport torch",
        ),
        ("src/weakmedsam/pam/refiner.py", "from weakmedsam.backbones.base import Backbone\nimport torch"),
        ("src/weakmedsam/run/pipeline.py", "def run():\n    import torch"),
        ("src/weakmedsam/cli.py", "from data_modules import base\nfrom weakmedsam import classify"),
        ("data_modules/base.py", "import lightning\nfrom weakmedsam.contracts import SliceBatch"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
