# ruff: noqa: E501  (lines of programs)
"""What exchanges are found in programs of both compilers, as two versions of jax write them.

Each is a compiled program, cut down to the lines that matter: three layers of two matrices, [256, 512] and [512, 256]
in bfloat16, gathered from eight devices in the forward and in the backward pass, their gradients scattered to them.
"""

import pytest

from rpo_jax.tools.planning import hlo

# jax 0.10.2 for eight H100: started exchanges of both matrices, no operation's name on the combined sums.
GPU_0_10 = """HloModule jit_run, is_scheduled=true, num_partitions=8
%region_0.1_spmd (param: (s32[], bf16[8,256], f32[3,32,512], f32[3,512,32])) -> (s32[], bf16[8,256]) {
  %bitcast.174 = bf16[32,512]{1,0} bitcast(%fusion.7)
  %bitcast.175 = bf16[32,512]{1,0} bitcast(%fusion.8)
  %all-gather-start = ((bf16[32,512]{1,0}, bf16[32,512]{1,0}), (bf16[256,512]{1,0}, bf16[256,512]{1,0})) all-gather-start(%bitcast.174, %bitcast.175), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={trivially_pipelineable=""}, metadata={op_name="jit(run)/jvp()/while/body/closed_call/(dot_general)" scheduling_name="all-gather-start"}
  %all-gather-done = (bf16[256,512]{1,0}, bf16[256,512]{1,0}) all-gather-done(%all-gather-start)
  ROOT %tuple.22 = (s32[], bf16[8,256]{1,0}) tuple(%next, %sum)
}
%region_3.4_spmd (param.2: (s32[], bf16[8,256], /*index=2*/f32[3,512,32], f32[3,32,512])) -> (s32[], bf16[8,256]) {
  %wrapped_convert = bf16[32,512]{1,0} fusion(%fusion.1), kind=kLoop, calls=%wrapped_convert_computation
  %loop_convert_fusion.2 = bf16[32,512]{1,0} fusion(%fusion.2), kind=kLoop, calls=%fused_convert.2
  %all-gather-start.1 = ((bf16[32,512]{1,0}, bf16[32,512]{1,0}), (bf16[256,512]{1,0}, bf16[256,512]{1,0})) all-gather-start(%wrapped_convert, /*index=1*/%loop_convert_fusion.2), channel_id=4, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done.1 = (bf16[256,512]{1,0}, bf16[256,512]{1,0}) all-gather-done(%all-gather-start.1)
  %bitcast.179 = bf16[256,512]{1,0} bitcast(%gemm_fusion_dot.7)
  %gemm_fusion_dot.8 = bf16[256,512]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot.8_computation
  %reduce-scatter-start = ((bf16[256,512]{1,0}, bf16[256,512]{1,0}), (bf16[32,512]{1,0}, bf16[32,512]{1,0})) reduce-scatter-start(%bitcast.179, %gemm_fusion_dot.8), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, use_global_device_ids=true, dimensions={0}, to_apply=%add.clone, metadata={scheduling_name="reduce-scatter-start"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %reduce-scatter-done = (bf16[32,512]{1,0}, bf16[32,512]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  ROOT %tuple.25 = (s32[], bf16[8,256]{1,0}) tuple(%next, %sum)
}
%region_1.2_spmd (param.1: (s32[], bf16[8,256])) -> pred[] {
  ROOT %fusion.3 = pred[] fusion(%param.1), kind=kLoop, calls=%fused_compare
}
ENTRY %main.6_spmd (param.6: f32[3,512,32], param.5: f32[3,32,512], param.4: bf16[8,256]) -> (f32[], f32[3,512,32]) {
  %while.9 = (s32[], bf16[8,256]{1,0}) while(%tuple.20), condition=%region_1.2_spmd, body=%region_0.1_spmd, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %loss = f32[] fusion(%while.9), kind=kInput, calls=%fused_reduce
  %all-reduce-start = f32[] all-reduce-start(%loss), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true, to_apply=%region_2.3.clone
  %all-reduce-done = f32[] all-reduce-done(%all-reduce-start)
  %while.10 = (s32[], bf16[8,256]{1,0}) while(%tuple.23), condition=%region_1.2_spmd, body=%region_3.4_spmd, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %tuple.30 = (f32[], f32[3,512,32]{2,1,0}) tuple(%all-reduce-done, %out)
}
"""

# jax 0.12.0.1 for eight H100: gathers that nothing runs beside are not started, started sums say what they are given.
GPU_0_12 = """HloModule jit_run, is_scheduled=true, num_partitions=8
%region_0.1_spmd (param: (s32[], bf16[8,256], f32[3,32,512], f32[3,512,32])) -> (s32[], bf16[8,256]) {
  %bitcast.173 = bf16[32,512]{1,0} bitcast(%fusion.7)
  %bitcast.174 = bf16[32,512]{1,0} bitcast(%fusion.8)
  %all-gather.9 = (bf16[256,512]{1,0}, bf16[256,512]{1,0}) all-gather(%bitcast.173, %bitcast.174), channel_id=1, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={is_spmd_generated="true"}, metadata={op_name="jit(run)/jvp()/while/body/eval_jaxpr/(convert_element_type)" scheduling_name="all-gather-start"}
  ROOT %tuple.22 = (s32[], bf16[8,256]{1,0}) tuple(%next, %sum)
}
%region_3.4_spmd (param.2: (s32[], bf16[8,256], /*index=2*/f32[3,512,32], f32[3,32,512])) -> (s32[], bf16[8,256]) {
  %loop_convert_fusion.2 = bf16[32,512]{1,0} fusion(%fusion.2), kind=kLoop, calls=%fused_convert.2
  %wrapped_convert = bf16[32,512]{1,0} fusion(%fusion.1), kind=kLoop, calls=%wrapped_convert_computation
  %all-gather.10 = (bf16[256,512]{1,0}, bf16[256,512]{1,0}) all-gather(%loop_convert_fusion.2, %wrapped_convert), channel_id=3, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %bitcast.178 = bf16[256,512]{1,0} bitcast(%gemm_fusion_dot.7)
  %gemm_fusion_dot.8 = bf16[256,512]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot.8_computation
  %reduce-scatter-start = ((bf16[256,512]{1,0}, bf16[256,512]{1,0}), (bf16[32,512]{1,0}, bf16[32,512]{1,0})) reduce-scatter-start(%bitcast.178, %gemm_fusion_dot.8), channel_id=8, replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true, dimensions={0}, to_apply=%add.clone, frontend_attributes={is_spmd_generated="true"}
  %reduce-scatter-done = (bf16[32,512]{1,0}, bf16[32,512]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  ROOT %tuple.25 = (s32[], bf16[8,256]{1,0}) tuple(%next, %sum)
}
%region_1.2_spmd (param.1: (s32[], bf16[8,256])) -> pred[] {
  ROOT %fusion.3 = pred[] fusion(%param.1), kind=kLoop, calls=%fused_compare
}
ENTRY %main.6_spmd (param.6: f32[3,512,32], param.5: f32[3,32,512], param.4: bf16[8,256]) -> (f32[], f32[3,512,32]) {
  %while.22 = (s32[], bf16[8,256]{1,0}) while(%tuple.16), condition=%region_1.2_spmd, body=%region_0.1_spmd, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %loss = f32[] fusion(%while.22), kind=kInput, calls=%fused_reduce
  %all-reduce-start = ((f32[]), f32[]) all-reduce-start(%loss), channel_id=7, replica_groups=mesh['data'=1,'fsdp'=8,'tensor'=1] {'fsdp'}, use_global_device_ids=true, to_apply=%region_2.3.clone, output_to_operand_aliasing={{1}: (0, {})}
  %all-reduce-done = f32[] all-reduce-done(%all-reduce-start)
  %while.23 = (s32[], bf16[8,256]{1,0}) while(%tuple.19), condition=%region_1.2_spmd, body=%region_3.4_spmd, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %tuple.30 = (f32[], f32[3,512,32]{2,1,0}) tuple(%all-reduce-done, %out)
}
"""

# jax 0.10.2 for v5e:2x4: layouts with letters, loops without a trip count, one gather in several fusions with one
# channel, and a sum of both gradients of which each device keeps a slice.
TPU_0_10 = """HloModule jit_run, is_scheduled=true, num_partitions=8
%body (p: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %p = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %part.5 = bf16[1,32,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kLoop, calls=%fused.5
  %all-gather.42 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%part.5), channel_id=14, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}, use_global_device_ids=true
  %part.4 = bf16[1,512,32]{1,2,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kLoop, calls=%fused.4
  %all-gather.43 = bf16[1,512,256]{1,2,0:T(8,128)(2,1)S(1)} all-gather(%part.4), channel_id=15, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={2}, use_global_device_ids=true
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %sum)
}
%started (param_0.95: bf16[512,32]) -> bf16[512,256] {
  %param_0.95 = bf16[512,32]{0,1:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.35 = bf16[512,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.95), channel_id=6, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={1}, use_global_device_ids=true
}
%ended (param_0.102: bf16[512,32]) -> bf16[512,256] {
  %param_0.102 = bf16[512,32]{0,1:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.41 = bf16[512,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.102), channel_id=6, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={1}, use_global_device_ids=true
}
%all-reduce-scatter.2.clone.1 (input_0.2: bf16[512,256], input_1.2: bf16[256,512]) -> (bf16[512,32], bf16[32,512]) {
  %input_0.2 = bf16[512,256]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %input_1.2 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-reduce.9 = (bf16[512,256]{0,1:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)}) all-reduce(%input_0.2, %input_1.2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add.1.clone
  %get-tuple-element.283 = bf16[512,256]{0,1:T(8,128)(2,1)} get-tuple-element(%all-reduce.9), index=0
  %dynamic-slice.32 = bf16[512,32]{0,1:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.283, %zero, %at), dynamic_slice_sizes={512,32}
  %get-tuple-element.284 = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.9), index=1
  %dynamic-slice.33 = bf16[32,512]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.284, %at, %zero), dynamic_slice_sizes={32,512}
  ROOT %tuple.53 = (bf16[512,32]{0,1:T(8,128)(2,1)S(1)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%dynamic-slice.32, %dynamic-slice.33)
}
%backward (q: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %q = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %step = s32[]{:T(128)} constant(1)
  %fusion.1 = bf16[512,256]{0,1:T(8,128)(2,1)} fusion(%q), kind=kCustom, calls=%started
  %part.8 = bf16[32,512]{1,0:T(8,128)(2,1)S(1)} fusion(%q), kind=kLoop, calls=%fused.8
  %all-gather.44 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%part.8), channel_id=7, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %fusion.2 = bf16[512,256]{0,1:T(8,128)(2,1)S(1)} fusion(%fusion.1), kind=kCustom, calls=%ended
  %fusion.67 = (bf16[512,32]{0,1:T(8,128)(2,1)S(1)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) fusion(%fusion.2, %all-gather.44), kind=kCustom, calls=%all-reduce-scatter.2.clone.1
  %after = s32[]{:T(128)} add(%j, %step)
  ROOT %out = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%after, %sum)
}
%cond (r: (s32[], bf16[8,256])) -> pred[] {
  %end = s32[]{:T(128)} constant(3)
  %r = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%r), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%at, %end), direction=LT
}
ENTRY %main.6_spmd (x: bf16[8,256]) -> f32[] {
  %zero = s32[]{:T(128)} constant(0)
  %copy.27 = s32[]{:T(128)} copy(%zero)
  %x = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %tuple.68 = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%copy.27, %x)
  %while.30 = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.68), condition=%cond, body=%body
  %loss = f32[]{:T(128)} fusion(%while.30), kind=kLoop, calls=%fused.21
  %all-reduce.4 = f32[]{:T(128)} all-reduce(%loss), channel_id=13, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}, use_global_device_ids=true, to_apply=%add
  %while.31 = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.68), condition=%cond, body=%backward
  ROOT %sum = f32[]{:T(128)} add(%all-reduce.4, %rest)
}
"""

MATRICES = 2 * 2 * 256 * 512  # bytes of both


@pytest.mark.parametrize("text", [GPU_0_10, GPU_0_12, TPU_0_10], ids=["GPU, 0.10", "GPU, 0.12", "TPU, 0.10"])
def test_combined_exchanges_are_counted_whole_and_as_often_as_their_loops_turn(text):
    found = hlo.collectives(text, most_trips=100)
    moved = {}
    for one in found:
        assert one.group == tuple(range(8))
        assert not one.bounded
        moved[one.kind, one.in_loop] = moved.get((one.kind, one.in_loop), 0.0) + one.times * one.sent
    assert moved == {
        ("all-gather", True): 2 * 3 * MATRICES * 7 / 8,
        ("reduce-scatter", True): 3 * MATRICES * 7 / 8,
        ("all-reduce", False): 4 * 2 * 7 / 8,
    }


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", (0, 2)),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups={}", ()),
        ("source_target_pairs={{0,0},{2,4},{1,2},{3,6},{4,1},{6,5},{5,3},{7,7}}", (3, 6)),
    ],
)
def test_the_first_group_of_devices_is_read_in_every_form(groups, first):
    kind = "collective-permute" if groups.startswith("source") else "all-reduce"
    text = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8] parameter(0)\n  %b = f32[8] {kind}(%a), {groups}\n}}\n"
    (one,) = hlo.collectives(text, most_trips=1)
    assert one.group == first
