"""What ranks say to each other, with two processes of their own."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from voxtrast.engine.errors import UserError
from voxtrast.engine.ranks import Ranks


def check_on_one_of_two(rank: int, folder: str, drift: float) -> None:
    """Both ranks make the same network; the second moves one weight, or has two values in each other's place (inf)."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4))
    with torch.no_grad():
        weight = network[0].weight
        if rank and drift == float("inf"):
            weight[0], weight[1] = weight[1].clone(), weight[0].clone()
        else:
            weight[2, 0, 1, 1, 1] += rank * min(drift, 1)
    outcome = "equal"
    try:
        Ranks(rank, 2, rank, torch.device("cpu")).check_equal(network)
    except UserError as error:
        outcome = str(error)
    Path(folder, f"rank{rank}").write_text(outcome, encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.parametrize("drift", [0.0, 1e-7, pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_ranks_with_other_parameters_are_found_by_all_of_them(drift: float, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_on_one_of_two, args=(str(tmp_path), drift), nprocs=2)
    outcomes = [(tmp_path / f"rank{rank}").read_text(encoding="utf-8") for rank in range(2)]
    if drift == 0:
        assert outcomes == ["equal", "equal"]
    else:
        assert all("first 0.weight" in outcome and "1 of 7 tensors" in outcome for outcome in outcomes), outcomes
