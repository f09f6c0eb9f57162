"""Every kernel as its launcher configures it, for `benchmarks.offline` to compile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastalign_kernels import (
    calibrate,
    contrast_weights,
    hadamard_reweight,
    label_logits,
    linear_cross_entropy,
    structure_distill,
    syrk,
)
from fastalign_kernels._op import DTYPES
from triton.runtime.jit import JITFunction

_HALF, _SINGLE = (torch.float16, torch.bfloat16), (torch.float32,)


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration.

    Args:
        kernel: The @triton.jit function.
        types: Triton's type of each argument that is no constexpr; "*" is a pointer to the
            activations' dtype, "tensordesc<*[128,64]>" a descriptor of tiles of it.
        constants: The constexprs, num_warps and num_stages, as the launcher passes them.
        d: Row length; divisible by 16 or not, as it is specialised at a launch.
        wide: Whether it must read aligned rows 16 bytes at a time.
        spill: Bytes a thread may spill; none in the loop of a matrix product.
        matrix: Whether it must hold the matrix instruction of its architecture.
        descriptor: Whether it must load through tensor descriptors; not compiled for sm_80.
        offsets: Whether it multiplies offsets, which must be in 64 bits.
        archs: What it is launched on.
        dtypes: What it is launched for.
        note: What tells it from variants of the same kernel with the same flags.
    """

    kernel: JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    d: int
    wide: bool = True
    spill: int = 0
    matrix: bool = False
    descriptor: bool = False
    offsets: bool = True
    archs: tuple[int, ...] = (80, 90, 100)
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)
    note: str = ""

    def __str__(self) -> str:
        flags = [name.lower() for name, value in self.constants.items() if value is True]
        name = self.kernel.__name__.lstrip("_")
        return " ".join([name, *flags, *([self.note] if self.note else [])])

    def runs(self, arch: int, dtype: torch.dtype) -> bool:
        """Whether it is launched on this architecture for this dtype."""
        return arch in self.archs and dtype in self.dtypes and not (self.descriptor and arch < 90)


def _hadamard_reweight(d: int) -> Iterator[Variant]:
    if d > hadamard_reweight.MAX_DIM:
        return
    rows = {"h_ptr": "*", "w_ptr": "*", "d": "i32", "w_stride": "i32"}
    config = hadamard_reweight._config(d)
    kernel = hadamard_reweight._hadamard_reweight_fwd
    yield Variant(kernel, {**rows, "y_ptr": "*"}, config, d)
    kernel = hadamard_reweight._hadamard_reweight_bwd
    for needs_w, shared in ((True, False), (True, True), (False, False)):
        dw = "*fp32" if shared else "*"
        types = {**rows, "dy_ptr": "*", "dh_ptr": "*", "dw_ptr": dw, "n": "i32"}
        constants = {"NEEDS_W": needs_w, "SHARED": shared, **config}
        if shared:
            types["rows"] = "i32"
        else:
            constants["rows"] = 1
        yield Variant(kernel, types, constants, d, spill=256 if d > 8192 else 0)


def _label_logits(d: int) -> Iterator[Variant]:
    config = label_logits._config(d)
    picked = {"weight_ptr": "*", "labels_ptr": "*i64", "d": "i32", "v": "i32"}
    for bias in (False, True):
        types = {**picked, "hidden_ptr": "*", "bias_ptr": "*", "y_ptr": "*fp32"}
        yield Variant(label_logits._label_logits_fwd, types, {"HAS_BIAS": bias, **config}, d)
    types = {**picked, "dy_ptr": "*fp32", "dhidden_ptr": "*"}
    yield Variant(label_logits._label_logits_bwd_hidden, types, config, d)
    types = {"dy_ptr": "*fp32", "hidden_ptr": "*", "dweight_ptr": "*", "dbias_ptr": "*"}
    types |= {"sorted_ptr": "*i64", "order_ptr": "*i64", "end_ptr": "*i64", "d": "i32", "v": "i32"}
    kernel = label_logits._label_logits_bwd_weight
    yield Variant(kernel, types, label_logits._config_weight(d), d, wide=False)


def _linear_cross_entropy(d: int) -> Iterator[Variant]:
    """`d` logits a row."""
    kernel = linear_cross_entropy._linear_cross_entropy_rows
    types = dict.fromkeys(("logits_ptr", "factors_ptr", "power_ptr", "ce_ptr"), "*fp32")
    types |= {"dz_ptr": "*", "bias_ptr": "*", "labels_ptr": "*i64", "correct_ptr": "*i1"}
    types |= {"v": "i32", "ignore_index": "i32", "scale": "fp32", "softcap": "fp32"}
    for dtypes, stride in ((_HALF, 2), (_SINGLE, 1)):
        for bias, softcap, gradient in (
            (False, False, True),
            (True, True, True),
            (False, False, False),
        ):
            constants = {"BIAS": bias, "SOFTCAP": softcap, "GRADIENT": gradient, "STRIDE": stride}
            constants |= linear_cross_entropy._config(d)
            spill = 8 if softcap else 0
            yield Variant(kernel, types, constants, d, dtypes=dtypes, spill=spill)


def _calibrate(d: int) -> Iterator[Variant]:
    config = calibrate._config(d)
    tile = {"n": "i32", "d": "i32", "x_ptr": "*", "mask_ptr": "*i1"}
    for scale in ("*", "*fp32"):
        types = {**tile, "scale_ptr": scale, "shift_ptr": scale, "y_ptr": "*"}
        yield Variant(calibrate._calibrate_fwd, types, config, d)
    sums = {"dscale_ptr": "*fp32", "dshift_ptr": "*fp32", "chunk": "i32"}
    types = {**tile, **sums, "scale_ptr": "*fp32", "dy_ptr": "*", "dx_ptr": "*"}
    yield Variant(calibrate._calibrate_bwd, types, config, d)


def _contrast_weights(d: int) -> Iterator[Variant]:
    """`d` tokens; without offsets it is passed delta in their place."""
    kernel, config = contrast_weights._contrast_weights_fwd, contrast_weights._config(d)
    types = {"delta_ptr": "*", "w_ptr": "*fp32", "alpha": "fp32", "beta": "fp32"}
    types |= dict.fromkeys(("tokens", "samples", "step"), "i32")
    for offsets, half in (("*", 1), ("*i32", 1), ("*i64", 1), ("*i32", 16)):
        packed = offsets != "*"
        constants = {"PACKED": packed, "HALF": half, **config}
        note = f"window={2 * half + 1}" + (f" offsets={offsets[1:]}" if packed else "")
        yield Variant(kernel, {**types, "cu_ptr": offsets}, constants, d, spill=8, note=note)


def _structure_distill(d: int) -> Iterator[Variant]:
    """Row length changes the code only where it is no multiple of a block, or 1."""
    if d > 4096:
        return
    numbers = dict.fromkeys(("rh_ptr", "rg_ptr", "h_ptr", "out_ptr"), "*fp32")
    rows = structure_distill._row_config(d)
    both = {"h_ptr": "*", "g_ptr": "*", "d": "i32", "dt": "i32"}
    norms = {"rh_ptr": "*fp32", "rg_ptr": "*fp32", **both}
    yield Variant(structure_distill._structure_norms, norms, rows, d)
    radial = {**numbers, "h_ptr": "*", "d": "i32"}
    del radial["rg_ptr"]
    yield Variant(structure_distill._structure_radial, radial, rows, d)
    for ragged in (False, True):
        yield from _structure_images(d, ragged)
        half = (torch.bfloat16,) if ragged else _HALF  # which differ in no address
        for block, size, dtypes in ((128, 2, half), (64, 2, half), (64, 4, _SINGLE)):
            if block == 128 and d % 16:
                continue  # see `_block`
            yield from _structure_products(d, ragged, block, size, dtypes)


def _structure_images(d: int, ragged: bool) -> Iterator[Variant]:
    """What is launched once for each image, or once; their sizes do not depend on `d`."""
    if d != 4096:
        return
    plain: dict[str, Any] = {"wide": False, "offsets": False, "dtypes": (torch.bfloat16,)}
    images = {"cu_ptr": "*i32", "tiles_ptr": "*i32"}
    if ragged:
        kernel, constants = structure_distill._structure_firsts, {"BLOCK": 128, "IMAGES": 8}
        types = {**images, "images": "i32"}
        yield Variant(kernel, types, {**constants, "num_warps": 4}, d, **plain)
    sums = dict.fromkeys(("loss_ptr", "power_ptr", "out_ptr", "factor_ptr"), "*fp32")
    types = {**images, **sums, "n": "i32", "columns": "i32"}
    constants = {"RAGGED": ragged, "BLOCK": 128, "SLOTS": structure_distill._SLOTS, "num_warps": 4}
    yield Variant(structure_distill._structure_loss, types, constants, d, **plain)


def _structure_products(
    d: int, ragged: bool, block: int, size: int, dtypes: tuple[torch.dtype, ...]
) -> Iterator[Variant]:
    """The kernels around a matrix product, through pointers and through descriptors."""
    images = {"cu_ptr": "*i32", "tiles_ptr": "*i32"}
    counts = dict.fromkeys(("n", "d", "first", "count", "columns", "total"), "i32")
    width = structure_distill._columns(d, size)
    for descriptor in (False, True) if d == 4096 else (False,):
        config = structure_distill._config(block, size, descriptor)
        deep = config["BLOCK_K"]
        wide: dict[str, Any] = {
            "matrix": True, "descriptor": descriptor, "dtypes": dtypes, "note": f"block={block}",
            # What follows the loop, of the largest tile and of rows without alignment.
            "spill": 320 if block == 128 or d % 16 else 64,
        }  # fmt: skip
        shared = {
            "RAGGED": ragged, "IMAGES": 8, "DESCRIPTOR": descriptor, "EVEN": d % 64 == 0,
            "GROUP": structure_distill._GROUP, **config,
        }  # fmt: skip
        tile = f"tensordesc<*[{block},{deep}]>" if descriptor else "*"
        sums = ("rh_ptr", "rg_ptr", "power_ptr", "t_ptr", "loss_ptr")
        types = {"h": tile, "g": tile, "panel_ptr": "*", **images, **counts, "dt": "i32"}
        types |= dict.fromkeys(sums, "*fp32")
        for flags in _structure_flags(d, ragged):
            constants = {**flags, **shared}
            kernel = structure_distill._structure_tiles
            note = f"block={block} negatives={flags['NEGATIVES']}"
            yield Variant(kernel, types, constants, d, **(wide | {"note": note}))
        right = f"tensordesc<*[{deep},{width}]>" if descriptor else "*"
        types = {"panel": tile, "h": right, "h_ptr": "*", "t_ptr": "*fp32", "scale_ptr": "*fp32"}
        types |= {**images, **counts}
        for radial, add in ((True, False), (False, True)):
            constants = {"RADIAL": radial, "ADD": add, "BLOCK_N": width, **shared}
            out = {"out_ptr": "*fp32" if add else "*"}
            kernel = structure_distill._structure_product
            yield Variant(kernel, {**types, **out}, constants, d, **wide)
        if not descriptor:
            types = {"panel_ptr": "*", "h_ptr": "*", "out_ptr": "*fp32", **images, **counts}
            del types["total"]
            constants = {"BLOCK_N": width, **shared}
            del constants["DESCRIPTOR"], constants["GROUP"]
            yield Variant(structure_distill._structure_mirror, types, constants, d, **wide)


def _structure_flags(d: int, ragged: bool) -> Iterator[dict[str, Any]]:
    """What is computed and kept: R' and t, R' alone, or nothing; and the options once each."""
    for negatives, cosine, panel, radial in (
        (0, True, True, True),
        (1, True, True, True),
        (2, True, True, False),
        (0, False, True, False),
        (0, True, False, False),
    ):
        yield {"COSINE": cosine, "NEGATIVES": negatives, "PANEL": panel, "RADIAL": radial}
        if ragged or d != 4096:
            return


def _syrk(d: int) -> Iterator[Variant]:
    """Row length changes the code only where it is no multiple of a block, or 1."""
    if d > 4096:
        return
    for block, size, dtypes in ((128, 2, _HALF), (64, 2, _HALF), (64, 4, _SINGLE)):
        if block == 128 and d % 16:
            continue  # see `syrk._block`
        for descriptor in (False, True) if d == 4096 else (False,):
            config = syrk._config(block, size, d % 16 == 0)
            tile = f"tensordesc<*[1,{config['BLOCK_K']},{block}]>" if descriptor else "*"
            counts = dict.fromkeys(("n", "d", "columns", "programs"), "i32")
            types = {"x": tile, **counts, "alpha": "fp32", "beta": "fp32"}
            # Rows of tokens, of any number, into float32; a square matrix, in its own type.
            for has_y, even, out in ((False, descriptor, "*fp32"), (True, d % 64 == 0, "*")):
                flags = {"HAS_Y": has_y, "DESCRIPTOR": descriptor, "EVEN": even}
                yield Variant(
                    syrk._syrk_fwd,
                    {**types, "y_ptr": out, "c_ptr": out},
                    {**flags, "GROUP": syrk._GROUP, **config},
                    d,
                    spill=64,
                    matrix=True,
                    descriptor=descriptor,
                    dtypes=dtypes,
                    note=f"block={block}",
                )


# One function for each module of kernels: a new module adds its own here.
MODULES: tuple[Callable[[int], Iterator[Variant]], ...] = (
    _hadamard_reweight,
    _label_logits,
    _linear_cross_entropy,
    _calibrate,
    _contrast_weights,
    _structure_distill,
    _syrk,
)


def variants(d: int) -> Iterator[Variant]:
    """Every kernel as its launcher configures it for rows of `d`; for d = 1 all sizes are 1."""
    for module in MODULES:
        yield from module(d)
