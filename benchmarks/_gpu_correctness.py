"""What only a GPU shows of the kernels' correctness, one unit each.

CUDA-graph replays against eager calls, more than 2^31 elements, the ops' tests on CUDA, and
compute-sanitizer over one small case an op: `python -m benchmarks._gpu_correctness` is what it
watches.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from benchmarks import Benchmark, Function, Inputs, _arguments, _value_and_grads
from benchmarks.__main__ import find
from benchmarks._gpu_stage import FAILED, PASSED, Options, Unit, absent
from fastalign.testing import cases

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck")
TAIL = 4000  # characters of a failing process's output that are kept


def ops() -> list[str]:
    """The ops that have kernels."""
    return sorted(path.stem for path in (ROOT / "fastalign/ops").glob("[!_]*.py"))


def test_files() -> list[Path]:
    """Those of the ops, and others that call kernels."""
    found = [ROOT / f"tests/test_{op}.py" for op in ops()]
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        called = re.search(r"^(from|import) fastalign_kernels", path.read_text(), re.MULTILINE)
        if called and path not in found:
            found.append(path)
    return found


def units(options: Options) -> Iterator[Unit]:
    benchmarks = {op: benchmark for op, benchmark in find().items() if op in ops()}
    for op, benchmark in benchmarks.items():
        yield Unit(f"graph {op}", partial(_graph, benchmark, options))
    for op, make in LARGE.items():
        if op in benchmarks:
            fn = benchmarks[op].fastalign
            yield Unit(f"2^31 {op}", partial(_large, fn, make, options))
    for path in test_files()[: 1 if options.tiny else None]:
        yield Unit(f"pytest {path.stem}", partial(_pytest, path, options.tiny))
    for tool in TOOLS:
        yield Unit(f"compute-sanitizer {tool}", partial(_sanitize, tool, options))


# CUDA graphs


def _graph(benchmark: Benchmark, options: Options) -> dict[str, Any]:
    if not options.cuda:
        return absent("needs CUDA: graphs are captured there")
    case = cases(benchmark.op, bench=True, quick=True)[0]
    wrong = unequal_after_replay(benchmark, case.inputs(options.device))
    return {"case": str(case), **_verdict(wrong)}


def _verdict(wrong: list[str]) -> dict[str, Any]:
    return (
        {"status": FAILED, "error": f"differ: {', '.join(wrong)}"} if wrong else {"status": PASSED}
    )


def unequal_after_replay(benchmark: Benchmark, inputs: Inputs) -> list[str]:
    """Which results of a replayed forward and backward are not, bit for bit, the eager ones.

    After the capture the inputs get other numbers and the results NaN: a replay that kept
    something of the capture, or writes nothing, cannot pass.
    """
    arguments = _arguments(inputs, benchmark.differentiate)  # share the inputs' memory
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _value_and_grads(benchmark.fastalign, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = _value_and_grads(benchmark.fastalign, arguments)
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.copy_(x.roll(1, 0))
    for result in replayed:
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return unequal(replayed, _value_and_grads(benchmark.fastalign, arguments))


def unequal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[str]:
    """Which of a value and its gradients are not the same numbers, or hold NaN."""
    pairs = enumerate(zip(actual, expected, strict=True))
    wrong = [i for i, (a, b) in pairs if a.isnan().any() or not torch.equal(a, b)]
    return [f"gradient {i}" if i else "value" for i in wrong]


# More than 2^31 elements


def _hadamard_reweight(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    return _normal(n, d, device), _normal(1, d, device)[0]


def _label_logits(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    labels = torch.randint(32064, (n,), device=device)
    return _normal(n, d, device), _normal(32064, d, device), labels


def _calibrate(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    mask = torch.rand(n, device=device) < 0.75
    return _normal(n, d, device), mask, *(_normal(1, d, device)[0] for _ in range(2))


def _normal(n: int, d: int, device: str) -> Tensor:
    return torch.randn(n, d, dtype=torch.bfloat16, device=device)


# Of the ops that work row by row: (n, d, device) to inputs, whose first gives the rows.
LARGE: dict[str, Callable[[int, int, str], tuple[Tensor, ...]]] = {
    "hadamard_reweight": _hadamard_reweight,
    "label_logits": _label_logits,
    "calibrate": _calibrate,
}


def _large(
    fn: Function,
    make: Callable[[int, int, str], tuple[Tensor, ...]],
    options: Options,
) -> dict[str, Any]:
    n, d = (5, 64) if options.tiny else (2**31 // 4096 + 5, 4096)
    if options.cuda and not options.tiny:
        # The first input, its gradient, the value and its cotangent, and as much for the others.
        torch.cuda.empty_cache()
        needed, free = 8 * n * d + (2 << 30), torch.cuda.mem_get_info()[0]
        if free < needed:
            return absent(f"needs {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")
    torch.manual_seed(0)
    inputs = make(n, d, options.device)
    wrong = unequal_tail(fn, inputs, rows=3)
    return {"elements": n * d, **_verdict(wrong)}


def unequal_tail(fn: Function, inputs: tuple[Tensor, ...], rows: int) -> list[str]:
    """What of the last rows differs from a call on these rows alone, see `unequal`."""
    n = len(inputs[0])
    whole = _value_and_gradient(fn, inputs)
    tail = tuple(x[-rows:].clone() if len(x) == n else x for x in inputs)
    alone = _value_and_gradient(fn, tail)
    last = (whole[0][-rows:], whole[1][-rows:])
    return unequal(last, alone)


def _value_and_gradient(fn: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The value, and the first input's gradient for the value as cotangent: no more memory."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = fn(*leaves)
    differentiated = [x for x in leaves if x.requires_grad]
    return out.detach(), torch.autograd.grad(out, differentiated, out.detach())[0]


# Tests and compute-sanitizer, in processes of their own


def _pytest(path: Path, tiny: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={file}", str(path)]
        if tiny:
            command += ["-k", "by_hand"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = ET.parse(file).getroot() if file.is_file() else ET.Element("none")
    tests = list(found.iter("testcase"))
    failing = [t.get("name") for t in tests if {"failure", "error"} & {part.tag for part in t}]
    skipped = sum(t.find("skipped") is not None for t in tests)
    record = {"tests": len(tests), "skipped": skipped, "failing": failing}
    print("    " + "".join(done.stdout.strip().splitlines()[-1:]), flush=True)
    if done.returncode == 0 and len(tests) > skipped:
        return record
    output = (done.stdout + done.stderr)[-TAIL:]
    print(output, flush=True)
    error = f"pytest ended with status {done.returncode}: {', '.join(map(str, failing[:5]))}"
    return {"status": FAILED, "error": error, **record, "output": output}


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or of the CUDA toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    places = [CUDA_HOME and Path(CUDA_HOME, part) for part in ("bin", "compute-sanitizer")]
    found = (shutil.which("compute-sanitizer", path=place and str(place)) for place in places)
    return shutil.which("compute-sanitizer") or next(filter(None, found), None)


def _sanitize(tool: str, options: Options) -> dict[str, Any]:
    if not options.cuda:
        return absent("needs CUDA: compute-sanitizer watches kernels on a GPU")
    program = sanitizer()
    if program is None:
        return absent("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    command = [program, "--tool", tool, "--error-exitcode", "86"]
    command += [sys.executable, "-m", "benchmarks._gpu_correctness"]
    # An allocation of its own for each tensor, so that a read past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return sanitizer_record(done.returncode, done.stdout + done.stderr)


def sanitizer_record(status: int, output: str) -> dict[str, Any]:
    """What compute-sanitizer said; it must have said that there were 0 errors or hazards."""
    summaries = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", output)
    if status == 0 and summaries and not any(map(int, summaries)):
        return {"status": PASSED}
    print(output[-TAIL:], flush=True)
    lines = [line for line in output.splitlines() if "ERROR" in line or "SUMMARY" in line]
    error = f"status {status}: {'; '.join(lines[-3:]) or 'no summary'}"
    return {"status": FAILED, "error": error, "output": output[-TAIL:]}


def main() -> int:
    """The largest of each op's cases for tests, of odd sizes, forward and backward."""
    for op, benchmark in find().items():
        if op in ops():
            case = max(cases(op), key=lambda case: torch.Size(case.shape).numel())
            print(op, case, flush=True)
            arguments = _arguments(case.inputs("cuda"), benchmark.differentiate)
            _value_and_grads(benchmark.fastalign, arguments)
            if benchmark.compiled is not None and native.CUDA_OBSTACLE is None:
                _value_and_grads(benchmark.compiled, arguments)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
