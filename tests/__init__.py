import lowrank_vit  # noqa: F401  before torch, see there
