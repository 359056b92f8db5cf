"""The concept judge's head: directions in which concepts differ much, and the drawings of one concept little.

This is linear discriminant analysis on frozen ImageNet features: a formula, with nothing to tune but two numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.style_bench import jitter
from tools.style_bench.networks import EMBEDDING, PART, ConceptNet

RIDGE = 0.03
"""Added to the variance within concepts, in units of its mean over all directions; chosen on the split "validation"."""


def fit_concept_net(pool: dict, start: dict[str, Tensor]) -> ConceptNet:
    """Returns a concept judge with ImageNet's body and a fitted head.

    Each picture counts three times: as drawn, after the VAE's round trip, and moved, recoloured and roughened.

    Args:
        pool: `train_judges.Pool` by style.
        start: weights of `networks.Lite0`.
    """
    rng = torch.Generator().manual_seed(0)
    net = ConceptNet().eval().requires_grad_(False)
    wanted = net.body.state_dict()
    net.body.load_state_dict({key: value for key, value in start.items() if key in wanted})
    net = net.to(memory_format=torch.channels_last)
    features, codes = [], []
    for style, pictures in pool.items():
        for views, chance in ((pictures.drawn, None), (pictures.decoded, None), (pictures.drawn, rng)):
            features.append(_features(net, views, chance))
            codes += pictures.codes
        print(f"concept judge has seen {style}", flush=True)
    names = sorted(set(codes))
    groups = torch.tensor([names.index(code) for code in codes])
    weight, bias = discriminant(torch.cat(features), groups, EMBEDDING, RIDGE)
    net.head.load_state_dict({"weight": weight, "bias": bias})
    return net


@torch.inference_mode()
def _features(net: ConceptNet, pictures: Tensor, rng: torch.Generator | None) -> Tensor:
    found = []
    for part in pictures.split(PART):
        views = part.float() / 255
        if rng is not None:
            views = jitter.moved(views, rng, smallest=0.8, largest=1.1, turn=5, mirror=False)
            views = jitter.roughened(jitter.recoloured(views, rng, 0.2), rng, blur=1, noise=0.03)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(net.features(views.contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(found)


def discriminant(features: Tensor, groups: Tensor, width: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Fits the linear map after which groups are far apart and each group is round and of size one.

    Args:
        features: (N, D).
        groups: (N,), int64, the group of each, from 0.
        width: directions to keep, at most D.
        ridge: keeps directions without variance within groups from being blown up; in units of the mean variance.

    Returns:
        Weight (width, D) and bias (width,), which brings the mean of all features to zero.
    """
    mean = features.mean(0)
    centred = (features - mean).double()
    count = torch.bincount(groups).double()
    means = (
        centred.new_zeros(len(count), features.shape[1]).index_add_(0, groups, centred) / count.clamp_min(1)[:, None]
    )
    within = centred - means[groups]
    variances, axes = torch.linalg.eigh(within.T @ within / len(within))
    round_up = axes * (variances.clamp_min(0) + ridge * variances.mean()) ** -0.5
    means = means[count > 1] @ round_up
    directions = torch.linalg.eigh(means.T @ means).eigenvectors[:, -width:]
    weight = (round_up @ directions).T.float()
    return weight, -weight @ mean
