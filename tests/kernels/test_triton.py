"""The Triton kernels without a GPU: interpreted on the CPU, compiled for the GPUs they serve."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from safer_fast.kernels.attack import cuda as attack  # noqa: E402
from safer_fast.kernels.float8 import cuda as float8  # noqa: E402
from safer_fast.kernels.sam import cuda as sam  # noqa: E402

TESTS = Path(__file__).parent
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass
class Build:
    """A kernel with the types of its arguments; lengths are multiples of 16, as the arenas are."""

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    lengths: list[str]
    counts: list[str] = field(default_factory=list)
    # How many loads and stores are of one value: scalars and partial sums.
    num_single: int = 0

    @property
    def name(self) -> str:
        """The kernel and what distinguishes this build of it."""
        return " ".join([self.kernel.__name__, *self.pointers.values()])

    def compile(self, capability: int) -> Any:
        """The kernel as Triton compiles it for that compute capability."""
        types = {name: f"*{dtype}" for name, dtype in self.pointers.items()}
        types |= dict.fromkeys([*self.lengths, *self.counts], "i32")
        names = self.kernel.arg_names
        aligned = [*self.pointers, *self.lengths]
        source = ASTSource(
            fn=self.kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs=self.constants,
            attrs={(names.index(name),): DIVISIBLE for name in aligned},
        )
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options)


def builds() -> list[Build]:
    """Every kernel, with gradients in fp32 and bf16; restore, which has none, into every dtype."""
    found = []
    for dtype in ("fp32", "bf16"):
        inputs = {"adversarial_ptr": "fp32", "images_ptr": "fp32", "gradient_ptr": dtype}
        scalars = {"step_size_ptr": "fp32", "epsilon_ptr": "fp32"}
        partials = {"partials_ptr": "fp64"}
        linf = {"BLOCK": attack.LINF_BLOCK}
        sums = {"BLOCK": attack.L2_BLOCK}
        move = {**sums, "NUM_PARTIALS": 128}
        sizes, counts = ["num_pixels"], ["num_chunks"]
        found += [
            Build(
                attack.linf_step_kernel,
                inputs | scalars,
                linf,
                attack.OPTIONS,
                ["num_elements"],
                num_single=2,
            ),
            Build(
                attack.l2_sums_kernel,
                inputs | partials,
                sums,
                attack.OPTIONS,
                sizes,
                counts,
                num_single=3,
            ),
            Build(
                attack.l2_move_kernel,
                inputs | partials | scalars,
                move,
                attack.OPTIONS,
                sizes,
                counts,
                num_single=5,
            ),
        ]
        for has_weight in (False, True):
            found.append(
                Build(
                    sam.sum_squares_kernel,
                    {"x_ptr": dtype, "weight_ptr": "fp32" if has_weight else dtype} | partials,
                    {"BLOCK": sam.SUM_BLOCK, "HAS_WEIGHT": has_weight},
                    sam.SUM_OPTIONS,
                    ["num_elements"],
                    num_single=1,
                )
            )
        for adaptive in (False, True):
            pointers = {"compute_ptr": "bf16", "master_ptr": "fp32", "gradient_ptr": dtype}
            found.append(
                Build(
                    sam.perturb_kernel,
                    pointers | {"scale_ptr": "fp32"},
                    {"BLOCK": sam.BLOCK, "ADAPTIVE": adaptive},
                    sam.OPTIONS,
                    ["num_elements"],
                    num_single=1,
                )
            )
    for dtype in ("fp32", "bf16", "fp16"):
        pointers = {"compute_ptr": dtype, "master_ptr": "fp32"}
        constants = {"BLOCK": sam.BLOCK}
        found.append(Build(sam.restore_kernel, pointers, constants, sam.OPTIONS, ["num_elements"]))
    return found


def total_build() -> Build:
    """The one kernel without a long tensor: it reads few partial sums, one program does it all."""
    return Build(
        sam.total_kernel,
        {"partials_ptr": "fp64", "total_ptr": "fp32"},
        {"BLOCK": sam.TOTAL_BLOCK, "NUM_BLOCKS": 16},
        sam.SUM_OPTIONS,
        [],
        ["num_partials"],
    )


def float8_builds(num_columns: int = 4096) -> list[Build]:
    """GELU and its gradient as they are quantised, for rows of so many columns."""
    constants = float8.constants(num_columns)
    options = {"num_warps": constants.pop("num_warps")} | float8.OPTIONS
    outputs = {"values_ptr": "fp8e4nv", "scales_ptr": "fp32"}
    return [
        Build(kernel, inputs | outputs, constants, options, [], num_single=1)
        for kernel, inputs in (
            (float8.quantise_gelu_kernel, {"x_ptr": "bf16"}),
            (float8.quantise_gelu_backward_kernel, {"gradient_ptr": "bf16", "x_ptr": "bf16"}),
        )
    ]


MOST_INSTRUCTIONS = {"quantise_gelu_kernel": 50, "quantise_gelu_backward_kernel": 65}
"""For each element. As torch.compile writes them in bf16, without quantising, it is 36 and 51."""
WIDTHS = [4096, 3072, 1536, 768, 5120]
"""Of the MLPs of ViT-L, -B, -S, -Ti and -H."""

for_every_gpu = pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")


@for_every_gpu
@pytest.mark.parametrize("build", builds(), ids=lambda build: build.name)
def test_a_kernel_moves_sixteen_bytes_at_a_time(build: Build, capability: int) -> None:
    ptx = build.compile(capability).asm["ptx"]
    widths = widths_in_bytes(ptx)
    assert sum(width < 16 for width in widths) == build.num_single, widths
    assert any(width >= 16 for width in widths)


@for_every_gpu
@pytest.mark.parametrize("build", [*builds(), total_build()], ids=lambda build: build.name)
def test_a_kernel_spills_nothing(build: Build, capability: int, tmp_path: Path) -> None:
    usage = resources(build.compile(capability).asm["cubin"], tmp_path)
    assert re.search(r"\bREG:\d+ STACK:0 .*\bLOCAL:0\b", usage), usage


@for_every_gpu
def test_perturb_rounds_to_nearest_and_never_fuses(capability: int) -> None:
    for build in builds():
        if build.kernel is sam.perturb_kernel:
            ptx = build.compile(capability).asm["ptx"]
            assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx)
            assert "fma." not in ptx


@for_every_gpu
def test_restore_rounds_to_nearest(capability: int) -> None:
    found = {
        build.pointers["compute_ptr"]: set(
            re.findall(r"\bcvt\.(\S+)\.f32", build.compile(capability).asm["ptx"])
        )
        for build in builds()
        if build.kernel is sam.restore_kernel
    }
    assert found == {"fp32": set(), "bf16": {"rn.bf16x2"}, "fp16": {"rn.f16x2"}}


@for_every_gpu
def test_linf_step_clamps_with_the_instructions_that_keep_nan(capability: int) -> None:
    for build in builds():
        if build.kernel is attack.linf_step_kernel:
            clamps = re.findall(r"\b(?:min|max)\S*", build.compile(capability).asm["ptx"])
            assert {"max.NaN.f32", "min.NaN.f32"} <= set(clamps)
            assert all(".NaN" in clamp for clamp in clamps)


for_every_width = pytest.mark.parametrize("num_columns", WIDTHS)


@pytest.mark.slow
@for_every_width
def test_quantising_adds_few_instructions_to_gelu(num_columns: int, tmp_path: Path) -> None:
    for build in float8_builds(num_columns):
        num_elements = num_columns / (32 * build.options["num_warps"])  # of a thread
        found = instructions(build.compile(90).asm["cubin"], tmp_path)
        most = MOST_INSTRUCTIONS[build.kernel.__name__]
        assert len(found) <= most * num_elements, (build.name, len(found) / num_elements)


@for_every_width
def test_a_row_is_read_once_and_rounded_by_the_gpu(num_columns: int, tmp_path: Path) -> None:
    for build in float8_builds(num_columns):
        compiled = build.compile(90)
        ptx = compiled.asm["ptx"]
        num_threads = 32 * build.options["num_warps"]
        num_inputs = len(build.pointers) - 2
        num_bytes = num_columns * (2 * num_inputs + 1) / num_threads + 4
        assert sum(widths_in_bytes(ptx)) == num_bytes
        assert ptx.count("cvt.rn.satfinite.e4m3x2.f32") == num_columns / num_threads / 2
        assert "max.NaN.f32" in ptx
        usage = resources(compiled.asm["cubin"], tmp_path)
        assert re.search(r"\bREG:\d+ STACK:0 .*\bLOCAL:0\b", usage), usage


@pytest.mark.slow
def test_the_interpreted_kernels_pass_the_tests_of_the_others() -> None:
    files = [str(TESTS / name) for name in ("test_attack.py", "test_float8.py", "test_sam.py")]
    # NumPy, which interprets, warns of NaN and of division by zero, which the cases are about.
    options = ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    # Triton reads TRITON_INTERPRET when it is imported, hence another process.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options],
        cwd=TESTS.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "SAFER_FAST_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    num_passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert num_passed >= 80, result.stdout[-500:]


def widths_in_bytes(ptx: str) -> list[int]:
    """The bytes that each global load and store moves."""
    found = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def resources(cubin: bytes, folder: Path) -> str:
    """Registers and memory of a kernel, as cuobjdump prints them."""
    return dumped(cubin, folder, "--dump-resource-usage")


def instructions(cubin: bytes, folder: Path) -> list[str]:
    """All instructions of a kernel but those that fill up its end; none is in a loop."""
    shown = dumped(cubin, folder, "-sass")
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", shown)
    return [text for text in found if text != "NOP"]


def dumped(cubin: bytes, folder: Path, option: str) -> str:
    """What cuobjdump prints of a compiled kernel."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
