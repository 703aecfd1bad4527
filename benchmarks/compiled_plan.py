"""Count the kernels and memory traffic between the GEMMs of a compiled FALQON decoder layer, without a GPU.

A decoder layer of LLaMA-7B is traced on fake CUDA tensors, lowered, and scheduled by Inductor; no code is generated or
run. The counts are those of Inductor's schedule: a fused kernel counts once, and reads each of its inputs and writes
each of its outputs once. Attention is one opaque operator; kernels inside the custom GEMM operators are not counted.

    pip install triton
    python benchmarks/compiled_plan.py

The script uses torch's internals and was written for torch 2.13.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
SHAPES = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 1,
    "vocab_size": 64,
}  # fmt: skip
BATCH, LENGTH, RANK = 16, 512, 64
HOPPER = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    gcnArchName="", shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
)  # fmt: skip


@torch.library.custom_op("planned::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@torch.library.custom_op("planned::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _like(one: Tensor) -> Tensor:
    return one.new_empty(one.shape[0], one.shape[2], one.shape[1], one.shape[3]).transpose(1, 2)


attention.register_fake(lambda q, k, v: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]))
attention_backward.register_fake(lambda grad, q, k, v: (_like(q), _like(k), _like(v)))
attention.register_autograd(
    lambda ctx, grad: attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def pretend() -> ExitStack:
    """A context in which torch and Inductor behave as if there were an H100."""
    stack = ExitStack()
    interface = "torch._dynamo.device_interface.CudaInterface"
    for name, value in {
        "torch.cuda.get_device_properties": HOPPER, "torch.cuda.device_count": 1, "torch.cuda.current_device": 0,
        "torch.cuda.is_available": True, "torch.cuda.get_device_capability": (9, 0),
        "torch._inductor.scheduler.has_triton": True, f"{interface}.get_device_properties": HOPPER,
        f"{interface}.get_compute_capability": 90, f"{interface}.current_device": 0, f"{interface}.is_available": True,
        f"{interface}.Worker.get_device_properties": HOPPER, f"{interface}.Worker.current_device": 0,
    }.items():  # fmt: skip
        stack.enter_context(mock.patch(name, staticmethod(lambda *_, found=value: found)))
    return stack


def plan(graph_module, counted):
    """Lower and schedule a graph of AOTAutograd; append its number of kernels and their bytes to `counted`."""
    from torch._inductor import compile_fx, scheduler
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in inputs if isinstance(value, Tensor))
    with pretend(), unset_fake_temporarily(), V.set_fake_mode(mode):
        compile_fx.record_original_output_strides(graph_module)
        compile_fx.view_to_reshape(graph_module)
        compile_fx._recursive_post_grad_passes(graph_module, is_inference=False)
        graph = GraphLowering(graph_module, example_inputs=inputs)
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            nodes = graph.scheduler.nodes
            left_out = (scheduler.NopKernelSchedulerNode, scheduler.ExternKernelSchedulerNode)
            kernels = [node for node in nodes if not isinstance(node, left_out)]
            counted.append((len(kernels), sum(node.get_read_write_buffers_sizes() for node in kernels)))


def plan_layer() -> list[tuple[int, int]]:
    """(number of kernels, bytes of memory traffic) between the GEMMs of the forward pass, and of the backward pass."""
    from fake_cuda import fake_cuda
    from torch._inductor import compile_fx

    from fp8pipe.models.compat import import_transformers
    from pipeline.falqon.convert import convert_model
    from pipeline.falqon.rules import Initialisation, update_rule
    from pipeline.finetune.compiled import OPTIONS, decoder_layers, wrap_layer

    counted: list[tuple[int, int]] = []

    def inner(graph_module, inputs, **options):
        plan(graph_module, counted)
        return graph_module.forward

    def backend(graph_module, inputs):
        patches = {**OPTIONS, "joint_graph_constant_folding": False}
        return compile_fx.compile_fx(graph_module, inputs, inner_compile=inner, config_patches=patches)

    transformers = import_transformers()
    transformers.LlamaForCausalLM  # noqa: B018
    transformers.AttentionInterface.register("planned", lambda module, q, k, v, mask, **_: (attention(q, k, v), None))
    with fake_cuda(counted=False):
        with torch.device("cuda"):
            shapes = transformers.LlamaConfig(**SHAPES)
            model = transformers.AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16)
        convert_model(model, update_rule("live"), rank=RANK, initialisation=Initialisation.RANDOM, seed=0)
        model.config._attn_implementation = "planned"
        layer = decoder_layers(model.train())[0]
        wrap_layer(layer, torch.compile(layer.forward, backend=backend, fullgraph=True))
        x = torch.randn(BATCH, LENGTH, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        places = torch.arange(LENGTH, device="cuda").expand(BATCH, LENGTH)
        rotary = model.model.rotary_emb(x, places)
        layer(x, position_embeddings=rotary, attention_mask=None, position_ids=places).sum().backward()
    return counted


def main() -> None:
    (kernels, moved), (back_kernels, back_moved) = plan_layer()
    print(f"forward: {kernels} kernels, {moved / 1e9:.2f} GB; backward: {back_kernels}, {back_moved / 1e9:.2f} GB")
    print(f"a step with checkpointing: {2 * kernels + back_kernels} kernels, {(2 * moved + back_moved) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
