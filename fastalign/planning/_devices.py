"""GPUs by the numbers of their makers' data sheets: peaks, of which a program reaches a share."""

from typing import NamedTuple


class Device(NamedTuple):
    """A GPU, in decimal units.

    Attributes:
        name: With its form, on which the numbers depend.
        tflops: Most dense bfloat16 TFLOP/s, without sparsity.
        memory: GB.
        bandwidth: Of the memory, GB/s.
        interconnect: NVLink, GB/s in one direction: half of what data sheets add up.
    """

    name: str
    tflops: float
    memory: float
    bandwidth: float
    interconnect: float


DEVICES: dict[str, Device] = {
    "a100-40": Device("NVIDIA A100 SXM 40 GB", 312.0, 40.0, 1555.0, 300.0),
    "a100-80": Device("NVIDIA A100 SXM 80 GB", 312.0, 80.0, 2039.0, 300.0),
    "h100": Device("NVIDIA H100 SXM 80 GB", 989.0, 80.0, 3350.0, 450.0),
    "h200": Device("NVIDIA H200 SXM 141 GB", 989.0, 141.0, 4800.0, 450.0),
    "b200": Device("NVIDIA B200 SXM 180 GB", 2250.0, 180.0, 7700.0, 900.0),
}
