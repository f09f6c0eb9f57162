"""Frozen vision models whose patch similarities supervise a student, and a cache of their features.

A teacher maps a batch to features of the student's views (see `VLM.views`), without gradient:
(views, h, w, C), a list of (h, w, C) where grids differ, or (views, n, C) on a square grid.
"""

from fastalign.teachers._cache import CachedTeacher as CachedTeacher
from fastalign.teachers._patch import PatchTeacher as PatchTeacher
from fastalign.teachers._patch import Teacher as Teacher
from fastalign.teachers._pretrained import IMAGENET as IMAGENET
