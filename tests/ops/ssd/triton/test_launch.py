"""What `torch.compile` finds out about the scan's kernels, which decides what it copies before a launch."""

import json
import os
import subprocess
import sys

# Prints, for each launch in the graphs of a forward and a backward pass, the kernel and the tensors that count as written to. In a process
# of its own, with kernels that are compiled and not interpreted, and with a GPU's name in the place of a GPU.
PROGRAM = """
import functools, json
from contextlib import nullcontext, suppress

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from transxssm.ops.ssd.triton import launch
from transxssm.ops.ssd.triton.scan import ssd_triton


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
launch.launched_on = lambda device: nullcontext()


def listed(graph, _):
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            print(json.dumps([kernel.fn.__name__, sorted(node.kwargs["tensors_to_clone"])]))
    return make_boxed_func(graph.forward)


def numbers(*shape):
    return torch.rand(shape, requires_grad=True)


def scan(x, dt, A, B, C, D, initial_state, cos, sin, seq_idx):
    options = {"rotary": (cos, sin), "D": D, "initial_state": initial_state, "seq_idx": seq_idx}
    return ssd_triton(x, dt, A, B, C, **options, cu_seqlens=None, chunk_size=None)[0]


maps = numbers(1, 32, 2, 16), numbers(1, 32, 2, 16)
inputs = numbers(1, 32, 4, 16), numbers(1, 32, 4), numbers(4), *maps, numbers(4), numbers(1, 4, 16, 16)
partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
backend = aot_autograd(fw_compiler=listed, bw_compiler=listed, partition_fn=partition)
# With lengths as symbols both graphs are compiled before the first runs, which fails where there is no GPU.
compiled = torch.compile(scan, backend=backend, fullgraph=True, dynamic=True)
with suppress(AttributeError):
    compiled(*inputs, torch.rand(1, 32, 8), torch.rand(1, 32, 8), torch.zeros(1, 32, dtype=torch.int32))
"""
WRITTEN = {
    "rotate_maps": ["rotated_B", "rotated_C"],
    "sum_decays": ["sums", "times"],
    "sum_chunks": ["updates"],
    "carry_states": ["carried", "states"],
    "scan_blocks": ["y"],
    "differentiate_queries": ["grad_C", "grad_sums"],
    "differentiate_keys": ["grad_B", "grad_D", "grad_ends", "grad_kept", "grad_sums", "grad_times", "grad_x"],
    "differentiate_decays": ["grad_A", "grad_dt"],
}


def test_a_compiled_launch_copies_nothing_that_its_kernel_only_reads():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert dict(json.loads(line) for line in run.stdout.splitlines()) == WRITTEN
