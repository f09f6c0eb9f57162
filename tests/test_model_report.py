"""`fastalign doctor --model`: what works with a model and what adapters cost, without weights."""

import json

import pytest

import fastalign as fa
from fastalign import cli
from fastalign.commands.model_report import examine_model
from fastalign.testing.families import FAMILIES, RECURRENT, family

NO_GRID = ("mllama", "instructblip", "instructblip_opt", "blip2")


def folder(name, tmp_path):
    """A folder with the configuration alone."""
    model = family(name)
    model.config.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("name", [n for n in (*FAMILIES, *RECURRENT) if n != "two_towers"])
def test_a_family_is_described_by_its_configuration(name, tmp_path):
    model, path = folder(name, tmp_path)
    report = examine_model(path)
    vlm = fa.VLM(model)
    assert (report["family"], report["class"]) == (model.config.model_type, type(model).__name__)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["decoder"] == {"width": 64, "layers": 4}
    assert report["tower"]["class"] == type(vlm.vision_tower).__name__
    assert report["tower"]["width"] == 32
    works = {row["part"]: row["works"] for row in report["parts"]}
    assert works == {
        "view": True,
        "contrast": True,
        "shift": name != "mllama",
        "decoder shift": name not in NO_GRID,
        "calibration": name != "mllama",
        "distillation": name != "mllama",
    }
    assert all(row["why"] for row in report["parts"] if not row["works"])
    packed = next(row["why"] for row in report["parts"] if row["part"] == "contrast")
    assert packed == ("with packed=False" if name in RECURRENT else "")
    paper, default, calibration = report["adapters"]
    assert "why" in paper and "why" in default  # the towers of these models have too few layers
    if name == "mllama":
        assert "cross-attention" in calibration["why"]
        return
    # u and v of width 64 after 4 layers; with gradient and two moments 16 bytes each.
    assert calibration["parameters"] == 512
    assert sum(v for k, v in calibration.items() if k.endswith("_bytes")) == 16 * 512


def test_the_command_prints_the_published_adapter(tmp_path, capsys):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    text = LlamaConfig(hidden_size=512, num_hidden_layers=2, num_attention_heads=8)
    LlavaConfig(vision_config=vision, text_config=text).save_pretrained(tmp_path)
    argv = ["doctor", "--model", str(tmp_path), "--json", str(tmp_path / "r.json")]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "200,553,088" in shown and "CLIPVisionModel: 24 layers" in shown
    report = json.loads((tmp_path / "r.json").read_text())["model"]
    paper = report["adapters"][0]
    assert (paper["hidden_dim"], paper["parameters"]) == (5440, 200_553_088)
    assert paper["adamw_bytes"] == 8 * 200_553_088
    tower = {"class": "CLIPVisionModel", "layers": 24, "width": 1024}
    assert report["tower"] == {**tower, "last_read": 23, "upper_half": 13}


def test_a_saved_adapter_is_counted(tmp_path):
    model, path = folder("qwen2_5_vl", tmp_path / "model")
    adapter = fa.attach(model, fa.AdapterConfig(shift_layers=(1, 2), shift_hidden_dim=7))
    fa.save_adapter(model, tmp_path / "adapter")
    row = examine_model(path, tmp_path / "adapter")["adapters"][-1]
    assert row["adapter"] == str(tmp_path / "adapter")
    assert row["parameters"] == sum(p.numel() for p in adapter.parameters())
    _, other = folder("mistral3", tmp_path / "other")
    with pytest.raises(ValueError, match="was saved from qwen2_5_vl, and this is mistral3"):
        examine_model(other, tmp_path / "adapter")


def test_what_is_missing_is_named(tmp_path, capsys):
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    assert "must be a folder with a config.json" in capsys.readouterr().err
    assert cli.main(["doctor", "--adapter", str(tmp_path)]) == 1
    assert "model must be given with an adapter" in capsys.readouterr().err
