"""What is compiled on first use: once, whoever asks; with a clear line where it cannot be."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from voxtrast.engine.data import native
from voxtrast.engine.errors import UserError

ANSWER = native.Library("answer", ("answer.cpp",))
# Against Python's own interface, which compiles in a fraction of the time of pybind11's.
MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_answer_to_python", "42", -1, nullptr};
PyMODINIT_FUNC PyInit__answer_to_python() { return PyModule_Create(&definition); }
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOXTRAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which the compiler adds a line whenever it compiles or links."""
    log, script = tmp_path / "compilations", tmp_path / "counting-compiler"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo x >> {log}\nexec {shutil.which("g++")} "$@"\n')
    script.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CXX", str(script))
    return log


def write_answer(root: Path, body: str = "return 42;") -> Path:
    root.mkdir(exist_ok=True)
    (root / "answer.cpp").write_text(f'extern "C" __attribute__((visibility("default"))) int answer() {{ {body} }}\n')
    return root


def test_a_library_is_compiled_once_and_then_taken_from_the_cache(tmp_path: Path, compilations: Path) -> None:
    root = write_answer(tmp_path / "csrc")
    path = native.build(ANSWER, root)
    assert ctypes.CDLL(str(path)).answer() == 42
    assert compilations.read_text(encoding="utf-8") == "x\nx\n"
    assert native.build(ANSWER, root) == path
    assert compilations.read_text(encoding="utf-8") == "x\nx\n"


@pytest.mark.parametrize("what", ["source", "header", "flags"])
def test_whatever_changes_the_result_is_compiled_anew(tmp_path: Path, what: str) -> None:
    root = write_answer(tmp_path / "csrc")
    before = native.build(ANSWER, root)
    library = ANSWER
    if what == "source":
        write_answer(root, "return 43;")
    elif what == "header":
        (root / "answer.inl").write_text("// included or not\n")
    else:
        library = native.Library("answer", ("answer.cpp",), flags=("-DNAME",))
    assert native.build(library, root) != before


def test_two_processes_at_once_compile_once(tmp_path: Path, compilations: Path) -> None:
    root = write_answer(tmp_path / "csrc")
    program = (
        "import pathlib, sys; from voxtrast.engine.data import native; "
        "print(native.build(native.Library('answer', ('answer.cpp',)), pathlib.Path(sys.argv[1])))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=60)[0] for process in started}
    assert len(paths) == 1
    assert compilations.read_text(encoding="utf-8") == "x\nx\n"


def test_what_a_killed_process_left_behind_is_no_obstacle(tmp_path: Path, cache: Path) -> None:
    root = write_answer(tmp_path / "csrc")
    path = native.build(ANSWER, root)
    left = path.parent.with_name(f"{path.parent.name}.0a1b2c3d.building")
    path.parent.rename(left)
    (left / "0.o").write_text("half an object")
    assert ctypes.CDLL(str(native.build(ANSWER, root))).answer() == 42
    assert left.is_dir(), "it may be at work on a disk without locks"
    os.utime(left, (0, 0))
    native.build(native.Library("answer", ("answer.cpp",), flags=("-DNAME",)), root)
    assert not list(cache.glob("*.building"))


def test_where_there_are_no_locks_the_first_result_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    root = write_answer(tmp_path / "csrc")
    monkeypatch.setattr(native.fcntl, "flock", refuse)
    run, first = native._run, []

    def run_while_another_builds(command: list[str]) -> tuple[int, str]:
        if "-shared" in command and not first:
            first.append("")
            first.append(str(native.build(ANSWER, root)))
        return run(command)

    monkeypatch.setattr(native, "_run", run_while_another_builds)
    assert str(native.build(ANSWER, root)) == first[1]
    assert ctypes.CDLL(first[1]).answer() == 42


def test_a_module_that_does_not_load_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "csrc"
    root.mkdir()
    (root / "module.cpp").write_text(MODULE.replace("_answer_to_python", "_damaged"))
    path = native.build(native.module_library("_damaged", ("module.cpp",)), root)
    path.write_bytes(b"of another machine")
    with pytest.raises(UserError, match=r"_damaged\.so: Python does not load it .*delete that folder"):
        native.load_module("_damaged", ("module.cpp",), root)


def test_a_broken_source_names_the_first_error_and_where_the_rest_is(tmp_path: Path, cache: Path) -> None:
    root = write_answer(tmp_path / "csrc", "return forty_two;")
    with pytest.raises(UserError, match=r"answer does not compile with .*forty_two.*; point CXX") as caught:
        native.build(ANSWER, root)
    (log,) = cache.glob("*.log")
    assert str(log) in str(caught.value)
    assert "answer.cpp" in log.read_text(encoding="utf-8")
    write_answer(root)
    native.build(ANSWER, root)


def test_a_missing_symbol_of_the_linker_is_an_error_at_once(tmp_path: Path) -> None:
    root = write_answer(tmp_path / "csrc", "extern int other(); return other();")
    with pytest.raises(UserError, match=r"undefined reference to .*other"):
        native.build(native.Library("answer", ("answer.cpp",), links=("-Wl,--no-undefined",)), root)


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_answer(tmp_path / "csrc")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no C\+\+ compiler found \(g\+\+, c\+\+, clang\+\+\).*install g\+\+"):
        native.build(ANSWER, root)
    monkeypatch.setenv("CXX", "my-compiler -v")
    with pytest.raises(UserError, match="CXX=my-compiler -v"):
        native.build(ANSWER, root)


def test_a_compiler_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="false --version fails"):
        native.build(ANSWER, write_answer(tmp_path / "csrc"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{cache}: the folder for compiled operators.*set VOXTRAST_CACHE"):
        native.build(ANSWER, write_answer(tmp_path / "csrc"))


def test_a_cache_on_a_read_only_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXTRAST_CACHE", "/proc/voxtrast")  # which nobody may create, root neither
    with pytest.raises(UserError, match="/proc/voxtrast: the folder for compiled operators cannot be written"):
        native.build(ANSWER, write_answer(tmp_path / "csrc"))


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of answer\.cpp"):
        native.build(ANSWER, tmp_path)


def test_a_python_module_is_compiled_and_imported_once(tmp_path: Path) -> None:
    root = tmp_path / "csrc"
    root.mkdir()
    (root / "module.cpp").write_text(MODULE)
    module = native.load_module("_answer_to_python", ("module.cpp",), root)
    assert module.__doc__ == "42"
    assert native.load_module("_answer_to_python", ("module.cpp",), root) is module


def test_a_python_module_without_pybind11_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(UserError, match=r"pybind11: not installed.*pip install pybind11"):
        native.load_module("_another_module", ("module.cpp",))


def test_missing_cuda_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (native.cuda_headers() / "cuda_runtime.h").is_file()
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"cuda_runtime\.h, .*not found.*pip install nvidia-cuda-runtime"):
        native.cuda_headers()


def test_the_sources_are_where_the_package_is() -> None:
    assert (native.SOURCES / "geometry" / "plan.h").is_file()
