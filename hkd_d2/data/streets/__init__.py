"""Synthetic streets: drawn street scenes with pedestrians, stored in the CityPersons form.

A data set for trying the whole path (training, distillation, evaluation) within minutes and without
a download. :func:`generate_streets` writes the folders, file names and annotation files of the
Cityscapes distribution of CityPersons, so that everything that reads the real set reads this one.

A scene is a street seen by a pinhole camera above a flat ground. Everything that stands on the
ground is painted from far to near on a supersampled canvas; a second canvas of the same size
remembers which object painted each pixel last. The full box of a person is the tight box of the
pixels painted for that person, inside the image or not, before anything nearer is painted; the
visible box is the tight box of the pixels still that person's own, inside the image, when the scene
is finished. As CityPersons was annotated, both boxes of a pedestrian are then stretched sideways so
that the full one is 0.41 times as wide as high.

Labels, as in CityPersons: ``pedestrian``; ``rider``, ``sitting person`` and ``person (other)`` (a
bending person) for other postures; ``person group`` for a crowd that is annotated as one region;
and ``ignore`` for posters, mannequins and people of whom less than ``MIN_VISIBLE`` is seen. Whoever
is not seen at all is left out. Poles, bollards, post boxes, closed parasols, tailor's dummies and
the like have no annotation: they are there to be told from people.
"""

from hkd_d2.data.streets.dataset import PROVENANCE, draw_street, generate_streets, street_paths
from hkd_d2.data.streets.difficulty import Difficulty
from hkd_d2.data.streets.preview import contact_sheet

__all__ = [
    "PROVENANCE",
    "Difficulty",
    "contact_sheet",
    "draw_street",
    "generate_streets",
    "street_paths",
]
