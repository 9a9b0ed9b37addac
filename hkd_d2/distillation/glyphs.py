"""Pictures of a made-up task with as many classes as wanted, and a small classifier of them."""

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 16  # pixels of a picture
CELLS = 5  # of a glyph, a side
# Of the classifier's training.
STEPS, STEPS_A_GLYPH, BATCH, LEARNING_RATE = 300, 5, 128, 1e-2


def glyph_templates(num_glyphs: int) -> torch.Tensor:
    """(num_glyphs, 5, 5) float32 patterns of 0 and 1, symmetric left to right, each another.

    Raises:
        ValueError: more than the 2^15 patterns there are.
    """
    patterns = 2 ** (CELLS * (CELLS // 2 + 1))
    if num_glyphs > patterns:
        raise ValueError(
            f"There are {patterns} glyphs, fewer than the {num_glyphs} of this detector."
        )
    # Steps of a number that has no factor in common with theirs visit every pattern once, far ones
    # in turn.
    codes = (torch.arange(1, num_glyphs + 1) * 19937) % patterns
    half = (codes[:, None] >> torch.arange(CELLS * (CELLS // 2 + 1)) & 1).float()
    half = half.view(num_glyphs, CELLS, CELLS // 2 + 1)
    return torch.cat([half, half[..., :-1].flip(-1)], -1)


def draw_glyphs(classes: torch.Tensor, num_glyphs: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a picture of each class.

    A glyph has its class's pattern at a random place, size, angle and contrast, under noise; class
    ``num_glyphs``, the background, has a pattern of noise there.

    Args:
        classes: (N,) int64, 0 to ``num_glyphs``.
        num_glyphs: classes without the background.
        generator: of the CPU.

    Returns:
        Tensor: (N, 1, 16, 16) float32.
    """
    n = len(classes)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    templates = torch.cat([glyph_templates(num_glyphs), torch.zeros(1, CELLS, CELLS)])
    patterns = templates[classes]
    clutter = torch.rand(n, CELLS, CELLS, generator=generator)
    patterns = torch.where((classes == num_glyphs)[:, None, None], clutter, patterns)
    angle, size, place = uniform(-0.3, 0.3), uniform(0.6, 1.0), uniform(-0.25, 0.25, 2)
    cos, sin = angle.cos() / size, angle.sin() / size
    affine = torch.stack([cos, -sin, place[:, 0], sin, cos, place[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, (n, 1, SIDE, SIDE), align_corners=False)
    pictures = F.grid_sample(patterns[:, None], grid, align_corners=False)
    noise = torch.randn(n, 1, SIDE, SIDE, generator=generator)
    return uniform(0.5, 1.0, 1, 1, 1) * pictures + uniform(0.05, 0.35, 1, 1, 1) * noise


def train_classifier(num_glyphs: int, generator: torch.Generator) -> nn.Module:
    """Train a classifier of :func:`draw_glyphs` on the CPU: three convolutions and a layer.

    Returns:
        nn.Module: (N, 1, 16, 16) to (N, num_glyphs + 1) logits; frozen; under 100 000 parameters
        with up to 600 classes.
    """
    widths = (1, 16, 32, 32)
    layers = [
        layer
        for i in range(3)
        for layer in (nn.Conv2d(widths[i], widths[i + 1], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    features = widths[-1] * (SIDE // 8) ** 2
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_glyphs + 1))
    with torch.no_grad():
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                module.bias.zero_()
    steps = STEPS + STEPS_A_GLYPH * num_glyphs
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        classes = torch.randint(num_glyphs, (BATCH,), generator=generator)
        classes[: BATCH // 4] = num_glyphs  # the background is as common as that among regions
        loss = F.cross_entropy(model(draw_glyphs(classes, num_glyphs, generator)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
