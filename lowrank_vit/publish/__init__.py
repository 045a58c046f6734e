"""A run's weights in timm's hub layout, with a model card, as a folder or on the Hugging Face hub."""
