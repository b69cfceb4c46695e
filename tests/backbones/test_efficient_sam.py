import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from weakmedsam.backbones import checkpoints
from weakmedsam.backbones.efficient_sam import EfficientSAM
from weakmedsam.classification.cam import class_activation_map
from weakmedsam.errors import CheckpointError, ConfigError

DATA = Path(__file__).parents[1] / "data"
GOLDEN = load_file(DATA / "efficient_sam_small.safetensors")
STATE = {key[len("state/") :]: value for key, value in GOLDEN.items() if key.startswith("state/")}
POINTS = GOLDEN["points_xy"] + 0.5
"""Ours have pixel centres at + 0.5; upstream's raw coordinates have them at integers."""


def tiny(image_size=256, encode_size=256, **arguments):
    """The golden network."""
    model = EfficientSAM(image_size, "tiny", "none", encode_size, **arguments).eval()
    model.load_state_dict(STATE)
    return model


def images(size=256):
    """(2, 3, size, size) in [0, 1], the golden images."""
    image = GOLDEN["image_uint8"].float() / 255
    return image if size == 256 else interpolate(image, (size, size), mode="bilinear", antialias=size < 256)


def grey(size=256):
    return images(size).mean(dim=1, keepdim=True)


def relative_error(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def fake_checkpoints(monkeypatch):
    """In place of ``backbones/checkpoints.py``: files in a dictionary."""
    files = {}

    monkeypatch.setattr(checkpoints, "find", lambda name: Path(f"cache/{name}.pt"))
    monkeypatch.setattr(checkpoints, "read_weights", lambda path, key: files[path.stem])
    return files


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_embedding_masks_and_quality_equal_the_authors_numbers(attention):
    model = tiny(attention=attention)
    with torch.no_grad():
        embedding = model.encode(images()).embedding
        logits, quality = model.candidates_at_points(embedding, POINTS)
    assert relative_error(embedding, GOLDEN["prompt_embedding"]) < 1e-4
    assert relative_error(quality, GOLDEN["iou"]) < 1e-4
    # Stored in half precision: ours are rounded likewise before the comparison.
    assert relative_error(logits.half(), GOLDEN["low_res_logits"].float()) < 1e-4


@pytest.mark.parametrize("size", ["ti", "s"])
def test_keys_and_shapes_equal_the_official_checkpoints(size):
    with torch.device("meta"):
        model = EfficientSAM(size=size, weights="none")
    official = json.loads((DATA / f"efficient_sam_{size}_keys.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == official
    assert model.feature_dim == {"ti": 192, "s": 384}[size]
    assert model.name == f"efficient_sam_{size}"


@pytest.mark.parametrize("encode_size", [128, 224, 256, 512])
def test_any_multiple_of_16_is_encoded(encode_size):
    model = tiny(64, encode_size)
    with torch.no_grad():
        encoded = model.encode(torch.rand(1, 1, 64, 64))
        masks = model.masks_at_points(encoded.embedding, torch.rand(2, 2) * 64)
    cells = encode_size // 16
    assert encoded.features.shape == (1, 48, cells, cells)
    assert encoded.embedding.shape == (1, 32, cells, cells)
    assert masks.shape == (1, 2, 4 * cells, 4 * cells)


def test_the_position_table_is_resized_about_the_same_centre(model):
    table = model.image_encoder.positions(14, 14)
    assert torch.equal(table, STATE["image_encoder.pos_embed"][:, 1:].mT.unflatten(2, (14, 14)))
    for cells in (8, 16, 32):
        assert torch.equal(
            model.image_encoder.positions(cells, cells),
            interpolate(table, (cells, cells), mode="bicubic", align_corners=False),
        )


def test_sizes_that_do_not_fit_are_refused(model):
    with pytest.raises(ConfigError, match=r"multiples of 16 pixels, got 500; the next ones are 496 and 512"):
        tiny(encode_size=500)
    with pytest.raises(ConfigError, match="got 0; the next ones are 16 and 32"):
        tiny(encode_size=0)
    with pytest.raises(ConfigError, match=r"image_size is 256.*96"):
        model.encode(torch.rand(1, 1, 96, 96))


def test_a_grey_image_is_three_equal_channels_normalised_as_published(model):
    seen = []
    hook = model.image_encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        one = model.encode(grey()).features
        three = model.encode(grey().repeat(1, 3, 1, 1)).features
    hook.remove()
    assert torch.equal(one, three)
    for channel, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert torch.allclose(seen[0][:, channel], (grey()[:, 0] - mean) / deviation, atol=1e-5)


@pytest.mark.parametrize("image_size", [128, 512])
def test_points_are_in_pixels_of_the_input_frame(model, image_size):
    other = tiny(image_size)
    embedding = GOLDEN["prompt_embedding"]
    with torch.no_grad():
        expected = model.masks_at_points(embedding, POINTS)
        assert torch.allclose(other.masks_at_points(embedding, POINTS * image_size / 256), expected, atol=1e-5)
        assert not torch.allclose(other.masks_at_points(embedding, POINTS), expected, atol=1e-2)


@pytest.mark.parametrize(("encode_size", "cells"), [(128, 8), (512, 32)])
def test_a_point_meets_the_encoding_of_the_cell_it_lies_in(encode_size, cells):
    """A point at a cell's centre has that cell's position, whatever size is encoded."""
    model = tiny(256, encode_size)
    row, column = cells // 4, cells - 1
    centre = (torch.tensor([[column, row]]) + 0.5) * 256 / cells
    tokens = model.prompt_encoder(centre / model.image_size, encode_size)
    position = tokens[0, 0] - model.prompt_encoder.point_embeddings.weight[0]
    expected = model.prompt_encoder.cells(cells, cells)[row * cells + column]
    assert torch.allclose(position, expected, atol=1e-5)


@pytest.mark.parametrize("points_per_call", [1, 2, 4, 16])
def test_a_batch_equals_single_calls(points_per_call):
    model = tiny(points_per_call=points_per_call)
    image, points = torch.cat([grey(), grey()[:1].flip(3)]), torch.rand(5, 2) * 256
    with torch.no_grad():
        whole = model.masks_at_points(model.encode(image).embedding, points)
        for b in range(3):
            embedding = model.encode(image[b : b + 1]).embedding
            for p in range(5):
                single = model.masks_at_points(embedding, points[p : p + 1])[0, 0]
                assert relative_error(whole[b, p], single) < 1e-5


def test_the_candidate_with_the_best_predicted_quality_is_chosen():
    model = tiny()
    with torch.no_grad():
        embedding, points = torch.randn(2, 32, 16, 16) * 3, torch.rand(6, 2) * 256
        _, quality = model.candidates_at_points(embedding, points)
        # The golden network mostly prefers one candidate. With its average preference taken away, what is
        # left differs in sign from prompt to prompt, so no candidate can be the best at all of them.
        last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.bias[-3:] -= quality.mean(dim=(0, 1))
        masks = model.masks_at_points(embedding, points)
        logits, quality = model.candidates_at_points(embedding, points)
    best = quality.argmax(dim=2)
    assert len(best.unique()) > 1
    for b in range(2):
        for p in range(6):
            assert torch.allclose(masks[b, p], logits[b, p, best[b, p]], atol=1e-4)


def test_freezing_policies():
    model = tiny(trained_blocks=2)

    def trained(depth):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return {".".join(name.split(".")[:depth]) for name in names}

    model.set_trainable("published")
    assert trained(3) == {"image_encoder.blocks.1", "image_encoder.blocks.2"}
    model.set_trainable("decoder")
    assert trained(1) == {"mask_decoder"}
    model.set_trainable("all")
    assert trained(1) == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert all(p.requires_grad for p in model.parameters())
    model.set_trainable("none")
    assert trained(1) == set()
    with pytest.raises(ConfigError, match="'adapters' is unknown; efficient_sam_tiny knows published, decoder"):
        model.set_trainable("adapters")


def test_published_trains_the_last_four_of_twelve_blocks():
    with torch.device("meta"):
        model = EfficientSAM(weights="none")
    model.set_trainable("published")
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"8", "9", "10", "11"}


def test_what_is_frozen_keeps_no_graph():
    model = tiny(trained_blocks=1)
    model.set_trainable("published")
    graphs = []
    for block in model.image_encoder.blocks:
        block.register_forward_hook(lambda _, inputs, output: graphs.append(output.requires_grad))
    encoded = model.encode(grey())
    assert graphs == [False, False, True]
    assert encoded.features.requires_grad
    assert not encoded.embedding.requires_grad


def test_features_equal_those_of_encode_and_skip_the_neck(model):
    calls = []
    hook = model.image_encoder.neck.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        features = model.features(grey())
        assert calls == []
        assert torch.equal(features, model.encode(grey()).features)
    hook.remove()
    assert calls == [1]


def test_checkpointing_changes_no_gradient_and_recomputes_trained_blocks_only():
    def gradients(checkpointing):
        model, calls = tiny(trained_blocks=2, gradient_checkpointing=checkpointing), [0, 0, 0]

        def count(number):
            def hook(*_):
                calls[number] += 1

            return hook

        for number, block in enumerate(model.image_encoder.blocks):
            block.register_forward_pre_hook(count(number))
        model.set_trainable("published")
        model.features(grey()).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls

    (plain, once), (checkpointed, again) = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[key], checkpointed[key], atol=1e-6) for key in plain)
    assert once == [1, 1, 1]
    assert again == [1, 2, 2]


def test_bf16_changes_activation_maps_by_less_than_two_hundredths(model):
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model.encode(grey())
        masks = model.masks_at_points(full.embedding, POINTS)
        with torch.autocast("cpu", torch.bfloat16):
            half = model.encode(grey())
            half_masks = model.masks_at_points(full.embedding, POINTS)
    maps = [class_activation_map(encoded.features.float(), weight) for encoded in (full, half)]
    assert (maps[0] - maps[1]).abs().max() < 0.02
    assert relative_error(half_masks, masks) < 0.05


def test_a_compiled_encoder_gives_the_same_features_and_keys(model, monkeypatch):
    # Without code generation, so that it is cheap (test_sam.py has a test with it): a graph break would raise.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    compiled = tiny(compile=True)
    with torch.no_grad():
        assert relative_error(compiled.features(grey()), model.features(grey())) < 1e-5
    assert compiled.state_dict().keys() == STATE.keys()


def test_official_weights_are_found_by_name_and_loaded(fake_checkpoints):
    state = EfficientSAM(weights="none").state_dict()
    fake_checkpoints["efficient_sam_ti"] = {key: torch.full_like(v, 0.25) for key, v in state.items()}
    loaded = EfficientSAM(weights="official").state_dict()
    assert all((value == 0.25).all() for value in loaded.values())


def test_weights_of_a_path_are_loaded(fake_checkpoints):
    fake_checkpoints["mine"] = STATE
    loaded = EfficientSAM(256, "tiny", "some/mine.safetensors").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in STATE.items())


def test_a_checkpoint_of_another_size_is_refused_with_both_names(fake_checkpoints):
    fake_checkpoints["mine"] = STATE
    with pytest.raises(CheckpointError) as told:
        EfficientSAM(weights="some/mine.pt")
    assert "mine.pt holds efficient_sam_tiny, this backbone is efficient_sam_ti:" in str(told.value)
    assert "image_encoder.pos_embed: efficient_sam_ti (1, 197, 192), checkpoint (1, 197, 48)" in str(told.value)


def test_a_checkpoint_of_another_architecture_is_refused(fake_checkpoints):
    fake_checkpoints["sam"] = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}
    with pytest.raises(CheckpointError, match=r"(?s)holds another network.*proj.weight: .*checkpoint not there"):
        EfficientSAM(256, "tiny", "sam.pth")
    fake_checkpoints["more"] = {**STATE, "a.key": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"(?s)1 of .* unknown.*a.key: .*not there, checkpoint \(1,\)"):
        EfficientSAM(256, "tiny", "more.pth")


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="'xl' is unknown; EfficientSAM has ti, s, tiny"):
        EfficientSAM(size="xl", weights="none")
    with pytest.raises(ConfigError, match="'flash' is unknown; choose one of auto, explicit, sdpa"):
        EfficientSAM(size="tiny", weights="none", attention="flash")
    with pytest.raises(ConfigError, match="'tiny' has no official checkpoint"):
        EfficientSAM(size="tiny")


def test_random_weights_are_said_to_be_random(caplog):
    EfficientSAM(size="tiny", weights="none")
    assert "efficient_sam_tiny starts from random numbers" in caplog.text


def test_equals_the_upstream_package():
    upstream = pytest.importorskip("efficient_sam.build_efficient_sam", reason="efficient-sam is optional")
    torch.manual_seed(0)
    theirs = upstream.build_efficient_sam(192, 3, checkpoint=None).eval()
    ours = EfficientSAM(1024, "ti", "none", encode_size=1024).eval()
    ours.load_state_dict(theirs.state_dict())
    image, points = torch.rand(1, 3, 1024, 1024), torch.tensor([[100.0, 700.0], [512.0, 40.0]])
    with torch.no_grad():
        embedding = theirs.get_image_embeddings(image)
        labels = torch.ones(1, 2, 1)
        logits, quality = theirs.predict_masks(embedding, points[None, :, None], labels, True, 1024, 1024)
        found = ours.encode(image).embedding
        masks = ours.masks_at_points(found, points + 0.5)
    assert relative_error(found, embedding) < 1e-4
    best = quality.argmax(dim=2)[:, :, None, None, None]
    assert relative_error(masks, logits.take_along_dim(best, dim=2).squeeze(2)) < 1e-3
