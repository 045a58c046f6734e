"""What bytes mean: .beton, its sidecars, JPEG."""
