import json
from functools import partial
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, Sam

from tests.backbone_checks import (
    assert_same,
    checkpoint_files,  # noqa: F401
    features_and_gradients,
    recorded_by,
    relative_error,
    scramble,
    stand_ins,
    trained,
)
from weakmedsam.backbones.lora import low_rank_parameters
from weakmedsam.backbones.sam import DEVIATION, MEAN, SAM
from weakmedsam.backbones.sam_parts import layer_norm, resize_frame
from weakmedsam.errors import CheckpointError, ConfigError

DATA = Path(__file__).parents[1] / "data"
SIZE = 256  # 16 cells: more than a window, so that windows and padding take part


def tiny(image_size=64, **settings):
    torch.manual_seed(0)
    return scramble(SAM(image_size, "tiny", "none", **settings)).eval()


def on_meta(size, **settings):
    with torch.device("meta"):
        return SAM(size=size, weights="none", **settings)


def keys_of(size):
    return json.loads((DATA / f"sam_{size}_keys.json").read_text())


@pytest.fixture(scope="module")
def original():
    """segment-anything's own SAM with the weights of ``tiny(SIZE)``."""
    model = tiny(SIZE)
    encoder = ImageEncoderViT(
        img_size=SIZE,
        embed_dim=48,
        depth=4,
        num_heads=4,
        out_chans=32,
        norm_layer=layer_norm,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1, 3),
    )
    sam = Sam(encoder, model.prompt_encoder, model.mask_decoder, list(MEAN), list(DEVIATION))
    sam.load_state_dict(model.state_dict(), strict=True)
    return sam.eval()


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_it_computes_what_segment_anything_computes(original, attention):
    torch.manual_seed(3)
    image, point = torch.randint(0, 256, (1, 1, SIZE, SIZE)), torch.tensor([[70.0, 120.0]])
    model = tiny(SIZE, attention=attention)
    with torch.no_grad():
        encoded = model.encode(image / 255)
        theirs = original.image_encoder(original.preprocess(image[0].expand(3, -1, -1).float())[None])
        result = original(
            [
                {
                    "image": image[0].expand(3, -1, -1).float(),
                    "original_size": (SIZE, SIZE),
                    "point_coords": point[None] - 0.5,
                    "point_labels": torch.ones(1, 1),
                }
            ],
            multimask_output=False,
        )
        masks = model.masks_at_points(encoded.embedding, point)
    assert encoded.features.shape == (1, 48, 16, 16)
    assert relative_error(encoded.embedding, theirs) < 1e-5
    assert torch.allclose(masks[0], result[0]["low_res_logits"][0], atol=1e-5)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_official_keys_and_shapes(size):
    model = on_meta(size)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == keys_of(size)
    model.load_state(stand_ins(keys_of(size)), "official.pth")
    on_meta(size, image_size=512, lora_rank=2).load_state(stand_ins(keys_of(size)), "official.pth")
    assert model.feature_dim == {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}[size]


def test_position_tables_are_resized_to_smaller_inputs():
    large, small = tiny(512), tiny(256)
    small.load_state(large.state_dict(), "large.pth")
    state = small.state_dict()
    assert state["image_encoder.pos_embed"].shape == (1, 16, 16, 48)
    assert state["image_encoder.blocks.1.attn.rel_pos_h"].shape == (31, 12)
    for key in ("image_encoder.blocks.0.attn.rel_pos_h", "image_encoder.neck.0.weight"):
        assert torch.equal(state[key], large.state_dict()[key])
    # A table that grows evenly keeps its values where it is sampled, away from the rim.
    ramp = torch.arange(63.0)[:, None].expand(63, 12)
    sloping = large.state_dict() | {"image_encoder.blocks.1.attn.rel_pos_h": ramp}
    small.load_state(sloping, "ramp.pth")
    table = small.image_encoder.blocks[1].attn.rel_pos_h[:, 0]
    assert torch.allclose(table, (torch.arange(31) + 0.5) * 63 / 31 - 0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            "vit_b",
            "vit_h",
            r"x\.pth holds SAM vit_h, this backbone is SAM vit_b: .*pos_embed: .*checkpoint \(1, 64, 64, 1280",
        ),
        ("vit_l", "vit_b", r"x\.pth holds SAM vit_b, this backbone is SAM vit_l"),
    ],
)
def test_a_checkpoint_of_another_size_is_refused(ours, theirs, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        on_meta(ours).load_state(stand_ins(keys_of(theirs)), "x.pth")


def test_weights_by_name(checkpoint_files, caplog):  # noqa: F811
    held = tiny().state_dict()
    caplog.clear()
    checkpoint_files.files.update({"sam_vit_l": {"a": torch.zeros(1)}, "own.pth": {"a": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="sam_vit_l holds another network"), torch.device("meta"):
        SAM(size="vit_l")
    assert checkpoint_files.asked == ["sam_vit_l"]
    checkpoint_files.files["own.pth"] = dict(held)
    model = SAM(64, "tiny", "own.pth")
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    assert "random numbers" not in caplog.text
    with pytest.raises(ConfigError, match="tiny"):
        SAM(64, "tiny", "official")
    SAM(64, "tiny", "none")
    assert "sam_tiny starts from random numbers" in caplog.text


def test_policies_without_lora():
    model = tiny()
    for policy in ("published", "none"):
        model.set_trainable(policy)
        assert not trained(model)
    model.set_trainable("decoder")
    assert {name.split(".")[0] for name in trained(model)} == {"mask_decoder"}
    model.set_trainable("all")
    assert len(trained(model)) == len(list(model.parameters()))
    with pytest.raises(ConfigError, match="'adapters' is unknown; sam_tiny knows published, decoder, all, none"):
        model.set_trainable("adapters")


def test_lora_starts_as_sam_and_trains_its_own_parameters_only():
    plain, image = tiny(), torch.rand(1, 1, 64, 64)
    model = SAM(64, "tiny", "none", lora_rank=2, lora_alpha=4.0)
    model.load_state(plain.state_dict(), "plain.pth")
    assert torch.equal(model.features(image), plain.features(image))
    for policy in ("published", "adapters"):
        model.set_trainable(policy)
        # Two matrices for each of qkv and proj in each of four blocks.
        assert len(trained(model)) == 16
        assert sum(p.numel() for p in low_rank_parameters(model)) == 4 * 2 * (48 + 144 + 48 + 48)
    scramble(model)
    model.load_state(plain.state_dict(), "plain.pth")
    proj = model.image_encoder.blocks[2].attn.proj
    change = proj.parametrizations.weight[0]
    expected = plain.image_encoder.blocks[2].attn.proj.weight + 2 * change.up @ change.down
    assert torch.allclose(proj.weight, expected, atol=1e-6)
    features, gradients = features_and_gradients(model, image)
    assert not torch.allclose(features, plain.features(image))
    assert len(gradients) == 16
    assert all(gradient.any() for gradient in gradients.values())
    with pytest.raises(ConfigError, match="lora_rank is -1"):
        SAM(64, "tiny", "none", lora_rank=-1)


def test_explicit_and_sdpa_attention_agree():
    image, results = torch.rand(2, 1, SIZE, SIZE), []
    for attention in ("explicit", "sdpa"):
        model = tiny(SIZE, attention=attention, lora_rank=2)
        model.set_trainable("published")
        results.append(features_and_gradients(model, image))
        assert model.state_dict().keys() == tiny(lora_rank=2).state_dict().keys()
    assert_same(*results, 1e-4)


def test_gradient_checkpointing_changes_no_number_and_keeps_less():
    image, results, kept = torch.rand(2, 1, 64, 64), [], []
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing, lora_rank=2)
        model.set_trainable("published")
        results.append(features_and_gradients(model, image))
        kept.append(recorded_by(lambda model=model: model.features(image)))
    assert_same(*results, 0)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_prefix_is_not_recorded(checkpointing):
    model = tiny(gradient_checkpointing=checkpointing)
    image = torch.rand(1, 1, 64, 64)
    model.set_trainable("published")
    assert recorded_by(lambda: model.encode(image)) == 0
    kept = []
    for first in (3, 2):
        model.image_encoder.blocks[first].requires_grad_(True)
        kept.append(recorded_by(lambda: model.encode(image)))
        assert not model.encode(image).embedding.requires_grad
    assert 0 < kept[0] < kept[1]


def test_bf16_changes_features_by_less_than_two_percent():
    model, image = tiny(SIZE), torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        features = model.features(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model.features(image), features) < 0.02


def test_three_images_times_five_points_equal_fifteen_single_calls():
    model = tiny(points_per_call=4)
    image, points = torch.rand(3, 1, 64, 64), torch.rand(5, 2) * 64
    with torch.no_grad():
        masks = model.masks_at_points(model.encode(image).embedding, points)
        assert masks.shape == (3, 5, 16, 16)
        for b in range(3):
            embedding = model.encode(image[b : b + 1]).embedding
            for p in range(5):
                one = model.masks_at_points(embedding, points[p : p + 1])
                assert torch.allclose(masks[b, p], one[0, 0], atol=1e-5)


def test_input_sizes():
    for size in (1040, 56, 200):
        with pytest.raises(ConfigError, match=f"multiples of 16 from 64 to 1024 pixels, got {size}"):
            tiny(size)
    with pytest.raises(ConfigError, match=r"image_size is 64.*96"):
        tiny().features(torch.rand(1, 1, 96, 96))


def test_an_image_of_another_size_is_resized_inside_and_points_stay_in_its_pixels():
    own, larger = tiny(64), tiny(128, encode_size=64)
    image, points = torch.rand(1, 1, 128, 128), torch.tensor([[30.0, 90.0]])
    with torch.no_grad():
        encoded, expected = larger.encode(image), own.encode(resize_frame(image, 64))
        assert all(torch.allclose(*pair) for pair in zip(encoded, expected, strict=True))
        masks = [model.masks_at_points(expected.embedding, at) for model, at in ((larger, points), (own, points / 2))]
    assert torch.allclose(*masks, atol=1e-5)


def test_the_encoder_is_traced_whole_with_lora(monkeypatch):
    # Without code generation, which takes most of a minute: a graph break would raise.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    image, results = torch.rand(1, 1, 64, 64), []
    for compiled in (False, True):
        model = tiny(lora_rank=2, compile=compiled)
        model.set_trainable("published")
        results.append(features_and_gradients(model, image))
        assert model.state_dict().keys() == tiny(lora_rank=2).state_dict().keys()
    assert_same(*results, 1e-4)
