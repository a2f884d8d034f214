"""`sddit import`: what weights imply, where they end up, and everything that is refused with nothing written."""

import argparse
import json
import os
import sys

import numpy as np
import official
import pytest
import safetensors.torch
import torch
from latents import write_vae
from official import CLASSES, L2, S2, S4

import sddit
from sddit import cli
from sddit.api import import_weights
from sddit.config import Experiment
from sddit.errors import CheckpointError, SdditError, UsageError
from sddit.training.store import SAMPLING, read_checkpoint


def save(path, content):
    torch.save(content, path)
    return path


def implied(tmp_path, state, project, **options):
    import_weights(save(tmp_path / "w.pt", state), project, tmp_path / "out", **options)
    values = read_checkpoint(tmp_path / "out").values
    return Experiment.parse(values["experiment"]), values


@pytest.mark.parametrize(
    ("name", "size", "decoder", "expected"),
    [
        ("dit", S2, 0, {"model.size": "S/2", "diffusion.kind": "iddpm"}),
        ("dit", S4, 0, {"model.size": "S/4"}),
        ("maskdit", S2, 2, {"model.decoder_depth": 2, "model.decoder_width": 512, "diffusion.kind": "edm",
                            "method.lambda_mae": 0.1}),
        ("mdt1", S2, 1, {"method.version": "v1", "method.decoder_layers": 1, "diffusion.min_snr_gamma": None}),
        ("mdt2", L2, 2, {"model.size": "L/2", "method.version": "v2", "method.decoder_layers": 2,
                         "method.mask_ratio_max": 0.5, "diffusion.min_snr_gamma": 5.0, "train.optimizer": "adan"}),
    ],
)  # fmt: skip
def test_what_weights_imply(tmp_path, name, size, decoder, expected):
    project = name.rstrip("12")
    options = {"decoder_layers": decoder} if name == "mdt1" else {}
    experiment, values = implied(tmp_path, official.weights(name, **size, decoder=decoder), project, **options)
    assert experiment.method.name == project and experiment.model.grid == "tiny"
    fields = sddit.config.flatten(experiment.model_dump())
    assert {k: fields[k] for k in expected} == expected
    assert (values["shape"], values["num_classes"]) == ([4, 8, 8], CLASSES)
    assert experiment.data.shape == (4, 8, 8) and experiment.data.num_classes == CLASSES


def test_a_decoder_without_mask_token_did_not_reconstruct(tmp_path):
    experiment, _ = implied(tmp_path, official.weights("maskdit", **S2, mask_token=False), "maskdit")
    assert experiment.method.lambda_mae == 0


def test_an_odd_encoder_of_version_2_has_lost_a_block(tmp_path):
    """4 blocks of which 1 decodes: 1 + 1 + 1, the size with a block more than there is, unless one has just that."""
    state = official.weights("mdt2", **(L2 | {"width": 128}), decoder=1)
    experiment, _ = implied(tmp_path, state, "mdt")
    assert experiment.model.size == "XL/2" and experiment.method.decoder_layers == 1


def test_the_published_size(tmp_path):
    """Twelve blocks of width 384 are S of the paper."""
    state = official.weights("dit", width=384, depth=12, heads=6, patch=8)
    experiment, _ = implied(tmp_path, state, "dit")
    assert (experiment.model.grid, experiment.model.size) == ("paper", "S/8")


def test_version_1_has_two_decoder_blocks_unless_said(tmp_path):
    experiment, _ = implied(tmp_path, official.weights("mdt1", **L2), "mdt")
    assert experiment.method.decoder_layers == 2


WRAPPED = {
    "plain": lambda s: s,
    "a trainer's": lambda s: {
        "model": {k: v * 0 for k, v in s.items()},
        "ema": s,
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", epochs=1400),
    },
    "without an average": lambda s: {"model": s},
    "by DistributedDataParallel, compiled": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "within a preconditioner": lambda s: {"ema": {f"model.{k}": v for k, v in s.items()}},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_way_in_which_weights_come(tmp_path, wrap, legacy):
    state = official.weights("dit", **S2)
    torch.save(WRAPPED[wrap](state), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    import_weights(tmp_path / "w.pt", "dit", tmp_path / "out")
    ours = read_checkpoint(tmp_path / "out").load(SAMPLING)
    expected = state["blocks.1.mlp.fc1.weight"]
    expected = expected.half().float() if wrap == "half precision" else expected
    assert torch.equal(ours["blocks.1.mlp.hidden.weight"], expected)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


def test_safetensors(tmp_path):
    state = official.weights("mdt2", **L2, decoder=2)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    import_weights(tmp_path / "w.safetensors", "mdt", tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").values["imported"]["from"] == "mdt"


def test_an_averaged_positional_code_is_kept_as_it_is(tmp_path):
    """DiT's trainer averages the fixed code too, which rounding moves by up to 1.7e-4."""
    state = official.weights("dit", **S2)
    state["pos_embed"] = state["pos_embed"] * (1 - 1.6e-4)
    implied(tmp_path, state, "dit")
    ours = read_checkpoint(tmp_path / "out").load(SAMPLING)["pos_embed"]
    assert torch.equal(ours, state["pos_embed"][0])


def test_it_is_sampled_as_said(tmp_path, capsys, monkeypatch):
    save(tmp_path / "w.pt", official.weights("dit", **S2))
    command = ["sddit", "import", str(tmp_path / "w.pt"), "--from", "dit", "--out", str(tmp_path / "a" / "b")]
    settings = ["--set", "eval.guidance=1.5", "--set", "eval.sampler=ddim", "--set", "eval.sampler_steps=2"]
    monkeypatch.setattr(sys, "argv", command + settings)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"dit S/2, {CLASSES} classes, 4×8×8\n{tmp_path}/a/b\n"
    with pytest.raises(UsageError, match=r"makes latents \(4, 8, 8\) .*--vae"):
        sddit.sample(tmp_path / "a" / "b", [0, 1, 2])
    images = sddit.sample(tmp_path / "a" / "b", [0, 1, 2], vae=str(write_vae(tmp_path / "vae")))
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]  # no remains


# ------------------------------------------------------------------------------------------------------------- refused


class Code:
    """What a hostile pickle does when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


def truncated(path):
    save(path, official.weights("dit", **S2))
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_safetensors(path):
    safetensors.torch.save_file(official.weights("dit", **S2), path)
    path.write_bytes(path.read_bytes()[:-1000])


def dit(**changes):
    """Writes weights of DiT with tensors replaced, or with None left out."""

    def write(path):
        named = {k.replace("__", "."): v for k, v in changes.items()}
        save(path, {k: v for k, v in (official.weights("dit", **S2) | named).items() if v is not None})

    return write


def of(name, project=None, **options):
    size = options.pop("size", S2)
    return lambda path: save(path, official.weights(name, **size, **options))


def two_codes(path):
    state = official.weights("maskdit", **S2)
    state["decoder_pos_embed"] = state["decoder_pos_embed"].flip(2)
    save(path, state)


def other_index(path):
    state = official.weights("mdt2", **L2, decoder=2)
    name = "de_blocks.1.attn.rel_pos_bias.relative_position_index"
    save(path, state | {name: state[name].T.contiguous()})


D = S2["width"]
BAD_FILES = {
    "code": (lambda p: save(p, {"pos_embed": Code(p.with_name("ran"))}), "dit",
             r"more than weights: reading it would run (posix|nt)\.system\. Nothing was run"),
    "code, legacy": (lambda p: torch.save({"a": Code(p.with_name("ran"))}, p, _use_new_zipfile_serialization=False),
                     "dit", r"would run (posix|nt)\.system"),
    "truncated": (truncated, "dit", r"w\.pt is damaged or nothing that torch\.save wrote"),
    "truncated safetensors": (truncated_safetensors, "dit", r"w\.safetensors is damaged or no safetensors file"),
    "text": (lambda p: p.write_text("404: not found\n" * 9), "dit", "is damaged or nothing that torch.save wrote"),
    "empty": (lambda p: p.write_bytes(b""), "dit", "is damaged or nothing that torch.save wrote"),
    "absent": (lambda p: None, "dit", r"w\.pt does not exist"),
    "a list": (lambda p: save(p, [1, 2]), "dit", "holds a list, not tensors by name"),
    "no tensors": (lambda p: save(p, {"lr": 1e-4, "step": 3}), "dit", "'lr' is a float, not a dense tensor"),
    "sparse": (dit(blocks__0__attn__proj__bias=torch.ones(D).to_sparse()), "dit", "not a dense tensor"),
    "nothing": (lambda p: save(p, {}), "dit", "no weights that are known here: it has no tensors"),
    "another network": (lambda p: save(p, {f"conv{i}.weight": torch.ones(1) for i in range(12)}), "dit",
                        r"no weights that are known here: it has conv0\.weight.*and 4 more.*Known: DiT, MaskDiT"),
    "maskdit as dit": (of("maskdit"), "dit", r"weights of MaskDiT, not of DiT\. Use --from maskdit"),
    "dit as maskdit": (of("dit"), "maskdit", r"weights of DiT, not of MaskDiT\. Use --from dit"),
    "mdt as dit": (of("mdt1"), "dit", r"weights of MDT, not of DiT\. Use --from mdt"),
    "diffusers as dit": (lambda p: save(p, official.as_diffusers(official.weights("dit", **S2), 2)), "dit",
                         r"weights of diffusers' DiTTransformer2DModel, not of DiT\. Use --from diffusers"),
    "ours": (lambda p: save(p, {"patch_embed.weight": torch.ones(1)}), "dit", "Give its folder with --from sddit"),
    "a file as folder": (of("dit"), "diffusers", r"w\.pt is a file\. Give the folder"),
    "missing": (dit(blocks__1__mlp__fc1__bias=None, t_embedder__mlp__0__weight=None), "dit",
                r"Missing: t_embedder\.mlp\.0\.weight, blocks\.1\.mlp\.fc1\.bias\."),
    "missing size": (dit(pos_embed=None), "dit", "lacks pos_embed, so its sizes are not known"),
    "unknown": (dit(blocks__1__attn__q_norm__weight=torch.ones(16)), "dit",
                r"Unknown: blocks\.1\.attn\.q_norm\.weight\. .*another variant"),
    "another size": (dit(final_layer__linear__bias=torch.ones(3)), "dit",
                     r"final_layer\.linear\.bias is \(3,\), not \(32,\)"),
    "dimensions": (dit(pos_embed=torch.ones(16, D)), "dit", "must have 3 dimensions"),
    "not in the grid": (of("dit", size=S2 | {"depth": 3}), "dit",
                        r"has 3 blocks of width 64, which is no known size.*paper: S 12×384.*tiny: S 2×64"),
    "patch": (of("dit", size=S2 | {"patch": 3}), "dit", r"patches of 3×3, but known are"),
    "not square": (dit(pos_embed=torch.ones(1, 15, D)), "dit", "15 positions, which are no square grid"),
    "no variance": (of("dit", out=4), "dit", "puts out 4 channels for 4, but dit is imported with 8: noise and"),
    "positional code": (dit(pos_embed=official.code(D, 4).flip(1)), "dit", "from the fixed code of sines and cosines"),
    "not finite": (dit(blocks__0__attn__proj__bias=torch.full((D,), torch.nan)), "dit",
                   r"blocks\.0\.attn\.proj\.bias .* finite"),
    "integers": (dit(blocks__0__attn__proj__bias=torch.ones(D, dtype=torch.int64)), "dit", "finite floating-point"),
    "decoder's code": (two_codes, "maskdit", "decoder_pos_embed .* fixed code"),
    "relative index": (other_index, "mdt", r"de_blocks\.1.*numbers the offsets between tokens in another way"),
    "all decoder": (of("mdt1"), "mdt", r"decoder_layers is 2, but size 'S/2' has 2 blocks.*Use at most 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("name", BAD_FILES)
def test_refused(tmp_path, name):
    write, project, message = BAD_FILES[name]
    path = tmp_path / ("w.safetensors" if "safetensors" in name else "w.pt")
    write(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SdditError, match=message) as error:
        import_weights(path, project, tmp_path / "runs" / "out")
    assert len(str(error.value)) < 700
    assert sorted(tmp_path.iterdir()) == before  # the pickle did not run, and nothing was written


def test_refused_arguments(tmp_path):
    path = save(tmp_path / "w.pt", official.weights("dit", **S2))
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for out, options, message in [
        (tmp_path / "empty", {}, "empty exists, and nothing is overwritten"),
        (path, {}, "w.pt exists"),
        (path / "below", {}, "w.pt is no folder"),
        ("s3://bucket/runs", {}, "not a local folder"),
        (tmp_path / "out", {"decoder_layers": 2}, "--decoder-layers is for MDT version 1 alone"),
        (tmp_path / "out", {"settings": {"model.size": "B/2"}}, "model.size cannot be set"),
        (tmp_path / "out", {"settings": {"eval.guidence": 2}}, "Did you mean 'eval.guidance'"),
        (tmp_path / "out", {"settings": {"eval.sampler": "heun"}}, "'heun' is not for iddpm"),
    ]:
        with pytest.raises(UsageError, match=message):
            import_weights(path, "dit", out, **options)
    with pytest.raises(UsageError, match="all other weights tell it themselves"):
        v2 = save(tmp_path / "v2.pt", official.weights("mdt2", **L2, decoder=2))
        import_weights(v2, "mdt", tmp_path / "out", decoder_layers=1)
    assert sorted(tmp_path.iterdir()) == sorted([*before, v2])


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from sddit.training.store import CheckpointStore

    def full(*args):
        raise OSError(28, "No space left on device")

    path = save(tmp_path / "w.pt", official.weights("dit", **S2))
    monkeypatch.setattr(CheckpointStore, "_write_manifest", full)
    with pytest.raises(CheckpointError, match=r"Cannot write .*No space left"):
        import_weights(path, "dit", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------------- diffusers

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.01,
             "beta_schedule": "linear", "prediction_type": "epsilon", "trained_betas": None}  # fmt: skip


def pipeline(folder, state=None, config=CONFIG, scheduler=SCHEDULER, weights="diffusion_pytorch_model.safetensors"):
    """A DiTPipeline's folder, by hand."""
    state = official.as_diffusers(official.weights("dit", **S2), 2) if state is None else state
    for name, content in (("transformer/config.json", config), ("scheduler/scheduler_config.json", scheduler)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if weights.endswith(".bin"):
        torch.save(state, folder / "transformer" / weights)
    else:
        safetensors.torch.save_file(state, folder / "transformer" / weights)
    return folder


@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_a_pipeline_tells_its_schedule(tmp_path, weights):
    folder = pipeline(tmp_path / "pipe", weights=weights)
    experiment = import_weights(folder, "diffusers", tmp_path / "out")
    assert (experiment.diffusion.timesteps, experiment.diffusion.beta_start, experiment.diffusion.beta_end) == (
        500, 2e-4, 0.01)  # fmt: skip
    alone = import_weights(folder / "transformer", "diffusers", tmp_path / "out2")
    assert alone.diffusion.timesteps == 1000
    first, second = (read_checkpoint(tmp_path / name).load(SAMPLING) for name in ("out", "out2"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def changed_block():
    state = official.as_diffusers(official.weights("dit", **S2), 2)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    return state | {name: state[name] + 1e-6}


BAD_PIPELINES = {
    "no config": ({"config": None}, r"config\.json does not exist, so .*transformer is not complete"),
    "no scheduler": ({"scheduler": None}, r"scheduler_config\.json does not exist"),
    "another model": ({"config": CONFIG | {"_class_name": "PixArtTransformer2DModel"}}, "holds a PixArtTransformer2D"),
    "another variant": ({"weights": "diffusion_pytorch_model.fp16.safetensors"}, "has neither .* must be saved again"),
    "heads": ({"config": CONFIG | {"num_attention_heads": 8}}, "has 8 attention heads, but size S has 4"),
    "activation": ({"config": CONFIG | {"activation_fn": "gelu"}}, "has activation_fn 'gelu', but DiT has"),
    "no sample size": ({"config": without(CONFIG, "sample_size")}, "has sample_size None, but must have a positive"),
    "huge": ({"config": CONFIG | {"sample_size": 10**9}}, "a side must be in 1 … 4096"),
    "schedule": ({"scheduler": SCHEDULER | {"beta_schedule": "scaled_linear"}}, "on a scaled_linear schedule"),
    "prediction": ({"scheduler": SCHEDULER | {"prediction_type": "v_prediction"}}, "to predict 'v_prediction'"),
    "blocks disagree": ({"state": changed_block()}, r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_1\."
                        r"bias .* differs from transformer_blocks\.0.*embedders of their own cannot be imported"),
    "another code": ({"state": changed_block() | {"pos_embed.pos_embed": torch.ones(1, 16, 64)}}, "fixed code"),
    "names of dit": ({"state": official.weights("dit", **S2)}, "weights of DiT, not of diffusers'.*Use --from dit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PIPELINES)
def test_refused_pipelines(tmp_path, name):
    changes, message = BAD_PIPELINES[name]
    folder = pipeline(tmp_path / "pipe", **changes)
    with pytest.raises(SdditError, match=message):
        import_weights(folder, "diffusers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("source", "out", "status"), [("dit", "out", 1), ("dit", "w.pt", 2), ("ditt", "out", 2)])
def test_refused_on_the_command_line(tmp_path, capsys, monkeypatch, source, out, status):
    """In words, and with the status that the kind of mistake has."""
    path = save(tmp_path / "w.pt", {"a": Code(tmp_path / "ran")})
    monkeypatch.setattr(sys, "argv", ["sddit", "import", str(path), "--from", source, "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == status
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
