"""Options as flags and YAML, and timm's command lines."""
