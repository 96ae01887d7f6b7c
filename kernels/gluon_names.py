"""Gluon, Triton's language for what its compiler does not arrange by itself, under names that work from 3.6 to 3.9.

Warp specialisation, bulk copies (TMA) and asynchronous matrix products of compute capability 9.0. Gluon is called
experimental: tests compile all kernels that are written in it with the Triton that is installed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

tma = hopper.tma
_HAS_ASYNC_LOAD = hasattr(tma, "async_load")
copy_in = tma.async_load if _HAS_ASYNC_LOAD else tma.async_copy_global_to_shared
copy_out = tma.async_store if _HAS_ASYNC_LOAD else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of the warps that run the calling function."""
_TO_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
_TO_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def view_as(buffers, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape."""
    if _HAS_REINTERPRET:
        view = buffers.reinterpret(buffers.dtype, shape, layout)
    else:
        view = buffers._reinterpret(buffers.dtype, shape, layout)
    return view


@gluon.jit
def round_to(x, dtype: gl.constexpr):
    """float32 x as bfloat16 or float16, two numbers an instruction; `.to` converts one, at a quarter of the rate."""
    if dtype == gl.bfloat16:
        out = gl.inline_asm_elementwise(_TO_BF16, "=r,r,r", [x], gl.bfloat16, is_pure=True, pack=2)
    else:
        out = gl.inline_asm_elementwise(_TO_FP16, "=r,r,r", [x], gl.float16, is_pure=True, pack=2)
    return out
