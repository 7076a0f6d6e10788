"""Two views of one image have embeddings that agree: three ways to keep those of all images from becoming one.

Each is called with the backbone, which it does not own, and two views; it gives the encoder's maps of the first view,
for whoever decodes them, the embeddings to watch, and the loss.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels import bank_info_nce
from ..backbone import Backbone
from .across_ranks import rank_and_size, sum_over_ranks
from .batch_norm import GlobalBatchNorm
from .feature_bank import FeatureBank
from .heads import Predictor, pooled, projector
from .momentum_twin import MomentumTwin
from .running_standard import forget_standards, update_standards

Found = tuple[list[Tensor], Tensor, Tensor]  # maps, embeddings, loss
_EPSILON = 1e-5  # of a variance, as in batch norm


class MomentumContrast(nn.Module):
    """MoCo v2: q is the query's embedding, k the key's by the momentum twin, Q the keys of earlier steps.

        L = mean_i -log exp(<q_i, k_i> / T) / (exp(<q_i, k_i> / T) + sum_j exp(<q_i, Q_j> / T))

    Args:
        bank: K, the length of Q.
        temperature: T.
        momentum: of the twin.
        standardise: the pooled features, see `RunningStandard`; not in the published head.
    """

    def __init__(
        self,
        backbone: Backbone,
        hidden: int,
        outputs: int,
        *,
        bank: int,
        temperature: float,
        momentum: float,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        channels = backbone.encoder_channels[-1]
        self.head = projector(channels, hidden, outputs, standardise)
        self.key_backbone = MomentumTwin(backbone, momentum)
        self.key_head = MomentumTwin(self.head, momentum)
        self.bank = FeatureBank(bank, outputs, "sphere")

    def forward(self, backbone: Backbone, query_view: Tensor, key_view: Tensor, group: Any = None) -> Found:
        maps = backbone.encode(query_view)
        query = self.head(pooled(maps[-1]))
        key = self.key(key_view)
        loss = bank_info_nce(query, key, self.bank.vectors, temperature=self.temperature)
        self.bank.collect(key)
        return maps, query, loss

    def key(self, image: Tensor) -> Tensor:
        """(B, outputs) of unit length. The twin's decoder is not run."""
        encoder_maps, _ = self.key_backbone(image, 0)
        return functional.normalize(self.key_head(pooled(encoder_maps[-1])), dim=1)

    def after_step(self, backbone: Backbone, group: Any) -> None:
        self.key_backbone.update(backbone)
        self.key_head.update(self.head)
        update_standards(self, group)
        self.bank.push(group)

    def begin_anew(self, backbone: Backbone, generator: torch.Generator) -> None:
        """The twin follows another network now, of which the bank has no key."""
        self.key_backbone.copy(backbone)
        self.bank.forget(generator)
        forget_standards(self)


class SimSiam(nn.Module):
    """L = -(cos(p1, z2) + cos(p2, z1)) / 2 with p = predictor(z) and no gradient to the z on the right."""

    def __init__(self, backbone: Backbone, hidden: int, outputs: int, *, predictor_hidden: int) -> None:
        super().__init__()
        self.projector = DeepProjector(backbone.encoder_channels[-1], hidden, outputs, last_norm=True)
        self.predictor = Predictor(outputs, predictor_hidden)

    def forward(self, backbone: Backbone, first_view: Tensor, second_view: Tensor, group: Any = None) -> Found:
        maps, features, other_features = encode_both(backbone, first_view, second_view)
        z1, z2 = self.projector(features, group), self.projector(other_features, group)
        p1, p2 = self.predictor(z1, group), self.predictor(z2, group)
        return maps, z1, simsiam_loss(p1, p2, z1, z2)

    def after_step(self, backbone: Backbone, group: Any) -> None:
        pass

    def begin_anew(self, backbone: Backbone, generator: torch.Generator) -> None:
        pass


class BarlowTwins(nn.Module):
    """L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, C the correlation of the views' channels over the batch.

    Args:
        off_diagonal: lambda.
    """

    def __init__(self, backbone: Backbone, hidden: int, outputs: int, *, off_diagonal: float) -> None:
        super().__init__()
        self.off_diagonal = off_diagonal
        self.projector = DeepProjector(backbone.encoder_channels[-1], hidden, outputs, last_norm=False)

    def forward(self, backbone: Backbone, first_view: Tensor, second_view: Tensor, group: Any = None) -> Found:
        maps, features, other_features = encode_both(backbone, first_view, second_view)
        z1, z2 = self.projector(features, group), self.projector(other_features, group)
        return maps, z1, barlow_twins_loss(z1, z2, self.off_diagonal, group)

    def after_step(self, backbone: Backbone, group: Any) -> None:
        pass

    def begin_anew(self, backbone: Backbone, generator: torch.Generator) -> None:
        pass


def encode_both(backbone: Backbone, first_view: Tensor, second_view: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The maps of the first view and the pooled features of both, in one pass."""
    count = len(first_view)
    maps = backbone.encode(torch.cat((first_view, second_view)))
    features = pooled(maps[-1])
    return [each[:count] for each in maps], features[:count], features[count:]


class DeepProjector(nn.Module):
    """Three linear layers with batch norm, over the whole batch, and ReLU between them; behind the last one a batch
    norm without scale and shift (SimSiam), or nothing (Barlow Twins)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, last_norm: bool) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(width, hidden, bias=False) for width in (inputs, hidden))
        self.norms = nn.ModuleList(GlobalBatchNorm(hidden) for _ in self.hidden)
        self.last = nn.Linear(hidden, outputs, bias=False)
        self.last_norm = GlobalBatchNorm(outputs, affine=False) if last_norm else None

    def forward(self, vectors: Tensor, group: Any = None) -> Tensor:
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            vectors = torch.relu(norm(linear(vectors), group))
        projected: Tensor = self.last(vectors)
        return projected if self.last_norm is None else self.last_norm(projected, group)


def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Of (b, C) each; float32 at least."""
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, z1, z2 = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (p1, p2, z1, z2))
        first = functional.cosine_similarity(p1, z2.detach(), dim=1)
        second = functional.cosine_similarity(p2, z1.detach(), dim=1)
        return -0.5 * (first + second).mean()


def barlow_twins_loss(z1: Tensor, z2: Tensor, off_diagonal: float, group: Any = None) -> Tensor:
    """Of the embeddings (b, C) of two views, over the batch of all ranks of the group; float32 at least."""
    count = len(z1) * rank_and_size(group)[1]
    with torch.autocast(z1.device.type, enabled=False):  # in bfloat16, 1 - C_ii of views that agree is rounding alone
        products = _standardised(z1, count, group).T @ _standardised(z2, count, group)
    correlation = sum_over_ranks(products, group) / count
    diagonal = correlation.diagonal()
    others = correlation - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + off_diagonal * others.square().sum()


def _standardised(embeddings: Tensor, count: int, group: Any) -> Tensor:
    """Mean 0 and variance 1 of each channel over the global batch. In float64: equal embeddings must become zeros, and
    not what rounding leaves times 1 / sqrt(epsilon)."""
    wide = embeddings.double()
    centred = wide - sum_over_ranks(wide.sum(0), group) / count
    variance = sum_over_ranks(centred.square().sum(0), group) / count
    return (centred / (variance + _EPSILON).sqrt()).to(torch.promote_types(embeddings.dtype, torch.float32))
