"""Bad input on one rank of two ends with one clear error on both, and no hang."""

import re

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO

from ..ranks import run_ranks


def model(width=8, blocks=2, **linear):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, width, **linear) for _ in range(blocks)])


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4, sparse=True)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])


def step(network, **options):
    optimizer = APOLLO(network, **{"rank": 2, **options})
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def other_seed(rank):
    step(model(), seed=rank)


def other_lr(rank):
    step(model(), lr=0.01 * (rank + 1))


def other_model(rank):
    step(model(width=8 + rank))


def a_matrix_missing(rank):
    step(model(blocks=2 - rank))


def two_stages(rank):
    """Each rank trains another part of the model, as the stages of a pipeline do, given without names."""
    APOLLO(list(model(width=8 if rank else 12).parameters()), rank=2)


def unknown_argument(rank):
    step(model(), **({"ranks": 3} if rank else {}))


def unknown_group_key(rank):
    network = model()
    key = {"scale_typ": "tensor"} if rank else {}
    APOLLO([{"params": [network[0].weight], "rank": 2, **key}, {"params": [network[0].bias]}])


def rank_too_large(rank):
    step(model(), rank=2 if rank == 0 else 7)


def complex_parameter(rank):
    step(model(dtype=torch.complex64 if rank else torch.float32))


def no_matrix_in_a_low_rank_group(rank):
    network = model()
    params = [network[0].bias] if rank else [network[0].weight]
    APOLLO([{"params": params, "rank": 2}])


def empty_low_rank_group(rank):
    network = model()
    APOLLO([{"params": [] if rank else [network[0].weight], "rank": 2}, {"params": [network[1].weight]}])


def sparse_gradient(rank):
    network = Sparse()
    optimizer = APOLLO(network, rank=2)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    if rank:
        network.embed.weight.grad = torch.ones(5, 4).to_sparse()
    optimizer.step()


def changed_after_construction(rank):
    """The fingerprint at the first step catches what construction could not see."""
    network = model()
    optimizer = APOLLO(network, rank=2)
    optimizer.param_groups[0]["lr"] = 0.5 * (rank + 1)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


FAULTS = {
    other_seed: "seed is 0 on rank 0 and 1 on rank 1",
    other_lr: "lr of parameter group 0 is 0.01 on rank 0 and 0.02 on rank 1",
    other_model: "parameter 0.weight is ((8, 6), ",
    a_matrix_missing: "parameter 1.weight is .* and missing on rank 1.*such as the stages of a pipeline.*process_group",
    two_stages: "parameter param_0 is ((12, 6), .*process_group=GROUP, the group of the ranks",
    unknown_argument: "rank 1: ValueError: unknown argument 'ranks'. Did you mean 'rank'",
    unknown_group_key: "rank 1: .*'scale_typ'. Did you mean 'scale_type'",
    rank_too_large: "rank 7 is larger than 0.weight of shape (8, 6.*Use rank <= 6",
    complex_parameter: "rank 1: .*complex64",
    no_matrix_in_a_low_rank_group: "rank 1: .*only matrices",
    empty_low_rank_group: "rank 1: .*holds no matrix",
    sparse_gradient: "rank 1: .*embed.weight has a sparse gradient",
    changed_after_construction: "lr of parameter group 0 is 0.5 on rank 0 and 1.0 on rank 1",
}


def all_faults(rank, world):
    messages = {}
    for fault in FAULTS:
        try:
            fault(rank)
        except ValueError as error:
            messages[fault.__name__] = str(error)
    return messages


def test_one_clear_error_on_both_ranks():
    first, second = run_ranks(all_faults, 2)
    # The rank that fails raises its own error, and the other one says whose it is.
    assert {name: text.removeprefix("rank 1: ValueError: ") for name, text in first.items()} == second
    for fault, pattern in FAULTS.items():
        pattern = re.escape(pattern).replace(re.escape(".*"), ".*")
        assert re.search(pattern, first.get(fault.__name__, "no error")), (fault.__name__, first.get(fault.__name__))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"eps": -1e-8}, "eps must be >= 0"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"rank": 1.5}, "rank must be an integer"),
        ({"scale": 0.0}, "scale must be > 0"),
        ({"scale_type": "row"}, 'scale_type must be "channel" or "tensor", got \'row\''),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"proj": "qr"}, 'proj must be "random"'),
        ({"proj_type": "left"}, 'proj_type must be "std"'),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"cache_projection": "yes"}, "cache_projection must be"),
        ({"exclude": "0|1"}, "no low-rank matrix found"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        APOLLO(model(), **{"rank": 2, **options})
