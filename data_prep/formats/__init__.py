"""File formats: .beton, its sidecars, JPEG."""
