"""The model, its weights and its optimizer."""
