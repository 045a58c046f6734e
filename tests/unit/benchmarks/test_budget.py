"""The budget of a step: kernels fall into their groups, and the limits count what a step must do."""

from __future__ import annotations

import pytest
import timm
import torch

from benchmarks.harness import limits
from benchmarks.training import budget
from benchmarks.training.budget import ATTENTION, EMA, GROUPS, NORMS, OPTIMIZER, PRODUCTS, REST, Ceilings
from lowrank_vit.model.flops import train_flops_per_image


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", PRODUCTS),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", PRODUCTS),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", PRODUCTS),
        ("triton_tem_fused_addmm_12", PRODUCTS),
        ("aten::addmm", PRODUCTS),
        ("aten::mm", PRODUCTS),
        ("aten::bmm", PRODUCTS),
        ("aten::mkldnn_convolution", PRODUCTS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x64", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("triton_per_fused__to_copy_add_native_layer_norm_6", NORMS),
        ("triton_poi_fused_gelu_view_12", NORMS),
        ("aten::native_layer_norm_backward", NORMS),
        ("at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>", OPTIMIZER),
        ("at::native::multi_tensor_apply_kernel<TensorListMetadata<1>, UnaryOpFunctor<std::plus<float>>>", OPTIMIZER),
        ("aten::_fused_adamw_", OPTIMIZER),
        ("at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, TernaryOpScalarFunctor, LerpFunctor>", EMA),
        ("aten::_foreach_lerp_", EMA),
        ("triton_red_fused_sum_7", REST),
        ("void at::native::convert_to_bf16_kernel", REST),
        ("triton_poi_fused__to_copy_convolution_3", REST),
        ("Memcpy HtoD (Pinned -> Device)", REST),
        ("aten::copy_", REST),
    ],
)
def test_each_kernel_has_its_group(name, group):
    assert budget.group_of(name) == group


def test_groups_add_up():
    spans = [("aten::mm", 2000.0), ("aten::mm", 1000.0), ("aten::copy_", 500.0)]
    groups = budget.groups_of(spans, 2)
    assert tuple(groups) == GROUPS
    assert (groups[PRODUCTS], groups[REST], sum(groups.values())) == (1.5, 0.25, 1.75)


def test_limits_count_the_arithmetic_and_the_bytes():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    arithmetic, memory = Ceilings(1e12, 1e30), Ceilings(1e30, 1e9)  # ms as GFLOP, and as MB
    flops = budget.limits_ms(model, 2, arithmetic)
    moved = budget.limits_ms(model, 2, memory)
    assert flops is not None
    assert moved is not None
    # Three times the forward pass, without the images' gradients and with five products in attention's backward pass.
    counted = train_flops_per_image(model, 224)
    assert counted is not None
    patches, attention = 2 * 196 * 384 * 768, 4 * 197 * 197 * 384 * 12
    assert flops[PRODUCTS] * 1e9 == pytest.approx(2 * (counted - patches - 3 * attention))
    assert flops[ATTENTION] * 1e9 == pytest.approx(2 * 3.5 * attention)
    params = sum(p.numel() for p in model.parameters())
    assert moved[OPTIMIZER] + moved[EMA] == pytest.approx(40 * params / 1e6)
    assert moved[NORMS] == pytest.approx(2 * 197 * 384 * 12 * (2 * 28 + 4 * 10) / 1e6)
    double = budget.limits_ms(model, 4, memory)
    assert double is not None
    assert (double[NORMS], double[EMA]) == (2 * moved[NORMS], moved[EMA])


@pytest.mark.parametrize("name", ["resnet18", "mixer_s16_224"])
def test_other_models_have_no_limits(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert budget.limits_ms(model, 2, budget.H100) is None


def test_ceilings_are_measured_and_limits_printed(capsys, monkeypatch):
    monkeypatch.setitem(limits._PRODUCT_SIDE, "cpu", 128)  # bfloat16 is a thousandth of a GPU's speed on many CPUs
    ceilings = budget.ceilings_of(torch.device("cpu"))
    assert min(ceilings.flops_per_s, ceilings.bytes_per_s) > 1e6
    budget.main()
    assert "vit_base_patch16_224: ms a step at batch 256, 512" in capsys.readouterr().out
