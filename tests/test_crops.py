"""The pieces that views cut out of whole pictures, and what an evaluation sees of them, beside
torchvision's transforms on the same files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_run import TINY, assert_same, state_of, train

from directclr_fast.train import data, folder, views

image = pytest.importorskip("PIL.Image")
RELEASED = ((0.08, 1.0), (3 / 4, 4 / 3))


def numbers(n, seed=0):
    return torch.rand(n, views.NUMBERS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pictures(tmp_path):
    """Noise under a slope, of several shapes, as PNG and JPEG; by path."""
    random, paths = np.random.default_rng(0), []
    for k, (w, h) in enumerate([(500, 375), (375, 500), (257, 256), (640, 90), (60, 45)]):
        slope = np.add.outer(np.linspace(0, 100, h), np.linspace(0, 100, w))[..., None]
        pixels = (slope + random.integers(0, 56, (h, w, 3))).astype(np.uint8)
        for suffix in ("png", "jpg"):
            paths.append(tmp_path / "set" / f"{k}.{suffix}")
            paths[-1].parent.mkdir(exist_ok=True)
            image.fromarray(pixels).save(paths[-1])
    return paths


def test_a_piece_is_torchvisions(pictures):
    """Box by box: to the bit that of the picture as a tensor, which is within 2 levels of 255 of
    Pillow's."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    v2 = pytest.importorskip("torchvision.transforms.v2.functional")
    bicubic, seen = functional.InterpolationMode.BICUBIC, 0
    for k, path in enumerate(pictures):
        with image.open(path) as picture:
            tensor = functional.pil_to_tensor(picture)
        for pair in numbers(16, k).view(8, 2, -1):
            got = folder.cut(path, 48, pair, RELEASED)
            assert got.shape == (2, 3, 48, 48) and got.dtype == torch.uint8
            boxes = views.place_box(pair, picture.height, picture.width, *RELEASED).int()
            if path.suffix == ".jpg" and boxes[:, 2:].min() >= 96:
                continue  # decoded at a half: below
            for box, piece in zip(boxes.tolist(), got):
                assert torch.equal(piece, v2.resized_crop(tensor, *box, [48, 48], bicubic))
                want = functional.resized_crop(picture, *box, [48, 48], bicubic)
                error = (piece.int() - functional.pil_to_tensor(want).int()).abs()
                assert error.max() <= 2 and error.float().mean() < 0.5
                seen += 1
    assert seen > 100


@pytest.mark.parametrize(("h", "w"), [(375, 500), (90, 640)])
def test_one_box_is_placed_as_many(h, w):
    rows = numbers(2000)
    one = torch.tensor([views.place_one(row, h, w, *RELEASED) for row in rows.tolist()])
    many = views.place_box(rows, h, w, *RELEASED)
    assert (one == many).all(1).float().mean() > 0.999  # fp32 may round to the neighbour


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_as_pillow_does(mode, tmp_path, monkeypatch):
    io = pytest.importorskip("torchvision.io")
    path, calls, decode = tmp_path / "a.jpg", [], io.decode_jpeg
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    image.fromarray(pixels).convert(mode).save(path, progressive=True)
    monkeypatch.setattr(io, "decode_jpeg", lambda *a: (calls.append(1), decode(*a))[1])
    with image.open(path) as picture:
        got = folder._pixels(picture)
    with image.open(path) as picture:
        assert torch.equal(got, torch.from_numpy(np.array(picture.convert("RGB"))))
    assert len(calls) == (mode != "CMYK")


def test_pieces_are_distributed_as_torchvisions(tmp_path):
    """On a picture that says where each pixel was: of its corners too, which a central square had
    not."""
    transforms = pytest.importorskip("torchvision.transforms")
    w, h, n = 250, 188, 1500
    x, y = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
    picture = image.fromarray(np.stack((x, y, 0 * x), -1).astype(np.uint8))
    (tmp_path / "set/a").mkdir(parents=True)
    for k in range(2):
        picture.save(tmp_path / f"set/a/{k}.png")
    images = data.load(f"folder:{tmp_path / 'set'}", train=True, image_size=8)
    images = replace(images, crops=views.make_views("imagenet", 8).crops)
    images = replace(images, paths=images.paths.repeat(n // 2), labels=images.labels.repeat(n // 2))
    ((pieces, _, _),) = data.Batches(images, data.EpochSampler(n // 2, n // 2))
    ours = pieces.flatten(0, 1).double()
    torch.manual_seed(0)
    cut = transforms.RandomResizedCrop(8, interpolation=transforms.InterpolationMode.BICUBIC)
    theirs = torch.stack([torch.from_numpy(np.array(cut(picture))) for _ in range(n)])
    theirs = theirs.permute(0, 3, 1, 2).double()

    def statistics(z):  # place, width and height of each piece
        z = z[:, :2]
        spread = torch.stack((z[:, 0, 4, 7] - z[:, 0, 4, 0], z[:, 1, 7, 4] - z[:, 1, 0, 4]), 1)
        return torch.cat((z.mean((2, 3)), spread, (spread.prod(1) / 255**2)[:, None]), 1)

    for a, b in zip(statistics(ours).T, statistics(theirs).T):
        error = b.std() * math.sqrt(2 / n)
        assert abs(a.mean() - b.mean()) < 4 * error and abs(a.std() - b.std()) < 4 * error
    assert ours[:, 0].min() < 8 and ours[:, 0].max() > 247  # the long side's ends


@pytest.mark.parametrize("size", [224, 100])
def test_an_evaluation_sees_what_torchvision_shows(size, pictures):
    transforms = pytest.importorskip("torchvision.transforms")
    show = transforms.Compose([
        transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size),
        transforms.PILToTensor(),
    ])  # fmt: skip
    for path in pictures:
        if path.suffix == ".jpg" and size == 100:
            continue  # decoded at a half
        with image.open(path) as picture:
            want = show(picture.convert("RGB")).int()
        got = folder.decode(path, size).int()
        assert got.shape == want.shape and (got - want).abs().max() <= 1
        assert (got - want).abs().float().mean() < 0.02


def test_reduced_decoding_is_close():
    """Of a photograph much larger than the views, decoded at a quarter: half a level of 255 on
    average."""
    skimage = pytest.importorskip("skimage")
    functional = pytest.importorskip("torchvision.transforms.functional")
    path = Path(skimage.__file__).parent / "data/retina.jpg"
    with image.open(path) as picture:
        picture.load()
    assert picture.size == (1411, 1411)
    row = numbers(1)
    box = [int(v) for v in views.place_box(row, 1411, 1411, (0.5, 0.5), (1, 1))[0]]
    sizes = []
    draft = type(picture).draft
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(picture), "draft", lambda *a: (draft(*a), sizes.append(a[0].size)))
        got = folder.cut(path, 224, row, ((0.5, 0.5), (1, 1)))[0].int()
    assert sizes == [(353, 353)]
    want = functional.resized_crop(picture, *box, [224, 224], functional.InterpolationMode.BICUBIC)
    error = (got - functional.pil_to_tensor(want).int()).abs().float()
    assert error.mean() < 0.7 and error.max() < 30


def test_a_worker_has_one_thread(pictures):
    class Told(folder.FolderSet):
        def __getitems__(self, asked):
            threads = torch.full((len(asked), 1, 1, 1), torch.get_num_threads())
            return threads, self.labels[asked], asked

    images = data.load(f"folder:{pictures[0].parent}", train=True, image_size=16)
    told = Told(**vars(images))
    seen = [x for x, *_ in data.in_order(told, 4, num_workers=1)]
    assert torch.cat(seen).eq(1).all() and len(seen) > 1


def test_pieces_depend_on_seed_epoch_and_batch_alone(pictures):
    images = data.load(f"folder:{pictures[0].parent}", train=True, image_size=16)
    images = replace(images, crops=RELEASED)
    assert len(images) == 9

    def epochs(workers=0, count=2, start=None, **rank):
        batches = data.Batches(images, data.EpochSampler(9, 4, seed=3, **rank), "cpu", workers)
        if start is not None:
            batches.sampler.load_state_dict(start)
        return [x for _ in range(count) for x, _, _ in batches]

    whole = epochs()
    assert len(whole) == 4 and whole[0].shape == (4, 2, 3, 16, 16)
    assert not torch.equal(whole[0][:, 0], whole[0][:, 1])
    for a, b in zip(whole, epochs(workers=2), strict=True):
        assert torch.equal(a, b)
    ranks = [epochs(rank=r, world_size=3) for r in range(3)]
    for k, batch in enumerate(whole):
        assert torch.equal(torch.cat([r[k] for r in ranks]), batch)
    state = {"epoch": 0, "position": 1, "n": 9, "batch_size": 4, "seed": 3}
    for a, b in zip(whole[1:], epochs(start=state), strict=True):
        assert torch.equal(a, b)
    drawn = [n for _, n in data.Batches(images, data.EpochSampler(9, 4, seed=3)).sampler]
    assert len(drawn) == 2 and not (drawn[0] == drawn[1]).any()
    # The same picture in another epoch is cut in another way.
    sampler = data.EpochSampler(9, 9, seed=3)
    one, two = ({int(k): x for x, k in zip(*part)} for part in (
        (x, i) for _ in range(2) for x, _, i in data.Batches(images, sampler)
    ))  # fmt: skip
    assert not any(torch.equal(one[k], two[k]) for k in one)


def test_views_of_pieces_are_only_flipped_before_the_colours():
    view = views.make_views("small", 16).second
    plain = replace(view, jitter_p=0, grey_p=0, blur_p=0, solarise_p=0)
    x = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    drawn = plain.sample(8, 16, 16, torch.Generator().manual_seed(0), boxes=False)
    assert "box" not in drawn and 0 < drawn["flip"].sum() < 8
    want = torch.where(drawn["flip"][:, None, None, None], x.flip(3), x)
    torch.testing.assert_close(plain.rows(x, drawn), views.normalise(want / 255))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("preset", ["small", "affine"])
def test_a_run_on_pictures_in_chunks_and_parts(preset, pictures, run_dir, monkeypatch):
    """A gradient cache replays the same pieces; views without boxes see the centre."""
    settings = {**TINY, "data": f"folder:{pictures[0].parent}", "views": preset}
    settings |= {"batch_size": 4, "image_size": 16, "epochs": 4}
    train(run_dir, "whole", **settings)
    train(run_dir, "parts", **settings, max_steps=3)
    train(run_dir, "parts", **settings, resume=True)
    assert_same(state_of(run_dir / "parts"), state_of(run_dir / "whole"))
    chunks = {"chunk_size": 2, "cache_bn": "two-pass", "max_steps": 1}
    trainer, _ = train(run_dir, "chunks", **settings, **chunks)
    seen, _, _ = next(iter(trainer.batches))
    assert seen.shape[1:] == ((2, 3, 16, 16) if preset == "small" else (3, 16, 16))
    asked, sample = [], views.Views.sample
    spy = lambda *a, **how: (asked.append(how), sample(*a, **how))[1]  # noqa: E731
    monkeypatch.setattr(views.Views, "sample", spy)
    trainer.views_of(seen)
    assert asked == [{"boxes": preset == "affine"}]  # what is cut is not cut again
    if preset == "small":  # each view has its own piece
        seen[:, 0], seen[:, 1] = 0, 255
        make = trainer.views_of(seen)
        black = views.normalise(torch.zeros(2, 3, 16, 16))
        assert torch.equal(make(0, slice(1, 3)), black)
        assert not torch.equal(make(1, slice(1, 3)), black)
