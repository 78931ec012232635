"""Two random views of every image, made in batches on the device.

    uint8 (B, C, H, W) -> crop-resize, flip -> jitter -> grey -> blur -> solarise -> normalise ->
    fp32 (B, C, S, S)

Each transform is a function of explicit parameter tensors, one row a sample, and knows nothing of
chance; `View.sample` draws the rows from a `torch.Generator` and `View.apply` is pure and of static
shapes, so that it compiles and the generator's state alone decides the views. No Python loop runs
over samples.

Crop-resize is separable, two batched matrix products with a small matrix a sample, rows @ image @
columns'. They hold the antialiased bicubic filter that torchvision and Pillow use (a = -0.5,
stretched when shrinking, cut and renormalised at the edge of the box): the result is theirs up to
fp32 rounding, without the rounding to 8 bit that they do between the steps. A mirrored matrix is
the flip. The blur is two convolutions, each channel of a sample a group of its own. On the CPU a
transform that not every row gets runs on those that do, and on as many rows at a time as the caches
hold.

Presets (`make_views`):

| preset | for | geometry | colour |
|---|---|---|---|
| imagenet | photographs, 128 px and more | crop scale 0.08-1, flip | released pair, 23-tap blur |
| small | CIFAR, STL, 32-96 px | crop scale 0.2-1, flip | the same, blur a tenth of the side |
| affine | digits: a flip has a meaning | rotate, scale, shear, shift | contrast, light noise |

The released pair: jitter (0.4, 0.4, 0.2, 0.1) with p 0.8 and grey with p 0.2 in both views; view 1
always blurs and never solarises, view 2 blurs with p 0.1 and solarises with p 0.2; blur sigma is
0.1-2.0 pixels. Images without three channels skip what concerns colour: saturation, hue and grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import PRESETS, check_setting

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB
GREY_MEAN, GREY_STD = 0.449, 0.226  # their averages, for every other number of channels
LUMA = (0.2989, 0.587, 0.114)
CHUNK = 2**26  # elements augmented at a time: 256 MiB in fp32, whatever the batch
CACHED = 2**19  # the same on the CPU, for each thread: 2 MiB, what its caches hold
PLACES = (10, 10, 1, 1)  # numbers of a box: size and shape of ten tries, then top and left
NUMBERS = sum(PLACES)
HUE_GROUP = 4  # rows; in each group of them every place of the hue occurs once


def _rows(v: Tensor) -> Tensor:
    return v[:, None, None, None]  # (B,) -> (B, 1, 1, 1)


def as_float(images: Tensor) -> Tensor:
    """uint8 0..255 or floating 0..1, (B, C, H, W), to fp32 0..1 of the same shape."""
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (B, C, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255) if images.dtype == torch.uint8 else x


def normalise(x: Tensor) -> Tensor:
    """(x - mean) / std by channel: ImageNet's for RGB, their average for any other channels."""
    if x.shape[1] != 3:
        return (x - GREY_MEAN).div_(GREY_STD)
    return (x - x.new_tensor(MEAN)[:, None, None]).div_(x.new_tensor(STD)[:, None, None])


# ---------------------------------------------------------------- transforms of given parameters


def _separable(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """rows @ x @ cols' for every channel: (B, C, H, W), (B, S, H), (B, S, W) -> (B, C, S, S)."""
    b, c, h, w = x.shape
    x = (x.reshape(b, c * h, w) @ cols.mT).view(b, c, h, -1).mT  # (B, C, S, H)
    return (x.reshape(b, -1, h) @ rows.mT).view(b, c, x.shape[2], -1).mT


def _bicubic(start: Tensor, length: Tensor, n: int, size: int) -> Tensor:
    """(B, size, n): row i weighs n pixels of an axis into pixel i of [start, start + length)."""
    step = length / size
    pixel = torch.arange(n, device=start.device) + 0.5
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step[:, None]
    # Stretching the filter when shrinking is what keeps fine detail from aliasing.
    t = ((pixel - centre[..., None]) / step.clamp_min(1)[:, None, None]).abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    weight = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def crop_resize(x: Tensor, box: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut `box` (B, 4: top, left, height, width, in pixels) out of each image and resize it to size
    x size.

    x: fp32 0..1 (B, C, H, W); flip: bool (B,), mirrored left to right. Antialiased bicubic, clamped
    to 0..1.
    """
    top, left, height, width = box.to(x.dtype).unbind(1)
    rows = _bicubic(top, height, x.shape[2], size)
    cols = _bicubic(left, width, x.shape[3], size)
    if flip is not None:
        cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    return _separable(x, rows, cols).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) of RGB images; the mean of the channels of any others."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (LUMA[0] * x[:, :1]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def rotate_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images (B, 3, H, W) by `shift` (B,) full turns."""
    red, green, blue = x.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    span = high - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = high == red, high == green
    rest = torch.where(is_green, blue - red, red - green)
    turn = torch.where(is_red, green - blue, rest).div_(torch.where(span > 0, 6 * span, 1))
    turn.add_(torch.where(is_red, 0, torch.where(is_green, 1 / 3, 2 / 3)))
    # HSV to RGB in one formula for the three channels: how far one is below the highest depends on
    # the distance, at most half a turn, from where it is lowest.
    lowest = x.new_tensor((1 / 2, 1 / 6, -1 / 6))[:, None, None]
    k = turn.add_(shift[:, None, None])[:, None] + lowest
    k.sub_(k.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(high[:, None], k, span[:, None], value=-1)


def jitter(x: Tensor, factors: Tensor, order: Tensor, hue: Tensor, hue_rows: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, in an order of its own.

    factors (B, K): of brightness, contrast and, for RGB, saturation; 1 leaves the image as it is.
    order (B, K): a permutation of 0..K-1, the order of these K blends for each image.
    hue (B,): turns. hue_rows (B,): a permutation of the rows; its four quarters turn the hue before
    blend 0, 1, 2 and after the last, so each row's hue is worked out once. Both are unused unless
    RGB.
    """
    colour = x.shape[1] == 3
    if colour:
        x, quarters = x.clone(), hue_rows.tensor_split(4)
    for slot in range(order.shape[1] + 1):
        if colour:
            rows = quarters[slot]
            x.index_copy_(0, rows, rotate_hue(x.index_select(0, rows), hue.index_select(0, rows)))
        if slot < order.shape[1]:
            # The three differ in what they blend with: black, the image's mean grey, each pixel's
            # grey.
            kind = _rows(order[:, slot])
            shade = grey(x)
            other = torch.where(kind == 1, shade.mean((2, 3), keepdim=True), 0)
            if colour:
                other = torch.where(kind == 2, shade, other)
            factor = _rows(factors.gather(1, order[:, slot, None]).squeeze(1))
            x = torch.lerp(other, x, factor).clamp_(0, 1)
    return x


def blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with sigma (B,) in pixels (0: none), `kernel` taps (odd), edges reflected."""
    size, radius = x.shape[-1], kernel // 2
    if x.shape[-2] != size or radius >= size:
        raise ValueError(f"blur: expected a square of more than {radius} px, got {tuple(x.shape)}")
    offset = torch.arange(-radius, radius + 1, device=x.device)
    # A width of 0.01 pixel underflows every tap but the middle one: the identity, exactly.
    taps = torch.exp(-0.5 * (offset / sigma.clamp_min(0.01)[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)[:, None, None]
    groups = len(taps)  # a channel of an image each: (B * C, 1, 1, kernel)
    padded = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    once = F.conv2d(padded, taps, groups=groups)
    return F.conv2d(once, taps.mT, groups=groups).view(x.shape)


def solarise(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert the pixels from `threshold` up."""
    return torch.where(x >= threshold, 1 - x, x)


def affine(x: Tensor, theta: Tensor) -> Tensor:
    """Warp by theta (B, 2, 3), which maps output to input coordinates in -1..1; outside is black.

    Bicubic; meant for small changes of scale, since it does not guard against aliasing. Clamped to
    0..1.
    """
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _where(on: Tensor, x: Tensor, transform: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`transform(x, *parameters)` in the rows where `on` (B,) is true, x in the others; parameters
    (B, ...)."""
    if not x.is_cpu or torch.compiler.is_compiling():  # no host waits, shapes are static
        return torch.where(_rows(on), transform(x, *parameters), x)
    rows = on.nonzero().squeeze(1)
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return transform(x, *parameters)
    return x.index_copy(0, rows, transform(*(value[rows] for value in (x, *parameters))))


# ---------------------------------------------------------------- drawing the parameters


class _Draw:
    """Uniform numbers for n samples from one generator, on that generator's device."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.how = n, {"generator": generator, "device": generator.device}

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(self.n, *shape, **self.how) * (high - low) + low

    def chance(self, p: float) -> Tensor:
        return torch.rand(self.n, **self.how) < p

    def places(self) -> Tensor:
        """(n,) a permutation of 0..3 for each four rows, of 0..r-1 for r rows that are left."""
        keys = torch.rand(-(-self.n // HUE_GROUP) * HUE_GROUP, **self.how)
        keys[self.n :] = 2
        return keys.view(-1, HUE_GROUP).argsort(1).flatten()[: self.n]


def place_box(
    numbers: Tensor, h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """(n, 4) top, left, height, width in whole pixels, distributed as torchvision's
    RandomResizedCrop.

    numbers (n, NUMBERS): uniform in 0..1. Ten tries are made of them for every sample and the first
    that fits is taken; where none fits, the largest central box within `ratio`.
    """
    size, shape, top, left = numbers.split(PLACES, 1)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (size * (scale[1] - scale[0]) + scale[0]) * (h * w)
    aspect = (shape * (high - low) + low).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= w) & (height >= 1) & (height <= h)
    first = fits.int().argmax(1, keepdim=True)  # the first of equals
    none = ~fits.any(1)
    width = torch.where(none, min(w, round(h * ratio[1])), width.gather(1, first).squeeze(1))
    height = torch.where(none, min(h, round(w / ratio[0])), height.gather(1, first).squeeze(1))
    # A number times k can round up to k in fp32, hence the minimum.
    top = torch.minimum((top[:, 0] * (h - height + 1)).floor(), h - height)
    left = torch.minimum((left[:, 0] * (w - width + 1)).floor(), w - width)
    top = torch.where(none, ((h - height) / 2).floor(), top)
    left = torch.where(none, ((w - width) / 2).floor(), left)
    return torch.stack((top, left, height, width), 1)


def place_one(
    numbers: list[float], h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """`place_box` of one row, in Python's numbers, since tensors this small are all overhead."""
    sizes, shapes, (top, left) = numbers[: PLACES[0]], numbers[PLACES[0] : -2], numbers[-2:]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for size, shape in zip(sizes, shapes):
        area = (size * (scale[1] - scale[0]) + scale[0]) * (h * w)
        aspect = math.exp(shape * (high - low) + low)
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= width <= w and 1 <= height <= h:
            return int(top * (h - height + 1)), int(left * (w - width + 1)), height, width
    height, width = min(h, round(w / ratio[0])), min(w, round(h * ratio[1]))
    return (h - height) // 2, (w - width) // 2, height, width


@dataclass(frozen=True)
class _View:
    """Parameters are drawn (`sample`) for a whole batch and applied (`rows`) to any part of it: a
    sample's view does not depend on how the batch is divided. Abstract: `sample` and `apply` are
    those of `View` and `AffineView`."""

    size: int
    channels: int

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        self._check(images)
        return self.rows(images, self.sample(len(images), *images.shape[2:], generator))

    @torch.no_grad()
    def rows(self, images: Tensor, params: dict[str, Tensor], first: int = 0) -> Tensor:
        """The view of `images` (B, C, H, W), which are samples first .. first + B of those that
        `params` was drawn for: fp32 (B, C, S, S)."""
        self._check(images)
        b, c, h, w = images.shape
        out = torch.empty(b, c, self.size, self.size, device=images.device)
        most = CACHED * torch.get_num_threads() if images.is_cpu else CHUNK
        step = max(HUE_GROUP, most // (c * max(h * w, self.size**2)) // HUE_GROUP * HUE_GROUP)
        start = -(first % HUE_GROUP)
        for i in range(start, b, step):  # over pieces that bound the memory, not over samples
            low, high = max(i, 0), min(i + step, b)
            part, end = images[low:high], first + high
            there = slice(first + i, end + -end % HUE_GROUP)
            drawn = {k: v[there].to(images.device, non_blocking=True) for k, v in params.items()}
            # Whole groups of the drawn batch (see hue_place): what fills them up is thrown away.
            ahead = low - i
            behind = len(next(iter(drawn.values()))) - ahead - len(part)
            if ahead or behind:
                part = F.pad(part, (0, 0) * 3 + (ahead, behind))
            out[low:high] = self.apply(part, drawn)[ahead : ahead + high - low]
        return out

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != self.channels:
            expected = f"(B, {self.channels}, H, W)"
            raise ValueError(f"images: expected shape {expected}, got {tuple(images.shape)}")


@dataclass(frozen=True)
class View(_View):
    """One side of the photographic pair. `apply` is pure and may be compiled."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter_p: float = 0.8
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey_p: float = 0.2
    blur_p: float = 1.0
    blur_kernel: int = 23
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0

    def sample(
        self, n: int, h: int, w: int, generator: torch.Generator, boxes: bool = True
    ) -> dict[str, Tensor]:
        """Parameters of n images of h x w pixels, n rows each, on the generator's device.

        boxes: False where the images are cut already, to this view's size.
        hue_place: when in the jitter a row's hue is turned, 0..3, each once in every group of four
        rows, so that every part of whole groups has equally many of each and shapes are static.
        """
        draw = _Draw(n, generator)
        blends = self.strength[: 3 if self.channels == 3 else 2]
        on = draw.chance(self.jitter_p)
        factors = torch.stack([draw.uniform(1 - s, 1 + s) for s in blends], 1)
        hue = draw.uniform(-self.strength[3], self.strength[3])
        box = {}
        if boxes:
            numbers = torch.cat([draw.uniform(0, 1, count) for count in PLACES], 1)
            box["box"] = place_box(numbers, h, w, self.scale, self.ratio)
        return {
            **box,
            "flip": draw.chance(self.flip_p),
            "factors": torch.where(on[:, None], factors, 1),
            "order": draw.uniform(0, 1, len(blends)).argsort(1),
            "hue": torch.where(on, hue, 0),
            "hue_place": draw.places(),
            "grey": draw.chance(self.grey_p),
            "sigma": torch.where(draw.chance(self.blur_p), draw.uniform(*self.sigma), 0),
            "solarise": draw.chance(self.solarise_p),
        }

    def apply(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """uint8 or float 0..1 (B, C, H, W), parameters of B rows -> normalised (B, C, S, S)."""
        p = params
        with torch.autocast(images.device.type, enabled=False):
            if "box" in p:
                x = crop_resize(as_float(images), p["box"], self.size, p["flip"])
            else:
                x = as_float(torch.where(_rows(p["flip"]), images.flip(3), images))
            hue_rows = p["hue_place"].argsort(stable=True)
            x = jitter(x, p["factors"], p["order"], p["hue"], hue_rows)
            if self.channels == 3:
                x = _where(p["grey"], x, lambda x: grey(x).expand_as(x))
            if self.blur_p > 0:
                kernel = self.blur_kernel
                x = _where(p["sigma"] > 0, x, lambda x, sigma: blur(x, sigma, kernel), p["sigma"])
            if self.solarise_p > 0:
                x = _where(p["solarise"], x, solarise)
            return normalise(x)


@dataclass(frozen=True)
class AffineView(_View):
    """One side of the affine pair: warp, contrast, noise. Both sides are drawn alike."""

    degrees: float = 15.0
    scale: tuple[float, float] = (0.85, 1.15)
    shear: float = 0.2  # tangent of the slant
    shift: float = 0.1  # of the side
    contrast: float = 0.4
    noise: float = 0.05  # standard deviation, images in 0..1

    def sample(
        self, n: int, h: int, w: int, generator: torch.Generator, boxes: bool = True
    ) -> dict[str, Tensor]:
        """Parameters of n images, n rows each, on the generator's device."""
        draw = _Draw(n, generator)
        turn = draw.uniform(-math.radians(self.degrees), math.radians(self.degrees))
        scale, slant = draw.uniform(*self.scale), draw.uniform(-self.shear, self.shear)
        cos, sin = turn.cos() / scale, turn.sin() / scale
        shift = draw.uniform(-2 * self.shift, 2 * self.shift, 2)  # the grid is 2 wide
        rows = (cos, cos * slant - sin, shift[:, 0], sin, sin * slant + cos, shift[:, 1])
        shape = (n, self.channels, self.size, self.size)
        return {
            "theta": torch.stack(rows, 1).view(n, 2, 3),
            "factor": draw.uniform(1 - self.contrast, 1 + self.contrast),
            "noise": torch.randn(shape, **draw.how) * self.noise,
        }

    def apply(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """uint8 or float 0..1 (B, C, H, W), parameters of B rows -> normalised (B, C, S, S)."""
        with torch.autocast(images.device.type, enabled=False):
            x = affine(_fit(as_float(images), self.size), params["theta"])
            x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, _rows(params["factor"]))
            return normalise((x + params["noise"]).clamp(0, 1))


@dataclass(frozen=True)
class Views:
    """The two views of a batch: `views(images, generator) -> (view1, view2)`, both fp32 (B, C, S,
    S).

    images: uint8 or float 0..1, (B, C, H, W), any H and W. Every random number comes from
    `generator`, first all of view 1, then of view 2. Keep the generator on the images' device to
    spare small copies.
    """

    first: _View = field(repr=False)
    second: _View = field(repr=False)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.first(images, generator), self.second(images, generator)

    def sample(
        self, n: int, h: int, w: int, generator: torch.Generator, boxes: bool = True
    ) -> tuple[dict, dict]:
        """The parameters that a call would draw for n images of h x w pixels: `first.rows` and
        `second.rows` apply them to any part of the batch. boxes: as of `View.sample`."""
        return tuple(v.sample(n, h, w, generator, boxes) for v in (self.first, self.second))

    @property
    def crops(self) -> tuple | None:
        """Scale and ratio of the views' boxes, for whoever cuts them out of whole pictures; None of
        views that have none."""
        return (self.first.scale, self.first.ratio) if isinstance(self.first, View) else None


def make_views(preset: str, image_size: int, channels: int = 3) -> Views:
    """The pair of views of a preset (the table above), image_size pixels square.

    Blur kernels: imagenet 23 taps, which at sigma 2 leave out less than 1e-7; small a tenth of the
    side, odd and at least 3. ValueError for an unknown preset.
    """
    check_setting("views", preset, choices=PRESETS)
    if preset == "affine":
        view = AffineView(image_size, channels)
        return Views(view, view)
    if preset == "imagenet":
        scale, kernel = (0.08, 1.0), 23
    else:
        scale, kernel = (0.2, 1.0), max(3, image_size // 10 | 1)
    kernel = min(kernel, 2 * image_size - 1)  # reflection reaches no further
    same = {"size": image_size, "channels": channels, "scale": scale, "blur_kernel": kernel}
    return Views(View(**same), View(**same, blur_p=0.1, solarise_p=0.2))


def _fit(x: Tensor, size: int) -> Tensor:
    """The central square, at least 7/8 of the short side, as size x size."""
    h, w = x.shape[2:]
    if h == w == size:
        return x
    side = min(h, w, max(size, round(min(h, w) * 7 / 8)))
    box = torch.tensor([[(h - side) // 2, (w - side) // 2, side, side]], device=x.device)
    return crop_resize(x, box.expand(len(x), 4), size)


@torch.no_grad()
def for_evaluation(images: Tensor, image_size: int | None = None) -> Tensor:
    """The evaluation input: no chance, normalised fp32 (B, C, S, S) from uint8 or float 0..1 (B, C,
    H, W).

    image_size None keeps the images' size. Otherwise the central square, of 7/8 of the short side
    or of image_size where that is more, is resized to image_size: 224 of 256 is a pure crop, 32 of
    32 changes nothing.
    """
    x = as_float(images)
    with torch.autocast(x.device.type, enabled=False):
        return normalise(x if image_size is None else _fit(x, image_size)).contiguous()
