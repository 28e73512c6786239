"""Teachers' spaces brought to one width: fitted from stored features, judged on held-out rows, saved as one small file.
A training run needs `load` and `Alignment` only; the methods and the judge are in the modules beside this one."""

from __future__ import annotations

from mmkd.distill.alignment.maps import Alignment, AlignmentCard, TeacherMap, load, save

__all__ = ["Alignment", "AlignmentCard", "TeacherMap", "load", "save"]
