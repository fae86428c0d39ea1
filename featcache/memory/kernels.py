"""Two loops over host memory whose stores bypass the processor's caches.

An ordinary store first fetches the line that it overwrites: a third of a copy's traffic, wasted if the target is larger
than the caches, as batches are. Non-temporal stores avoid that. libc uses them only for single copies of tens of
megabytes, while a clip has two; torch does not have them. So the loops are written here, in LLVM's assembly. llvmlite,
the extra ``slotlab[fast]``, compiles them on first use for the present processor (about 50 ms). Without it libc's copy
and torch's own operations do the same work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, cast

LINE = 64  # bytes that one step of a loop writes; targets and sizes are multiples of it
PAST_CACHES = 16 << 20  # bytes; larger copies leave the caches before they are used

COPY = """
define void @copy(ptr %target, ptr %source, i64 %size) {
start:
  br label %line
line:
  %at = phi i64 [0, %start], [%next, %line]
  %from = getelementptr i8, ptr %source, i64 %at
  %to = getelementptr i8, ptr %target, i64 %at
  %values = load <16 x i32>, ptr %from, align 1
  store <16 x i32> %values, ptr %to, align 64, !nontemporal !0
  %next = add i64 %at, 64
  %more = icmp ult i64 %next, %size
  br i1 %more, label %line, label %end
end:
  fence seq_cst ; such stores keep no order: the batch is complete before anyone learns of it
  ret void
}
!0 = !{i32 1}
"""

DEQUANTISE = """
define void @dequantise(ptr %values, ptr %codes, ptr %scales, i64 %tokens, i64 %size) {
start:
  br label %token
token:
  %row = phi i64 [0, %start], [%after, %scaled]
  %begin = mul i64 %row, %size
  %stop = add i64 %begin, %size
  %its = getelementptr float, ptr %scales, i64 %row
  %scale = load float, ptr %its, align 4
  %lane = insertelement <16 x float> poison, float %scale, i64 0
  %lanes = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %line
line:
  %at = phi i64 [%begin, %token], [%next, %line]
  %from = getelementptr i8, ptr %codes, i64 %at
  %to = getelementptr float, ptr %values, i64 %at
  %bytes = load <16 x i8>, ptr %from, align 1
  %whole = sext <16 x i8> %bytes to <16 x i32>
  %float = sitofp <16 x i32> %whole to <16 x float>
  %product = fmul <16 x float> %float, %lanes
  store <16 x float> %product, ptr %to, align 64, !nontemporal !0
  %next = add i64 %at, 16
  %more = icmp ult i64 %next, %stop
  br i1 %more, label %line, label %scaled
scaled:
  %after = add i64 %row, 1
  %others = icmp ult i64 %after, %tokens
  br i1 %others, label %token, label %end
end:
  fence seq_cst
  ret void
}
!0 = !{i32 1}
"""


@cache
def copy() -> Callable[[int, int, int], object]:
    """The copy loop, compiled, or libc's copy: a function of target address, source address and size in bytes.

    Target and size are multiples of ``LINE``, and not 0.
    """
    return _compiled("copy", COPY, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t) or ctypes.memmove


@cache
def dequantise() -> Callable[[int, int, int, int, int], None] | None:
    """The dequantising loop, compiled: a function of the addresses of values, codes and scales, and of R and D.

    It writes float32 values (R, D) from int8 codes (R, D) and float32 scales (R,). The values' address is a multiple of
    ``LINE``, D a multiple of 16, and neither R nor D is 0. None without llvmlite.
    """
    addresses = (ctypes.c_void_p,) * 3
    return _compiled("dequantise", DEQUANTISE, *addresses, ctypes.c_size_t, ctypes.c_size_t)


def _compiled(name: str, assembly: str, *arguments: Any) -> Callable[..., None] | None:
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):  # not installed, or without its library
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # Pass the features, too: a virtual machine may lack some that its processor's name implies.
    host = {"cpu": llvm.get_host_cpu_name(), "features": llvm.get_host_cpu_features().flatten()}
    machine = llvm.Target.from_default_triple().create_target_machine(**host, opt=3)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(assembly), machine)
    engine.finalize_object()
    function: Any = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(name))
    function.engine = engine  # keeps the code alive
    return cast(Callable[..., None], function)
