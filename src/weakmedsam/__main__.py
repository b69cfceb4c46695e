"""The command line: ``weakmedsam COMMAND ...``, or ``python -m weakmedsam COMMAND ...``.

A command's module is imported when it is asked for: those that only look start at once, and processes that prepare
volumes, which import this file, need no torch.
"""

from __future__ import annotations

import importlib
import sys

from weakmedsam.system.fast_import import interruptible, keep_freed_memory, many_imports, wait_asleep

PIPELINE = "weakmedsam.run.pipeline"
COMMANDS = {
    "init": ("weakmedsam.run.init", "look at a folder of scans and write a commented YAML for it"),
    "check": ("weakmedsam.run.check", "look at a data set before training (with --config: of a YAML anywhere)"),
    "train": (PIPELINE, "run all stages and write the report; continues where it stopped"),
    "prepare": (PIPELINE, "turn the scans into a slice store (with --config: LightningCLI's data alone)"),
    "classify": (PIPELINE, "train the classification network (SCE)"),
    "pseudo-labels": (PIPELINE, "make pseudo-labels (PAM)"),
    "features": (PIPELINE, "store what PAM starts from, for sweeps"),
    "segment": (PIPELINE, "train the segmentation network on the pseudo-labels"),
    "evaluate": (PIPELINE, "score the networks on the test cases"),
    "upper-bound": (PIPELINE, "train and score the fully supervised upper bound"),
    "report": (PIPELINE, "write a run's report.html"),
    "status": ("weakmedsam.run.status", "show which stages of a run are done, and why others are not"),
    "compare": ("weakmedsam.report.compare_cli", "write one page about several runs"),
    "review": ("weakmedsam.review.cli", "see and correct a run's pseudo-labels in the browser"),
    "predict": ("weakmedsam.run.predict", "segment unlabelled scans (with --config: LightningCLI's predict)"),
    "export": ("weakmedsam.inference.export", "write the segmentation network of a run as ONNX or torch.export"),
    "sweep": ("weakmedsam.sweep.cli", "sweep over settings"),
    "study": ("weakmedsam.study.cli", "run data sets, variants and seeds, and write one page about them"),
    "weights": ("weakmedsam.backbones.weights", "find or fetch the official weights of backbones"),
    "fit": ("", "LightningCLI: train a module with --config files"),
    "validate": ("", "LightningCLI: one pass over the validation cases"),
    "test": ("", "LightningCLI: one pass over the test cases"),
}
"""Name -> (module with its ``main``, what it does); without a module LightningCLI runs it."""


def main(words: list[str] | None = None) -> None:
    """Run the command that the first word names.

    Args:
        words: of the command line, behind the program's name; this process's by default.

    Raises:
        SystemExit: there is no such command; or with the status of the one that has run.
    """
    name, *words = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: weakmedsam COMMAND [OPTION ...]; weakmedsam COMMAND --help lists its options\n")
        print("\n".join(f"  {command:<14} {said}" for command, (_, said) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        sys.exit(f"weakmedsam: there is no command {name!r}; there are: {', '.join(COMMANDS)}")
    module = COMMANDS[name][0]
    own = words[: words.index("--")] if "--" in words else words
    if any(word.split("=")[0] == "--config" for word in own):
        module = ""
    with interruptible():
        if module:
            found = importlib.import_module(module)
            sys.exit(found.main([name, *words] if module == PIPELINE else words))
        wait_asleep()
        keep_freed_memory()
        with many_imports():
            from weakmedsam.cli import main as run_lightning  # a second and more: torch

        run_lightning([name, *words])


if __name__ == "__main__":
    main()
