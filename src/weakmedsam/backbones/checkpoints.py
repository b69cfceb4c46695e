"""Official checkpoints: found, fetched, verified, read; ``python -m weakmedsam.backbones.checkpoints NAME``.

Where the sizes and hashes are published is in ``docs/weights.md``. torch is imported only to read
weights, so that fetching them starts fast.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakmedsam.backbones.fetching import Published, obtain
from weakmedsam.backbones.transfer import PATIENCE, Patience
from weakmedsam.errors import CheckpointError, ConfigError, WeakMedSAMError

if TYPE_CHECKING:
    from torch import Tensor

CACHE = "WEAKMEDSAM_CACHE"
"""Environment variable: the folder that checkpoints are kept in."""

MIRROR = "WEAKMEDSAM_WEIGHTS_URL"
"""Environment variable: address of a folder to fetch the files from instead of the official ones."""

_SAM = "https://dl.fbaipublicfiles.com/segment_anything"
# A commit rather than a branch: what lies there cannot change.
_EFFICIENT_SAM = (
    "https://raw.githubusercontent.com/yformer/EfficientSAM/d525f622e6f640acf5a0fc37c7ca1f243da5bde0/weights"
)

_TORCHVISION = "https://download.pytorch.org/models"

# fmt: off
KNOWN = {
    "sam_vit_b": Published(
        "sam_vit_b_01ec64.pth", 375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", _SAM),
    "sam_vit_l": Published(
        "sam_vit_l_0b3195.pth", 1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", _SAM),
    "sam_vit_h": Published(
        "sam_vit_h_4b8939.pth", 2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", _SAM),
    "efficient_sam_vitt": Published(
        "efficient_sam_vitt.pt", 40_982_470,
        "dff858b19600a46461cbb7de98f796b23a7a888d9f5e34c0b033f7d6eb9e4e6a", _EFFICIENT_SAM),
    "efficient_sam_vits": Published(
        "efficient_sam_vits.pt", 105_742_022,
        "339376940b92351ae26dd1162e2305a1cc6f5cde735105e91286251abd9a6b65", _EFFICIENT_SAM,
        archive="efficient_sam_vits.pt.zip"),
    "resnet18": Published(
        "resnet18-f37072fd.pth", 46_830_571,
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec", _TORCHVISION),
}
# fmt: on
"""Official checkpoints by name."""

REPLACED = "replaced"
"""In place of a backbone's ``weights``: a checkpoint of the whole network follows, so none are looked for."""

WRAPPERS = ("model", "state_dict")
"""Keys under which training programs put a network's weights."""

PREFIXES = ("model.", "module.", "_orig_mod.")
"""What they put before every key: a trainer, ``DataParallel``, ``torch.compile``."""

BACKBONES = {
    "pocket": None,
    "samus": "sam_vit_b",
    "sam_vit_b": "sam_vit_b",
    "sam_vit_l": "sam_vit_l",
    "sam_vit_h": "sam_vit_h",
    "efficient_sam_ti": "efficient_sam_vitt",
    "efficient_sam_s": "efficient_sam_vits",
}
"""The checkpoint that ``experiments/backbone/<name>.yaml`` starts from; None: nothing to fetch."""


def find(name: str, mirror: str | None = None, patience: Patience = PATIENCE) -> Path:
    """The verified file of an official checkpoint: in the cache, else fetched.

    Args:
        name: one of ``KNOWN``.
        mirror: address of a folder that holds the files under their official names; by default
            ``WEAKMEDSAM_WEIGHTS_URL``, else the official address.
        patience: timeout and retries.

    Raises:
        ConfigError: an unknown name, or a mirror that is no http address.
        CheckpointError: it can be had neither from the cache nor from the network; says which file to
            put where.
    """
    if name not in KNOWN:
        raise ConfigError(f"{name!r} is no known checkpoint; there are {', '.join(KNOWN)}")
    mirror = os.environ.get(MIRROR, "") if mirror is None else mirror
    if mirror and not mirror.startswith(("http://", "https://")):
        raise ConfigError(
            f"{MIRROR} is {mirror!r}, which is no http address; for a folder on this machine set {CACHE} to it"
        )
    return obtain(KNOWN[name], cache_folder(), mirror, patience)


def cache_folder() -> Path:
    """``WEAKMEDSAM_CACHE``, else ``XDG_CACHE_HOME/weakmedsam``, else ``~/.cache/weakmedsam``."""
    if own := os.environ.get(CACHE):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(shared or "~/.cache").expanduser() / "weakmedsam"


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
    """What a checkpoint holds, tensors on the CPU; never runs code from it.

    Raises:
        CheckpointError: not a checkpoint, damaged, or with code or other objects in it.
    """
    import torch
    from safetensors.torch import load_file

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
    # Whatever a damaged file makes the readers raise: it is the file's fault.
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
    from torch import Tensor

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
    """Refuse weights of another architecture, size or class count, in one message.

    Args:
        own: the model's tensors by key.
        given: the checkpoint's.
        source: name of the checkpoint.
        model: name of the model.
        holds: what the checkpoint is recognised as.
        key: the setting that names the checkpoint, for the message.

    Raises:
        CheckpointError: keys or shapes differ; names both, and the first differing keys with both shapes.
    """
    lines = []
    for name in dict.fromkeys([*own, *given]):
        needed, found = (
            f"{tuple(side[name].shape)}" if name in side else "not there" for side in (own, given)
        )
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch checkpoints by the name of backbone or checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weakmedsam.backbones.checkpoints",
        description="Find or fetch the official weights of backbones, verified.",
        epilog=f"Kept in {cache_folder()} ({CACHE}); {MIRROR} names a mirror. See docs/weights.md.",
    )
    known = list(dict.fromkeys([*BACKBONES, *KNOWN]))
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(known))
    for name in parser.parse_args(arguments).names:
        checkpoint = BACKBONES.get(name, name)
        try:
            if checkpoint is None:
                print(f"{name}: its weights are in the package; nothing to fetch")
            else:
                print(f"{name}: {find(checkpoint)}")
        except WeakMedSAMError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
