"""Where the weights of LoRA adapters for one base lie in their flat tensors, and as pairs for the lean pass."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.models.blocks import FAMILIES, products_of, sparse_layers
from trimtab.models.lean import Delta, Deltas

__all__ = ["Layout", "Shape"]


class Shape(NamedTuple):
    """What decides how a flat tensor is laid out."""

    rank: int
    """The largest of the adapter's; smaller ones are padded with zeros."""
    products: tuple[int, ...]
    """Which of a layer's products (`trimtab.models.blocks.products_of`) it has anything for."""

    @classmethod
    def around(cls, shapes: Iterable["Shape"]) -> "Shape":
        """The smallest one that has room for all of these."""
        ranks, products = zip(*shapes, strict=True)
        return cls(max(ranks), tuple(sorted({index for some in products for index in some})))

    @classmethod
    def beside(cls, shapes: Iterable["Shape"]) -> "Shape":
        """The shape of one adapter that has all of these behind each other."""
        ranks, products = zip(*shapes, strict=True)
        return cls(sum(ranks), tuple(sorted({index for some in products for index in some})))


class _Place(NamedTuple):
    """Where the pair of one linear layer lies in the region of its product."""

    product: int
    block: int
    down: slice
    """Columns of A."""
    up: slice
    """Columns of its block of B."""


class Layout:
    """Where the pairs of adapters for one base lie in their flat tensors.

    A flat tensor is a row of regions, one for each product: `[n, r, E]` for a product of n linear layers. Along E stand, layer
    by layer, the inputs of A and then the outputs of B; so A and B are both `[n·r, …]` with long rows.

    Args:
        model: the stock model.
        first: the first of its layers that adapters may adapt.
    """

    def __init__(self, model: Any, first: int = 0) -> None:
        family = FAMILIES[model.config.model_type]
        products = [products_of(family, sparse=sparse) for sparse in sparse_layers(family, model.config)]
        self.blocks = [max(map(len, paths)) for paths in zip(*products, strict=True)]
        self.columns = [0] * len(self.blocks)
        self.places: dict[str, _Place] = {}
        self._spans: list[list[tuple[int, int, int] | None]] = []  # layer and product: where A starts, B does, and it ends
        for i, layer in enumerate(model.model.layers[first:], first):
            self._spans.append([])
            for product, paths in enumerate(products[i]):
                if not paths:
                    self._spans[-1].append(None)
                    continue
                linears = [layer.get_submodule(path) for path in paths]
                start = self.columns[product]
                end = middle = start + linears[0].in_features
                for block, (path, linear) in enumerate(zip(paths, linears, strict=True)):
                    up = slice(end, end + linear.out_features)
                    self.places[f"model.layers.{i}.{path}"] = _Place(product, block, slice(start, middle), up)
                    end = up.stop
                self._spans[-1].append((start, middle, end))
                self.columns[product] = end

    def size(self, shape: Shape) -> int:
        """Elements of a flat tensor."""
        return sum(self.blocks[product] * shape.rank * self.columns[product] for product in shape.products)

    def regions(self, flat: Tensor, shape: Shape) -> dict[int, Tensor]:
        """Views `[G, n, r, E]` of the products in flat tensors `[G, size]`."""
        views, start = {}, 0
        for product in shape.products:
            size = (self.blocks[product], shape.rank, self.columns[product])
            end = start + size[0] * size[1] * size[2]
            views[product] = flat[:, start:end].view(-1, *size)
            start = end
        return views

    def place(self, source: Tensor, shape: Shape, flat: Tensor, of: Shape, start: int, weight: float) -> None:
        """Write what an adapter adds, times a weight, into other flat tensors, from one of their ranks on.

        Args:
            source: `[1, size]` the adapter's.
            shape: how it is laid out.
            flat: `[1, size]` zeros, or what other ranks were written to.
            of: how that is laid out.
            start: the first rank that is written.
            weight: what B is multiplied by.
        """
        regions = self.regions(flat, of)
        for product, region in self.regions(source, shape).items():
            target = regions[product][:, :, start : start + shape.rank]
            target.copy_(region)
            if weight != 1.0:
                for span in self._spans:
                    if (columns := span[product]) is not None:
                        target[..., columns[1] : columns[2]] *= weight

    def shared(self, pairs: Deltas, shape: Shape, shares: Tensor) -> Deltas:
        """Pairs `[in, n·r]` and `[n·r, out]` with how much of each rank `[slots, r]` the slots take."""
        each = {product: shares.repeat(1, self.blocks[product]) for product in shape.products}
        return [[pair and (*pair, each[i]) for i, pair in enumerate(layer)] for layer in pairs]

    def deltas(self, flat: Tensor, shape: Shape) -> Deltas:
        """The pairs of every layer and product in flat tensors `[G, size]`, as views; of one, those without G.

        A batch of products of one is several times as slow as the product.
        """
        stacked = {product: region.flatten(1, 2) for product, region in self.regions(flat, shape).items()}

        def pair(region: Tensor, start: int, middle: int, end: int) -> Delta:
            if len(region) == 1:
                return region[0, :, start:middle].mT, region[0, :, middle:end]
            return region[:, :, start:middle], region[:, :, middle:end]

        return [[pair(stacked[i], *span) if span and i in stacked else None for i, span in enumerate(s)] for s in self._spans]
