import lowrank_vit  # noqa: F401  # pyright: ignore[reportUnusedImport]  before torch, see there
