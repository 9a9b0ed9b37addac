"""Bodies for small detectors: slim ResNets and those of torchvision and timm.

Importing the package registers their builders with Detectron2.
"""

from hkd_d2.modeling.backbones.library_body import (
    LibraryBody,
    build_library_backbone,
    build_library_fpn_backbone,
    build_retinanet_library_fpn_backbone,
)
from hkd_d2.modeling.backbones.slim_resnet import (
    build_retinanet_slim_resnet_fpn_backbone,
    build_slim_resnet_backbone,
    build_slim_resnet_fpn_backbone,
    slice_resnet_state_dict,
)

__all__ = [
    "LibraryBody",
    "build_library_backbone",
    "build_library_fpn_backbone",
    "build_retinanet_library_fpn_backbone",
    "build_retinanet_slim_resnet_fpn_backbone",
    "build_slim_resnet_backbone",
    "build_slim_resnet_fpn_backbone",
    "slice_resnet_state_dict",
]
