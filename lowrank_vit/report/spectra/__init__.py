"""Pictures of the spectra of a run or an analysis."""
