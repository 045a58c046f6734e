"""Offline converters: image folders and archives to FFCV `.beton` files with a manifest beside each."""
