"""What a training run will take: parameters, memory, FLOPs and hours, from a configuration alone.

Nothing is loaded and nothing runs: the model is built on the meta device, and the numbers follow
from its sizes by the formulas of `docs/planning.md`. Whatever is assumed is part of the result.
"""

from fastalign.planning._devices import DEVICES as DEVICES
from fastalign.planning._devices import Device as Device
from fastalign.planning._options import PlanConfig as PlanConfig
from fastalign.planning._plan import Plan as Plan
from fastalign.planning._plan import make_plan as make_plan
from fastalign.planning._teacher import TEACHERS as TEACHERS

__all__ = ["DEVICES", "TEACHERS", "Device", "Plan", "PlanConfig", "make_plan"]
