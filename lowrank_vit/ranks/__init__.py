"""The processes of a run: joining, sums, ending together."""
