"""The commands, run as a user runs them, on the demo's model with random weights."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")
import yaml
from fastalign_kernels import native
from PIL import Image

from fastalign import cli, doctor
from fastalign.models import _packed_backends, _packed_limits
from fastalign.train import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, six images with captions of three files, and the same as LLaVA-style records."""
    from fastalign.demo.base import build_model, save_base

    root = tmp_path_factory.mktemp("cli")
    save_base(build_model(0), root / "tiny")
    noise = torch.Generator().manual_seed(0)
    (root / "images").mkdir()
    (root / "texts").mkdir()
    captions = ["two red cups", "a blue fish on the left", "three green keys on the right"] * 2
    records = []
    for i, caption in enumerate(captions):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "images" / f"{i}.png")
        records.append({"image": f"images/{i}.png", "caption": caption})
    for i in range(3):
        (root / "texts" / f"{i}.txt").write_text(captions[i])
    (root / "data.json").write_text(json.dumps(records))
    return root


def fails(capsys, *argv, status=1):
    """The line on stderr that says what is wrong, below what the model's loading left there."""
    assert cli.main([str(a) for a in argv]) == status
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    error = shown.splitlines()[-1]
    assert error.startswith(f"fastalign {argv[0]}: ")
    return error


# -- the program ---------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert list(cli.COMMANDS) == [
        *("demo", "train", "mir", "heatmap", "diagnose", "plan", "bench", "doctor")
    ]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--config", "--print-config", "--json", "--learning-rate", "--cal.window"]),
        (
            "mir",
            ["--model", "--images", "--texts", "--samples", "--json", "--figure", "--resamples"],
        ),
        ("heatmap", ["--model", "--image", "--text", "--html", "--figure", "--json"]),
        ("doctor", ["--json"]),
    ],
)
def test_every_command_has_help(capsys, command, options):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)


def test_wrong_arguments(capsys):
    assert cli.main(["tran"]) == 2
    assert "no command 'tran'" in capsys.readouterr().err
    assert cli.main(["doctor", "--jsn", "x"]) == 2
    assert "--jsn" in capsys.readouterr().err


def test_version(capsys):
    import fastalign

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastalign {fastalign.__version__}\n"


def test_module_runs_and_help_loads_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['fastalign', '--help']\n"
        "try: runpy.run_module('fastalign', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'transformers', 'tyro', 'rich', 'matplotlib', 'torchmetrics', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fastalign COMMAND")


def test_unexpected_errors_keep_their_trace(monkeypatch):
    def broken(argv):
        raise RuntimeError("a fault of ours")

    monkeypatch.setitem(cli.COMMANDS, "doctor", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["doctor"])


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert 'pip install "fastalign[hf]"' in fails(capsys, "train")


# -- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    window: int = 3
    clamp: tuple[float, float] = (1.0, 5.0)


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float = 1.0
    steps: int | None = None
    layers: tuple[int, ...] = ()
    names: tuple[str, ...] = ("a",)
    flag: bool = True
    where: Path = Path(".")
    kind: Literal["x", "y"] = "x"


def settings(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return cli.load_config(tmp_path / "c.yaml", Outer)


def test_yaml_values_take_the_types_of_the_settings(tmp_path):
    text = """
        rate: 3e-5
        steps: 7
        layers: [4, 6]
        names: []
        flag: false
        where: a/b
        kind: y
        inner: {clamp: [0, 2.5]}
    """
    expected = Outer(Inner(3, (0.0, 2.5)), 3e-5, 7, (4, 6), (), False, Path("a/b"), "y")
    loaded = settings(tmp_path, text)
    assert loaded == expected
    assert type(loaded.rate) is float and type(loaded.inner.clamp[0]) is float
    assert settings(tmp_path, "steps: null") == Outer()
    assert settings(tmp_path, "") == Outer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 3", "stps is no setting; nearest: steps"),
        ("inner: {windw: 3}", "inner.windw is no setting; nearest: window"),
        ("zzzz: 3", "zzzz is no setting; known: inner, rate, steps"),
        ("steps: 3.5", "steps must be int"),
        ("steps: true", "steps must be int"),
        ("rate: fast", "rate must be float: got 'fast'"),
        ("rate: true", "rate must be float: got True"),
        ("flag: 1", "flag must be bool: got 1"),
        ("kind: z", "kind must be Literal"),
        ("layers: 4", r"layers must be tuple\[int, ...\]: got 4"),
        ("layers: [a]", r"layers\[0\] must be int: got 'a'"),
        ("inner: {clamp: [1]}", r"inner.clamp must be tuple\[float, float\]"),
        ("inner: 3", "inner must be a mapping of settings: got 3"),
        ("- 1", "the file must be a mapping"),
        ("a: [", "not valid YAML"),
        ("names: [1]", r"names\[0\] must be str: got 1"),
    ],
)
def test_wrong_settings_name_the_file_and_the_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/c.yaml: .*{message}"):
        settings(tmp_path, text)


def test_print_config_can_be_read_back(tmp_path, capsys):
    (tmp_path / "in.yaml").write_text("objective: cal\ncal: {window: 5}\nlearning_rate: 1e-3\n")
    options = ["--cal.clamp", "0", "2", "--report-to", "wandb", "--max-steps", "9"]
    argv = ["train", *options, "--print-config", f"--config={tmp_path / 'in.yaml'}"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    (tmp_path / "out.yaml").write_text(shown)
    config = cli.load_config(tmp_path / "out.yaml", TrainConfig)
    assert config.objective == "cal" and config.learning_rate == 1e-3
    assert config.cal.window == 5 and config.cal.clamp == (0.0, 2.0)
    assert config.report_to == ("wandb",) and config.max_steps == 9
    assert dataclasses.replace(config, cal=TrainConfig().cal).adapter == TrainConfig().adapter
    assert yaml.safe_load(shown)["cal"]["clamp"] == [0.0, 2.0]


def test_config_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    error = fails(capsys, "train", "--config", tmp_path / "c.yaml")
    start = f"fastalign train: {tmp_path}/c.yaml: learning_rat is no setting; nearest: "
    assert error.startswith(start + "learning_rate")
    assert "is not a file" in fails(capsys, "train", "--config", tmp_path / "none.yaml")
    assert "objective must be one of" in fails(capsys, "train", "--objective", "ppo")


# -- commands ------------------------------------------------------------------------------------


def test_train(folder, tmp_path, capsys):
    config = {
        "model": str(folder / "tiny"),
        "data": str(folder / "data.json"),
        "output_dir": str(tmp_path / "run"),
        "objective": "sft",
        "trainable": "all",
        "max_steps": 3,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 0,
        "progress": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    files = [tmp_path / "out" / name for name in ("r.json", "curve.png")]
    options = ["--json", str(files[0]), "--figure", str(files[1]), "--max-steps", "2"]
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), *options]) == 0
    result = json.loads(files[0].read_text())
    assert [line["step"] for line in result["history"]] == [1, 2]
    assert Path(result["path"]).is_dir() and result["classifier"] is None
    assert result["path"] in capsys.readouterr().out
    assert files[1].stat().st_size > 1000


def test_mir(folder, tmp_path, capsys):
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "layers.png"
    where = ["--model", folder / "tiny", "--images", folder / "images", "--texts", folder / "texts"]
    argv = [
        "mir",
        *where,
        "--json",
        files[0],
        "--figure",
        files[1],
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    with pytest.warns(UserWarning, match="covariance is singular"):
        assert cli.main([str(a) for a in argv]) == 0
    shown = capsys.readouterr().out
    result = json.loads(files[0].read_text())
    assert "3 samples: there are 6 images and 3 texts" in shown
    assert f"MIR {result['mir']:.4f}: 3 samples, 192 vision" in shown
    assert len(result["fid"]) == 4 and result["vision_tokens"] == 192
    assert result["seconds"] > 0 and result["peak_mib"] > 0 and result["device"] == "cpu"
    # Ten groups by default, but there are three samples.
    assert result["resamples"] == 3 and result["mir_standard_error"] > 0
    error = f"MIR {result['mir']:.4f} ± {result['mir_standard_error']:.4f}"
    assert f"{error} (standard error over 3 resamples)" in shown
    assert files[1].stat().st_size > 1000


def test_mir_cuts_long_texts_and_never_images(folder, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "red " * 1000}))
    where = ["--model", folder / "tiny", "--images", folder / "images", "--texts", tmp_path]
    report = tmp_path / "r.json"
    with pytest.warns(UserWarning, match="covariance is singular"):
        assert cli.main([str(a) for a in ["mir", *where, "--json", report]]) == 0
    # 256 is what the model can take, 64 of them image tokens.
    result = json.loads(report.read_text())
    assert (result["vision_tokens"], result["text_tokens"]) == (64, 192)
    assert result["resamples"] == 0 and "mir_standard_error" not in result
    shown = capsys.readouterr()
    assert "longer than" not in shown.err and "no standard error: one sample" in shown.out
    assert "images are never cut" in fails(capsys, "mir", *where, "--max-length", 20)


def test_mir_resamples_as_memory_allows(folder, tmp_path, monkeypatch, capsys):
    from fastalign.models import _mir

    where = ["--model", folder / "tiny", "--images", folder / "images", "--texts", folder / "texts"]
    argv = [str(a) for a in ["mir", *where, "--json", tmp_path / "r.json", "--device", "cpu"]]
    monkeypatch.setattr(_mir, "free_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match="covariance is singular"):
        assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "no standard error: " in shown and "GB each" in shown and "±" not in shown
    assert "mir_standard_error" not in json.loads((tmp_path / "r.json").read_text())
    # Asked for, it is not left out in silence.
    assert "resamples = 2 may take" in fails(capsys, *argv, "--resamples", 2)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="covariance is singular"):
        assert cli.main([*argv, "--resamples", "2"]) == 0
    assert "(standard error over 2 resamples)" in capsys.readouterr().out
    assert "resamples must be 0, or at least 2" in fails(capsys, *argv, "--resamples", 1)


def test_mir_errors(folder, tmp_path, capsys):
    base = ["mir", "--model", tmp_path, "--images", folder / "images"]
    assert "model must be a folder with a config.json" in fails(
        capsys, *base, "--texts", folder / "texts", "--samples", 2
    )
    assert "texts must hold at least one text" in fails(capsys, *base, "--texts", tmp_path)
    assert "samples must be at least 1" in fails(capsys, *base, "--texts", tmp_path, "--samples", 0)


def test_heatmap(folder, tmp_path, capsys):
    files = [tmp_path / "out" / name for name in ("r.json", "page.html", "map.png")]
    argv = ["heatmap", "--model", folder / "tiny", "--image", folder / "images" / "0.png"]
    argv += ["--text", "two red cup", "--json", files[0], "--html", files[1], "--figure", files[2]]
    assert cli.main([str(a) for a in argv]) == 0
    result = json.loads(files[0].read_text())
    assert "".join(t["text"] for t in result["tokens"]) == "two red cup <eos>"
    assert all(1 <= t["weight"] <= 5 for t in result["tokens"])
    shown = capsys.readouterr().out
    assert all(f"{t['delta']:+.3f}" in shown for t in result["tokens"])
    assert "0.png, tiny" in files[1].read_text() and files[2].stat().st_size > 1000
    argv[argv.index("--image") + 1] = tmp_path / "gone.png"
    assert "gone.png is not a file" in fails(capsys, *argv)


def test_doctor(tmp_path, capsys):
    assert cli.main(["doctor", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["devices"][0]["name"] == "cpu"
    paths = {row["op"]: (row["path"], row["why"]) for row in report["ops"]}
    assert {"ops.label_logits", "losses.structure_distill", "linalg.sqrtm"} <= paths.keys()
    if not torch.cuda.is_available():
        assert paths["ops.syrk"] == ("torch", "no CUDA device for its kernel")
        expected = "torch" if native.OBSTACLE else "compiled"
        assert paths["ops.label_logits"][0] == expected
        attention = {row["name"]: (row["usable"], row["why"]) for row in report["attention"]}
        assert attention["sdpa"] == (True, "taken on cpu")
        assert attention["flex"] == (True, "when named")
        assert attention["varlen"] == (False, "runs on CUDA devices only, not on cpu")
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Versions", "Devices", "Ops", "Extras", "attention"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the path is Triton's")
def test_doctor_says_why_compiled_kernels_are_not_in_use(monkeypatch):
    def rows():
        return {row["op"]: (row["path"], row["why"]) for row in doctor._ops()}

    monkeypatch.setattr(native, "OBSTACLE", "not built: because")
    path, why = rows()["ops.calibrate"]
    assert path == "torch" and why.endswith("compiled kernels of the CPU: not built: because")
    monkeypatch.setattr(native, "OBSTACLE", None)
    monkeypatch.setattr(native, "instructions", lambda: "avx2")
    monkeypatch.setattr(native, "MULTIPLIES_BFLOAT16", False)
    assert rows()["ops.calibrate"] == ("compiled", "on the CPU, avx2; torch for float64")
    path, why = rows()["losses.structure_distill"]
    assert path == "torch" and "lacks avx512_bf16" in why
    monkeypatch.setattr(native, "MULTIPLIES_BFLOAT16", True)
    assert rows()["losses.structure_distill"][0] == "compiled"


def test_doctor_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "CUDA_OBSTACLE", None)
    found = doctor._found

    def paths(triton):
        monkeypatch.setattr(doctor, "_found", lambda m: triton if m == "triton" else found(m))
        return {row["op"]: (row["path"], row["why"]) for row in doctor._ops()}

    assert paths(True)["ops.calibrate"][0] == paths(True)["ops.hadamard_reweight"][0] == "triton"
    assert paths(False)["ops.calibrate"] == ("torch", "triton is not installed")
    path, why = paths(False)["ops.hadamard_reweight"]
    assert path == "compiled" and "triton is not installed" in why
    monkeypatch.setattr(native, "CUDA_OBSTACLE", "built without nvcc")
    path, why = paths(False)["ops.hadamard_reweight"]
    assert path == "torch" and why.endswith("compiled kernels: built without nvcc")


def test_doctor_says_which_attention_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ages = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ages[device.index])
    torch.use_deterministic_algorithms(False)
    optional = ("flash_attn", "flash_attn.cute", "xformers.ops")
    monkeypatch.setattr(_packed_limits, "_found", lambda m: m not in optional)
    monkeypatch.setattr(_packed_limits, "_import_error", lambda name: None)
    rows = {row["name"]: row for row in doctor._attention()}
    old = "scale" not in _packed_backends.varlen_parameters()
    if old:
        assert rows["varlen"]["why"].endswith("a newer torch is needed")
    else:
        assert rows["varlen"]["why"] == "taken on cuda:0 (bfloat16)"
        assert rows["sdpa"]["why"] == "taken on cuda:0 (float32), cuda:1 (bfloat16, float32), cpu"
    here = {"version": doctor._version("torch"), "installed": True, "usable": True}
    assert rows["flex"] == {"name": "flex", **here, "why": "when named"}
    for name in ("flash-attn-4", "xformers"):
        assert not rows[name]["usable"] and not rows[name]["installed"]
        assert rows[name]["why"] == f'not installed: pip install "fastalign[{name}]"'
        assert rows[name]["version"] is None
    monkeypatch.setattr(_packed_limits, "_found", lambda m: True)
    rows = {row["name"]: row for row in doctor._attention()}
    usable = {name for name, row in rows.items() if row["usable"]}
    assert usable == set(rows) - ({"varlen"} if old else set())
    if not old:
        assert rows["flash-attn"]["why"] == "taken with a softcap, else when named"
    broken = "cannot be imported (ImportError: libcudart.so.12)"
    monkeypatch.setattr(_packed_limits, "_import_error", lambda name: broken)
    rows = {row["name"]: row for row in doctor._attention()}
    assert rows["xformers"]["installed"] and not rows["xformers"]["usable"]
    assert rows["xformers"]["why"] == broken


def test_doctor_follows_extras_of_extras(monkeypatch):
    lines = [
        "torch>=2.10",
        "here>=1; extra == 'one'",
        'gone[x]>=2; extra == "one"',
        "fastalign[one]; extra == 'all'",
        "absent; extra == 'all'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    monkeypatch.setattr(doctor, "_version", lambda p: "1" if p in ("here", "fastalign") else None)
    assert doctor._extras() == {"one": ["gone"], "all": ["gone", "absent"]}


def test_bench_runs_the_checkout(monkeypatch, tmp_path, capsys):
    package = tmp_path / "benchmarks"
    package.mkdir()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastalign" / "cli.py"))
    assert "run this from a source checkout" in fails(capsys, "bench")
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    before = sys.argv, list(sys.path)
    assert cli.main(["bench", "--op", "gram"]) == 3
    assert capsys.readouterr().out == "['--op', 'gram']\n"
    assert before == (sys.argv, sys.path)
    sys.modules.pop("benchmarks", None)


def test_demo(monkeypatch, tmp_path, capsys):
    @dataclass(frozen=True)
    class DemoConfig:
        """The demo.

        Attributes:
            seeds: How many.
        """

        seeds: int = 3

    module = types.ModuleType("fastalign.demo.run")
    module.DemoConfig = DemoConfig
    module.run = lambda config: {"seeds": config.seeds, "mir": float("nan")}
    monkeypatch.setitem(sys.modules, "fastalign.demo.run", module)
    assert cli.main(["demo", "--seeds", "5", "--json", str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text()) == {"seeds": 5, "mir": None}
    assert cli.main(["demo", "--help"]) == 0
    assert "How many." in capsys.readouterr().out
