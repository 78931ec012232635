"""Views: each transform against torchvision's per-sample one, given the same parameters."""

from __future__ import annotations

import math

import pytest
import torch

from directclr_fast.train import views

tv = pytest.importorskip("torchvision.transforms.v2.functional")
BICUBIC = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC


def images(b=6, c=3, h=20, w=None, seed=0):
    """Smooth random uint8 images: neighbouring pixels are alike, as in photographs."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(b, c, 5, 5, generator=g)
    x = torch.nn.functional.interpolate(coarse, (h, w or h), mode="bilinear") * 255
    return (x + torch.rand(x.shape, generator=g) * 20 - 10).clamp(0, 255).to(torch.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(got, want, atol=2e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("size", [7, 16, 32, 40])
def test_crop_resize_is_torchvisions_antialiased_bicubic(size):
    """Exactly the plain per-sample crop and resize: fp32 rounding is all the tolerance there is."""
    x = views.as_float(images(5, 3, 32, 24))
    box = torch.tensor(
        [[0, 0, 32, 24], [3, 5, 11, 17], [31, 23, 1, 1], [0, 2, 20, 3], [10, 0, 22, 24]]
    )
    got = views.crop_resize(x, box, size)
    for i, (top, left, h, w) in enumerate(box.tolist()):
        cut = x[i, :, top : top + h, left : left + w]
        want = tv.resize(cut, [size, size], BICUBIC, antialias=True).clamp(0, 1)
        close(got[i], want)


def test_flip_mirrors_the_chosen_rows():
    x = views.as_float(images(4, 3, 16))
    box = torch.tensor([[0, 0, 16, 16]] * 4)
    flip = torch.tensor([True, False, True, False])
    got = views.crop_resize(x, box, 16, flip)
    for i in range(4):
        close(got[i], tv.horizontal_flip(x[i]) if flip[i] else x[i])


@pytest.mark.parametrize("shape", [(6, 3, 16, 20), (6, 1, 9, 9), (6, 4, 5, 5)])
def test_grey(shape):
    x = torch.rand(shape)
    want = tv.rgb_to_grayscale(x) if shape[1] == 3 else x.mean(1, keepdim=True)
    close(views.grey(x), want)


def test_hue():
    x = views.as_float(images(8))
    x[0, :, 0] = 0.5  # grey pixels have no hue
    x[1, :, :2], x[1, :, 2:4] = 0, 1
    shift = torch.linspace(-0.5, 0.5, 8)
    got = views.rotate_hue(x, shift)
    for i in range(8):
        close(got[i], tv.adjust_hue(x[i], shift[i].item()))


def test_jitter_follows_torchvision_in_every_order():
    """24 orders of the four, one an image, each image with its own factors."""
    b = 48
    x = views.as_float(images(b))
    hue_slot = torch.arange(b) % 4
    order = torch.rand(b, 3, generator=generator()).argsort(1)
    factors = torch.rand(b, 3, generator=generator(1)) * 1.2 + 0.4
    hue = torch.rand(b, generator=generator(2)) - 0.5
    before = x.clone()
    got = views.jitter(x, factors, order, hue, hue_slot.argsort(stable=True))
    assert torch.equal(x, before)
    blend = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for i in range(b):
        want = x[i]
        for slot in range(4):
            if hue_slot[i] == slot:
                want = tv.adjust_hue(want, hue[i].item())
            if slot < 3:
                kind = order[i, slot]
                want = blend[kind](want, factors[i, kind].item())
        close(
            got[i], want, atol=1e-4
        )  # hue divides by the span of the channels, which can be small


def test_jitter_of_grey_images_knows_brightness_and_contrast():
    x = views.as_float(images(4, 1))
    factors = torch.tensor([[1.3, 0.7]] * 4)
    order = torch.tensor([[0, 1], [1, 0]] * 2)
    got = views.jitter(x, factors, order, torch.full((4,), 0.3), torch.arange(4))
    for i in range(4):
        want = x[i]
        for kind in order[i].tolist():
            if kind == 0:
                want = (want * 1.3).clamp(0, 1)
            else:
                want = (0.7 * want + 0.3 * want.mean()).clamp(0, 1)
        close(got[i], want)


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (32, 23), (9, 9), (12, 23)])
def test_blur(side, kernel):
    x = views.as_float(images(4, 3, side))
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    got = views.blur(x, sigma, kernel)
    for i in range(4):
        close(got[i], tv.gaussian_blur(x[i], [kernel] * 2, [sigma[i].item()] * 2))


def test_blur_without_sigma_is_exact_and_too_wide_is_refused():
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(views.blur(x, torch.zeros(2), 7), x)
    with pytest.raises(ValueError, match="blur: expected a square of more than 8 px, got"):
        views.blur(x, torch.ones(2), 17)


def test_solarise():
    x = views.as_float(images(4))
    on = torch.tensor([True, False, True, False])
    got = views._where(on, x, views.solarise)
    for i in range(4):
        close(got[i], tv.solarize(x[i], 0.5) if on[i] else x[i])


def test_affine_turns_and_shifts():
    x = torch.rand(3, 2, 8, 8)
    quarter = [[0.0, -1, 0], [1, 0, 0]]
    shift = [[1, 0, 2 / 8 * 2], [0, 1, 0]]  # two pixels
    theta = torch.tensor([[[1, 0, 0], [0, 1, 0]], quarter, shift], dtype=torch.float32)
    got = views.affine(x, theta)
    close(got[0], x[0])
    close(got[1], x[1].rot90(1, (1, 2)))
    close(got[2, :, :, :6], x[2, :, :, 2:])
    assert not got[2, :, :, 6:].any()


def test_identity_parameters_give_the_image_back():
    x = images(4, 3, 32)
    view = views.make_views("small", 32).second
    p = {
        "box": torch.tensor([[0, 0, 32, 32]] * 4),
        "flip": torch.zeros(4, dtype=torch.bool),
        "factors": torch.ones(4, 3),
        "order": torch.arange(3).expand(4, 3),
        "hue": torch.zeros(4),
        "hue_place": torch.arange(4),
        "grey": torch.zeros(4, dtype=torch.bool),
        "sigma": torch.zeros(4),
        "solarise": torch.zeros(4, dtype=torch.bool),
    }
    close(view.apply(x, p), views.for_evaluation(x), atol=1e-5)
    view = views.make_views("affine", 32).first
    theta = torch.eye(2, 3).expand(4, 2, 3)
    p = {"theta": theta, "factor": torch.ones(4), "noise": torch.zeros(4, 3, 32, 32)}
    close(view.apply(x, p), views.for_evaluation(x), atol=1e-5)


# ---------------------------------------------------------------- the parameters


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_boxes_are_distributed_like_torchvisions(scale):
    from torchvision.transforms import RandomResizedCrop

    n, h, w, ratio = 4000, 40, 30, (3 / 4, 4 / 3)
    box = views.place_box(torch.rand(n, views.NUMBERS, generator=generator()), h, w, scale, ratio)
    assert torch.equal(box, box.round())
    top, left, height, width = box.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= h).all() and (left + width <= w).all()
    torch.manual_seed(0)
    image = torch.empty(3, h, w)
    other = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    for got, want in zip(box.T, other.T.float(), strict=True):
        error = want.std() * math.sqrt(2 / n)
        assert abs(got.mean() - want.mean()) < 4 * error
        assert abs(got.std() - want.std()) < 4 * error


def test_box_that_never_fits_is_the_largest_central_one():
    box = views.place_box(torch.rand(3, views.NUMBERS), 10, 100, (1.0, 1.0), (3 / 4, 4 / 3))
    assert box.tolist() == [[0, 43, 10, 13]] * 3


def test_released_pair():
    first, second = (
        v.sample(4000, 224, 224, generator())
        for v in vars(views.make_views("imagenet", 224)).values()
    )
    for p in (first, second):
        assert p["flip"].float().mean() == pytest.approx(0.5, abs=0.03)
        assert p["grey"].float().mean() == pytest.approx(0.2, abs=0.03)
        on = (p["factors"] != 1).any(1)
        assert on.float().mean() == pytest.approx(0.8, abs=0.03)
        assert torch.equal(on, p["hue"] != 0)  # all four or none
        low, high = p["factors"][on].aminmax(dim=0)
        torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.8]), atol=0.01, rtol=0)
        torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.2]), atol=0.01, rtol=0)
        assert p["hue"].abs().max() == pytest.approx(0.1, abs=0.002)
        fours = p["hue_place"].view(-1, 4)
        assert fours.sort(1).values.equal(torch.arange(4).expand(1000, 4))
        assert len(fours.unique(dim=0)) == 24
        assert p["sigma"].max() <= 2 and p["sigma"][p["sigma"] > 0].min() >= 0.1
        codes = (p["order"] * torch.tensor([9, 3, 1])).sum(1)
        assert codes.unique().numel() == 6
    assert (first["sigma"] > 0).all() and not first["solarise"].any()
    assert (second["sigma"] > 0).float().mean() == pytest.approx(0.1, abs=0.03)
    assert second["solarise"].float().mean() == pytest.approx(0.2, abs=0.03)


def test_affine_is_a_turn_of_a_slant_within_the_stated_ranges():
    view = views.make_views("affine", 8, 1).first
    p = view.sample(4000, 8, 8, generator())
    (cos, slant_x, dx), (sin, slant_y, dy) = p["theta"].permute(1, 2, 0)
    turn, scale = torch.atan2(sin, cos), 1 / torch.hypot(cos, sin)
    # Turned back and scaled back, the second axis is (slant, 1).
    slant = (turn.cos() * slant_x + turn.sin() * slant_y) * scale
    close((turn.cos() * slant_y - turn.sin() * slant_x) * scale, torch.ones(4000))
    for value, low, high in (
        (turn.rad2deg(), -15, 15),
        (scale, 0.85, 1.15),
        (slant, -0.2, 0.2),
        (dx, -0.2, 0.2),  # a tenth of the side, which is 2 wide
        (dy, -0.2, 0.2),
        (p["factor"], 0.6, 1.4),
    ):
        assert value.min() == pytest.approx(low, abs=(high - low) / 100)
        assert value.max() == pytest.approx(high, abs=(high - low) / 100)
    assert p["noise"].std() == pytest.approx(0.05, rel=0.01)


def test_hue_has_each_place_in_the_order():
    """Hue before anything else differs from hue after a blend that clamps."""
    x = torch.tensor([0.9, 0.5, 0.1])[None, :, None, None].expand(8, 3, 2, 2).contiguous()
    args = (torch.full((8, 3), 1.4), torch.arange(3).expand(8, 3), torch.full((8,), 0.3))
    got = views.jitter(x, *args, torch.arange(8))
    assert got[::2].flatten(1).unique(dim=0).shape[0] == 4
    assert torch.equal(got[::2], got[1::2])


# ---------------------------------------------------------------- whole views

CASES = [
    ("imagenet", 24, 3),
    ("small", 32, 3),
    ("small", 16, 1),
    ("affine", 8, 1),
    ("affine", 16, 3),
]


@pytest.mark.parametrize(("preset", "size", "channels"), CASES)
def test_views_come_from_the_generator_alone(preset, size, channels):
    x = images(8, channels, 32 if preset != "affine" else size)
    make = views.make_views(preset, size, channels)
    before = x.clone()
    g = generator(3)
    one, two = make(x, g)
    state = g.get_state()
    torch.manual_seed(99)
    again = make(x, generator(3))
    assert torch.equal(one, again[0]) and torch.equal(two, again[1])
    assert torch.equal(x, before)
    for v in (one, two):
        assert v.shape == (8, channels, size, size) and v.dtype == torch.float32
        assert v.is_contiguous() and v.isfinite().all() and not v.requires_grad
    assert not torch.allclose(one, two)
    next_one, next_two = make(x, g)
    assert not torch.allclose(one, next_one)
    restored = torch.Generator()
    restored.set_state(state)
    resumed = make(x, restored)
    assert torch.equal(next_one, resumed[0]) and torch.equal(next_two, resumed[1])


@pytest.mark.parametrize(("preset", "size", "channels"), CASES)
def test_parameters_differ_within_a_batch(preset, size, channels):
    x = images(1, channels, 32).expand(16, -1, -1, -1)
    for view in views.make_views(preset, size, channels)(x, generator()):
        assert view.flatten(1).unique(dim=0).shape[0] == 16
    params = views.make_views(preset, size, channels).first.sample(64, 32, 32, generator())
    for name, value in params.items():
        assert len(value) == 64, name
        if name != "solarise":  # never in view 1
            assert value.unique(dim=0).shape[0] > 1, name


def test_a_large_batch_is_made_in_pieces(monkeypatch, one_thread):
    x, make = images(10, 3, 32), views.make_views("small", 32)
    sizes = []
    apply = views.View.apply

    def record(self, part, params):
        sizes.append(len(part))
        return apply(self, part, params)

    monkeypatch.setattr(views.View, "apply", record)
    monkeypatch.setattr(views, "CACHED", 4 * 3 * 32 * 32)
    one, _ = make(x, generator())
    assert sizes == [4, 4, 2] * 2
    assert one.flatten(1).unique(dim=0).shape[0] == 10


@pytest.mark.parametrize(("preset", "size", "channels"), CASES)
@pytest.mark.parametrize("ends", [[0, 4, 12, 23], [0, 5, 6, 14, 23], list(range(24))])
def test_a_sample_s_view_does_not_depend_on_the_division_of_the_batch(
    ends, preset, size, channels, monkeypatch, one_thread
):
    """What ranks and chunks rely on: parameters of the whole batch, applied to parts of it."""
    x, make = images(23, channels, 32), views.make_views(preset, size, channels)
    want = make(x, generator(3))
    monkeypatch.setattr(views, "CACHED", 8 * channels * 32 * 32)  # in pieces of 8
    drawn = make.sample(23, 32, 32, generator(3))
    for view, params, whole in zip((make.first, make.second), drawn, want):
        parts = [view.rows(x[a:b], params, a) for a, b in zip(ends, ends[1:])]
        # Up to rounding: a library may take another kernel for a product of fewer rows.
        close(torch.cat(parts), whole, atol=1e-5 / min(views.STD))


def test_float_images_are_taken_as_they_are():
    x, make = images(4, 3, 32), views.make_views("small", 32)
    got = make((x / 255).requires_grad_(), generator())[0]
    close(got, make(x, generator())[0])
    assert not got.requires_grad  # no graph is kept of the making


def test_autocast_does_not_reach_the_views():
    x, make = images(4, 3, 32), views.make_views("small", 32)
    want, evaluation = make(x, generator())[0], views.for_evaluation(x, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make(x, generator())[0], want)
        assert torch.equal(views.for_evaluation(x, 24), evaluation)


@pytest.mark.parametrize("preset", ["small", "affine"])
def test_apply_compiles_whole(preset):
    x, view = images(8, 3, 16), views.make_views(preset, 16).second
    params = view.sample(8, 16, 16, generator())
    compiled = torch.compile(view.apply, backend="aot_eager", fullgraph=True)
    close(compiled(x, params), view.apply(x, params), atol=1e-4)


def test_normalised_with_imagenets_numbers():
    x = images(2, 3, 8)
    want = tv.normalize(x / 255, views.MEAN, views.STD)
    close(views.for_evaluation(x), want)
    close(views.for_evaluation(x[:, :1]), (x[:, :1] / 255 - 0.449) / 0.226)


@pytest.mark.parametrize(
    ("h", "w", "size", "side"),
    [(32, 32, 32, 32), (256, 256, 224, 224), (96, 96, 64, 84), (8, 8, 16, 8), (40, 60, 32, 35)],
)
def test_plain_cuts_the_centre(h, w, size, side):
    x = images(2, 3, h, w)
    top, left = (h - side) // 2, (w - side) // 2
    cut = (x / 255)[:, :, top : top + side, left : left + side]
    want = tv.resize(cut, [size, size], BICUBIC, antialias=True).clamp(0, 1)
    got = views.for_evaluation(x, size)
    close(got, tv.normalize(want, views.MEAN, views.STD), atol=1e-4)
    assert got.is_contiguous()


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="views: expected one of imagenet, small, affine, got 'x'"):
        views.make_views("x", 32)
    make = views.make_views("small", 8)
    with pytest.raises(
        ValueError, match=r"images: expected shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"
    ):
        make(images(2, 1, 8), generator())
    with pytest.raises(
        TypeError, match="images: expected uint8 or a floating dtype, got torch.int64"
    ):
        make(images(2, 3, 8).long(), generator())
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\), got \(3, 8, 8\)"):
        views.for_evaluation(images(2, 3, 8)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("preset", "size", "channels"), CASES)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_cuda_agrees_with_the_cpu(preset, size, channels, where):
    x, make = images(8, channels, 32), views.make_views(preset, size, channels)
    g = torch.Generator(where).manual_seed(5)
    got = make(x.cuda(), g)
    assert got[0].is_cuda
    if where == "cpu":
        for a, b in zip(got, make(x, generator(5)), strict=True):
            # A pixel at the solarise threshold may fall to the other side of it.
            assert ((a.cpu() - b).abs() < 2e-3).float().mean() > 0.999
