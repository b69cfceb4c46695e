"""Chains the stages of a run: ``python -m weakmedsam.pipeline train --dataset phantom``.

Every stage is a LightningCLI command of its own; this file decides which are out of date and where an
interrupted one continues. It imports neither torch nor Lightning, so a run that is up to date says so at
once.

A stage's folder holds ``settings.json`` from its start and ``stage.json`` from its end. It is up to date
when both its settings and the stages before it are those it was made with; interrupted when only the
first is there. Settings are compared as parsed values: a comment in a YAML changes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from weakmedsam.contracts import ConfigError, WeakMedSAMError
from weakmedsam.files import write_whole

EXPERIMENTS = Path("experiments")

console = Console(highlight=False)


class Request(NamedTuple):
    """What the user asked for.

    Attributes:
        dataset: of ``experiments/data/<dataset>.yaml``.
        experiment: name of the run.
        backbone: of ``experiments/backbone/<backbone>.yaml``.
        data_dir: folder of the scans, None = the YAML's.
        runs: folder of all runs.
        options: further command-line options, (key, values) in order.
    """

    dataset: str
    experiment: str
    backbone: str
    data_dir: str | None
    runs: Path
    options: list[tuple[str, list[str]]]

    @property
    def folder(self) -> Path:
        """Everything of the run lies here."""
        return self.runs / self.dataset / self.experiment


class Stage(NamedTuple):
    """One stage of the chain.

    Attributes:
        name: of its folder.
        title: what the terminal says it does.
        after: the stages whose results it reads.
        configs: YAML files, merged left to right.
        takes: option groups (``--<group>.…``) that concern it.
        command: the argument lists to run, given the request and the common arguments.
    """

    name: str
    title: str
    after: tuple[str, ...]
    configs: Callable[[Request], list[Path]]
    takes: tuple[str, ...]
    command: Callable[[Request, list[str]], list[list[str]]]


def _classify_configs(request: Request) -> list[Path]:
    return [
        EXPERIMENTS / "classify.yaml",
        *_data_config(request),
        EXPERIMENTS / f"backbone/{request.backbone}.yaml",
    ]


def _segment_configs(request: Request) -> list[Path]:
    return [EXPERIMENTS / "segment.yaml", *_data_config(request)]


def _data_config(request: Request) -> list[Path]:
    return [EXPERIMENTS / f"data/{request.dataset}.yaml"]


def _resume(folder: Path) -> list[str]:
    last = folder / "checkpoints" / "last.ckpt"
    return ["--ckpt_path", str(last)] if last.is_file() else []


def _root(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def _prepare(request: Request, common: list[str]) -> list[list[str]]:
    return [["prepare", *common, "--summary", str(request.folder / "prepare/data.json")]]


def _classify(request: Request, common: list[str]) -> list[list[str]]:
    folder = request.folder / "classify"
    return [["fit", *common, *_root(folder), *_resume(folder)]]


def _pseudo_labels(request: Request, common: list[str]) -> list[list[str]]:
    best = request.folder / "classify/checkpoints/best.ckpt"
    return [["predict", *common, *_root(request.folder / "pseudo_labels"), "--ckpt_path", str(best)]]


def _segment(request: Request, common: list[str]) -> list[list[str]]:
    folder = request.folder / "segment"
    pseudo = [
        "--data.supervision",
        "pseudo",
        "--data.pseudo_labels_dir",
        str(request.folder / "pseudo_labels"),
    ]
    return [["fit", *common, *pseudo, *_root(folder), *_resume(folder)]]


def _ceiling(request: Request, common: list[str]) -> list[list[str]]:
    folder = request.folder / "ceiling"
    common = [*common, "--data.supervision", "expert"]
    best = folder / "checkpoints/best.ckpt"
    return [
        ["fit", *common, *_root(folder), *_resume(folder)],
        ["test", *common, *_root(folder / "test"), "--ckpt_path", str(best)],
    ]


def _test_maps(request: Request, common: list[str]) -> list[list[str]]:
    best = request.folder / "classify/checkpoints/best.ckpt"
    return [["test", *common, *_root(request.folder / "test_maps"), "--ckpt_path", str(best)]]


def _test(request: Request, common: list[str]) -> list[list[str]]:
    best = request.folder / "segment/checkpoints/best.ckpt"
    return [["test", *common, *_root(request.folder / "test"), "--ckpt_path", str(best)]]


def _pseudo_configs(request: Request) -> list[Path]:
    first, *rest = _classify_configs(request)
    return [first, EXPERIMENTS / "pseudo_labels.yaml", *rest]


_ALL = ("data", "trainer", "seed_everything")
_MODEL = (*_ALL, "model")
# fmt: off
STAGES = (
    Stage("prepare", "turn volumes into a slice store", (), _data_config, ("data",), _prepare),
    Stage("classify", "train the classification network (SCE)", ("prepare",), _classify_configs, _MODEL, _classify),
    Stage("pseudo_labels", "make pseudo-labels (PAM)", ("classify",), _pseudo_configs, _MODEL, _pseudo_labels),
    Stage("segment", "train the segmentation network", ("pseudo_labels",), _segment_configs, _ALL, _segment),
    Stage("test_maps", "score activation maps on test cases", ("classify",), _classify_configs, _MODEL, _test_maps),
    Stage("test", "score the segmentation network on test cases", ("segment",), _segment_configs, _ALL, _test),
    Stage("ceiling", "train and score the network on EXPERT MASKS", ("prepare",), _segment_configs, _ALL, _ceiling),
)
# fmt: on
"""In order. ``model`` options concern the classification network; the segmentation network's are given
as ``--segment.model.…``, and so is any option meant for one stage only."""

TARGETS = {
    "prepare": ("prepare",),
    "classify": ("prepare", "classify"),
    "pseudo-labels": ("prepare", "classify", "pseudo_labels"),
    "segment": ("prepare", "classify", "pseudo_labels", "segment"),
    "evaluate": ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test"),
    "report": (),
    "ceiling": ("prepare", "ceiling"),
    "train": ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test"),
}


def parse_options(words: list[str]) -> list[tuple[str, list[str]]]:
    """``--a.b 1 --c=2 --flag`` -> [("a.b", ["1"]), ("c", ["2"]), ("flag", [])].

    Raises:
        ConfigError: a value without an option before it.
    """
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            options.append((key, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise ConfigError(f"ARGS: {word!r} is not an option; options look like --model.sub_classes 4")
    return options


def options_for(stage: Stage, options: list[tuple[str, list[str]]]) -> list[str]:
    """The options that concern a stage, as command-line words.

    Raises:
        ConfigError: an option that concerns no stage.
    """
    words = []
    names = {other.name for other in STAGES}
    # A test follows the settings of the network it tests.
    leader = {"test": "segment", "ceiling": "segment", "test_maps": "classify", "pseudo_labels": "classify"}
    own = {stage.name, leader.get(stage.name, "")}
    known = names | {group for other in STAGES for group in other.takes}
    for key, values in options:
        first, _, rest = key.partition(".")
        if first not in known:
            raise ConfigError(
                f"ARGS: --{key} concerns no stage; options begin with {', '.join(sorted(known))}"
            )
        chosen = rest if first in own else key if first in stage.takes else None
        if chosen is not None and not (stage.name == "prepare" and not chosen.startswith("data.")):
            words += [f"--{chosen}", *values]
    return words


def wanted_settings(stage: Stage, request: Request) -> dict[str, Any]:
    """All that decides a stage's result, as plain values.

    Raises:
        ConfigError: a YAML file that is not there; the message lists those that are.
    """
    merged = {}
    for path in stage.configs(request):
        if not path.is_file():
            known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
            raise ConfigError(f"{path} does not exist; there are: {known}")
        merged[str(path)] = yaml.safe_load(path.read_text())
    return {"configs": merged, "options": options_for(stage, request.options), "data_dir": request.data_dir}


def run_stage(stage: Stage, request: Request, number: str) -> None:
    """Skip, continue or start one stage.

    Raises:
        ConfigError: see ``wanted_settings``.
        SystemExit: the stage's command failed; its own message has been printed.
    """
    folder = request.folder / stage.name
    wanted = wanted_settings(stage, request) | {"after": _stamps(stage, request)}
    head = f"[bold]\\[{number}] {stage.name}[/bold]"
    done = _read(folder / "stage.json")
    if done is not None and done["settings"] == wanted and _inputs(stage, request) == done.get("inputs"):
        console.print(f"{head}: up to date")
        return
    begun = _read(folder / "settings.json")
    if begun is not None and (begun != wanted or done is not None) and stage.name != "prepare":
        _set_aside(folder, begun, wanted)
        begun = None
    console.print(f"{head}: {stage.title}{' (continued)' if begun else ''}")
    _write(folder / "settings.json", wanted)
    common = [word for path in stage.configs(request) for word in ("--config", str(path))]
    if request.data_dir is not None:
        common += ["--data.data_dir", request.data_dir]
    started, spent = time.monotonic(), (_read(folder / "clock.json") or 0.0) if begun else 0.0
    commands = stage.command(request, [*common, *options_for(stage, request.options)])
    for arguments in commands:
        code = subprocess.run([sys.executable, "-m", "weakmedsam", *arguments], check=False).returncode
        _write(folder / "clock.json", spent + time.monotonic() - started)
        if code:
            console.print(f"{head} stopped. The same command continues where it was.")
            raise SystemExit(code)
    stamp = {
        "stage": stage.name,
        "made": time.time_ns(),
        "settings": wanted,
        "inputs": _inputs(stage, request),
        "command": " && ".join(" ".join(["python -m weakmedsam", *arguments]) for arguments in commands),
        "seconds": round(spent + time.monotonic() - started, 1),
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **(_read(folder / "provenance.json") or {}),
    }
    _write(folder / "stage.json", stamp)


def _stamps(stage: Stage, request: Request) -> dict[str, int | None]:
    """When the stages it reads were made: made again, they put this one out of date."""
    stamps = {name: _read(request.folder / name / "stage.json") for name in stage.after}
    return {name: stamp["made"] if stamp else None for name, stamp in stamps.items()}


def _inputs(stage: Stage, request: Request) -> str | None:
    """For ``prepare``: a digest of the scans' names, sizes and times, and whether the store is there."""
    summary = _read(request.folder / "prepare/data.json")
    if stage.name != "prepare" or summary is None:
        return None
    digest = hashlib.sha256(str(Path(summary["store"], "index.json").exists()).encode())
    for path in sorted(Path(summary["data_dir"]).rglob("*.nii*")):
        found = path.stat()
        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def _set_aside(folder: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Keep a result of other settings under another name, and say what differs."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(kept)
    changes = list(_differences(begun, wanted))[:5]
    what = "; ".join(changes) or "it was made by an earlier state of the stages before it"
    console.print(
        f"  settings of {folder.name} have changed ({what}): the earlier result is kept as {kept.name}"
    )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            short = name if name.endswith(".yaml") or not key.endswith(".yaml") else f" {name}"
            yield from _differences(old.get(name), new.get(name), f"{key}.{short}" if key and name else name)
    elif old != new and not key.startswith("after"):
        yield f"{key.removeprefix('configs.')}: {old} -> {new}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(path: Path, content: object) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One pipeline a run; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder} is being worked on by another process; wait for it or choose another EXPERIMENT"
            ) from error
        yield


def run(target: str, request: Request) -> None:
    """Bring a target up to date, stage by stage; ``train`` and ``report`` end with the report.

    Raises:
        WeakMedSAMError: a setting or file that is wrong.
    """
    names = TARGETS[target]
    chosen = [stage for stage in STAGES if stage.name in names]
    with _alone(request.folder):
        for i, stage in enumerate(chosen, start=1):
            run_stage(stage, request, f"{i}/{len(chosen)}")
        if target in ("train", "report"):
            from weakmedsam.report import summary_table, write_report

            write_report(request.folder)
            summary_table(request.folder)


def main(words: list[str] | None = None) -> None:
    """Parse the command line and run the target."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m weakmedsam.pipeline", description="Run the stages of an experiment."
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args(words[:split])
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    try:
        options = parse_options(words[split + 1 :])
        run(
            args.target,
            Request(args.dataset, args.experiment, args.backbone, args.data_dir, args.runs, options),
        )
    except WeakMedSAMError as error:
        sys.exit(f"\nweakmedsam: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped. The same command continues where it was.")


if __name__ == "__main__":
    main()
