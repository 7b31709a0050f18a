"""The losses against definitions that share no code with them: sets, another library, finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saltlib.losses import LOSSES, MARGINS, bce_dice, lovasz_hinge, three_output_loss

pixels = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.lists(st.floats(-5, 5, width=32), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n))
)


def choquet(logits, mask):
    "Lovász extension by its other definition: the IoU error of {error >= t}, integrated over t."
    errors = np.maximum(0, 1 - np.float64(logits) * (2 * np.float64(mask) - 1))
    true, total, low = {i for i, y in enumerate(mask) if y}, 0.0, 0.0
    for t in sorted(set(errors)):
        wrong = {i for i, e in enumerate(errors) if e >= t}
        total += (t - low) * len(wrong) / len(true | wrong)
        low = t
    return total


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_whole_numbers_above_0_are_salt(name):
    logits, masks = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(128).reshape(2, 1, 8, 8) % 3 == 0
    assert LOSSES[name](logits, masks.to(torch.uint8) * 255) == LOSSES[name](logits, masks)


@given(pixels)
def test_relu_is_the_lovasz_extension(case):
    logits, mask = case
    loss = lovasz_hinge(torch.tensor([[logits]]), torch.tensor([[mask]]), "relu")
    assert loss.item() == pytest.approx(choquet(logits, mask), abs=1e-5)


@given(pixels, st.sampled_from(sorted(MARGINS)), st.integers(0, 99))
def test_soft_masks_follow_the_same_formula(case, margin, seed):
    logits, hard = case
    mask = np.random.default_rng(seed).random(len(hard))
    errors = 1 - np.float64(logits) * (2 * mask - 1)
    ranked, salt, expected, before = mask.copy(), mask.sum(), 0.0, 0.0
    order = np.argsort(-errors, kind="stable")
    for k, i in enumerate(order):
        inter, union = salt - ranked[order[: k + 1]].sum(), salt + (1 - ranked[order[: k + 1]]).sum()
        counts = max(0, errors[i]) if margin == "relu" else errors[i] + 1 if errors[i] > 0 else np.exp(errors[i])
        expected, before = expected + counts * (1 - inter / union - before), 1 - inter / union
    assert lovasz_hinge(torch.tensor([[logits]]).double(), torch.tensor(mask)[None, None], margin).item() == pytest.approx(expected, abs=1e-6)


def test_relu_agrees_with_segmentation_models_pytorch():
    from segmentation_models_pytorch.losses import LovaszLoss

    torch.manual_seed(0)
    logits, masks = torch.randn(4, 1, 9, 7), (torch.rand(4, 1, 9, 7) > 0.6).float()
    torch.testing.assert_close(lovasz_hinge(logits, masks, "relu"), LovaszLoss("binary", per_image=True)(logits, masks))


@pytest.mark.parametrize("skip_empty", [False, True])
@pytest.mark.parametrize("margin", MARGINS)
def test_a_batch_is_the_mean_of_its_tiles(margin, skip_empty):
    torch.manual_seed(1)
    logits, masks = torch.randn(5, 1, 6, 6), (torch.rand(5, 1, 6, 6) > 0.5).float()
    masks[1] = 0
    singly = [lovasz_hinge(logits[i : i + 1], masks[i : i + 1], margin, skip_empty) for i in range(5)]
    torch.testing.assert_close(lovasz_hinge(logits, masks, margin, skip_empty), torch.stack(singly).mean())
    assert (singly[1] == 0) == skip_empty


@pytest.mark.parametrize("kind", ["hard", "soft", "empty", "full"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name, kind):
    torch.manual_seed(2)
    logits = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = {
        "hard": (torch.rand(2, 1, 3, 4) > 0.5), "soft": torch.rand(2, 1, 3, 4), "empty": torch.zeros(2, 1, 3, 4), "full": torch.ones(2, 1, 3, 4),
    }[kind].double()
    if name == "three_output":
        image = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
        pixel = torch.randn_like(logits).requires_grad_()
        assert torch.autograd.gradcheck(lambda *outputs: three_output_loss(outputs, masks), (logits, pixel, image))
    else:
        assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, masks), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_for_any_logit_and_mask(name, dtype):
    extremes = torch.tensor([1e4, -1e4, 0, 1]).repeat(4, 1, 8, 2)
    for masks in (torch.zeros_like(extremes), torch.ones_like(extremes), (extremes > 0).float(), (extremes < 0).float(), torch.rand_like(extremes)):
        logits = extremes.to(dtype).requires_grad_()
        image = logits[:, 0, 0, 0].float().sigmoid()  # exactly 1
        outputs = (logits, logits, image) if name == "three_output" else logits
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name](outputs, masks)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()


def test_bce_dice_by_its_definition():
    rng = np.random.default_rng(3)
    p, y = rng.uniform(0.05, 0.95, (2, 3, 5, 5))
    entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    dice = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    p, y = torch.tensor(p), torch.tensor(y)
    assert bce_dice(p, y).item() == pytest.approx(0.5 * entropy + 0.5 * (1 - dice), abs=1e-7)
    assert LOSSES["bce_dice"](p.logit(), y).item() == pytest.approx(bce_dice(p, y).item(), abs=1e-9)


def test_probabilities_of_exactly_0_and_1_keep_a_finite_gradient():
    probs = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]], requires_grad=True)
    loss = bce_dice(probs, torch.tensor([[[0, 0, 1, 1]]], dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and probs.grad.isfinite().all()


def test_image_branch_learns_empty_as_1():
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, 1, 1] = 1
    right = 4 * masks - 2
    losses = [three_output_loss((right, right, torch.tensor(image)), masks).item() for image in ([0.01, 0.99], [0.99, 0.01])]
    assert losses[0] == pytest.approx(-np.log(0.99), abs=1e-5) and losses[1] == pytest.approx(-np.log(0.01), abs=1e-4)
