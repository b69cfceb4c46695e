"""The stages of a run: which YAMLs, which options, which command, and what each must leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from weakmedsam.contracts import in_round
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.checkpoints import resume_options
from weakmedsam.run.clicks import LABELS, REVIEW, is_reviewed
from weakmedsam.run.request import EXPERIMENTS, PACKAGED, Request, experiment_file
from weakmedsam.system.json_files import read_object

ANOTHER_ROUND = "another_round.yaml"
"""What a later round sets otherwise."""
REFINED = "refined.yaml"
"""What PAM sets otherwise on predictions of test cases."""
THRESHOLD = "threshold.yaml"
"""What is set otherwise where their threshold is chosen."""


class Stage(NamedTuple):
    """One stage of the chain.

    Attributes:
        name: of its folder.
        title: what the terminal says it does.
        after: the stages whose results it reads.
        configs: YAML files, merged left to right.
        takes: option groups (``--<group>.…``) that concern it.
        command: the argument lists to run, given the request and the common arguments.
        results: patterns of the files in its folder that are its result: a stage that leaves none of a pattern has
            failed, one whose files are lost or damaged is re-run.
        scored: "test" or "val": there is nothing for it to do where no case of this split has an expert mask.
        trains: it trains, so that the number of processes decides its result.
    """

    name: str
    title: str
    after: tuple[str, ...]
    configs: Callable[[Request], list[Path]]
    takes: tuple[str, ...]
    command: Callable[[Request, list[str]], list[list[str]]]
    results: tuple[str, ...]
    scored: str | None = None
    trains: bool = False

    @property
    def in_place(self) -> bool:
        """Its result lies in the slice store, under a name of its own, so that nothing has to make room for it."""
        return self.name == "prepare"

    @property
    def kept(self) -> tuple[str, ...]:
        """Patterns of all that has to stay as it was written: the results, and what they were made by."""
        return (*self.results, *(("config.yaml",) if "trainer" in self.takes else ()))


def _classify_configs(request: Request) -> list[Path]:
    return [
        experiment_file("classify.yaml"),
        *_data_config(request),
        experiment_file(f"backbone/{request.backbone}.yaml"),
    ]


def _segment_configs(request: Request) -> list[Path]:
    return [experiment_file("segment.yaml"), *_data_config(request)]


def _data_config(request: Request) -> list[Path]:
    return [experiment_file(f"data/{request.dataset}.yaml")]


def _root(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def _prepare(request: Request, common: list[str]) -> list[list[str]]:
    return [["prepare", *common, "--summary", str(request.folder / "prepare/data.json")]]


def _classify(request: Request, common: list[str]) -> list[list[str]]:
    folder = request.folder / "classify"
    return [["fit", *common, *_root(folder), *resume_options(folder)]]


def _pseudo_labels(request: Request, common: list[str]) -> list[list[str]]:
    best = request.folder / "classify/checkpoints/best.ckpt"
    return [["predict", *common, *_root(request.folder / "pseudo_labels"), "--ckpt_path", str(best)]]


def _segment(request: Request, common: list[str], number: int = 1) -> list[list[str]]:
    folder = request.folder / in_round("segment", number)
    fit = ["fit", *common, *pseudo_labelled(request, number), *_root(folder), *resume_options(folder)]
    return [_replay(request), fit] if is_reviewed(request.folder) else [fit]


def _replay(request: Request) -> list[str]:
    """Writes the corrected pseudo-labels that are not written yet."""
    place = ["--dataset", request.dataset, "--experiment", request.experiment, "--runs", str(request.runs)]
    return ["review", "--replay", *place]


def pseudo_labelled(request: Request, number: int = 1) -> list[str]:
    """Options with which a segmentation network learns the run's pseudo-labels of a round, and what is corrected."""
    folder = request.folder / in_round("pseudo_labels", number)
    words = ["--data.labels.supervision", "pseudo", "--data.labels.pseudo_labels_dir", str(folder)]
    if is_reviewed(request.folder):
        words += ["--data.labels.corrected_dir", str(request.folder / REVIEW / LABELS)]
    return words


def _upper_bound(request: Request, common: list[str]) -> list[list[str]]:
    folder = request.folder / "upper_bound"
    common = [*common, "--data.labels.supervision", "expert"]
    best = folder / "checkpoints/best.ckpt"
    return [
        ["fit", *common, *_root(folder), *resume_options(folder)],
        ["test", *common, *_root(folder / "test"), "--ckpt_path", str(best)],
    ]


def _test_maps(request: Request, common: list[str]) -> list[list[str]]:
    best = request.folder / "classify/checkpoints/best.ckpt"
    return [["test", *common, *_root(request.folder / "test_maps"), "--ckpt_path", str(best)]]


def _best_segmenter(request: Request, number: int) -> str:
    return str(request.folder / in_round("segment", number) / "checkpoints/best.ckpt")


def _test(request: Request, common: list[str], number: int = 1) -> list[list[str]]:
    folder = request.folder / in_round("test", number)
    return [["test", *common, *_root(folder), "--ckpt_path", _best_segmenter(request, number)]]


def _from_network(request: Request, common: list[str], kind: str, number: int = 1, of: int = 1) -> list[list[str]]:
    """PAM from what the network of round ``of`` predicts: pseudo-labels, or the score of test cases."""
    best = request.folder / "classify/checkpoints/best.ckpt"
    start = ["--model.pam.start.checkpoint", _best_segmenter(request, of)]
    command = "predict" if kind == "pseudo_labels" else "test"
    folder = request.folder / in_round(kind, number)
    return [[command, *common, *start, *_root(folder), "--ckpt_path", str(best)]]


def _refined(request: Request, common: list[str], number: int = 1) -> list[list[str]]:
    key, chosen = "--model.pam.threshold.value", chosen_threshold(request.folder, number)
    own = [] if chosen is None or key in common else [key, str(chosen)]
    return _from_network(request, [*common, *own], "refined", number, number)


def chosen_threshold(run: Path, number: int = 1) -> float | None:
    """Threshold of refined predictions that validation cases have chosen; None where none of them has a mask.

    Args:
        run: its folder.
        number: of the round.

    Raises:
        DataError: the stage has left none.
    """
    if count_masked(run, "val") == 0:
        return None
    path = run / in_round("threshold", number) / "threshold.json"
    value = read_object(path).get("threshold")
    if not isinstance(value, float):
        raise DataError(f"{path}: holds no threshold; remove it, and the same command chooses one")
    return value


def count_masked(run: Path, split: str) -> int | None:
    """How many cases of a split have an expert mask; None where that is not known."""
    summary: Any = {}
    with contextlib.suppress(DataError):  # damaged: its stage is looked at anew
        summary = read_object(run / "prepare/data.json")
    for key in ("splits", split, "masked"):
        summary = summary.get(key) if isinstance(summary, dict) else None
    return summary if isinstance(summary, int) else None


def _refined_configs(request: Request) -> list[Path]:
    return [*_classify_configs(request), experiment_file(REFINED)]


def _threshold_configs(request: Request) -> list[Path]:
    return [*_refined_configs(request), experiment_file(THRESHOLD)]


def _labels_again_configs(request: Request) -> list[Path]:
    return [*_pseudo_configs(request), experiment_file(ANOTHER_ROUND)]


def _maps_again_configs(request: Request) -> list[Path]:
    return [*_classify_configs(request), experiment_file(ANOTHER_ROUND)]


def _pseudo_configs(request: Request) -> list[Path]:
    first, *rest = _classify_configs(request)
    return [first, experiment_file("pseudo_labels.yaml"), *rest]


def _features(request: Request, common: list[str]) -> list[list[str]]:
    best = request.folder / "classify/checkpoints/best.ckpt"
    return [["validate", *common, *_root(request.folder / "features"), "--ckpt_path", str(best)]]


def _features_configs(request: Request) -> list[Path]:
    first, *rest = _classify_configs(request)
    return [first, experiment_file("features.yaml"), *rest]


_ALL = ("data", "trainer", "seed_everything", "throughput", "preemption")
_MODEL = (*_ALL, "model")
_NETWORK = ("checkpoints/best.ckpt",)
# fmt: off
STAGES = (
    Stage("prepare", "turn volumes into a slice store", (), _data_config, ("data",), _prepare,
          ("data.json",)),
    Stage("classify", "train the classification network (SCE)", ("prepare",), _classify_configs, _MODEL, _classify,
          _NETWORK, trains=True),
    Stage("pseudo_labels", "make pseudo-labels (PAM)", ("classify",), _pseudo_configs, _MODEL, _pseudo_labels,
          ("*.safetensors", "quality.csv")),
    Stage("features", "store what PAM starts from", ("classify",), _features_configs, _MODEL, _features,
          ("*.safetensors", "features.json", "scores.json")),
    Stage("segment", "train the segmentation network", ("pseudo_labels",), _segment_configs, _ALL, _segment,
          _NETWORK, trains=True),
    Stage("test_maps", "score activation maps on test cases", ("classify",), _classify_configs, _MODEL, _test_maps,
          ("cam_cases.csv",), scored="test"),
    Stage("test", "score the segmentation network on test cases", ("segment",), _segment_configs, _ALL, _test,
          ("cases.csv", "summary.json"), scored="test"),
    Stage("threshold", "choose the threshold of refined predictions", ("classify", "segment"), _threshold_configs,
          _MODEL, partial(_from_network, kind="threshold"), ("threshold.json",), scored="val"),
    Stage("refined", "refine and score what it predicts on test cases (PAM)", ("classify", "segment", "threshold"),
          _refined_configs, _MODEL, _refined, ("cases.csv", "summary.json"), scored="test"),
    Stage("upper_bound", "train and score the network on EXPERT MASKS", ("prepare",), _segment_configs, _ALL,
          _upper_bound, (*_NETWORK, "test/cases.csv"), scored="test", trains=True),
)
# fmt: on
"""In order. ``model`` options concern the classification network; the segmentation network's are given
as ``--segment.model.…``, and so is any option meant for one stage only."""

TARGETS = {
    "prepare": ("prepare",),
    "classify": ("prepare", "classify"),
    "pseudo-labels": ("prepare", "classify", "pseudo_labels"),
    "features": ("prepare", "classify", "features"),
    "segment": ("prepare", "classify", "pseudo_labels", "segment"),
    "evaluate": ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test", "threshold", "refined"),
    "report": (),
    "upper-bound": ("prepare", "upper_bound"),
    "train": ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test", "threshold", "refined"),
}


def another_round(number: int) -> tuple[Stage, ...]:
    """The stages of a round after the first: self-training, see ``self_training.py``.

    Args:
        number: of the round, 2 or more.
    """
    labels, network, threshold = (in_round(kind, number) for kind in ("pseudo_labels", "segment", "threshold"))
    before = in_round("segment", number - 1)
    again = partial(_from_network, number=number)
    # fmt: off
    return (
        Stage(labels, f"refine what {before} predicts (PAM)", ("classify", before), _labels_again_configs, _MODEL,
              partial(again, kind="pseudo_labels", of=number - 1), ("*.safetensors", "quality.csv")),
        Stage(network, "train a segmentation network on that", (labels,), _segment_configs, _ALL,
              partial(_segment, number=number), _NETWORK, trains=True),
        Stage(in_round("test_maps", number), f"score what is refined of {before} on test cases", ("classify", before),
              _maps_again_configs, _MODEL, partial(again, kind="test_maps", of=number - 1), ("cam_cases.csv",),
              scored="test"),
        Stage(in_round("test", number), f"score {network} on test cases", (network,), _segment_configs, _ALL,
              partial(_test, number=number), ("cases.csv", "summary.json"), scored="test"),
        Stage(threshold, f"choose the threshold of what is refined of {network}", ("classify", network),
              _threshold_configs, _MODEL, partial(again, kind="threshold", of=number), ("threshold.json",),
              scored="val"),
        Stage(in_round("refined", number), f"refine and score what {network} predicts on test cases (PAM)",
              ("classify", network, threshold), _refined_configs, _MODEL, partial(_refined, number=number),
              ("cases.csv", "summary.json"), scored="test"),
    )
    # fmt: on


def chosen_stages(target: str, rounds: int) -> list[Stage]:
    """The stages that a target runs, in order.

    Args:
        target: one of ``TARGETS``.
        rounds: how often pseudo-labels are made; of ``pseudo-labels`` and ``segment`` the last round's are meant.

    Raises:
        ConfigError: no round.
    """
    if rounds < 1:
        raise ConfigError(f"ROUNDS={rounds}: there is at least one round")
    wanted = TARGETS[target]
    first = wanted if rounds == 1 or "pseudo_labels" not in wanted else (*wanted, "segment")
    chosen = [stage for stage in STAGES if stage.name in first]
    for number in range(2, rounds + 1 if "pseudo_labels" in wanted else 2):
        names = {in_round(name, number) for name in (wanted if number == rounds else first)}
        chosen += [stage for stage in another_round(number) if stage.name in names]
    return chosen


def stage_configs(stage: Stage, request: Request) -> list[Path]:
    """The YAML files of a stage, merged left to right.

    The trainer's file comes last, so that it wins; the logger's behind the stage's own, so that a stage
    that logs nothing keeps to it.

    Raises:
        ConfigError: a file that is not there; the message lists those that are.
    """
    first, *rest = stage.configs(request)
    files = [first, *rest]
    if "trainer" in stage.takes:
        logger = [experiment_file(f"logger/{request.logger}.yaml")] if request.logger else []
        trainer = [experiment_file(f"trainer/{request.trainer}.yaml")] if request.trainer else []
        files = [first, *logger, *rest, *trainer]
    for path in files:
        if not path.is_file():
            folders = path.parent, PACKAGED / path.relative_to(EXPERIMENTS).parent
            known = ", ".join(sorted({other.stem for folder in folders for other in folder.glob("*.yaml")}))
            mend = f"there are: {known}" if known else "run the command in the repository's folder"
            raise ConfigError(f"{path} does not exist; {mend}")
    return files
