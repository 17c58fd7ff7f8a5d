"""Milliseconds of each corruption beside the package `imagecorruptions`, on one picture of 640 x 480 pixels.

    pip install imagecorruptions "numpy<2"    # in an environment of its own: it needs an old numpy
    python -m tests.benchmarks.corruptions

Both are timed in turn, severity 3, the fastest of some calls each; a ratio above 1 says how many times faster ours is.
"""

import statistics
import time
import warnings
from dataclasses import dataclass

import numpy as np
import tyro
from PIL import Image

from common.corruptions import NAMES, corrupt


@dataclass
class Options:
    width: int = 640
    height: int = 480
    severity: int = 3
    calls: int = 5
    """timed calls of each, after one that is not"""


def fastest(function, calls: int) -> float:
    function()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(options: Options) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import imagecorruptions.corruptions as package
            from imagecorruptions import corrupt as peer

            smooth = package.gaussian  # newer versions of scikit-image have renamed an argument
            package.gaussian = lambda x, sigma, multichannel=False, **options: smooth(
                x, sigma, channel_axis=-1 if multichannel else None, **options
            )
    except ImportError:
        peer = None
        print("imagecorruptions is not installed: ours alone")
    y, x = np.mgrid[: options.height, : options.width]
    pixels = np.stack([x * 255 // options.width, y * 255 // options.height, (x * y) % 256], -1).astype(np.uint8)
    image, ratios = Image.fromarray(pixels), {}
    print(f"{'milliseconds':22}{'ours':>8}{'theirs':>10}{'ratio':>8}")
    for name in NAMES:
        ours = fastest(lambda name=name: corrupt(image, name, options.severity, 0), options.calls)
        theirs = None
        if peer and name != "low_resolution_scan":
            theirs = fastest(
                lambda name=name: peer(pixels, corruption_name=name, severity=options.severity), options.calls
            )
            ratios[name] = theirs / ours
        beside = f"{1e3 * theirs:10.1f}{ratios[name]:8.1f}" if theirs else ""
        print(f"{name:22}{1e3 * ours:8.1f}{beside}", flush=True)
    if ratios:
        print(f"median ratio {statistics.median(ratios.values()):.1f}, least {min(ratios.values()):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
