"""Pictures of what a run, or an analysis, knows of spectra."""
