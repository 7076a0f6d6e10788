"""Which CUDA compiler is taken, and what is said where there is none that serves."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtrast.engine.data import cuda_toolkit, graph, native
from voxtrast.engine.data.cuda_toolkit import NoToolkit, find_toolkit
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import View, ViewSpec


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    """As it is here: whoever comes first in a process decides for all."""
    native.load_plugin()


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No nvcc and no choice of the user's; compiled for 9.0."""
    for name in ("CUDACXX", "CUDA_HOME", "VOXTRAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", "90")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_toolkit, "USUAL_PLACE", tmp_path / "nowhere" / "nvcc")


def write_nvcc(place: Path, release: str = "13.0", *, code: int = 0) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(
        f"#!/bin/sh\necho 'nvcc: NVIDIA (R)'; echo 'tools, release {release}, V{release}.88'; exit {code}\n",
        encoding="utf-8",
    )
    place.chmod(0o755)
    return place


def test_the_place_that_is_named_comes_before_those_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [write_nvcc(tmp_path / name / "nvcc") for name in ("named", "home/bin", "path", "nvidia/cu13/bin")]
    wheel = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setenv("CUDACXX", str(places[0]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cuda_toolkit.importlib.util, "find_spec", lambda name: wheel)
    assert find_toolkit(13).nvcc == str(places[0])
    monkeypatch.delenv("CUDACXX")
    for place in places[1:]:
        assert find_toolkit(13).nvcc == str(place)
        place.unlink()
    with pytest.raises(NoToolkit, match=r"nvcc not found.*pip install nvidia-cuda-nvcc"):
        find_toolkit(13)


def test_a_compiler_of_another_cuda_than_dalis_is_named(tmp_path: Path) -> None:
    nvcc = write_nvcc(tmp_path / "path" / "nvcc", "12.4")
    with pytest.raises(NoToolkit, match=rf"{nvcc} is of CUDA 12\.4, and the DALI .* of CUDA 13: point CUDACXX"):
        find_toolkit(13)
    assert find_toolkit(12).release == find_toolkit(None).release == "12.4"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [("/nowhere/nvcc", "is not there"), ("false", "false --version fails"), ("true", "NVIDIA's nvcc")],
)
def test_a_chosen_compiler_that_cannot_serve_is_named(
    chosen: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", chosen)
    with pytest.raises(NoToolkit, match=message):
        find_toolkit(13)


def test_cuda_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("VOXTRAST_CUDA", "0")
    with pytest.raises(NoToolkit, match="VOXTRAST_CUDA=0"):
        find_toolkit(13)


def test_it_compiles_for_what_is_chosen_or_else_for_the_gpus_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", "80;90a")
    command = find_toolkit(13).command("g++")
    assert "-gencode=arch=compute_80,code=sm_80" in command
    assert "-gencode=arch=compute_90a,code=sm_90a" in command
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", "sm_90")
    with pytest.raises(UserError, match=r'VOXTRAST_CUDA_ARCHITECTURES=sm_90: expected compute capabilities.*"80;90"'):
        find_toolkit(13)
    monkeypatch.delenv("VOXTRAST_CUDA_ARCHITECTURES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoToolkit, match="finds no GPU"):
        find_toolkit(13)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 6), (9, 0)][device])
    assert find_toolkit(13).architectures == ("86", "90")


def test_what_is_compiled_for_another_gpu_has_a_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(tmp_path / "path" / "nvcc")
    first = native.views_cuda_library()
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", "120")
    assert native.views_cuda_library() != first
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", "90")
    write_nvcc(tmp_path / "path" / "nvcc", "13.4")
    assert native.views_cuda_library() != first


def test_sources_that_nvcc_does_not_compile_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path / "path" / "nvcc")
    library = native.views_cuda_library()
    nvcc = Path(library.nvcc[0])
    nvcc.write_text(
        "#!/bin/sh\necho \"nvcc fatal   : Unsupported gpu architecture 'compute_90'\"; exit 1\n", encoding="utf-8"
    )
    monkeypatch.setenv("VOXTRAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"views_cuda does not compile with .*nvcc 13\.0 and g\+\+.*compute_90.*VOXTRAST_CUDA=0"
    ):
        native.build(library)


class Unbuilt(graph.Pipeline):  # type: ignore[misc]
    """A pipeline that needs no GPU as long as nobody runs it; remembers where its outputs are."""

    devices: tuple[str, ...] = ()

    def set_outputs(self, *outputs: Any) -> None:
        super().set_outputs(*outputs)
        Unbuilt.devices = tuple(output.device for output in outputs)

    def build(self) -> None:
        pass


def devices_of_views(device_id: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setattr(graph, "Pipeline", Unbuilt)
    spec = ViewSpec((8, 8, 8), {"view": View(clean=True)})
    options = {"half": False, "slots": 1, "threads": 1, "prefetch": 1}
    graph.build_pipeline(spec, lambda: ([], []), device_id=device_id, **options)
    return Unbuilt.devices


def test_without_a_cuda_compiler_views_are_copied_to_the_gpu_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph, "load_plugin", lambda: "nvcc not found: install it")
    with pytest.warns(RuntimeWarning, match="on the CPU and copied to GPU 0, .* speed: nvcc not found: install it"):
        assert devices_of_views(0, monkeypatch) == ("gpu", "gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices_of_views(None, monkeypatch) == ("cpu", "cpu")
