"""Small networks that see images. B images of shape [channels, height, width], C classes."""

import itertools

from torch import Tensor, nn

from actors.config.networks import ImageCnn, ImageResnet


class ImageCnnNetwork(nn.Module):
    """Convolutions of 3 x 3, each but the first halving the size, and the mean over all places."""

    def __init__(self, shape: ImageCnn, in_channels: int, classes: int) -> None:
        super().__init__()
        widths = [in_channels, *(shape.channels << layer for layer in range(shape.layers))]
        self.layers = nn.ModuleList(
            _convolution(before, after, stride=1 if index == 0 else 2)
            for index, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.output = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, channels, height, width]."""
        states = images
        for layer in self.layers:
            states = layer(states).relu()
        return self.output(states.mean(dim=(2, 3)))


class ImageResnetNetwork(nn.Module):
    """A convolution, stages of residual blocks, and the mean over all places."""

    def __init__(self, shape: ImageResnet, in_channels: int, classes: int) -> None:
        super().__init__()
        self.stem = _convolution(in_channels, shape.channels, stride=1)
        blocks, before = [], shape.channels
        for stage in range(shape.stages):
            for block in range(shape.blocks):
                after = shape.channels << stage
                blocks.append(ResidualBlock(before, after, stride=2 if stage > 0 and block == 0 else 1))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.output = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, channels, height, width]."""
        states = self.stem(images).relu()
        for block in self.blocks:
            states = block(states)
        return self.output(states.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, stride)
        self.second = _convolution(after, after, stride=1)
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return states of the next block."""
        return (self.second(self.first(states).relu()) + self.shortcut(states)).relu()


def _convolution(before: int, after: int, stride: int) -> nn.Module:
    """A convolution of 3 x 3, and a norm over each image by itself, which needs no batch."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.GroupNorm(1, after))
