"""Offline converters: image folders and archives to FFCV `.beton` files with a manifest beside each."""

import lowrank_vit.common  # noqa: F401  # before anything heavy: it makes this process a command, where it is one
