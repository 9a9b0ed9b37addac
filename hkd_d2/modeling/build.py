"""Detectron2's ``build_model``, whose refusals are sentences."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn


def build_from_config(cfg: CfgNode, owner: str) -> nn.Module:
    """Build the model of a config.

    Detectron2 and PyTorch refuse an unknown name, a size or a list that does not fit by errors of
    many kinds, which here become one.

    Args:
        owner: whose config it is, for the sentence: "the teacher of x.yaml".

    Raises:
        ValueError, OSError, ImportError: the config builds no model.
    """
    try:
        return build_model(cfg)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A KeyError's text is the key in quotes, and of some the message.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        reason = " ".join(text.split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(
            f"The config of {owner} builds no model ({type(error).__name__}: {reason}); correct "
            "its MODEL keys."
        ) from error
