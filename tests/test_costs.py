"""The cost table: its counts are right and its page is written; times are not tested."""

import json

import pytest
import torch
from torch import nn

from benchmarks import costs
from weakmedsam.backbones.pocket import Pocket


def test_attention_is_counted_in_full():
    tokens = torch.randn(1, 2, 32, 8)
    run = torch.no_grad()(lambda: nn.functional.scaled_dot_product_attention(tokens, tokens, tokens))
    # Two products of 32 x 32 x 8 for each of two heads, a multiply-add counted as two.
    assert costs.flops_of(run) == 2 * 2 * 2 * 32 * 32 * 8


def test_convolutions_are_counted_in_full():
    layer, image = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 10, 10)
    assert costs.flops_of(lambda: layer(image)) == 2 * 2 * 10 * 10 * 4 * 3 * 9


def test_a_new_yaml_is_found_at_the_size_of_its_encoder(tmp_path, monkeypatch):
    folder = tmp_path / "experiments/backbone"
    folder.mkdir(parents=True)
    for name, path, more in (("mine", "pocket.Pocket", ""), ("big", "sam.SAM", "        encode_size: 256\n")):
        (folder / f"{name}.yaml").write_text(
            f"model:\n  init_args:\n    backbone:\n      class_path: weakmedsam.backbones.{path}\n"
            f"      init_args:\n        image_size: ${{data.init_args.image_size}}\n        weights: official\n{more}"
        )
    monkeypatch.setattr(costs, "ROOT", tmp_path)
    monkeypatch.setattr(costs, "VARIANTS", {"bigger": ("big", {"encode_size": 512})})
    found = {
        name: (made.arguments["image_size"], made.arguments["weights"]) for name, made in costs.candidates().items()
    }
    assert found == {"big": (256, "none"), "mine": (128, "none"), "bigger": (512, "none")}


def test_an_unknown_backbone_lists_the_known(capsys):
    assert costs.main(["--only", "nonsense"]) == 2
    assert "error: nonsense is unknown; there are efficient_sam_s, " in capsys.readouterr().err


@pytest.mark.slow
def test_pocket_is_measured_and_written(tmp_path, capsys):
    page = tmp_path / "costs.md"
    words = ["--only", "pocket", "--size", "tiny", "--image-size", "64", "--repeats", "1", "--device", "cpu"]
    assert costs.main([*words, "--out", str(page)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["pocket"]
    model = Pocket(64, "none")
    assert found["encode"]["parameters"] == sum(p.numel() for p in model.parameters())
    model.set_trainable("published")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["encode"]["trained"] == trained
    assert found["encode"]["embedding"] == [1, 512, 32, 32]
    assert found["prompts"]["flops"] > 1e9
    # Weights, and beside them the gradients and two moments of what is trained.
    assert found["train"]["peak_mib"] > 4 * (found["encode"]["parameters"] + 3 * trained) / costs.MIB
    row = next(line for line in page.read_text().splitlines() if line.startswith("| pocket |"))
    assert row.count("|") == len(costs.COLUMNS) + 1


def test_a_backbone_that_fails_is_named_and_the_others_are_kept(tmp_path, capsys, monkeypatch):
    stage = {"seconds": 0.5, "peak_mib": 1.0, "flops": 2e9}
    good = {"encode": {**stage, "pixels": 64, "parameters": 1e6, "trained": 5e5}, "prompts": stage}
    good["train"] = stage

    def cost_of(candidate, *_):
        if "Pocket" in candidate.path:
            raise RuntimeError("out of memory")
        return good

    monkeypatch.setattr(costs, "cost_of", cost_of)
    page = tmp_path / "costs.md"
    assert costs.main(["--only", "pocket", "efficient_sam_ti", "--out", str(page)]) == 1
    assert "pocket: out of memory" in capsys.readouterr().err
    assert "| efficient_sam_ti | 64 | 1.0 | 0.5 | 2.0 | 0.500 |" in page.read_text()
    assert "pocket" not in page.read_text()
