"""The audit reads the weights that a file or directory is meant to give, says which, and refuses what is hostile."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from dit import init, models
from dit.audit import audit, targets
from dit.audit.files import Reading
from dit.cli import app
from dit.errors import UserError
from dit.models.dit.network import DiT

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
OLD = {
    "_class_name": "Transformer2DModel",
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "dropout": 0.0,
}


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["audit", *arguments])
    return result.exit_code, result.stdout, result.stderr


def diffusers_dit(**config: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(**{**SMALL, "num_embeds_ada_norm": 10, **config})


def total(network: Any) -> float:
    return float(sum(weight.double().abs().sum() for weight in network.parameters()))


def zeroed(network: Any) -> Any:
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    return network


# Directories of diffusers


@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_a_variant_beside_the_weights_is_read_only_where_it_is_asked_for(tmp_path: Path, size: str) -> None:
    """huggingface/diffusers#11182: files of a variant and files of none in one folder, loaded as a mixture."""
    network = diffusers_dit()
    expected = total(network)
    network.save_pretrained(tmp_path, max_shard_size=size)
    zeroed(network).save_pretrained(tmp_path, max_shard_size=size, variant="bf16")
    save_file({"lora_A": torch.ones(2)}, tmp_path / "pytorch_lora_weights.safetensors")
    found = targets.load(str(tmp_path), {})
    assert total(found.model) == pytest.approx(expected)
    assert found.source is not None
    assert "pytorch_lora_weights.safetensors" in found.source.ignored_files
    assert all("bf16" not in name for name in found.source.files)
    assert any("bf16" in name for name in found.source.ignored_files)
    assert set(found.source.read) == set(network.state_dict())
    assert total(targets.load(str(tmp_path), {}, reading=Reading(variant="bf16")).model) == 0
    with pytest.raises(UserError, match=r"expected diffusion_pytorch_model.fp16.safetensors"):
        targets.load(str(tmp_path), {}, reading=Reading(variant="fp16"))


def test_shards_of_a_bin_are_read_through_their_index(tmp_path: Path) -> None:
    """huggingface/diffusers#14811: a sharded .bin that `from_pretrained` does not find without an option."""
    network = diffusers_dit()
    network.save_pretrained(tmp_path, max_shard_size="40KB", safe_serialization=False)
    assert len(list(tmp_path.glob("*.bin"))) > 1
    found = targets.load(str(tmp_path), {})
    assert total(found.model) == pytest.approx(total(network))


def test_the_older_name_of_a_variants_index_is_known(tmp_path: Path) -> None:
    """huggingface/diffusers#9253: where the variant stands in the name of an index has changed."""
    network = diffusers_dit()
    network.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json")
    found = targets.load(str(tmp_path), {}, reading=Reading(variant="fp16"))
    assert total(found.model) == pytest.approx(total(network))


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    index = tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json"
    shard = next((tmp_path / "model").glob("*-00001*.safetensors"))
    shutil.move(shard, tmp_path / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(UserError, match="expected files beside it"):
        targets.load(str(tmp_path / "model"), {})


@pytest.mark.parametrize("norm", ["ada_norm_zero", "ada_norm_single"])
def test_the_class_is_the_one_that_diffusers_resolves(tmp_path: Path, norm: str) -> None:
    """huggingface/diffusers#7647, #11947: published DiT and PixArt say Transformer2DModel, and have settings of that class."""
    import diffusers

    if norm == "ada_norm_zero":
        network, more = diffusers_dit(), {"num_embeds_ada_norm": 10}
    else:
        more = {"cross_attention_dim": 16, "caption_channels": 16}
        network = diffusers.PixArtTransformer2DModel(**SMALL, **more)
    network.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**OLD, **SMALL, **more, "norm_type": norm, "of_old": 1}))
    found = targets.load(str(tmp_path), {})
    assert type(found.model) is type(network)
    assert total(found.model) == pytest.approx(total(network))
    assert found.source is not None
    assert "of_old" in found.source.ignored_settings


def test_what_a_configuration_leaves_out_has_the_default_of_the_class(tmp_path: Path) -> None:
    network = diffusers_dit(attention_head_dim=72, num_attention_heads=2)
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["attention_head_dim"]  # 72 by default; what an audit makes of a class alone is smaller
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert total(targets.load(str(tmp_path), {}).model) == pytest.approx(total(network))


def test_a_class_in_code_beside_the_configuration_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Mine", "auto_map": {"AutoModel": "mine.Mine"}}))
    code, _, told = run(str(tmp_path))
    assert code == 2
    assert "which is not executed" in told


# Checkpoints


def weights(micro: Callable[..., DiT]) -> dict[str, Tensor]:
    return init.apply(micro(), "adaln_zero", seed=0).state_dict()


def prefixed(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def other(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in found.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "timm#2003: DDP around a compiled network": lambda own: prefixed("module._orig_mod.", own),
    "timm#2003: a compiled DDP": lambda own: {"model": prefixed("_orig_mod.module.", own)},
    "nanoGPT#325: compiled, beside the optimiser": lambda own: {
        "model": prefixed("_orig_mod.", own),
        "optimizer": {"state": {}},
    },
    "OpenTAD#44: averaged weights of DDP": lambda own: {"state_dict": other(own), "state_dict_ema": prefixed("module.", own)},
    "MeanFlow#12: without averaged weights": lambda own: {"ema": {}, "model": own, "epoch": 3},
    "compiled blocks": lambda own: {
        name.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): tensor
        for name, tensor in own.items()
    },
    "Lightning": lambda own: {"state_dict": {**prefixed("model.", own), "vae.weight": torch.ones(2)}, "epoch": 1},
    "Lightning with averaged weights": lambda own: {
        "state_dict": {**prefixed("net.", other(own)), **prefixed("net_ema.module.", own)}
    },
    "ema-pytorch": lambda own: {
        **prefixed("ema_model.", own),
        **prefixed("online_model.", other(own)),
        "step": torch.tensor(1),
        "initted": torch.tensor(True),
    },
    "swa_utils.AveragedModel": lambda own: {**prefixed("module.", own), "n_averaged": torch.tensor(3)},
    "DeepSpeed": lambda own: {"module": own, "optimizer": None},
    "holders in holders": lambda own: {"params": {}, "state_dict": {"model": {"ema": own}}},
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_weights_are_found_in_whatever_trainers_wrap_around_them(micro: Callable[..., DiT], tmp_path: Path, kind: str) -> None:
    """The issues of huggingface/pytorch-image-models, karpathy/nanoGPT, sming256/OpenTAD and zhuyu-cs/MeanFlow in the names."""
    own = weights(micro)
    torch.save(WRAPPINGS[kind](own), tmp_path / "wrapped.pt")
    found = targets.load(str(tmp_path / "wrapped.pt"), {})
    assert all(torch.equal(own[name], tensor) for name, tensor in found.model.state_dict().items())
    assert found.source is not None
    assert set(found.source.read) == set(own)
    if "ema-pytorch" in kind:
        assert {"step", "initted", "online_model.pos_embed"} <= set(found.source.ignored)
    if "OpenTAD" in kind:
        assert "state_dict.pos_embed" in found.source.ignored


def test_extra_tensors_are_named_and_left_out_by_option(micro: Callable[..., DiT], tmp_path: Path) -> None:
    """thu-ml/GFT#6: a DiT with an embedder more than the code has; REPA's projectors are such tensors too."""
    path = tmp_path / "repa.pt"
    torch.save({"ema": {**weights(micro), "projectors.0.0.weight": torch.zeros(4, 64)}}, path)
    code, _, told = run(str(path))
    assert code == 2
    assert "which has no projectors.0.0.weight; leave them out with --ignore 'projectors.*'" in told
    code, shown, _ = run(str(path), "--ignore", "projectors.*", "--expect", "adaln-zero", "--json")
    assert code == 0
    assert json.loads(shown)["source"]["ignored"] == ["ema.projectors.0.0.weight"]


def test_of_several_networks_one_is_chosen_by_option(micro: Callable[..., DiT], tmp_path: Path) -> None:
    path, own = tmp_path / "two.pt", weights(micro)
    torch.save({"student": {**prefixed("a.", own), **prefixed("b.", other(own))}}, path)
    assert "(it holds student)" in run(str(path))[2]
    assert "holds 2 networks, whose names begin with 'a.', 'b.'; choose with --prefix" in run(str(path), "--key", "student")[2]
    assert run(str(path), "--key", "student", "--prefix", "a.", "--expect", "adaln-zero")[0] == 0
    assert run(str(path), "--key", "student", "--prefix", "b.", "--expect", "adaln-zero")[0] == 1


@pytest.mark.parametrize("name", ["SiT-Micro/2", "LightningDiT-Micro/2"])
def test_checkpoints_of_other_published_networks_are_read(tmp_path: Path, name: str) -> None:
    network = models.build(name, latent_size=8, latent_channels=4, num_classes=10, learn_sigma=False)
    init.apply(network, "adaln_zero", 0)
    torch.save({"ema": network.state_dict()}, tmp_path / "published.pt")
    found = targets.load(str(tmp_path / "published.pt"), {})
    audit(found.model, found.batch).expect("adaln-zero")


def test_a_function_is_filled_with_a_file_or_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_network.py").write_text(
        "import torch\n"
        "def factory():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "    return net, (torch.randn(3, 4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    zeros = {
        f"{index}.{kind}": torch.zeros((4, 4)[: 2 if kind == "weight" else 1])
        for index in (0, 1)
        for kind in ("weight", "bias")
    }
    torch.save({"state_dict": prefixed("net.", zeros)}, "zeros.ckpt")
    save_file(zeros, "model.safetensors")
    assert run("their_network:factory", "--expect", "zero-output")[0] == 1
    for given in ("zeros.ckpt", "."):
        assert run("their_network:factory", "--weights", given, "--expect", "zero-output")[0] == 0
    assert "is for package.module:function" in run("strategy:adaln_zero", "--weights", "zeros.ckpt")[2]
    torch.save({"0.weight": torch.zeros(4, 4)}, "part.pt")
    assert "1.weight" in run("their_network:factory", "--weights", "part.pt")[2]


# Hostile input: one line and exit code 2


def hostile(micro: Callable[..., DiT], kind: str, path: Path) -> None:
    own = {name: tensor.clone() for name, tensor in weights(micro).items()}
    if kind == "not a number":
        own["blocks.1.mlp.fc1.weight"][3, 4] = float("nan")
    elif kind == "a billion blocks":
        own = {name.replace("blocks.1.", "blocks.999999999."): tensor for name, tensor in own.items()}
    elif kind == "patch size 0":
        own["x_embedder.proj.weight"] = torch.zeros(64, 4, 0, 0)
    elif kind == "more entries than stored":
        own["pos_embed"] = torch.zeros(1).expand(1, 10**9, 64)
    elif kind == "quantised":
        own["blocks.0.attn.qkv.weight"] = own["blocks.0.attn.qkv.weight"].to(torch.int8)
    torch.save(own, path)
    if kind == "compressed":
        with zipfile.ZipFile(path) as plain:
            entries = {entry.filename: plain.read(entry) for entry in plain.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in entries.items():
                packed.writestr(name, b"\0" * 10**7 if name.endswith("data/0") else content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not a number", "1 of 16,384 entries of 'blocks.1.mlp.fc1.weight' are not finite"),
        ("a billion blocks", "its 2 blocks are not numbered from 0"),
        ("patch size 0", "patch size 0"),
        ("more entries than stored", "'pos_embed' has 64,000,000,000 entries, but fewer are in the file"),
        ("quantised", "'blocks.0.attn.qkv.weight' is torch.int8"),
        ("compressed", "refused: it is compressed"),
    ],
)
def test_a_hostile_checkpoint_is_refused_in_one_line(
    micro: Callable[..., DiT], tmp_path: Path, kind: str, message: str
) -> None:
    hostile(micro, kind, tmp_path / "hostile.pt")
    code, shown, told = run(str(tmp_path / "hostile.pt"))
    assert (code, shown, told.count("\n")) == (2, "", 1)
    assert message in told


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"patch_size": 0}', "DiTTransformer2DModel cannot be built: ZeroDivisionError"),
        ('{"num_layers": 1000000000}', "num_layers = 1000000000; expected at most 256"),
        ('{"attention_head_dim": 1000000000000}', "is larger than the memory"),
        ('{"sample_size": 1000000}', "sample_size = 1000000; expected at most 512"),
        ('{"in_channels": 1000000}', "in_channels = 1000000; expected at most 8192"),
        ('{"axes_dims_rope": [1000000]}', "axes_dims_rope = 1000000; expected at most 8192"),
        ('{"num_layers": 1e400}', "num_layers is no size of a network"),
        ('{"num_layers": ' + "[" * 500 + "]" * 500 + "}", "nested deeper than 32"),
        ('{"num_layers": ' + "[" * 100_000, "the JSON is nested too deep"),
    ],
)
def test_a_hostile_configuration_is_refused_in_one_line(config: str, message: str) -> None:
    code, shown, told = run("diffusers:DiTTransformer2DModel", "--config", config)
    assert (code, shown, told.count("\n")) == (2, "", 1)
    assert message in told
    assert len(told) < 2000
