"""The walk with the N x N matrix written out, pair by pair: what the stencil has to equal."""

import torch


def places(space, thickness=1.0):
    """(N, len(space)) float64, where the cells of a slice or of a volume lie."""
    grids = torch.meshgrid(*(torch.arange(length, dtype=torch.float64) for length in space), indexing="ij")
    at = torch.stack([grid.flatten() for grid in grids], dim=1)
    if len(space) == 3:
        at[:, 0] *= thickness
    return at


def dense_matrix(maps, near, beta, contrast, trust=None):
    """(B, N, N) weights; near (N, N) is 0 for cells that are no neighbours. Trust (B, P, N)."""
    flat = maps.flatten(2)
    difference = (flat[..., :, None] - flat[..., None, :]).abs()
    if trust is None:
        return torch.exp(-contrast * difference.mean(dim=1)) ** beta * near
    both = (trust[..., :, None] * trust[..., None, :]).sqrt()
    total = both.sum(dim=1)
    mean = (difference * both).sum(dim=1) / total.where(total > 0, 1)
    weights = (torch.exp(-contrast * mean) ** beta).where(total > 0, 0) * near
    return weights.where(~torch.eye(len(near), dtype=torch.bool), 1.0)


def dense_walk(cam, weights, steps, rescale, inside=None, restart=0.0):
    """(B, C, *space) activation walked along (B, N, N) weights; inside (B, C, *space) bool."""
    space = cam.shape[2:]
    inside = torch.ones_like(cam, dtype=torch.bool) if inside is None else inside.expand_as(cam)
    kept = inside.flatten(2).to(cam.dtype)
    both = kept[..., :, None] * kept[..., None, :] * weights[:, None]
    transition = both / both.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    x = start = cam.flatten(2) * kept
    if steps is None:
        system = torch.eye(x.shape[-1], dtype=cam.dtype) - (1 - restart) * transition
        x = restart * torch.linalg.solve(system, start[..., None])[..., 0]
        return scaled(x, inside, space) if rescale else x.unflatten(2, space)
    for _ in range(steps):
        x = (1 - restart) * torch.einsum("bcij,bcj->bci", transition, x) + restart * start
        x = scaled(x, inside, space).flatten(2) if rescale else x
    return x.unflatten(2, space)


def scaled(x, inside, space):
    """Each slice's map to [0, 1] over its inside; what is constant stays."""
    maps = x.unflatten(2, space).clone()
    for index in torch.cartesian_prod(*(torch.arange(length) for length in maps.shape[:-2])).tolist():
        values = maps[tuple(index)][inside[tuple(index)]]
        if len(values) and values.max() - values.min() >= 1e-6:
            values = (values - values.min()) / (values.max() - values.min())
        maps[tuple(index)][inside[tuple(index)]] = values
    return maps
