"""Training steps recorded to the bit, for the tests of neutrality."""

import copy

import torch
from detectron2.utils.events import EventStorage

from hkd_d2.ops import multilevel_roi_align


def steps(model, batches, lr=0.01):
    """Train with plain SGD; returns the losses, gradients and random state of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    torch.manual_seed(1)
    record = []
    with EventStorage(0) as storage:
        for batch in batches:
            losses = model(copy.deepcopy(batch))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            student = getattr(model, "student", model)
            record.append(
                (
                    {k: v.detach().clone() for k, v in losses.items()},
                    {n: p.grad.clone() for n, p in student.named_parameters()},
                    torch.get_rng_state(),
                )
            )
            optimizer.step()
            storage.step()
    return record, storage


def plain_in_channels_last(model):
    """Let a plain detector lay out its images as ``HKD.CHANNELS_LAST`` does."""
    preprocess = model.preprocess_image

    def preprocess_channels_last(batch):
        images = preprocess(batch)
        images.tensor = images.tensor.to(memory_format=torch.channels_last)
        return images

    model.preprocess_image = preprocess_channels_last


class MultilevelPooler(torch.nn.Module):
    """Stands where Detectron2's pooler does, in a plain detector of small_detectors.py."""

    def forward(self, maps, boxes):
        boxes = [b.tensor for b in boxes]
        return multilevel_roi_align(
            maps, boxes, strides=[4, 8, 16, 32], output_size=3, sampling_ratio=2
        )
