"""Compile Triton's kernels for a GPU of a compute capability, such as 90; print the size of each binary."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.kernels import triton as kernels

WIRE = "*fp64"
SCALARS = {"eps_high": "fp32", "eps_low": "fp32"}
CONSTANTS = {"HEAD": kernels.HEAD, "BLOCK": kernels.BLOCK}


def variants():
    """Yield kernel, types of its arguments, and constants."""
    for accumulator in ("*fp32", "*fp64"):
        for gather, share in ((False, False), (False, True), (True, False)):
            types = {
                "vector": WIRE,
                "mean": accumulator,
                "variance": accumulator,
                "stamp": "i64",
                "count": "i32",
            }
            yield (
                kernels.pack_forward_kernel,
                {**types, "channels": "i32"},
                {"GATHER": gather, "SHARE": share},
            )
    for accumulator, gathered, track, cumulative, check in (
        ("*fp32", False, True, False, True),
        ("*fp32", False, True, True, True),
        ("*fp32", False, False, False, False),
        ("*fp64", True, True, False, True),
    ):
        buffers = dict.fromkeys(("rounded", "running_mean", "running_var"), accumulator)
        numbers = {
            "expected": "i64",
            "call": "i32",
            "ranks": "i32",
            "row": "i32",
            "channels": "i32",
            **SCALARS,
        }
        yield (
            kernels.unpack_forward_kernel,
            {"vector": WIRE, "moments": WIRE, **buffers, "batches": "*i64", "progress": "*i64", **numbers}
            | {"momentum_high": "fp32", "momentum_low": "fp32"},
            {
                "GATHERED": gathered,
                "SHARE": gathered,
                "TRACK": track,
                "CUMULATIVE": cumulative,
                "CHECK": check,
            },
        )
    for parameter, accumulator in (("*fp32", "*fp32"), ("*bf16", "*fp32")):
        gradients = dict.fromkeys(("weight_gradient", "bias_gradient"), parameter)
        sums = dict.fromkeys(("total", "product"), accumulator)
        yield (
            kernels.pack_backward_kernel,
            {"vector": WIRE, **gradients, **sums, "moments": WIRE, "rounded": accumulator, "stamp": "i64"}
            | {"channels": "i32", **SCALARS},
            {"HAS_VALUES": True},
        )
    for accumulator, weight in (
        ("*fp32", "*fp32"),
        ("*fp32", "*bf16"),
        ("*fp32", "*fp16"),
        ("*fp64", "*fp64"),
    ):
        outputs = dict.fromkeys(("means", "converted"), accumulator)
        yield (
            kernels.unpack_backward_kernel,
            {"vector": WIRE, **outputs, "moments": WIRE, "weight": weight, "progress": "*i64"}
            | {"expected": "i64", "call": "i32", "channels": "i32", **SCALARS},
            {"CONVERT": weight != accumulator, "CHECK": True},
        )


def main():
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for kernel, types, constants in variants():
        constants = constants | CONSTANTS
        signature = types | dict.fromkeys(constants, "constexpr")
        positions = {(list(signature).index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=positions)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        barriers = compiled.asm["ptx"].count("bar.sync")
        print(kernel.__name__, "TRACK" * bool(constants.get("TRACK")), barriers, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
