"""Named, seeded image corruptions at severities 1 to 5: the fifteen of ImageNet-C, its four extra ones, and a scan.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019,
arXiv 1903.12261). Constants are theirs: those of ImageNet-C where an image's short side has at least 96 pixels, those
of Tiny-ImageNet-C below (`table_for`). A constant in pixels stays one: a blur is milder on a larger picture.

    python -m common.corruptions --out corruptions.png                  # every corruption at every severity
    python -m common.corruptions --image photo.jpg --out corruptions.png

Three things differ from the published code. Frost and the relief of spatter's drops come from textures that are made
here (the authors photographed frost, and trace drops with an edge detector), so these two resemble the originals in
strength and look, not pixel by pixel. The exchanges of glass_blur run over the picture in lattices, not bottom-up. And
`low_resolution_scan` is ours: a page at few dots per inch, grey, slightly skewed, noisy and compressed.

The same (image, name, severity, seed) gives the same bytes. Sizes never change, so a corrupted picture fills the same
image tokens as the clean one.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.fft import irfft2, next_fast_len, rfft2
from scipy.special import ndtri, pdtr

from common.data.images import open_image, plain_rgb

# For training (ROMA) and evaluation; and for evaluation only. Disjoint by name. Seen: noise, blur, low resolution,
# compression; unseen: one of every family of ImageNet-C.
SEEN = ("gaussian_noise", "gaussian_blur", "motion_blur", "pixelate", "jpeg_compression")
UNSEEN = ("impulse_noise", "defocus_blur", "elastic_transform", "contrast", "fog")
SMALL = 96  # pixels: images whose short side is below take the constants tuned for small images
ELONGATED = 4  # an image more than so many times as long as wide gets fog and frost from a row of squares

# Five constants a table, for severities 1 to 5: (large images, small images), or one table for both.
CONSTANTS = {
    "gaussian_noise": ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.08, 0.12, 0.15, 0.18)),
    "shot_noise": ((60, 25, 12, 5, 3), (250, 100, 50, 30, 15)),
    "impulse_noise": ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.05, 0.08, 0.14)),
    "speckle_noise": ((0.15, 0.2, 0.35, 0.45, 0.6), (0.15, 0.2, 0.25, 0.3, 0.35)),
    "gaussian_blur": ((1, 2, 3, 4, 6), (0.5, 0.75, 1, 1.25, 1.5)),
    # radius of the disk, smoothing of its edge
    "defocus_blur": (
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    ),
    # sigma, largest shift, rounds
    "glass_blur": (
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    ),
    # reach, sigma
    "motion_blur": (
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    ),
    # largest zoom, step from 1 up to it
    "zoom_blur": (
        ((1.11, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.15, 0.01), (1.2, 0.01), (1.25, 0.01)),
    ),
    # of the flakes: mean, deviation, zoom, threshold, reach and sigma of their fall; weight of the image
    "snow": (
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
    ),
    # weights of the image and of the frost
    "frost": (
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    ),
    # amount, decay of the roughness
    "fog": (
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    ),
    "brightness": ((0.1, 0.2, 0.3, 0.4, 0.5),),
    "contrast": ((0.4, 0.3, 0.2, 0.1, 0.05),),
    # factor and addend of the saturation
    "saturate": (((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)), ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2))),
    # of the liquid: mean, deviation, smoothing, threshold; strength (water) or smoothing (mud); 1: mud
    "spatter": (
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    "pixelate": ((0.6, 0.5, 0.4, 0.3, 0.25), (0.9, 0.8, 0.7, 0.6, 0.5)),
    "jpeg_compression": ((25, 18, 15, 10, 7), (65, 58, 50, 40, 25)),
    "elastic_transform": ((12.5, 16.25, 21.25, 25, 30),),
    # resolution, skew in degrees, grey noise, compression quality
    "low_resolution_scan": (
        (
            (0.6, 0.3, 0.01, 60),
            (0.45, 0.6, 0.02, 45),
            (0.35, 0.9, 0.03, 35),
            (0.25, 1.2, 0.04, 25),
            (0.18, 1.5, 0.05, 18),
        ),
        ((0.9, 0.3, 0.01, 80), (0.75, 0.6, 0.02, 65), (0.6, 0.9, 0.03, 50), (0.5, 1.2, 0.04, 40), (0.4, 1.5, 0.05, 30)),
    ),
}
NAMES = tuple(CONSTANTS)


def corrupt(image: Image.Image, name: str, severity: int, seed: int | tuple[int, ...]) -> Image.Image:
    """The picture, corrupted: RGB of the same size. `seed` is a whole number or several, all of them at least 0.

    Any mode is taken: transparency is laid on white, what has other than 8 bits is scaled to them (`plain_rgb`).

    Raises:
        ValueError: an unknown name, a severity that is not one of 1 to 5, a seed that is negative or not whole, or a
            picture that cannot be decoded.
    """
    if name not in CONSTANTS:
        raise ValueError(f"corruption {name!r} is not one of {', '.join(NAMES)}")
    if not isinstance(severity, int | np.integer) or severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity {severity!r}: must be one of 1, 2, 3, 4, 5")
    seeds = seed if isinstance(seed, tuple | list) else (seed,)
    if not all(isinstance(number, int | np.integer) and number >= 0 for number in seeds):
        raise ValueError(f"seed {seed!r}: must be whole numbers of at least 0")
    pixels = rgb(image)
    dice = np.random.default_rng([NAMES.index(name), severity, *seeds])
    constant = table_for(name, *pixels.shape[:2])[severity - 1]
    result = FUNCTIONS[name](pixels, constant, dice)
    return Image.fromarray(result if result.dtype == np.uint8 else to_bytes(result))


def table_for(name: str, height: int, width: int) -> tuple:
    """The five constants of a corruption for a picture of this size."""
    tables = CONSTANTS[name]
    return tables[-1] if min(height, width) < SMALL else tables[0]


def choose(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of corruptions, with `seen`, `unseen` and `all` replaced by what they stand for; each once, in order.

    Raises:
        ValueError: a name that is none of these.
    """
    sets = {"seen": SEEN, "unseen": UNSEEN, "all": NAMES}
    chosen = [member for name in names for member in sets.get(name, (name,))]
    for name in chosen:
        if name not in CONSTANTS:
            raise ValueError(f"corruption {name!r} is not one of {', '.join([*sets, *NAMES])}")
    return tuple(dict.fromkeys(chosen))


def check_corruptions(names: tuple[str, ...], severities: tuple[int, ...], prefix: str = "--") -> tuple[str, ...]:
    """What `choose` makes of the names behind the flag `--corruptions`, or `--train-corruptions` with that prefix.

    Raises:
        SystemExit: one line, where a name or a severity is unknown or there is none.
    """
    try:
        chosen = choose(names)
    except ValueError as error:
        raise SystemExit(f"{prefix}corruptions: {error}") from None
    if not names or not severities:
        raise SystemExit(f"{prefix}{'severities' if names else 'corruptions'}: nothing stands behind it")
    if not set(severities) <= {1, 2, 3, 4, 5}:
        raise SystemExit(f"{prefix}severities {' '.join(map(str, severities))}: each must be one of 1 to 5")
    return chosen


def rgb(image: Image.Image) -> np.ndarray:
    """Pixels [H, W, 3] uint8 of a picture of any mode."""
    try:
        return np.asarray(plain_rgb(image))  # not turned upright: the same size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image cannot be decoded: {error}") from None


def to_bytes(u: np.ndarray) -> np.ndarray:
    """uint8 from values in [0, 1]; what lies outside is clipped, fractions are dropped as the authors' code does."""
    u = u * np.float32(255)
    return np.clip(u, 0, 255, out=u).astype(np.uint8)


def unit(pixels: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] from uint8."""
    return pixels * np.float32(1 / 255)


# ----------------------------------------------------------- noise: (pixels uint8, constant, dice) -> pixels or [0, 1]


def words(dice: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random uint16: places in tables of equally likely outcomes, which is many times faster than drawing from a
    distribution, and finer than 8 bits show."""
    count = math.prod(shape)
    return dice.bit_generator.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count].reshape(shape)


@cache
def normal_table() -> np.ndarray:
    """65,536 equally likely numbers that together are a standard normal distribution."""
    return ndtri((np.arange(65536) + 0.5) / 65536)


def gaussian_noise(pixels, std, dice):
    steps = np.floor(255 * std * normal_table()).astype(np.int16)  # pixels are whole: only whole steps show
    noisy = steps.take(words(dice, pixels.shape))
    noisy += pixels
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


def shot_noise(pixels, rate, dice):
    table = shot_table(rate)
    places = pixels.astype(np.int32) * table.shape[1]
    places += words(dice, pixels.shape) % np.uint16(table.shape[1])
    return table.ravel().take(places)


@lru_cache(5)
def shot_table(rate: float, size: int = 2**14) -> np.ndarray:
    """What each of the 256 levels becomes, [256, size] equally likely outcomes: photons, Poisson, `rate` in white."""
    counts = np.arange(math.ceil(rate + 10 * math.sqrt(rate)) + 10)
    ends = np.rint(size * pdtr(counts, rate * np.arange(256)[:, None] / 255)).astype(int)  # [256, counts]
    ends[:, -1] = size
    return np.repeat(np.tile(to_bytes(counts / rate), 256), np.diff(ends, axis=1, prepend=0).ravel()).reshape(256, size)


def impulse_noise(pixels, share, dice):
    draw, half = words(dice, pixels.shape), round(65536 * share / 2)
    return np.where(draw < half, np.uint8(0), np.where(draw >= 65536 - half, np.uint8(255), pixels))


def speckle_noise(pixels, std, dice):
    noisy = (1 + std * normal_table()).astype(np.float32).take(words(dice, pixels.shape))
    noisy *= pixels
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- blur


def gaussian_blur(pixels, sigma, dice):
    return blur(unit(pixels), sigma)


def blur(u: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian over the two spatial axes of [H, W] or [H, W, 3] float32, edges repeated, cut at 4 sigma."""
    for axis in (0, 1):
        u = ndimage.gaussian_filter1d(u, sigma, axis=axis, mode="nearest")
    return u


def defocus_blur(pixels, constant, dice):
    return convolve(unit(pixels), disk(*constant))


def disk(radius: float, smoothing: float) -> np.ndarray:
    """A disk of sum 1, its edge softened by a narrow Gaussian of 3 taps, of 5 where the radius exceeds 8."""
    reach = 8 if radius <= 8 else math.ceil(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (x * x + y * y <= radius * radius).astype(np.float64)
    kernel = ndimage.gaussian_filter(kernel, smoothing, radius=1 if radius <= 8 else 2, mode="mirror")
    return kernel / kernel.sum()


def convolve(u: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[H, W, 3] float32 by a symmetric kernel of odd size, mirrored at the border, by Fourier transform."""
    height, width, _ = u.shape
    reach = len(kernel) // 2
    padded = np.pad(u, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = [next_fast_len(size, real=True) for size in padded.shape[:2]]
    spectrum = rfft2(kernel.astype(np.float32), shape, axes=(0, 1))
    result = np.empty_like(u)
    for channel in range(3):
        whole = irfft2(rfft2(padded[..., channel], shape, axes=(0, 1)) * spectrum, shape, axes=(0, 1))
        result[..., channel] = whole[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return result


def motion_blur(pixels, constant, dice):
    reach, sigma = constant
    return drag(unit(pixels), reach, sigma, dice.uniform(-45, 45))


def drag(u: np.ndarray, reach: int, sigma: float, degrees: float) -> np.ndarray:
    """[H, W] or [H, W, 3] float32, dragged along a direction: copies moved by 0 to 2 reach pixels, weighed by half a
    Gaussian; edges repeated."""
    height, width = u.shape[:2]
    steps = np.arange(2 * reach + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    slope = math.radians(degrees)
    down = np.clip(np.rint(steps * math.sin(slope)).astype(int), -height + 1, height - 1)
    right = np.clip(np.rint(steps * math.cos(slope)).astype(int), -width + 1, width - 1)
    pad = [(max(0, down.max()), max(0, -down.min())), (max(0, right.max()), max(0, -right.min()))]
    padded = np.pad(u, pad + [(0, 0)] * (u.ndim - 2), mode="edge")
    result, product = np.zeros_like(u), np.empty_like(u)
    for weight, y, x in zip(weights.astype(np.float32), pad[0][0] - down, pad[1][0] - right, strict=True):
        result += np.multiply(padded[y : y + height, x : x + width], weight, out=product)
    return result


def zoom_blur(pixels, constant, dice):
    most, step = constant
    image, total = Image.fromarray(pixels), pixels.astype(np.uint32)
    zooms = 1 + step * np.arange(round((most - 1) / step) + 1)
    for zoom in zooms:
        total += np.asarray(zoomed(image, zoom))
    return total * np.float32(1 / 255 / (len(zooms) + 1))


def zoomed(image: Image.Image, zoom: float) -> Image.Image:
    """The middle of a picture, enlarged bilinearly to its whole size."""
    width, height = image.size
    x, y = (width - width / zoom) / 2, (height - height / zoom) / 2
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, width - x, height - y))


def glass_blur(pixels, constant, dice):
    sigma, shift, rounds = constant
    height, width, _ = pixels.shape
    u = to_bytes(blur(unit(pixels), sigma))
    # Each pixel's surroundings are as wide as the lattice's mesh: exchanges of one pass cannot touch each other.
    mesh = 2 * shift + 1
    packed = np.zeros((height, width, 4), np.uint8)
    packed[..., :3] = u
    packed = packed.view(np.uint32).ravel()
    passes = [(y, x) for y in range(mesh) for x in range(mesh)] * rounds
    for y0, x0 in passes:
        rows, columns = np.arange(shift + y0, height - shift, mesh), np.arange(shift + x0, width - shift, mesh)
        here = (rows[:, None] * width + columns).ravel()
        moves = dice.integers(-shift, shift, (2, len(here)), dtype=np.int32)  # the authors' range: never +shift
        there = here + moves[0] * width + moves[1]
        packed[here], packed[there] = packed[there], packed[here]
    u = packed.view(np.uint8).reshape(height, width, 4)[..., :3]
    return blur(unit(u), sigma)


# ------------------------------------------------------------------------------------------------------------- weather


def snow(pixels, constant, dice):
    mean, std, zoom, threshold, reach, sigma, weight = constant
    height, width, _ = pixels.shape
    flakes = dice.standard_normal((height, width), dtype=np.float32) * np.float32(std) + np.float32(mean)
    flakes = np.asarray(zoomed(Image.fromarray(flakes), zoom))
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = drag(flakes, reach, sigma, dice.uniform(-135, -45))[..., None]
    u = unit(pixels)
    grey = u @ np.array([0.299, 0.587, 0.114], np.float32)
    whitened = np.maximum(u, grey[..., None] * np.float32(1.5) + np.float32(0.5))
    return u * np.float32(weight) + whitened * np.float32(1 - weight) + flakes + flakes[::-1, ::-1]


def frost(pixels, constant, dice):
    weight, strength = constant
    height, width, _ = pixels.shape
    return unit(pixels) * np.float32(weight) + frost_texture(height, width, dice) * np.float32(strength)


def frost_texture(height: int, width: int, dice: np.random.Generator) -> np.ndarray:
    """Ice on a window [H, W, 3] in [0, 1]: needles that radiate from the edges over a cloudy film, cold white.

    Needles are noise dragged along a few directions and sharpened; they thin out towards the middle.
    """
    small = max(1, round(height / 2)), max(1, round(width / 2))  # made at half size, as a photograph would be softer
    ice = np.zeros(small, np.float32)
    for degrees in dice.uniform(0, 180, 5):
        sparks = (dice.random(small, dtype=np.float32) > 0.97).astype(np.float32)
        needles = drag(sparks, max(2, min(small) // 12), max(1.0, min(small) / 16), degrees)
        ice = np.maximum(ice, needles / max(float(needles.max()), 1e-6))
    film = fractal(*small, 1.6, dice)
    y, x = (np.abs(np.linspace(-1, 1, size, dtype=np.float32)) for size in small)
    rim = np.maximum(y[:, None], x[None]) * 0.6 + 0.4  # thicker where the pane is coldest
    ice = np.clip(0.55 * film * rim + 0.9 * ice * np.clip(film * 1.6 - 0.2, 0, 1) * rim, 0, 1)
    ice = np.asarray(Image.fromarray(ice.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    return ice[..., None] * np.array([0.9, 0.97, 1.0], np.float32)


def fog(pixels, constant, dice):
    amount, decay = constant
    height, width, _ = pixels.shape
    brightest = float(pixels.max()) / 255
    dim = np.float32(brightest / (brightest + amount))
    fog = fractal(height, width, decay, dice) * (dim * np.float32(amount))
    return pixels * (dim / np.float32(255)) + fog[..., None]


def fractal(height: int, width: int, decay: float, dice: np.random.Generator) -> np.ndarray:
    """A height map [H, W] float32, cut from one that spans [0, 1]: diamonds and squares on a torus.

    At each halving of the mesh a point becomes the mean of its four neighbours plus a perturbation. In the authors'
    code its amplitude is the square of a number that `decay` divides, and the constants are tuned to that.
    """
    side = first_mesh(height, width)
    heights = np.zeros([-(-size // side) * side for size in (height, width)], np.float32)
    if heights.size > side * side:  # heights of 0 at all corners of a row of squares would show as a pattern
        heights[::side, ::side] = perturbed(heights[::side, ::side], 1.0, dice)
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        centres = perturbed(pairs + np.roll(pairs, -1, 1), amplitude, dice)
        heights[half::step, half::step] = centres
        across = centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        heights[::step, half::step] = perturbed(across, amplitude, dice)
        down = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        heights[half::step, ::step] = perturbed(down, amplitude, dice)
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min()
    heights /= max(float(heights.max()), 1e-6)
    return heights[:height, :width]


def first_mesh(height: int, width: int) -> int:
    """Side of the squares that a height map begins with, a power of two: one square around the whole picture, or a row
    of them along an elongated one, where a single square would take memory by the square of the longer side."""
    shorter, longer = max(min(height, width), 16), max(height, width)  # smaller squares would be noise rather than fog
    side = longer if longer <= ELONGATED * shorter else shorter
    return 1 << (side - 1).bit_length()


def perturbed(total: np.ndarray, amplitude: float, dice: np.random.Generator) -> np.ndarray:
    """A quarter of the neighbours' sum, plus something between -amplitude and amplitude."""
    noise = words(dice, total.shape) * np.float32(amplitude / 32768)
    noise += total * np.float32(0.25)
    noise -= np.float32(amplitude)
    return noise


def spatter(pixels, constant, dice):
    mean, std, smoothing, threshold, strength, mud = constant
    height, width, _ = pixels.shape
    liquid = dice.standard_normal((height, width), dtype=np.float32) * np.float32(std) + np.float32(mean)
    liquid = blur(liquid, smoothing)
    u = unit(pixels)
    if mud:
        cover = blur((liquid > threshold).astype(np.float32), strength)
        cover[cover < 0.8] = 0
        cover = cover[..., None]
        return u * (1 - cover) + cover * (np.array([63, 42, 20], np.float32) / 255)
    wet = liquid >= threshold
    # Light gathers at the rims of the drops: relief falls off with the distance from the rim, inside and out.
    rim = wet ^ ndimage.binary_erosion(wet, border_value=1)
    distance = np.minimum(ndimage.distance_transform_edt(~rim), 20) if rim.any() else np.full(wet.shape, 20.0)
    relief = ndimage.uniform_filter(1 - distance.astype(np.float32) / 20, 3, mode="mirror")
    drops = np.where(wet, liquid * relief, 0)
    drops *= np.float32(strength) / max(float(drops.max()), 1e-6)
    return u + drops[..., None] * (np.array([175, 238, 238], np.float32) / 255)


# ---------------------------------------------------------------------------------------------- tone, resolution, form


def brightness(pixels, added, dice):
    # Raising the value of HSV keeps hue and saturation: all three channels grow by one factor.
    levels = np.arange(256, dtype=np.float64)
    target = np.minimum(levels + 255 * added, 255)
    value = extremes(pixels)[0]
    brighter = pixels * (target / np.maximum(levels, 1)).astype(np.float32).take(value)[..., None]
    brighter[value == 0] = target[0]
    return np.clip(brighter, 0, 255, out=brighter).astype(np.uint8)


def contrast(pixels, factor, dice):
    image, levels = Image.fromarray(pixels), np.arange(256)
    counts = np.reshape(image.histogram(), (3, 256))
    means = counts @ levels / counts.sum(1)  # [3]
    return np.asarray(
        image.point(to_bytes(((levels - means[:, None]) * factor + means[:, None]) / 255).ravel().tolist())
    )


def saturate(pixels, constant, dice):
    factor, added = constant
    # In HSV with the value V fixed and m the least channel, S = (V - m) / V: a channel's distance V - x below the
    # value grows by S' / S.
    value, least = extremes(pixels)
    v, m = np.arange(256.0)[:, None], np.arange(256.0)
    spread = np.maximum(v - m, 1)
    growth = np.clip((v - m) / np.maximum(v, 1) * factor + added, 0, 1) * v / spread  # [256, 256]
    top = value[..., None].astype(np.float32)
    result = top - (top - pixels) * growth.astype(np.float32).take(value * np.int32(256) + least)[..., None]
    if added:  # a grey pixel has hue 0, red, in the authors' HSV; saturation that is added colours it
        result[..., 1:][value == least] = (value[value == least] * np.float32(1 - added))[:, None]
    return np.clip(result, 0, 255, out=result).astype(np.uint8)


def extremes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the least channel [H, W] uint8 of each pixel."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def pixelate(pixels, factor, dice):
    height, width, _ = pixels.shape
    image = Image.fromarray(pixels)
    small = image.resize((max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(pixels, quality, dice):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def elastic_transform(pixels, strength, dice):
    height, width, _ = pixels.shape
    shape, reach = (height, width), 0.005 * height
    fields = []
    for _ in range(2):
        field = dice.random(shape, dtype=np.float32) * np.float32(2 * reach) - np.float32(reach)
        for axis in (0, 1):
            field = ndimage.gaussian_filter1d(field, 0.01 * shape[axis], axis=axis, mode="reflect", truncate=3)
        fields.append(field * np.float32(strength))
    y, x = np.arange(height, dtype=np.float32)[:, None] + fields[0], np.arange(width, dtype=np.float32) + fields[1]
    y0, x0 = np.floor(y), np.floor(x)
    fy, fx = (y - y0)[..., None], (x - x0)[..., None]
    rows, columns = (mirrored(y0, height), mirrored(y0 + 1, height)), (mirrored(x0, width), mirrored(x0 + 1, width))
    u = unit(pixels).reshape(-1, 3)
    taken = [[u.take(row * width + column, axis=0) for column in columns] for row in rows]
    upper = taken[0][0] + (taken[0][1] - taken[0][0]) * fx
    lower = taken[1][0] + (taken[1][1] - taken[1][0]) * fx
    return upper + (lower - upper) * fy


def mirrored(places: np.ndarray, size: int) -> np.ndarray:
    """Whole numbers folded into [0, size) by mirrors at the outer edges of the first and the last pixel."""
    folded = places.astype(np.int32) % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)


def low_resolution_scan(pixels, constant, dice):
    resolution, skew, noise, quality = constant
    height, width, _ = pixels.shape
    image = Image.fromarray(pixels).convert("L")
    angle = skew * float(dice.uniform(0.5, 1)) * (1 if dice.random() < 0.5 else -1)
    image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255)
    size = max(1, int(width * resolution)), max(1, int(height * resolution))
    grey = unit(np.asarray(image.resize(size, Image.Resampling.BOX)))
    grey = grey + dice.standard_normal(grey.shape, dtype=np.float32) * np.float32(noise)
    file = io.BytesIO()
    Image.fromarray(to_bytes(grey)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))


FUNCTIONS: dict[str, Callable] = {name: globals()[name] for name in NAMES}


# ------------------------------------------------------------------------------------------------------- contact sheet


@dataclass
class Args:
    out: str = "corruptions.png"
    """picture to write"""
    image: str = ""
    """picture to corrupt (default: a built-in puzzle)"""
    names: tuple[str, ...] = ("all",)
    """corruptions: names, seen, unseen, all"""
    side: int = 128
    """width of each cell in pixels; a larger picture is reduced to it before it is corrupted"""
    seed: int = 0


def contact_sheet(image: Image.Image, names: tuple[str, ...], seed: int) -> Image.Image:
    """A row a corruption: its name, the clean picture, severities 1 to 5."""
    width, height = image.size
    sheet = Image.new("RGB", (150 + 6 * (width + 4), len(names) * (height + 4) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["clean", *map(str, range(1, 6))]):
        draw.text((150 + column * (width + 4), 4), title, fill="black")
    for row, name in enumerate(names):
        y = 20 + row * (height + 4)
        part = " (seen)" if name in SEEN else " (unseen)" if name in UNSEEN else ""
        draw.text((4, y + height // 2 - 6), name + part, fill="black")
        for column in range(6):
            cell = corrupt(image, name, column, seed) if column else Image.fromarray(rgb(image))
            sheet.paste(cell, (150 + column * (width + 4), y))
    return sheet


def main(args: Args) -> None:
    try:
        names = choose(args.names)
    except ValueError as error:
        raise SystemExit(f"--names: {error}") from None
    if args.side < 1:
        raise SystemExit(f"--side {args.side}: must be at least 1")
    if args.seed < 0:
        raise SystemExit(f"--seed {args.seed}: must be at least 0")
    check_out(args.out)
    if args.image:
        try:
            image = open_image(Path(args.image).read_bytes(), None)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--image {args.image}: {error}") from None
        image.thumbnail((args.side, args.side * 4))
    else:
        from common.data.puzzles import puzzle

        image = puzzle("test", 0).image
    sheet = contact_sheet(image, names, args.seed)
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:  # no right to write there, a full disk, a format without such pictures
        raise SystemExit(f"--out {args.out}: {error}") from None
    print(f"{args.out}: {len(names)} corruptions at severities 1 to 5")


def check_out(out: str) -> None:
    """Stop, one line, where no picture of this name can be written: before the work rather than after it."""
    path = Path(out)
    if not path.parent.is_dir():
        raise SystemExit(f"--out {out}: its folder does not exist")
    if path.is_dir():
        raise SystemExit(f"--out {out}: is a folder; name a picture")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise SystemExit(f"--out {out}: {path.suffix!r} is no ending of pictures that can be written, such as .png")


if __name__ == "__main__":
    main(tyro.cli(Args))
