"""Compiles a kernel written in Gluon for compute capability 9.0, without the device: python -m ... KERNEL DTYPE."""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import hopper_lm_head as lm_head
from kernels import hopper_prefill_attention as attention
from kernels import hopper_products as products
from kernels.hopper import COLUMNS, CONSUMERS, PANEL, ROWS

NUM_Q, NUM_KV, HEAD_SIZE, BLOCK_SIZE = 16, 8, 128, 16


def descriptor(dtype: str, *shape: int) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(shape))
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}],{layout!r}>"


def compile_kernel(kernel: Any, signature: dict[str, str], constants: dict[str, object], registers: int) -> Any:
    names = kernel.arg_names
    whole = {name: "constexpr" if name in constants else signature[name] for name in names}
    at = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if whole[name].startswith("*")}
    source = GluonASTSource(kernel, whole, at, aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "maxnreg": registers})


def prefill(tuning: attention.HopperPrefillTuning, dtype: str) -> Any:
    group, pieces = NUM_Q // NUM_KV, tuning.tile // BLOCK_SIZE
    piece = descriptor(dtype, tuning.tile // pieces, PANEL)
    signature = {
        "queries": descriptor(dtype, ROWS // group, group, PANEL),
        "keys": piece,
        "values": piece,
        "out_ptr": f"*{dtype}",
        **dict.fromkeys(("tables_ptr", "items_ptr", "bounds_ptr"), "*i32"),
        "scale": "fp32",
        "table_stride": "i32",
    }
    constants = {
        "NUM_KV": NUM_KV,
        "GROUP": group,
        "HALVES": HEAD_SIZE // PANEL,
        "BLOCK_SIZE": BLOCK_SIZE,
        "TILE": tuning.tile,
        "PIECES": pieces,
        "STAGES": tuning.stages,
        "REGISTERS": tuning.registers,
        "LOADER_REGISTERS": tuning.loader_registers,
    }
    return compile_kernel(attention._prefill, signature, constants, tuning.mean_registers)


def product(kernel: Any, dtype: str, **constants: int) -> Any:
    signature = {
        "xs": descriptor(dtype, CONSUMERS * ROWS, PANEL),
        "weights": descriptor(dtype, COLUMNS, PANEL),
        "outs": descriptor(dtype, ROWS, COLUMNS),
        **dict.fromkeys(("q_ptr", "q_weight_ptr", "k_weight_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{dtype}"),
        "rotary_ptr": "*fp32",
        **dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64"),
        **dict.fromkeys(("num_rows", "num_columns", "depth", "num_tokens"), "i32"),
        "eps": "fp32",
    }
    sizes = {
        "BAND": 4,
        "STAGES": products._STAGES,
        "REGISTERS": products._REGISTERS,
        "LOADER_REGISTERS": products._LOADER_REGISTERS,
    }
    return compile_kernel(kernel, signature, sizes | constants, products._MEAN_REGISTERS)


def head(tuning: lm_head.LmHeadTuning, dtype: str) -> Any:
    signature = {
        "xs": descriptor(dtype, tuning.groups * ROWS, PANEL),
        "weights": descriptor(dtype, tuning.block, PANEL),
        "logits": descriptor(dtype, ROWS, tuning.block // 2),
        "temperature_ptr": "*fp32",
        "slots_ptr": "*i64",
        "maxima_ptr": f"*{dtype}",
        "sums_ptr": "*fp32",
        **dict.fromkeys(("temperature_stride", "num_tokens", "vocab_size", "depth"), "i32"),
    }
    constants = {
        "HAS_SLOTS": True,
        "GROUPS": tuning.groups,
        "BLOCK": tuning.block,
        "STAGES": tuning.stages,
        "REGISTERS": tuning.registers,
        "LOADER_REGISTERS": tuning.loader_registers,
    }
    return compile_kernel(lm_head._lm_head, signature, constants, tuning.mean_registers)


if __name__ == "__main__":
    name, dtype = sys.argv[1:]
    compiled = {
        "attention_of_long_items": lambda: prefill(attention.LONG, dtype),
        "attention_of_short_items": lambda: prefill(attention.SHORT, dtype),
        "head_of_few_rows": lambda: head(lm_head.FEW, dtype),
        "head_of_many_rows": lambda: head(lm_head.MANY, dtype),
        "gate": lambda: product(products._silu_mul, dtype),
        "heads": lambda: product(products._norm_rotary_store, dtype, NUM_Q=NUM_Q, NUM_KV=NUM_KV, BLOCK_SIZE=BLOCK_SIZE),
    }[name]()
    ptx = compiled.asm["ptx"]
    count = {word: ptx.count(word) for word in ("wgmma.mma_async", "setmaxnreg")}
    print(f"shared {compiled.metadata.shared}, wgmma {count['wgmma.mma_async']}, setmaxnreg {count['setmaxnreg']}")
