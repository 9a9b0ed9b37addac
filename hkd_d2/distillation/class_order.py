"""The order of sampled regions within their classes."""

import torch


def order_in_class(one_hot: torch.Tensor) -> torch.Tensor:
    """Number of earlier rows of the same class, (R,), from one-hot classes (R, K).

    A row without a class has -1.
    """
    return (one_hot.cumsum(0) * one_hot).sum(1) - 1
