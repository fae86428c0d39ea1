"""A ViT's forward pass on a processor beside the matrix products in it, and ways to run it faster.

    python -m benchmarks.forward [--backbone dinov2_vits14] [--weights FILE] [--batch 8] [--rounds 7] [--threads 1]
        [--precision float32] [--ways eager compile onnxruntime openvino ...]

The limit is the pass's own matrix products and nothing else: those of every layer, of the patches and of attention, in
its precision, each from and into memory that is there already. A job's time is that of the processor (of all threads of
this process), not of the clock, so that neighbours on a shared machine cost little; jobs take turns (A B A B), ratios
are paired within a round. One line repeats all of it on a quiet machine: the command above, without options.

Ways: ``eager`` is what extraction runs; ``plain attention`` is eager without torch's fused attention; ``channels last``
has images and the patch kernel in that order; ``mkldnn`` has every linear layer's weights packed once for oneDNN;
``cast once`` has the weights in the pass' precision before it; ``compile`` is torch.compile, ``frozen`` the same with
constants folded and packed; ``onnxruntime`` and ``openvino`` run the exported graph, and are left out where the package
is missing. The error is that of the tokens, relative to eager's in float32 (Frobenius norms); a way may go into the
product if it is within 1e-3, and without a further word only if the tokens are the same bit for bit, since the stores
of one plan must be.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import alternate, paired_ratio, report
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.inference import autocast

LIMIT, EAGER = "products", "eager"
Shape = tuple[int, int, int, int]  # batch, rows, inner, columns
Pass = Callable[[Tensor], Tensor]


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products that are run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("addmm", "mm"):
            left, right = args[-2:]
            self.shapes.append((1, left.shape[0], left.shape[1], right.shape[1]))
        elif name == "bmm":
            self.shapes.append((args[0].shape[0], args[0].shape[1], args[0].shape[2], args[1].shape[2]))
        elif name == "convolution":
            kernel = args[1]
            self.shapes.append((1, out.numel() // kernel.shape[0], kernel[0].numel(), kernel.shape[0]))
        elif name.startswith("_scaled_dot_product"):
            (batch, heads, length, width), keys = args[0].shape, args[1].shape[2]
            self.shapes += [(batch * heads, length, width, keys), (batch * heads, length, keys, width)]
        return out


def flops(shapes: list[Shape]) -> int:
    return sum(2 * batch * rows * inner * columns for batch, rows, inner, columns in shapes)


def products(shapes: list[Shape], dtype: torch.dtype) -> Callable[[], None]:
    """A function that computes matrix products of these shapes."""
    made: dict[Shape, tuple[Tensor, Tensor, Tensor]] = {}
    for shape in dict.fromkeys(shapes):
        batch, rows, inner, columns = shape
        sizes = ((batch, rows, inner), (batch, inner, columns), (batch, rows, columns))
        left, right, out = (torch.randn(size).to(dtype) for size in sizes)
        made[shape] = (left, right, out) if batch > 1 else (left[0], right[0], out[0])

    def run() -> None:
        for shape in shapes:
            left, right, out = made[shape]
            torch.matmul(left, right, out=out)

    return run


class Tokens(nn.Module):
    """The tower as a module of tensors alone: images (B, 3, H, W) to the first tap's tokens (B, N, D)."""

    def __init__(self, name: str, weights: str | None) -> None:
        super().__init__()
        self.again = partial(Tokens, name, weights)  # one with layers of its own
        self._backbone = load_backbone(name, weights)
        self.model = self._backbone._tower.model

    def forward(self, images: Tensor) -> Tensor:
        call = getattr(Backbone.__call__, "__wrapped__", Backbone.__call__)  # a trace cannot be made in inference mode
        return call(self._backbone, images)[self._backbone.taps[0]]


def plain_attention(tokens: Tokens, images: Tensor) -> Pass:
    def run(images: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return tokens(images)

    return run


def channels_last(tokens: Tokens, images: Tensor) -> Pass:
    turned = tokens.again()
    turned.model.to(memory_format=torch.channels_last)
    return lambda images: turned(images.contiguous(memory_format=torch.channels_last))


class Packed(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(self.dtype), rows)
        self.bias = layer.bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
        return found


def mkldnn(tokens: Tokens, images: Tensor) -> Pass:
    packed = tokens.again()
    rows = len(images) * (packed._backbone.grid[0] * packed._backbone.grid[1] + packed._backbone.spec.prefix_tokens)
    for module in list(packed.model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Packed(child, rows))
    return packed


def cast_once(tokens: Tokens, images: Tensor) -> Pass:
    """Autocast casts weights that are not trained anew in every pass."""
    cast = tokens.again()
    if torch.is_autocast_enabled("cpu"):
        for module in cast.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.get_autocast_dtype("cpu"))
    return cast


def compiled(frozen: bool) -> Callable[[Tokens, Tensor], Pass]:
    def make(tokens: Tokens, images: Tensor) -> Pass:
        from torch._inductor import config

        with config.patch(freezing=frozen):
            torch.compiler.reset()
            run: Pass = torch.compile(tokens, dynamic=False)
            with torch.no_grad():
                run(images)  # compiled here, under the setting
        return run

    return make


def onnxruntime(tokens: Tokens, images: Tensor) -> Pass:
    import onnxruntime as ort

    data = io.BytesIO()
    torch.onnx.export(tokens, (images,), data, input_names=["images"], opset_version=17, dynamo=False)  # type: ignore[no-untyped-call]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(data.getvalue(), options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino(tokens: Tokens, images: Tensor) -> Pass:
    import openvino as ov

    core = ov.Core()
    precision = "bf16" if torch.is_autocast_enabled("cpu") else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with torch.autocast("cpu", enabled=False):  # the graph is in float32, and computed as the setting says
        model = core.compile_model(ov.convert_model(tokens, example_input=images), "CPU", settings)
    return lambda images: torch.from_numpy(model(images.numpy())[0])


WAYS: dict[str, Callable[[Tokens, Tensor], Pass]] = {
    EAGER: lambda tokens, _: tokens,
    "plain attention": plain_attention,
    "channels last": channels_last,
    "mkldnn": mkldnn,
    "cast once": cast_once,
    "compile": compiled(frozen=False),
    "frozen": compiled(frozen=True),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


@contextmanager
def temporarily_here() -> Iterator[None]:
    """Compiled code of a run goes with it."""
    import os

    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder) / "inductor"))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov2_vits14")
    parser.add_argument("--weights", help="random, where the published ones are not at hand: errors are then too small")
    parser.add_argument("--batch", type=int, default=8, help="frames of a batch; 8 is what extraction takes on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokens = Tokens(args.backbone, args.weights)
    backbone = tokens._backbone
    images = torch.randn(args.batch, 3, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    dtype = getattr(torch, args.precision)
    with torch.no_grad(), Products() as noted:
        exact = tokens(images)
    work = flops(noted.shapes)
    passes: dict[str, Pass] = {}
    missing = {}
    with temporarily_here():
        for name in dict.fromkeys([EAGER, *args.ways]):
            if args.precision != "float32" and name == "onnxruntime":
                missing[name] = "its processor kernels are of float32"
                continue
            try:
                with torch.no_grad(), autocast(backbone.device, args.precision):
                    made = WAYS[name](tokens, images)
                    made(images)
                passes[name] = made
            except Exception as error:  # another package, compiler or processor may lack what a way needs
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

        def timed(run: Callable[[], object]) -> Callable[[], float]:
            def job() -> float:
                began = time.process_time()
                run()
                return work / (time.process_time() - began)

            return job

        def forward(name: str) -> Callable[[], object]:
            def run() -> object:
                with torch.inference_mode(), autocast(backbone.device, args.precision):
                    return passes[name](images)

            return run

        jobs = {LIMIT: timed(products(noted.shapes, dtype)), **{name: timed(forward(name)) for name in passes}}
        alternate(jobs, 1)  # warm
        rates = alternate(jobs, args.rounds)
        rows = {}
        with torch.inference_mode():
            for name, run in passes.items():
                with autocast(backbone.device, args.precision):
                    found = run(images).float()
                rows[name] = {
                    "gflops_a_second": round(statistics.median(rates[name]) / 1e9, 1),
                    "of_products": round(paired_ratio(rates, name, LIMIT), 3),
                    "of_eager": round(paired_ratio(rates, name, EAGER), 3),
                    "error": float(f"{float((found - exact).norm() / exact.norm()):.1e}"),
                    "same_bits": bool(torch.equal(found, exact)),
                }
    report(
        f"forward {args.backbone}",
        {
            "frames": args.batch,
            "gflops_a_frame": round(work / args.batch / 1e9, 2),
            "precision": args.precision,
            "products_gflops_a_second": round(statistics.median(rates[LIMIT]) / 1e9, 1),
            "ways": rows,
            "left_out": missing,
        },
    )


if __name__ == "__main__":
    main()
