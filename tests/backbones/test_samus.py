import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from segment_anything.modeling.image_encoder import get_rel_pos

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
from weakmedsam.backbones.sam import SAM
from weakmedsam.backbones.samus import SAMUS
from weakmedsam.errors import CheckpointError, ConfigError

DATA = Path(__file__).parents[1] / "data"
HEADS = {"parent_fc.weight", "child_fc.weight"}


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(DATA / "samus_small.safetensors")
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    numbers = {key: value for key, value in tensors.items() if not key.startswith("state/")}
    return state, numbers, numbers["image_uint8"].float() / 255


def tiny(state=None, image_size=64, **settings):
    torch.manual_seed(0)
    model = SAMUS(image_size, "tiny", "none", **settings).eval()
    if state:
        model.load_state(state, "golden")
    return model


def on_meta(size="vit_b", **settings):
    with torch.device("meta"):
        return SAMUS(size=size, weights="none", **settings)


def keys_of(name):
    return json.loads((DATA / f"{name}.json").read_text())


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_golden_features_embedding_and_masks(golden, attention):
    state, numbers, image = golden
    model = tiny(state, 256, attention=attention)
    with torch.no_grad():
        encoded = model.encode(image)
        # The golden points are raw coordinates of segment-anything, ours have pixel centres at + 0.5.
        masks = model.masks_at_points(encoded.embedding, numbers["points_xy"] + 0.5)
    assert relative_error(encoded.features, numbers["cls_features"]) < 1e-5
    assert relative_error(encoded.embedding, numbers["prompt_embedding"]) < 1e-5
    stored = numbers["low_res_logits"].float()
    rounding = stored.abs() * 2**-11 + 2**-25  # half precision: half a unit of the last place
    assert float((masks - stored).abs().sub(rounding).clamp(min=0).norm() / stored.norm()) < 1e-5


def test_the_class_heads_of_the_golden_file_sit_on_the_average_of_our_features(golden):
    state, numbers, image = golden
    with torch.no_grad():
        pooled = tiny(state, 256).features(image).mean(dim=(-2, -1))
    for head in ("parent", "child"):
        logits = pooled @ state[f"{head}_fc.weight"].flatten(1).T
        assert relative_error(logits, numbers[f"{head}_logits"]) < 1e-4


def test_bf16_changes_features_by_less_than_two_percent(golden):
    state, numbers, image = golden
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = tiny(state, 256).features(image)
    assert relative_error(features, numbers["cls_features"]) < 0.02  # seen: 0.0083


def test_vit_b_has_the_official_keys_and_trains_what_was_published():
    model = on_meta()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == {key: shape for key, shape in keys_of("samus_vit_b_keys").items() if key not in HEADS}
    model.set_trainable("published")
    assert trained(model) == set(keys_of("samus_vit_b_trainable")) - HEADS


@pytest.mark.parametrize(("size", "depth"), [("vit_l", 24), ("vit_h", 32)])
def test_the_larger_sizes_train_their_last_four_blocks(size, depth):
    model = on_meta(size)
    model.set_trainable("published")
    whole = {int(name.split(".")[2]) for name in trained(model) if name.endswith("attn.qkv.weight")}
    assert whole == set(range(depth - 4, depth))
    adapted = {int(name.split(".")[2]) for name in trained(model) if "Space_Adapter.q.weight" in name}
    assert adapted == set(model.global_blocks)


def test_policies():
    model = tiny(last_blocks=1)
    model.set_trainable("published")
    published = trained(model)
    model.set_trainable("adapters")
    adapters = trained(model)
    of_the_last_block = {f"image_encoder.blocks.3.{n}" for n, _ in model.image_encoder.blocks[3].named_parameters()}
    assert published == adapters | of_the_last_block
    assert not any(".mlp." in name or ".qkv." in name or ".norm" in name for name in adapters)
    assert {n for n in adapters if "rel_pos" in n} == {
        f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 3) for axis in "hw"
    }
    model.set_trainable("decoder")
    assert {name.split(".")[0] for name in trained(model)} == {"mask_decoder"}
    model.set_trainable("all")
    assert len(trained(model)) == len(list(model.parameters()))
    model.set_trainable("none")
    assert not trained(model)
    with pytest.raises(ConfigError, match="'head' is unknown; samus_tiny knows published, adapters, decoder"):
        model.set_trainable("head")


@pytest.mark.parametrize("policy", ["published", "adapters"])
def test_every_trained_parameter_gets_a_gradient_from_features(policy):
    model = scramble(tiny(last_blocks=1))
    model.set_trainable(policy)
    _, gradients = features_and_gradients(model, torch.rand(1, 1, 64, 64))
    missing = [name for name, value in gradients.items() if value is None or not value.any()]
    # Without positions, a bias of all keys shifts every score of a query alike: its gradient is zero.
    assert [name for name in missing if not name.endswith("Space_Adapter.k.bias")] == []
    assert all(value is not None for value in gradients.values())


def test_an_official_checkpoint_loads_whole_and_drops_its_class_heads(golden, caplog):
    state = golden[0]
    model = tiny(image_size=256)
    with caplog.at_level(logging.INFO, logger="weakmedsam"):
        model.load_state(state, "official.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "dropped: " in caplog.text
    assert all(head in caplog.text for head in HEADS)
    assert "keep their initial values" not in caplog.text


def test_a_sam_checkpoint_initialises_what_it_has(caplog):
    sam = scramble(SAM(1024, "tiny", "none")).state_dict()
    model = tiny(image_size=256)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="weakmedsam"):
        model.load_state(sam, "sam.pth")
    after = model.state_dict()
    kept = [key for key in after if key not in sam]
    assert all(torch.equal(after[key], before[key]) for key in kept)
    assert all(key in caplog.text for key in kept)
    assert "image_encoder.pos_embed" not in caplog.text
    for key in sam:
        if after[key].shape == sam[key].shape:
            assert torch.equal(after[key], sam[key])
    resized = [key for key in sam if after[key].shape != sam[key].shape]
    assert resized == [f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 3) for axis in "hw"]
    index = torch.arange(32)
    by_distance = index[:, None] - index[None] + 31
    for key in resized:
        assert after[key].shape == (63, 12)
        assert torch.allclose(after[key][by_distance], get_rel_pos(32, 32, sam[key]), atol=1e-6)


def test_adapters_start_as_if_they_were_not_there():
    model = tiny()
    image = torch.rand(1, 1, 64, 64)
    before = model.features(image)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "D_fc1" in name or ("Space_Adapter" in name and "proj" not in name):
                parameter.add_(1)
    assert torch.equal(model.features(image), before)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_the_sam_checkpoint_of_each_size_fits(size):
    on_meta(size).load_state(stand_ins(keys_of(f"sam_{size}_keys")), "sam.pth")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            "vit_b",
            "sam_vit_l_keys",
            r"x\.pth holds SAM vit_l, this backbone is SAMUS vit_b.*pos_embed: .*checkpoint \(1, 64, 64, 1024",
        ),
        ("vit_h", "sam_vit_b_keys", r"x\.pth holds SAM vit_b, this backbone is SAMUS vit_h"),
        ("vit_l", "samus_vit_b_keys", r"x\.pth holds SAMUS vit_b, this backbone is SAMUS vit_l"),
    ],
)
def test_a_checkpoint_of_another_size_is_refused(ours, theirs, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        on_meta(ours).load_state(stand_ins(keys_of(theirs)), "x.pth")


def test_a_checkpoint_that_lacks_a_key_is_refused_and_changes_nothing(golden):
    state = {key: value for key, value in golden[0].items() if "blocks.1.Space_Adapter.k.bias" not in key}
    model = tiny(image_size=256)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"(?s)blocks\.1\.Space_Adapter\.k\.bias: .*\(48,\), checkpoint not there"
    ):
        model.load_state(state, "cut.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"a\.pth holds another network"):
        model.load_state({"layer.weight": torch.zeros(2)}, "a.pth")


def test_weights_by_name(checkpoint_files, golden, caplog):  # noqa: F811
    checkpoint_files.files.update({"samus": {"a": torch.zeros(1)}, "own.pth": golden[0]})
    with pytest.raises(CheckpointError, match="samus holds another network"), torch.device("meta"):
        SAMUS(weights="sam")
    assert checkpoint_files.asked == ["samus"]
    model = SAMUS(256, "tiny", "own.pth")
    assert torch.equal(model.image_encoder.pos_embed, golden[0]["image_encoder.pos_embed"])
    with pytest.raises(ConfigError, match="no stable public address"):
        SAMUS(64, "tiny", "official")
    with pytest.raises(ConfigError, match="tiny"):
        SAMUS(64, "tiny", "sam")
    assert "random numbers" not in caplog.text
    SAMUS(64, "tiny", "none")
    assert "samus_tiny starts from random numbers" in caplog.text


def test_explicit_and_sdpa_attention_agree():
    image = torch.rand(2, 1, 64, 64)
    results = []
    for attention in ("explicit", "sdpa", "auto"):
        model = scramble(tiny(attention=attention))
        model.set_trainable("published")
        results.append(features_and_gradients(model, image))
    assert_same(results[0], results[1], 1e-4)
    assert_same(results[1], results[2], 0)
    with pytest.raises(ConfigError, match="'flash' is unknown; choose one of auto, explicit, sdpa"):
        tiny(attention="flash")


def test_gradient_checkpointing_changes_no_number_and_keeps_less():
    image = torch.rand(2, 1, 64, 64)
    results, kept = [], []
    for checkpointing in (False, True):
        model = scramble(tiny(gradient_checkpointing=checkpointing))
        model.set_trainable("published")
        results.append(features_and_gradients(model, image))
        kept.append(recorded_by(lambda model=model: model.features(image)))
    assert_same(results[0], results[1], 0)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_recorded_for_what_needs_no_gradient(checkpointing):
    model = tiny(gradient_checkpointing=checkpointing)
    image = torch.rand(1, 1, 64, 64)
    for policy in ("none", "decoder"):
        model.set_trainable(policy)
        assert recorded_by(lambda: model.encode(image)) == 0
    model.set_trainable("all")
    encoded = model.encode(image)
    assert encoded.features.requires_grad
    assert not encoded.embedding.requires_grad
    assert recorded_by(lambda: model.encode(image)) == recorded_by(lambda: model.features(image)) > 0


def test_three_images_times_five_points_equal_fifteen_single_calls():
    model = scramble(tiny(points_per_call=4))
    image, points = torch.rand(3, 1, 64, 64), torch.rand(5, 2) * 64
    with torch.no_grad():
        masks = model.masks_at_points(model.encode(image).embedding, points)
        assert masks.shape == (3, 5, 32, 32)
        for b in range(3):
            embedding = model.encode(image[b : b + 1]).embedding
            for p in range(5):
                one = model.masks_at_points(embedding, points[p : p + 1])
                assert torch.allclose(masks[b, p], one[0, 0], atol=1e-5)


def test_input_sizes():
    for size, cells in ((64, 8), (120, 15)):
        features = tiny(image_size=size).features(torch.rand(1, 1, size, size))
        assert features.shape == (1, 48, cells, cells)
    for size in (100, 56, 520):
        with pytest.raises(ConfigError, match=f"256 pixels .*multiple of 8 from 64 to 512, got {size}"):
            tiny(image_size=size)
    with pytest.raises(ConfigError, match=r"image_size is 64.*96"):
        tiny().encode(torch.rand(1, 1, 96, 96))
    with pytest.raises(ConfigError, match="'vit_x' is unknown; choose one of vit_b, vit_l, vit_h, tiny"):
        SAMUS(size="vit_x", weights="none")


def test_random_weights_follow_the_seed():
    one, other = tiny(), tiny()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_encoder_is_traced_whole(monkeypatch):
    # Without code generation, so that it is cheap: a graph break would raise.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    image = torch.rand(1, 1, 64, 64)
    plain, compiled = scramble(tiny()), scramble(tiny(compile=True))
    with torch.no_grad():
        assert relative_error(compiled.features(image), plain.features(image)) < 1e-5
    assert plain.state_dict().keys() == compiled.state_dict().keys()
