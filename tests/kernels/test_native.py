"""The compiled libraries: what happens without them, and where the CUDA one cannot be built."""

import ast
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from voxtrast.kernels import _native
from voxtrast.kernels.stream_copy import stream_copy, stream_copy_reference

ROOT = Path(__file__).parents[2]

WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["voxtrast.kernels._C"] = None  # the import fails as if nothing had been compiled
import torch
from voxtrast import kernels

torch.manual_seed(0)
image, field = torch.randn(1, 2, 5, 6, requires_grad=True), torch.randn(1, 2, 5, 6, requires_grad=True)
mask = torch.ones(1, 1, 5, 6)
calls = [
    (kernels.warp, kernels.warp_reference, (image, field)),
    (kernels.compose_displacement, kernels.compose_displacement_reference, (image, field)),
    (kernels.vector_regression_loss, kernels.vector_regression_loss_reference, (image, field, mask)),
    (kernels.warped_cosine_loss, kernels.warped_cosine_loss_reference, (image, 2 * image.detach(), field, mask)),
]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for function, reference, inputs in calls:
        compiled = [torch.compile(function, fullgraph=True, backend="aot_eager")] if function is kernels.warp else []
        for form in (function, *compiled):
            for create_graph in (False, True):
                if form is not function and create_graph:
                    continue
                ours, expected = form(*inputs).square().sum(), reference(*inputs).square().sum()
                ours, expected = (torch.autograd.grad(value, (image, field), create_graph=create_graph)
                                  for value in (ours, expected))
                if create_graph:
                    ours, expected = (torch.autograd.grad(sum(g.square().sum() for g in value), (image, field))
                                      for value in (ours, expected))
                for first, second in zip(ours, expected, strict=True):
                    torch.testing.assert_close(first, second)
ours = [str(warning.message) for warning in caught if "voxtrast" in str(warning.message)]
print(len(ours), ours[0])
"""


def test_without_the_compiled_library_everything_works_and_one_warning_says_so() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, encoding="utf-8", errors="replace", timeout=120
    )
    assert run.returncode == 0, run.stderr
    count, message = run.stdout.strip().split(" ", 1)
    assert count == "1"
    assert "warp and its like run as plain torch on cpu: the compiled library is missing" in message
    assert "install voxtrast again where a C++ compiler is found" in message


NAMED_TARGET = "from voxtrast.kernels import _native; print(_native.cpu_target())"


@pytest.mark.parametrize(
    ("wanted", "said"), [("portable", ""), ("avx-2", "expected avx512, avx2, portable or nothing")]
)
def test_the_environment_chooses_the_instruction_set_and_a_wrong_name_is_told(wanted: str, said: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NAMED_TARGET],
        env=os.environ | {"VOXTRAST_CPU": wanted},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert run.stdout.strip() == "portable", run.stderr
    assert ("VOXTRAST_CPU" in run.stderr) == bool(said)
    assert said in run.stderr


@pytest.mark.skipif("VOXTRAST_CPU" in os.environ, reason="VOXTRAST_CPU chooses the instruction set")
def test_the_widest_instruction_set_is_taken() -> None:
    taken = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    assert _native.cpu_target() == taken


def test_the_compiled_library_is_in_use_here() -> None:
    assert _native.load_cpu()
    names = "warp warp_backward compose_displacement vector_regression_loss warped_cosine_loss pairwise_logsumexp"
    for operator in (*names.split(), "pairwise_backward", "info_nce", "positional_info_nce", "softplus_sums"):
        assert _native.is_compiled(operator, torch.device("cpu"))
        assert not _native.is_compiled(operator, torch.device("mps"))


def test_kernels_import_torch_and_the_standard_library_only() -> None:
    """And Triton in its own folder, whose __init__ everybody imports."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        allowed = {"torch", "triton"} if path.parent.name == "triton" and path.name != "__init__.py" else {"torch"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.partition(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_stream_copy_copies_any_type_and_layout() -> None:
    for tensor in (torch.randn(3, 5), torch.arange(7)[1::2], torch.tensor(True), torch.empty(0), torch.randn(2, 3).t()):
        copy = stream_copy(tensor.requires_grad_(tensor.is_floating_point()))
        assert torch.equal(copy, stream_copy_reference(tensor))
        assert copy.is_contiguous()
        assert copy.data_ptr() != tensor.data_ptr() or tensor.numel() == 0
    torch.library.opcheck(torch.ops.voxtrast.stream_copy.default, (torch.randn(4, 3).t(),))


def test_a_missing_cuda_library_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    for name, empty in (("_loaded", {}), ("_reasons", {}), ("_warned", set())):
        monkeypatch.setattr(_native, name, empty)
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded \(_C_cuda.so was not built\); install from source"):
        assert not _native.load_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.load_cuda()


def test_a_missing_cuda_library_is_the_reason_that_operators_give(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_native, "_CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    for name, empty in (("_loaded", {}), ("_reasons", {}), ("_warned", set())):
        monkeypatch.setattr(_native, name, empty)
    cuda = torch.device("cuda")
    with (
        warnings.catch_warnings(record=True) as caught,
        torch.library._scoped_library("voxtrast", "FRAGMENT") as library,
    ):
        library.define("never_compiled(Tensor image) -> Tensor")
        warnings.simplefilter("always")
        for _ in range(2):
            assert not _native.is_compiled("never_compiled", cuda)
            assert not _native.becomes_compiled("never_compiled", cuda)
            _native.warn_of_reference("never_compiled", cuda)
    (message,) = [str(warning.message) for warning in caught]
    assert "run as plain torch on cuda: the CUDA library cannot be loaded (_C_cuda.so was not built)" in message


def test_an_operator_loads_the_cuda_library_where_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, loaded = torch.device("cuda"), []
    with torch.library._scoped_library("voxtrast", "FRAGMENT") as library:
        library.define("loaded_late(Tensor image) -> Tensor")

        def load() -> bool:
            loaded.append(True)
            if len(loaded) == 2:
                library.impl("loaded_late", lambda image: image.clone(), "CUDA")
            return True

        monkeypatch.setattr(_native, "_try_cuda", load)
        assert not _native.becomes_compiled("loaded_late", torch.device("cpu"))
        assert not loaded
        assert not _native.becomes_compiled("loaded_late", cuda)
        assert _native.becomes_compiled("loaded_late", cuda)
        assert not _native.becomes_compiled("loaded_late", cuda)  # it is already
        assert _native.is_compiled("loaded_late", cuda)
        assert len(loaded) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stream_copy_on_cuda() -> None:
    assert _native.load_cuda()
    for tensor in (torch.randn(1000, 1001), torch.arange(37, dtype=torch.uint8), torch.randn(50)[1:]):
        assert torch.equal(stream_copy(tensor.cuda()).cpu(), tensor)


def builder() -> dict:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree: setup.py is not here")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


LOADED_BY_THE_FIRST_CALL = """
import sys
sys.modules["voxtrast.kernels._C"] = None
import torch
from voxtrast.kernels import _native, warp
calls, library = [], torch.library.Library("voxtrast", "IMPL")

def compiled(name, image, *rest):
    calls.append(name)
    return (image.clone(), rest[1].clone()) if name == "warp_backward" else image.clone()

def becomes_compiled(name, device):  # as where CUDA's library is loaded, on the CPU
    for operator in ("warp", "warp_backward"):
        library.impl(operator, lambda *given, operator=operator: compiled(operator, *given), "CPU")
    return True

_native.becomes_compiled = becomes_compiled
image, field = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 4, requires_grad=True)
warp(image, field).sum().backward()
_native.becomes_compiled = None  # from now on nobody asks
torch.compile(warp, fullgraph=True, backend="aot_eager")(image, field).sum().backward()
print(*calls)
"""


def test_the_call_that_loads_a_library_runs_by_it() -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOADED_BY_THE_FIRST_CALL], capture_output=True, encoding="utf-8", errors="replace"
    )
    assert run.stdout.split() == ["warp", "warp_backward"] * 2, run.stderr


def test_a_failing_nvcc_is_a_warning_unless_cuda_is_demanded(tmp_path: Path, monkeypatch, capfd) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    build = builder()["build_cuda_library"]
    monkeypatch.delenv("VOXTRAST_CUDA", raising=False)
    build(tmp_path / "kernels")
    assert "WARNING: the CUDA library is left out, because nvcc failed" in capfd.readouterr().err
    monkeypatch.setenv("VOXTRAST_CUDA", "1")
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path / "kernels")
    monkeypatch.setenv("VOXTRAST_CUDA", "0")
    build(tmp_path / "kernels")
    assert "CUDA library left out: VOXTRAST_CUDA=0" in capfd.readouterr().out


def test_without_nvcc_the_cuda_library_is_left_out(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VOXTRAST_CUDA", raising=False)
    builder()["build_cuda_library"](tmp_path)
    assert "CUDA library left out: nvcc not found" in capfd.readouterr().out


def test_without_a_cpp_compiler_nothing_is_compiled_and_setup_says_so(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert builder()["compiled_parts"]() == {}
    assert "no C++ compiler found" in capfd.readouterr().err
