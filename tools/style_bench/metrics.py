"""What is measured on pictures: pure functions of tensors.

Legend: N pictures, P prompts, S pictures of each prompt, D features, K styles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16
"""Side in pixels of the small pictures in which copies are looked for.

Source: measured on training pictures of four styles after a blur of 3 pixels: 16 finds 80 to 100 % of them, 32 finds
23 to 100 % (openmoji is the hard one); of unrelated pictures both find 1 % by definition.
"""
SHIFT = 4
"""Pixels, of 128, by which a copy may be moved up, down or sideways.

Source: as above after a shift of 3 pixels: 0 to 77 % are found without this, 87 to 100 % with it.
"""
COPY_QUANTILE = 0.01
"""Share of real, unrelated pictures that count as copies by the definition of the threshold."""


def paired_win(features: Tensor, target: Tensor, others: Tensor, there: Tensor) -> Tensor:
    """Tells which pictures look more like the real picture of the style than like the same thing in any other style.

    A judge may call a picture by the target's name because no other name fits; this compares it with what it should
    look like. Distances are between directions (cosine), since a style is a direction in the judge's last layer.

    Args:
        features: of the drawn pictures, (N, D).
        target: of the real pictures of the same concepts in the target style, (N, D).
        others: the same in K other styles, (K, N, D).
        there: which of `others` exist, (K, N), bool.

    Returns:
        (N,), bool.
    """
    features, target, others = (F.normalize(f.float(), dim=-1) for f in (features, target, others))
    right = (features * target).sum(-1)
    wrong = (features * others).sum(-1).masked_fill(~there, -torch.inf)
    return (right > wrong).all(0)


def thumbnails(pictures: Tensor) -> Tensor:
    """Returns what is compared to find copies and to tell the pictures of one prompt apart.

    Pixels and not a judge's features: a copy repeats a training picture where it stands, and the features of the
    concept judge would call every second heart a copy of a heart. The white ground becomes zero and the length one, so
    that pale or blurred pictures do not count as near to everything.

    Args:
        pictures: (N, 3, H, W) in [0, 1], on white.

    Returns:
        (N, 3 * 16 * 16), of length 1; an empty white picture is all zero.
    """
    small = F.interpolate(pictures.float(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    return F.normalize((1 - small).flatten(1), dim=1)


def moved_thumbnails(pictures: Tensor) -> Tensor:
    """Returns the thumbnails of training pictures as they are and moved by `SHIFT`: (N, 3, H, W) -> (9 * N, D).

    What leaves the picture on one side comes back on the other; the margin there is white.
    """
    steps = (-SHIFT, 0, SHIFT)
    return torch.cat([thumbnails(pictures.roll((down, right), (2, 3))) for down in steps for right in steps])


def nearest(these: Tensor, those: Tensor) -> Tensor:
    """Returns the Euclidean distance of each of `these`, (N, D), to the nearest of `those`, (M, D): (N,)."""
    return torch.cdist(these, those, compute_mode="donot_use_mm_for_euclid_dist").min(1).values


def copy_threshold(real: Tensor, training: Tensor) -> float:
    """Returns the distance below which a picture counts as a copy.

    It is the 1st percentile of the distances from real pictures of the same style that nobody trained on to their
    nearest training picture: unrelated pictures come so near in one case of a hundred. The nearest of N is compared
    with the nearest of N; by a percentile of all pairs up to a quarter of all real pictures would be copies
    (1 - 0.99^30).

    Args:
        real: thumbnails of real pictures of other concepts, (M, D).
        training: moved thumbnails of the training pictures, (9 * N, D).
    """
    return float(torch.quantile(nearest(real, training), COPY_QUANTILE))


def copies(pictures: Tensor, training: Tensor, threshold: float) -> Tensor:
    """Tells which thumbnails, (N, D), lie nearer than `threshold` to those of training, (M, D): (N,), bool."""
    return nearest(pictures, training) < threshold


def diversity(pictures: Tensor) -> Tensor:
    """Returns the mean distance between the pictures of one prompt.

    Args:
        pictures: thumbnails, (P, S, D), S at least 2.

    Returns:
        (P,), 0 if all pictures of a prompt are the same.
    """
    count = pictures.shape[1]
    distances = torch.cdist(pictures, pictures, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum((1, 2)) / (count * (count - 1))


def kernel_distance(these: Tensor, those: Tensor) -> float:
    """Returns the kernel distance of two sets of pictures; 0 on average if both come from one source, else above.

    Features are divided by the root mean square of `those`, so that the number does not depend on a judge's scale.

    Args:
        these: features, (N, D), N at least 2.
        those: features of real pictures, (M, D), M at least 2.

    Source: unbiased MMD^2 with the kernel (x.y / D + 1)^3, Binkowski et al. 2018, arXiv:1801.01401, sections 4 and 5.
    """
    these, those = these.double(), those.double()
    scale = those.square().mean().sqrt()
    x, y = these / scale, those / scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return float(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())
