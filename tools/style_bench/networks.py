"""The two networks of the judges, both on the first blocks of EfficientNet-Lite0."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.style_bench.surface import SIZE, surface

LITE0 = (
    # (repeats, channels, kernel size, stride of the first, widening inside)
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
"""The stages of EfficientNet-Lite0 (Apache-2.0), as published by Google."""
EMBEDDING = 512
"""Numbers in a concept's embedding."""
PART = 64
"""Pictures that pass through a network at once."""


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution with batch normalisation, padded so that stride 1 keeps the size."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, eps=1e-3))


class Inverted(nn.Module):
    """A block of EfficientNet-Lite: widen, convolve each channel by itself, narrow; add the input if it fits."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, widening: int):
        super().__init__()
        inner = inputs * widening
        self.widen = conv(inputs, inner, 1) if widening > 1 else None
        self.depthwise = conv(inner, inner, size, stride, inner)
        self.narrow = conv(inner, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = x if self.widen is None else F.relu6(self.widen(x))
        with torch.autocast(x.device.type, enabled=False):  # backward in bf16 takes three times as long
            y = self.depthwise(y.float())
        y = self.narrow(F.relu6(y))
        return x + y if self.adds else y


class Lite0(nn.Module):
    """The first blocks of EfficientNet-Lite0, whose weights know ImageNet."""

    def __init__(self, depth: int):
        """Builds the stem and `depth` of the 16 blocks."""
        super().__init__()
        self.stem = conv(3, 32, 3, 2)
        blocks, inputs = [], 32
        for repeats, outputs, size, stride, widening in LITE0:
            for n in range(repeats):
                blocks.append(Inverted(inputs, outputs, size, stride if n == 0 else 1, widening))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks[:depth])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Maps (N, 3, H, W) in [0, 1] to what comes out of each block, from (N, 16, H / 2, W / 2) to H / 32."""
        x = F.relu6(self.stem((pictures - 0.45) * 4.4))
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class StyleNet(nn.Module):
    """Tells styles apart by how lines, fills and shadings look, and by the palette.

    The features are the mean and the spread of channels over the picture, after several blocks, and what a linear map
    makes of the picture's `surface`; so place matters little, and pictures may have any size.
    """

    TAPS: ClassVar = {0: 16, 2: 24, 4: 40, 7: 80, 10: 112}
    """Blocks whose channels are looked at, and how many those are."""
    COUNTED = 128
    FEATURES = 256

    def __init__(self, classes: int):
        """Builds the network for so many styles."""
        super().__init__()
        self.body = Lite0(max(self.TAPS) + 1)
        self.usual: Tensor
        self.rarity: Tensor
        self.register_buffer("usual", torch.zeros(SIZE))
        self.register_buffer("rarity", torch.ones(SIZE))
        self.counted = nn.Linear(SIZE, self.COUNTED)
        self.norm = nn.BatchNorm1d(2 * sum(self.TAPS.values()) + self.COUNTED)
        self.mix = nn.Linear(self.norm.num_features, self.FEATURES)
        self.head = nn.Linear(self.FEATURES, classes)

    def get_used_to(self, pictures: Tensor) -> None:
        """Learns what is common on a surface, so that a rare colour or shade counts as much as a frequent one.

        Args:
            pictures: (N, 3, H, W) in [0, 1], of all styles.
        """
        shares = torch.cat([surface(part) for part in pictures.split(PART)])
        self.usual.copy_(shares.mean(0))
        self.rarity.copy_(1 / (shares.std(0) + 2e-3))

    def features(self, pictures: Tensor, close_ups: Tensor | None = None) -> Tensor:
        """Maps pictures to what the style judge sees before it decides.

        Args:
            pictures: (N, 3, H, W) in [0, 1].
            close_ups: parts of the same pictures, for lines and shadings; None: the whole pictures.

        Returns:
            (N, 256).
        """
        outputs = self.body(pictures if close_ups is None else close_ups)
        statistics = [value for tap in self.TAPS for value in mean_and_spread(outputs[tap])]
        shares = ((surface(pictures) - self.usual) * self.rarity).clamp(-6, 6)
        statistics.append(F.relu(self.counted(F.dropout(shares, 0.3, self.training)).float()))
        return F.relu(self.mix(F.dropout(self.norm(torch.cat(statistics, 1)), 0.2, self.training)))

    def forward(self, pictures: Tensor, close_ups: Tensor | None = None) -> Tensor:
        """Maps (N, 3, H, W) in [0, 1] to logits (N, classes); see `features`."""
        return self.head(F.dropout(self.features(pictures, close_ups), 0.3, self.training))


def mean_and_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, C, H, W) to each channel's mean and standard deviation over the picture, both (N, C), fp32."""
    x = x.float().flatten(2)
    return x.mean(2), (x.var(2, correction=0) + 1e-6).sqrt()


class ConceptNet(nn.Module):
    """Maps a picture to a direction that depends on what it shows and not on how it is drawn.

    The map before EfficientNet-Lite0's last block is averaged over quarters, so that a rough layout survives.
    """

    DEPTH = 15
    CHANNELS = 192

    def __init__(self):
        super().__init__()
        self.body = Lite0(self.DEPTH)
        self.head = nn.Linear(4 * self.CHANNELS, EMBEDDING)

    def features(self, pictures: Tensor) -> Tensor:
        """Maps (N, 3, H, W) in [0, 1] to (N, 768), each of length one."""
        return F.normalize(F.adaptive_avg_pool2d(self.body(pictures)[-1].float(), 2).flatten(1), dim=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps (N, 3, H, W) in [0, 1] to embeddings of length one, (N, 512)."""
        return F.normalize(self.head(self.features(pictures)), dim=1)
