"""timm's NaFlexVit, accelerated: the same numbers, the same parameters, and a clear no to what is not covered.

Runs wherever timm is installed, real timm beside the real torchvision that it imports; a timm that does not import is
an error here, not a skip. On a CPU the checks are in float32 against timm itself, seeds included.
"""

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from navit.graphs import Captured
from navit.integrations import timm as integration
from navit.integrations.padding import unpad, whole
from navit.integrations.resampling import MODES, resampled_positions
from navit.integrations.timm import accelerate
from navit_kernels.testing import assert_error_within

ROOT = Path(__file__).parent.parent
PATCH, TABLE = 4, (4, 4)
SMALL = dict(
    patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, num_classes=5, pos_embed_grid_size=TABLE, mlp_ratio=2
)
GRIDS = [(3, 5), (1, 1), (4, 4), (2, 7), (9, 1)]
OPS_OF_TORCHVISION: list[torch.library.Library] = []

# Every option of NaFlexVitCfg and of the constructor: compared here, refused, or without a say in what runs.
COMPARED: dict[str, dict[str, Any]] = {
    "map": {},
    "plain": dict(pos_embed="none", qkv_bias=False, proj_bias=False, global_pool="avg", num_classes=3),
    "gap": dict(global_pool="avg", reg_tokens=3, init_values=0.3, fc_norm=True),
    "token": dict(global_pool="token", class_token=True, reg_tokens=2, qk_norm=True, pos_embed="factorized"),
    "max": dict(global_pool="max", class_token=True, pool_include_prefix=True, use_key_only_attn_mask=True),
    "avgmax": dict(global_pool="avgmax", class_token=True, pos_embed_ar_preserving=True),
    "no pool": dict(global_pool="", fc_norm=True, class_token=True, drop_path_rate=0.5),
    "map with prefix": dict(class_token=True, pool_include_prefix=True, attn_pool_num_heads=4, attn_pool_mlp_ratio=1.0),
    "norms": dict(pre_norm=True, final_norm=False, norm_layer="rmsnorm", qk_norm=True, embed_norm_layer="layernorm"),
    "inner norms": dict(scale_mlp_norm=True, scale_attn_inner_norm=True, norm_layer="layernormfp32", act_layer="silu"),
    "drop path": dict(drop_path_rate=0.5, init_values=0.5),
    "patch drop": dict(patch_drop_rate=0.5, class_token=True, global_pool="avg"),
    "patch drop, no pool": dict(patch_drop_rate=0.3, drop_path_rate=0.3, global_pool="", pos_embed="factorized"),
    "deep and narrow": dict(depth=4, num_heads=4, embed_dim=16, in_chans=1, attn_pool_num_heads=2),
}
POSITIONS: list[dict[str, Any]] = [
    dict(pos_embed="learned", pos_embed_interp_mode=mode, pos_embed_use_grid_sample=sample, pos_embed_ar_preserving=ar,
         pos_embed_grid_size=size, pos_embed_antialias=antialias, pos_embed_align_corners=corners)
    for mode, (sample, antialias), ar, (size, corners) in itertools.product(
        MODES, ((False, True), (False, False), (True, True)), (False, True), (((3, 5), False), ((4, 4), True))
    )
] + [
    dict(pos_embed="factorized", pos_embed_use_grid_sample=sample, pos_embed_ar_preserving=ar,
         pos_embed_grid_size=(3, 5))
    for sample, ar in itertools.product((False, True), repeat=2)
]  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "rope_type": dict(rope_type="axial"),
    "attn_type": dict(attn_type="rope"),
    "attn_gated": dict(attn_gated=True),
    "attn_only_layer_scale": dict(attn_only_layer_scale=True, init_values=0.1),
    "num_kv_heads": dict(attn_type="rope", num_kv_heads=1, qkv_fused=False),
    "swiglu_mlp": dict(swiglu_mlp=True),
    "block_fn": dict(block_fn="ParallelScalingBlock"),
    "attn_layer": dict(attn_layer="diff"),
    "attn_drop_rate": dict(attn_drop_rate=0.1),
    "norm_layer": dict(norm_layer="simplenorm"),
    "mlp_layer": dict(mlp_layer="ConvMlp"),
    "pos_embed_interp_mode": dict(pos_embed_interp_mode="nearest"),
}
OTHERWISE_COMPARED = {
    "embed_proj_type", "dynamic_img_pad", "patchify_channels_last", "enable_patch_interpolator", "img_size", "dtype",
    "drop_rate", "pos_drop_rate", "proj_drop_rate",
}  # fmt: skip
WITHOUT_A_SAY = {
    "weight_init", "fix_init", "device", "input_norm_layer", "cfg", "kwargs",
    # of the blocks or rotary positions that are refused:
    "qkv_fused", "swiglu_align_to", "rope_temperature", "rope_ref_feat_shape", "rope_grid_offset", "rope_grid_indexing",
    "rope_rotate_half", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords", "rope_mrope_section",
}  # fmt: skip


@pytest.fixture(scope="module")
def naflexvit() -> Any:
    """timm.models.naflexvit.

    timm imports torchvision, whose compiled operators (non-maximum suppression and the like, which timm's models do not
    call) are built for torch's CUDA build. Beside its CPU build they do not load, and torchvision stops where it
    describes two of them. Declared here, they are there to be described.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm torchvision")
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPS_OF_TORCHVISION.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    return importlib.import_module("timm.models.naflexvit")


def make(naflexvit: Any, seed: int = 0, **changes: Any) -> Any:
    """timm's model, with no parameter left at a value such as one or zero."""
    torch.manual_seed(seed)
    known = {field.name for field in dataclasses.fields(naflexvit.NaFlexVitCfg)}
    known |= inspect.signature(naflexvit.NaFlexVit).parameters.keys()
    as_before = {"pos_embed_antialias": True, "pos_embed_align_corners": False}  # of options that came later
    changes = {n: value for n, value in changes.items() if n in known or as_before.get(n, not value) != value}
    if changes.keys() - known:
        pytest.skip(f"this timm has no {sorted(changes.keys() - known)}")
    if changes.get("mlp_layer") == "ConvMlp":
        changes["mlp_layer"] = importlib.import_module("timm.layers").ConvMlp
    if changes.get("block_fn") == "ParallelScalingBlock":
        changes["block_fn"] = importlib.import_module("timm.models.vision_transformer").ParallelScalingBlock
    model = naflexvit.NaFlexVit(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch(grids: list[tuple[int, int]] = GRIDS, values: int = 3 * PATCH**2, padding: int = 2) -> dict[str, Tensor]:
    """What timm's loader gives, padded to the longest and a little more."""
    slots = max(rows * columns for rows, columns in grids) + padding
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(len(grids), slots, values, generator=generator)
    coords = torch.zeros(len(grids), slots, 2, dtype=torch.int64)
    valid = torch.zeros(len(grids), slots, dtype=torch.bool)
    for image, (rows, columns) in enumerate(grids):
        count = rows * columns
        coords[image, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(count, 2)
        valid[image, :count] = True
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


def to(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(model: Any, inputs: Any, seed: int = 5) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output at valid tokens and gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(inputs)
    if out.dim() == 3 and isinstance(inputs, dict):
        if model.training and model.patch_drop is not None:
            torch.manual_seed(seed)
            valid = model.forward_features(**inputs)["patch_valid"]
        else:
            valid = inputs["patch_valid"]
        prefix = valid.new_ones(len(valid), model.num_prefix_tokens)
        out = out[torch.cat([prefix, valid], 1)]
    direction = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out).sin()
    (out.float() * direction).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model: Any, fast: Any, inputs: Any, limit: float = 1e-5) -> None:
    """Outputs and gradients of two models agree to float32's rounding."""
    (expected, gradients), (out, fast_gradients) = run(model, inputs), run(fast, inputs)
    assert out.shape == expected.shape
    assert (out - expected).norm() <= limit * expected.norm()
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        got = fast_gradients[name]
        assert (gradient is None) == (got is None), name
        if gradient is not None and got is not None:
            # no output depends on k_norm's bias: its gradient is nothing but rounding
            size = gradients[name.replace("k_norm.bias", "k_norm.weight")]
            assert (got - gradient).norm() <= limit * size.norm(), name  # type: ignore[union-attr]


def pair(naflexvit: Any, train: bool = True, **changes: Any) -> tuple[Any, Any]:
    model = make(naflexvit, **changes).train(train)
    return model, accelerate(copy.deepcopy(model))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("changes", COMPARED.values(), ids=COMPARED.keys())
def test_same_output_and_gradients_as_timm(naflexvit: Any, changes: dict[str, Any], train: bool) -> None:
    assert_same(*pair(naflexvit, train, **changes), batch(values=changes.get("in_chans", 3) * PATCH**2))


@pytest.mark.parametrize("name", COMPARED)
def test_whole_blocks_hold_timms_parameters(naflexvit: Any, name: str, monkeypatch: Any) -> None:
    taken, one_op = [], integration.one_op
    monkeypatch.setattr(integration, "one_op", lambda *inputs: taken.append(inputs) or one_op(*inputs))
    changes = COMPARED[name]
    model, fast = pair(naflexvit, **changes)
    assert_same(model, fast, batch(values=changes.get("in_chans", 3) * PATCH**2))
    with_following_norm = len(model.blocks) - isinstance(model.norm, nn.Identity)
    assert len({id(inputs[2].qkv) for inputs in taken}) == (0 if name == "inner norms" else with_following_norm)


def test_linear_layers_that_are_watched_or_replaced_are_called(naflexvit: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(integration, "one_op", lambda *_: pytest.fail("their blocks run op by op"))
    model, fast = pair(naflexvit, proj_drop_rate=0.0)
    seen = []
    for block, attribute in zip(fast.blocks, ("qkv", "proj"), strict=True):
        getattr(block.attn, attribute).register_forward_hook(lambda *_: seen.append(1))
    assert_same(model, fast, batch())
    assert len(seen) == 2

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for block in (*model.blocks, *fast.blocks):
        block.mlp.fc2.__class__ = Doubled
    assert_same(model, fast, batch())


@pytest.mark.parametrize("changes", POSITIONS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_same_positions_as_timm(naflexvit: Any, changes: dict[str, Any]) -> None:
    inputs = batch([*GRIDS, (3, 5), (6, 10), (5, 3)])
    if changes["pos_embed_use_grid_sample"]:  # patches in any order, each where its coordinates say
        order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
        for name in inputs:
            inputs[name] = inputs[name][:, :60][:, order]
    assert_same(*pair(naflexvit, depth=1, num_heads=1, embed_dim=16, **changes), inputs)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_resampled_positions_are_those_of_interpolate(mode: str, antialias: bool, corners: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for table_size, size in itertools.product([(16, 16), (7, 5), (1, 3)], [(16, 16), (3, 20), (1, 1), (9, 2), (7, 5)]):
        table = torch.randn(*table_size, 3, generator=generator)
        coords = torch.cartesian_prod(*map(torch.arange, size)).view(-1, 2)
        options = dict(mode=mode, antialias=antialias, align_corners=corners)
        got = resampled_positions(table, coords, torch.tensor(size).expand_as(coords), **options)
        expected, exact = (
            interpolate(table.to(dtype).permute(2, 0, 1)[None], size, **options)[0].flatten(1).T  # type: ignore[arg-type]
            for dtype in (torch.float32, torch.float64)
        )
        assert (got - exact).norm() <= 2e-6 * exact.norm()
        assert (got - expected).norm() <= 2e-6 * exact.norm()


def test_padding_and_back() -> None:
    valid = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()
    pack = unpad(valid, torch.device("cpu"), prefix=1)
    assert pack.slots_T.tolist() == [0, 1, 3, 5]
    assert pack.cu_seqlens.tolist() == [0, 2, 4, 4]
    assert pack.plan.cu_seqlens.tolist() == [0, 3, 6, 7]
    x_TE, prefix_RE = torch.arange(4.0).view(4, 1), torch.tensor([[9.0]])
    packed = pack.with_prefix(x_TE, prefix_RE)
    assert packed.flatten().tolist() == [9, 0, 1, 9, 2, 3, 9]
    assert torch.equal(pack.without_prefix(packed), x_TE)
    assert pack.pad(packed)[..., 0].tolist() == [[9, 0, 1, 0], [9, 2, 0, 3], [9, 0, 0, 0]]
    with torch.inference_mode():
        full = unpad(torch.ones(2, 3).bool(), torch.device("cpu"))
    assert full is whole(2, 3, torch.device("cpu"))  # kept, and as good for training
    assert not full.slots_T.is_inference()
    torch.func.grad(lambda x: x * whole(2, 5, torch.device("cpu")).slots_T.shape[0])(torch.ones(()))
    assert whole(2, 5, torch.device("cpu")).plan.items.data_ptr()  # not what the transform had
    assert full.slots_T.tolist() == list(range(6))
    assert full.plan.cu_seqlens.tolist() == [0, 3, 6]


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        (dict(), (16, 16)),
        (dict(class_token=True, reg_tokens=1, global_pool="token", drop_path_rate=0.5, patch_drop_rate=0.3), (12, 20)),
        (dict(embed_proj_type="conv", pos_embed="factorized", global_pool="avg"), (8, 24)),
        (dict(dynamic_img_pad=True, global_pool=""), (13, 10)),
        (dict(patchify_channels_last=False, global_pool="", pos_embed_grid_size=None, img_size=8), (8, 8)),
    ],
    ids=["plain", "dropping", "conv", "padded", "channels first"],
)  # fmt: skip
def test_same_for_batches_of_images(naflexvit: Any, changes: dict[str, Any], size: tuple[int, int]) -> None:
    model, fast = pair(naflexvit, **changes)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    assert_same(model, fast, images)
    model.eval(), fast.eval()
    torch.testing.assert_close(fast.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_same_for_other_patch_sizes(naflexvit: Any, last: bool) -> None:
    model, fast = pair(naflexvit, enable_patch_interpolator=True, patchify_channels_last=last)
    inputs = batch(values=3 * 6 * 6)
    inputs["patches"] = inputs["patches"].unflatten(2, (6, 6, 3) if last else (3, 6, 6))
    assert_same(model, fast, inputs)


def test_patches_of_the_models_size_may_come_in_three_axes(naflexvit: Any) -> None:
    model, fast = pair(naflexvit)
    inputs = batch()
    inputs["patches"] = inputs["patches"].unflatten(2, (PATCH, PATCH, 3))
    assert_same(model, fast, inputs)


def test_valid_patches_may_stand_anywhere(naflexvit: Any) -> None:
    model, fast = pair(naflexvit, class_token=True)
    inputs = batch()
    inputs["patch_valid"] = torch.rand(inputs["patch_valid"].shape, generator=torch.Generator().manual_seed(3)) < 0.5
    inputs["patch_valid"][:, 0] = True
    assert_same(model, fast, inputs)


def test_gradient_checkpointing_changes_nothing(naflexvit: Any) -> None:
    model, fast = pair(naflexvit, drop_path_rate=0.5, qk_norm=True)
    fast.set_grad_checkpointing()
    assert_same(model, fast, batch())


def test_arguments_do_as_well_as_a_dict(naflexvit: Any) -> None:
    _, fast = pair(naflexvit, train=False)
    inputs = batch()
    together = fast(inputs)
    apart = fast(inputs["patches"], inputs["patch_coord"], inputs["patch_valid"])
    torch.testing.assert_close(apart, together, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [dict(), dict(reg_tokens=2, pos_embed="none")], ids=["plain", "registers"])
def test_features_are_padded_again(naflexvit: Any, changes: dict[str, Any]) -> None:
    model, fast = pair(naflexvit, train=False, **changes)
    inputs = batch()
    expected, features = model.forward_features(**inputs), fast.forward_features(**inputs)
    assert features["patch_valid"] is inputs["patch_valid"]
    valid = torch.cat([torch.ones(len(GRIDS), model.num_prefix_tokens).bool(), inputs["patch_valid"]], 1)
    assert features["patches"].shape == expected["patches"].shape
    torch.testing.assert_close(features["patches"][valid], expected["patches"][valid], rtol=1e-4, atol=1e-5)
    assert not features["patches"][~valid].any()
    torch.testing.assert_close(fast.forward_head(**features), fast(inputs), rtol=1e-4, atol=1e-5)
    everything = fast.forward_features(inputs["patches"], inputs["patch_coord"])
    assert everything["patch_valid"] is None
    whole = model.forward_features(inputs["patches"], inputs["patch_coord"])["patches"]
    torch.testing.assert_close(everything["patches"], whole, rtol=1e-4, atol=1e-5)


def test_padding_is_never_read(naflexvit: Any) -> None:
    _, fast = pair(naflexvit, train=False, class_token=True, global_pool="avg")
    inputs = batch()
    expected = fast(inputs)
    inputs["patches"][~inputs["patch_valid"]] = torch.nan
    assert torch.equal(fast(inputs), expected)


def test_other_images_do_not_matter(naflexvit: Any) -> None:
    _, fast = pair(naflexvit, train=False)
    inputs = batch()
    together = fast(inputs)
    alone = torch.cat([fast({name: tensor[i : i + 1] for name, tensor in inputs.items()}) for i in range(len(GRIDS))])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("pool", ["avg", "max", "map"])
def test_an_image_without_patches_pools_to_zeros(naflexvit: Any, pool: str) -> None:
    model, fast = pair(naflexvit, train=False, global_pool=pool, reg_tokens=1)
    inputs = batch()
    inputs["patch_valid"][1] = False
    expected, out = model(inputs), fast(inputs)
    others = [0, 2, 3, 4]
    torch.testing.assert_close(out[others], expected[others], rtol=1e-4, atol=1e-5)
    if pool == "avg":
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


def test_stochastic_depth_is_drawn_per_image(naflexvit: Any) -> None:
    """Equal images, half of them dropped: some come out one way, some another, none in between."""
    _, fast = pair(naflexvit, depth=1, drop_path_rate=0.0)
    drop_path = importlib.import_module("timm.layers").DropPath
    fast.blocks[0].drop_path1, fast.blocks[0].drop_path2 = drop_path(0.5), drop_path(0.5)
    inputs = {name: tensor[:1].expand(64, *tensor.shape[1:]) for name, tensor in batch(padding=0).items()}
    torch.manual_seed(0)
    kinds = torch.unique(fast(inputs).detach().round(decimals=4), dim=0)
    assert len(kinds) == 4


def test_dropout_of_elements_happens_in_training_only(naflexvit: Any) -> None:
    for option in ("drop_rate", "pos_drop_rate", "proj_drop_rate"):
        model, fast = pair(naflexvit, train=False, **{option: 0.5})
        assert_same(model, fast, batch())
        fast.train()
        torch.manual_seed(0)
        assert not torch.allclose(fast(batch()), fast(batch())), option


def test_bfloat16_is_as_exact_as_timms(naflexvit: Any) -> None:
    model, fast = pair(naflexvit, class_token=True, qk_norm=True, init_values=0.5)
    exact, inputs = run(model, batch()), batch()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = run(model, inputs), run(fast, inputs)
    assert_error_within(ours[0], exact[0], theirs[0], "output")
    flat = [torch.cat([part[1][n].flatten() for n in exact[1]]) for part in (ours, exact, theirs)]  # type: ignore[union-attr]
    assert_error_within(*flat, "gradients")
    inputs["patches"] = inputs["patches"].bfloat16()
    assert fast.bfloat16()(inputs).dtype == torch.bfloat16


def test_the_model_stays_timms(naflexvit: Any) -> None:
    model = make(naflexvit, class_token=True)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    fast = accelerate(model)
    assert fast is model
    assert accelerate(fast) is fast
    assert isinstance(fast, naflexvit.NaFlexVit)
    assert list(fast.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in fast.named_parameters())
    assert fast.no_weight_decay() == {"embeds.pos_embed", "embeds.cls_token", "embeds.reg_token"}
    fast.eval()
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(copied) is type(fast)
        assert torch.equal(copied(batch()), fast(batch()))
    fast.reset_classifier(7, "avg")
    assert fast(batch()).shape == (len(GRIDS), 7)


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_covered_is_refused_by_name(naflexvit: Any, option: str) -> None:
    model = make(naflexvit, **REFUSED[option])
    with pytest.raises(NotImplementedError, match=option):
        accelerate(model)
    assert type(model) is naflexvit.NaFlexVit


def test_every_option_of_timm_is_accounted_for(naflexvit: Any) -> None:
    options = {field.name for field in dataclasses.fields(naflexvit.NaFlexVitCfg)}
    options |= inspect.signature(naflexvit.NaFlexVit).parameters.keys()
    compared = {name for changes in (SMALL, *COMPARED.values(), *POSITIONS) for name in changes} | OTHERWISE_COMPARED
    assert options <= compared | REFUSED.keys() | WITHOUT_A_SAY
    assert not (compared | REFUSED.keys()) & WITHOUT_A_SAY


def test_wrong_arguments_are_refused(naflexvit: Any) -> None:
    fast, inputs = accelerate(make(naflexvit)), batch()
    with pytest.raises(NotImplementedError, match="attn_mask"):
        fast({**inputs, "attn_mask": inputs["patch_valid"]})
    with pytest.raises(ValueError, match="patch_valid"):
        fast(inputs["patches"], inputs["patch_coord"])
    with pytest.raises(ValueError, match="patch_coord"):
        fast({"patches": inputs["patches"]})
    with pytest.raises(ValueError, match="embed_proj_type"):
        accelerate(make(naflexvit, embed_proj_type="conv"))(inputs)
    with pytest.raises(TypeError, match="NaFlexVit, got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got Mine"):
        accelerate(type("Mine", (naflexvit.NaFlexVit,), {})(**SMALL))


def test_without_timm_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'navit-kernels\[timm\]'"):
        accelerate(nn.Linear(2, 2))


def test_an_old_timm_is_named_with_what_to_install(naflexvit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0.15")
    with pytest.raises(ImportError, match=r"timm >= 1\.0\.29, found 1\.0\.15.*navit-kernels\[timm\]"):
        accelerate(make(naflexvit))


def test_importing_the_integration_imports_no_timm() -> None:
    command = "import navit.integrations.timm, sys; assert not {'timm', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
    assert not hasattr(integration, "SomethingElse")


def test_the_example_runs(naflexvit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "timm_naflex.py"))
    assert "largest difference" in capsys.readouterr().out


COMPILED: list[dict[str, Any]] = [
    dict(drop_path_rate=0.3, init_values=0.5, qk_norm=True, class_token=True),
    dict(class_token=True, reg_tokens=2, global_pool="avg", pos_embed="factorized", fc_norm=True),
]


def assert_compiles(model: Any, device: str, backend: str) -> None:
    """Train on batches of many sizes through whole graphs: one for the first sizes, one for all others."""
    torch._dynamo.reset()
    counter = importlib.import_module("torch._dynamo.testing").CompileCounterWithBackend(backend)
    compiled = torch.compile(model.to(device).train(), backend=counter, fullgraph=True)
    for grids in (GRIDS[:3], [(2, 2), (3, 3)], [(5, 5)] * 4, GRIDS, [(6, 2)] * 3):
        inputs = batch(grids)
        inputs = {**to(device, inputs), "patch_valid": inputs["patch_valid"].to("cpu" if device == "meta" else device)}
        compiled(inputs).float().sum().backward()
    assert counter.frame_count <= 2
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles_whole_and_once_for_all_batches(naflexvit: Any) -> None:
    model = accelerate(make(naflexvit, **{**COMPILED[0], "depth": 1}))
    assert_compiles(model, "meta", "aot_eager")  # traced as on a GPU, computed nowhere


WIDE = dict(embed_dim=128, num_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", COMPARED.values(), ids=COMPARED.keys())
def test_gpu_bfloat16_is_as_exact_as_timms(naflexvit: Any, changes: dict[str, Any]) -> None:
    """Outputs and gradients, seeds included: both sides draw the same numbers in the same order."""
    model, fast = pair(naflexvit, **{**changes, **WIDE, "depth": 2, "attn_pool_num_heads": None})
    model, fast = model.cuda(), fast.cuda()
    inputs = to("cuda", batch([*GRIDS, (17, 20), (8, 8)], values=changes.get("in_chans", 3) * PATCH**2))
    exact = run(model, inputs)
    with torch.autocast("cuda", torch.bfloat16):
        theirs, ours = run(model, inputs), run(fast, inputs)
    assert_error_within(ours[0], exact[0], theirs[0], "output")
    names = [name for name, gradient in exact[1].items() if gradient is not None]
    flat = [torch.cat([part[1][n].flatten() for n in names]) for part in (ours, exact, theirs)]  # type: ignore[union-attr]
    assert_error_within(*flat, "gradients")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", POSITIONS[::3], ids=lambda changes: "-".join(map(str, changes.values())))
def test_gpu_same_in_float32(naflexvit: Any, changes: dict[str, Any]) -> None:
    model, fast = pair(naflexvit, **{**changes, **WIDE})
    assert_same(model.cuda(), fast.cuda(), to("cuda", batch([*GRIDS, (17, 20)])), limit=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", COMPILED, ids=["map", "gap"])
def test_gpu_compiles_whole_and_once_for_all_batches(naflexvit: Any, changes: dict[str, Any]) -> None:
    model = accelerate(make(naflexvit, **{**changes, **WIDE, "depth": 1}))
    assert_compiles(model, "cuda", "inductor")
    model.eval()
    inputs = to("cuda", batch())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(inputs), model(inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [dict(drop_path_rate=0.2), COMPARED["gap"], COMPARED["token"]])
def test_gpu_with_patch_valid_on_the_cpu_nothing_waits(naflexvit: Any, changes: dict[str, Any]) -> None:
    model = accelerate(make(naflexvit, **{**changes, **WIDE})).cuda().train()
    inputs = {**to("cuda", batch()), "patch_valid": batch()["patch_valid"]}
    model(inputs).sum().backward()  # warm-up: kernels compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_without_padding_a_forward_can_be_captured(naflexvit: Any) -> None:
    model = accelerate(make(naflexvit, **{**COMPARED["gap"], **WIDE})).cuda().eval()
    first, second, other = (batch([(8, 8), size], padding=0) for size in ((8, 8), (8, 8), (7, 8)))
    second["patches"] = -second["patches"]
    first, second, other = ({**to("cuda", x), "patch_valid": x["patch_valid"]} for x in (first, second, other))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        captured = Captured(model, first)
        expected = [model(inputs) for inputs in (second, first)]
        for slots in range(1, 40):  # other batches, whose plans take the place of this one's
            whole(2, slots, first["patches"].device)
        for inputs, rows in zip((second, first), expected, strict=True):
            assert torch.equal(captured(inputs), rows)
        with pytest.raises(ValueError, match="values recorded of a CPU tensor"):
            captured(other)
