"""Checkpoints: read without running code from them, and compared with the network that takes them."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from weakmedsam.backbones.weights import find
from weakmedsam.errors import CheckpointError

REPLACED = "replaced"
"""Value of a backbone's ``weights`` when a checkpoint of the whole network is loaded afterwards."""

WRAPPERS = ("model", "state_dict")
"""Keys under which training programs store a network's weights."""

PREFIXES = ("model.", "module.", "_orig_mod.")
"""Prefixes of every key, of a trainer, ``DataParallel`` and ``torch.compile``."""


def read_source(
    weights: str, official: str | None, key: str = "model.backbone.weights"
) -> tuple[dict[str, Tensor], str]:
    """A checkpoint's tensors and its path.

    Args:
        weights: the path of a file; not looked at where ``official`` is given.
        official: a name of ``weights.declared``, in the cache or downloaded.
        key: the setting that names it, for messages.

    Raises:
        CheckpointError: see ``weights.find`` and ``read_weights``.
    """
    path = find(official) if official else Path(weights)
    return read_weights(path, key), str(path)


def read_weights(path: Path, key: str = "model.backbone.weights") -> dict[str, Tensor]:
    """Read a checkpoint as a flat dictionary of tensors on the CPU; never runs code from it.

    Takes safetensors and what ``torch.save`` writes, told apart by content. One level of ``WRAPPERS`` is
    unwrapped, and ``PREFIXES`` before every key are taken off.

    Args:
        path: the file.
        key: the setting that names it, for messages.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or with code or other objects in it.
    """
    path = path.expanduser()
    if not path.is_file():
        raise CheckpointError(f"{key}: {path} does not exist")
    content = read_checkpoint(path)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return _flat(content, path)


def read_checkpoint(path: Path) -> Any:
    """Read a checkpoint's content, tensors on the CPU; never runs code from it.

    Raises:
        CheckpointError: not a checkpoint, damaged, or with code or other objects in it.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # The length of its header as 8 bytes, then the header; the two formats of torch.save.
    flat, packed, pickled = head[5:] == b"\0\0\0{", head.startswith(b"PK\3\4"), head.startswith(b"\x80")
    if not (flat or packed or pickled):
        raise CheckpointError(f"{path} is not a checkpoint: neither safetensors nor written by torch.save")
    try:
        if flat:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    # A damaged file makes the readers raise any type of error.
    except Exception as error:
        if not flat and (code := _code_in(path)):
            raise CheckpointError(
                f"{path} is refused: it contains code or objects ({', '.join(code[:3])}), and only weights are "
                "read. Save its state_dict() alone, as tensors, where you trust it"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error


def _code_in(path: Path) -> list[str]:
    """Functions and classes a pickle names, other than those that make tensors; nothing is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            if any("/code/" in name for name in packed.namelist()):
                return ["a TorchScript program"]
            pickles = [packed.read(name) for name in packed.namelist() if name.endswith("/data.pkl")]
    else:
        data = path.read_bytes()
        pickles = [data] if data.startswith(b"\x80") else []
    names: list[str] = []
    for data in pickles:
        stream, words = io.BytesIO(data), [""]
        try:
            for _ in range(4):  # in torch.save's older format the fourth pickle is the content
                for opcode, argument, _ in pickletools.genops(stream):
                    if isinstance(argument, str):
                        words = [*words[-1:], argument]
                    if opcode.name in ("GLOBAL", "INST"):
                        names.append(str(argument).replace(" ", "."))
                    if opcode.name == "STACK_GLOBAL":
                        names.append(".".join(words))
        except (ValueError, IndexError):
            pass  # tensors' bytes follow, or it is damaged
    return [name for name in dict.fromkeys(names) if not name.startswith(("torch.", "collections."))]


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights but a {type(content).__name__} ({str(content)[:60]})")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is not a flat dictionary of tensors: {key!r} is a {type(value).__name__}; "
                "save the model's state_dict() alone, or under 'model' or 'state_dict'"
            )
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def check_fit(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    source: str,
    model: str,
    holds: str = "another network",
    key: str = "model.backbone.weights",
) -> None:
    """Refuse weights of another architecture, size or class count.

    Args:
        own: the model's tensors by key.
        given: the checkpoint's.
        source: name of the checkpoint.
        model: name of the model.
        holds: name of the network that the checkpoint belongs to.
        key: the setting that names the checkpoint, for the message.

    Raises:
        CheckpointError: keys or shapes differ; names both, and the first differing keys with both shapes.
    """
    lines = []
    for name in dict.fromkeys([*own, *given]):
        needed, found = (f"{tuple(side[name].shape)}" if name in side else "not there" for side in (own, given))
        if needed != found:
            lines.append(f"  {name}: {model} {needed}, checkpoint {found}")
    if not lines:
        return
    missing, further = len(own.keys() - given.keys()), len(given.keys() - own.keys())
    raise CheckpointError(
        f"{key}: {source} holds {holds}, this backbone is {model}: of {len(own)} tensors {missing} are "
        f"missing and {len(lines) - missing - further} have another shape; {further} of the checkpoint's "
        f"{len(given)} are unknown. Choose the checkpoint or model.backbone.size to fit. The first that differ:\n"
        + "\n".join(lines[:4])
    )
