"""The model, its weights, its optimizer and its losses."""
