"""Corruptions: against definitions written down a second time, worked numbers, every size and mode, and bad input."""

import colorsys
import io
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from common import corruptions
from common.corruptions import NAMES, SEEN, UNSEEN, choose, corrupt, table_for
from common.data.puzzles import puzzle

DETERMINISTIC = {
    "gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate", "jpeg_compression"
}  # fmt: skip


def photo(height=160, width=200):
    """Smooth shading, edges and texture in colour."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    picture = np.stack([0.5 + 0.4 * np.sin(9 * x + 4 * y), 0.3 + 0.5 * y, 0.7 - 0.5 * x], -1)
    picture[height // 4 : height // 2, width // 3 : width // 2] = (0.9, 0.2, 0.1)
    picture += 0.08 * np.sin(60 * x)[..., None]
    return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))


def values(image):
    return np.asarray(image).astype(np.float64) / 255


def grey(levels, size=None):
    """A grey picture of these levels in [0, 1]."""
    array = np.asarray(levels, dtype=np.float64)
    image = Image.fromarray(np.rint(array * 255).astype(np.uint8)).convert("RGB")
    return image.resize(size, Image.Resampling.NEAREST) if size else image


# ----------------------------------------------------------------------------------------------------- every corruption


def test_the_sets_are_the_documented_ones_and_disjoint():
    assert len(NAMES) == 20 and set(SEEN + UNSEEN) < set(NAMES)
    assert not set(SEEN) & set(UNSEEN) and len(SEEN) == len(UNSEEN) == 5
    assert choose(("unseen", "fog", "snow")) == (*UNSEEN, "snow")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (28, 28), (28, 300), (640, 480)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_keeps_its_size_and_the_same_seed_gives_the_same_bytes(name, size):
    image = photo(*reversed(size))
    for severity in (1, 5):
        first, again = (corrupt(image, name, severity, (3, 1)) for _ in range(2))
        assert first.mode == "RGB" and first.size == image.size
        assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_another_picture_where_there_is_chance(name):
    a, b = (corrupt(photo(), name, 4, seed) for seed in (1, 2))
    assert (a.tobytes() == b.tobytes()) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", NAMES)
def test_damage_grows_with_severity(name):
    # Mean over pictures and seeds of the squared difference; the flat colours of puzzles no corruption leaves alone.
    pictures = [puzzle("train", i).image for i in range(4)]
    damage = [
        np.mean([(values(corrupt(p, name, s, seed)) - values(p)) ** 2 for p in pictures for seed in range(3)])
        for s in (1, 2, 3, 4, 5)
    ]
    assert damage[0] > 0
    if name == "saturate":  # fades at 1 and 2, exaggerates at 3 to 5
        assert damage[0] < damage[1] and damage[2] < damage[3] < damage[4]
    elif name == "spatter":  # water at 1 to 3, mud at 4 and 5
        assert damage[0] < damage[1] < damage[2] and damage[3] < damage[4]
    elif name in ("snow", "frost", "fog", "motion_blur"):  # the authors' own constants trade one parameter for another
        assert damage[0] < damage[4]
    else:
        assert damage == sorted(damage)


def test_small_pictures_take_the_small_constants():
    assert table_for("gaussian_noise", 95, 500)[0] == 0.04
    assert table_for("gaussian_noise", 96, 500)[0] == 0.08
    assert table_for("contrast", 28, 28) == table_for("contrast", 500, 500)


# ------------------------------------------------------------------------------------------------- against definitions


@pytest.mark.parametrize("severity", [1, 5])
def test_gaussian_noise_has_the_variance_of_a_clipped_normal(severity):
    level, std = 100 / 255, table_for("gaussian_noise", 200, 200)[severity - 1]
    noisy = values(corrupt(grey([[level]], (200, 200)), "gaussian_noise", severity, 0))
    draws = np.clip(stats.norm(level, std).ppf((np.arange(100_000) + 0.5) / 100_000), 0, 1)
    assert abs(noisy.std() - draws.std()) < 0.004
    assert abs(noisy.mean() - draws.mean()) < 0.004


def test_shot_noise_has_poisson_mean_and_variance():
    level, rate = 51 / 255, 60
    noisy = values(corrupt(grey([[level]], (200, 200)), "shot_noise", 1, 0))
    assert abs(noisy.mean() - level) < 0.004
    assert abs(noisy.var() / (level / rate) - 1) < 0.05


@pytest.mark.parametrize("rate", [3, 60, 250])
def test_shot_noise_has_poissons_distribution_at_every_level(rate):
    table = corruptions.shot_table(rate)
    for level in (0, 1, 50, 255):
        photons = np.arange(4 * rate + 40)
        expected = np.zeros(256)
        np.add.at(expected, np.minimum(photons * 255 // rate, 255), stats.poisson(rate * level / 255).pmf(photons))
        share = np.bincount(table[level], minlength=256) / table.shape[1]
        assert np.abs(share - expected).max() < 1.01 / table.shape[1]


def test_tabled_normal_numbers_are_normal():
    table = corruptions.normal_table()
    assert abs(table.mean()) < 1e-9 and abs(table.std() - 1) < 2e-5
    assert stats.kstest(table, "norm").statistic < 1e-5
    drawn = corruptions.words(np.random.default_rng(0), (1001, 101))
    assert drawn.shape == (1001, 101) and stats.kstest(drawn.ravel() / 65536, "uniform").pvalue > 0.01


def test_impulse_noise_replaces_its_share_evenly():
    noisy = np.asarray(corrupt(grey([[0.5]], (300, 300)), "impulse_noise", 5, 0))
    assert abs((noisy == 0).mean() - 0.135) < 0.003 and abs((noisy == 255).mean() - 0.135) < 0.003
    assert set(np.unique(noisy)) == {0, 128, 255}


def test_speckle_noise_grows_with_the_light():
    dark, light = (values(corrupt(grey([[v]], (200, 200)), "speckle_noise", 1, 0)) for v in (0.2, 0.5))
    assert abs(dark.std() - 0.15 * 0.2) < 0.003 and abs(light.std() - 0.15 * 0.5) < 0.003


def spread(image, axis):
    """Second moment about the mean of the light along an axis."""
    light = values(image)[..., 0]
    line = light.sum(1 - axis) / light.sum()
    place = np.arange(len(line))
    return (line * place**2).sum() - (line * place).sum() ** 2


def lamp(size=129):
    """Light in one small square, bright enough for its blur to survive 8 bits."""
    picture = np.zeros((size, size))
    picture[size // 2 - 6 : size // 2 + 7, size // 2 - 6 : size // 2 + 7] = 1
    return grey(picture)


def test_gaussian_blur_adds_its_variance():
    for severity, sigma in ((2, 2), (4, 4)):
        blurred = corrupt(lamp(), "gaussian_blur", severity, 0)
        for axis in (0, 1):
            # Fractions of a level are dropped, which shortens the tails a little.
            assert -0.09 < (spread(blurred, axis) - spread(lamp(), axis)) / sigma**2 - 1 < 0.02


def test_defocus_blur_adds_the_variance_of_a_disk():
    for severity, radius in ((1, 3), (3, 6), (5, 10)):
        blurred = corrupt(lamp(), "defocus_blur", severity, 0)
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        inside = y**2 + x**2 <= radius**2
        softening = {1: 0, 3: 0.2, 5: 0.25}[severity]
        for axis in (0, 1):
            expected = (y[inside] ** 2).mean() + softening
            assert abs(spread(blurred, axis) - spread(lamp(), axis) - expected) < 0.06 * expected + 0.1
    assert abs(corruptions.disk(10, 0.5).sum() - 1) < 1e-9


def test_motion_blur_has_the_worked_weights():
    line = np.zeros((1, 101), np.float32)
    line[0, 30] = 1
    for (reach, sigma), expected in (
        ((10, 3), [0.234745, 0.222059, 0.187969, 0.142380, 0.096507]),
        ((20, 15), [0.052166, 0.052050, 0.051704, 0.051133, 0.050344]),
    ):
        dragged = corruptions.drag(line, reach, sigma, 0.0)[0]
        np.testing.assert_allclose(dragged[30:35], expected, atol=1e-6)
        assert abs(dragged.sum() - 1) < 1e-5 and (dragged > 0).sum() == 2 * reach + 1
        assert dragged[:30].sum() == 0, "one-sided"


def test_motion_blur_moves_along_its_angle():
    point = np.zeros((61, 61), np.float32)
    point[30, 30] = 1
    dragged = corruptions.drag(point, 10, 8, -45.0)
    rows, columns = dragged.nonzero()
    assert (rows - 30 == 30 - columns).all() and columns.max() == 30 + 14


def test_zoom_blur_is_the_mean_of_enlarged_middles():
    # Under a zoom z about the middle, a ramp r becomes r / z there: the mean slope is the mean of 1 and every 1 / z.
    ramp = np.tile(np.linspace(0.1, 0.9, 201), (201, 1))
    slope = np.polyfit(np.arange(60, 141), values(corrupt(grey(ramp), "zoom_blur", 3, 0))[100, 60:141, 0], 1)[0]
    zooms = [1, *np.arange(1, 1.201, 0.02)]
    assert abs(slope / (0.8 / 200) - np.mean([1 / z for z in zooms])) < 0.01


def test_glass_blur_moves_pixels_no_further_than_its_shifts_and_keeps_their_number():
    pixels = np.zeros((99, 99, 3), np.uint8)
    pixels[:, 50:] = 255
    glass = values(corrupt(Image.fromarray(pixels), "glass_blur", 3, 0))[..., 0]
    reach = 2 * 3 * 2 + 9  # shift times rounds, as taker and as taken, and the blurs' tails
    assert (glass[:, : 50 - reach] < 0.01).all() and (glass[:, 50 + reach :] > 0.98).all()
    assert abs(glass.mean() - values(Image.fromarray(pixels)).mean()) < 0.01
    assert glass[:, 48:52].std() > 0.1


def test_contrast_has_the_worked_numbers():
    image = grey([[0, 1], [0.5, 0.25]])
    for severity, expected in ((3, [[0.35, 0.55], [0.45, 0.40]]), (5, [[0.415625, 0.465625], [0.440625, 0.428125]])):
        np.testing.assert_allclose(values(corrupt(image, "contrast", severity, 0))[..., 0], expected, atol=1.5 / 255)


def test_brightness_has_the_worked_numbers():
    colours = np.array([[(0.5, 0.25, 0), (0, 0, 0), (1, 1, 1), (0.9, 0.3, 0.6)]])
    expected = [[(0.7, 0.35, 0), (0.2, 0.2, 0.2), (1, 1, 1), (1, 1 / 3, 2 / 3)]]
    image = Image.fromarray(np.rint(colours * 255).astype(np.uint8))
    np.testing.assert_allclose(values(corrupt(image, "brightness", 2, 0)), expected, atol=2 / 255)


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_colour_changes_agree_with_the_standard_librarys_hsv(name, severity):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    pixels[0, :5] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0], [10, 10, 200]]
    got = np.asarray(corrupt(Image.fromarray(pixels), name, severity, 0)).astype(int)
    constant = table_for(name, 20, 20)[severity - 1]
    for place in np.ndindex(20, 20):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        if name == "brightness":
            v = min(1, v + constant)
        else:
            s = min(1, max(0, s * constant[0] + constant[1]))
        expected = np.array(colorsys.hsv_to_rgb(h, s, v)) * 255
        assert np.abs(got[place] - expected).max() < 1.01, (place, pixels[place])


def test_pixelate_has_the_worked_numbers():
    ramp = np.arange(16).reshape(4, 4) / 16
    blocks = values(corrupt(grey(ramp), "pixelate", 5, 0))[..., 0]  # small pictures: factor .5
    expected = np.kron([[0.15625, 0.28125], [0.65625, 0.78125]], np.ones((2, 2)))
    np.testing.assert_allclose(blocks, expected, atol=1.5 / 255)


def test_pixelate_leaves_as_many_cells_as_its_factor_says():
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    blocks = np.asarray(corrupt(Image.fromarray(pixels), "pixelate", 5, 0)).astype(int)
    assert (np.abs(np.diff(blocks, axis=0)).sum((1, 2)) > 0).sum() + 1 == 30
    assert (np.abs(np.diff(blocks, axis=1)).sum((0, 2)) > 0).sum() + 1 == 50


def test_jpeg_compression_is_the_encoder_at_that_quality():
    for severity, quality in enumerate((25, 18, 15, 10, 7), 1):
        file = io.BytesIO()
        photo().save(file, "JPEG", quality=quality)
        assert corrupt(photo(), "jpeg_compression", severity, 0).tobytes() == Image.open(file).tobytes()


def test_fog_has_the_worked_numbers(monkeypatch):
    monkeypatch.setattr(corruptions, "fractal", lambda height, width, decay, dice: np.array([[0, 1]], np.float32))
    u = corruptions.fog(np.rint(np.array([[[0.2] * 3, [0.8] * 3]]) * 255).astype(np.uint8), (1.5, 2), None)
    np.testing.assert_allclose(u[0, :, 0], [0.069565, 0.8], atol=1e-6)


def test_fog_roughness_shrinks_by_the_square_of_its_decay():
    heights = corruptions.fractal(512, 512, 1.5, np.random.default_rng(0)).astype(np.float64)
    deviations = []
    for step in (2, 4, 8):
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        mean = (pairs + np.roll(pairs, -1, 1)) / 4
        deviations.append((heights[step // 2 :: step, step // 2 :: step] - mean).std())
    np.testing.assert_allclose(np.divide(deviations[1:], deviations[:-1]), 1.5**2, rtol=0.05)
    assert heights.min() == 0 and heights.max() == 1


@pytest.mark.parametrize(
    "name, width, height, checksum",
    [
        ("fog", 128, 128, 3387641669),
        ("frost", 128, 128, 2245187563),
        ("fog", 640, 480, 155666506),
        ("frost", 640, 480, 13792871),
    ],
)
def test_fog_and_frost_of_usual_shapes_keep_the_bytes_that_published_figures_were_made_with(
    name, width, height, checksum
):
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, x * y % 256], -1).astype(np.uint8))
    assert zlib.crc32(corrupt(image, name, 3, 0).tobytes()) == checksum


@pytest.mark.parametrize("name", ["fog", "frost"])
@pytest.mark.parametrize("size", [(200, 200), (100, 900), (8000, 40)])
def test_fog_and_frost_take_memory_by_the_number_of_pixels(name, size):
    image = Image.new("RGB", size, "teal")
    tracemalloc.start()
    corrupt(image, name, 3, 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60 * image.width * image.height  # three channels in float32, a few times over


@pytest.mark.parametrize("shape", [(64, 1280), (1280, 64)])
def test_elongated_fog_is_as_light_and_as_rough_as_square_fog(shape):
    draws = [np.random.default_rng(seed) for seed in range(30)]
    square, long = (np.array([corruptions.fractal(*s, 1.6, d) for d in draws]) for s in ((64, 64), shape))
    assert abs(long.mean() - square.mean()) < 0.03
    assert abs(long.std(axis=(1, 2)).mean() / square.std(axis=(1, 2)).mean() - 1) < 0.15


def test_elongated_fog_has_no_seams():
    # It begins with squares of 64: across their borders it changes as it does everywhere, and corners are like others.
    fogs = np.array([corruptions.fractal(64, 1280, 1.6, np.random.default_rng(seed)) for seed in range(100)])
    steps = np.abs(np.diff(fogs, axis=2)).mean((0, 1))  # from each column to the next
    assert abs(steps[63::64].mean() / steps.mean() - 1) < 0.15
    assert abs(fogs[:, 0, ::64].std() / fogs.std() - 1) < 0.15
    assert not np.array_equal(fogs[0, :, :64], fogs[0, :, 64:128]), "not one square again and again"


def test_elastic_transform_moves_by_a_smooth_field_of_its_strength():
    # On a ramp along x, the change of brightness is the displacement along x.
    height, width = 200, 300
    ramp = np.tile(np.linspace(0, 1, width), (height, 1))
    inner = (slice(40, -40), slice(60, -60))
    moved = (values(corrupt(grey(ramp), "elastic_transform", 3, 0))[..., 0] - ramp)[inner] * (width - 1)
    # Uniform in +-1, smoothed by Gaussians of 2 and 3 pixels: variance 1/3 over 4 pi times both widths.
    expected = 21.25 * np.sqrt((1.0**2 / 3) / (4 * np.pi * 2 * 3))
    assert abs(moved.std() / expected - 1) < 0.12
    assert np.abs(np.diff(moved, axis=1)).mean() < 0.6 * moved.std(), "smooth"


def test_mirrors_stand_at_the_outer_edges():
    assert corruptions.mirrored(np.arange(-4, 8), 3).tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1]


# ------------------------------------------------------------------------------------------------------------ any input


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_any_mode_becomes_rgb(mode):
    image = photo(40, 50).convert("L").convert("I").convert(mode) if mode == "I;16" else photo(40, 50).convert(mode)
    assert corrupt(image, "gaussian_blur", 1, 0).mode == "RGB"


@pytest.mark.parametrize(
    "mode, white, dtype",
    [("I;16", 65535, np.uint16), ("I", 255, np.int32), ("F", 255, np.float32), ("F", 1, np.float32)],
)
def test_more_than_8_bits_give_the_same_picture(mode, white, dtype):
    eight = photo(40, 50).convert("L")
    levels = np.asarray(eight)
    image = Image.fromarray((levels * (white / 255)).astype(dtype))
    assert image.mode == mode
    np.testing.assert_allclose(corruptions.rgb(image)[..., 0], levels, atol=1)
    corrupted, expected = (values(corrupt(i, "brightness", 3, 0)) for i in (image, eight))
    np.testing.assert_allclose(corrupted, expected, atol=2 / 255)


def test_a_picture_that_says_it_lies_on_its_side_keeps_its_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo(40, 50).save(file, "JPEG", exif=exif)
    assert corrupt(Image.open(file), "fog", 1, 0).size == (50, 40)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert np.asarray(corrupt(image, "gaussian_blur", 3, 0)).min() == 255


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="'fogg' is not one of gaussian_noise, "):
        corrupt(photo(), "fogg", 1, 0)
    with pytest.raises(ValueError, match="'fogg' is not one of seen, unseen, all, gaussian_noise, "):
        choose(("seen", "fogg"))
    for severity in (0, 6, 2.5, "3", 3.0, np.float64(2)):
        with pytest.raises(ValueError, match=r"severity .*: must be one of 1, 2, 3, 4, 5"):
            corrupt(photo(), "fog", severity, 0)
    for seed in (-1, 1.5, (0, -1), (0, 1.5), None, "7"):
        with pytest.raises(ValueError, match=r"^seed .*: must be whole numbers of at least 0$"):
            corrupt(photo(), "fog", 1, seed)
    file = io.BytesIO()
    photo().save(file, "PNG")
    truncated = Image.open(io.BytesIO(file.getvalue()[:400]))
    with pytest.raises(ValueError, match="the image cannot be decoded: "):
        corrupt(truncated, "fog", 1, 0)


def test_numpys_whole_numbers_are_whole_numbers():
    ours = corrupt(photo(), "gaussian_noise", 3, (1, 2))
    assert corrupt(photo(), "gaussian_noise", np.int64(3), (np.uint8(1), np.int32(2))).tobytes() == ours.tobytes()


def test_contact_sheet_is_one_command(tmp_path):
    photo(300, 200).save(tmp_path / "photo.jpg")
    args = corruptions.Args(
        out=str(tmp_path / "sheet.png"), image=str(tmp_path / "photo.jpg"), names=("fog", "seen"), side=64
    )
    corruptions.main(args)
    assert Image.open(tmp_path / "sheet.png").size == (150 + 6 * 68, 6 * (96 + 4) + 20)


def test_contact_sheet_turns_a_photo_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    photo(200, 300).save(tmp_path / "photo.jpg", exif=exif)
    corruptions.main(
        corruptions.Args(out=str(tmp_path / "sheet.png"), image=str(tmp_path / "photo.jpg"), names=("fog",), side=64)
    )
    assert Image.open(tmp_path / "sheet.png").size == (150 + 6 * 68, 1 * (96 + 4) + 20)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"names": ("fogg",)}, "--names: corruption 'fogg' is not one of "),
        ({"side": 0}, "--side 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"out": "no/such/sheet.png"}, "--out no/such/sheet.png: its folder does not exist"),
        ({"out": "folder.png"}, "--out folder.png: is a folder; name a picture"),
        ({"out": "sheet.xyz"}, "--out sheet.xyz: '.xyz' is no ending of pictures that can be written"),
        ({"out": "sheet"}, "--out sheet: '' is no ending of pictures that can be written"),
        ({"out": "sheet.xbm"}, "--out sheet.xbm: cannot write mode RGB"),
        ({"image": "absent.png"}, "--image absent.png: .*No such file"),
        ({"image": "text.png"}, "--image text.png: .*not in a known format"),
        ({"image": "bomb.png"}, "--image bomb.png: .*decompression bomb"),
        ({"image": "large.png"}, "--image large.png: .*more than 100,000,000"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    if flags.get("image") in ("bomb.png", "large.png"):
        height = {"bomb.png": 20_000, "large.png": 11_000}[flags["image"]]
        Image.new("1", (10_000, height)).save(flags["image"])
    with pytest.raises(SystemExit, match=message) as error:
        corruptions.main(corruptions.Args(**{"names": ("contrast",), **flags}))
    assert "\n" not in str(error.value)
